//! Sizes that all kernels of a cache agree on.

use attention::HeadShape;

use crate::Error;
use crate::config::{Algorithm, Plan};
use crate::page::PageSpec;

/// Sizes of one layer of a batch. A row is a (request, KV head) pair: row = request · KV heads + KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Requests of a batch; places without one have length 0.
    pub requests: usize,
    /// Heads and sizes.
    pub shape: HeadShape,
    /// What a page looks like.
    pub page: PageSpec,
    /// Closed pages that a request may have.
    pub max_pages: usize,
    /// Pages that a row may select.
    pub max_selected: usize,
    /// Slots of a row.
    pub slots: usize,
    /// Open pages that a row may have: a prompt before it is closed, or a context that stays open as a whole.
    pub max_open: usize,
    /// Runs of device memory, each of one head's page.
    pub runs: usize,
    /// Pages of host memory, each with a run per KV head.
    pub host_pages: usize,
}

impl Extent {
    /// Sizes for `requests` requests of up to `max_tokens` tokens under a plan with fixed partitions, each row with the slots of
    /// so much buffering and a run for every slot and open page. `max_open_tokens` are at least those of a prompt before it is
    /// closed; contexts that are dense fit in any case.
    ///
    /// # Errors
    /// [`Error::Argument`] for clusters, whose partitions are no whole pages, and a last layer that is dense at any context.
    pub fn of(
        plan: &Plan,
        requests: usize,
        max_tokens: usize,
        max_open_tokens: usize,
        buffering: f64,
    ) -> Result<Self, Error> {
        if let Algorithm::Clusters { .. } = plan.config().algorithm {
            return Err(Error::argument("algorithm", "partitions of whole pages", "clusters"));
        }
        let dense = plan.dense_tokens(plan.layers().len() - 1);
        if dense == usize::MAX {
            return Err(Error::argument("dense_layers", "a last layer that selects", "a dense one"));
        }
        let (page, shape) = (*plan.page(), plan.layers()[0].shape);
        // The token that makes a context too long for the budget is open until it is closed.
        let longest = dense.min(max_tokens) + 1;
        let max_open = page.pages_of(max_open_tokens.max(longest).max(plan.closing()));
        let slots = plan.slots(buffering);
        let max_pages = page.pages_of(max_tokens);
        Ok(Extent {
            requests,
            shape,
            page,
            max_pages,
            max_selected: plan.effective_budget().pages,
            slots,
            max_open,
            runs: requests * shape.kv_heads() * (slots + max_open),
            host_pages: requests * max_pages,
        })
    }

    /// Checks that the sizes can be counted and agree with each other.
    pub(super) fn check(&self) -> Result<(), Error> {
        for (argument, value) in [
            ("requests", self.requests),
            ("max_pages", self.max_pages),
            ("max_selected", self.max_selected),
            ("slots", self.slots),
            ("max_open", self.max_open),
            ("runs", self.runs),
            ("host_pages", self.host_pages),
            ("requests", self.requests.saturating_mul(self.shape.kv_heads())),
        ] {
            size(argument, value)?;
        }
        let dims = (self.shape.qk_dim(), self.shape.v_dim());
        if (self.page.qk_dim(), self.page.v_dim()) != dims {
            let found = format!("{} and {}", self.page.qk_dim(), self.page.v_dim());
            return Err(Error::argument(
                "page",
                format!("keys and values of {} and {}", dims.0, dims.1),
                found,
            ));
        }
        Ok(())
    }

    /// (Request, KV head) pairs.
    pub const fn rows(&self) -> usize {
        self.requests * self.shape.kv_heads()
    }

    /// Query vectors.
    pub(super) const fn heads(&self) -> usize {
        self.requests * self.shape.q_heads()
    }
}

/// A size as the kernels count it.
pub(super) fn size(argument: &'static str, value: usize) -> Result<u32, Error> {
    let fits = u32::try_from(value).ok().filter(|&value| value > 0 && value <= 1 << 30);
    fits.ok_or_else(|| Error::argument(argument, "1 to 2³⁰", value))
}

/// A count that may be 0, as the kernels take it.
pub(super) fn count(argument: &'static str, value: usize) -> Result<u32, Error> {
    if value == 0 { Ok(0) } else { size(argument, value) }
}

/// The logarithm of a page's tokens, which are a power of two.
pub(super) fn page_shift(page: &PageSpec) -> u32 {
    page.tokens().trailing_zeros()
}

//! What a step is planned for, its parts' plans, and the buffers that it needs.

use attention::AttentionSpec;
use attention::gpu::Splits;
use cuda::workspace::{Layout, Region};

use super::super::{
    AttendConfig, AttendPlan, Extent, GatherConfig, GatherPlan, PagesConfig, PagesPlan, ResolveConfig,
    ResolvePlan, SelectConfig, SelectPlan,
};
use super::Tables;
use crate::Error;
use crate::config::{Algorithm, Plan};

/// What steps are for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepConfig {
    /// Sizes; see [`Extent::of`].
    pub extent: Extent,
    /// Most new tokens of a request in one [`Step::prompt`](super::Step::prompt).
    pub prompt_tokens: usize,
    /// How the keys of a row are split over blocks.
    pub splits: Splits,
    /// Blocks of a gather or write-back, see [`GatherConfig::blocks`]; [`calibrate`](super::super::calibrate) finds the number.
    pub link_blocks: usize,
    /// SMs of the device.
    pub sm_count: u32,
}

/// A checked step.
#[derive(Debug, Clone)]
pub struct StepPlan {
    pub(super) config: StepConfig,
    pub(super) attend: AttendPlan,
    pub(super) select: SelectPlan,
    pub(super) resolve: ResolvePlan,
    pub(super) gather: GatherPlan,
    pub(super) pages: PagesPlan,
    pub(super) prompt: PagesPlan,
    pub(super) work: Work,
}

/// Buffers of a step.
#[derive(Debug, Clone)]
pub(super) struct Work {
    pub(super) layout: Layout,
    pub(super) aggregated: Region<f32>,
    pub(super) selected: Region<u32>,
    pub(super) selected_epoch: Region<u32>,
    pub(super) slot_of: Region<u32>,
    pub(super) misses: Region<u32>,
    pub(super) num_misses: Region<u32>,
    pub(super) closing: Region<u32>,
    pub(super) num_closing: Region<u32>,
    pub(super) partial: Region<f32>,
    pub(super) partial_lse: Region<f32>,
    pub(super) select: Region<u8>,
    pub(super) lists: Region<u8>,
    pub(super) attend: Region<u8>,
}

impl StepPlan {
    /// Plans the steps of one layer of `plan`. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for an algorithm without training-free summaries, whose scores [`Choose`](super::super::Choose) takes, and for
    /// sizes that do not fit; [`Error::Cuda`] for a shape that no kernel is written for.
    pub fn new(plan: &Plan, layer: usize, config: StepConfig) -> Result<Self, Error> {
        let layers = plan.layers().len();
        let Some(AttentionSpec { score, .. }) = plan.layers().get(layer).copied() else {
            return Err(Error::argument("layer", format!("below {layers}"), layer));
        };
        let Algorithm::Pages { scorer, chunk } = plan.config().algorithm else {
            return Err(Error::argument("algorithm", "chunks with training-free summaries", "another"));
        };
        let dense_tokens = plan.dense_tokens(layer);
        if dense_tokens == usize::MAX {
            return Err(Error::argument("layer", "one that selects", "one that is dense at any context"));
        }
        let extent = config.extent;
        extent.check()?;
        if (extent.page, extent.shape) != (*plan.page(), plan.layers()[layer].shape) {
            let expected = format!("the plan's {:?} and {}", plan.page(), plan.layers()[layer].shape);
            return Err(Error::argument(
                "extent",
                expected,
                format!("{:?} and {}", extent.page, extent.shape),
            ));
        }
        let open_tokens = extent.max_open * extent.page.tokens();
        if config.prompt_tokens > open_tokens {
            let expected = format!("at most the {open_tokens} tokens of max_open pages");
            return Err(Error::argument("prompt_tokens", expected, config.prompt_tokens));
        }
        let partition_pages = chunk / extent.page.tokens();
        let max_closing = extent.max_open / partition_pages * partition_pages;
        let resolve_config = ResolveConfig {
            rows: extent.rows(),
            max_selected: extent.max_selected,
            slots: extent.slots,
            buckets: plan.config().buckets,
        };
        let pages = PagesConfig {
            extent,
            tokens: 1,
            partition_pages,
            dense_tokens,
            buckets: plan.config().buckets,
            max_closing,
            bulk: true,
            blocks: config.link_blocks,
        };
        let attend = AttendPlan::new(AttendConfig {
            extent,
            score,
            splits: config.splits,
            sm_count: config.sm_count,
        })?;
        let select = SelectPlan::new(SelectConfig {
            extent,
            scorer,
            partition_pages,
            rule: plan.rule(layer),
            max_closing,
            sm_count: config.sm_count,
        })?;
        let work = Work::new(&extent, max_closing, &select, &attend)?;
        Ok(StepPlan {
            config,
            resolve: ResolvePlan::new(resolve_config)?,
            gather: GatherPlan::new(GatherConfig {
                resolve: resolve_config,
                kv_heads: extent.shape.kv_heads(),
                page: extent.page,
                max_pages: extent.max_pages,
                host_pages: extent.host_pages,
                device_pages: extent.runs,
                blocks: config.link_blocks,
            })?,
            pages: PagesPlan::new(pages)?,
            prompt: PagesPlan::new(PagesConfig { tokens: config.prompt_tokens, ..pages })?,
            attend,
            select,
            work,
        })
    }

    /// What the steps are for.
    pub fn config(&self) -> &StepConfig {
        &self.config
    }

    /// Selection as a step plans it.
    pub fn select(&self) -> &SelectPlan {
        &self.select
    }

    /// Layout of the workspace that every call uses, zeroed before the first; layers on one queue share it.
    pub fn workspace(&self) -> &Layout {
        &self.work.layout
    }

    /// Elements of the summaries `[rows, max_partitions, vectors, qk_dim]`; they need not be initialised.
    pub fn summary_elements(&self) -> usize {
        self.select.summary_elements()
    }

    /// Bytes that a step reads of device memory when rows have so many partitions, read so many pages, and miss none.
    pub fn bytes_moved(&self, partitions: usize, pages: usize) -> u64 {
        let rows = self.config.extent.rows();
        self.select.bytes_moved(rows * partitions)
            + self.attend.bytes_moved(rows * pages)
            + self.resolve.bytes_moved()
    }

    /// Tables without a page; see [`Tables::empty`].
    pub fn tables(&self) -> Tables {
        Tables::empty(&self.config.extent)
    }
}

impl Work {
    fn new(
        extent: &Extent,
        max_closing: usize,
        select: &SelectPlan,
        attend: &AttendPlan,
    ) -> Result<Self, Error> {
        let (rows, heads) = (extent.rows(), extent.heads());
        let mut layout = Layout::new();
        Ok(Work {
            aggregated: layout.scratch(rows * select.max_partitions())?,
            selected: layout.scratch(rows * extent.max_selected)?,
            selected_epoch: layout.scratch(rows)?,
            slot_of: layout.scratch(rows * extent.max_selected)?,
            misses: layout.scratch(rows * extent.max_selected * 4)?,
            num_misses: layout.scratch(rows)?,
            closing: layout.scratch(rows * max_closing * 4)?,
            num_closing: layout.scratch(rows)?,
            partial: layout.scratch(heads * extent.shape.v_dim())?,
            partial_lse: layout.scratch(heads)?,
            select: layout.nest(select.workspace())?,
            lists: layout.nest(attend.list_workspace())?,
            attend: layout.nest(attend.workspace())?,
            layout,
        })
    }
}

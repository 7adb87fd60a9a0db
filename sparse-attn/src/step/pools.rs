//! Sizes of the two memories, and what is in them.

use attention::Element;

use super::{Cache, RequestId};
use crate::Error;
use crate::config::Plan;

/// Sizes of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Runs of one head that the device holds, open tokens counted as such.
    pub device_pages: usize,
    /// Pages of all heads that host memory holds.
    pub host_pages: usize,
    /// Most tokens of a request.
    pub max_tokens: usize,
}

impl Capacity {
    /// Room for `requests` requests of up to `max_tokens` tokens, all with the buffering that they want.
    pub fn of_requests(plan: &Plan, requests: usize, max_tokens: usize) -> Self {
        Capacity {
            device_pages: requests * plan.request_pages(plan.config().buffering, max_tokens),
            host_pages: requests * plan.host_pages(max_tokens),
            max_tokens,
        }
    }
}

/// Bytes held now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Keys and values in slots.
    pub slots: usize,
    /// Keys and values of open tokens, on the device.
    pub open: usize,
    /// Summaries, on the device.
    pub summaries: usize,
    /// Tables of slots and partitions, on the device.
    pub tables: usize,
    /// Pages in host memory.
    pub host: usize,
}

impl Memory {
    /// Bytes on the device.
    pub const fn device(&self) -> usize {
        self.slots + self.open + self.summaries + self.tables
    }
}

impl<E: Element> Cache<E> {
    /// Bytes held now, of all requests.
    pub fn memory(&self) -> Memory {
        let mut memory = Memory {
            slots: self.device.usage().used_bytes(),
            host: self.host.usage().used_bytes(),
            ..Memory::default()
        };
        for layer in self.requests.iter().flatten().flat_map(|request| &request.layers) {
            memory.open += layer.open_bytes();
            // A layer that was never cut up needs neither.
            if !layer.is_dense() {
                for head in layer.heads() {
                    memory.summaries += head.index().bytes();
                    memory.tables += head.lru().bytes() + head.partitions().bytes(self.plan.page());
                }
            }
        }
        memory
    }

    /// Share of the tokens' keys and values that is on the device, of all requests; 1 when there are none.
    pub fn device_share(&self) -> f64 {
        let (mut resident, mut all) = (0, 0);
        for layer in self.requests.iter().flatten().flat_map(|request| &request.layers) {
            resident += layer.resident_tokens();
            all += layer.tokens() * layer.heads().len();
        }
        if all == 0 { 1.0 } else { resident as f64 / all as f64 }
    }

    /// Keys `[tokens, qk_dim]` and values `[tokens, v_dim]` of one head, closed pages first, in the order of storage.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::Argument`].
    pub fn read(&mut self, id: RequestId, layer: usize, kv_head: usize) -> Result<(Vec<E>, Vec<E>), Error> {
        self.write_back(id, layer)?;
        let heads = self.plan.layers()[0].shape.kv_heads();
        if kv_head >= heads {
            return Err(Error::argument("kv_head", format!("below {heads}"), kv_head));
        }
        let spec = *self.plan.page();
        self.layer(id, layer)?.read(&spec, &self.host, kv_head)
    }

    /// The tables of one head: which page is in which slot.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::Argument`].
    pub fn lru(&self, id: RequestId, layer: usize, kv_head: usize) -> Result<&crate::BucketedLru, Error> {
        let heads = self.layer(id, layer)?.heads();
        let head = heads.get(kv_head);
        Ok(head.ok_or_else(|| Error::argument("kv_head", format!("below {}", heads.len()), kv_head))?.lru())
    }

    /// Says what is wrong with the tables and pools, if anything is: slots and owners name each other, slots hold the bytes
    /// of their pages, and the pools hold what the requests say.
    ///
    /// # Errors
    /// [`Error::Attention`] when a table names a page that its pool does not know.
    pub fn check(&self) -> Result<Option<String>, Error> {
        let mut used = 0;
        for layer in self.requests.iter().flatten().flat_map(|request| &request.layers) {
            if let Some(fault) = layer.check(&self.host, &self.device)? {
                return Ok(Some(fault));
            }
            used += layer.heads().iter().map(|head| head.device_pages()).sum::<usize>();
        }
        let found = self.device.usage().used;
        Ok((used != found).then(|| format!("{found} device pages are taken, {used} are in tables")))
    }
}

//! One layer of a request: open tokens, closed pages, and per KV head its index and slots.

use attention::Element;
use attention::page_pool::PageRef;

use super::Tokens;
use crate::Error;
use crate::bucketed_lru::{BucketedLru, Resolution};
use crate::config::Plan;
use crate::counters::Counters;
use crate::device_pool::DevicePool;
use crate::error::check_len;
use crate::host_pool::HostPool;
use crate::index::{Arrangement, Closing, Index};
use crate::metadata::NONE;
use crate::page::PageSpec;
use crate::partition::Partitions;
use crate::select::Selection;

/// Tokens that are in no page yet, on the device.
#[derive(Debug, Clone, Default)]
pub(super) struct Open<E> {
    /// `[tokens, kv_heads, qk_dim]`.
    pub(super) k: Vec<E>,
    /// The same before RoPE, where an index wants it.
    pub(super) k_unrotated: Vec<f32>,
    /// `[tokens, kv_heads, v_dim]`.
    pub(super) v: Vec<E>,
}

/// One KV head.
#[derive(Debug)]
pub(super) struct Head {
    index: Box<dyn Index>,
    partitions: Partitions,
    lru: BucketedLru,
    /// Where the device holds each slot; none before it is first filled.
    slots: Vec<Option<PageRef>>,
}

impl Head {
    pub(super) fn index(&self) -> &dyn Index {
        &*self.index
    }

    pub(super) fn partitions(&self) -> &Partitions {
        &self.partitions
    }

    pub(super) fn lru(&self) -> &BucketedLru {
        &self.lru
    }

    /// Pages of the pool that the slots have taken.
    pub(super) fn device_pages(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Where the device holds a slot.
    pub(super) fn device_page(&self, slot: usize) -> Option<PageRef> {
        self.slots[slot]
    }

    fn fill<E: Element>(&mut self, slot: usize, device: &mut DevicePool<E>) -> Result<PageRef, Error> {
        match self.slots[slot] {
            Some(page) => Ok(page),
            None => {
                let page = device.allocate()?;
                self.slots[slot] = Some(page);
                Ok(page)
            }
        }
    }
}

/// What a forked layer shares with its parent.
pub(super) struct Book {
    host_pages: Vec<PageRef>,
    closed: usize,
    epoch: u64,
    heads: Vec<(Box<dyn Index>, Partitions)>,
}

/// One layer of a request.
#[derive(Debug)]
pub(super) struct Layer<E> {
    dense_tokens: usize,
    spec: PageSpec,
    pub(super) open: Open<E>,
    /// Tokens in pages.
    closed: usize,
    pub(super) host_pages: Vec<PageRef>,
    heads: Vec<Head>,
    /// How often the index has changed: what a selection is made for.
    epoch: u64,
    /// How often slots or open tokens have changed: what a resolution is made for.
    version: u64,
    /// Slots that were given to pages which are not fetched yet, by KV head.
    awaited: Vec<(usize, usize)>,
}

impl<E: Element> Layer<E> {
    pub(super) fn new(plan: &Plan, layer: usize, slots: usize) -> Result<Self, Error> {
        let dense_tokens = plan.dense_tokens(layer);
        let slots = if dense_tokens == usize::MAX { 0 } else { slots };
        let head = |kv_head| {
            Ok(Head {
                index: plan.index(layer, kv_head),
                partitions: Partitions::default(),
                lru: BucketedLru::new(slots, plan.config().buckets)?,
                slots: vec![None; slots],
            })
        };
        Ok(Layer {
            dense_tokens,
            spec: *plan.page(),
            open: Open { k: Vec::new(), k_unrotated: Vec::new(), v: Vec::new() },
            closed: 0,
            host_pages: Vec::new(),
            heads: (0..plan.layers()[layer].shape.kv_heads()).map(head).collect::<Result<_, Error>>()?,
            epoch: 0,
            version: 0,
            awaited: Vec::new(),
        })
    }

    pub(super) fn heads(&self) -> &[Head] {
        &self.heads
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Makes resolutions out of date: slots whose pages were never fetched are free again.
    fn outdate(&mut self) {
        self.version += 1;
        for (kv_head, slot) in self.awaited.drain(..) {
            self.heads[kv_head].lru.forget(slot);
        }
    }

    pub(super) fn open_tokens(&self) -> usize {
        self.open.v.len() / (self.heads.len() * self.spec.v_dim())
    }

    pub(super) fn tokens(&self) -> usize {
        self.closed + self.open_tokens()
    }

    /// Whether everything is open: attention is dense then.
    pub(super) fn is_dense(&self) -> bool {
        self.closed == 0
    }

    pub(super) fn open_bytes(&self) -> usize {
        self.open_tokens() * self.heads.len() * self.spec.token_bytes()
    }

    /// Tokens on the device, of all heads.
    pub(super) fn resident_tokens(&self) -> usize {
        let resident = |head: &Head| {
            let lengths = head.partitions.page_lengths();
            head.lru.residents().map(|(_, page)| usize::from(lengths[page as usize])).sum::<usize>()
        };
        self.heads.iter().map(resident).sum::<usize>() + self.open_tokens() * self.heads.len()
    }

    /// Adds open tokens.
    pub(super) fn append(
        &mut self,
        plan: &Plan,
        tokens: &Tokens<'_>,
        max_tokens: usize,
    ) -> Result<(), Error> {
        let (heads, qk_dim, v_dim) = (self.heads.len(), self.spec.qk_dim(), self.spec.v_dim());
        let count = tokens.v.len() / (heads * v_dim);
        check_len("v", tokens.v.len(), &[count, heads, v_dim])?;
        check_len("k", tokens.k.len(), &[count, heads, qk_dim])?;
        if let Some(k) = tokens.k_unrotated {
            check_len("k_unrotated", k.len(), &[count, heads, qk_dim])?;
        }
        if self.tokens() + count > max_tokens {
            let expected = format!("at most {} more tokens", max_tokens - self.tokens());
            return Err(Error::argument("tokens", expected, count));
        }
        if self.heads.iter().any(|head| head.index.wants_unrotated()) {
            let Some(k) = tokens.k_unrotated else {
                return Err(Error::argument("k_unrotated", "keys before RoPE, for the gate", "none"));
            };
            self.open.k_unrotated.extend_from_slice(k);
        }
        debug_assert_eq!(plan.page(), &self.spec);
        self.outdate();
        self.open.k.extend(tokens.k.iter().map(|&x| E::from_f32(x)));
        self.open.v.extend(tokens.v.iter().map(|&x| E::from_f32(x)));
        Ok(())
    }

    /// Undoes an [`append`](Self::append) after which nothing was closed.
    pub(super) fn take_back(&mut self, plan: &Plan, tokens: &Tokens<'_>) {
        debug_assert_eq!(plan.page(), &self.spec);
        self.open.k.truncate(self.open.k.len().saturating_sub(tokens.k.len()));
        self.open.v.truncate(self.open.v.len().saturating_sub(tokens.v.len()));
        let rest = self.open.k_unrotated.len().saturating_sub(tokens.k.len());
        self.open.k_unrotated.truncate(rest);
    }

    /// Tokens to close now.
    fn to_close(&self, plan: &Plan) -> usize {
        let open = self.open_tokens();
        if self.closed == 0 && open <= self.dense_tokens {
            return 0;
        }
        let closable = open.saturating_sub(plan.stays_open());
        match plan.closes_any_number() {
            // The first time everything goes; then whenever enough has come together.
            true if self.closed == 0 || closable >= plan.closing() => closable,
            true => 0,
            false => closable / plan.closing() * plan.closing(),
        }
    }

    /// Closes as many open tokens as the plan says. Changes nothing if it fails.
    pub(super) fn close(
        &mut self,
        plan: &Plan,
        host: &mut HostPool<E>,
        device: &mut DevicePool<E>,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        let count = self.to_close(plan);
        if count == 0 {
            return Ok(());
        }
        let closed = (0..self.heads.len())
            .map(|kv_head| self.arrange(kv_head, count))
            .collect::<Result<Vec<_>, Error>>()?;
        let pages = closed.iter().map(|(_, partitions, _)| partitions.pages()).max().unwrap_or(0);
        // Heads whose clusters take fewer pages leave theirs empty, and fill them later: by then a fork may share them.
        let first = self.heads.iter().map(|head| head.partitions.pages()).min().unwrap_or(0);
        for page in self.host_pages.iter_mut().take(pages).skip(first) {
            *page = host.make_unique(*page)?;
        }
        self.host_pages.extend(host.allocate(pages.saturating_sub(self.host_pages.len()))?);
        // One partition from a decoded token stays on the device until it is written back; more go to host at once.
        let decoded = self.closed > 0 && !plan.closes_any_number() && count == plan.closing();
        for (kv_head, (index, partitions, arrangement)) in closed.into_iter().enumerate() {
            let first = self.heads[kv_head].partitions.pages();
            let last = partitions.pages();
            let head = &mut self.heads[kv_head];
            (head.index, head.partitions) = (index, partitions);
            let mut order = arrangement.order.iter().map(|&token| token as usize);
            // What was just made is on the device already: it stays as far as there are free slots.
            let free = head.lru.histogram().last().copied().unwrap_or(0);
            let warm = last.saturating_sub(free).max(first);
            for page in first..last {
                let length = usize::from(self.heads[kv_head].partitions.page_lengths()[page]);
                let tokens: Vec<usize> = order.by_ref().take(length).collect();
                if decoded {
                    let head = &mut self.heads[kv_head];
                    let miss = head.lru.insert_dirty(page as u32)?;
                    counters.evicted += u64::from(miss.evicted != NONE);
                    let slot = head.fill(miss.slot as usize, device)?;
                    self.write_run(kv_head, &tokens, device.run_mut(slot)?);
                    continue;
                }
                let to = self.host_pages[page];
                self.write_run(kv_head, &tokens, host.run_mut(to, kv_head)?);
                counters.bytes_out += self.spec.bytes() as u64;
                if page >= warm {
                    let head = &mut self.heads[kv_head];
                    for miss in head.lru.prefetch(&[page as u32]).misses {
                        let slot = head.fill(miss.slot as usize, device)?;
                        device.run_mut(slot)?.copy_from_slice(host.run(to, kv_head)?);
                    }
                }
            }
        }
        let (heads, qk_dim, v_dim) = (self.heads.len(), self.spec.qk_dim(), self.spec.v_dim());
        self.open.k.drain(..count * heads * qk_dim);
        self.open.v.drain(..count * heads * v_dim);
        let unrotated = self.open.k_unrotated.len().min(count * heads * qk_dim);
        self.open.k_unrotated.drain(..unrotated);
        self.closed += count;
        self.epoch += 1;
        Ok(())
    }

    /// What a head's index and partitions become when the first open tokens are closed.
    fn arrange(
        &self,
        kv_head: usize,
        count: usize,
    ) -> Result<(Box<dyn Index>, Partitions, Arrangement), Error> {
        let head = &self.heads[kv_head];
        let gather = |values: &[E], dim: usize| -> Vec<f32> {
            let rows = values.chunks_exact(dim).skip(kv_head).step_by(self.heads.len()).take(count);
            rows.flatten().map(|x| x.to_f32()).collect()
        };
        let (k, v) = (gather(&self.open.k, self.spec.qk_dim()), gather(&self.open.v, self.spec.v_dim()));
        let unrotated: Option<Vec<f32>> = head.index.wants_unrotated().then(|| {
            let rows = self.open.k_unrotated.chunks_exact(self.spec.qk_dim());
            rows.skip(kv_head).step_by(self.heads.len()).take(count).flatten().copied().collect()
        });
        let tokens = Closing { k: &k, k_unrotated: unrotated.as_deref(), v: &v, position: self.closed };
        let mut index = head.index.fork();
        let arrangement = index.close(&tokens)?;
        let mut partitions = head.partitions.clone();
        arrangement.sizes.iter().for_each(|&size| partitions.push(&self.spec, size));
        Ok((index, partitions, arrangement))
    }

    /// Copies open tokens into a run; places without a token become 0.
    fn write_run(&self, kv_head: usize, tokens: &[usize], run: &mut [E]) {
        run.fill(E::default());
        let heads = self.heads.len();
        for (values, dim, start) in [
            (&self.open.k, self.spec.qk_dim(), self.spec.keys(0).start),
            (&self.open.v, self.spec.v_dim(), self.spec.values(0).start),
        ] {
            for (place, token) in tokens.iter().enumerate() {
                let from = &values[(token * heads + kv_head) * dim..][..dim];
                run[start + place * dim..][..dim].copy_from_slice(from);
            }
        }
    }

    /// Copies pages in flight to host memory.
    pub(super) fn write_back(
        &mut self,
        host: &mut HostPool<E>,
        device: &DevicePool<E>,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        for (kv_head, head) in self.heads.iter_mut().enumerate() {
            let dirty: Vec<(usize, u32)> = head.lru.dirty().collect();
            for (slot, page) in dirty {
                if let Some(from) = head.slots[slot] {
                    let to = self.host_pages[page as usize];
                    host.run_mut(to, kv_head)?.copy_from_slice(device.run(from)?);
                    counters.bytes_out += self.spec.bytes() as u64;
                }
                head.lru.written_back(slot);
            }
        }
        Ok(())
    }

    /// One step of every head's replacement.
    pub(super) fn resolve(
        &mut self,
        selection: &Selection,
        device: &mut DevicePool<E>,
        counters: &mut Counters,
    ) -> Result<Vec<Resolution>, Error> {
        self.outdate();
        let mut resolved = Vec::with_capacity(self.heads.len());
        for (kv_head, (head, selected)) in self.heads.iter_mut().zip(&selection.heads).enumerate() {
            let resolution = head.lru.resolve(&selected.pages)?;
            for miss in &resolution.misses {
                self.awaited.push((kv_head, miss.slot as usize));
                head.fill(miss.slot as usize, device)?;
                counters.evicted += u64::from(miss.evicted != NONE);
            }
            counters.selected += selected.pages.len() as u64;
            counters.hits += resolution.hits() as u64;
            counters.misses += resolution.misses.len() as u64;
            counters.estimated += selected.estimated.len() as u64;
            resolved.push(resolution);
        }
        counters.steps += 1;
        Ok(resolved)
    }

    /// Copies misses into their slots.
    pub(super) fn gather(
        &mut self,
        heads: &[Resolution],
        host: &HostPool<E>,
        device: &mut DevicePool<E>,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        for (kv_head, (head, resolution)) in self.heads.iter().zip(heads).enumerate() {
            for miss in &resolution.misses {
                if let Some(to) = head.slots[miss.slot as usize] {
                    let from = host.run(self.host_pages[miss.page as usize], kv_head)?;
                    device.run_mut(to)?.copy_from_slice(from);
                    counters.bytes_in += self.spec.bytes() as u64;
                }
            }
        }
        self.awaited.clear();
        Ok(())
    }

    /// Makes pages resident ahead of the step that selects them.
    pub(super) fn prefetch(
        &mut self,
        selection: &Selection,
        host: &HostPool<E>,
        device: &mut DevicePool<E>,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        self.outdate();
        let mut resolved = Vec::with_capacity(self.heads.len());
        for (head, selected) in self.heads.iter_mut().zip(&selection.heads) {
            let resolution = head.lru.prefetch(&selected.pages);
            for miss in &resolution.misses {
                head.fill(miss.slot as usize, device)?;
                counters.evicted += u64::from(miss.evicted != NONE);
                counters.prefetched += 1;
            }
            resolved.push(resolution);
        }
        self.gather(&resolved, host, device, counters)
    }

    /// Changes the slots of a head.
    pub(super) fn resize(
        &mut self,
        kv_head: usize,
        slots: usize,
        device: &mut DevicePool<E>,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        self.outdate();
        let head = &mut self.heads[kv_head];
        let before = head.lru.residents().count();
        let moves = head.lru.resize(slots)?;
        counters.evicted += (before - moves.len()) as u64;
        let mut next = vec![None; slots];
        for (from, to) in moves {
            next[to] = head.slots[from].take();
        }
        for page in std::mem::replace(&mut head.slots, next).into_iter().flatten() {
            device.release(page)?;
        }
        Ok(())
    }

    /// What a fork takes over: the closed pages get another owner.
    pub(super) fn share(&self, host: &mut HostPool<E>) -> Result<(Open<E>, Book), Error> {
        host.share(&self.host_pages)?;
        let heads = self.heads.iter().map(|head| (head.index.fork(), head.partitions.clone())).collect();
        let (host_pages, closed, epoch) = (self.host_pages.clone(), self.closed, self.epoch);
        Ok((self.open.clone(), Book { host_pages, closed, epoch, heads }))
    }

    /// Becomes what another layer shared.
    pub(super) fn adopt(&mut self, open: Open<E>, book: Book) {
        (self.open, self.host_pages) = (open, book.host_pages);
        (self.closed, self.epoch) = (book.closed, book.epoch);
        for (head, (index, partitions)) in self.heads.iter_mut().zip(book.heads) {
            (head.index, head.partitions) = (index, partitions);
        }
    }

    /// Gives everything back.
    pub(super) fn free(self, host: &mut HostPool<E>, device: &mut DevicePool<E>) -> Result<(), Error> {
        host.release(&self.host_pages)?;
        for page in self.heads.into_iter().flat_map(|head| head.slots).flatten() {
            device.release(page)?;
        }
        Ok(())
    }

    /// Says what is wrong, if anything is.
    pub(super) fn check(&self, host: &HostPool<E>, device: &DevicePool<E>) -> Result<Option<String>, Error> {
        for (kv_head, head) in self.heads.iter().enumerate() {
            if let Some(fault) = head.lru.check() {
                return Ok(Some(format!("KV head {kv_head}: {fault}")));
            }
            let mut ahead: Vec<usize> = head.lru.dirty().map(|(slot, _)| slot).collect();
            ahead.extend(self.awaited.iter().filter(|(head, _)| *head == kv_head).map(|(_, slot)| slot));
            for (slot, page) in head.lru.residents() {
                let Some(run) = head.slots[slot] else {
                    return Ok(Some(format!("KV head {kv_head}: slot {slot} has a page but no memory")));
                };
                let from = host.run(self.host_pages[page as usize], kv_head)?;
                if !ahead.contains(&slot) && device.run(run)? != from {
                    return Ok(Some(format!("KV head {kv_head}: slot {slot} is not page {page}")));
                }
            }
        }
        Ok(None)
    }
}

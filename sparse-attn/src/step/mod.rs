//! A decoding step over two memories: select → resolve → gather → attend.
//!
//! [`Cache`] holds any number of requests. A prompt is attended densely and closed into pages: summaries stay on the
//! device, pages go to host memory, and the last of them also into slots. A decoded token then
//!
//! 1. joins the open tokens, which are always on the device; when they are enough, they are closed;
//! 2. selects pages by their summaries ([`Cache::select`]);
//! 3. resolves them to slots ([`Cache::resolve`]);
//! 4. has the misses gathered from host memory while the hits and open tokens are attended; the misses are attended next,
//!    and the parts, with what is estimated, are merged by LSE, which is exact ([`Cache::attend`]).
//!
//! [`Cache::decode`] is all of that. A context that fits the budget is not cut up at all: its tokens stay open, in order,
//! and attention over them is the dense one, bit by bit.
//!
//! A page that was closed by a decoded token is on the device first and in host memory later: until
//! [`Cache::write_back`], which the next step does, it cannot lose its slot.

mod attend;
mod layer;
mod pools;

use attention::Element;

use crate::Error;
use crate::budget::{Budget, Holding, Ticket, age_cut};
use crate::config::Plan;
use crate::counters::Counters;
use crate::device_pool::DevicePool;
use crate::host_pool::HostPool;
use crate::select::{Selection, select};
use crate::trace::Trace;
use layer::Layer;
pub use pools::{Capacity, Memory};

/// New tokens of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// Keys after RoPE `[tokens, kv_heads, qk_dim]`.
    pub k: &'a [f32],
    /// Keys before RoPE, the same shape; only gates need them.
    pub k_unrotated: Option<&'a [f32]>,
    /// Values `[tokens, kv_heads, v_dim]`.
    pub v: &'a [f32],
}

/// Queries of new tokens of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// Queries after RoPE `[tokens, q_heads, qk_dim]`.
    pub q: &'a [f32],
    /// Queries before RoPE, the same shape; only gates need them.
    pub q_unrotated: Option<&'a [f32]>,
}

/// Handle of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId(Ticket);

impl RequestId {
    /// One number for index and generation.
    fn number(self) -> u64 {
        u64::from(self.0.generation) << 32 | u64::from(self.0.index)
    }
}

/// Where the selected pages of a layer are, per KV head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    selection: Selection,
    heads: Vec<crate::bucketed_lru::Resolution>,
    version: u64,
    gathered: bool,
}

impl Resolved {
    /// What was selected.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Slots and misses of each KV head.
    pub fn heads(&self) -> &[crate::bucketed_lru::Resolution] {
        &self.heads
    }

    /// Checks that nothing has changed since.
    fn check(&self, id: RequestId, version: u64) -> Result<(), Error> {
        if (self.selection.request, self.version) == (id.number(), version) {
            return Ok(());
        }
        let describe = |request, version| {
            format!("request {request}, layer {}, version {version}", self.selection.layer)
        };
        Err(Error::StaleSelection {
            selected: describe(self.selection.request, self.version),
            current: describe(id.number(), version),
        })
    }
}

#[derive(Debug)]
struct Request<E> {
    layers: Vec<Layer<E>>,
    counters: Vec<Counters>,
}

/// Sparse attention caches of any number of requests, all layers.
#[derive(Debug)]
pub struct Cache<E> {
    plan: Plan,
    max_tokens: usize,
    budget: Budget,
    host: HostPool<E>,
    device: DevicePool<E>,
    requests: Vec<Option<Request<E>>>,
    /// Counts of requests that were freed.
    retired: Counters,
    trace: Option<Trace>,
}

impl<E: Element> Cache<E> {
    /// A cache without requests.
    ///
    /// # Errors
    /// [`Error::Argument`] when `E` is not the plan's type, [`Error::Attention`] when the pools do not fit memory.
    pub fn new(plan: Plan, capacity: Capacity) -> Result<Self, Error> {
        let kv_heads = plan.layers()[0].shape.kv_heads();
        Ok(Cache {
            max_tokens: capacity.max_tokens,
            budget: Budget::new(capacity.device_pages),
            host: HostPool::new(*plan.page(), kv_heads, capacity.host_pages)?,
            device: DevicePool::new(*plan.page(), capacity.device_pages)?,
            requests: Vec::new(),
            retired: Counters::default(),
            trace: None,
            plan,
        })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device pages and who holds them.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Admits a request. Where the pool is short, others give up what they have not used for longest, down to their floors.
    ///
    /// # Errors
    /// [`Error::Refused`] when even that is not enough; nobody loses anything then.
    pub fn try_admit(&mut self) -> Result<RequestId, Error> {
        let floor = self.plan.request_pages(self.plan.config().min_buffering, self.max_tokens);
        let wanted = self.plan.request_pages(self.plan.config().buffering, self.max_tokens);
        let short = self.budget.shortfall(floor)?;
        self.reclaim(short)?;
        let ticket = self.budget.try_admit(floor, wanted)?;
        let slots = self.slots_of(self.budget.grant(ticket)?.held);
        let layers = (0..self.plan.layers().len()).map(|layer| Layer::new(&self.plan, layer, slots));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let counters = vec![Counters::default(); layers.len()];
        let index = ticket.index as usize;
        if self.requests.len() <= index {
            self.requests.resize_with(index + 1, || None);
        }
        self.requests[index] = Some(Request { layers, counters });
        Ok(RequestId(ticket))
    }

    /// Slots of each head of a request that holds so many pages.
    fn slots_of(&self, held: usize) -> usize {
        let config = self.plan.config();
        let (least, most) = (self.plan.slots(config.min_buffering), self.plan.slots(config.buffering));
        let fits = |slots: &usize| {
            let buffering =
                (*slots as f64 / self.plan.effective_budget().pages as f64 - 1.0).max(config.min_buffering);
            self.plan.request_pages(buffering, self.max_tokens) <= held
        };
        (least..=most).rev().find(fits).unwrap_or(least)
    }

    /// A request that starts as a copy of another: it shares its closed pages and has slots of its own, all free.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::Refused`].
    pub fn fork(&mut self, id: RequestId) -> Result<RequestId, Error> {
        self.request(id)?;
        let copy = self.try_admit()?;
        let layers = (0..self.plan.layers().len()).try_for_each(|layer| {
            // Pages in flight have to be where the copy can read them.
            self.write_back(id, layer)?;
            let Some(parent) = self.requests[id.0.index as usize].as_ref() else { return Ok(()) };
            let (open, book) = parent.layers[layer].share(&mut self.host)?;
            if let Some(child) = self.requests[copy.0.index as usize].as_mut() {
                child.layers[layer].adopt(open, book);
            }
            Ok(())
        });
        match layers {
            Ok(()) => Ok(copy),
            Err(error) => {
                self.free(copy)?;
                Err(error)
            }
        }
    }

    /// Gives up everything a request holds.
    ///
    /// # Errors
    /// [`Error::StaleRequest`].
    pub fn free(&mut self, id: RequestId) -> Result<(), Error> {
        self.budget.release(id.0)?;
        if let Some(request) = self.requests[id.0.index as usize].take() {
            for counters in request.counters {
                self.retired += counters;
            }
            for layer in request.layers {
                layer.free(&mut self.host, &mut self.device)?;
            }
        }
        Ok(())
    }

    fn request(&self, id: RequestId) -> Result<&Request<E>, Error> {
        self.budget.grant(id.0)?;
        let stale = Error::StaleRequest { index: id.0.index, generation: id.0.generation };
        self.requests.get(id.0.index as usize).and_then(Option::as_ref).ok_or(stale)
    }

    fn layer(&self, id: RequestId, layer: usize) -> Result<&Layer<E>, Error> {
        let layers = &self.request(id)?.layers;
        layers.get(layer).ok_or_else(|| Error::argument("layer", format!("below {}", layers.len()), layer))
    }

    /// A layer with what it is written through.
    #[expect(clippy::type_complexity, reason = "parts of one struct, borrowed at once")]
    fn parts(
        &mut self,
        id: RequestId,
        layer: usize,
    ) -> Result<(&Plan, &mut Layer<E>, &mut Counters, &mut HostPool<E>, &mut DevicePool<E>), Error> {
        self.layer(id, layer)?;
        let stale = Error::StaleRequest { index: id.0.index, generation: id.0.generation };
        let request = self.requests[id.0.index as usize].as_mut().ok_or(stale)?;
        let counters = &mut request.counters[layer];
        Ok((&self.plan, &mut request.layers[layer], counters, &mut self.host, &mut self.device))
    }

    /// Tokens of a layer of a request.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::Argument`].
    pub fn tokens(&self, id: RequestId, layer: usize) -> Result<usize, Error> {
        Ok(self.layer(id, layer)?.tokens())
    }

    /// Counts of one layer of a request.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::Argument`].
    pub fn layer_counters(&self, id: RequestId, layer: usize) -> Result<Counters, Error> {
        self.layer(id, layer)?;
        Ok(self.request(id)?.counters[layer])
    }

    /// Counts of all requests, those that were freed included.
    pub fn counters(&self) -> Counters {
        let mut all = self.retired;
        for counters in self.requests.iter().flatten().flat_map(|request| &request.counters) {
            all += *counters;
        }
        all
    }

    /// Starts to record what is selected, or stops and gives what was. Stream `layer · kv_heads + kv_head` of request 0,
    /// and so on for the others.
    pub fn record(&mut self, on: bool) -> Option<Trace> {
        std::mem::replace(&mut self.trace, on.then(Trace::default))
    }

    /// Adds tokens without attending to them.
    ///
    /// # Errors
    /// [`Error::StaleRequest`]; [`Error::Argument`] when shapes do not fit or the tokens are too many;
    /// [`Error::Attention`] when host memory is full. Nothing is added then.
    pub fn append(&mut self, id: RequestId, layer: usize, tokens: &Tokens<'_>) -> Result<(), Error> {
        let max_tokens = self.max_tokens;
        let (plan, layer, counters, host, device) = self.parts(id, layer)?;
        layer.write_back(host, device, counters)?;
        layer.append(plan, tokens, max_tokens)?;
        match layer.close(plan, host, device, counters) {
            Ok(()) => Ok(()),
            Err(error) => {
                layer.take_back(plan, tokens);
                Err(error)
            }
        }
    }

    /// Copies pages that decoded tokens closed to host memory. The next step does so too.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::Argument`].
    pub fn write_back(&mut self, id: RequestId, layer: usize) -> Result<(), Error> {
        let (_, layer, counters, host, device) = self.parts(id, layer)?;
        layer.write_back(host, device, counters)
    }

    /// Whether the next step of a layer attends to everything.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::Argument`].
    pub fn is_dense(&self, id: RequestId, layer: usize) -> Result<bool, Error> {
        Ok(self.layer(id, layer)?.is_dense())
    }

    /// Selects pages for the last token of a layer.
    ///
    /// # Errors
    /// [`Error::StaleRequest`]; [`Error::Argument`] when shapes do not fit or queries before RoPE are missing.
    pub fn select(&self, id: RequestId, layer: usize, queries: &Queries<'_>) -> Result<Selection, Error> {
        let rule = self.plan.layers().get(layer).map(|_| self.plan.rule(layer));
        let (number, state) = (layer, self.layer(id, layer)?);
        let shape = self.plan.layers()[layer].shape;
        for (argument, q) in [("q", Some(queries.q)), ("q_unrotated", queries.q_unrotated)] {
            if let Some(q) = q {
                crate::error::check_len(argument, q.len(), &[1, shape.q_heads(), shape.qk_dim()])?;
            }
        }
        let mut heads = Vec::with_capacity(shape.kv_heads());
        for (kv_head, head) in state.heads().iter().enumerate() {
            let part = shape.q_heads_of(kv_head).start * shape.qk_dim()
                ..shape.q_heads_of(kv_head).end * shape.qk_dim();
            let query = crate::index::GroupQuery {
                q: &queries.q[part.clone()],
                q_unrotated: queries.q_unrotated.map(|q| &q[part]),
                position: state.tokens().saturating_sub(1),
            };
            if let Some(rule) = &rule {
                heads.push(select(head.index(), head.partitions(), &query, rule)?);
            }
        }
        Ok(Selection { request: id.number(), layer: number, epoch: state.epoch(), heads })
    }

    /// Gives every selected page a slot and says which have to be fetched.
    ///
    /// # Errors
    /// [`Error::StaleRequest`]; [`Error::StaleSelection`] when the selection is for another request or layer, or older than
    /// the last change of the index. Nothing changes then.
    pub fn resolve(&mut self, id: RequestId, selection: Selection) -> Result<Resolved, Error> {
        let number = selection.layer;
        let heads = self.plan.layers()[0].shape.kv_heads();
        let (_, layer, counters, _, device) = self.parts(id, number)?;
        check_current(id, layer.epoch(), &selection)?;
        let resolved = layer.resolve(&selection, device, counters)?;
        let version = layer.version();
        if let Some(trace) = &mut self.trace {
            for (kv_head, head) in selection.heads.iter().enumerate() {
                let stream = (id.0.index as usize * self.plan.layers().len() + number) * heads + kv_head;
                trace.push(stream as u32, &head.pages);
            }
        }
        Ok(Resolved { selection, heads: resolved, version, gathered: false })
    }

    /// Copies the misses from host memory into their slots. Until then these hold nothing; they are free again if the layer
    /// changes before, by a token, another selection or fewer slots.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::StaleSelection`].
    pub fn gather(&mut self, id: RequestId, resolved: &mut Resolved) -> Result<(), Error> {
        let (_, layer, counters, host, device) = self.parts(id, resolved.selection.layer)?;
        resolved.check(id, layer.version())?;
        layer.gather(&resolved.heads, host, device, counters)?;
        resolved.gathered = true;
        Ok(())
    }

    /// Fetches the pages of a selection ahead of the step that will use them: for the next layer, by what this layer's
    /// query says of it.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn prefetch(&mut self, id: RequestId, selection: &Selection) -> Result<(), Error> {
        let (_, layer, counters, host, device) = self.parts(id, selection.layer)?;
        check_current(id, layer.epoch(), selection)?;
        layer.prefetch(selection, host, device, counters)
    }

    /// Attention of the last token of a layer over what was resolved and gathered, the open tokens, and estimates: `out`
    /// `[1, q_heads, v_dim]`, `lse` `[1, q_heads]`.
    ///
    /// # Errors
    /// [`Error::StaleRequest`], [`Error::StaleSelection`]; [`Error::Argument`] when shapes do not fit or the misses were not
    /// gathered.
    pub fn attend(
        &self,
        id: RequestId,
        queries: &Queries<'_>,
        resolved: &Resolved,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        let layer = self.layer(id, resolved.selection.layer)?;
        resolved.check(id, layer.version())?;
        if !resolved.gathered {
            return Err(Error::argument("resolved", "misses that were gathered", "ones that were not"));
        }
        let spec = &self.plan.layers()[resolved.selection.layer];
        layer.attend_sparse(spec, self.plan.page(), &self.device, queries.q, resolved, out, lse)
    }

    /// One decoding step of one layer: adds a token and attends from it, `out` `[1, q_heads, v_dim]`, `lse` `[1, q_heads]`.
    ///
    /// # Errors
    /// As [`append`](Self::append), [`select`](Self::select) and [`attend`](Self::attend).
    pub fn decode(
        &mut self,
        id: RequestId,
        layer: usize,
        queries: &Queries<'_>,
        tokens: &Tokens<'_>,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        self.append(id, layer, tokens)?;
        if self.is_dense(id, layer)? {
            return self.dense(id, layer, queries, out, lse);
        }
        let selection = self.select(id, layer, queries)?;
        let mut resolved = self.resolve(id, selection)?;
        self.gather(id, &mut resolved)?;
        self.attend(id, queries, &resolved, out, lse)
    }

    /// Adds the tokens of a prompt, or of its continuation, and attends from them to everything: `out` `[tokens, q_heads,
    /// v_dim]`, `lse` `[tokens, q_heads]`.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn prefill(
        &mut self,
        id: RequestId,
        layer: usize,
        queries: &Queries<'_>,
        tokens: &Tokens<'_>,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        let max_tokens = self.max_tokens;
        let (plan, state, counters, host, device) = self.parts(id, layer)?;
        state.write_back(host, device, counters)?;
        state.append(plan, tokens, max_tokens)?;
        let attended = state
            .attend_dense(&plan.layers()[layer], plan.page(), host, queries.q, out, lse)
            .and_then(|()| state.close(plan, host, device, counters));
        if attended.is_err() {
            state.take_back(plan, tokens);
        }
        attended
    }

    /// Attention over the whole context.
    fn dense(
        &mut self,
        id: RequestId,
        layer: usize,
        queries: &Queries<'_>,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        let (plan, state, counters, host, _) = self.parts(id, layer)?;
        counters.dense_steps += 1;
        state.attend_dense(&plan.layers()[layer], plan.page(), host, queries.q, out, lse)
    }

    /// Makes `pages` device pages free by taking from every request what it has not used for longest. Gives the age from
    /// which on slots were dropped.
    ///
    /// # Errors
    /// [`Error::Refused`] when the requests cannot spare so many; nothing is taken then.
    pub fn reclaim(&mut self, pages: usize) -> Result<Option<usize>, Error> {
        if pages == 0 {
            return Ok(None);
        }
        let grants: Vec<_> = self.budget.grants().collect();
        let floor = self.plan.slots(self.plan.config().min_buffering);
        // One holding per head: each keeps its own floor.
        let mut heads = Vec::new();
        for (ticket, grant) in &grants {
            let mut spare = grant.spare();
            let Some(request) = &self.requests[ticket.index as usize] else { continue };
            for (number, layer) in request.layers.iter().enumerate() {
                for (kv_head, head) in layer.heads().iter().enumerate() {
                    let mine = head.lru().slots().saturating_sub(floor).min(spare);
                    spare -= mine;
                    heads.push((*ticket, number, kv_head, head.lru().histogram(), mine));
                }
            }
        }
        let holdings: Vec<Holding<'_>> =
            heads.iter().map(|(.., ages, spare)| Holding { ages, spare: *spare }).collect();
        let spare: usize = holdings.iter().map(|holding| holding.spare).sum();
        let Some((threshold, drops)) = age_cut(pages, &holdings) else {
            let (available, capacity) = (self.budget.free() + spare, self.budget.capacity());
            return Err(Error::Refused { needed: pages, available, capacity });
        };
        let drops: Vec<_> = heads
            .iter()
            .zip(drops)
            .map(|(&(ticket, layer, kv_head, ..), drop)| (ticket, layer, kv_head, drop))
            .collect();
        for (ticket, layer, kv_head, drop) in drops.into_iter().filter(|&(.., drop)| drop > 0) {
            let id = RequestId(ticket);
            self.write_back(id, layer)?;
            let (_, state, counters, _, device) = self.parts(id, layer)?;
            let slots = state.heads()[kv_head].lru().slots() - drop;
            state.resize(kv_head, slots, device, counters)?;
            self.budget.shrink(ticket, drop)?;
        }
        Ok(Some(threshold))
    }

    /// Gives a request free pages, up to what it wants; gives how many.
    ///
    /// # Errors
    /// [`Error::StaleRequest`].
    pub fn grow(&mut self, id: RequestId) -> Result<usize, Error> {
        self.request(id)?;
        let most = self.plan.slots(self.plan.config().buffering);
        let mut grown = 0;
        for layer in 0..self.plan.layers().len() {
            for kv_head in 0..self.plan.layers()[layer].shape.kv_heads() {
                let slots = self.layer(id, layer)?.heads()[kv_head].lru().slots();
                // A layer that is dense at any context has no slots.
                if slots == 0 {
                    continue;
                }
                let given = self.budget.grow(id.0, most.saturating_sub(slots))?;
                let (_, state, counters, _, device) = self.parts(id, layer)?;
                state.resize(kv_head, slots + given, device, counters)?;
                grown += given;
            }
        }
        Ok(grown)
    }
}

/// Checks that a selection is for this state of this layer.
fn check_current(id: RequestId, epoch: u64, selection: &Selection) -> Result<(), Error> {
    if (selection.request, selection.epoch) == (id.number(), epoch) {
        return Ok(());
    }
    let describe = |request, epoch| format!("request {request}, layer {}, epoch {epoch}", selection.layer);
    Err(Error::StaleSelection {
        selected: describe(selection.request, selection.epoch),
        current: describe(id.number(), epoch),
    })
}

//! Keys and values go round, queries stay.

use std::marker::PhantomData;

use attention::softmax_state::Raw;
use attention::{Element, HeadsView};

use super::rotation::{HostCarrier, Rotation};
use super::{Chunk, Inputs, RingPlan, to_f32};
use crate::schedule::{self, source};
use crate::transport::{Buffer, Operation, Transport};
use crate::{Error, Output, cpu};

#[derive(Debug)]
pub(super) struct PassKv<T> {
    rank: usize,
    /// `[query tokens, q_heads, qk_dim]`
    q: Vec<f32>,
    /// K `[key tokens, kv_heads, qk_dim]`, then V `[key tokens, kv_heads, v_dim]`.
    blocks: Rotation<Buffer>,
    /// `[query tokens, q_heads]`
    states: Vec<Raw<f32>>,
    stored: PhantomData<T>,
}

impl<T: Element> PassKv<T> {
    pub(super) fn new<Q: Element>(plan: &RingPlan, rank: usize, inputs: Inputs<'_, Q, T>) -> Self {
        let (shape, bytes) = (plan.spec.shape, T::DTYPE.size());
        let mut own = Buffer::new(plan.workspace_bytes(Q::DTYPE.size(), bytes) / 2);
        let max_len = own.len();
        let len = plan.kv_len(rank, bytes);
        own.resize(len);
        let spare = (plan.ranks() > 1).then(|| Buffer::new(max_len));
        let (k, v) = own.bytes_mut().split_at_mut(size_of_val(inputs.k));
        k.copy_from_slice(bytemuck::cast_slice(inputs.k));
        v.copy_from_slice(bytemuck::cast_slice(inputs.v));
        let rows = plan.shards.query_tokens(rank) * shape.q_heads();
        PassKv {
            rank,
            q: to_f32(inputs.q),
            blocks: Rotation::new(Operation::PassKv, rank, plan.ranks(), (own, len), spare),
            states: vec![Raw::empty(shape.v_dim()); rows],
            stored: PhantomData,
        }
    }

    pub(super) fn steps_done(&self) -> usize {
        self.blocks.step()
    }

    pub(super) fn step<X: Transport + ?Sized>(
        &mut self,
        plan: &RingPlan,
        transport: &mut X,
        mut on_chunk: impl FnMut(Chunk<'_, T>),
    ) -> Result<(), Error> {
        let (step, shape) = (self.steps_done(), plan.spec.shape);
        let next_len = plan.kv_len(source(self.rank, step + 1, plan.ranks()), T::DTYPE.size());
        let block = self.blocks.turn(&mut HostCarrier(transport), next_len)?.values::<T>();

        let source = source(self.rank, step, plan.ranks());
        let segments = plan.keys(source);
        let tokens = plan.key_tokens(source);
        let (k, v) = block.split_at(tokens * shape.kv_heads() * shape.qk_dim());
        let k = HeadsView::nhd(k, tokens, shape.kv_heads(), shape.qk_dim())?;
        let v = HeadsView::nhd(v, tokens, shape.kv_heads(), shape.v_dim())?;
        on_chunk(Chunk { source, segments: &segments, k, v });

        let queries = plan.shards.queries(self.rank);
        let tiles = schedule::tiles(&plan.spec.mask, &queries, &segments);
        let q =
            HeadsView::nhd(&self.q, plan.shards.query_tokens(self.rank), shape.q_heads(), shape.qk_dim())?;
        cpu::absorb(&plan.spec, &tiles, q, k, v, &mut self.states)?;
        transport.computed(tiles.iter().map(|tile| tile.pairs(&plan.spec.mask)).sum());
        Ok(())
    }

    pub(super) fn pause<X: Transport + ?Sized>(&mut self, transport: &mut X) -> Result<(), Error> {
        self.blocks.drain(&mut HostCarrier(transport))
    }

    pub(super) fn finish(self) -> Output {
        cpu::finish(&self.states)
    }
}

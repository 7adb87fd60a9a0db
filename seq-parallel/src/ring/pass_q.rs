//! Queries go round, keys and values stay; partial outputs come home in an all-to-all.

use attention::softmax_state::{Normalised, Raw};
use attention::{Element, HeadsView};

use super::rotation::{HostCarrier, Rotation};
use super::{Chunk, Inputs, RingPlan, to_f32};
use crate::schedule::{self, source};
use crate::transport::{Buffer, Operation, Transport};
use crate::{Error, Output, cpu};

#[derive(Debug)]
pub(super) struct PassQ<'a, Q, T> {
    rank: usize,
    inputs: Inputs<'a, Q, T>,
    /// Queries `[query tokens, q_heads, qk_dim]`.
    blocks: Rotation<Buffer>,
    /// For the queries of each rank, once they were here: outputs `[query tokens, q_heads, v_dim]`, then LSEs
    /// `[query tokens, q_heads]`, in f32 over the own keys.
    partials: Vec<Option<Buffer>>,
}

impl<'a, Q: Element, T: Element> PassQ<'a, Q, T> {
    pub(super) fn new(plan: &RingPlan, rank: usize, inputs: Inputs<'a, Q, T>) -> Self {
        let max_len = plan.workspace_bytes(Q::DTYPE.size(), T::DTYPE.size()) / 2;
        let mut own = Buffer::new(max_len);
        let len = plan.q_len(rank, Q::DTYPE.size());
        own.resize(len);
        let spare = (plan.ranks() > 1).then(|| Buffer::new(max_len));
        own.bytes_mut().copy_from_slice(bytemuck::cast_slice(inputs.q));
        let blocks = Rotation::new(Operation::PassQ, rank, plan.ranks(), (own, len), spare);
        PassQ { rank, inputs, blocks, partials: (0..plan.ranks()).map(|_| None).collect() }
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
        let next_len = plan.q_len(source(self.rank, step + 1, plan.ranks()), Q::DTYPE.size());
        let q = to_f32(self.blocks.turn(&mut HostCarrier(transport), next_len)?.values::<Q>());

        let source = source(self.rank, step, plan.ranks());
        let (queries, keys) = (plan.shards.queries(source), plan.keys(self.rank));
        let (rows, tokens) = (plan.shards.query_tokens(source), plan.key_tokens(self.rank));
        let q = HeadsView::nhd(&q, rows, shape.q_heads(), shape.qk_dim())?;
        let k = HeadsView::nhd(self.inputs.k, tokens, shape.kv_heads(), shape.qk_dim())?;
        let v = HeadsView::nhd(self.inputs.v, tokens, shape.kv_heads(), shape.v_dim())?;
        if step == 0 {
            on_chunk(Chunk { source: self.rank, segments: &keys, k, v });
        }
        let tiles = schedule::tiles(&plan.spec.mask, &queries, &keys);
        let mut states = vec![Raw::empty(shape.v_dim()); rows * shape.q_heads()];
        cpu::absorb(&plan.spec, &tiles, q, k, v, &mut states)?;
        let partial = cpu::finish(&states);
        self.partials[source] = Some(Buffer::of(&[partial.out, partial.lse].concat()));
        transport.computed(tiles.iter().map(|tile| tile.pairs(&plan.spec.mask)).sum());
        Ok(())
    }

    pub(super) fn pause<X: Transport + ?Sized>(&mut self, transport: &mut X) -> Result<(), Error> {
        self.blocks.drain(&mut HostCarrier(transport))
    }

    pub(super) fn finish<X: Transport + ?Sized>(
        self,
        plan: &RingPlan,
        transport: &mut X,
    ) -> Result<Output, Error> {
        let shape = plan.spec.shape;
        let rows = plan.shards.query_tokens(self.rank) * shape.q_heads();
        let partials =
            self.partials.into_iter().map(|partial| partial.expect("every rank's queries were here"));
        let lens = vec![4 * rows * (shape.v_dim() + 1); plan.ranks()];
        let partials = transport.all_to_all_v(partials.collect(), &lens)?;
        // In the order of ranks, so that runs are bitwise equal.
        let mut states = vec![Raw::empty(shape.v_dim()); rows];
        for partial in &partials {
            let (out, lse) = partial.values::<f32>().split_at(rows * shape.v_dim());
            for ((state, out), &lse) in states.iter_mut().zip(out.chunks_exact(shape.v_dim())).zip(lse) {
                state.merge(&Raw::from(&Normalised { out: out.to_vec(), lse }))?;
            }
        }
        Ok(cpu::finish(&states))
    }
}

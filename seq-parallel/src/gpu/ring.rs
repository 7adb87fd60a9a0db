//! A ring whose blocks lie in device memory: each step posts the block on, computes on it meanwhile, and waits for the next.
//!
//! | | |
//! |---|---|
//! | blocks | two of fixed size on each rank; K, then V behind it, as one message |
//! | state | f32, carried from step to step by the kernel ([`RingStep`]); the caller's |
//! | order of a step | wait for the block posted in the step before, swap, post it on, enqueue the kernel: the exchange runs beside it |
//! | what the host waits for | an exchange, with the transport's deadline; never a kernel |
//!
//! An exchange starts after the kernels that are queued when it is posted: those of earlier steps, which have read the block that it
//! receives into. Between two steps the ring can be paused, as [`ring::Ring`](crate::ring::Ring) can. Keys go round, queries stay.
//!
//! Blocks are whatever a [`Carrier`] moves and a kernel sees: device memory over a [`DeviceTransport`], or, for the emulator, buffers of the
//! host over any [`Transport`](crate::transport::Transport).

use std::sync::Arc;

use cuda::cudarc::driver::{CudaSlice, CudaStream};
use cuda::fork::Queue;
use cuda::launch::Function;
use cuda::memory::{View, ViewMut};
use cuda::params::PrefillTile;
use cuda::storage::Storage;

use super::transport::{DeviceTransport, Incoming, Outgoing, check_stream};
use super::{RingStep, RingStepArgs};
use crate::Error;
use crate::ring::{Carrier, Direction, Rotation};
use crate::schedule::source;
use crate::transport::{Buffer, Operation, Tag, Ticket};

/// Memory that both a [`Carrier`] and the kernels of a queue can reach.
pub trait Block<Q: ?Sized> {
    /// Its bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] for memory that `queue` does not keep until its kernels are done.
    fn view<'a>(&'a self, queue: &'a Q) -> Result<View<'a, u8>, Error>;
}

impl Block<CudaStream> for CudaSlice<u8> {
    fn view<'a>(&'a self, queue: &'a CudaStream) -> Result<View<'a, u8>, Error> {
        check_stream("block", self, queue)?;
        Ok(View::device(self, queue))
    }
}

/// For the emulator, whose kernels reach host memory alone; the driver refuses to launch on such a view.
impl<Q: Queue + ?Sized> Block<Q> for Buffer {
    fn view<'a>(&'a self, _: &'a Q) -> Result<View<'a, u8>, Error> {
        Ok(View::host(self.bytes()))
    }
}

/// Carries blocks in device memory, after what is queued on a stream.
#[derive(Debug)]
pub struct DeviceCarrier<'a, D> {
    /// What moves them.
    pub transport: &'a mut D,
    /// The stream of the kernels, which blocks are allocated on; see [`DeviceTransport::exchange`].
    pub after: &'a CudaStream,
}

impl<D: DeviceTransport> Carrier for DeviceCarrier<'_, D> {
    type Block = CudaSlice<u8>;

    fn post(
        &mut self,
        tag: Tag,
        (to, held, send_len): (usize, &mut Arc<CudaSlice<u8>>, usize),
        (from, space, recv_len): (usize, CudaSlice<u8>, usize),
    ) -> Result<Ticket, Error> {
        let send = Outgoing { to, block: held.clone(), len: send_len };
        self.transport.exchange(tag, send, Incoming { from, space, len: recv_len }, self.after)
    }

    fn take(&mut self, ticket: Ticket) -> Result<CudaSlice<u8>, Error> {
        self.transport.wait(ticket)
    }
}

/// One rank of a ring in device memory, between two steps. `F` is a loaded kernel, `E` the storage type of q, K, V and the output, `B` the
/// memory of a block.
#[derive(Debug)]
pub struct DeviceRing<'k, F, E, B> {
    rank: usize,
    kernel: &'k RingStep<F, E>,
    blocks: Rotation<B>,
}

/// Arguments of [`DeviceRing::step`]: those of [`RingStepArgs`] but for the block, the same buffers in all steps.
#[derive(Debug)]
#[allow(missing_docs, reason = "each is the field of `RingStepArgs`")]
pub struct DeviceRingArgs<'a, E> {
    pub tiles: &'a View<'a, PrefillTile>,
    pub tile_counts: &'a View<'a, u32>,
    pub q: &'a View<'a, E>,
    pub o: ViewMut<'a, f32>,
    pub ml: ViewMut<'a, f32>,
    pub out: ViewMut<'a, E>,
    pub lse: ViewMut<'a, f32>,
    pub status: ViewMut<'a, u64>,
}

impl<'k, F: Function, E: Storage, B> DeviceRing<'k, F, E, B> {
    /// Rank `rank` before its first step; `kernel` is prepared by that rank's plan, and serves the rings of all layers.
    ///
    /// - `own`: its keys and values, [`block_len`](super::RingStepPlan::block_len)`(0)` elements;
    /// - `spare`: for the blocks of others, of any contents; a ring of one needs none. Each of the two has room for
    ///   [`max_block_len`](super::RingStepPlan::max_block_len) elements.
    ///
    /// # Errors
    /// [`Error::Argument`] for a ring in which queries go round, a rank that is not there, or a ring of several without a spare block.
    pub fn new(kernel: &'k RingStep<F, E>, rank: usize, own: B, spare: Option<B>) -> Result<Self, Error> {
        let plan = kernel.plan();
        if plan.direction() != Direction::PassKv {
            return Err(Error::argument("ring", "one that passes keys and values", plan.direction()));
        }
        let ranks = plan.steps();
        if rank >= ranks {
            return Err(Error::argument("rank", format!("below {ranks}"), rank));
        }
        if ranks > 1 && spare.is_none() {
            return Err(Error::argument("spare", "a second block", "none"));
        }
        let len = plan.block_len(0) * size_of::<E>();
        let blocks = Rotation::new(Operation::PassKv, rank, ranks, (own, len), spare);
        Ok(DeviceRing { rank, kernel, blocks })
    }

    /// Steps done.
    pub fn steps_done(&self) -> usize {
        self.blocks.step()
    }

    /// Whether all steps are enqueued.
    pub fn is_done(&self) -> bool {
        self.steps_done() == self.kernel.plan().steps()
    }

    /// Does the next step: waits for the block that was posted in the step before, posts it on, and enqueues the kernel on it.
    ///
    /// The rank whose block it is, is `source(rank, step, ranks)`.
    ///
    /// # Errors
    /// [`Error::Argument`] after the last step; [`Error::Peer`] when a rank has failed; whatever the carrier and
    /// [`RingStep::run`] refuse. After an error the ring is spent.
    pub fn step<C: Carrier<Block = B>>(
        &mut self,
        carrier: &mut C,
        queue: &F::Queue,
        args: DeviceRingArgs<'_, E>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error>
    where
        B: Block<F::Queue>,
    {
        let (step, plan) = (self.steps_done(), self.kernel.plan());
        if self.is_done() {
            return Err(Error::argument("step", format!("at most {} steps", plan.steps()), "one more"));
        }
        let next_len = match step + 1 < plan.steps() {
            true => plan.block_len(step + 1) * size_of::<E>(),
            false => 0,
        };
        let block = self.blocks.turn(carrier, next_len)?;
        let view = block.view(queue)?;
        let block = view.part(0..plan.block_len(step) * size_of::<E>())?.cast();
        let DeviceRingArgs { tiles, tile_counts, q, o, ml, out, lse, status } = args;
        let args = RingStepArgs { tiles, tile_counts, q, block: &block, o, ml, out: Some(out), lse, status };
        self.kernel.run(queue, step, args, workspace)
    }

    /// The rank whose block the next step computes on.
    pub fn source(&self) -> usize {
        source(self.rank, self.steps_done(), self.kernel.plan().steps())
    }

    /// Waits for the exchange that is under way, so that the transport is free: for a ring that goes first, or because this one is given up.
    /// It goes on with the next [`step`](Self::step), to the same bits. All ranks pause after the same step.
    ///
    /// # Errors
    /// [`Error::Peer`] when a rank has failed.
    pub fn pause<C: Carrier<Block = B>>(&mut self, carrier: &mut C) -> Result<(), Error> {
        self.blocks.drain(carrier)
    }

    /// The two blocks, for the next layer's ring; after [`pause`](Self::pause) or the last step both are here. `None` while the transport
    /// shares the one that is being sent; one that is being received into comes back with its exchange alone, and is missing until then.
    /// Kernels that read them may still be queued.
    pub fn into_blocks(self) -> Option<(B, Option<B>)> {
        self.blocks.into_blocks()
    }
}

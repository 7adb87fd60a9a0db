//! Staged products: a copy engine fills a ring of slabs in HBM, kernels multiply what is there.
//!
//! Copies go by a side queue of the caller's, up to [`Plan::slots`] slabs ahead of the launches on the main queue. The marks of
//! [`SideQueue`] keep the order: a launch waits for the copy of its slab, and the copy that takes the slot next waits for that launch.

use std::ops::Range;

use cuda::kernels::hybrid_gemm::HybridGemmArgs;
use cuda::launch::Function;
use cuda::memory::{View, ViewMut};
use cuda::params::HybridGemmParams;
use cuda::side_queue::SideQueue;
use cuda::storage::Storage;
use cuda::workspace::Carver;

use super::{Gemm, GemmArgs, Plan};
use crate::Error;

/// The launches of a staged plan, in order: that of the columns in HBM, if there are any, then one per slab.
#[derive(Debug, Clone, Default)]
pub(super) struct Slabs {
    launches: Vec<SlabLaunch>,
}

/// What a launch reads.
#[derive(Debug, Clone)]
struct SlabLaunch {
    columns: Range<usize>,
    /// Bytes of the host part that are copied for it; none for the columns in HBM.
    copied: Option<Range<usize>>,
}

impl Slabs {
    /// None for a direct plan.
    pub(super) fn new(plan: &Plan) -> Result<Self, Error> {
        if !plan.is_staged() {
            return Ok(Slabs::default());
        }
        let launches = plan.launches(plan.config().max_tokens)?.into_iter().map(|launch| {
            let columns =
                launch.schedule.first_column..launch.schedule.first_column + launch.schedule.hbm_columns;
            let before = |column| plan.placement().column_bytes(0..column) as usize;
            let copied = (!launch.staged.is_empty()).then(|| before(columns.start)..before(columns.end));
            SlabLaunch { columns, copied }
        });
        Ok(Slabs { launches: launches.collect() })
    }

    /// Launches before the first slab's.
    fn resident(&self) -> usize {
        self.launches.iter().take_while(|launch| launch.copied.is_none()).count()
    }

    /// Place of a slab in the host part, in bytes.
    fn bytes(&self, slab: usize) -> Option<&Range<usize>> {
        self.launches.get(self.resident() + slab)?.copied.as_ref()
    }
}

/// The ring on its way round.
struct Ring<'a, S> {
    side: &'a mut S,
    slabs: &'a Slabs,
    host: &'a View<'a, u8>,
    bytes: ViewMut<'a, u8>,
    slots: usize,
    slot_bytes: usize,
    /// Slabs whose copies are enqueued.
    copied: usize,
}

impl<S: SideQueue> Ring<'_, S> {
    fn place(&self, slab: usize) -> Option<(Range<usize>, Range<usize>)> {
        let from = self.slabs.bytes(slab)?.clone();
        let at = slab % self.slots * self.slot_bytes;
        Some((at..at + from.len(), from))
    }

    /// Enqueues the copy of the next slab, if one is left. The slot's last reader is waited for.
    fn copy_next(&mut self) -> Result<(), Error> {
        let Some((to, from)) = self.place(self.copied) else { return Ok(()) };
        let (from, slot) = (self.host.part(from)?, self.copied % self.slots);
        let mut to = self.bytes.part_mut(to)?;
        // SAFETY: whoever made the view of the host part promised that it is valid and unwritten while what is enqueued here
        // runs. The ring is this call's until the main queue is behind its copies, and each copy into a slot comes after the
        // launch that read the slot before.
        unsafe { self.side.copy(slot, &from, &mut to) }?;
        self.copied += 1;
        Ok(())
    }

    /// A slab for the launches on `main` that come now: as many bytes as were copied.
    fn take(&mut self, main: &S::Main, slab: usize) -> Result<View<'_, u8>, Error> {
        self.side.before(main, slab % self.slots)?;
        let (place, _) =
            self.place(slab).ok_or_else(|| Error::argument("slab", "one of the plan's", slab))?;
        Ok(self.bytes.part(place)?)
    }
}

impl<F: Function, X: Storage> Gemm<F, X> {
    /// As [`run`](Self::run), for a staged plan: a copy engine brings slabs of the host part by `side`. All copies are behind
    /// `queue` when this returns, so that the two can be captured together. For other plans it is `run`, and `side` rests.
    ///
    /// The slabs are copied whatever the schedules say, and each launch books its own in the receipt: without tokens too, and where it
    /// refuses its schedule, when its columns of O alone are zero. Of a call that fails here, copies may be under way that are in no
    /// receipt; `queue` waits for them.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`Error::Argument`] for a side queue of fewer marks than [`Plan::slots`], or a host part that
    /// is not given.
    pub fn run_staged<O: Storage, S: SideQueue<Main = F::Queue>>(
        &self,
        queue: &F::Queue,
        side: &mut S,
        mut args: GemmArgs<'_, X, O>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let plan = self.plan();
        if !plan.is_staged() {
            return self.run(queue, args, workspace);
        }
        let slots = plan.slots();
        if side.slots() < slots {
            return Err(Error::argument("side", format!("marks for {slots} slots"), side.slots()));
        }
        let params = self.params_of(&args)?;
        let host = args.weights.host;
        let host = host.ok_or_else(|| Error::argument("host", "the columns in host memory", "none"))?;
        host.check("hybrid_gemm", "host", plan.placement().host_bytes() as usize, 1)?;
        if !host.is_in_host_memory() {
            return Err(Error::argument("host", "pinned memory of the host", host.space()));
        }
        args.schedule.check("hybrid_gemm", "schedule", self.slabs.launches.len(), 4)?;
        let carver = Carver::new("hybrid_gemm", workspace, plan.workspace())?;
        let mut partials = carver.take(plan.partials())?;
        let bytes = carver.take(plan.ring())?;
        let mut arrivals = carver.take(plan.arrivals())?;
        let mut ring =
            Ring { side, slabs: &self.slabs, host, bytes, slots, slot_bytes: plan.slot_bytes(), copied: 0 };

        let (resident, k_tiles) = (self.slabs.resident(), plan.placement().tiling().k_tiles());
        // Nothing is copied over what an earlier call still reads. From here on the two queues are forked.
        ring.side.after(queue)?;
        let mut enqueue = |ring: &mut Ring<'_, S>| -> Result<(), Error> {
            for _ in 0..slots {
                ring.copy_next()?;
            }
            for (index, launch) in self.slabs.launches.iter().enumerate() {
                let staged = launch.copied.is_some();
                {
                    let slab = if staged { Some(ring.take(queue, index - resident)?) } else { None };
                    let params = HybridGemmParams {
                        host_columns: 0,
                        host_row_major: 0,
                        hbm_first: launch.columns.start as u32,
                        hbm_columns: launch.columns.len() as u32,
                        hbm_row_major: if staged { params.host_row_major } else { 0 },
                        staged_bytes: slab.as_ref().map_or(0, |slab| slab.len() as u64),
                        staged_tiles: if staged { (launch.columns.len() * k_tiles) as u32 } else { 0 },
                        ..params
                    };
                    let launched = HybridGemmArgs {
                        params: &params,
                        blocks: plan.gemm().sm_budget() as u32,
                        x: args.x,
                        host: None,
                        hbm: slab.as_ref().or(args.weights.hbm),
                        scales: args.weights.scales,
                        bias: args.bias,
                        residual: args.residual,
                        out: args.out.reborrow(),
                        partials: partials.reborrow(),
                        arrivals: arrivals.reborrow(),
                        schedule: &args.schedule.part(index..index + 1)?,
                        experts: None,
                        traffic: args.traffic.as_mut().map(ViewMut::reborrow),
                        status: args.status.reborrow(),
                    };
                    self.kernel.launch(queue, launched)?;
                }
                if staged && ring.slabs.bytes(ring.copied).is_some() {
                    ring.side.after(queue)?;
                    ring.copy_next()?;
                }
            }
            Ok(())
        };
        let enqueued = enqueue(&mut ring);
        match enqueued {
            // The last launch waits for the last copy.
            Ok(()) => Ok(()),
            // Whatever failed, and wherever: no copy may outlive the call unseen, and no fork stay open. The first error counts, but
            // that of the join more, since then the workspace may be in use.
            Err(error) => Err(ring.side.join(queue).map_or_else(Error::from, |()| error)),
        }
    }
}

//! Weights where a GPU reads them.
//!
//! A call borrows weights until it is enqueued, not until it has run. They may be dropped all the same: giving up either part waits
//! for everything enqueued in the context, on whatever stream.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use cuda::cudarc::driver::{CudaSlice, CudaStream};
use cuda::driver::{Gpu, GpuFunction, Mapped, MappedKind, SideStream, failed, quiesce};
use cuda::memory::{View, ViewMut};
use cuda::storage::Storage;

use super::{DeviceWeights, Gemm, GemmArgs, Plan};
use crate::weights::gpu::pin;
use crate::weights::{Layout, Placement};
use crate::{Error, Weights};

/// Memory in HBM that is freed when nothing runs any more. The events that slices keep would order its end as well, but callers
/// turn them off to capture graphs. Where the end of what runs cannot be waited for, it is leaked.
#[derive(Debug)]
struct Kept<T>(ManuallyDrop<CudaSlice<T>>);

impl<T> Kept<T> {
    fn new(slice: CudaSlice<T>) -> Self {
        Kept(ManuallyDrop::new(slice))
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        if quiesce(self.0.context()) {
            // SAFETY: dropped once, here, and not used any more.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// A matrix on both sides of the link: the host part pinned, the rest copied to HBM. Dropping it waits for whoever reads it.
#[derive(Debug)]
pub struct ResidentWeights {
    weights: Weights,
    ordinal: usize,
    hbm: Kept<u8>,
    scales: Kept<f32>,
}

impl ResidentWeights {
    /// Brings weights to their places. A host part that the device reaches already, such as a pinned file, stays where it is;
    /// any other is copied to pinned memory. Blocks.
    ///
    /// # Errors
    /// As [`pin`]; [`Error::Misaligned`] for a row-major part whose rows start between 16-byte units;
    /// [`Error::Cuda`] when the device has no memory left.
    pub fn new(gpu: &Gpu, stream: &Arc<CudaStream>, weights: &Weights) -> Result<Self, Error> {
        weights.check_in_place()?;
        let ordinal = gpu.device().ordinal;
        let weights = match weights.host_memory().0.device_address(ordinal) {
            Ok(_) => weights.clone(),
            Err(_) => pin(gpu, weights)?,
        };
        let hbm = Kept::new(to_device(stream, weights.hbm_bytes())?);
        let scales = Kept::new(to_device(stream, weights.scales())?);
        arrived(stream)?;
        Ok(Self { ordinal, hbm, scales, weights })
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Calls with the weights as arguments of [`Gemm::run`](super::Gemm::run).
    ///
    /// # Errors
    /// Those of `run`; [`Error::NotMapped`] cannot occur after [`new`](Self::new).
    pub fn with<R>(
        &self,
        stream: &CudaStream,
        run: impl FnOnce(DeviceWeights<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let placement = self.weights.placement();
        let bytes = placement.host_bytes() as usize;
        let host = match bytes {
            0 => None,
            _ => {
                let (memory, start) = self.weights.host_memory();
                let address = memory.device_address(self.ordinal)? + start as u64;
                // SAFETY: the weights hold this many pinned bytes at the address, nobody writes them, and giving them up
                // waits for the kernels that read them.
                Some(unsafe { View::from_mapped(address, bytes, self.ordinal) })
            }
        };
        let hbm = (placement.hbm_columns() > 0).then(|| View::device(&*self.hbm.0, stream));
        let scaled = !self.weights.scales().is_empty();
        let scales = scaled.then(|| View::device(&*self.scales.0, stream));
        let placements = std::slice::from_ref(placement);
        run(DeviceWeights { host: host.as_ref(), hbm: hbm.as_ref(), scales: scales.as_ref(), placements })
    }
}

/// A prepared product and its weights, which it keeps alive.
#[derive(Debug, Clone)]
pub struct ResidentGemm<X> {
    gemm: Gemm<GpuFunction, X>,
    weights: Arc<ResidentWeights>,
}

impl<X: Storage> ResidentGemm<X> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// As [`Gemm::prepare`]; [`Error::Argument`] for weights that are placed otherwise than planned.
    pub fn prepare(gpu: &Gpu, plan: &Plan, weights: Arc<ResidentWeights>) -> Result<Self, Error> {
        let (planned, found) = (plan.placement(), weights.weights().placement());
        if planned != found {
            return Err(Error::argument("weights", planned, found));
        }
        Ok(ResidentGemm { gemm: Gemm::prepare(gpu, plan)?, weights })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        self.gemm.plan()
    }

    /// The weights.
    pub fn weights(&self) -> &Arc<ResidentWeights> {
        &self.weights
    }

    /// As [`Gemm::run_staged`] for a staged plan, which needs the side stream, and as [`Gemm::run`] for others, which need none.
    ///
    /// # Errors
    /// As there.
    pub fn run<O: Storage>(
        &self,
        stream: &CudaStream,
        side: Option<&mut SideStream>,
        args: GemmArgs<'_, X, O, ()>,
        workspace: ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        self.weights.with(stream, |weights| {
            let args = args.with_weights(weights);
            match side {
                Some(side) => self.gemm.run_staged(stream, side, args, workspace),
                None => self.gemm.run(stream, args, workspace),
            }
        })
    }
}

/// The weights of experts on both sides of the link, as [`GroupedPlan::table`](super::GroupedPlan::table) has them: the host
/// parts in pinned memory one behind the other, the other parts in HBM. Dropping them waits for whoever reads them.
#[derive(Debug)]
pub struct ResidentExperts {
    placements: Vec<Placement>,
    host: Option<Mapped<u8>>,
    hbm: Option<Kept<u8>>,
    scales: Option<Kept<f32>>,
}

impl ResidentExperts {
    /// Brings the experts of a plan, in its order, to their places. Blocks. Plans of others refuse them when they run.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights that are not packed; [`Error::Cuda`] when there is no memory to pin, or none on the device.
    pub fn new(gpu: &Gpu, stream: &Arc<CudaStream>, experts: &[Weights]) -> Result<Self, Error> {
        if let Some(index) =
            experts.iter().position(|expert| expert.placement().host_layout() != Layout::Packed)
        {
            return Err(Error::argument("experts", "packed weights", format!("expert {index} row by row")));
        }
        let bytes: usize = experts.iter().map(|expert| expert.host_bytes().len()).sum();
        let mut host = None;
        if bytes > 0 {
            let mut arena = Mapped::<u8>::zeroed(gpu, bytes, MappedKind::Cached)?;
            let mut rest = arena.write()?;
            for expert in experts {
                let (place, behind) = rest.split_at_mut(expert.host_bytes().len());
                place.copy_from_slice(expert.host_bytes());
                rest = behind;
            }
            host = Some(arena);
        }
        let hbm = experts.iter().map(Weights::hbm_bytes).collect::<Vec<_>>().concat();
        let scales = experts.iter().map(Weights::scales).collect::<Vec<_>>().concat();
        let experts = ResidentExperts {
            placements: experts.iter().map(|expert| *expert.placement()).collect(),
            host,
            hbm: if hbm.is_empty() { None } else { Some(Kept::new(to_device(stream, &hbm)?)) },
            scales: if scales.is_empty() { None } else { Some(Kept::new(to_device(stream, &scales)?)) },
        };
        arrived(stream)?;
        Ok(experts)
    }

    /// Calls with the weights as arguments of [`GroupedGemm::run`](super::GroupedGemm::run).
    ///
    /// # Errors
    /// Those of `run`.
    pub fn with<R>(
        &self,
        stream: &CudaStream,
        run: impl FnOnce(DeviceWeights<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let host = self.host.as_ref().map(Mapped::view);
        let hbm = self.hbm.as_ref().map(|hbm| View::device(&*hbm.0, stream));
        let scales = self.scales.as_ref().map(|scales| View::device(&*scales.0, stream));
        let placements = &self.placements;
        run(DeviceWeights { host: host.as_ref(), hbm: hbm.as_ref(), scales: scales.as_ref(), placements })
    }
}

/// A copy on the device. An allocation of nothing has no address, so one element stands for it.
fn to_device<T: cuda::cudarc::driver::DeviceRepr + Default>(
    stream: &Arc<CudaStream>,
    values: &[T],
) -> Result<CudaSlice<T>, Error> {
    let nothing = [T::default()];
    let copied = stream.clone_htod(if values.is_empty() { &nothing[..] } else { values });
    Ok(copied.map_err(failed("cuMemcpyHtoDAsync"))?)
}

/// Waits for what was copied: calls on other streams read it, and no event need order them.
fn arrived(stream: &CudaStream) -> Result<(), Error> {
    Ok(stream.synchronize().map_err(failed("cuStreamSynchronize"))?)
}

//! The schedule and the counters of calls, in device memory.

use std::sync::Arc;

use bytemuck::Zeroable;
use cuda::cudarc::driver::{CudaSlice, CudaStream};
use cuda::driver::failed;
use cuda::memory::{View, ViewMut};
use cuda::params::{HybridGemmExpert, HybridGemmSchedule, HybridGemmTraffic};

use super::{GroupedPlan, Plan};
use crate::{Error, Traffic};

/// The schedules that calls read, and captured graphs with them: what is written here holds from the next replay on.
#[derive(Debug)]
pub struct DeviceSchedule {
    bytes: CudaSlice<u8>,
}

impl DeviceSchedule {
    /// Allocates and writes.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses.
    pub fn new(stream: &Arc<CudaStream>, schedules: &[HybridGemmSchedule]) -> Result<Self, Error> {
        let bytes =
            stream.clone_htod(bytemuck::cast_slice(schedules)).map_err(failed("cuMemcpyHtoDAsync"))?;
        Ok(Self { bytes })
    }

    /// Replaces the schedules by as many others, in the order of the stream. Not to be captured: the graph would keep these.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of schedules; [`Error::Cuda`] when the driver refuses.
    pub fn write(&mut self, stream: &Arc<CudaStream>, schedules: &[HybridGemmSchedule]) -> Result<(), Error> {
        let bytes: &[u8] = bytemuck::cast_slice(schedules);
        if bytes.len() != self.bytes.len() {
            let expected = self.bytes.len() / size_of::<HybridGemmSchedule>();
            return Err(Error::argument("schedules", expected, schedules.len()));
        }
        let written = stream.memcpy_htod(bytes, &mut self.bytes);
        Ok(written.map_err(failed("cuMemcpyHtoDAsync"))?)
    }

    /// For [`Gemm::run`](super::Gemm::run) on `stream`.
    pub fn view<'a>(&'a self, stream: &'a CudaStream) -> View<'a, HybridGemmSchedule> {
        View::device(&self.bytes, stream).cast()
    }
}

/// Where the weights of each expert are, for calls of a [`GroupedPlan`].
#[derive(Debug)]
pub struct DeviceTable {
    bytes: CudaSlice<u8>,
}

impl DeviceTable {
    /// Allocates and writes [`GroupedPlan::table`].
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses.
    pub fn new(stream: &Arc<CudaStream>, plan: &GroupedPlan) -> Result<Self, Error> {
        let table = plan.table();
        let bytes = stream.clone_htod(bytemuck::cast_slice(&table)).map_err(failed("cuMemcpyHtoDAsync"))?;
        Ok(Self { bytes })
    }

    /// For [`GroupedGemm::run`](super::GroupedGemm::run) on `stream`.
    pub fn view<'a>(&'a self, stream: &'a CudaStream) -> View<'a, HybridGemmExpert> {
        View::device(&self.bytes, stream).cast()
    }
}

/// Counters of what calls have moved since they were cleared.
#[derive(Debug)]
pub struct DeviceReceipt {
    bytes: CudaSlice<u8>,
}

impl DeviceReceipt {
    /// Allocates counters of zero.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, Error> {
        let bytes = stream.alloc_zeros(size_of::<HybridGemmTraffic>()).map_err(failed("cuMemAllocAsync"))?;
        Ok(Self { bytes })
    }

    /// For [`Gemm::run`](super::Gemm::run) on `stream`.
    pub fn view_mut<'a>(&'a mut self, stream: &'a CudaStream) -> ViewMut<'a, HybridGemmTraffic> {
        ViewMut::device(&mut self.bytes, stream).cast()
    }

    /// Waits for the stream and reads what was moved, to hold against [`Plan::predict`].
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses, or a kernel before has failed.
    pub fn read(&self, stream: &Arc<CudaStream>, plan: &Plan) -> Result<Traffic, Error> {
        Ok(plan.traffic(&self.counters(stream)?))
    }

    /// Waits for the stream and reads the counters, for [`Plan::role_seconds`] too.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn counters(&self, stream: &Arc<CudaStream>) -> Result<HybridGemmTraffic, Error> {
        let mut counted = HybridGemmTraffic::zeroed();
        let read = stream.memcpy_dtoh(&self.bytes, bytemuck::bytes_of_mut(&mut counted));
        read.map_err(failed("cuMemcpyDtoHAsync"))?;
        stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
        Ok(counted)
    }

    /// Back to zero, in the order of the stream.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses.
    pub fn clear(&mut self, stream: &Arc<CudaStream>) -> Result<(), Error> {
        Ok(stream.memset_zeros(&mut self.bytes).map_err(failed("cuMemsetD8Async"))?)
    }
}

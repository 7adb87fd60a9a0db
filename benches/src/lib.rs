//! What the benches share: where a GPU is, how device time is taken, how groups are named.
//!
//! Groups are `crate/kernel/backend/dtype`, parameters are shapes, throughput is bytes moved and floating-point operations.
//! The backend `cpu-reference` is the oracle, there to show the shape of the curve, not to be fast. GPU backends appear only
//! where there is a GPU, under its name, so that baselines of different machines never mix.

use std::sync::Arc;
use std::time::Duration;

use criterion::{Bencher, Throughput};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::driver::{Gpu, Timer};

/// What README.md shows compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct ReadmeCompiles;

/// The first GPU, a stream on it and something to flush its L2 with.
pub struct GpuBench {
    /// The GPU.
    pub gpu: Gpu,
    /// Where everything is enqueued.
    pub stream: Arc<CudaStream>,
    timer: Timer,
    flush: CudaSlice<u8>,
}

/// More than the L2 of any GPU so far.
const FLUSH_BYTES: usize = 256 << 20;

impl GpuBench {
    /// The first GPU, or `None` after printing why there is none.
    ///
    /// # Panics
    /// When a GPU is there but cannot be used, or is missing although `REQUIRE_GPU=1` demands one.
    pub fn new() -> Option<Self> {
        match Gpu::open(0) {
            Ok(gpu) => {
                let stream = gpu.default_stream();
                let timer = Timer::new(&gpu).expect("timing events");
                let flush = stream.alloc_zeros(FLUSH_BYTES).expect("memory to flush L2 with");
                Some(GpuBench { gpu, stream, timer, flush })
            }
            Err(reason) => {
                assert!(std::env::var("REQUIRE_GPU").as_deref() != Ok("1"), "REQUIRE_GPU=1, but {reason}");
                println!("SKIPPED GPU benches: {reason}");
                None
            }
        }
    }

    /// Backend name for groups: `sm_90a` and the number of SMs tell machines apart.
    pub fn name(&self) -> String {
        format!("{}x{}", longkv_cuda::launch::Device::arch(&self.gpu), self.gpu.sm_count())
    }

    /// Times `launch` by device events, with L2 flushed before every launch.
    ///
    /// # Panics
    /// When a launch fails.
    pub fn iter_cold(&mut self, bencher: &mut Bencher<'_>, mut launch: impl FnMut(&Arc<CudaStream>)) {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                self.stream.memset_zeros(&mut self.flush).expect("flush L2");
                self.timer.start(&self.stream).expect("start event");
                launch(&self.stream);
                self.timer.stop(&self.stream).expect("stop event");
                total += self.timer.elapsed().expect("elapsed device time");
            }
            total
        });
    }
}

/// Throughput in bytes and floating-point operations; criterion prints GiB/s and, as Gelem/s, GFLOP/s.
pub fn throughput(bytes: u64, flops: u64) -> Throughput {
    Throughput::ElementsAndBytes { elements: flops, bytes }
}

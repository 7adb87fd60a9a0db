//! The first GPU as criterion sees it: cold L2, device time by events, figures with the kernels that they belong to.

use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{Bencher, BenchmarkGroup, BenchmarkId, Criterion};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::driver::{Gpu, GpuFunction, Launched, Timer, launches};
use longkv_cuda::kernels::ceilings::StreamRead;
use longkv_cuda::memory::{View, ViewMut};
use serde_json::json;

use crate::figure::{self, FIGURES_VARIABLE, Summary};
use crate::{ceilings, throughput};

/// The first GPU, a stream on it and something to flush its L2 with.
pub struct GpuBench {
    /// The GPU.
    pub gpu: Gpu,
    /// Where everything is enqueued.
    pub stream: Arc<CudaStream>,
    timer: Timer,
    reader: StreamRead<GpuFunction>,
    flush: CudaSlice<u8>,
    flush_out: CudaSlice<u32>,
    read_gb_s: f64,
    bf16_tflops: f64,
}

/// Groups of one kernel on the GPU.
pub struct GpuGroup<'a> {
    /// Criterion's group, for its settings.
    pub group: BenchmarkGroup<'a, WallTime>,
    /// `crate/kernel/dtype`.
    name: String,
}

/// More than the L2 of any GPU so far.
const FLUSH_BYTES: usize = 256 << 20;
/// Launches whose time is not kept: clocks rise and pages are touched.
const WARM_UP: usize = 5;

impl GpuBench {
    /// The first GPU, or `None` after printing why there is none.
    ///
    /// # Panics
    /// When a GPU is there but cannot be used, or is missing although `REQUIRE_GPU=1` demands one.
    pub fn new() -> Option<Self> {
        let gpu = match Gpu::open(0) {
            Ok(gpu) => gpu,
            Err(reason) => {
                assert!(std::env::var("REQUIRE_GPU").as_deref() != Ok("1"), "REQUIRE_GPU=1, but {reason}");
                println!("SKIPPED GPU benches: {reason}");
                return None;
            }
        };
        let stream = gpu.default_stream();
        let timer = Timer::new(&gpu).expect("timing events");
        let reader = StreamRead::prepare(&gpu).expect("prepare");
        let flush = ceilings::random_bytes(&stream, FLUSH_BYTES);
        let flush_out = stream.alloc_zeros(gpu.sm_count() as usize * 4 * 8).expect("allocate");
        let mut bench =
            GpuBench { gpu, stream, timer, reader, flush, flush_out, read_gb_s: 0.0, bf16_tflops: 0.0 };
        bench.read_gb_s = ceilings::read_bandwidth(&bench, 1 << 30).median;
        bench.bf16_tflops = ceilings::bf16_rate(&bench).median;
        let name = &bench.gpu.device().name;
        println!(
            "{name}: reads {:.0} GB/s, {:.0} bf16 TFLOP/s by mma.sync",
            bench.read_gb_s, bench.bf16_tflops
        );
        Some(bench)
    }

    /// Backend name for groups: `sm_90a` and the number of SMs tell machines apart.
    pub fn name(&self) -> String {
        format!("{}x{}", longkv_cuda::launch::Device::arch(&self.gpu), self.gpu.sm_count())
    }

    /// The group `kernel/backend/dtype`, where `kernel` is `crate/kernel`.
    pub fn group<'a>(&self, criterion: &'a mut Criterion, kernel: &str, dtype: &str) -> GpuGroup<'a> {
        GpuGroup {
            group: criterion.benchmark_group(format!("{kernel}/{}/{dtype}", self.name())),
            name: format!("{kernel}/{dtype}"),
        }
    }

    /// Times `launch` on a problem that moves `bytes` and takes `flops`, and writes the figure down.
    ///
    /// # Panics
    /// When a launch fails.
    pub fn case(
        &mut self,
        group: &mut GpuGroup<'_>,
        shape: &str,
        (bytes, flops): (u64, u64),
        mut launch: impl FnMut(&Arc<CudaStream>),
    ) {
        let mut samples = Vec::new();
        let mut kernels: Vec<Launched> = Vec::new();
        group.group.throughput(throughput(bytes, flops));
        group.group.bench_function(BenchmarkId::from_parameter(shape), |bencher| {
            bencher.iter_custom(|iterations| {
                if kernels.is_empty() {
                    kernels = launches(|| launch(&self.stream)).1;
                }
                (0..iterations)
                    .map(|_| {
                        let time = self.cold(&mut launch);
                        samples.push(time.as_secs_f64() * 1e6);
                        time
                    })
                    .sum()
            });
        });
        // None if criterion's filter left the case out.
        let Some(summary) = Summary::of(samples.get(WARM_UP..).unwrap_or_default()) else { return };
        let kernels: Vec<_> = kernels
            .iter()
            .map(|k| json!({ "label": k.label, "arch": k.arch.to_string(), "cubin": k.cubin.to_string() }))
            .collect();
        let line = json!({
            "bench": format!("{}/{shape}", group.name),
            "implementation": "longkv",
            "median_us": summary.median,
            "p10_us": summary.p10,
            "p90_us": summary.p90,
            "samples": summary.samples,
            "bytes": bytes,
            "flops": flops,
            "read_gb_s": self.read_gb_s,
            "bf16_tflops": self.bf16_tflops,
            "kernels": kernels,
        });
        figure::append(FIGURES_VARIABLE, &line);
    }

    /// Times `launch` by device events, with L2 flushed before every launch. [`case`](Self::case) also writes a figure.
    ///
    /// # Panics
    /// When a launch fails.
    pub fn iter_cold(&mut self, bencher: &mut Bencher<'_>, mut launch: impl FnMut(&Arc<CudaStream>)) {
        bencher.iter_custom(|iterations| (0..iterations).map(|_| self.cold(&mut launch)).sum());
    }

    /// Device time of one launch with none of its data in L2.
    ///
    /// L2 is filled by reading: a memset would leave it full of lines that the launch would have to write back. The launch is
    /// enqueued while the reading still runs, so that its own latency does not show.
    fn cold(&mut self, launch: &mut impl FnMut(&Arc<CudaStream>)) -> Duration {
        let blocks = self.gpu.sm_count() * 4;
        let flush = View::device(&self.flush, &self.stream);
        let mut out = ViewMut::device(&mut self.flush_out, &self.stream);
        self.reader.launch(&self.stream, blocks, 1, &flush, &mut out).expect("flush L2");
        self.timer.start(&self.stream).expect("start event");
        launch(&self.stream);
        self.timer.stop(&self.stream).expect("stop event");
        self.timer.elapsed().expect("elapsed device time")
    }

    /// Device time of `launch` as it is, `repeats` times after one that does not count, in seconds.
    pub(crate) fn times(&self, repeats: usize, mut launch: impl FnMut(&Arc<CudaStream>)) -> Summary {
        launch(&self.stream);
        let samples: Vec<f64> = (0..repeats)
            .map(|_| {
                self.timer.start(&self.stream).expect("start event");
                launch(&self.stream);
                self.timer.stop(&self.stream).expect("stop event");
                self.timer.elapsed().expect("elapsed device time").as_secs_f64()
            })
            .collect();
        Summary::of(&samples).expect("at least one repeat")
    }
}

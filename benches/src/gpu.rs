//! The first GPU as benches see it: cold L2, device time by events, and the two rates that figures are shares of.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, SamplingMode};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::driver::{Gpu, GpuFunction, SideStream, Timer};
use longkv_cuda::kernels::ceilings::StreamRead;
use longkv_cuda::memory::{View, ViewMut};

use crate::case::GpuGroup;
use crate::ceilings;
use crate::figure::Summary;

/// The first GPU, a stream on it and something to flush its L2 with.
pub struct GpuBench {
    /// The GPU.
    pub gpu: Gpu,
    /// Where everything is enqueued: a stream of its own, which can be captured.
    pub stream: Arc<CudaStream>,
    timer: Timer,
    reader: StreamRead<GpuFunction>,
    flush: CudaSlice<u8>,
    flush_out: RefCell<CudaSlice<u32>>,
    pub(crate) read_gb_s: f64,
    pub(crate) bf16_tflops: f64,
}

/// More than the L2 of any GPU so far.
const FLUSH_BYTES: usize = 256 << 20;
/// What the read bandwidth is measured over: long against any launch.
const READ_BYTES: usize = 4 << 30;

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
        let stream = own_stream(&gpu);
        let timer = Timer::new(&gpu).expect("timing events");
        let reader = StreamRead::prepare(&gpu).expect("prepare");
        let flush = ceilings::random_bytes(&stream, FLUSH_BYTES);
        let flush_out = stream.alloc_zeros(gpu.sm_count() as usize * 4 * 8).expect("allocate");
        let flush_out = RefCell::new(flush_out);
        let mut bench =
            GpuBench { gpu, stream, timer, reader, flush, flush_out, read_gb_s: 0.0, bf16_tflops: 0.0 };
        bench.read_gb_s = ceilings::read_bandwidth(&bench, READ_BYTES).median;
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
    ///
    /// Samples are few and short, whatever the command line asks for: medians of cold launches settle fast, and a figure is of
    /// the launches themselves, not of criterion's statistics.
    pub fn group<'a>(&self, criterion: &'a mut Criterion, kernel: &str, dtype: &str) -> GpuGroup<'a> {
        let mut group = criterion.benchmark_group(format!("{kernel}/{}/{dtype}", self.name()));
        group
            .sampling_mode(SamplingMode::Flat)
            .sample_size(25)
            .nresamples(2000)
            .warm_up_time(Duration::from_millis(5))
            .measurement_time(Duration::from_millis(25));
        GpuGroup { group, name: format!("{kernel}/{dtype}") }
    }

    /// A second stream, for work that forks from the bench's and joins it again before a launch returns.
    ///
    /// # Panics
    /// When there is none.
    pub fn second_stream(&self) -> Arc<CudaStream> {
        own_stream(&self.gpu)
    }

    /// A stream for copies, with marks for `slots` slots.
    ///
    /// # Panics
    /// When there is none.
    pub fn side_stream(&self, slots: usize) -> SideStream {
        SideStream::new(&self.gpu, self.second_stream(), slots).expect("events")
    }

    /// Device time of one launch with none of its data in L2.
    ///
    /// L2 is filled by reading: a memset would leave it full of lines that the launch would have to write back. The launch is
    /// enqueued while the reading still runs, so that its own latency does not show.
    pub(crate) fn cold(&self, launch: &mut dyn FnMut(&Arc<CudaStream>)) -> Duration {
        let blocks = self.gpu.sm_count() * 4;
        let flush = View::device(&self.flush, &self.stream);
        let mut out = self.flush_out.borrow_mut();
        let mut out = ViewMut::device(&mut *out, &self.stream);
        self.reader.launch(&self.stream, blocks, 1, &flush, &mut out).expect("flush L2");
        self.timer.start(&self.stream).expect("start event");
        launch(&self.stream);
        self.timer.stop(&self.stream).expect("stop event");
        self.timer.elapsed().expect("elapsed device time")
    }

    /// Device time of cold launches, `repeats` of them after one that does not count, in seconds: what ceilings are measured
    /// with, as the kernels are that are held to them.
    pub(crate) fn times(&self, repeats: usize, mut launch: impl FnMut(&Arc<CudaStream>)) -> Summary {
        self.cold(&mut launch);
        let samples: Vec<f64> = (0..repeats).map(|_| self.cold(&mut launch).as_secs_f64()).collect();
        Summary::of(&samples).expect("at least one repeat")
    }
}

/// A new stream, whose context goes on without events for each slice: a wait for work outside of a capture would end it.
fn own_stream(gpu: &Gpu) -> Arc<CudaStream> {
    let context = gpu.context();
    // SAFETY: slices are made, used and dropped on a bench's one stream; work on others forks from it and joins it before a
    // launch returns, or is waited for on the host.
    unsafe { context.disable_event_tracking() };
    context.new_stream().expect("a stream")
}

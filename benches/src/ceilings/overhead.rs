//! What a launch and an event cost: the floor under every short kernel.

use std::sync::Arc;
use std::time::Instant;

use longkv_cuda::cudarc::driver::CudaStream;
use longkv_cuda::kernels::ceilings::StreamRead;
use longkv_cuda::memory::{View, ViewMut};

use super::report;
use crate::GpuBench;
use crate::figure::Summary;

const LAUNCHES: usize = 1000;
const REPEATS: usize = 20;

/// Launches that read nothing, alone and in a row, and events with nothing between them.
///
/// # Panics
/// When a launch fails.
pub fn measure(bench: &GpuBench) {
    let kernel = StreamRead::prepare(&bench.gpu).expect("prepare");
    let source = bench.stream.alloc_zeros::<u8>(16).expect("allocate");
    let blocks = bench.gpu.sm_count();
    let mut out = bench.stream.alloc_zeros::<u32>(blocks as usize * 8).expect("allocate");
    let mut launch = |stream: &Arc<CudaStream>| {
        let view = View::device(&source, stream);
        let nothing = view.part(0..0).expect("the empty part");
        let mut out = ViewMut::device(&mut out, stream);
        kernel.launch(stream, blocks, 1, &nothing, &mut out).expect("launch");
    };
    let microseconds = |seconds: Summary| seconds.map(|seconds| seconds * 1e6);

    report("event_pair", "us", microseconds(bench.times(REPEATS, |_| {})), &[]);
    report(
        "one_launch",
        "us",
        microseconds(bench.times(REPEATS, &mut launch)),
        &[("blocks", u64::from(blocks))],
    );
    let in_a_row = bench.times(REPEATS, |stream| (0..LAUNCHES).for_each(|_| launch(stream)));
    let each = |total: Summary| microseconds(total.map(|seconds| seconds / LAUNCHES as f64));
    report("launch_in_a_row", "us", each(in_a_row), &[("launches", LAUNCHES as u64)]);

    // What the host spends until the call returns.
    let samples: Vec<f64> = (0..REPEATS)
        .map(|_| {
            bench.stream.synchronize().expect("earlier launches ran");
            let started = Instant::now();
            // Few enough not to fill the queue, where a launch would wait.
            (0..100).for_each(|_| launch(&bench.stream));
            started.elapsed().as_secs_f64() / 100.0
        })
        .collect();
    let host = Summary::of(&samples).expect("samples");
    report("launch_host_time", "us", microseconds(host), &[]);
}

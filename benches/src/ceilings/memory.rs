//! Bandwidth of device memory.

use longkv_cuda::kernels::ceilings::{BulkRead, BulkReadShape, StreamCopy, StreamRead, StreamWrite};
use longkv_cuda::launch::Device as _;
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::table::ArchClass;

use super::{gb_s, random_bytes, report};
use crate::GpuBench;
use crate::figure::Summary;

const REPEATS: usize = 20;
/// Many times any L2.
const BYTES: usize = 4 << 30;

/// Read bandwidth in GB/s over a buffer of `bytes`.
///
/// # Panics
/// When the device has not enough memory or a launch fails.
pub fn read_bandwidth(bench: &GpuBench, bytes: usize) -> Summary {
    let kernel = StreamRead::prepare(&bench.gpu).expect("prepare");
    let source = random_bytes(&bench.stream, bytes);
    let blocks = bench.gpu.sm_count() * 4;
    let mut out = bench.stream.alloc_zeros::<u32>(blocks as usize * 8).expect("allocate");
    let seconds = bench.times(REPEATS, |stream| {
        let mut out = ViewMut::device(&mut out, stream);
        kernel.launch(stream, blocks, 1, &View::device(&source, stream), &mut out).expect("launch");
    });
    gb_s(bytes, seconds)
}

/// Read, copy and write bandwidth, and reading by bulk copies.
///
/// # Panics
/// When the device has not enough memory or a launch fails.
pub fn measure(bench: &GpuBench) {
    let blocks = bench.gpu.sm_count() * 4;
    let sizes = |bytes: usize| [("bytes", bytes as u64), ("blocks", u64::from(blocks))];
    report("read_bandwidth", "GB/s", read_bandwidth(bench, BYTES), &sizes(BYTES));

    let stream = &bench.stream;
    let mut target = random_bytes(stream, BYTES);
    let write = StreamWrite::prepare(&bench.gpu).expect("prepare");
    let seconds = bench.times(REPEATS, |stream| {
        write.launch(stream, blocks, 1, &mut ViewMut::device(&mut target, stream)).expect("launch");
    });
    report("write_bandwidth", "GB/s", gb_s(BYTES, seconds), &sizes(BYTES));

    let source = random_bytes(stream, BYTES);
    let copy = StreamCopy::prepare(&bench.gpu).expect("prepare");
    let seconds = bench.times(REPEATS, |stream| {
        let mut out = ViewMut::device(&mut target, stream);
        copy.launch(stream, blocks, &View::device(&source, stream), &mut out).expect("launch");
    });
    // Bytes read and bytes written.
    report("copy_bandwidth", "GB/s", gb_s(2 * BYTES, seconds), &sizes(BYTES));

    if !ArchClass::Hopper.runs_on(bench.gpu.arch()) {
        return;
    }
    let bulk = BulkRead::prepare(&bench.gpu).expect("prepare");
    for (blocks_per_sm, piece_bytes, stages) in
        [(1, 8192, 4), (1, 16_384, 4), (1, 16_384, 12), (2, 16_384, 4)]
    {
        let shape = BulkReadShape { blocks: bench.gpu.sm_count() * blocks_per_sm, piece_bytes, stages };
        let mut out = stream.alloc_zeros::<u32>(shape.blocks as usize * 4).expect("allocate");
        let seconds = bench.times(REPEATS, |stream| {
            let mut out = ViewMut::device(&mut out, stream);
            bulk.launch(stream, shape, &View::device(&source, stream), &mut out).expect("launch");
        });
        let parameters = [
            ("bytes", BYTES as u64),
            ("blocks", u64::from(shape.blocks)),
            ("piece_bytes", u64::from(piece_bytes)),
            ("in_flight_per_sm", u64::from(blocks_per_sm * piece_bytes * stages)),
        ];
        report("bulk_read_bandwidth", "GB/s", gb_s(BYTES, seconds), &parameters);
    }
}

//! The link to host memory: by copy engine, by loads of the SMs, by bulk copies, by how many SMs and bytes in flight.

use longkv_cuda::driver::{Mapped, MappedKind, Timer};
use longkv_cuda::kernels::ceilings::{BulkRead, BulkReadShape, StreamRead};
use longkv_cuda::launch::Device as _;
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::table::ArchClass;

use super::{fill_random, gb_s, random_bytes, report};
use crate::GpuBench;
use crate::figure::Summary;

const REPEATS: usize = 7;
const BYTES: usize = 256 << 20;

/// All of it.
///
/// # Panics
/// When the machine has not enough memory or a call fails.
pub fn measure(bench: &GpuBench) {
    let mut host = Mapped::<u8>::zeroed(&bench.gpu, BYTES, MappedKind::Cached).expect("pinned memory");
    fill_random(host.write().expect("nothing runs"));
    copy_engine(bench, &mut host);
    loads(bench, &host);
    if ArchClass::Hopper.runs_on(bench.gpu.arch()) {
        bulk_copies(bench, &host);
    }
    kept_in_l2(bench, &host);
    busy_link(bench, &host);
}

fn copy_engine(bench: &GpuBench, host: &mut Mapped<u8>) {
    let mut device = bench.stream.alloc_zeros::<u8>(BYTES).expect("allocate");
    let from = host.read().expect("nothing runs");
    let seconds = bench.times(REPEATS, |stream| stream.memcpy_htod(from, &mut device).expect("copy"));
    report("host_to_device_copy", "GB/s", gb_s(BYTES, seconds), &[("bytes", BYTES as u64)]);
    let to = host.write().expect("nothing runs");
    let seconds = bench.times(REPEATS, |stream| stream.memcpy_dtoh(&device, to).expect("copy"));
    bench.stream.synchronize().expect("the copies ran");
    report("device_to_host_copy", "GB/s", gb_s(BYTES, seconds), &[("bytes", BYTES as u64)]);
}

/// Numbers of blocks, up to one for each SM.
fn block_counts(bench: &GpuBench) -> impl Iterator<Item = u32> {
    let sms = bench.gpu.sm_count();
    [1, 2, 4, 8, 16, 32, 64].into_iter().filter(move |blocks| *blocks < sms).chain([sms])
}

/// How much of the buffer to read with this much in flight, so that slow cases stay short.
fn portion(in_flight: usize) -> usize {
    if in_flight < 128 << 10 { BYTES / 8 } else { BYTES }
}

fn loads(bench: &GpuBench, host: &Mapped<u8>) {
    let kernel = StreamRead::prepare(&bench.gpu).expect("prepare");
    for blocks in block_counts(bench) {
        let in_flight = blocks as usize * StreamRead::<longkv_cuda::driver::GpuFunction>::BYTES_IN_FLIGHT;
        let bytes = portion(in_flight);
        let view = host.view();
        let source = view.part(0..bytes).expect("within the buffer");
        let mut out = bench.stream.alloc_zeros::<u32>(blocks as usize * 8).expect("allocate");
        let seconds = bench.times(REPEATS, |stream| {
            kernel
                .launch(stream, blocks, 1, &source, &mut ViewMut::device(&mut out, stream))
                .expect("launch");
        });
        let parameters = [("blocks", u64::from(blocks)), ("in_flight", in_flight as u64)];
        report("host_read_by_loads", "GB/s", gb_s(bytes, seconds), &parameters);
    }
}

fn bulk_copies(bench: &GpuBench, host: &Mapped<u8>) {
    let kernel = BulkRead::prepare(&bench.gpu).expect("prepare");
    for (piece_bytes, stages) in [(4096, 4), (16_384, 2), (16_384, 8)] {
        for blocks in block_counts(bench) {
            let shape = BulkReadShape { blocks, piece_bytes, stages };
            let in_flight = (blocks * piece_bytes * stages) as usize;
            let bytes = portion(in_flight);
            let view = host.view();
            let source = view.part(0..bytes).expect("within the buffer");
            let mut out = bench.stream.alloc_zeros::<u32>(blocks as usize * 4).expect("allocate");
            let seconds = bench.times(REPEATS, |stream| {
                kernel
                    .launch(stream, shape, &source, &mut ViewMut::device(&mut out, stream))
                    .expect("launch");
            });
            let parameters = [
                ("blocks", u64::from(blocks)),
                ("piece_bytes", u64::from(piece_bytes)),
                ("in_flight", in_flight as u64),
            ];
            report("host_read_by_bulk_copies", "GB/s", gb_s(bytes, seconds), &parameters);
        }
    }
}

/// 8 MiB of host memory read 16 times by one launch: well above the link's rate if L2 keeps host memory.
fn kept_in_l2(bench: &GpuBench, host: &Mapped<u8>) {
    const SMALL: usize = 8 << 20;
    let kernel = StreamRead::prepare(&bench.gpu).expect("prepare");
    let blocks = bench.gpu.sm_count();
    let view = host.view();
    let source = view.part(0..SMALL).expect("within the buffer");
    let mut out = bench.stream.alloc_zeros::<u32>(blocks as usize * 8).expect("allocate");
    for passes in [1, 16] {
        let seconds = bench.times(REPEATS, |stream| {
            let mut out = ViewMut::device(&mut out, stream);
            kernel.launch(stream, blocks, passes, &source, &mut out).expect("launch");
        });
        let parameters = [("bytes", SMALL as u64), ("passes", u64::from(passes))];
        report("host_read_repeated", "GB/s", gb_s(SMALL * passes as usize, seconds), &parameters);
    }
}

/// Bandwidth of device memory while a few blocks read host memory on another stream.
fn busy_link(bench: &GpuBench, host: &Mapped<u8>) {
    const DEVICE_BYTES: usize = 1 << 30;
    const LINK_BLOCKS: u32 = 8;
    let kernel = StreamRead::prepare(&bench.gpu).expect("prepare");
    let source = random_bytes(&bench.stream, DEVICE_BYTES);
    let blocks = bench.gpu.sm_count() * 4;
    let mut out = bench.stream.alloc_zeros::<u32>(blocks as usize * 8).expect("allocate");
    let mut link_out = bench.stream.alloc_zeros::<u32>(LINK_BLOCKS as usize * 8).expect("allocate");
    bench.stream.synchronize().expect("the copies ran");
    let side = bench.second_stream();
    let (whole, link) = (Timer::new(&bench.gpu).expect("events"), Timer::new(&bench.gpu).expect("events"));
    let host = host.view();
    let mut samples = Vec::new();
    for round in 0..=REPEATS {
        // The link's blocks are resident before the flush of L2 begins, and 256 MiB over the link take several times as long as it
        // and 1 GiB of device memory.
        for timer in [&whole, &link] {
            timer.start(&side).expect("start event");
        }
        let mut link_out = ViewMut::device(&mut link_out, &side);
        kernel.launch(&side, LINK_BLOCKS, 1, &host, &mut link_out).expect("launch");
        link.stop(&side).expect("stop event");
        let seconds = bench.cold(&mut |stream| {
            let mut out = ViewMut::device(&mut out, stream);
            kernel.launch(stream, blocks, 1, &View::device(&source, stream), &mut out).expect("launch");
        });
        whole.stop(&bench.stream).expect("stop event");
        // Both wait for their end, so that the next round starts on an idle device.
        let (until_read, until_link) =
            (whole.elapsed().expect("elapsed device time"), link.elapsed().expect("elapsed device time"));
        if until_link <= until_read {
            return println!(
                "read_beside_link: not measured, the link was done after {until_link:?} of {until_read:?}"
            );
        }
        if round > 0 {
            samples.push(seconds.as_secs_f64());
        }
    }
    let seconds = Summary::of(&samples).expect("repeats");
    let parameters = [("bytes", DEVICE_BYTES as u64), ("link_blocks", u64::from(LINK_BLOCKS))];
    report("read_beside_link", "GB/s", gb_s(DEVICE_BYTES, seconds), &parameters);
}

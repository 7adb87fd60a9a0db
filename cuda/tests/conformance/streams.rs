//! What the stream and the driver promise between launches: programmatic starts, memory of the host that kernels write, and graphs on
//! another stream than the one they were recorded from.

use cuda::driver::Graph;
use cuda::kernels::conformance::VectorMemory;
use cuda::memory::{View, ViewMut};
use emulator::rig::{Rig, gpu_or_skip};

use crate::data::{Random, assert_same};

emulator::device_test!(programmatic_launches_wait_for_what_they_read, kernels_reach_memory_of_the_host);

/// Words of a piece.
const PIECE: usize = 4;
/// Planes that hold all pieces of the source, rotated by their number.
const PLANES: usize = 8;

/// The source's words in the planes of what a launch wrote.
fn check_planes(what: &str, out: &[u32], source: &[u32]) {
    for plane in 0..PLANES {
        let mut expected = source.to_vec();
        expected.rotate_left(plane * PIECE);
        assert_same(
            &format!("{what}, plane {plane}"),
            &out[plane * source.len()..][..source.len()],
            &expected,
        );
    }
}

/// Pairs of launches, each started while the one before drains, with nothing between them but their own waits: the second reads what the
/// first wrote, and the next first one overwrites what the second read.
fn programmatic_launches_wait_for_what_they_read<R: Rig>(rig: &R) {
    let kernel = VectorMemory::prepare(rig.device()).expect("prepare");
    let (n, seed, rounds) = (700, 61, rig.stress_launches().min(200));
    let mut random = Random::new(seed);
    let sources: Vec<Vec<u32>> = (0..rounds).map(|_| random.words(n * PIECE)).collect();
    let on_device = rig.upload(&sources.concat());
    let mut between = rig.poisoned::<u32>(9 * n * PIECE);
    let mut out = rig.poisoned::<u32>(rounds * 9 * n * PIECE);
    for round in 0..rounds {
        let (sources, mut out) = (rig.view(&on_device), rig.view_mut(&mut out));
        let source = sources.part(round * n * PIECE..(round + 1) * n * PIECE).expect("a part");
        let first = kernel.launch(rig.queue(), n, true, &source, &mut rig.view_mut(&mut between));
        let mut to = out.part_mut(round * 9 * n * PIECE..(round + 1) * 9 * n * PIECE).expect("a part");
        let second = kernel.launch(rig.queue(), n, true, &rig.view(&between), &mut to);
        first.and(second).unwrap_or_else(|error| panic!("round {round} on {}: {error}", rig.name()));
    }
    let out = rig.download(&out);
    for (round, source) in sources.iter().enumerate() {
        let what = format!("round {round} of {rounds} (seed {seed}), {}", rig.name());
        check_planes(&what, &out[round * 9 * n * PIECE..], source);
    }
}

/// A kernel reads memory of the host and writes it, and the host finds there what it wrote.
fn kernels_reach_memory_of_the_host<R: Rig>(rig: &R) {
    let kernel = VectorMemory::prepare(rig.device()).expect("prepare");
    let (n, seed) = (1000, 62);
    let source = Random::new(seed).words(n * PIECE);
    let (from, mut out) = (rig.pin(&source), rig.pin(&vec![u32::MAX; 9 * n * PIECE]));
    {
        let (view, mut to) = (rig.view(&from), rig.view_mut(&mut out));
        assert!(view.is_in_host_memory() && to.is_in_host_memory(), "{}", rig.name());
        kernel.launch(rig.queue(), n, false, &view, &mut to).expect("launch");
    }
    let what = format!("host memory (seed {seed}), {}", rig.name());
    check_planes(&what, &rig.download(&out), &source);
    let third = rig.read(&out, 3 * n * PIECE, n * PIECE);
    let mut expected = source;
    expected.rotate_left(3 * PIECE);
    assert_same(&what, &third, &expected);
}

/// What was recorded from one stream runs on another, in that one's order.
#[test]
fn graphs_are_replayed_on_another_stream_of_the_gpu() {
    let Some(rig) = gpu_or_skip("graphs_are_replayed_on_another_stream_of_the_gpu") else { return };
    let gpu = rig.device();
    // SAFETY: the slices of this test are used on one stream after another, each of which waits for the one before.
    unsafe { gpu.context().disable_event_tracking() };
    let stream = || gpu.context().new_stream().expect("a stream");
    let (recorded, other) = (stream(), stream());
    let kernel = VectorMemory::prepare(gpu).expect("prepare");
    let (n, mut random) = (1000, Random::new(63));
    let mut source = recorded.clone_htod(&random.words(n * PIECE)).expect("copy");
    let mut out = recorded.clone_htod(&vec![u32::MAX; 9 * n * PIECE]).expect("copy");
    let graph = Graph::capture(gpu, &recorded, |stream| {
        let mut to = ViewMut::device(&mut out, stream);
        kernel.launch(stream, n, false, &View::device(&source, stream), &mut to)
    });
    let graph = graph.expect("a graph");
    recorded.synchronize().expect("the copies are done");
    let unwritten = recorded.clone_dtoh(&out).expect("copy");
    assert!(unwritten.iter().all(|word| *word == u32::MAX), "recording runs nothing");
    for round in 0..3 {
        let words = random.words(n * PIECE);
        other.memcpy_htod(&words, &mut source).expect("copy");
        // SAFETY: the buffers are alive, and used on this stream alone.
        unsafe { graph.replay(&other) }.expect("a replay");
        let found = other.clone_dtoh(&out).expect("copy");
        other.synchronize().expect("the replay ran without a fault");
        check_planes(&format!("replay {round} (seed 63)"), &found, &words);
    }
}

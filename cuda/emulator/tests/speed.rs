//! Times the basic operations. `cargo test -p longkv-emulator speed -- --ignored --nocapture` prints a table; the
//! ordinary run only makes sure that nothing has become slower by an order of magnitude.

use std::time::Instant;

use crate::common::{launch, load, numbers, read, write};
use cuda::launch::Arg;
use emulator::{Emulator, Order, Queue, emulator_or_skip};

/// Name, operation of `speed.cu`, and nanoseconds per thread that must not be exceeded.
const OPERATIONS: [(&str, u32, f64); 8] = [
    ("barrier", 0, 1000.0),
    ("shuffle", 1, 1000.0),
    ("__syncwarp", 2, 1000.0),
    ("shared read", 3, 1000.0),
    ("global write", 4, 1000.0),
    ("mma m16n8k16 bf16", 5, 5000.0),
    ("shared write", 6, 1000.0),
    ("empty loop", 7, 1000.0),
];

/// Best of five, in nanoseconds per thread and operation.
fn time(operation: u32, rounds: u32, order: Order) -> f64 {
    let kernel = load("speed", &[]);
    let queue = Queue::new(order).with_os_threads(1);
    let mut out = vec![0u32; 128];
    let mut best = f64::MAX;
    for _ in 0..5 {
        let args =
            [write("out", &mut out), Arg::value("rounds", &rounds), Arg::value("operation", &operation)];
        let start = Instant::now();
        launch(&kernel, &queue, 1, 512, &args).expect("a correct kernel");
        best = best.min(start.elapsed().as_secs_f64());
    }
    best * 1e9 / f64::from(rounds) / 128.0
}

/// Milliseconds for decode attention over 1024 tokens of one head, best of `runs`. The values are all equal, so the result is known.
fn decode(runs: u32) -> f64 {
    const TOKENS: usize = 1024;
    let (q, k) = (vec![0.5f32; 128], numbers(TOKENS * 64));
    let k: Vec<u16> = bytemuck::cast_slice::<u32, u16>(&k).iter().map(|x| 0x3c00 | (x & 0x807f)).collect();
    let v = vec![0x4040u16; TOKENS * 128]; // 3.0
    let mut best = f64::MAX;
    for _ in 0..runs {
        let mut out = vec![f32::NAN; 128];
        let args = [
            read("q", &q),
            read("k", &k),
            read("v", &v),
            write("out", &mut out),
            Arg::value("tokens", &(TOKENS as u32)),
        ];
        let start = Instant::now();
        launch(&load("decode_like", &[]), &Queue::default(), 1, 4 * (8 + 512), &args)
            .expect("a correct kernel");
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
        assert!(out.iter().all(|x| (x - 3.0).abs() < 1e-5), "{out:?}");
    }
    best
}

#[test]
fn operations_are_fast_enough() {
    emulator_or_skip!();
    // The sanitizers slow everything down by what they please.
    if Emulator::SANITIZED {
        return;
    }
    for (name, operation, limit) in OPERATIONS {
        let found = time(operation, 1000, Order::Forward);
        assert!(found < limit, "{name}: {found:.0} ns per thread, the limit is {limit}");
    }
    let milliseconds = decode(3);
    assert!(milliseconds < 500.0, "decode attention over 1024 tokens takes {milliseconds:.0} ms");
}

#[test]
#[ignore = "prints timings"]
fn table() {
    emulator_or_skip!();
    for order in [Order::Forward, Order::Random(1)] {
        for (name, operation, _) in OPERATIONS {
            println!("{order:?} {name}: {:.1} ns per thread", time(operation, 10_000, order));
        }
    }
    println!("decode attention over 1024 tokens: {:.1} ms", decode(20));
    let kernel = load("speed", &[]);
    for blocks in [1u32, 1000] {
        let mut out = vec![0u32; blocks as usize * 128];
        let queue = Queue::default().with_os_threads(1);
        let mut best = f64::MAX;
        for _ in 0..20 {
            let args = [write("out", &mut out), Arg::value("rounds", &1u32), Arg::value("operation", &7u32)];
            let start = Instant::now();
            launch(&kernel, &queue, blocks, 512, &args).expect("a correct kernel");
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("launch of {blocks} blocks of 128 threads: {:.1} us", best * 1e6);
    }
}

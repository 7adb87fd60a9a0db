//! Times the basic operations. `cargo test -p longkv-emulator speed -- --ignored --nocapture` prints a table; the
//! ordinary run only makes sure that nothing has become slower by an order of magnitude.

use std::time::Instant;

use crate::common::{launch, load, write};
use cuda::launch::Arg;
use emulator::{Order, Queue, emulator_or_skip};

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

#[test]
fn operations_are_fast_enough() {
    emulator_or_skip!();
    for (name, operation, limit) in OPERATIONS {
        let found = time(operation, 1000, Order::Forward);
        assert!(found < limit, "{name}: {found:.0} ns per thread, the limit is {limit}");
    }
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

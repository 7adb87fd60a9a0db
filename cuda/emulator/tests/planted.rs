//! Every planted mistake is found, with the right report, in every order; its correct twin passes.
#![allow(missing_docs)]

mod common;

use common::{launch, report_of};
use cuda::launch::Arg;
use cuda::memory::{View, ViewMut};
use emulator::{Order, Queue, emulator_or_skip};

#[test]
fn missing_barrier() {
    let emulator = emulator_or_skip!();
    let input: Vec<u32> = (0..128).collect();
    let mut out = vec![0u32; 128];
    for order in Order::ALL {
        for bug in 0..2 {
            let queue = Queue::new(order);
            let r = launch(&emulator, &queue, "missing_barrier", &[bug], (1, 512), &[Arg::read("in", &View::host(&input)), Arg::write("out", &mut ViewMut::host(&mut out))]);
            println!("{order:?} {bug} {r:?}");
            if bug == 1 { println!("{}", report_of(r)); } else { r.unwrap(); println!("{:?}", queue.statistics()); }
        }
    }
}

//! The kernels against the oracle and against one rank: on the emulator in every order of warps and lanes, and on a GPU.

mod pack;
mod ring;
mod ring_step;

use emulator::Order;
use emulator::rig::Rig;

/// Whether a case of a table runs on this rig. On a GPU all do. In the emulator each runs in two of the orders of warps and lanes, so that
/// every case runs, and every order runs cases; with `EXHAUSTIVE=1` each runs in all.
fn runs<R: Rig>(rig: &R, case: u64) -> bool {
    if std::env::var_os("EXHAUSTIVE").is_some_and(|value| value == "1") {
        return true;
    }
    let name = rig.name();
    let order = Order::ALL.iter().position(|order| name == format!("emulator, {order:?}"));
    let orders = [case as usize % 2, 2 + case as usize % (Order::ALL.len() - 2)];
    order.is_none_or(|order| orders.contains(&order))
}

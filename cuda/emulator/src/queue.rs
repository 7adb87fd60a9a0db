//! What launches run on: the order of threads and blocks, and counters.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// In which order the emulator picks warps, lanes and blocks when several can go on.
///
/// A kernel must give the same result in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Order {
    /// Ascending.
    #[default]
    Forward,
    /// Descending.
    Reverse,
    /// Drawn at every switch, from this seed.
    Random(u32),
}

impl Order {
    /// The orders that a test runs a kernel in.
    pub const ALL: [Order; 6] = [
        Order::Forward,
        Order::Reverse,
        Order::Random(1),
        Order::Random(2),
        Order::Random(3),
        Order::Random(4),
    ];

    /// The orders for tests of what does not hang on the order of threads, such as schedules, places and formats.
    /// All of them for `EXHAUSTIVE=1`.
    pub fn few() -> impl Iterator<Item = Order> {
        let exhaustive = std::env::var("EXHAUSTIVE").is_ok_and(|value| value == "1");
        Order::ALL.into_iter().take(if exhaustive { Order::ALL.len() } else { 3 })
    }
}

/// A queue that runs each launch at once.
///
/// With one OS thread a launch is deterministic down to its statistics. With more, blocks run in parallel; the checkers'
/// verdicts do not depend on how they interleave.
#[derive(Debug)]
pub struct Queue {
    order: Order,
    os_threads: usize,
    statistics: Mutex<Statistics>,
}

/// Every launch has run when it returns: there is nothing to wait for.
impl cuda::fork::Queue for Queue {
    fn follow(&self, _other: &Self) -> Result<(), cuda::Error> {
        Ok(())
    }

    fn handle(&self) -> cuda::memory::StreamHandle {
        None
    }
}

impl Queue {
    /// A queue with as many OS threads as the machine has cores.
    pub fn new(order: Order) -> Self {
        let os_threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { order, os_threads, statistics: Mutex::default() }
    }

    /// The same queue with this many OS threads, at least one. A launch uses no more than it has blocks.
    pub fn with_os_threads(self, os_threads: usize) -> Self {
        Self { os_threads: os_threads.max(1), ..self }
    }

    /// The order of warps, lanes and blocks.
    pub fn order(&self) -> Order {
        self.order
    }

    /// OS threads that blocks are dealt to.
    pub fn os_threads(&self) -> usize {
        self.os_threads
    }

    /// Counters of all launches since the queue was made or the counters were last [reset](Self::reset_statistics).
    pub fn statistics(&self) -> Statistics {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets all counters to zero.
    pub fn reset_statistics(&self) {
        *self.statistics.lock().unwrap_or_else(PoisonError::into_inner) = Statistics::default();
    }

    #[cfg(not(no_emulator))]
    pub(crate) fn add(&self, launch: &Statistics) {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner).add(launch);
    }
}

impl Default for Queue {
    fn default() -> Self {
        Queue::new(Order::Forward)
    }
}

/// Bytes that kernels moved from and to one buffer; every access counts, also repeated ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes read, those of asynchronous copies included.
    pub read: u64,
    /// Bytes written, those of atomics and bulk stores included.
    pub written: u64,
}

/// What kernels did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Launches.
    pub launches: u64,
    /// Switches between threads.
    pub switches: u64,
    /// Arrivals of threads at block barriers, named ones included.
    pub barriers: u64,
    /// Arrivals of lanes at warp operations: shuffles, votes, mma, ldmatrix, `__syncwarp`.
    pub collectives: u64,
    /// Tensor core products of whole warps: one per `mma.sync` or, for each of four warps, per `wgmma`.
    pub mma: u64,
    /// Asynchronous copies issued: one per thread and `cp.async`, bulk copy or tile.
    pub async_copies: u64,
    /// Looks of polling loops in vain.
    pub spins: u64,
    /// Bytes moved, by the argument name of the buffer or of the tensor map.
    /// With the feature `sanitize` only asynchronous copies and atomics are counted.
    pub traffic: BTreeMap<&'static str, Traffic>,
}

#[cfg(not(no_emulator))]
impl Statistics {
    fn add(&mut self, other: &Statistics) {
        self.launches += other.launches;
        self.switches += other.switches;
        self.barriers += other.barriers;
        self.collectives += other.collectives;
        self.mma += other.mma;
        self.async_copies += other.async_copies;
        self.spins += other.spins;
        for (name, traffic) in &other.traffic {
            let sum = self.traffic.entry(name).or_default();
            sum.read += traffic.read;
            sum.written += traffic.written;
        }
    }
}

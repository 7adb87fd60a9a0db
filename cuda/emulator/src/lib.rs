//! Runs the CUDA kernels of `longkv-cuda` on the CPU, thread by thread, and checks what they do.
//!
//! [`Emulator`] implements [`cuda::launch::Device`], so the typed kernels of `cuda::kernels` run here as on a GPU: the same
//! source, grid, shared memory and arguments. A launch that any checker finds at fault returns
//! [`cuda::Error::Emulated`] with a report that names the thread, the line and the memory.
//!
//! The README beside this crate says how it works, what a passing test proves and what it does not.
//!
//! ```
//! use cuda::launch::Device;
//! use emulator::{Emulator, Order, Queue};
//!
//! # fn main() -> Result<(), cuda::Error> {
//! let device = emulator::emulator_or_skip!(Ok(()));
//! let (instance, _) = cuda::table::shipped().find(|(_, row)| row.emulated).expect("some row is emulated");
//! let kernel = device.load(&instance)?;
//! for order in Order::ALL {
//!     let queue = Queue::new(order);
//!     // … a typed kernel launches `kernel` on `queue` …
//!     assert_eq!(queue.statistics().launches, 0);
//! }
//! # let _ = kernel;
//! # Ok(())
//! # }
//! ```

#[cfg(not(no_emulator))]
mod ffi;
#[cfg(not(no_emulator))]
mod kernel;
mod queue;
#[cfg(not(no_emulator))]
mod report;
pub mod rig;
mod side;
#[cfg(not(no_emulator))]
mod tensor_map;
#[cfg(no_emulator)]
mod unavailable;

#[cfg(not(no_emulator))]
pub use kernel::{EmulatedKernel, Emulator};
pub use queue::{Order, Queue, Statistics, Traffic};
pub use side::{CopyTime, SideCopies};
#[cfg(no_emulator)]
pub use unavailable::{EmulatedKernel, Emulator};

impl Emulator {
    /// Whether kernels were built for AddressSanitizer and UndefinedBehaviorSanitizer (feature `sanitize`) instead of
    /// the checkers: then races and unordered accesses go unseen.
    pub const SANITIZED: bool = cfg!(emulator_sanitize);

    /// The emulator, or after printing the reason nothing. For [`emulator_or_skip!`].
    ///
    /// # Panics
    /// Where the emulator is unavailable although `REQUIRE_EMULATOR=1` is set.
    #[doc(hidden)]
    pub fn or_skip() -> Option<Self> {
        match Self::available() {
            Ok(()) => Some(Self::new()),
            Err(reason) if std::env::var("REQUIRE_EMULATOR").is_ok_and(|value| value == "1") => {
                panic!("REQUIRE_EMULATOR=1, but the emulator is unavailable: {reason}")
            }
            Err(reason) => {
                eprintln!("SKIPPED: {reason}");
                None
            }
        }
    }
}

/// An [`Emulator`], or, where it could not be built, a return from the test with a printed reason. With
/// `REQUIRE_EMULATOR=1` that is a failure. `emulator_or_skip!(value)` returns `value`.
#[macro_export]
macro_rules! emulator_or_skip {
    ($($value:expr)?) => {
        match $crate::Emulator::or_skip() {
            Some(emulator) => emulator,
            None => return $($value)?,
        }
    };
}

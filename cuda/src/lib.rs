//! CUDA device code of the longkv kernels and the runtime that compiles, caches and launches it.
//!
//! Kernels are data: their sources lie in this crate, [`table`] lists every kernel with its constants, architectures and
//! budgets, and NVRTC compiles one for the device at hand when it is first asked for. Building needs no CUDA toolkit, and a
//! machine without a driver gets an error that says so, never a panic.
//!
//! ```no_run
//! use cuda::driver::Gpu;
//! use cuda::kernels::attention::{MergeStates, MergeStatesArgs};
//! use cuda::memory::{View, ViewMut};
//! use cuda::status::StatusWord;
//! # use longkv_cuda as cuda;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let gpu = Gpu::open(0)?; // or `Gpu::new(&context)` for a context you have
//! let merge = MergeStates::<_, f32>::prepare(&gpu, 128)?; // compiles or finds it cached; may block
//!
//! let (rows, max_splits) = (64, 8);
//! let stream = gpu.default_stream();
//! let partial_out = stream.clone_htod(&vec![0.5f32; rows * max_splits * 128]).map_err(cuda::driver::failed("copy"))?;
//! let partial_lse = stream.clone_htod(&vec![0.0f32; rows * max_splits]).map_err(cuda::driver::failed("copy"))?;
//! let mut out = stream.alloc_zeros::<f32>(rows * 128).map_err(cuda::driver::failed("alloc"))?;
//! let mut lse = stream.alloc_zeros::<f32>(rows).map_err(cuda::driver::failed("alloc"))?;
//! let mut status = StatusWord::new(&stream)?;
//! let args = MergeStatesArgs {
//!     rows,
//!     max_splits,
//!     partial_out: &View::device(&partial_out, &stream),
//!     partial_lse: &View::device(&partial_lse, &stream),
//!     num_splits: None,
//!     out: ViewMut::device(&mut out, &stream),
//!     lse: ViewMut::device(&mut lse, &stream),
//!     status: status.view_mut(&stream),
//!     programmatic: false,
//! };
//! merge.launch(&stream, args)?; // enqueues, nothing else
//! assert_eq!(status.read(&stream)?, None); // waits
//! # Ok(())
//! # }
//! ```
//!
//! # Map
//!
//! | what | where |
//! | --- | --- |
//! | the kernels and how to call them | [`kernels`], [`table`], [`params`], [`storage`], [`status`] |
//! | what the driver and the emulator share | [`launch`], [`memory`], [`tensor_map`], [`workspace`], [`side_queue`] |
//! | source to cubin | [`sources`], [`compile`], [`nvrtc`], [`cache`], [`prebuilt`], [`digest`] |
//! | a real GPU | [`probe`], `driver` (feature `driver`, on by default), `cudarc` re-exported |
//!
//! # Environment
//!
//! | variable | meaning |
//! | --- | --- |
//! | `LONGKV_NVRTC` | the NVRTC library or its folder; nothing else is searched then |
//! | `LONGKV_CACHE_DIR` | folder of compiled cubins (default `longkv` in the user's cache folder); empty: no cache |
//! | `LONGKV_CUBIN_DIR` | folder of prebuilt cubins, so that production needs no NVRTC |
//!
//! # Versions
//!
//! Public types are those of `cudarc` 0.19; a new minor version of it is a new major version of this crate. No linking
//! feature of `cudarc` is forced: its fallback is to load the driver at run time, and a crate such as candle may choose
//! otherwise. Needed are a driver for CUDA 12.0 or later, a device of sm_80 or later, and, unless cubins are shipped,
//! NVRTC of the driver's major version or an earlier one.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod cache;
pub mod compile;
pub mod digest;
#[cfg(feature = "driver")]
#[cfg_attr(docsrs, doc(cfg(feature = "driver")))]
pub mod driver;
mod error;
pub mod fork;
pub mod kernels;
pub mod launch;
pub mod memory;
pub mod nvrtc;
pub mod params;
pub mod prebuilt;
pub mod probe;
pub mod side_queue;
pub mod sources;
pub mod status;
pub mod storage;
pub mod table;
pub mod tensor_map;
pub mod workspace;

pub use error::Error;

#[cfg(feature = "driver")]
#[cfg_attr(docsrs, doc(cfg(feature = "driver")))]
pub use cudarc;

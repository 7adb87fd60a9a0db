//! GEMM whose weights live in host memory, in HBM or in both (C2CServe's HybridGEMM).
//!
//! `O = X·Wᵀ` reads W where it lies: pinned host memory, HBM, or split by output features between them. Two dataflows work on
//! disjoint columns of O in one launch. The output-stationary one keeps its sums in registers and fetches the weights once per
//! panel of tokens; the weight-stationary one fetches each weight once and keeps its sums in HBM. **Alpha**, the share of
//! blocks on the first, trades the host link against HBM. Two more paths fetch each weight once without partial sums: reads
//! that serve a cluster of blocks, and slabs that a copy engine brings to HBM.
//!
//! # Map
//!
//! | module or type | what it is |
//! |---|---|
//! | [`weights`] | where W lives: a mapped safetensors file, packed memory, the split between host and HBM |
//! | [`pack`] | the packed layout: contiguous tiles, swizzled before they cross the link |
//! | [`Format`], [`quantized`] | f16, bf16, int8 per output feature, int4 in groups with or without zero points, fp8 by rows or blocks |
//! | [`codes`], [`e4m3`] | matrices that a checkpoint has quantised already; the numbers of fp8 |
//! | [`schedule`] | which block does what in which order: the one function that kernel, CPU and simulation walk |
//! | [`path`] | the paths and their launches |
//! | [`cost_model`], [`device_profile`] | bytes per link, time, the closed-form alpha, break-even points; rates of devices |
//! | [`plan`] | shape and configuration → path, launches, workspace; [`GemmPlan::explain`] says why |
//! | [`tuner`] | the model's first candidates, timed |
//! | [`controller`] | alpha while the link is shared: the paper's rule, and one that other tenants do not mislead |
//! | [`simulate`] | blocks, rings, link and HBM in discrete time, over the same schedule |
//! | [`cpu`] | the product on the CPU, block by block as a kernel does it |
//! | [`grouped`] | products of experts (MoE): only the active ones are fetched |
//! | [`epilogue`] | scale, bias, SiLU, GELU, SwiGLU, residual |
//! | `gpu` | the kernels: plan, prepare, run (feature `cuda`) |
//! | [`traffic`] | the receipt of a call: bytes counted, beside those predicted |
//! | [`mod@reference`] | the oracle in f64 |
//!
//! # Example
//!
//! A layer of 512 inputs and 1024 outputs in bf16, three quarters of it in host memory:
//!
//! ```
//! use half::bf16;
//! use hybrid_gemm::cpu::{Gemm, GemmArgs};
//! use hybrid_gemm::{
//!     DType, DeviceProfile, Format, GemmConfig, GemmPlan, MatrixView, MatrixViewMut, Residency, RowMajor, Weights,
//! };
//! # fn main() -> Result<(), hybrid_gemm::Error> {
//! let (n, k, tokens) = (1024, 512, 4);
//! let values = vec![bf16::from_f32(0.25); n * k];
//! let matrix = RowMajor::from_slice(&values, [n, k])?;
//! let weights = Weights::pack(matrix, Format::Float(DType::BF16), Residency::HbmFraction(0.25))?;
//!
//! let config = GemmConfig::new(tokens, DType::BF16, DeviceProfile::h200());
//! let plan = GemmPlan::new(*weights.placement(), config)?;
//! let gemm = Gemm::prepare(&plan, weights)?;
//! let x = vec![bf16::ONE; tokens * k];
//! let mut out = vec![bf16::ZERO; tokens * n];
//! let args = GemmArgs {
//!     x: MatrixView::new(&x, tokens, k)?,
//!     bias: None,
//!     residual: None,
//!     out: MatrixViewMut::new(&mut out, tokens, n)?,
//! };
//! let mut workspace = vec![0.0; plan.workspace_len(tokens)];
//! let receipt = gemm.run(args, &mut workspace)?;
//! assert!(out.iter().all(|o| *o == bf16::from_f32(128.0)));
//! assert_eq!(receipt.counted.link_bytes, 768 * 512 * 2); // each byte in host memory once
//! assert_eq!(receipt.counted, receipt.predicted.traffic);
//! # Ok(())
//! # }
//! ```
//!
//! # State
//!
//! The kernels are in module `gpu` (feature `cuda`). Clusters that share a fetch have no kernel yet.
//!
//! Source: the C2CServe paper, HybridGEMM.

pub mod codes;
pub mod controller;
pub mod cost_model;
pub mod cpu;
pub mod device_profile;
pub mod e4m3;
mod element;
pub mod epilogue;
mod error;
mod format;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod grouped;
mod matrix;
pub mod pack;
pub mod path;
pub mod plan;
pub mod quantized;
pub mod reference;
pub mod schedule;
pub mod simulate;
pub mod traffic;
pub mod tuner;
pub mod weights;

pub use codes::{Codes, OwnedCodes};
pub use cost_model::{Bound, CostModel, Operands, Prediction};
pub use device_profile::{DeviceProfile, MigSlice};
pub use element::{DType, Element};
pub use epilogue::{Activation, EpilogueSpec};
pub use error::Error;
pub use format::{FP8_BLOCK, Format};
pub use matrix::{MatrixView, MatrixViewMut};
pub use pack::{RowMajor, Tiling};
pub use path::{Launch, Path};
pub use plan::{Alpha, GemmConfig, GemmPlan, PathChoice, Summation};
pub use traffic::{Receipt, Traffic};
pub use weights::{MappedFile, Placement, Residency, Weights};

//! Decode attention over pages, as a candle op.

use std::ops::Range;
use std::sync::Mutex;

use attention::reference::{self, Probabilities};
use attention::{
    AttentionSpec, BlockTable, Element, HeadsView, PageStore, PagedKv, PagedLengths, RaggedView,
};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Storage, Tensor, WithDType,
};
use half::{bf16, f16};

use crate::error::{Fault, argument, check_device, check_dtype, lock, ours, unsupported_device};
use crate::layout::{Pages, packed, packed_vectors};

const OP: &str = "paged decode";

/// Sizes of every decoding step of a [`PagedDecode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Sequences; an empty one has length 0 and gives output 0.
    pub batch: usize,
    /// Queries per sequence, aligned to the end of its keys; 1 to 8 on CUDA.
    pub q_len: usize,
    /// Pages that a row of the block table has room for. The longest sequence is `max_pages · page_size` tokens.
    pub max_pages: usize,
}

/// What every call of a [`PagedDecode`] must match.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) spec: AttentionSpec,
    pub(crate) step: StepShape,
    pub(crate) k: Pages,
    pub(crate) v: Pages,
    dtype: DType,
    device: Device,
}

impl Config {
    /// `[batch, q_len, q_heads, qk_dim]`.
    pub(crate) fn q_shape(&self) -> [usize; 4] {
        let shape = self.spec.shape;
        [self.step.batch, self.step.q_len, shape.q_heads(), shape.qk_dim()]
    }

    /// `[batch, q_len, q_heads, v_dim]`.
    pub(crate) fn out_shape(&self) -> [usize; 4] {
        let [batch, q_len, q_heads, _] = self.q_shape();
        [batch, q_len, q_heads, self.spec.shape.v_dim()]
    }
}

/// Decode attention over paged keys and values, prepared for one device, dtype and cache layout.
///
/// Prepare it once, [plan](Self::step) each step once, and [attend](DecodeStep::attend) in each layer. It owns the kernels'
/// workspaces, so that one step runs at a time; like candle's own CUDA tensors it belongs to the thread that uses them.
#[derive(Debug)]
pub struct PagedDecode {
    config: Config,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    /// The first fault since the last check.
    Cpu(Mutex<Option<Fault>>),
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::gpu::Decoder>),
}

impl PagedDecode {
    /// Prepares attention over caches that lie as `k` `[pages, page_size, kv_heads, qk_dim]` and `v`
    /// `[pages, page_size, kv_heads, v_dim]` do: on their device, in their dtype, at their strides. On CUDA this compiles
    /// and loads the kernels and may block.
    ///
    /// # Errors
    /// A shape, stride or dtype that `spec` or the kernels do not support, or kernels that cannot be loaded.
    pub fn prepare(spec: AttentionSpec, step: StepShape, k: &Tensor, v: &Tensor) -> Result<Self> {
        let (device, dtype) = (k.device().clone(), k.dtype());
        check_device(OP, &device, v.device())?;
        check_dtype("paged decode: argument `v`", dtype, v.dtype())?;
        let (pages, other) = (Pages::of(OP, "k", k.layout())?.0, Pages::of(OP, "v", v.layout())?.0);
        if (pages.pages, pages.page_size, pages.heads) != (other.pages, other.page_size, other.heads) {
            let expected = format!("pages as those of `k`, {:?}", k.dims());
            return Err(argument(OP, "v", expected, format!("{:?}", v.dims())));
        }
        let (shape, found) = (spec.shape, (pages.heads, pages.dim, other.dim));
        if found != (shape.kv_heads(), shape.qk_dim(), shape.v_dim()) {
            let expected = format!("pages of the heads of `spec`, {shape}");
            let found = format!("{} KV heads of {} and {} channels", found.0, found.1, found.2);
            return Err(argument(OP, "k", expected, found));
        }
        for (name, value) in [("batch", step.batch), ("q_len", step.q_len), ("max_pages", step.max_pages)] {
            if value == 0 {
                return Err(argument(OP, name, "at least 1", 0));
            }
        }
        let config = Config { spec, step, k: pages, v: other, dtype, device };
        let backend = match &config.device {
            Device::Cpu if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) => {
                Backend::Cpu(Mutex::default())
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(device) if matches!(dtype, DType::F16 | DType::BF16) => {
                Backend::Cuda(Box::new(crate::gpu::Decoder::prepare(&config, dtype, device)?))
            }
            Device::Cpu => return Err(Error::UnsupportedDTypeForOp(dtype, OP).bt()),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => return Err(Error::UnsupportedDTypeForOp(dtype, OP).bt()),
            other => return Err(unsupported_device(OP, other)),
        };
        Ok(PagedDecode { config, backend })
    }

    /// Plans one step, for all its layers: `kv_len` `[batch]` u32, tokens of each sequence with the step's own, and
    /// `block_table` `[batch, max_pages]` u32, its pages in order; entries past its length are not read.
    ///
    /// Neither tensor may be written before the step's last layer is enqueued. On CUDA the plan is computed on the device.
    ///
    /// # Errors
    /// A tensor of another shape, dtype or device, or that is not contiguous.
    pub fn step(&mut self, kv_len: &Tensor, block_table: &Tensor) -> Result<DecodeStep<'_>> {
        let config = &self.config;
        let messages = ["paged decode: argument `kv_len`", "paged decode: argument `block_table`"];
        for (message, tensor) in messages.into_iter().zip([kv_len, block_table]) {
            check_device(OP, &config.device, tensor.device())?;
            check_dtype(message, DType::U32, tensor.dtype())?;
        }
        packed(OP, "kv_len", kv_len.layout(), &[config.step.batch])?;
        packed(OP, "block_table", block_table.layout(), &[config.step.batch, config.step.max_pages])?;
        let backend = match &mut self.backend {
            Backend::Cpu(fault) => StepBackend::Cpu { fault, kv_len: kv_len.clone() },
            #[cfg(feature = "cuda")]
            Backend::Cuda(decoder) => StepBackend::Cuda(Box::new(decoder.step(kv_len, block_table)?)),
        };
        Ok(DecodeStep { config, block_table: block_table.clone(), backend })
    }

    /// The first sequence that a step since the last check could not read, as an error. Waits for the device.
    ///
    /// # Errors
    /// Names the sequence and what is wrong with it.
    pub fn check(&self) -> Result<()> {
        let fault = match &self.backend {
            Backend::Cpu(fault) => lock(fault).take(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(decoder) => decoder.take_fault()?,
        };
        fault.map_or(Ok(()), |fault| Err(fault.error(OP, "sequence")))
    }
}

/// A planned step: what its layers share.
#[derive(Debug)]
pub struct DecodeStep<'a> {
    config: &'a Config,
    block_table: Tensor,
    backend: StepBackend<'a>,
}

#[derive(Debug)]
enum StepBackend<'a> {
    Cpu {
        fault: &'a Mutex<Option<Fault>>,
        kv_len: Tensor,
    },
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::gpu::Step<'a>>),
}

/// What [`DecodeStep::attend`] gives.
#[derive(Debug, Clone)]
pub struct Attended {
    /// Outputs `[batch, q_len, q_heads, v_dim]`, in the dtype of the queries.
    pub out: Tensor,
    /// Log-sum-exps `[batch, q_len, q_heads]`, f32, natural log, scale applied; -inf where no key was seen.
    pub lse: Tensor,
}

impl DecodeStep<'_> {
    /// Attention of one layer: queries `q` `[batch, q_len, q_heads, qk_dim]`, contiguous, over the layer's pages `k` and
    /// `v`, which lie as those that the op was prepared with. On CUDA it enqueues on the device's stream and returns.
    ///
    /// # Errors
    /// A tensor of another shape, layout, dtype or device.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        let config = self.config;
        let messages =
            ["paged decode: argument `q`", "paged decode: argument `k`", "paged decode: argument `v`"];
        for (message, tensor) in messages.into_iter().zip([q, k, v]) {
            check_device(OP, &config.device, tensor.device())?;
            check_dtype(message, config.dtype, tensor.dtype())?;
        }
        let op = Op { step: self, lse: Mutex::default() };
        let out = q.apply_op3_no_bwd(k, v, &op)?;
        let lse = lock(&op.lse).take().expect("the op leaves its log-sum-exps");
        let lse = Tensor::from_storage(lse, &config.out_shape()[..3], BackpropOp::none(), false);
        Ok(Attended { out, lse })
    }
}

/// The op of one layer. A candle op has one result, so the log-sum-exps are left in it.
struct Op<'a, 's> {
    step: &'a DecodeStep<'s>,
    lse: Mutex<Option<Storage>>,
}

/// Where the op's arguments lie in their storages.
pub(crate) struct Ranges {
    pub(crate) q: Range<usize>,
    pub(crate) k: Range<usize>,
    pub(crate) v: Range<usize>,
}

impl Op<'_, '_> {
    fn ranges(&self, q: &Layout, k: &Layout, v: &Layout) -> Result<Ranges> {
        let config = self.step.config;
        let q = packed_vectors(OP, "q", q, &config.q_shape())?;
        let pages = |name, layout, prepared: Pages| {
            let (found, range) = Pages::of(OP, name, layout)?;
            if found != prepared {
                return Err(argument(
                    OP,
                    name,
                    format!("pages as prepared, {prepared:?}"),
                    format!("{found:?}"),
                ));
            }
            Ok(range)
        };
        Ok(Ranges { q, k: pages("k", k, config.k)?, v: pages("v", v, config.v)? })
    }

    fn on_cpu<E: Element + WithDType>(
        &self,
        (fault, kv_len): (&Mutex<Option<Fault>>, &Tensor),
        ranges: Ranges,
        [q, k, v]: [&CpuStorage; 3],
    ) -> Result<(CpuStorage, Shape)> {
        let (config, ours) = (self.step.config, ours(OP));
        let StepShape { batch, q_len, max_pages } = config.step;
        let (kv_len, table) = (u32s(kv_len)?, u32s(&self.step.block_table)?);
        let kv = PagedKv::new(
            store(k.as_slice::<E>()?, ranges.k, config.k)?,
            store(v.as_slice::<E>()?, ranges.v, config.v)?,
            BlockTable::shared(&table, batch, max_pages).map_err(&ours)?,
            PagedLengths::Tokens(&kv_len),
        )
        .map_err(&ours)?;
        let [_, _, q_heads, qk_dim] = config.q_shape();
        let q =
            HeadsView::nhd(&q.as_slice::<E>()?[ranges.q], batch * q_len, q_heads, qk_dim).map_err(&ours)?;
        let cu_queries: Vec<u32> = (0..=batch).map(|sequence| (sequence * q_len) as u32).collect();
        let q = RaggedView::new(q, &cu_queries).map_err(&ours)?;
        // Rounded, as the kernels do it.
        let output =
            reference::prefill_parallel(&config.spec, &q, &kv, Probabilities::Rounded).map_err(&ours)?;
        if let Some(found) = output.faults.first() {
            lock(fault).get_or_insert(Fault { code: found.code as u32, index: found.index });
        }
        *lock(&self.lse) = Some(Storage::Cpu(CpuStorage::F32(output.lse_f32())));
        Ok((E::to_cpu_storage_owned(output.out_as::<E>()), Shape::from(&config.out_shape())))
    }
}

/// Pages as the reference reads them.
fn store<E>(data: &[E], range: Range<usize>, pages: Pages) -> Result<PageStore<'_, E>> {
    let Pages { pages, page_size, heads, dim, strides } = pages;
    PageStore::new(&data[range], pages, page_size, heads, dim, strides).map_err(ours(OP))
}

/// The elements of a contiguous CPU tensor of u32.
fn u32s(tensor: &Tensor) -> Result<Vec<u32>> {
    tensor.flatten_all()?.to_vec1()
}

impl CustomOp3 for Op<'_, '_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (ranges, storages) = (self.ranges(q_layout, k_layout, v_layout)?, [q, k, v]);
        match (&self.step.backend, self.step.config.dtype) {
            (StepBackend::Cpu { fault, kv_len }, DType::F32) => {
                self.on_cpu::<f32>((fault, kv_len), ranges, storages)
            }
            (StepBackend::Cpu { fault, kv_len }, DType::F16) => {
                self.on_cpu::<f16>((fault, kv_len), ranges, storages)
            }
            (StepBackend::Cpu { fault, kv_len }, DType::BF16) => {
                self.on_cpu::<bf16>((fault, kv_len), ranges, storages)
            }
            (_, dtype) => Err(Error::UnsupportedDTypeForOp(dtype, OP).bt()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &candle_core::CudaStorage,
        q_layout: &Layout,
        k: &candle_core::CudaStorage,
        k_layout: &Layout,
        v: &candle_core::CudaStorage,
        v_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let StepBackend::Cuda(step) = &self.step.backend else {
            return Err(argument(OP, "q", "CPU tensors, as planned", "CUDA tensors"));
        };
        let (config, ranges) = (self.step.config, self.ranges(q_layout, k_layout, v_layout)?);
        let (out, lse) = step.attend(config, ranges, [q, k, v], &self.step.block_table)?;
        *lock(&self.lse) = Some(Storage::Cuda(lse));
        Ok((out, Shape::from(&config.out_shape())))
    }
}

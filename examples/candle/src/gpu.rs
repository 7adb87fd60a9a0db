//! The CUDA side: the crates' kernels on candle's stream, over candle's memory.
//!
//! A candle `CudaStorage` holds cudarc's `CudaSlice`, and so do our views: the types are the same, because both sides use
//! cudarc 0.19. Whatever a call allocates (results, the workspaces once) comes from the same stream.

use std::sync::{Arc, Mutex};

use attention::HeadShape;
use attention::gpu::{
    Append, AppendArgs, AppendConfig, AppendPlan, CacheLayout, Decode, DecodeArgs, DecodeConfig, DecodePlan,
    DecodeStep, DecodeStepArgs, PlannedStep, Splits,
};
use candle_core::backend::BackendStorage;
use candle_core::cuda::CudaDType;
use candle_core::{CudaDevice, CudaStorage, DType, Error, Layout, Result, Storage, Tensor};
use cuda::cudarc::driver::{CudaStream, CudaView, DeviceRepr};
use cuda::driver::{Gpu, GpuFunction};
use cuda::memory::{View, ViewMut};
use cuda::status::StatusWord;
use cuda::storage::Storage as Element;
use cuda::workspace::Workspace;
use half::{bf16, f16};

use crate::append::Places;
use crate::decode::{Config, Ranges};
use crate::error::{Fault, lock, ours};
use crate::layout::Pages;

/// An error of the device crate as a candle error.
fn failed(error: cuda::Error) -> Error {
    Error::Cuda(Box::new(error)).bt()
}

fn take_fault(status: &Mutex<StatusWord>, stream: &Arc<CudaStream>) -> Result<Option<Fault>> {
    let mut status = lock(status);
    let fault = status.read(stream).map_err(failed)?;
    if fault.is_some() {
        status.clear(stream).map_err(failed)?;
    }
    Ok(fault.map(|fault| Fault { code: fault.code, index: fault.index.into() }))
}

fn paged(k: Pages, v: Pages, max_pages: usize) -> CacheLayout {
    CacheLayout::Paged {
        page_size: k.page_size,
        pages: k.pages,
        max_pages,
        per_head: false,
        k: k.strides,
        v: v.strides,
    }
}

/// The elements of a contiguous CUDA tensor, as a function of them: they stay locked for reading while it runs.
fn with_elements<T: CudaDType, R>(
    tensor: &Tensor,
    run: impl FnOnce(CudaView<'_, T>) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Msg("a CUDA tensor was expected".to_string()).bt());
    };
    run(storage.as_cuda_slice::<T>()?.slice(range(layout)?))
}

fn range(layout: &Layout) -> Result<std::ops::Range<usize>> {
    let (start, end) =
        layout.contiguous_offsets().ok_or_else(|| Error::RequiresContiguous { op: "longkv" }.bt())?;
    Ok(start..end)
}

/// Kernels and workspaces of a [`PagedDecode`](crate::PagedDecode).
#[derive(Debug)]
pub(crate) struct Decoder {
    engine: Engine,
    planner: DecodeStep<GpuFunction>,
    step_workspace: Workspace,
}

/// What all layers of a step share.
#[derive(Debug)]
struct Engine {
    stream: Arc<CudaStream>,
    kernel: Kernel,
    workspace: Mutex<Workspace>,
    status: Mutex<StatusWord>,
}

#[derive(Debug)]
enum Kernel {
    F16(Decode<GpuFunction, f16>),
    BF16(Decode<GpuFunction, bf16>),
}

impl Decoder {
    /// Plans, compiles, loads and allocates workspaces.
    pub(crate) fn prepare(config: &Config, dtype: DType, device: &CudaDevice) -> Result<Self> {
        let (stream, ours) = (device.cuda_stream(), ours("paged decode"));
        let gpu = Gpu::new(stream.context()).map_err(failed)?;
        let plan = DecodePlan::new(DecodeConfig {
            shape: config.spec.shape,
            score: config.spec.score,
            mask: config.spec.mask,
            batch: config.step.batch,
            q_len: config.step.q_len,
            max_kv_len: config.step.max_pages.saturating_mul(config.k.page_size),
            cache: paged(config.k, config.v, config.step.max_pages),
            splits: Splits::Balanced,
            sm_count: gpu.sm_count(),
        })
        .map_err(&ours)?;
        let kernel = match dtype {
            DType::F16 => Kernel::F16(Decode::prepare(&gpu, &plan).map_err(&ours)?),
            DType::BF16 => Kernel::BF16(Decode::prepare(&gpu, &plan).map_err(&ours)?),
            other => return Err(Error::UnsupportedDTypeForOp(other, "paged decode").bt()),
        };
        let workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).map_err(failed)?;
        let status = StatusWord::new(&stream).map_err(failed)?;
        Ok(Decoder {
            planner: DecodeStep::prepare(&gpu, &plan).map_err(&ours)?,
            step_workspace: Workspace::zeroed(&stream, plan.step_workspace().bytes()).map_err(failed)?,
            engine: Engine { stream, kernel, workspace: workspace.into(), status: status.into() },
        })
    }

    /// Enqueues the plan of a step.
    pub(crate) fn step(&mut self, kv_len: &Tensor, block_table: &Tensor) -> Result<Step<'_>> {
        let Decoder { engine, planner, step_workspace } = self;
        let stream = &*engine.stream;
        let planned = with_elements::<u32, _>(kv_len, |kv_len| {
            with_elements::<u32, _>(block_table, |block_table| {
                let mut status = lock(&engine.status);
                let args = DecodeStepArgs {
                    kv_len: &View::device(&kv_len, stream),
                    block_table: Some(&View::device(&block_table, stream)),
                    kv_start: None,
                    status: status.view_mut(stream),
                };
                planner.run(stream, args, step_workspace.view_mut(stream)).map_err(ours("paged decode"))
            })
        })?;
        Ok(Step { engine, planned })
    }

    /// Waits for the stream; the first fault since the last call.
    pub(crate) fn take_fault(&self) -> Result<Option<Fault>> {
        take_fault(&self.engine.status, &self.engine.stream)
    }
}

/// A step that the device has been told to plan.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    engine: &'a Engine,
    planned: PlannedStep<'a>,
}

impl Step<'_> {
    /// Enqueues one layer; outputs and log-sum-exps.
    pub(crate) fn attend(
        &self,
        config: &Config,
        ranges: Ranges,
        qkv: [&CudaStorage; 3],
        block_table: &Tensor,
    ) -> Result<(CudaStorage, CudaStorage)> {
        match &self.engine.kernel {
            Kernel::F16(kernel) => self.run(kernel, config, ranges, qkv, block_table),
            Kernel::BF16(kernel) => self.run(kernel, config, ranges, qkv, block_table),
        }
    }

    fn run<E: Element + CudaDType + DeviceRepr>(
        &self,
        kernel: &Decode<GpuFunction, E>,
        config: &Config,
        ranges: Ranges,
        [q, k, v]: [&CudaStorage; 3],
        block_table: &Tensor,
    ) -> Result<(CudaStorage, CudaStorage)> {
        let (device, stream) = (q.device().clone(), &*self.engine.stream);
        let [batch, q_len, q_heads, v_dim] = config.out_shape();
        let rows = batch * q_len * q_heads;
        // SAFETY: the kernel writes every row of `out`, that of a skipped sequence too, before anything that is enqueued
        // later on the stream reads it; if it is not launched, the memory is freed unread.
        let mut out = unsafe { device.alloc::<E>(rows * v_dim)? };
        // SAFETY: as above, for `lse`.
        let mut lse = unsafe { device.alloc::<f32>(rows)? };
        let (q, k, v) = (
            q.as_cuda_slice::<E>()?.slice(ranges.q),
            k.as_cuda_slice::<E>()?.slice(ranges.k),
            v.as_cuda_slice::<E>()?.slice(ranges.v),
        );
        with_elements::<u32, _>(block_table, |block_table| {
            let args = DecodeArgs {
                q: &View::device(&q, stream),
                k: &View::device(&k, stream),
                v: &View::device(&v, stream),
                block_table: Some(&View::device(&block_table, stream)),
                kv_start: None,
                out: ViewMut::device(&mut out, stream),
                lse: ViewMut::device(&mut lse, stream),
            };
            let mut workspace = lock(&self.engine.workspace);
            kernel.run(stream, args, &self.planned, workspace.view_mut(stream)).map_err(ours("paged decode"))
        })?;
        let wrapped = CudaStorage::wrap_cuda_slice(out, device.clone());
        Ok((wrapped, CudaStorage::wrap_cuda_slice(lse, device)))
    }
}

/// Kernel and status word of a [`PagedAppend`](crate::PagedAppend).
#[derive(Debug)]
pub(crate) struct Appender {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    pages: Pages,
    status: Mutex<StatusWord>,
}

impl Appender {
    /// Compiles and loads.
    pub(crate) fn prepare(pages: Pages, dtype: DType, device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let gpu = Gpu::new(stream.context()).map_err(failed)?;
        let status = StatusWord::new(&stream).map_err(failed)?;
        let appender = Appender { gpu, stream, pages, status: status.into() };
        let width = pages.heads * pages.dim;
        // The functions stay loaded as long as `gpu` lives, so that later calls only look them up.
        match dtype {
            DType::F16 => appender.kernel::<f16>(1, [width; 2]).map(|_| appender),
            DType::BF16 => appender.kernel::<bf16>(1, [width; 2]).map(|_| appender),
            other => Err(Error::UnsupportedDTypeForOp(other, "paged append").bt()),
        }
    }

    /// The kernel for `tokens` tokens whose keys and values lie `strides` apart.
    fn kernel<E: Element>(&self, tokens: usize, [k, v]: [usize; 2]) -> Result<Append<GpuFunction, E>> {
        let (pages, ours) = (self.pages, ours("paged append"));
        let plan = HeadShape::new(pages.heads, pages.heads, pages.dim, pages.dim).and_then(|shape| {
            AppendPlan::new(AppendConfig {
                shape,
                tokens,
                rotary: None,
                with_queries: false,
                // Queries are not given; their stride only has to be a valid one.
                strides: [pages.heads * pages.dim, k, v],
                cache: paged(pages, pages, 0),
            })
        });
        plan.and_then(|plan| Append::prepare(&self.gpu, &plan)).map_err(ours)
    }

    /// Enqueues an append.
    pub(crate) fn append(
        &self,
        places: Places,
        kv: &mut CudaStorage,
        k_new: &CudaStorage,
        v_new: &CudaStorage,
        slots: &Tensor,
    ) -> Result<()> {
        match kv.dtype() {
            DType::F16 => self.run::<f16>(places, kv, k_new, v_new, slots),
            DType::BF16 => self.run::<bf16>(places, kv, k_new, v_new, slots),
            other => Err(Error::UnsupportedDTypeForOp(other, "paged append").bt()),
        }
    }

    fn run<E: Element + CudaDType + DeviceRepr>(
        &self,
        places: Places,
        kv: &mut CudaStorage,
        k_new: &CudaStorage,
        v_new: &CudaStorage,
        slots: &Tensor,
    ) -> Result<()> {
        let tokens = slots.elem_count();
        if tokens == 0 {
            return Ok(());
        }
        let kernel = self.kernel::<E>(tokens, [places.k_new.stride, places.v_new.stride])?;
        let stream = &*self.stream;
        let [keys, values] = places.cache;
        // Keys end before values begin, so that the two halves are borrowed apart.
        let (mut front, mut back) = kv.as_cuda_slice_mut::<E>()?.split_at_mut(values.start);
        let (mut keys, mut values) = (front.slice_mut(keys), back.slice_mut(..values.len()));
        let (k_new, v_new) = (
            k_new.as_cuda_slice::<E>()?.slice(places.k_new.range),
            v_new.as_cuda_slice::<E>()?.slice(places.v_new.range),
        );
        with_elements::<i64, _>(slots, |slots| {
            let mut status = lock(&self.status);
            let args = AppendArgs {
                q_new: None,
                k_new: &View::device(&k_new, stream),
                v_new: &View::device(&v_new, stream),
                tables: None,
                slot: &View::device(&slots, stream),
                k: ViewMut::device(&mut keys, stream),
                v: ViewMut::device(&mut values, stream),
                status: status.view_mut(stream),
            };
            kernel.run(stream, args).map_err(ours("paged append"))
        })
    }

    /// Waits for the stream; the first fault since the last call.
    pub(crate) fn take_fault(&self) -> Result<Option<Fault>> {
        take_fault(&self.status, &self.stream)
    }
}

//! Appending to pages, as a candle op that writes in place.

use std::ops::Range;
use std::sync::Mutex;

use attention::Element;
use candle_core::{CpuStorage, DType, Device, Error, InplaceOp3, Layout, Result, Tensor, WithDType};
use half::{bf16, f16};

use crate::error::{Fault, argument, check_device, check_dtype, lock, unsupported_device};
use crate::layout::{Pages, Rows, halves, packed, rows};

const OP: &str = "paged append";

/// Writes new keys and values to their slots of a cache, prepared for one device and dtype.
///
/// Keys are stored as they come: rotate them before.
#[derive(Debug)]
pub struct PagedAppend {
    device: Device,
    dtype: DType,
    pages: Pages,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    /// The first fault since the last check.
    Cpu(Mutex<Option<Fault>>),
    #[cfg(feature = "cuda")]
    Cuda(crate::gpu::Appender),
}

impl PagedAppend {
    /// Prepares appends to caches that lie as `kv` `[2, pages, page_size, kv_heads, head_dim]` does: keys at 0, values at 1,
    /// pages at any strides, all keys before all values. On CUDA this compiles and loads the kernel and may block.
    ///
    /// # Errors
    /// A shape, stride or dtype that is not supported, or a kernel that cannot be loaded.
    pub fn prepare(kv: &Tensor) -> Result<Self> {
        let (pages, _) = halves(OP, "kv", kv.layout())?;
        let (device, dtype) = (kv.device().clone(), kv.dtype());
        let backend = match &device {
            Device::Cpu if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) => {
                Backend::Cpu(Mutex::default())
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(device) if matches!(dtype, DType::F16 | DType::BF16) => {
                Backend::Cuda(crate::gpu::Appender::prepare(pages, dtype, device)?)
            }
            Device::Cpu => return Err(Error::UnsupportedDTypeForOp(dtype, OP).bt()),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => return Err(Error::UnsupportedDTypeForOp(dtype, OP).bt()),
            other => return Err(unsupported_device(OP, other)),
        };
        Ok(PagedAppend { device, dtype, pages, backend })
    }

    /// Writes `k_new` and `v_new` `[tokens, kv_heads, head_dim]`, whose tokens may lie at any stride, to `slots` `[tokens]`
    /// i64: page times page size plus the place in the page. A negative slot skips its token. On CUDA it enqueues on the
    /// device's stream and returns.
    ///
    /// No two tokens may have the same slot.
    ///
    /// # Errors
    /// A tensor of another shape, layout, dtype or device; new keys or values that share the cache's storage.
    pub fn append(&self, kv: &Tensor, k_new: &Tensor, v_new: &Tensor, slots: &Tensor) -> Result<()> {
        for tensor in [kv, k_new, v_new, slots] {
            check_device(OP, &self.device, tensor.device())?;
        }
        let messages = [
            "paged append: argument `kv`",
            "paged append: argument `k_new`",
            "paged append: argument `v_new`",
        ];
        for (message, tensor) in messages.into_iter().zip([kv, k_new, v_new]) {
            check_dtype(message, self.dtype, tensor.dtype())?;
        }
        check_dtype("paged append: argument `slots`", DType::I64, slots.dtype())?;
        let tokens = k_new.dims().first().copied().unwrap_or(0);
        packed(OP, "slots", slots.layout(), &[tokens])?;
        kv.inplace_op3(k_new, v_new, &Op { append: self, slots, tokens })
    }

    /// The first token since the last check whose slot lies outside the cache, as an error. Waits for the device.
    ///
    /// # Errors
    /// Names the token.
    pub fn check(&self) -> Result<()> {
        let fault = match &self.backend {
            Backend::Cpu(fault) => lock(fault).take(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(appender) => appender.take_fault()?,
        };
        fault.map_or(Ok(()), |fault| Err(fault.error(OP, "token")))
    }
}

struct Op<'a> {
    append: &'a PagedAppend,
    slots: &'a Tensor,
    tokens: usize,
}

/// Where the op's arguments lie in their storages.
pub(crate) struct Places {
    /// Keys and values of the cache, one after the other.
    pub(crate) cache: [Range<usize>; 2],
    pub(crate) k_new: Rows,
    pub(crate) v_new: Rows,
}

impl Op<'_> {
    fn places(&self, kv: &Layout, k_new: &Layout, v_new: &Layout) -> Result<Places> {
        let prepared = self.append.pages;
        let (found, cache) = halves(OP, "kv", kv)?;
        if found != prepared {
            return Err(argument(OP, "kv", format!("pages as prepared, {prepared:?}"), format!("{found:?}")));
        }
        let shape = [self.tokens, prepared.heads, prepared.dim];
        let (k_new, v_new) = (rows(OP, "k_new", k_new, shape)?, rows(OP, "v_new", v_new, shape)?);
        Ok(Places { cache, k_new, v_new })
    }

    fn on_cpu<E: Element + WithDType>(
        &self,
        fault: &Mutex<Option<Fault>>,
        places: Places,
        kv: &mut [E],
        k_new: &CpuStorage,
        v_new: &CpuStorage,
    ) -> Result<()> {
        let Pages { page_size, heads, dim, strides, .. } = self.append.pages;
        let slots: Vec<i64> = self.slots.to_vec1()?;
        let halves = places.cache.into_iter().zip([(places.k_new, k_new), (places.v_new, v_new)]);
        for (cache, (rows, new)) in halves {
            let (cache, new) = (&mut kv[cache], &new.as_slice::<E>()?[rows.range]);
            for (token, &slot) in slots.iter().enumerate() {
                // Negative slots skip their token.
                let Ok(slot) = usize::try_from(slot) else { continue };
                if slot >= self.append.pages.slots() {
                    let code = attention::FaultCode::BadIndex as u32;
                    lock(fault).get_or_insert(Fault { code, index: token as u64 });
                    continue;
                }
                for head in 0..heads {
                    let to =
                        strides.offset((slot / page_size) as u64, (slot % page_size) as u64, head as u64);
                    let to = to.expect("an offset within the storage") as usize;
                    let from = token * rows.stride + head * dim;
                    cache[to..to + dim].copy_from_slice(&new[from..from + dim]);
                }
            }
        }
        Ok(())
    }
}

impl InplaceOp3 for Op<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        kv: &mut CpuStorage,
        kv_layout: &Layout,
        k_new: &CpuStorage,
        k_layout: &Layout,
        v_new: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let places = self.places(kv_layout, k_layout, v_layout)?;
        match (&self.append.backend, kv) {
            (Backend::Cpu(fault), CpuStorage::F32(kv)) => self.on_cpu::<f32>(fault, places, kv, k_new, v_new),
            (Backend::Cpu(fault), CpuStorage::F16(kv)) => self.on_cpu::<f16>(fault, places, kv, k_new, v_new),
            (Backend::Cpu(fault), CpuStorage::BF16(kv)) => {
                self.on_cpu::<bf16>(fault, places, kv, k_new, v_new)
            }
            _ => Err(Error::UnsupportedDTypeForOp(self.append.dtype, OP).bt()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        kv: &mut candle_core::CudaStorage,
        kv_layout: &Layout,
        k_new: &candle_core::CudaStorage,
        k_layout: &Layout,
        v_new: &candle_core::CudaStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let places = self.places(kv_layout, k_layout, v_layout)?;
        let Backend::Cuda(appender) = &self.append.backend else {
            return Err(argument(OP, "kv", "CPU tensors, as prepared", "CUDA tensors"));
        };
        appender.append(places, kv, k_new, v_new, self.slots)
    }
}

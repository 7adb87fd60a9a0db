//! Host memory that kernels read and write in place, over the host link.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

use bytemuck::Pod;
use cudarc::driver::{CudaStream, sys};

use super::call::{check, quiesce};
use super::gpu::Gpu;
use crate::Error;
use crate::memory::{View, ViewMut};

/// How pinned memory is cached by the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MappedKind {
    /// As ordinary memory.
    #[default]
    Cached,
    /// Past the caches: kernels read it somewhat faster, CPU reads are very slow. For weights.
    WriteCombined,
}

/// Pinned host memory that the device sees: `len` elements of `T`, zeroed.
pub struct Mapped<T> {
    gpu: Gpu,
    host: *mut T,
    device: u64,
    len: usize,
}

// SAFETY: the memory belongs to the context, not to a thread, and `Mapped` hands it out by the rules of `&` and `&mut`.
unsafe impl<T: Send> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Mapped<T> {}

impl<T: Pod> Mapped<T> {
    /// Allocates and zeroes.
    pub fn zeroed(gpu: &Gpu, len: usize, kind: MappedKind) -> Result<Self, Error> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| Error::argument("mapped", "len", "a size that fits the address space", len))?;
        let mut flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        if kind == MappedKind::WriteCombined {
            flags |= sys::CU_MEMHOSTALLOC_WRITECOMBINED;
        }
        gpu.bind()?;
        let mut host = std::ptr::null_mut::<c_void>();
        // SAFETY: the pointer is valid for one pointer. The driver refuses to allocate nothing, hence the max.
        let result = unsafe { sys::cuMemHostAlloc(&mut host, bytes.max(1), flags) };
        check("cuMemHostAlloc", result)?;
        let mut mapped = Mapped { gpu: gpu.clone(), host: host.cast(), device: 0, len };
        // SAFETY: the allocation has this many bytes, and nobody else knows it yet.
        unsafe { std::ptr::write_bytes(host.cast::<u8>(), 0, bytes) };
        mapped.device = device_address(host)?;
        Ok(mapped)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// For kernels that read.
    pub fn view(&self) -> View<'_, T> {
        // SAFETY: the device sees `len` elements at this address until the drop, which waits for the context; `&self` keeps
        // safe host code from writing them.
        unsafe { View::from_mapped(self.device, self.len, self.ordinal()) }
    }

    /// For kernels on one stream that read and write; no other stream takes the view.
    pub fn view_mut(&mut self, stream: &CudaStream) -> ViewMut<'_, T> {
        // SAFETY: as in `view`; `&mut self` keeps safe host code and other launches from using them.
        let view = unsafe { ViewMut::from_mapped(self.device, self.len, self.ordinal()) };
        view.for_stream(Some(stream.cu_stream() as usize))
    }

    /// The elements, after waiting for everything enqueued in the context: a kernel may still be writing them.
    pub fn read(&self) -> Result<&[T], Error> {
        self.gpu.synchronize()?;
        // SAFETY: no kernel runs any more, and none that writes can be enqueued while `&self` is borrowed.
        Ok(unsafe { self.as_slice() })
    }

    /// The elements for writing, after waiting for everything enqueued in the context: a kernel may still be using them.
    pub fn write(&mut self) -> Result<&mut [T], Error> {
        self.gpu.synchronize()?;
        // SAFETY: no kernel runs any more, and none that uses them can be enqueued while `&mut self` is borrowed.
        Ok(unsafe { self.as_mut_slice() })
    }

    /// The elements, without waiting.
    ///
    /// # Safety
    /// No kernel or copy that writes the memory may be running or enqueued.
    pub unsafe fn as_slice(&self) -> &[T] {
        // SAFETY: the allocation holds `len` initialised elements; that nobody writes them is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.host, self.len) }
    }

    /// The elements for writing, without waiting.
    ///
    /// # Safety
    /// No kernel or copy that uses the memory may be running or enqueued.
    pub unsafe fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: the allocation holds `len` initialised elements; that nobody else uses them is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.host, self.len) }
    }

    fn ordinal(&self) -> usize {
        self.gpu.device().ordinal
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        let context = self.gpu.context();
        // A kernel may still use the memory: views are borrowed until the launch, not until its end.
        if !quiesce(context) {
            return;
        }
        // SAFETY: allocated with cuMemHostAlloc, freed once, and no longer in use.
        let result = unsafe { sys::cuMemFreeHost(self.host.cast()) };
        context.record_err(result.result());
    }
}

impl<T> fmt::Debug for Mapped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({} elements at {:#x})", self.len, self.device)
    }
}

/// Host memory of somebody else, pinned and made visible to the device: `len` elements of `T`. Owns what keeps it alive.
///
/// Meant for memory-mapped weight files. Pinning is slow (it touches every page), so it belongs into loading.
pub struct Registered<T, O> {
    gpu: Gpu,
    host: *mut c_void,
    device: u64,
    len: usize,
    /// In a box, so that moving `Registered` cannot move memory that lies inside the owner.
    owner: Option<Box<O>>,
    _elements: PhantomData<T>,
}

// SAFETY: the registration belongs to the context, not to a thread; the elements are only read.
unsafe impl<T: Sync, O: Send> Send for Registered<T, O> {}
// SAFETY: as above.
unsafe impl<T: Sync, O: Sync> Sync for Registered<T, O> {}

impl<T: Pod, O: AsRef<[T]> + 'static> Registered<T, O> {
    /// Pins the memory of `owner` for kernels that only read it. The owner is kept until the registration ends.
    ///
    /// Where the device supports it the pages are registered read-only, which a file mapped without write permission needs.
    pub fn read_only(gpu: &Gpu, owner: O) -> Result<Self, Error> {
        let owner = Box::new(owner);
        let slice: &[T] = (*owner).as_ref();
        let (host, len) = (slice.as_ptr().cast_mut().cast::<c_void>(), slice.len());
        let bytes = size_of_val(slice);
        if bytes == 0 {
            return Err(Error::argument("registered", "owner", "at least one byte of memory", "none"));
        }
        let supported = gpu
            .context()
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED)
            .map_err(super::failed("cuDeviceGetAttribute"))?;
        let mut flags = sys::CU_MEMHOSTREGISTER_DEVICEMAP | sys::CU_MEMHOSTREGISTER_PORTABLE;
        if supported != 0 {
            flags |= sys::CU_MEMHOSTREGISTER_READ_ONLY;
        }
        gpu.bind()?;
        // SAFETY: the range is the owner's slice, which stays where it is until `drop` has unregistered it.
        let result = unsafe { sys::cuMemHostRegister_v2(host, bytes, flags) };
        check("cuMemHostRegister", result)?;
        let mut registered =
            Registered { gpu: gpu.clone(), host, device: 0, len, owner: Some(owner), _elements: PhantomData };
        registered.device = device_address(host)?;
        Ok(registered)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element; never true.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// For kernels that read.
    pub fn view(&self) -> View<'_, T> {
        // SAFETY: the device sees `len` elements at this address until the drop, which waits for the context; the owner is
        // out of everybody's reach, so nobody writes them.
        unsafe { View::from_mapped(self.device, self.len, self.gpu.device().ordinal) }
    }
}

impl<T, O> Drop for Registered<T, O> {
    fn drop(&mut self) {
        let context = self.gpu.context();
        // A kernel may still read the memory: views are borrowed until the launch, not until its end.
        if !quiesce(context) {
            std::mem::forget(self.owner.take());
            return;
        }
        // SAFETY: registered in `read_only`, unregistered once, and no longer in use.
        let result = unsafe { sys::cuMemHostUnregister(self.host) };
        context.record_err(result.result());
        drop(self.owner.take());
    }
}

impl<T, O> fmt::Debug for Registered<T, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registered({} elements at {:#x})", self.len, self.device)
    }
}

/// The address at which the device sees pinned memory.
fn device_address(host: *mut c_void) -> Result<u64, Error> {
    let mut device = 0;
    // SAFETY: the pointer is valid for one address; the driver looks the host pointer up without touching it.
    let result = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut device, host, 0) };
    check("cuMemHostGetDevicePointer", result)?;
    Ok(device)
}

//! Workspaces: a plan lays its buffers out, the caller owns the bytes, `run` carves the buffers from them.
//!
//! ```
//! use cuda::memory::ViewMut;
//! use cuda::workspace::{Carver, HostWorkspace, Layout};
//! # use longkv_cuda as cuda;
//!
//! // In the plan: count.
//! let mut layout = Layout::new();
//! let partial_out = layout.scratch::<f32>(4 * 128)?;
//! let arrivals = layout.counters::<u32>(4)?;
//!
//! // The caller: allocate once. On a GPU this is `Workspace::zeroed(&stream, layout.bytes())`.
//! let mut workspace = HostWorkspace::zeroed(layout.bytes());
//!
//! // In each run: carve, in the order of the layout.
//! let carver = Carver::new("decode", workspace.view_mut(), &layout)?;
//! let partial_out: ViewMut<'_, f32> = carver.take(partial_out)?;
//! let arrivals: ViewMut<'_, u32> = carver.take(arrivals)?;
//! assert_eq!((partial_out.len(), arrivals.len()), (512, 4));
//! # Ok::<(), cuda::Error>(())
//! ```

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::Error;
use crate::memory::{View, ViewMut};

/// Every buffer starts at a multiple of this many bytes: what device allocations are aligned to, and more than any vector
/// load or bulk copy asks for.
pub const ALIGNMENT: usize = 256;

/// Offsets of a plan's buffers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    bytes: usize,
    counters: Vec<Range<usize>>,
}

/// Place of one buffer in a layout.
#[derive(Debug, PartialEq, Eq)]
pub struct Region<T> {
    offset: usize,
    len: usize,
    _elements: PhantomData<T>,
}

impl<T> Clone for Region<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Region<T> {}

impl<T> Region<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Layout {
    /// No buffers yet.
    pub fn new() -> Self {
        Layout::default()
    }

    /// A buffer of `len` elements whose contents do not matter between runs.
    ///
    /// # Errors
    /// [`Error::Argument`] if the workspace would exceed the address space.
    pub fn scratch<T: Pod>(&mut self, len: usize) -> Result<Region<T>, Error> {
        let bytes = len.checked_mul(size_of::<T>());
        let end = bytes.and_then(|bytes| self.bytes.checked_add(bytes)?.checked_next_multiple_of(ALIGNMENT));
        let end = end.filter(|end| isize::try_from(*end).is_ok()).ok_or_else(|| {
            Error::argument(
                "workspace",
                "len",
                "a size that fits the address space",
                format_args!("{len} elements"),
            )
        })?;
        let region = Region { offset: self.bytes, len, _elements: PhantomData };
        self.bytes = end;
        Ok(region)
    }

    /// A buffer of `len` elements that are zero before the first run and left zero by every run.
    ///
    /// # Errors
    /// [`Error::Argument`] if the workspace would exceed the address space.
    pub fn counters<T: Pod>(&mut self, len: usize) -> Result<Region<T>, Error> {
        let region = self.scratch::<T>(len)?;
        self.counters.push(region.offset..region.offset + len * size_of::<T>());
        Ok(region)
    }

    /// Room for another layout as a whole, its counters included: the buffer is that layout's workspace.
    ///
    /// # Errors
    /// [`Error::Argument`] if the workspace would exceed the address space.
    pub fn nest(&mut self, inner: &Layout) -> Result<Region<u8>, Error> {
        let region = self.scratch::<u8>(inner.bytes)?;
        let shifted =
            inner.counters.iter().map(|range| range.start + region.offset..range.end + region.offset);
        self.counters.extend(shifted);
        Ok(region)
    }

    /// A buffer of this layout in a workspace, for reading.
    ///
    /// # Errors
    /// [`Error::Argument`] if the workspace is smaller than the layout, or the buffer lies past it.
    pub fn view<'a, T: Pod>(
        &self,
        region: Region<T>,
        workspace: &'a ViewMut<'_, u8>,
    ) -> Result<View<'a, T>, Error> {
        workspace.check("workspace", "workspace", self.bytes, ALIGNMENT as u64)?;
        let bytes = workspace.part(region.offset..region.offset + region.len * size_of::<T>())?;
        // SAFETY: the bytes lie in the workspace, which is borrowed for as long as the view lives; `T` is plain data and the
        // address is aligned beyond its needs.
        Ok(unsafe { View::from_raw(bytes.address(), region.len, bytes.space()) }.for_stream(bytes.stream()))
    }

    /// Size of the workspace in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Byte ranges of the counters. All else may hold anything before a run.
    pub fn counter_ranges(&self) -> &[Range<usize>] {
        &self.counters
    }
}

/// Carves the buffers of a layout from a workspace.
///
/// Buffers are taken in the order in which the layout made them; that order is what keeps two of them from overlapping.
#[derive(Debug)]
pub struct Carver<'a> {
    kernel: &'static str,
    workspace: ViewMut<'a, u8>,
    /// End of the last buffer taken.
    taken: Cell<usize>,
}

impl<'a> Carver<'a> {
    /// Starts on a workspace.
    ///
    /// # Errors
    /// [`Error::Argument`] in the name of `kernel` if the workspace is smaller than the layout or not aligned to
    /// [`ALIGNMENT`].
    pub fn new(kernel: &'static str, workspace: ViewMut<'a, u8>, layout: &Layout) -> Result<Self, Error> {
        workspace.check(kernel, "workspace", layout.bytes(), ALIGNMENT as u64)?;
        Ok(Carver { kernel, workspace, taken: Cell::new(0) })
    }

    /// Gives the workspace back, when no buffer is in use any more.
    pub fn into_workspace(self) -> ViewMut<'a, u8> {
        self.workspace
    }

    /// The next buffer.
    ///
    /// # Errors
    /// [`Error::Argument`] if the buffer was taken already, comes before one that was, or lies past the workspace.
    pub fn take<T: Pod>(&self, region: Region<T>) -> Result<ViewMut<'_, T>, Error> {
        let end = region.offset + region.len * size_of::<T>();
        if region.offset < self.taken.get() || end > self.workspace.len() {
            return Err(Error::argument(
                self.kernel,
                "workspace",
                format_args!("a buffer within bytes {}..{}", self.taken.get(), self.workspace.len()),
                format_args!("one at {}..{end}", region.offset),
            ));
        }
        // An empty buffer takes nothing, and the next one has the same offset.
        self.taken.set(end.max(self.taken.get()));
        let address = self.workspace.address() + region.offset as u64;
        // SAFETY: the bytes lie in the workspace, which is borrowed mutably for as long as the view lives, and past every
        // buffer taken before, so nobody else has them. `T` is plain data and the address is aligned beyond its needs.
        let view = unsafe { ViewMut::from_raw(address, region.len, self.workspace.space()) };
        Ok(view.for_stream(self.workspace.stream()))
    }
}

/// Bytes at an address divisible by [`ALIGNMENT`].
#[derive(Clone, Copy, Zeroable)]
#[repr(C, align(256))]
struct Line([u8; ALIGNMENT]);

/// A workspace in host memory, for the emulator.
pub struct HostWorkspace {
    lines: Vec<Line>,
}

impl HostWorkspace {
    /// At least this many zeroed bytes.
    pub fn zeroed(bytes: usize) -> Self {
        HostWorkspace { lines: vec![Line::zeroed(); bytes.div_ceil(ALIGNMENT)] }
    }

    /// The bytes, for kernels.
    pub fn view_mut(&mut self) -> ViewMut<'_, u8> {
        ViewMut::host(self.bytes_mut())
    }

    /// Overwrites all but the layout's counters with 0xFF, which is NaN in every floating-point type: a kernel that reads
    /// what it has not written is found out.
    pub fn poison(&mut self, layout: &Layout) {
        let bytes = self.bytes_mut();
        let mut start = 0;
        for counters in layout.counter_ranges() {
            bytes[start..counters.start].fill(0xff);
            start = counters.end;
        }
        bytes[start..].fill(0xff);
    }

    /// Whether every counter of the layout is zero, as each run has to leave them.
    pub fn counters_are_zero(&mut self, layout: &Layout) -> bool {
        let bytes = self.bytes_mut();
        layout.counter_ranges().iter().all(|range| bytes[range.clone()].iter().all(|byte| *byte == 0))
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let (address, bytes) = (self.lines.as_mut_ptr().cast(), self.lines.len() * ALIGNMENT);
        // SAFETY: a line is exactly its 256 bytes, all initialised, and the borrow of `self` covers them.
        unsafe { std::slice::from_raw_parts_mut(address, bytes) }
    }
}

#[cfg(feature = "driver")]
mod device {
    use std::sync::Arc;

    use cudarc::driver::{CudaSlice, CudaStream};

    use crate::Error;
    use crate::driver::failed;
    use crate::memory::ViewMut;

    /// A workspace in device memory.
    #[derive(Debug)]
    pub struct Workspace {
        bytes: CudaSlice<u8>,
    }

    impl Workspace {
        /// Allocates zeroed bytes. Enqueues; does not wait.
        pub fn zeroed(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self, Error> {
            // The driver refuses to allocate nothing.
            Ok(Workspace { bytes: stream.alloc_zeros(bytes.max(1)).map_err(failed("cuMemAllocAsync"))? })
        }

        /// The bytes, for kernels on `stream`.
        pub fn view_mut<'a>(&'a mut self, stream: &'a CudaStream) -> ViewMut<'a, u8> {
            ViewMut::device(&mut self.bytes, stream)
        }
    }
}

#[cfg(feature = "driver")]
pub use device::Workspace;

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (Layout, Region<f32>, Region<u32>, Region<u64>, Region<u8>) {
        let mut layout = Layout::new();
        let scratch = layout.scratch::<f32>(65).unwrap();
        let counters = layout.counters::<u32>(3).unwrap();
        let empty = layout.scratch::<u64>(0).unwrap();
        let tail = layout.scratch::<u8>(1).unwrap();
        (layout, scratch, counters, empty, tail)
    }

    #[test]
    fn buffers_are_aligned_and_disjoint() {
        let (layout, scratch, counters, empty, tail) = layout();
        assert_eq!(layout.bytes(), 512 + 256 + 256);
        assert_eq!(layout.counter_ranges(), std::slice::from_ref(&(512..524)));
        let mut workspace = HostWorkspace::zeroed(layout.bytes());
        let base = workspace.view_mut().address();
        let carver = Carver::new("test", workspace.view_mut(), &layout).unwrap();
        let scratch = carver.take(scratch).unwrap();
        let counters = carver.take(counters).unwrap();
        let empty = carver.take(empty).unwrap();
        let tail = carver.take(tail).unwrap();
        let places: Vec<_> = [
            (scratch.address(), scratch.bytes()),
            (counters.address(), counters.bytes()),
            (empty.address(), empty.bytes()),
            (tail.address(), tail.bytes()),
        ]
        .into_iter()
        .map(|(address, bytes)| (address - base, bytes))
        .collect();
        assert_eq!(places, [(0, 260), (512, 12), (768, 0), (768, 1)]);
        assert_eq!(base % 256, 0);
    }

    #[test]
    fn a_buffer_is_taken_once_and_in_order() {
        let (layout, scratch, counters, ..) = layout();
        let mut workspace = HostWorkspace::zeroed(layout.bytes());
        let carver = Carver::new("test", workspace.view_mut(), &layout).unwrap();
        let _held = carver.take(counters).unwrap();
        for error in [carver.take(counters).unwrap_err(), carver.take(scratch).unwrap_err()] {
            assert!(error.to_string().contains("`workspace`"), "{error}");
        }
    }

    #[test]
    fn a_workspace_that_does_not_fit_is_refused() {
        let (layout, ..) = layout();
        let mut small = HostWorkspace::zeroed(layout.bytes() - 1 - ALIGNMENT);
        let error = Carver::new("test", small.view_mut(), &layout).unwrap_err().to_string();
        assert!(error.contains("at least 1024 elements"), "{error}");
        let mut large = HostWorkspace::zeroed(layout.bytes() + ALIGNMENT);
        let mut view = large.view_mut();
        let crooked = view.part_mut(1..layout.bytes() + 1).unwrap();
        let error = Carver::new("test", crooked, &layout).unwrap_err().to_string();
        assert!(error.contains("divisible by 256"), "{error}");
        // A region of a larger layout than the one the workspace was checked for.
        let mut larger = layout.clone();
        let beyond = larger.scratch::<f32>(64).unwrap();
        let mut workspace = HostWorkspace::zeroed(layout.bytes());
        let carver = Carver::new("test", workspace.view_mut(), &layout).unwrap();
        assert!(carver.take(beyond).is_err());
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        for len in [usize::MAX, usize::MAX / 4, isize::MAX as usize / 4] {
            let mut layout = Layout::new();
            let _first = layout.scratch::<u8>(1).unwrap();
            assert!(layout.scratch::<f32>(len).is_err(), "{len}");
            assert_eq!(layout.bytes(), 256, "a refused buffer leaves the layout as it was");
        }
    }

    #[test]
    fn nested_layouts_keep_their_counters() {
        let (inner, scratch, counters, ..) = layout();
        let mut outer = Layout::new();
        let _first = outer.scratch::<u8>(1).unwrap();
        let nested = outer.nest(&inner).unwrap();
        assert_eq!((outer.bytes(), nested.len()), (256 + inner.bytes(), inner.bytes()));
        assert_eq!(outer.counter_ranges(), std::slice::from_ref(&(768..780)));
        let mut workspace = HostWorkspace::zeroed(outer.bytes());
        workspace.poison(&outer);
        let carver = Carver::new("test", workspace.view_mut(), &outer).unwrap();
        let part = Carver::new("test", carver.take(nested).unwrap(), &inner).unwrap();
        assert_eq!((part.take(scratch).unwrap().len(), part.take(counters).unwrap().len()), (65, 3));
    }

    #[test]
    fn poison_spares_the_counters() {
        let (layout, scratch, ..) = layout();
        let mut workspace = HostWorkspace::zeroed(layout.bytes());
        workspace.poison(&layout);
        assert!(workspace.counters_are_zero(&layout));
        let bytes = workspace.bytes_mut();
        assert_eq!(bytes.iter().filter(|byte| **byte == 0).count(), 12);
        assert!(bytemuck::pod_read_unaligned::<f32>(&bytes[..4]).is_nan());
        assert_eq!(scratch.len(), 65);
        workspace.bytes_mut()[512] = 1;
        assert!(!workspace.counters_are_zero(&layout));
    }
}

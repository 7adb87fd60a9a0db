//! Borrowed views of memory that a kernel reads or writes: an address, a length and where it lies.
//!
//! A launch takes views, never raw pointers, so that the driver and the emulator can refuse memory of the other kind and
//! the emulator knows the bounds of every buffer.

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;

use crate::Error;

/// Where memory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// Ordinary host memory: only the emulator can reach it.
    Host,
    /// Memory that the CUDA device with this ordinal can reach, mapped host memory included.
    Device(usize),
}

impl std::fmt::Display for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Space::Host => f.write_str("host memory"),
            Space::Device(ordinal) => write!(f, "memory of device {ordinal}"),
        }
    }
}

/// Keeps cudarc's read or write event of a slice alive until the launch has been enqueued.
#[cfg(feature = "driver")]
type Guard<'a> = Option<cudarc::driver::SyncOnDrop<'a>>;
#[cfg(not(feature = "driver"))]
type Guard<'a> = Option<std::convert::Infallible>;

/// Which stream may use a view: the driver's handle of the stream that the view was made for, or `None` where the caller
/// orders the work himself (raw views, reads of mapped memory, the emulator).
pub type StreamHandle = Option<usize>;

/// Memory that a kernel reads: `len` elements of `T`.
#[derive(Debug)]
pub struct View<'a, T> {
    address: u64,
    len: usize,
    space: Space,
    mapped: bool,
    stream: StreamHandle,
    _guard: Guard<'a>,
    _borrow: PhantomData<&'a [T]>,
}

/// Memory that a kernel reads and writes: `len` elements of `T`.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    address: u64,
    len: usize,
    space: Space,
    mapped: bool,
    stream: StreamHandle,
    _guard: Guard<'a>,
    _borrow: PhantomData<&'a mut [T]>,
}

macro_rules! common {
    ($View:ident) => {
        impl<'a, T: Pod> $View<'a, T> {
            /// A view of raw memory: `len` elements of `T` from `address` on.
            ///
            /// # Safety
            /// The memory must be valid in `space` for as long as any kernel launched with this view runs, and must not be
            /// written (for a mutable view: accessed at all) by anybody else meanwhile. Such a view fits every stream.
            pub unsafe fn from_raw(address: u64, len: usize, space: Space) -> Self {
                Self { address, len, space, mapped: false, stream: None, _guard: None, _borrow: PhantomData }
            }

            /// The same for host memory that the device with this ordinal sees: what a kernel reads of it crosses the link.
            ///
            /// # Safety
            /// As [`from_raw`](Self::from_raw), and the memory is pinned memory of the host.
            pub unsafe fn from_mapped(address: u64, len: usize, ordinal: usize) -> Self {
                let space = Space::Device(ordinal);
                Self { address, len, space, mapped: true, stream: None, _guard: None, _borrow: PhantomData }
            }

            /// Whether the memory is the host's: pinned memory that a device sees, or what the emulator reaches.
            pub fn is_in_host_memory(&self) -> bool {
                self.mapped || self.space == Space::Host
            }

            /// Checks that the memory is the host's, of an argument that is to cross the link.
            pub fn check_in_host_memory(&self, kernel: &str, argument: &'static str) -> Result<(), Error> {
                match self.is_in_host_memory() {
                    true => Ok(()),
                    false => Err(Error::argument(kernel, argument, "pinned memory of the host", self.space)),
                }
            }

            /// Address of the first element, in the address space of [`space`](Self::space).
            pub fn address(&self) -> u64 {
                self.address
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there is no element.
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// Number of bytes.
            pub fn bytes(&self) -> usize {
                self.len * size_of::<T>()
            }

            /// The same bytes as elements of another plain type: as many as fit. A launch checks the alignment.
            pub fn cast<U: Pod>(self) -> $View<'a, U> {
                $View {
                    address: self.address,
                    len: self.bytes() / size_of::<U>().max(1),
                    space: self.space,
                    mapped: self.mapped,
                    stream: self.stream,
                    _guard: self._guard,
                    _borrow: PhantomData,
                }
            }

            /// Where the memory lies.
            pub fn space(&self) -> Space {
                self.space
            }

            /// The stream that may use it.
            pub fn stream(&self) -> StreamHandle {
                self.stream
            }

            /// The same view, for one stream only.
            pub(crate) fn for_stream(self, stream: StreamHandle) -> Self {
                Self { stream, ..self }
            }

            /// Checks the length and the alignment that a kernel needs: `len` elements or more, at an address divisible by
            /// `alignment` bytes. An empty view fits wherever no element is needed.
            pub fn check(
                &self,
                kernel: &str,
                argument: &'static str,
                len: usize,
                alignment: u64,
            ) -> Result<(), Error> {
                if self.len < len {
                    return Err(Error::argument(
                        kernel,
                        argument,
                        format_args!("at least {len} elements"),
                        format_args!("{} elements", self.len),
                    ));
                }
                if len > 0 && !self.address.is_multiple_of(alignment) {
                    return Err(Error::argument(
                        kernel,
                        argument,
                        format_args!("an address divisible by {alignment}"),
                        format_args!("{:#x}", self.address),
                    ));
                }
                Ok(())
            }

            fn part_address(&self, range: &Range<usize>) -> Result<u64, Error> {
                if range.start > range.end || range.end > self.len {
                    return Err(Error::argument(
                        "view",
                        "range",
                        format_args!("a range within 0..{}", self.len),
                        format_args!("{range:?}"),
                    ));
                }
                Ok(self.address + (range.start * size_of::<T>()) as u64)
            }
        }
    };
}

common!(View);
common!(ViewMut);

impl<'a, T: Pod> View<'a, T> {
    /// Host memory, for the emulator.
    pub fn host(slice: &'a [T]) -> Self {
        Self {
            address: slice.as_ptr() as u64,
            len: slice.len(),
            space: Space::Host,
            mapped: false,
            stream: None,
            _guard: None,
            _borrow: PhantomData,
        }
    }

    /// The elements of `range`.
    pub fn part(&self, range: Range<usize>) -> Result<View<'_, T>, Error> {
        let address = self.part_address(&range)?;
        Ok(View {
            address,
            len: range.len(),
            space: self.space,
            mapped: self.mapped,
            stream: self.stream,
            _guard: None,
            _borrow: PhantomData,
        })
    }
}

impl<'a, T: Pod> ViewMut<'a, T> {
    /// Host memory, for the emulator.
    pub fn host(slice: &'a mut [T]) -> Self {
        Self {
            address: slice.as_mut_ptr() as u64,
            len: slice.len(),
            space: Space::Host,
            mapped: false,
            stream: None,
            _guard: None,
            _borrow: PhantomData,
        }
    }

    /// The same memory for a shorter time, to pass by value and use again afterwards.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut {
            address: self.address,
            len: self.len,
            space: self.space,
            mapped: self.mapped,
            stream: self.stream,
            _guard: None,
            _borrow: PhantomData,
        }
    }

    /// The elements of `range`, for reading.
    pub fn part(&self, range: Range<usize>) -> Result<View<'_, T>, Error> {
        let address = self.part_address(&range)?;
        Ok(View {
            address,
            len: range.len(),
            space: self.space,
            mapped: self.mapped,
            stream: self.stream,
            _guard: None,
            _borrow: PhantomData,
        })
    }

    /// The elements of `range`, for writing.
    pub fn part_mut(&mut self, range: Range<usize>) -> Result<ViewMut<'_, T>, Error> {
        let address = self.part_address(&range)?;
        Ok(ViewMut {
            address,
            len: range.len(),
            space: self.space,
            mapped: self.mapped,
            stream: self.stream,
            _guard: None,
            _borrow: PhantomData,
        })
    }
}

#[cfg(feature = "driver")]
mod device {
    use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};

    use super::*;

    impl<'a, T: Pod> View<'a, T> {
        /// Device memory (`CudaSlice` or `CudaView`), read on `stream`, which has waited for whoever wrote it. A launch on another
        /// stream, which has not, refuses the view.
        pub fn device(slice: &'a impl DevicePtr<T>, stream: &'a CudaStream) -> Self {
            let len = slice.len();
            let space = Space::Device(slice.stream().context().ordinal());
            let (address, guard) = slice.device_ptr(stream);
            let stream = Some(stream.cu_stream() as usize);
            Self { address, len, space, mapped: false, stream, _guard: Some(guard), _borrow: PhantomData }
        }
    }

    impl<'a, T: Pod> ViewMut<'a, T> {
        /// Device memory (`CudaSlice` or `CudaViewMut`), read and written on `stream`, which has waited for whoever used it. A
        /// launch on another stream, which has not, refuses the view.
        pub fn device(slice: &'a mut impl DevicePtrMut<T>, stream: &'a CudaStream) -> Self {
            let len = slice.len();
            let space = Space::Device(slice.stream().context().ordinal());
            let (address, guard) = slice.device_ptr_mut(stream);
            let stream = Some(stream.cu_stream() as usize);
            Self { address, len, space, mapped: false, stream, _guard: Some(guard), _borrow: PhantomData }
        }
    }
}

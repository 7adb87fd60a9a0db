//! Kernels that do nothing but read, copy, write or multiply: the ceilings that others are held to.

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::table::Instance;

use super::conformance::MmaInstruction;

/// Threads and loads in flight of the stream kernels: what a block takes at a time.
const CHUNK_PIECES: usize = 256 * 8;
const PIECE: usize = 16;

/// Blocks of a grid, at least one.
fn grid(kernel: &str, blocks: u32) -> Result<u32, Error> {
    match blocks {
        1..=0x7fff_ffff => Ok(blocks),
        _ => Err(Error::argument(kernel, "blocks", format_args!("1..={}", i32::MAX), blocks)),
    }
}

/// Whole 16-byte pieces of a buffer.
fn pieces(kernel: &str, argument: &'static str, bytes: usize) -> Result<u64, Error> {
    if bytes.is_multiple_of(PIECE) {
        return Ok((bytes / PIECE) as u64);
    }
    Err(Error::argument(kernel, argument, "a multiple of 16 bytes", format_args!("{bytes} bytes")))
}

macro_rules! kernel {
    ($(#[$doc:meta])* $Name:ident = $kernel:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $Name<F> {
            function: F,
        }

        impl<F: Function> $Name<F> {
            const KERNEL: &str = $kernel;

            /// Compiles and loads the kernel.
            ///
            /// # Errors
            /// Those of [`Device::load`].
            pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
                Ok(Self { function: device.load(&Instance::new(Self::KERNEL, &[])?)? })
            }
        }
    };
}

kernel! {
    /// `stream_read`: loads of 16 bytes, 32 KiB in flight per block.
    StreamRead = "stream_read"
}

impl<F: Function> StreamRead<F> {
    /// Bytes that each block has in flight.
    pub const BYTES_IN_FLIGHT: usize = CHUNK_PIECES * PIECE;

    /// Enqueues `passes` reads of all of `source` (16-byte aligned, a multiple of 16 bytes) by `blocks` blocks. `out`
    /// `[blocks, 8]` gets each warp's exclusive-or of (word + pass).
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or no whole number of pieces.
    pub fn launch(
        &self,
        queue: &F::Queue,
        blocks: u32,
        passes: u32,
        source: &View<'_, u8>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        let blocks = grid(Self::KERNEL, blocks)?;
        let pieces = pieces(Self::KERNEL, "source", source.len())?;
        source.check(Self::KERNEL, "source", source.len(), 16)?;
        out.check(Self::KERNEL, "out", blocks as usize * 8, 4)?;
        let args = [
            Arg::read("source", source),
            Arg::write("out", out),
            Arg::value("pieces", &pieces),
            Arg::value("passes", &passes),
        ];
        // SAFETY: the arguments are the kernel's parameters; it reads `pieces` pieces and writes 8 words per block.
        unsafe { self.function.launch(queue, &LaunchConfig::new(blocks, 256), &args) }
    }
}

kernel! {
    /// `stream_copy`: loads and stores of 16 bytes.
    StreamCopy = "stream_copy"
}

impl<F: Function> StreamCopy<F> {
    /// Enqueues the copy of `source` to the start of `out`, both 16-byte aligned, by `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or no whole number of pieces.
    pub fn launch(
        &self,
        queue: &F::Queue,
        blocks: u32,
        source: &View<'_, u8>,
        out: &mut ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let blocks = grid(Self::KERNEL, blocks)?;
        let pieces = pieces(Self::KERNEL, "source", source.len())?;
        source.check(Self::KERNEL, "source", source.len(), 16)?;
        out.check(Self::KERNEL, "out", source.len(), 16)?;
        let args = [Arg::read("source", source), Arg::write("out", out), Arg::value("pieces", &pieces)];
        // SAFETY: the arguments are the kernel's parameters, and both buffers have `pieces` pieces.
        unsafe { self.function.launch(queue, &LaunchConfig::new(blocks, 256), &args) }
    }
}

kernel! {
    /// `stream_write`: stores of 16 bytes.
    StreamWrite = "stream_write"
}

impl<F: Function> StreamWrite<F> {
    /// Enqueues the filling of `out` (16-byte aligned) by `blocks` blocks: piece i becomes (i, !i, i · 0x9e3779b9, seed).
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is misaligned or no whole number of pieces.
    pub fn launch(
        &self,
        queue: &F::Queue,
        blocks: u32,
        seed: u32,
        out: &mut ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let blocks = grid(Self::KERNEL, blocks)?;
        let pieces = pieces(Self::KERNEL, "out", out.len())?;
        out.check(Self::KERNEL, "out", out.len(), 16)?;
        let args = [Arg::write("out", out), Arg::value("pieces", &pieces), Arg::value("seed", &seed)];
        // SAFETY: the arguments are the kernel's parameters, and the buffer has `pieces` pieces.
        unsafe { self.function.launch(queue, &LaunchConfig::new(blocks, 256), &args) }
    }
}

kernel! {
    /// `bulk_read`: bulk copies into shared memory (sm_90a).
    BulkRead = "bulk_read"
}

/// Shape of a [`BulkRead`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BulkReadShape {
    /// Blocks of the grid.
    pub blocks: u32,
    /// Bytes of one copy, a multiple of 16.
    pub piece_bytes: u32,
    /// Copies in flight per block.
    pub stages: u32,
}

impl<F: Function> BulkRead<F> {
    /// Shared memory that slots and barriers may take together, in bytes.
    pub const SHARED_BYTES: u32 = 224 * 1024;

    /// Enqueues one read of `source` (16-byte aligned, whole pieces). `out` `[blocks, 4]` gets each warp's exclusive-or.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned, or a shape that does not fit shared memory.
    pub fn launch(
        &self,
        queue: &F::Queue,
        shape: BulkReadShape,
        source: &View<'_, u8>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        let BulkReadShape { blocks, piece_bytes, stages } = shape;
        let blocks = grid(Self::KERNEL, blocks)?;
        let shared = u64::from(stages) * (u64::from(piece_bytes) + 8);
        let fits = piece_bytes > 0 && piece_bytes.is_multiple_of(16) && stages > 0;
        if !fits || shared > u64::from(Self::SHARED_BYTES) {
            return Err(Error::argument(
                Self::KERNEL,
                "shape",
                format_args!("stages of a multiple of 16 bytes, {} bytes in all", Self::SHARED_BYTES),
                format_args!("{shape:?}"),
            ));
        }
        let pieces = source.len() / piece_bytes as usize;
        let whole = pieces * piece_bytes as usize == source.len();
        let pieces = i32::try_from(pieces).ok().filter(|_| whole).ok_or_else(|| {
            let expected = format_args!("whole pieces of {piece_bytes} bytes").to_string();
            Error::argument(Self::KERNEL, "source", expected, format_args!("{} bytes", source.len()))
        })? as u32;
        source.check(Self::KERNEL, "source", source.len(), 16)?;
        out.check(Self::KERNEL, "out", blocks as usize * 4, 4)?;
        let args = [
            Arg::read("source", source),
            Arg::write("out", out),
            Arg::value("pieces", &pieces),
            Arg::value("bytes", &piece_bytes),
            Arg::value("stages", &stages),
        ];
        // SAFETY: the arguments are the kernel's parameters, the source has `pieces` pieces, `out` four words per block, and
        // shared memory holds the slots and their barriers.
        unsafe { self.function.launch(queue, &LaunchConfig::new(blocks, 128).shared(shared as u32), &args) }
    }
}

/// `mma_rate`: products from registers alone, eight sums per warp.
#[derive(Debug, Clone)]
pub struct MmaRate<F> {
    function: F,
    instruction: MmaInstruction,
}

impl<F: Function> MmaRate<F> {
    const KERNEL: &str = "mma_rate";

    /// Compiles and loads the kernel for [`MmaInstruction::Bf16`] or [`MmaInstruction::S8S8`].
    ///
    /// # Errors
    /// Those of [`Device::load`], and another instruction.
    pub fn prepare<D: Device<Function = F>>(device: &D, instruction: MmaInstruction) -> Result<Self, Error> {
        let instance = Instance::new(Self::KERNEL, &[("INSTRUCTION", instruction as i64)])?;
        Ok(Self { function: device.load(&instance)?, instruction })
    }

    /// Operations (a multiplication and an addition are two) of a launch.
    pub fn operations(&self, blocks: u32, rounds: u32) -> u64 {
        let product =
            if self.instruction == MmaInstruction::Bf16 { 16 * 8 * 16 * 2 } else { 16 * 8 * 32 * 2 };
        u64::from(blocks) * 4 * u64::from(rounds) * 8 * product
    }

    /// Words of `d` for a number of blocks.
    pub fn out_words(blocks: u32) -> usize {
        blocks as usize * 4 * 8 * 32 * 4
    }

    /// Enqueues `rounds` products of a `[32, 4]` with each of b `[8, 32, 2]` in every warp of `blocks` blocks, summed into
    /// d `[blocks, 4, 8, 32, 4]` (f32 or s32 bits).
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        blocks: u32,
        rounds: u32,
        a: &View<'_, u32>,
        b: &View<'_, u32>,
        d: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        let blocks = grid(Self::KERNEL, blocks)?;
        a.check(Self::KERNEL, "a", 32 * 4, 4)?;
        b.check(Self::KERNEL, "b", 8 * 32 * 2, 4)?;
        d.check(Self::KERNEL, "d", Self::out_words(blocks), 4)?;
        let args = [Arg::read("a", a), Arg::read("b", b), Arg::write("d", d), Arg::value("rounds", &rounds)];
        // SAFETY: the arguments are the kernel's parameters, each as long as the grid indexes it.
        unsafe { self.function.launch(queue, &LaunchConfig::new(blocks, 128), &args) }
    }
}

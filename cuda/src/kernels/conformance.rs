//! Kernels that show what one device-side wrapper does: raw values in, one instruction, raw values out.
//!
//! Tests compare them, on a GPU and in the emulator alike, with tables written from the PTX ISA. Nothing else needs them.

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::FdcDecodeParams;
use crate::table::Instance;

/// A typed kernel: its struct, and how it is prepared.
macro_rules! kernel {
    ($(#[$doc:meta])* $Name:ident = $kernel:literal $(, $constant:literal: $argument:ident: $type:ty)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $Name<F> {
            function: F,
            $($argument: $type,)?
        }

        impl<F: Function> $Name<F> {
            const KERNEL: &str = $kernel;

            /// Compiles and loads the kernel.
            ///
            /// # Errors
            /// Those of [`Device::load`], and a constant that the kernel table does not allow.
            pub fn prepare<D: Device<Function = F>>(device: &D $(, $argument: $type)?) -> Result<Self, Error> {
                let instance = Instance::new(Self::KERNEL, &[$(($constant, $argument as i64))?])?;
                Ok(Self { function: device.load(&instance)? $(, $argument)? })
            }

            $(
                /// The value of the kernel's constant.
                pub fn $argument(&self) -> $type {
                    self.$argument
                }
            )?
        }
    };
}

mod hopper;

pub use hopper::{BulkCopies, MbarrierRounds, StmatrixFragments, WgmmaProduct};

/// Number of elements, or an error if the product is beyond a 32-bit count of threads.
fn count(kernel: &str, argument: &'static str, factors: &[usize]) -> Result<u32, Error> {
    let product = factors.iter().try_fold(1usize, |product, factor| product.checked_mul(*factor));
    product.and_then(|product| i32::try_from(product).ok()).map(|product| product as u32).ok_or_else(|| {
        Error::argument(
            kernel,
            argument,
            format_args!("at most {} in all", i32::MAX),
            format_args!("{factors:?}"),
        )
    })
}

/// The products of [`MmaFragments`], numbered as in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i64)]
pub enum MmaInstruction {
    /// `mma.m16n8k16`, bf16 with f32 sums.
    Bf16 = 0,
    /// `mma.m16n8k16`, f16 with f32 sums.
    F16 = 1,
    /// `mma.m16n8k8`, tf32 with f32 sums.
    Tf32 = 2,
    /// `mma.m16n8k32`, both operands signed bytes.
    S8S8 = 3,
    /// `mma.m16n8k32`, A signed and B unsigned bytes.
    S8U8 = 4,
    /// `mma.m16n8k32`, A unsigned and B signed bytes.
    U8S8 = 5,
    /// `mma.m16n8k32`, both operands unsigned bytes.
    U8U8 = 6,
}

kernel! {
    /// `mma_fragments`: d += a·b on raw registers, one warp per tile.
    MmaFragments = "mma_fragments", "INSTRUCTION": instruction: MmaInstruction
}

impl<F: Function> MmaFragments<F> {
    /// Enqueues `tiles` products: a `[tiles, 32, 4]`, b `[tiles, 32, 2]`, d `[tiles, 32, 4]` (f32 or s32 bits).
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        tiles: usize,
        a: &View<'_, u32>,
        b: &View<'_, u32>,
        d: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        let threads = count(Self::KERNEL, "tiles", &[tiles, 32])? as usize;
        a.check(Self::KERNEL, "a", threads * 4, 4)?;
        b.check(Self::KERNEL, "b", threads * 2, 4)?;
        d.check(Self::KERNEL, "d", threads * 4, 4)?;
        let args = [Arg::read("a", a), Arg::read("b", b), Arg::write("d", d)];
        // SAFETY: the arguments are the kernel's parameters, each as long as the grid indexes it.
        unsafe { self.function.launch(queue, &LaunchConfig::new(tiles as u32, 32), &args) }
    }
}

kernel! {
    /// `ldmatrix_fragments`: every form of `ldmatrix`, and `movmatrix`.
    LdmatrixFragments = "ldmatrix_fragments"
}

impl<F: Function> LdmatrixFragments<F> {
    /// Enqueues one warp: four matrices `[4, 8, 4]` of 16-bit pairs, rows `[32]`, out `[7, 32, 4]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        matrices: &View<'_, u32>,
        row_of_lane: &View<'_, u32>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        matrices.check(Self::KERNEL, "matrices", 128, 4)?;
        row_of_lane.check(Self::KERNEL, "row_of_lane", 32, 4)?;
        out.check(Self::KERNEL, "out", 7 * 128, 4)?;
        let args =
            [Arg::read("matrices", matrices), Arg::read("row_of_lane", row_of_lane), Arg::write("out", out)];
        // SAFETY: the arguments are the kernel's parameters, each as long as one warp indexes it; rows are taken modulo 32.
        unsafe { self.function.launch(queue, &LaunchConfig::new(1, 32).shared(512), &args) }
    }
}

kernel! {
    /// `swizzled_fragments`: the swizzled tile layout and the operand fragments loaded from it.
    SwizzledFragments = "swizzled_fragments", "ROW_BYTES": row_bytes: u32
}

impl<F: Function> SwizzledFragments<F> {
    /// Enqueues one warp: source `[32, row_bytes]`, 16-byte aligned, offsets `[32, row_bytes / 16]`, fragments
    /// `[2, row_bytes / 32, 4, 32, 4]`, places `[32, 4]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        source: &View<'_, u8>,
        offsets: &mut ViewMut<'_, u32>,
        fragments: &mut ViewMut<'_, u32>,
        places: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        let row_bytes = self.row_bytes as usize;
        source.check(Self::KERNEL, "source", 32 * row_bytes, 16)?;
        offsets.check(Self::KERNEL, "offsets", 32 * row_bytes / 16, 4)?;
        fragments.check(Self::KERNEL, "fragments", 2 * row_bytes / 32 * 512, 4)?;
        places.check(Self::KERNEL, "places", 128, 4)?;
        let args = [
            Arg::read("source", source),
            Arg::write("offsets", offsets),
            Arg::write("fragments", fragments),
            Arg::write("places", places),
        ];
        let config = LaunchConfig::new(1, 32).shared(32 * self.row_bytes);
        // SAFETY: the arguments are the kernel's parameters, each as long as one warp indexes it, and shared memory holds
        // the tile.
        unsafe { self.function.launch(queue, &config, &args) }
    }
}

kernel! {
    /// `cp_async_sizes`: every form of `cp.async`, one per thread.
    CpAsyncSizes = "cp_async_sizes"
}

impl<F: Function> CpAsyncSizes<F> {
    /// Enqueues `blocks` blocks of 128 threads: source `[threads, 16]`, 16-byte aligned, form and source bytes
    /// `[threads]`, out `[threads, 32]`, 16-byte aligned.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        blocks: usize,
        source: &View<'_, u8>,
        form: &View<'_, u32>,
        source_bytes: &View<'_, u32>,
        out: &mut ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        let threads = count(Self::KERNEL, "blocks", &[blocks, 128])? as usize;
        source.check(Self::KERNEL, "source", threads * 16, 16)?;
        form.check(Self::KERNEL, "form", threads, 4)?;
        source_bytes.check(Self::KERNEL, "source_bytes", threads, 4)?;
        out.check(Self::KERNEL, "out", threads * 32, 16)?;
        let args = [
            Arg::read("source", source),
            Arg::read("form", form),
            Arg::read("source_bytes", source_bytes),
            Arg::write("out", out),
        ];
        // SAFETY: the arguments are the kernel's parameters, each as long as the grid indexes it; sizes are clamped.
        unsafe { self.function.launch(queue, &LaunchConfig::new(blocks as u32, 128).shared(4096), &args) }
    }
}

kernel! {
    /// `copy_ring_sum`: tiles streamed through a ring of slots.
    CopyRingSum = "copy_ring_sum", "STAGES": stages: u32
}

impl<F: Function> CopyRingSum<F> {
    /// Enqueues `blocks` rings: source `[blocks, tiles, 128, 4]`, 16-byte aligned, out `[blocks, 128]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        blocks: usize,
        tiles: usize,
        source: &View<'_, u32>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        count(Self::KERNEL, "tiles", &[blocks, tiles, 512])?;
        source.check(Self::KERNEL, "source", blocks * tiles * 512, 16)?;
        out.check(Self::KERNEL, "out", blocks * 128, 4)?;
        let tiles = tiles as u32;
        let args = [Arg::read("source", source), Arg::write("out", out), Arg::value("tiles", &tiles)];
        let config = LaunchConfig::new(blocks as u32, 128).shared(self.stages * 2048);
        // SAFETY: the arguments are the kernel's parameters, each as long as the grid indexes it, and shared memory holds
        // the ring.
        unsafe { self.function.launch(queue, &config, &args) }
    }
}

kernel! {
    /// `vector_memory`: every load and store of `ptx/memory.cuh`.
    VectorMemory = "vector_memory"
}

impl<F: Function> VectorMemory<F> {
    /// Enqueues the copies of `n` pieces: source `[n, 4]`, out `[9, n, 4]`, both 16-byte aligned. A `programmatic` launch starts while
    /// the previous kernel of the stream drains.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        n: usize,
        programmatic: bool,
        source: &View<'_, u32>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        let threads = count(Self::KERNEL, "n", &[n])?;
        source.check(Self::KERNEL, "source", n * 4, 16)?;
        out.check(Self::KERNEL, "out", 9 * n * 4, 16)?;
        let args = [Arg::read("source", source), Arg::write("out", out), Arg::value("n", &threads)];
        let config = LaunchConfig { programmatic, ..LaunchConfig::new(threads.div_ceil(128), 128) };
        // SAFETY: the arguments are the kernel's parameters, each as long as the first `n` threads index it.
        unsafe { self.function.launch(queue, &config, &args) }
    }
}

/// The conversions of [`Convert`], numbered as in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the name says it: result, source, and how it is done")]
pub enum Conversion {
    F16FromF32 = 0,
    F32FromF16 = 1,
    Bf16FromF32 = 2,
    F32FromBf16 = 3,
    F16x2FromF32 = 4,
    Bf16x2FromF32 = 5,
    F32FromLowF16 = 6,
    F32FromHighF16 = 7,
    F32FromHighBf16 = 8,
    Tf32FromF32 = 9,
    E4m3FromF32 = 10,
    E5m2FromF32 = 11,
    F32FromE4m3 = 12,
    F32FromE5m2 = 13,
    E4m3x2FromF32 = 14,
    E5m2x2FromF32 = 15,
    F16x2FromE4m3x2 = 16,
    F16x2FromE5m2x2 = 17,
    SoftwareF16FromF32 = 18,
    SoftwareF32FromF16 = 19,
    SoftwareBf16FromF32 = 20,
    SoftwareE4m3FromF32 = 21,
    SoftwareE5m2FromF32 = 22,
    SoftwareF16FromE4m3 = 23,
    SoftwareF16FromE5m2 = 24,
    F16x2FromLowE4m3x4 = 25,
    F16x2FromHighE4m3x4 = 26,
    ArithmeticF16x2FromLowE4m3x4 = 27,
    ArithmeticF16x2FromHighE4m3x4 = 28,
    Bf16x2FromLowE4m3x4 = 29,
    Bf16x2FromHighE4m3x4 = 30,
}

kernel! {
    /// `convert`: the conversions of `ptx/convert.cuh` and `types.cuh`.
    Convert = "convert"
}

impl<F: Function> Convert<F> {
    /// Enqueues one conversion of `[n]` elements; `second` matters to the packing ones only.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        conversion: Conversion,
        n: usize,
        first: &View<'_, u32>,
        second: &View<'_, u32>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        let (elements, operation) = (count(Self::KERNEL, "n", &[n])?, conversion as u32);
        first.check(Self::KERNEL, "first", n, 4)?;
        second.check(Self::KERNEL, "second", n, 4)?;
        out.check(Self::KERNEL, "out", n, 4)?;
        let args = [
            Arg::read("first", first),
            Arg::read("second", second),
            Arg::write("out", out),
            Arg::value("n", &elements),
            Arg::value("operation", &operation),
        ];
        // SAFETY: the arguments are the kernel's parameters, each `n` long, and no thread goes past `n`.
        unsafe { self.function.launch(queue, &LaunchConfig::new(elements.div_ceil(4096), 256), &args) }
    }
}

/// The functions of [`MathApprox`], numbered as in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Approximation {
    /// 2^x.
    Exp2 = 0,
    /// log2(x).
    Log2 = 1,
    /// 1 / x.
    Reciprocal = 2,
}

kernel! {
    /// `math_approx`: the approximate functions of `ptx/math.cuh`.
    MathApprox = "math_approx"
}

impl<F: Function> MathApprox<F> {
    /// Enqueues one function over `[n]` elements.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        function: Approximation,
        n: usize,
        input: &View<'_, f32>,
        out: &mut ViewMut<'_, f32>,
    ) -> Result<(), Error> {
        let (elements, operation) = (count(Self::KERNEL, "n", &[n])?, function as u32);
        input.check(Self::KERNEL, "in", n, 4)?;
        out.check(Self::KERNEL, "out", n, 4)?;
        let args = [
            Arg::read("in", input),
            Arg::write("out", out),
            Arg::value("n", &elements),
            Arg::value("operation", &operation),
        ];
        // SAFETY: the arguments are the kernel's parameters, each `n` long, and no thread goes past `n`.
        unsafe { self.function.launch(queue, &LaunchConfig::new(elements.div_ceil(4096), 256), &args) }
    }
}

kernel! {
    /// `warp_reductions`: the reductions of `ptx/shuffle.cuh`.
    WarpReductions = "warp_reductions"
}

impl<F: Function> WarpReductions<F> {
    /// Enqueues `warps` warps: integers and values `[warps, 32]`, out `[16, warps, 32]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        warps: usize,
        integers: &View<'_, u32>,
        values: &View<'_, f32>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        count(Self::KERNEL, "warps", &[warps, 32 * 16])?;
        integers.check(Self::KERNEL, "in", warps * 32, 4)?;
        values.check(Self::KERNEL, "values", warps * 32, 4)?;
        out.check(Self::KERNEL, "out", 16 * warps * 32, 4)?;
        let args = [Arg::read("in", integers), Arg::read("values", values), Arg::write("out", out)];
        // SAFETY: the arguments are the kernel's parameters, each as long as the grid indexes it.
        unsafe { self.function.launch(queue, &LaunchConfig::new(warps as u32, 32), &args) }
    }
}

kernel! {
    /// `named_barriers`: pairs of warps meet at `bar.sync` and `bar.arrive`.
    NamedBarriers = "named_barriers"
}

impl<F: Function> NamedBarriers<F> {
    /// Enqueues one block: in and out `[128]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        input: &View<'_, u32>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        input.check(Self::KERNEL, "in", 128, 4)?;
        out.check(Self::KERNEL, "out", 128, 4)?;
        let args = [Arg::read("in", input), Arg::write("out", out)];
        // SAFETY: the arguments are the kernel's parameters, each as long as one block indexes it.
        unsafe { self.function.launch(queue, &LaunchConfig::new(1, 128).shared(512), &args) }
    }
}

/// The ways of [`MessagePassing`], numbered as in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Handover {
    /// `store_release_u32`, looked at by the next block with `load_acquire_u32`.
    Flag32 = 0,
    /// `store_release_u64`, looked at by the next block with `load_acquire_u64`.
    Flag64 = 1,
    /// `atomic_add_acq_rel_u32`; the last block reads all payloads.
    Add32 = 2,
    /// `atomic_add_acq_rel_u64`; the last block reads all payloads.
    Add64 = 3,
    /// `atomic_add_release_u32`, then `load_acquire_u32`; the last block reads all payloads.
    AddThenAcquire = 4,
    /// `atomic_cas_acq_rel_u32`; the last block reads all payloads.
    Cas32 = 5,
    /// `atomic_cas_acq_rel_u64`; the last block reads all payloads.
    Cas64 = 6,
}

impl Handover {
    /// Every way.
    pub const ALL: [Handover; 7] = [
        Handover::Flag32,
        Handover::Flag64,
        Handover::Add32,
        Handover::Add64,
        Handover::AddThenAcquire,
        Handover::Cas32,
        Handover::Cas64,
    ];
}

kernel! {
    /// `message_passing`: blocks hand payloads to each other.
    MessagePassing = "message_passing"
}

impl<F: Function> MessagePassing<F> {
    /// Enqueues `blocks` blocks: payload `[blocks, 64]`, words `[blocks + 1]`, zero, seen `[blocks]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    #[allow(clippy::too_many_arguments, reason = "one per buffer of the kernel")]
    pub fn launch(
        &self,
        queue: &F::Queue,
        handover: Handover,
        blocks: usize,
        seed: u32,
        payload: &mut ViewMut<'_, u32>,
        words32: &mut ViewMut<'_, u32>,
        words64: &mut ViewMut<'_, u64>,
        seen: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        count(Self::KERNEL, "blocks", &[blocks, 64])?;
        payload.check(Self::KERNEL, "payload", blocks * 64, 4)?;
        words32.check(Self::KERNEL, "words32", blocks + 1, 4)?;
        words64.check(Self::KERNEL, "words64", blocks + 1, 8)?;
        seen.check(Self::KERNEL, "seen", blocks, 4)?;
        let mode = handover as u32;
        let args = [
            Arg::write("payload", payload),
            Arg::write("words32", words32),
            Arg::write("words64", words64),
            Arg::write("seen", seen),
            Arg::value("seed", &seed),
            Arg::value("mode", &mode),
        ];
        // SAFETY: the arguments are the kernel's parameters, each as long as the grid indexes it.
        unsafe { self.function.launch(queue, &LaunchConfig::new(blocks as u32, 64).shared(8), &args) }
    }
}

kernel! {
    /// `status_contention`: many reports to one status word.
    StatusContention = "status_contention"
}

impl<F: Function> StatusContention<F> {
    /// Enqueues `blocks` blocks of 64 threads, of which every `stride`-th reports to the status word `[1]`, if any.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short, misaligned or zero.
    pub fn launch(
        &self,
        queue: &F::Queue,
        blocks: usize,
        stride: u32,
        status: Option<&mut ViewMut<'_, u64>>,
    ) -> Result<(), Error> {
        count(Self::KERNEL, "blocks", &[blocks, 64])?;
        if stride == 0 {
            return Err(Error::argument(Self::KERNEL, "stride", "at least 1", stride));
        }
        if let Some(status) = &status {
            status.check(Self::KERNEL, "status", 1, 8)?;
        }
        let args = [Arg::write_optional("status", status), Arg::value("stride", &stride)];
        // SAFETY: the arguments are the kernel's parameters; the status word is one u64 or null.
        unsafe { self.function.launch(queue, &LaunchConfig::new(blocks as u32, 64), &args) }
    }
}

kernel! {
    /// `weighted_parts`: the parts that a weighted split deals to each block.
    WeightedParts = "weighted_parts"
}

impl<F: Function> WeightedParts<F> {
    /// Enqueues `blocks` blocks: `first_unit` `[batch + 1]`, `parts` `[blocks, room, 8]` (sequence, item, first group, end
    /// group, index, count, slot, the slot of its index), `counts` `[blocks]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        params: &FdcDecodeParams,
        (blocks, room): (usize, u32),
        first_unit: &View<'_, u32>,
        parts: &mut ViewMut<'_, u32>,
        counts: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        let threads = count(Self::KERNEL, "blocks", &[blocks, 32])?;
        first_unit.check(Self::KERNEL, "first_unit", params.batch as usize + 1, 4)?;
        parts.check(Self::KERNEL, "parts", blocks * room as usize * 8, 4)?;
        counts.check(Self::KERNEL, "counts", blocks, 4)?;
        let args = [
            Arg::read("first_unit", first_unit),
            Arg::write("parts", parts),
            Arg::write("counts", counts),
            Arg::value("room", &room),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters, each as long as the grid indexes it.
        unsafe { self.function.launch(queue, &LaunchConfig::new(threads / 32, 32), &args) }
    }
}

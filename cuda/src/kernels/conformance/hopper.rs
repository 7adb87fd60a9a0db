//! The conformance kernels of sm_90a: stmatrix, mbarriers, bulk copies, TMA and wgmma.

use super::count;
use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::storage::Storage;
use crate::table::Instance;
use crate::tensor_map::TensorShape;

kernel! {
    /// `stmatrix_fragments`: every form of `stmatrix`.
    StmatrixFragments = "stmatrix_fragments"
}

impl<F: Function> StmatrixFragments<F> {
    /// Enqueues one warp: registers `[32, 4]`, rows `[32]`, out `[6, 4, 8, 4]` of 16-bit pairs.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        registers: &View<'_, u32>,
        row_of_lane: &View<'_, u32>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        registers.check(Self::KERNEL, "registers", 128, 4)?;
        row_of_lane.check(Self::KERNEL, "row_of_lane", 32, 4)?;
        out.check(Self::KERNEL, "out", 6 * 128, 4)?;
        let args = [
            Arg::read("registers", registers),
            Arg::read("row_of_lane", row_of_lane),
            Arg::write("out", out),
        ];
        // SAFETY: the arguments are the kernel's parameters, each as long as one warp indexes it; rows are taken modulo 32.
        unsafe { self.function.launch(queue, &LaunchConfig::new(1, 32).shared(512), &args) }
    }
}

kernel! {
    /// `mbarrier_rounds`: a producer warp and three consumer warps share two slots.
    MbarrierRounds = "mbarrier_rounds"
}

impl<F: Function> MbarrierRounds<F> {
    /// Enqueues one block: in `[rounds, 32]`, out `[rounds, 3, 32]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned.
    pub fn launch(
        &self,
        queue: &F::Queue,
        rounds: usize,
        input: &View<'_, u32>,
        out: &mut ViewMut<'_, u32>,
    ) -> Result<(), Error> {
        count(Self::KERNEL, "rounds", &[rounds, 96])?;
        input.check(Self::KERNEL, "in", rounds * 32, 4)?;
        out.check(Self::KERNEL, "out", rounds * 96, 4)?;
        let rounds = rounds as u32;
        let args = [Arg::read("in", input), Arg::write("out", out), Arg::value("rounds", &rounds)];
        // SAFETY: the arguments are the kernel's parameters, each as long as one block indexes it.
        unsafe { self.function.launch(queue, &LaunchConfig::new(1, 128).shared(288), &args) }
    }
}

kernel! {
    /// `bulk_copies`: one-dimensional bulk copies into shared memory and back.
    BulkCopies = "bulk_copies"
}

impl<F: Function> BulkCopies<F> {
    /// Enqueues one block: source and out `[pieces, bytes]`, both 16-byte aligned.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned, or `bytes` that is not a multiple of 16 in
    /// 16..=8192.
    pub fn launch(
        &self,
        queue: &F::Queue,
        pieces: usize,
        bytes: usize,
        source: &View<'_, u8>,
        out: &mut ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        if !bytes.is_multiple_of(16) || !(16..=8192).contains(&bytes) {
            return Err(Error::argument(Self::KERNEL, "bytes", "a multiple of 16 in 16..=8192", bytes));
        }
        count(Self::KERNEL, "pieces", &[pieces, bytes])?;
        source.check(Self::KERNEL, "source", pieces * bytes, 16)?;
        out.check(Self::KERNEL, "out", pieces * bytes, 16)?;
        let (pieces, bytes) = (pieces as u32, bytes as u32);
        let args = [
            Arg::read("source", source),
            Arg::write("out", out),
            Arg::value("pieces", &pieces),
            Arg::value("bytes", &bytes),
        ];
        // SAFETY: the arguments are the kernel's parameters, each as long as one block indexes it, and shared memory holds
        // two pieces and two barriers.
        unsafe { self.function.launch(queue, &LaunchConfig::new(1, 128).shared(2 * bytes + 16), &args) }
    }
}

kernel! {
    /// `wgmma_product`: C = A·Bᵀ by wgmma, of tiles that TMA or cp.async bring.
    WgmmaProduct = "wgmma_product", "DTYPE": dtype: i64
}

impl<F: Function> WgmmaProduct<F> {
    /// Form: A from registers, B as columns of K.
    pub const RS: u32 = 1;
    /// Form: two products of 64 columns instead of one of 128.
    pub const N64: u32 = 2;
    /// Form: tiles come by cp.async instead of TMA.
    pub const COPIES: u32 = 4;

    /// Enqueues the product of a `[m, k]` and b, `[n, k]` or with [`Self::RS`] `[k, n]`, into c `[m, n]`; m is a multiple of 64, n
    /// of 128. `E` is the type that the kernel was prepared for.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is too short or misaligned, or an extent that is no such multiple or that no
    /// tensor map can hold.
    pub fn launch<E: Storage>(
        &self,
        queue: &F::Queue,
        (m, n, k): (usize, usize, usize),
        form: u32,
        a: &View<'_, E>,
        b: &View<'_, E>,
        c: &mut ViewMut<'_, f32>,
    ) -> Result<(), Error> {
        for (argument, extent, tile) in [("m", m, 64), ("n", n, 128)] {
            if !extent.is_multiple_of(tile) {
                return Err(Error::argument(
                    Self::KERNEL,
                    argument,
                    format_args!("a multiple of {tile}"),
                    extent,
                ));
            }
        }
        count(Self::KERNEL, "c", &[m, n])?;
        count(Self::KERNEL, "k", &[k])?;
        c.check(Self::KERNEL, "c", m * n, 4)?;
        let tensor = |rows: usize, columns: usize| TensorShape {
            columns: columns as u64,
            rows: rows as u64,
            row_bytes: (columns * size_of::<E>()) as u64,
            box_columns: 64,
            box_rows: 64,
            swizzle_128: true,
            planes: None,
        };
        let of_b = if form & Self::RS != 0 { tensor(k, n) } else { tensor(n, k) };
        let (columns, depth) = (n as u32, k as u32);
        let args = [
            Arg::tensor("a_map", a, tensor(m, k)),
            Arg::tensor("b_map", b, of_b),
            Arg::read("a", a),
            Arg::read("b", b),
            Arg::write("c", c),
            Arg::value("n", &columns),
            Arg::value("k", &depth),
            Arg::value("form", &form),
        ];
        let config = LaunchConfig::new((columns / 128, m as u32 / 64), 256).shared(49184);
        // SAFETY: the arguments are the kernel's parameters, `c` is as long as the grid indexes it, shared memory holds two
        // slots and four barriers, and boxes stay within the maps, which the launch checks against their memory; copies stay
        // within the same extents.
        unsafe { self.function.launch(queue, &config, &args) }
    }
}

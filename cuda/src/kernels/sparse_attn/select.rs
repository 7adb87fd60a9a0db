//! Summaries of chunks, scores of partitions, and the pages that are selected by them: `sparse_summarise`, `sparse_score` and
//! `sparse_select`.

use std::marker::PhantomData;

use super::{check_sizes, product};
use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{
    SPARSE_MEAN, SPARSE_RAW, SPARSE_SUM, SparseScoreParams, SparseSelectParams, SparseSummariseParams,
};
use crate::storage::Storage;
use crate::table::Instance;

/// Most query heads of a KV head.
pub const MAX_GROUP: usize = 16;
/// Dynamic shared memory of a block of `sparse_select`, in bytes: the histogram, sums of 16 warps and 16 columns, three words.
pub const SELECT_SHARED_BYTES: usize = (2048 + 16 + 2 * 16 + 3) * 4;

/// Vectors of a summary.
fn vectors(kernel: &str, scorer: u32) -> Result<u32, Error> {
    match scorer {
        SPARSE_MEAN => Ok(1),
        scorer if scorer < SPARSE_MEAN => Ok(2),
        _ => Err(Error::argument(kernel, "scorer", format_args!("0 to {SPARSE_MEAN}"), scorer)),
    }
}

/// `sparse_summarise`: summarises the chunks that were just closed. `E` is the storage type of keys and summaries.
#[derive(Debug, Clone)]
pub struct Summarise<F, E> {
    function: F,
    _element: PhantomData<E>,
}

/// Arguments of [`Summarise`].
#[derive(Debug)]
pub struct SummariseArgs<'a, E> {
    /// Shape.
    pub params: &'a SparseSummariseParams,
    /// Blocks of a row.
    pub blocks: u32,
    /// Closed pages `[rows, max_closing, 4]`, as [`SparseClosing`](crate::params::SparseClosing).
    pub closing: &'a View<'a, u32>,
    /// Closed pages of each row `[rows]`.
    pub num_closing: &'a View<'a, u32>,
    /// Device memory `[num_runs, run_elements]`, 16-byte aligned.
    pub runs: &'a View<'a, E>,
    /// Summaries `[rows, max_partitions, vectors, dim]`, 16-byte aligned; those of the closed chunks are written.
    pub summaries: ViewMut<'a, E>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function, E: Storage> Summarise<F, E> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        let instance = Instance::new("sparse_summarise", &[("KV_DTYPE", E::DTYPE)])?;
        Ok(Self { function: device.load(&instance)?, _element: PhantomData })
    }

    /// Enqueues one round of summaries.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: SummariseArgs<'_, E>) -> Result<(), Error> {
        const KERNEL: &str = "sparse_summarise";
        let params = args.params;
        check_sizes(
            KERNEL,
            &[
                ("rows", params.rows),
                ("max_closing", params.max_closing),
                ("chunk_pages", params.chunk_pages),
                ("dim", params.dim),
                ("num_runs", params.num_runs),
                ("max_partitions", params.max_partitions),
                ("blocks", args.blocks),
            ],
        )?;
        if params.rows > 65535 {
            return Err(Error::argument(KERNEL, "rows", "at most 65535", params.rows));
        }
        if params.page_shift > 16
            || !params.dim.is_multiple_of(8)
            || (params.run_elements as usize) < (params.dim as usize) << params.page_shift
        {
            let expected = format_args!("at least 2^{} keys of {} elements", params.page_shift, params.dim);
            return Err(Error::argument(KERNEL, "run_elements", expected, params.run_elements));
        }
        let vectors = vectors(KERNEL, params.scorer)?;
        args.closing.check(KERNEL, "closing", product(&[params.rows, params.max_closing, 4]), 4)?;
        args.num_closing.check(KERNEL, "num_closing", params.rows as usize, 4)?;
        args.runs.check(KERNEL, "runs", product(&[params.num_runs, params.run_elements]), 16)?;
        let summaries = product(&[params.rows, params.max_partitions, vectors, params.dim]);
        args.summaries.check(KERNEL, "summaries", summaries, 16)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let config = LaunchConfig::new((args.blocks, params.rows), 128);
        let kernel_args = [
            Arg::read("closing", args.closing),
            Arg::read("num_closing", args.num_closing),
            Arg::read("runs", args.runs),
            Arg::write("summaries", &mut args.summaries),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, and the checks above made every buffer as long as
        // its index range; counts, runs and pages, which lie in device memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// Dynamic shared memory of a block of `sparse_score`, in bytes: 16 padded queries and the sums of four warps.
pub const fn score_shared_bytes(row_dim: usize) -> usize {
    MAX_GROUP * (row_dim * 2 + 64) + 4 * MAX_GROUP * 2 * 4
}

/// `sparse_score`: scores partitions by their summaries. `E` is the storage type of queries and summaries.
#[derive(Debug, Clone)]
pub struct Score<F, E> {
    function: F,
    row_dim: usize,
    _element: PhantomData<E>,
}

/// Arguments of [`Score`].
#[derive(Debug)]
pub struct ScoreArgs<'a, E> {
    /// Shape and rule.
    pub params: &'a SparseScoreParams,
    /// Queries `[rows, group, dim]`.
    pub q: &'a View<'a, E>,
    /// Summaries `[rows, max_partitions, row_dim]`, 16-byte aligned.
    pub summaries: &'a View<'a, E>,
    /// Partitions of each row `[rows]`.
    pub num_partitions: &'a View<'a, u32>,
    /// A [`SparseRow`](crate::params::SparseRow) each `[rows]`; all rows select if absent.
    pub rows: Option<&'a View<'a, u32>>,
    /// Out: unscaled scores `[rows, group, max_partitions]`, those of the row's partitions.
    pub scores: ViewMut<'a, f32>,
    /// Out: maximum and sum of the softmax of each block's partitions `[rows, blocks, group, 2]`.
    pub sums: ViewMut<'a, f32>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function, E: Storage> Score<F, E> {
    /// Compiles and loads the kernel for summaries of `row_dim` elements.
    pub fn prepare<D: Device<Function = F>>(device: &D, row_dim: usize) -> Result<Self, Error> {
        let constants = [("ROW_DIM", row_dim as i64), ("KV_DTYPE", E::DTYPE)];
        let function = device.load(&Instance::new("sparse_score", &constants)?)?;
        Ok(Self { function, row_dim, _element: PhantomData })
    }

    /// Enqueues one round of scores.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: ScoreArgs<'_, E>) -> Result<(), Error> {
        const KERNEL: &str = "sparse_score";
        let params = args.params;
        check_sizes(
            KERNEL,
            &[
                ("rows", params.rows),
                ("max_partitions", params.max_partitions),
                ("blocks", params.blocks),
                ("group", params.group),
            ],
        )?;
        for (argument, value, most) in
            [("rows", params.rows, 65535), ("group", params.group, MAX_GROUP as u32)]
        {
            if value > most {
                return Err(Error::argument(KERNEL, argument, format_args!("at most {most}"), value));
            }
        }
        let dim = self.row_dim / vectors(KERNEL, params.scorer)? as usize;
        let heads = product(&[params.rows, params.group]);
        args.q.check(KERNEL, "q", heads.saturating_mul(dim), 2)?;
        let partitions = product(&[params.rows, params.max_partitions]);
        args.summaries.check(KERNEL, "summaries", partitions.saturating_mul(self.row_dim), 16)?;
        args.num_partitions.check(KERNEL, "num_partitions", params.rows as usize, 4)?;
        if let Some(rows) = args.rows {
            rows.check(KERNEL, "rows", params.rows as usize, 4)?;
        }
        args.scores.check(
            KERNEL,
            "scores",
            product(&[params.rows, params.group, params.max_partitions]),
            4,
        )?;
        args.sums.check(KERNEL, "sums", product(&[params.rows, params.blocks, params.group, 2]), 4)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let shared = score_shared_bytes(self.row_dim) as u32;
        let config = LaunchConfig::new((params.blocks, params.rows), 128).shared(shared);
        let kernel_args = [
            Arg::read("q", args.q),
            Arg::read("summaries", args.summaries),
            Arg::read("num_partitions", args.num_partitions),
            Arg::read_optional("rows", args.rows),
            Arg::write("scores", &mut args.scores),
            Arg::write("sums", &mut args.sums),
            Arg::write("status", &mut args.status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, the checks above made every buffer as long as its
        // index range, and the shared memory is what the kernel lays out; counts in device memory are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

/// `sparse_select`: selects pages by scores.
#[derive(Debug, Clone)]
pub struct Select<F> {
    function: F,
}

/// Arguments of [`Select`].
#[derive(Debug)]
pub struct SelectArgs<'a> {
    /// Shape and rule.
    pub params: &'a SparseSelectParams,
    /// Scores `[rows, columns, max_partitions]`.
    pub scores: &'a View<'a, f32>,
    /// From [`Score`] `[rows, blocks, columns, 2]`; not needed for raw scores.
    pub sums: Option<&'a View<'a, f32>>,
    /// Partitions of each row `[rows]`.
    pub num_partitions: &'a View<'a, u32>,
    /// Pages that a row may select `[rows]`.
    pub budget: &'a View<'a, u32>,
    /// First page of each partition, and the end of the last `[rows, max_partitions + 1]`; by `partition_pages` if absent.
    pub first_page: Option<&'a View<'a, u32>>,
    /// A [`SparseRow`](crate::params::SparseRow) each `[rows]`, updated; all rows select if absent.
    pub rows: Option<ViewMut<'a, u32>>,
    /// State of each row's index `[rows]`, and, out, the state that the selection is made for.
    pub epoch: Option<(&'a View<'a, u32>, ViewMut<'a, u32>)>,
    /// Out: the group's scores `[rows, max_partitions]`.
    pub aggregated: ViewMut<'a, f32>,
    /// Out: pages `[rows, max_selected]`, then `u32::MAX`.
    pub selected: ViewMut<'a, u32>,
    /// Out: partitions to estimate `[rows, max_estimated]`, then `u32::MAX`; given where `max_estimated` is not 0.
    pub estimated: Option<ViewMut<'a, u32>>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function> Select<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new("sparse_select", &[])?)? })
    }

    /// Enqueues one selection.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, args: SelectArgs<'_>) -> Result<(), Error> {
        const KERNEL: &str = "sparse_select";
        let params = args.params;
        let SparseSelectParams { rows, columns, max_partitions, blocks, max_selected, .. } = *params;
        check_sizes(
            KERNEL,
            &[
                ("rows", rows),
                ("columns", columns),
                ("max_partitions", max_partitions),
                ("blocks", blocks),
                ("max_selected", max_selected),
                ("partition_pages", params.partition_pages),
            ],
        )?;
        if columns as usize > MAX_GROUP {
            return Err(Error::argument(KERNEL, "columns", format_args!("at most {MAX_GROUP}"), columns));
        }
        if params.aggregation > SPARSE_SUM {
            let expected = format_args!("0 to {SPARSE_SUM}");
            return Err(Error::argument(KERNEL, "aggregation", expected, params.aggregation));
        }
        // Page numbers are 32-bit.
        if product(&[max_partitions, params.partition_pages]) > 1 << 30 {
            return Err(Error::argument(
                KERNEL,
                "max_partitions",
                "at most 2³⁰ pages of a row",
                max_partitions,
            ));
        }
        if !(0.0..=1.0).contains(&params.estimate) {
            return Err(Error::argument(KERNEL, "estimate", "0 to 1", params.estimate));
        }
        let rows = rows as usize;
        args.scores.check(KERNEL, "scores", product(&[params.rows, columns, max_partitions]), 4)?;
        match args.sums {
            Some(sums) => sums.check(KERNEL, "sums", product(&[params.rows, blocks, columns, 2]), 4)?,
            None if params.aggregation != SPARSE_RAW => {
                return Err(Error::argument(KERNEL, "sums", "given, to aggregate probabilities", "none"));
            }
            None => {}
        }
        args.num_partitions.check(KERNEL, "num_partitions", rows, 4)?;
        args.budget.check(KERNEL, "budget", rows, 4)?;
        if let Some(first_page) = args.first_page {
            first_page.check(KERNEL, "first_page", product(&[params.rows, max_partitions + 1]), 4)?;
        }
        let (epoch, mut selected_epoch) = args.epoch.unzip();
        if let (Some(epoch), Some(selected)) = (epoch, &selected_epoch) {
            epoch.check(KERNEL, "epoch", rows, 4)?;
            selected.check(KERNEL, "selected_epoch", rows, 4)?;
        }
        let (mut aggregated, mut selected, mut estimated, mut status) =
            (args.aggregated, args.selected, args.estimated, args.status);
        let mut states = args.rows;
        if let Some(states) = &states {
            states.check(KERNEL, "rows", rows, 4)?;
        }
        aggregated.check(KERNEL, "aggregated", product(&[params.rows, max_partitions]), 4)?;
        selected.check(KERNEL, "selected", product(&[params.rows, max_selected]), 4)?;
        match &estimated {
            Some(view) => {
                view.check(KERNEL, "estimated", product(&[params.rows, params.max_estimated]), 4)?
            }
            None if params.max_estimated > 0 => {
                return Err(Error::argument(KERNEL, "estimated", "given, where some are estimated", "none"));
            }
            None => {}
        }
        status.check(KERNEL, "status", 1, 8)?;

        let config = LaunchConfig::new(params.rows, 512).shared(SELECT_SHARED_BYTES as u32);
        let kernel_args = [
            Arg::read("scores", args.scores),
            Arg::read_optional("sums", args.sums),
            Arg::read("num_partitions", args.num_partitions),
            Arg::read("budget", args.budget),
            Arg::read_optional("first_page", args.first_page),
            Arg::write_optional("rows", states.as_mut()),
            Arg::read_optional("epoch", epoch),
            Arg::write("aggregated", &mut aggregated),
            Arg::write("selected", &mut selected),
            Arg::write_optional("estimated", estimated.as_mut()),
            Arg::write_optional("selected_epoch", selected_epoch.as_mut()),
            Arg::write("status", &mut status),
            Arg::value("params", params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, the checks above made every buffer as long as its
        // index range, and the shared memory is what the kernel lays out; counts, budgets and first pages, which lie in device
        // memory, are checked by the kernel.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

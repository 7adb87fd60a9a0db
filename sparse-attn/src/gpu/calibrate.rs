//! How many bytes to keep in flight over the host link, measured at start-up.
//!
//! A gather with too few blocks leaves the link idle; one with too many takes SMs and memory bandwidth from the kernels beside it, and
//! gains nothing. [`measure`] times the gather with grids of several sizes against the copy engine; [`choose`] takes the smallest grid
//! that is almost as fast as the best, and says whether separate copies would be faster for runs of this size. It needs no device, so
//! measurements of another day can be judged again.

use std::sync::Arc;

use cuda::cudarc::driver::CudaStream;
use cuda::driver::{Gpu, Mapped, MappedKind, Timer};
use cuda::memory::{View, ViewMut};
use cuda::status::StatusWord;

use super::{Gather, GatherArgs, GatherConfig, GatherPlan, ResolveConfig};
use crate::Error;
use crate::metadata::NONE;
use crate::page::PageSpec;

/// Bytes that a block of the gather keeps in flight: 8 warps of 2 KiB.
pub const BLOCK_BYTES: usize = 16 * 1024;

/// Grids that [`measure`] tries.
pub const GRIDS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];

/// Rates of one machine for runs of one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Bytes of a run.
    pub run_bytes: usize,
    /// Blocks of the gather and its rate in bytes per second, in any order.
    pub gather: Vec<(usize, f64)>,
    /// Rate of one copy of 64 MiB by the copy engine, in bytes per second.
    pub copy_engine: f64,
    /// Rate of one copy per run by the copy engine, in bytes per second.
    pub copies: f64,
}

/// Who moves runs of a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mover {
    /// The gather kernel.
    Gather,
    /// Separate copies by the copy engine, where the host knows which runs.
    Copies,
}

/// What to use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Blocks of the gather: [`GatherConfig::blocks`] and [`StepConfig::link_blocks`](super::StepConfig::link_blocks).
    pub blocks: usize,
    /// Bytes that they keep in flight.
    pub in_flight: usize,
    /// Their rate as a share of one large copy's.
    pub share: f64,
    /// Who moves runs of this size faster. A step's misses are known to the device alone and always take the gather.
    pub mover: Mover,
}

/// The smallest grid whose rate is within `tolerance` (0.03 is usual) of the best one.
///
/// # Errors
/// [`Error::Argument`] when nothing was measured, or a rate or the tolerance makes no sense.
pub fn choose(measured: &Measured, tolerance: f64) -> Result<Choice, Error> {
    let rates = measured.gather.iter().map(|&(_, rate)| rate);
    for rate in rates.clone().chain([measured.copy_engine, measured.copies]) {
        if !(rate.is_finite() && rate > 0.0) {
            return Err(Error::argument("measured", "rates above 0", rate));
        }
    }
    if !(0.0..1.0).contains(&tolerance) {
        return Err(Error::argument("tolerance", "0 to 1", tolerance));
    }
    let best = rates.fold(0.0, f64::max);
    let enough = measured.gather.iter().filter(|(_, rate)| *rate >= best * (1.0 - tolerance));
    let Some(&(blocks, rate)) = enough.min_by_key(|(blocks, _)| *blocks) else {
        return Err(Error::argument("measured", "at least one grid", "none"));
    };
    Ok(Choice {
        blocks,
        in_flight: blocks * BLOCK_BYTES,
        share: rate / measured.copy_engine,
        mover: if measured.copies > rate { Mover::Copies } else { Mover::Gather },
    })
}

/// Times gathers of `runs` random runs of `page` over the link, and copies of as many bytes. Allocates, waits, and takes a few
/// hundred milliseconds for 4096 runs: for start-up.
///
/// # Errors
/// [`Error::Argument`] for sizes out of range, [`Error::Cuda`] when the driver refuses.
pub fn measure(gpu: &Gpu, stream: &Arc<CudaStream>, page: PageSpec, runs: usize) -> Result<Measured, Error> {
    const COPY_BYTES: usize = 64 << 20;
    const REPEATS: usize = 5;
    let failed = |call: &'static str| cuda::driver::failed(call);
    let run_bytes = page.bytes();
    let resolve = ResolveConfig { rows: 1, max_selected: runs, slots: runs, buckets: 2 };
    let config = GatherConfig {
        resolve,
        kv_heads: 1,
        page,
        max_pages: runs,
        host_pages: runs,
        device_pages: runs,
        blocks: 1,
    };
    // A step that visits every run once, in an order without neighbours.
    let stride = (runs / 2 + 1..runs.max(2)).find(|&step| gcd(step, runs) == 1).unwrap_or(1);
    let pages = (0..runs).map(|i| (i * stride % runs) as u32);
    let list: Vec<u32> = pages.zip(0..).flat_map(|(page, place)| [place, page, place, NONE]).collect();
    let identity: Vec<u32> = (0..runs as u32).collect();
    let upload = |words: &[u32]| stream.clone_htod(words).map_err(failed("cuMemcpyHtoDAsync"));
    let (list, count, table) = (upload(&list)?, upload(&[runs as u32])?, upload(&identity)?);
    let host = Mapped::<u8>::zeroed(gpu, (runs * run_bytes).max(COPY_BYTES), MappedKind::Cached)?;
    let mut device =
        stream.alloc_zeros::<u8>((runs * run_bytes).max(COPY_BYTES)).map_err(failed("cuMemAllocAsync"))?;
    let mut owners = upload(&identity)?;
    let mut status = StatusWord::new(stream)?;
    let timer = Timer::new(gpu)?;
    // The best of a few: others on the machine only ever slow a copy down.
    let best = |bytes: usize, enqueue: &mut dyn FnMut() -> Result<(), Error>| -> Result<f64, Error> {
        let mut rate = 0.0f64;
        for _ in 0..REPEATS {
            timer.start(stream)?;
            enqueue()?;
            timer.stop(stream)?;
            rate = rate.max(bytes as f64 / timer.elapsed()?.as_secs_f64());
        }
        Ok(rate)
    };
    let mut gather = Vec::with_capacity(GRIDS.len());
    for blocks in GRIDS {
        let kernel = Gather::prepare(gpu, &GatherPlan::new(GatherConfig { blocks, ..config })?)?;
        let rate = best(runs * run_bytes, &mut || {
            kernel.run(
                stream,
                GatherArgs {
                    misses: &View::device(&list, stream),
                    num_misses: &View::device(&count, stream),
                    host_table: &View::device(&table, stream),
                    slot_table: &View::device(&table, stream),
                    host: &host.view(),
                    device: ViewMut::device(&mut device, stream),
                    owners: ViewMut::device(&mut owners, stream),
                    status: status.view_mut(stream),
                },
            )
        })?;
        gather.push((blocks, rate));
    }
    // SAFETY: no kernel writes this memory, and the mapping outlives the copies: it waits for the context when it is dropped.
    let source = unsafe { host.as_slice() };
    let copy_engine = best(COPY_BYTES, &mut || {
        let mut to = device.slice_mut(..COPY_BYTES);
        stream
            .memcpy_htod(&source[..COPY_BYTES], &mut to)
            .map_err(|error| Error::from(failed("cuMemcpyHtoDAsync")(error)))
    })?;
    let copies = best(runs * run_bytes, &mut || {
        (0..runs).try_for_each(|i| {
            let from = i * stride % runs * run_bytes;
            let mut to = device.slice_mut(i * run_bytes..(i + 1) * run_bytes);
            let copied = stream.memcpy_htod(&source[from..from + run_bytes], &mut to);
            copied.map_err(|error| Error::from(failed("cuMemcpyHtoDAsync")(error)))
        })
    })?;
    Ok(Measured { run_bytes, gather, copy_engine, copies })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(gather: &[(usize, f64)], copies: f64) -> Measured {
        Measured { run_bytes: 8192, gather: gather.to_vec(), copy_engine: 55e9, copies }
    }

    #[test]
    fn the_smallest_grid_that_is_fast_enough() {
        for (name, gather, copies, blocks, mover) in [
            (
                "a knee",
                &[(1, 12e9), (2, 24e9), (4, 46e9), (8, 50e9), (16, 50.5e9)][..],
                5e9,
                8,
                Mover::Gather,
            ),
            ("any order", &[(16, 50e9), (4, 49e9), (8, 50e9)], 5e9, 4, Mover::Gather),
            ("more blocks are worse", &[(2, 40e9), (4, 50e9), (8, 30e9)], 5e9, 4, Mover::Gather),
            ("no knee", &[(1, 10e9), (2, 20e9), (4, 40e9)], 5e9, 4, Mover::Gather),
            ("copies win on large runs", &[(4, 35e9), (8, 35e9)], 51e9, 4, Mover::Copies),
        ] {
            let choice = choose(&measured(gather, copies), 0.03).unwrap();
            assert_eq!((choice.blocks, choice.mover), (blocks, mover), "{name}");
            assert_eq!(choice.in_flight, blocks * BLOCK_BYTES, "{name}");
            let rate = gather.iter().find(|(grid, _)| *grid == blocks).unwrap().1;
            assert!((choice.share - rate / 55e9).abs() < 1e-12, "{name}");
        }
        // A looser tolerance takes the smaller grid.
        let knee = measured(&[(4, 46e9), (8, 50e9)], 5e9);
        assert_eq!([0.0, 0.1].map(|tolerance| choose(&knee, tolerance).unwrap().blocks), [8, 4]);
    }

    #[test]
    fn measurements_that_make_no_sense_are_refused() {
        for (measured, tolerance, named) in [
            (measured(&[], 1e9), 0.03, "measured"),
            (measured(&[(1, f64::NAN)], 1e9), 0.03, "measured"),
            (measured(&[(1, 1e9)], 0.0), 0.03, "measured"),
            (measured(&[(1, 1e9)], 1e9), 1.0, "tolerance"),
        ] {
            match choose(&measured, tolerance) {
                Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
                other => panic!("{named}: {other:?}"),
            }
        }
    }

    #[test]
    fn every_run_is_visited_once() {
        assert_eq!([gcd(12, 18), gcd(7, 1), gcd(0, 5)], [6, 1, 5]);
    }
}

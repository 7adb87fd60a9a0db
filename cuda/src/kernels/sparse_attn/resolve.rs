//! One step of bucketed LRU: `sparse_resolve`.

use crate::Error;
use crate::launch::{Arg, Device, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::SparseResolveParams;
use crate::table::Instance;

const KERNEL: &str = "sparse_resolve";
const THREADS: u32 = 256;

/// Words of a row's [`SparseCounts`](crate::params::SparseCounts).
pub const COUNTS: usize = size_of::<crate::params::SparseCounts>() / size_of::<u64>();

/// Most pages that a row may select.
pub const MAX_SELECTED: usize = 4096;
/// Most slots of a row.
pub const MAX_SLOTS: usize = 16384;
/// Most ages: the kernel keeps three more states of a slot in a byte.
pub const MAX_BUCKETS: usize = 252;

/// Entries of the hash table over a selection: at most half of them are used.
const fn hash_entries(max_selected: usize) -> usize {
    (2 * max_selected).next_power_of_two()
}

/// Dynamic shared memory of a block, in bytes: the histogram of 256 states and 14 words, the hash table of 6 bytes an entry,
/// slot and miss of each selected page, and the state of each slot.
pub const fn resolve_shared_bytes(max_selected: usize, slots: usize) -> usize {
    (256 + 14) * 4 + hash_entries(max_selected) * 6 + max_selected * 4 + slots
}

/// `sparse_resolve`: makes the selected pages of every (request, KV head) resident and lists what has to be fetched.
#[derive(Debug, Clone)]
pub struct Resolve<F> {
    function: F,
}

/// Arguments of [`Resolve`].
#[derive(Debug)]
pub struct ResolveArgs<'a> {
    /// (Request, KV head) pairs.
    pub rows: usize,
    /// Pages that a row may select, at most [`MAX_SELECTED`].
    pub max_selected: usize,
    /// Slots of a row, at most [`MAX_SLOTS`].
    pub slots: usize,
    /// Ages that replacement tells apart: 2 to [`MAX_BUCKETS`].
    pub buckets: usize,
    /// Pages `[rows, max_selected]`, each once; `u32::MAX` is padding.
    pub selected: &'a View<'a, u32>,
    /// A [`SparseRow`](crate::params::SparseRow) each `[rows]`, updated; all rows take part if absent.
    pub states: Option<ViewMut<'a, u32>>,
    /// State of the row's index that the selection was made for, and the state now, `[rows]` each.
    pub epochs: Option<[&'a View<'a, u32>; 2]>,
    /// Whether pages are fetched ahead between steps: nothing ages, and what finds no slot stays away.
    pub prefetch: bool,
    /// Page of each slot `[rows, slots]`, `u32::MAX` for a free one.
    pub owners: ViewMut<'a, u32>,
    /// Age of each slot `[rows, slots]`.
    pub ages: ViewMut<'a, u8>,
    /// Not 0 for slots whose page is not in host memory yet `[rows, slots]`.
    pub dirty: &'a View<'a, u8>,
    /// Slot of each selected page `[rows, max_selected]`, wholly written.
    pub slot_of: ViewMut<'a, u32>,
    /// Pages to fetch `[rows, max_selected, 4]`, as [`SparseMiss`](crate::params::SparseMiss): place, page, slot, evicted. The
    /// first `num_misses` of a row are written.
    pub misses: ViewMut<'a, u32>,
    /// Pages to fetch of each row `[rows]`.
    pub num_misses: ViewMut<'a, u32>,
    /// Counts `[rows, 8]`, as [`SparseCounts`](crate::params::SparseCounts); added to.
    pub counts: ViewMut<'a, u64>,
    /// Status word.
    pub status: ViewMut<'a, u64>,
    /// Start while the previous kernel of the stream drains.
    pub programmatic: bool,
}

impl<F: Function> Resolve<F> {
    /// Compiles and loads the kernel.
    pub fn prepare<D: Device<Function = F>>(device: &D) -> Result<Self, Error> {
        Ok(Self { function: device.load(&Instance::new(KERNEL, &[])?)? })
    }

    /// Enqueues one step.
    ///
    /// # Errors
    /// [`Error::Argument`] names an argument that is out of range, too short, misaligned or in the wrong space.
    pub fn launch(&self, queue: &F::Queue, mut args: ResolveArgs<'_>) -> Result<(), Error> {
        for (argument, value, least, most) in [
            ("rows", args.rows, 1, i32::MAX as usize),
            ("max_selected", args.max_selected, 1, MAX_SELECTED),
            ("slots", args.slots, 1, MAX_SLOTS),
            ("buckets", args.buckets, 2, MAX_BUCKETS),
        ] {
            if !(least..=most).contains(&value) {
                return Err(Error::argument(KERNEL, argument, format_args!("{least} to {most}"), value));
            }
        }
        let (places, slots) =
            (args.rows.saturating_mul(args.max_selected), args.rows.saturating_mul(args.slots));
        args.selected.check(KERNEL, "selected", places, 4)?;
        if let Some(states) = &args.states {
            states.check(KERNEL, "states", args.rows, 4)?;
        }
        if let Some([selected_epoch, epoch]) = args.epochs {
            selected_epoch.check(KERNEL, "selected_epoch", args.rows, 4)?;
            epoch.check(KERNEL, "epoch", args.rows, 4)?;
        }
        args.owners.check(KERNEL, "owners", slots, 4)?;
        args.ages.check(KERNEL, "ages", slots, 1)?;
        args.dirty.check(KERNEL, "dirty", slots, 1)?;
        args.slot_of.check(KERNEL, "slot_of", places, 4)?;
        args.misses.check(KERNEL, "misses", places.saturating_mul(4), 4)?;
        args.num_misses.check(KERNEL, "num_misses", args.rows, 4)?;
        args.counts.check(KERNEL, "counts", args.rows.saturating_mul(COUNTS), 8)?;
        args.status.check(KERNEL, "status", 1, 8)?;

        let params = SparseResolveParams {
            rows: args.rows as u32,
            max_selected: args.max_selected as u32,
            slots: args.slots as u32,
            buckets: args.buckets as u32,
            hash_entries: hash_entries(args.max_selected) as u32,
            prefetch: u32::from(args.prefetch),
        };
        let shared = resolve_shared_bytes(args.max_selected, args.slots);
        let mut config = LaunchConfig::new(params.rows, THREADS).shared(shared as u32);
        config.programmatic = args.programmatic;
        let kernel_args = [
            Arg::read("selected", args.selected),
            Arg::write_optional("rows", args.states.as_mut()),
            Arg::read_optional("selected_epoch", args.epochs.map(|epochs| epochs[0])),
            Arg::read_optional("epoch", args.epochs.map(|epochs| epochs[1])),
            Arg::write("owners", &mut args.owners),
            Arg::write("ages", &mut args.ages),
            Arg::read("dirty", args.dirty),
            Arg::write("slot_of", &mut args.slot_of),
            Arg::write("misses", &mut args.misses),
            Arg::write("num_misses", &mut args.num_misses),
            Arg::write("counts", &mut args.counts),
            Arg::write("status", &mut args.status),
            Arg::value("params", &params),
        ];
        // SAFETY: the arguments are the kernel's parameters in order and type, the checks above made every buffer as long as the
        // kernel's index range for this grid, and the shared memory is what the kernel lays out.
        unsafe { self.function.launch(queue, &config, &kernel_args) }
    }
}

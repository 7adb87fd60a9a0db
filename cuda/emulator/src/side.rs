//! Copies beside emulated kernels, which can only be as wrong as they would be on a GPU if they run early or late.

use cuda::Error;
use cuda::memory::{Space, View, ViewMut};
use cuda::side_queue::{SideQueue, check_copy};

use crate::Queue;

/// When a [`SideCopies`] runs what it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyTime {
    /// As early as a copy engine could: at once.
    Early,
    /// As late as it may: when kernels are told to wait for it. Whoever forgets to wait reads what was there before.
    Late,
}

/// A side queue of host copies. A copy into a slot whose last reader it was not told to wait for is an error.
#[derive(Debug)]
pub struct SideCopies {
    time: CopyTime,
    /// Launches of the main queue that copies wait for.
    behind: u64,
    slots: Vec<Slot>,
    /// Copies that have not run, in order.
    late: Vec<Copy>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// Launches of the main queue when it was told to wait for the slot, and could begin to read it.
    read_from: Option<u64>,
    /// Whether it was ever filled.
    filled: bool,
}

#[derive(Debug, Clone, Copy)]
struct Copy {
    slot: usize,
    from: u64,
    to: u64,
    bytes: usize,
}

impl SideCopies {
    /// A side queue with this many slots.
    pub fn new(time: CopyTime, slots: usize) -> Self {
        SideCopies { time, behind: 0, slots: vec![Slot::default(); slots], late: Vec::new() }
    }

    /// Copies that no kernel was told to wait for.
    pub fn unjoined(&self) -> usize {
        self.late.len()
    }
}

impl SideQueue for SideCopies {
    type Main = Queue;

    fn slots(&self) -> usize {
        self.slots.len()
    }

    fn after(&mut self, main: &Queue) -> Result<(), Error> {
        self.behind = main.statistics().launches;
        Ok(())
    }

    unsafe fn copy(
        &mut self,
        slot: usize,
        from: &View<'_, u8>,
        to: &mut ViewMut<'_, u8>,
    ) -> Result<(), Error> {
        check_copy(self.slots.len(), slot, from, to)?;
        for (argument, space) in [("from", from.space()), ("to", to.space())] {
            if space != Space::Host {
                return Err(Error::argument("copy", argument, Space::Host, space));
            }
        }
        let place = &mut self.slots[slot];
        let overtakes = match place.read_from {
            // The launch behind the mark is the slot's reader.
            Some(launches) => self.behind <= launches,
            None => place.filled,
        };
        if overtakes {
            let expected = "a slot whose last reader is waited for";
            return Err(Error::argument("copy", "slot", expected, "one that may still be read"));
        }
        *place = Slot { filled: true, ..Slot::default() };
        let copy = Copy { slot, from: from.address(), to: to.address(), bytes: from.bytes() };
        match self.time {
            // SAFETY: by the caller's promise both are valid and nobody else uses them now.
            CopyTime::Early => unsafe { copy.run() },
            CopyTime::Late => self.late.push(copy),
        }
        Ok(())
    }

    fn before(&mut self, main: &Queue, slot: usize) -> Result<(), Error> {
        let slots = self.slots.len();
        if slot >= slots {
            return Err(Error::argument("copy", "slot", format_args!("below {slots}"), slot));
        }
        let end = self.late.iter().rposition(|copy| copy.slot == slot).map_or(0, |last| last + 1);
        for copy in self.late.drain(..end) {
            // SAFETY: by the promise of whoever asked for the copy both are valid until it is done.
            unsafe { copy.run() };
        }
        self.slots[slot].read_from = Some(main.statistics().launches);
        Ok(())
    }

    fn join(&mut self, main: &Queue) -> Result<(), Error> {
        for copy in self.late.drain(..) {
            // SAFETY: as in `before`.
            unsafe { copy.run() };
        }
        // A slot whose reader has not been launched gets none any more.
        let launches = main.statistics().launches;
        let unread = |slot: &&mut Slot| slot.read_from.is_none_or(|before| before >= launches);
        self.slots.iter_mut().filter(unread).for_each(|slot| *slot = Slot::default());
        Ok(())
    }
}

impl Copy {
    /// Copies the bytes.
    ///
    /// # Safety
    /// Source and destination are valid, do not overlap, and nobody else uses them.
    unsafe fn run(self) {
        // SAFETY: by this function's contract.
        unsafe { std::ptr::copy_nonoverlapping(self.from as *const u8, self.to as *mut u8, self.bytes) }
    }
}

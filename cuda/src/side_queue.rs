//! Copies beside kernels: a second queue fills the slots of a ring while kernels of the main queue read others.

use crate::Error;
use crate::memory::{View, ViewMut};

/// A queue of copies beside the queue of kernels, and the marks by which the two wait for each other.
///
/// A slot of the ring goes round like this, which keeps a copy from overtaking its reader and a reader from overtaking its copy:
///
/// 1. [`after`](Self::after): what comes now waits for the kernels so far, the slot's last reader among them.
/// 2. [`copy`](Self::copy) fills the slot.
/// 3. [`before`](Self::before): the kernels that come now wait for that copy.
///
/// Once `before` was called for the last copy, the main queue has everything of this one behind it: it is joined, as the capture
/// of a graph demands. Whoever stops in the middle calls [`join`](Self::join), which does the same wherever the two are.
pub trait SideQueue {
    /// The queue that kernels run on.
    type Main: ?Sized;

    /// Slots that are marked apart.
    fn slots(&self) -> usize;

    /// Copies enqueued from now on wait for what `main` has so far.
    ///
    /// # Errors
    /// [`Error::Argument`] for a main queue of another device, or the side queue itself; [`Error::Driver`].
    fn after(&mut self, main: &Self::Main) -> Result<(), Error>;

    /// Enqueues a copy of all of `from` to the start of `to`, and marks it as the slot's last.
    ///
    /// # Errors
    /// [`Error::Argument`] for a slot that there is not, memory of elsewhere, or a `to` that is too short; [`Error::Driver`].
    ///
    /// # Safety
    /// Both must be valid until the copy is done, `from` unwritten and `to` untouched except by kernels behind
    /// [`before`](Self::before) and before [`after`](Self::after).
    unsafe fn copy(
        &mut self,
        slot: usize,
        from: &View<'_, u8>,
        to: &mut ViewMut<'_, u8>,
    ) -> Result<(), Error>;

    /// Kernels enqueued on `main` from now on wait for the slot's last copy, and so for all copies before it.
    ///
    /// # Errors
    /// As [`after`](Self::after), and [`Error::Argument`] for a slot that there is not.
    fn before(&mut self, main: &Self::Main, slot: usize) -> Result<(), Error>;

    /// What is enqueued on `main` from now on waits for everything of this queue: its copies, and what they wait for, even where no
    /// copy has followed [`after`](Self::after).
    ///
    /// # Errors
    /// As [`after`](Self::after).
    fn join(&mut self, main: &Self::Main) -> Result<(), Error>;
}

/// What both back ends check of a copy.
///
/// # Errors
/// [`Error::Argument`] names what does not fit.
pub fn check_copy(slots: usize, slot: usize, from: &View<'_, u8>, to: &ViewMut<'_, u8>) -> Result<(), Error> {
    if slot >= slots {
        return Err(Error::argument("copy", "slot", format_args!("below {slots}"), slot));
    }
    to.check("copy", "to", from.len(), 1)
}

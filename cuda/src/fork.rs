//! Work beside the main queue: a side queue waits for the main one, runs along, and is joined again.
//!
//! ```no_run
//! # use longkv_cuda as cuda;
//! # fn copies(main: &cudarc::driver::CudaStream, side: &cudarc::driver::CudaStream, view: cuda::memory::View<'_, u32>)
//! # -> Result<(), cuda::Error> {
//! use cuda::fork::Fork;
//!
//! let fork = Fork::new(main, side)?; // side goes on when main has come this far
//! // SAFETY: nobody writes these words before the join.
//! let on_side = unsafe { fork.views() }.view(&view)?; // a view that was made for main
//! // … launches on `fork.side()`, and others on main …
//! fork.join() // main goes on when side is done
//! # }
//! ```

use bytemuck::Pod;

use crate::Error;
use crate::memory::{StreamHandle, View, ViewMut};

/// What launches are enqueued on, in order.
pub trait Queue {
    /// Makes what is enqueued here from now on wait for what is on `other` so far. Does not wait itself.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver refuses.
    fn follow(&self, other: &Self) -> Result<(), Error>;

    /// What a view carries that was made for this queue.
    fn handle(&self) -> StreamHandle;
}

#[cfg(feature = "driver")]
impl Queue for cudarc::driver::CudaStream {
    fn follow(&self, other: &Self) -> Result<(), Error> {
        if self.cu_stream() == other.cu_stream() {
            return Ok(());
        }
        self.join(other).map_err(crate::driver::failed("cuStreamWaitEvent"))
    }

    fn handle(&self) -> StreamHandle {
        Some(self.cu_stream() as usize)
    }
}

/// A side queue that has waited for a main one. Dropping it joins them too, so that no error path leaves work behind that
/// the main queue does not wait for; in a capture that would invalidate the graph.
#[derive(Debug)]
pub struct Fork<'q, Q: Queue + ?Sized> {
    main: &'q Q,
    side: &'q Q,
    open: bool,
}

impl<'q, Q: Queue + ?Sized> Fork<'q, Q> {
    /// Lets `side` go on from where `main` is now. The two may be the same queue.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver refuses.
    pub fn new(main: &'q Q, side: &'q Q) -> Result<Self, Error> {
        side.follow(main)?;
        Ok(Fork { main, side, open: true })
    }

    /// The side queue.
    pub fn side(&self) -> &'q Q {
        self.side
    }

    /// Makes views of the main queue's memory for launches on the side queue.
    ///
    /// # Safety
    /// Between the fork and its join no launch on the main queue writes what launches on the side queue read through these views, or
    /// uses what they write, other than by atomics; and the fork is joined or dropped before the memory is used otherwise.
    pub unsafe fn views(&self) -> SideViews<'_, 'q, Q> {
        SideViews { fork: self }
    }

    fn check(&self, found: StreamHandle) -> Result<StreamHandle, Error> {
        match found {
            // Views that fit every queue go on to do so.
            None => Ok(None),
            found if found == self.main.handle() => Ok(self.side.handle()),
            _ => Err(Error::argument("fork", "view", "one made for the main queue", "one made for another")),
        }
    }

    /// Lets the main queue go on from where the side queue is now.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver refuses.
    pub fn join(mut self) -> Result<(), Error> {
        self.open = false;
        self.main.follow(self.side)
    }
}

impl<Q: Queue + ?Sized> Drop for Fork<'_, Q> {
    fn drop(&mut self) {
        if self.open {
            // Whoever drops a fork has an error of his own to report.
            let _ = self.main.follow(self.side);
        }
    }
}

/// Views for the side queue of a [`Fork`]; see [`Fork::views`].
#[derive(Debug)]
pub struct SideViews<'f, 'q, Q: Queue + ?Sized> {
    fork: &'f Fork<'q, Q>,
}

impl<Q: Queue + ?Sized> SideViews<'_, '_, Q> {
    /// A view that was made for the main queue, for the side queue.
    ///
    /// # Errors
    /// [`Error::Argument`] when it was made for another queue.
    pub fn view<'a, T: Pod>(&self, view: &'a View<'_, T>) -> Result<View<'a, T>, Error> {
        let handle = self.fork.check(view.stream())?;
        Ok(view.part(0..view.len())?.for_stream(handle))
    }

    /// The same for memory that is written.
    ///
    /// # Errors
    /// [`Error::Argument`] when it was made for another queue.
    pub fn view_mut<'a, T: Pod>(&self, view: &'a mut ViewMut<'_, T>) -> Result<ViewMut<'a, T>, Error> {
        let handle = self.fork.check(view.stream())?;
        Ok(view.reborrow().for_stream(handle))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::memory::Space;

    /// A queue that notes whom it waits for.
    #[derive(Debug)]
    struct Noted<'a> {
        number: usize,
        waits: &'a RefCell<Vec<(usize, usize)>>,
    }

    impl Queue for Noted<'_> {
        fn follow(&self, other: &Self) -> Result<(), Error> {
            self.waits.borrow_mut().push((self.number, other.number));
            Ok(())
        }

        fn handle(&self) -> StreamHandle {
            Some(self.number)
        }
    }

    #[test]
    fn a_fork_waits_on_both_ends_once() {
        let waits = RefCell::new(Vec::new());
        let queue = |number| Noted { number, waits: &waits };
        let (main, side) = (queue(1), queue(2));
        Fork::new(&main, &side).unwrap().join().unwrap();
        assert_eq!(waits.take(), [(2, 1), (1, 2)]);
        // An error on the way joins too.
        drop(Fork::new(&main, &side).unwrap());
        assert_eq!(waits.take(), [(2, 1), (1, 2)]);
    }

    #[test]
    fn views_go_to_the_side_queue() {
        let waits = RefCell::new(Vec::new());
        let queue = |number| Noted { number, waits: &waits };
        let (main, side) = (queue(1), queue(2));
        let fork = Fork::new(&main, &side).unwrap();
        let made_for = |stream| {
            // SAFETY: nobody reads through this view.
            unsafe { View::<u32>::from_raw(0, 4, Space::Host) }.for_stream(stream)
        };
        // SAFETY: nothing is launched.
        let views = unsafe { fork.views() };
        let side_of = |view: &View<'_, u32>| views.view(view).map(|view| view.stream());
        assert_eq!(side_of(&made_for(Some(1))).unwrap(), Some(2));
        assert_eq!(side_of(&made_for(None)).unwrap(), None, "a view for every queue stays one");
        let refused = side_of(&made_for(Some(3))).unwrap_err().to_string();
        assert!(refused.contains("made for the main queue"), "{refused}");
        let mut words = [0u32; 4];
        let mut view = ViewMut::host(&mut words).for_stream(Some(1));
        assert_eq!(views.view_mut(&mut view).unwrap().stream(), Some(2));
        assert_eq!(view.stream(), Some(1));
    }
}

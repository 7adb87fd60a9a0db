//! One block on its way round: wait for it, post it on, compute on it meanwhile.

use std::sync::Arc;

use crate::Error;
use crate::transport::{Buffer, Operation, Tag, Ticket, Transport};

/// Two buffers that take turns: the block that is computed on, which is being sent on at the same time, and the one that the next
/// block arrives in. A buffer is received into again only when nothing reads it any more; the types see to that.
#[derive(Debug)]
pub(super) struct Rotation {
    operation: Operation,
    rank: usize,
    ranks: usize,
    /// Turns so far.
    step: usize,
    held: Arc<Buffer>,
    spare: Option<Buffer>,
    /// The next block, where it was waited for before its turn.
    received: Option<Buffer>,
    ticket: Option<Ticket>,
}

impl Rotation {
    /// Starts with the own block. No block of any rank has more than `max_len` bytes.
    pub(super) fn new(operation: Operation, rank: usize, ranks: usize, own: Buffer, max_len: usize) -> Self {
        let spare = (ranks > 1).then(|| Buffer::new(max_len));
        Rotation { operation, rank, ranks, step: 0, held: Arc::new(own), spare, received: None, ticket: None }
    }

    /// Turns so far.
    pub(super) fn step(&self) -> usize {
        self.step
    }

    /// Waits for the next block, posts it on, and gives it; the rank that it is of is `source(rank, step)`. `next_len` is the length in
    /// bytes of the block after it.
    pub(super) fn turn<X: Transport + ?Sized>(
        &mut self,
        transport: &mut X,
        next_len: usize,
    ) -> Result<&Buffer, Error> {
        if self.step > 0 {
            self.drain(transport)?;
            let next = self.received.take().expect("a block was posted in the turn before");
            let old = std::mem::replace(&mut self.held, Arc::new(next));
            let old = Arc::try_unwrap(old).map_err(|_| {
                Error::argument(
                    "transport",
                    "a sent buffer that nobody reads after the wait",
                    "one still shared",
                )
            })?;
            self.spare = Some(old);
        }
        if self.step + 1 < self.ranks {
            let tag = Tag::new(self.operation, self.step);
            let (right, left) = ((self.rank + 1) % self.ranks, (self.rank + self.ranks - 1) % self.ranks);
            let held = Arc::get_mut(&mut self.held).expect("a block that just arrived has one owner");
            transport.seal(held, tag);
            let mut recv = self.spare.take().expect("the buffer of two turns before");
            recv.resize(next_len);
            self.ticket = Some(transport.exchange(tag, right, self.held.clone(), left, recv)?);
        }
        self.step += 1;
        Ok(&self.held)
    }

    /// Waits for what is under way, so that the transport is free for others.
    pub(super) fn drain<X: Transport + ?Sized>(&mut self, transport: &mut X) -> Result<(), Error> {
        if let Some(ticket) = self.ticket.take() {
            self.received = Some(transport.wait(ticket)?);
        }
        Ok(())
    }
}

//! One block on its way round: wait for it, post it on, compute on it meanwhile.

use std::sync::Arc;

use crate::Error;
use crate::transport::{Buffer, Operation, Tag, Ticket, Transport};

/// What carries the blocks of a ring from rank to rank.
pub trait Carrier {
    /// Memory of a block.
    type Block;

    /// Starts an exchange and returns: `send` is a rank, the block that it gets and how many bytes of it; `recv` is a rank, space for its block
    /// and how many bytes this has. What is sent has no other owner when this is called, and may have some until
    /// [`take`](Self::take).
    ///
    /// # Errors
    /// As [`Transport::exchange`].
    fn post(
        &mut self,
        tag: Tag,
        send: (usize, &mut Arc<Self::Block>, usize),
        recv: (usize, Self::Block, usize),
    ) -> Result<Ticket, Error>;

    /// Waits until the block is here and nobody else owns what was held.
    ///
    /// # Errors
    /// As [`Transport::wait`].
    fn take(&mut self, ticket: Ticket) -> Result<Self::Block, Error>;
}

/// Carries buffers of the host.
#[derive(Debug)]
pub struct HostCarrier<'a, X: ?Sized>(pub &'a mut X);

impl<X: Transport + ?Sized> Carrier for HostCarrier<'_, X> {
    type Block = Buffer;

    fn post(
        &mut self,
        tag: Tag,
        (to, held, send_len): (usize, &mut Arc<Buffer>, usize),
        (from, mut space, recv_len): (usize, Buffer, usize),
    ) -> Result<Ticket, Error> {
        let block = Arc::get_mut(held)
            .ok_or_else(|| Error::argument("held", "a block of one owner", "one that is shared"))?;
        block.resize(send_len);
        self.0.seal(block, tag);
        space.resize(recv_len);
        self.0.exchange(tag, to, held.clone(), from, space)
    }

    fn take(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        self.0.wait(ticket)
    }
}

/// Two blocks that take turns: the one that is computed on, which is being sent on at the same time, and the one that the next
/// arrives in. A block is received into again only when nothing reads it any more; the types see to that.
#[derive(Debug)]
pub(crate) struct Rotation<B> {
    operation: Operation,
    rank: usize,
    ranks: usize,
    /// Turns so far.
    step: usize,
    /// Bytes of the block that is held.
    len: usize,
    held: Arc<B>,
    spare: Option<B>,
    /// The next block, where it was waited for before its turn.
    received: Option<B>,
    ticket: Option<Ticket>,
}

impl<B> Rotation<B> {
    /// Starts with the own block, of `len` bytes. No block of any rank has more than fit `own` and `spare`, which a ring of one does
    /// without.
    pub(crate) fn new(
        operation: Operation,
        rank: usize,
        ranks: usize,
        (own, len): (B, usize),
        spare: Option<B>,
    ) -> Self {
        let held = Arc::new(own);
        Rotation { operation, rank, ranks, step: 0, len, held, spare, received: None, ticket: None }
    }

    /// Turns so far.
    pub(crate) fn step(&self) -> usize {
        self.step
    }

    /// Waits for the next block, posts it on, and gives it; the rank that it is of is `source(rank, step)`. `next_len` is the length in
    /// bytes of the block after it.
    pub(crate) fn turn<C: Carrier<Block = B>>(
        &mut self,
        carrier: &mut C,
        next_len: usize,
    ) -> Result<&B, Error> {
        if self.step > 0 {
            self.drain(carrier)?;
            let next = self.received.take().ok_or_else(|| {
                Error::argument("ring", "a ring whose steps have all succeeded", "one that has failed")
            })?;
            let old = std::mem::replace(&mut self.held, Arc::new(next));
            let old = Arc::try_unwrap(old).map_err(|_| {
                Error::argument(
                    "transport",
                    "a sent block that nobody reads after the wait",
                    "one still shared",
                )
            })?;
            self.spare = Some(old);
        }
        if self.step + 1 < self.ranks {
            let tag = Tag::new(self.operation, self.step);
            let (right, left) = ((self.rank + 1) % self.ranks, (self.rank + self.ranks - 1) % self.ranks);
            let space = self.spare.take().ok_or_else(|| {
                Error::argument("ring", "a ring whose steps have all succeeded", "one that has failed")
            })?;
            let len = std::mem::replace(&mut self.len, next_len);
            self.ticket = Some(carrier.post(tag, (right, &mut self.held, len), (left, space, next_len))?);
        }
        self.step += 1;
        Ok(&self.held)
    }

    /// Waits for what is under way, so that the transport is free for others.
    pub(crate) fn drain<C: Carrier<Block = B>>(&mut self, carrier: &mut C) -> Result<(), Error> {
        if let Some(ticket) = self.ticket.take() {
            self.received = Some(carrier.take(ticket)?);
        }
        Ok(())
    }

    /// The two blocks, where nobody else has them: what is held, and the other.
    #[cfg(feature = "cuda")]
    pub(crate) fn into_blocks(self) -> Option<(B, Option<B>)> {
        Some((Arc::try_unwrap(self.held).ok()?, self.spare.or(self.received)))
    }
}

//! Ranks as threads of one process on one GPU: each has a stream that blocks move on, and blocks are copied device to device.
//!
//! A block is copied by whichever of its two ranks posts second, onto the receiver's stream, which waits for the event after which the
//! sender's block is whole and for the one after which the receiver's space is free. So a copy runs while both ranks compute, whether or
//! not anybody waits for it, and all hazards are ordered on the device; the control transport orders the threads.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cuda::cudarc::driver::{CudaEvent, CudaSlice, CudaStream, CudaView, CudaViewMut};

use super::transport::{DeviceTransport, Incoming, Outgoing, UnderWay, check_exchange, failed, poll};
use crate::transport::{Buffer, Tag, Ticket, Traffic, Transport};
use crate::{Error, PeerFault};

/// What the ranks of one group share: blocks and spaces that were posted, and copies under way. It ends with the group: what a fault leaves
/// behind is never matched with what a group posts that was made anew.
#[derive(Debug, Clone, Default)]
struct Shared {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Blocks that were posted and not matched yet.
    letters: HashMap<Channel, VecDeque<Letter>>,
    /// Spaces that were posted and not matched yet.
    slots: HashMap<Channel, VecDeque<Slot>>,
    /// Copies by (receiver, ticket).
    arriving: HashMap<(usize, u64), Copying<CudaSlice<u8>>>,
    /// The same ones by (sender, ticket).
    leaving: HashMap<(usize, u64), Copying<Arc<CudaSlice<u8>>>>,
}

/// (from, to, tag): blocks of a channel stay in order.
type Channel = (usize, usize, Tag);

#[derive(Debug)]
struct Letter {
    ticket: u64,
    block: Arc<CudaSlice<u8>>,
    len: usize,
    /// After it the block is whole.
    ready: Arc<CudaEvent>,
}

#[derive(Debug)]
struct Slot {
    ticket: u64,
    space: CudaSlice<u8>,
    len: usize,
    /// After it nothing reads or writes the space.
    ready: Arc<CudaEvent>,
    /// The receiver's.
    stream: Arc<CudaStream>,
}

/// A copy as one of its ends sees it.
#[derive(Debug)]
struct Copying<B> {
    memory: UnderWay<B>,
    /// After it the other end's memory is ready.
    other_ready: Arc<CudaEvent>,
}

impl Shared {
    fn with<R>(&self, body: impl FnOnce(&mut State) -> R) -> R {
        body(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One rank of several on one GPU.
#[derive(Debug)]
pub struct OneGpu<X> {
    control: X,
    shared: Shared,
    stream: Arc<CudaStream>,
    next: u64,
    pending: HashMap<u64, Pending>,
    traffic: Traffic,
}

#[derive(Debug)]
struct Pending {
    tag: Tag,
    to: usize,
    from: usize,
    recv_len: usize,
    /// After it this rank's block is whole and its space free.
    ready: Arc<CudaEvent>,
    /// Says that both peers have posted.
    announced: Ticket,
}

impl<X: Transport> OneGpu<X> {
    /// The ranks of a group, each of its end of the control transport and the stream that it moves blocks on, which is the caller's and its
    /// own. After a fault the group is spent: another is made of the control's new ends.
    pub fn group(ends: impl IntoIterator<Item = (X, Arc<CudaStream>)>) -> Vec<Self> {
        let shared = Shared::default();
        let end = |(control, stream)| {
            let (pending, traffic) = (HashMap::new(), Traffic::default());
            OneGpu { control, shared: shared.clone(), stream, next: 0, pending, traffic }
        };
        ends.into_iter().map(end).collect()
    }

    /// The host's transport.
    pub fn into_control(self) -> X {
        self.control
    }

    /// Enqueues the copy of a block that was matched with a space.
    fn copy(&mut self, (from, to, tag): Channel, letter: Letter, slot: Slot) -> Result<(), Error> {
        let Letter { ticket: sent, block, len, ready: whole } = letter;
        let Slot { ticket: asked, mut space, len: expected, ready: free, stream } = slot;
        if len != expected {
            let fault = PeerFault::Garbage(format!("{len} bytes instead of {expected}"));
            return Err(self.control.accuse(from, tag, fault));
        }
        let enqueued = enqueue(&stream, [&whole, &free], &block.slice(..len), &mut space.slice_mut(..len));
        let enqueued = enqueued.inspect_err(|error| self.control.abort(tag, &error.to_string()));
        let done = match enqueued {
            Ok(done) => Arc::new(done),
            Err(error) => {
                // The copy may be under way without its event.
                std::mem::forget((block, space));
                return Err(error);
            }
        };
        let arriving = Copying { memory: UnderWay::until(done.clone(), space), other_ready: whole };
        let leaving = Copying { memory: UnderWay::until(done, block), other_ready: free };
        self.shared.with(|state| {
            state.arriving.insert((to, asked), arriving);
            state.leaving.insert((from, sent), leaving);
        });
        Ok(())
    }

    /// Waits for a copy with `peer`, which goes on the stream of rank `receiver`.
    fn complete<B>(
        &mut self,
        start: Instant,
        pending: &Pending,
        (peer, receiver): (usize, usize),
        take: impl Fn(&mut State) -> Option<Copying<B>>,
    ) -> Result<B, Error> {
        let (rank, tag, shared) = (self.control.rank(), pending.tag, self.shared.clone());
        let copying = poll(&mut self.control, start, tag, || peer, |_| Ok(shared.with(&take)))?;
        let Copying { memory, other_ready } = copying;
        let late = || match () {
            _ if !pending.ready.is_complete() => rank,
            _ if !other_ready.is_complete() => peer,
            _ => receiver,
        };
        memory.complete(&mut self.control, start, tag, late)
    }

    /// An empty message of the control transport to one rank, for one from another.
    fn signal(&mut self, tag: Tag, to: usize, from: usize) -> Result<Ticket, Error> {
        let mut nothing = Buffer::new(0);
        self.control.seal(&mut nothing, tag);
        self.control.exchange(tag, to, Arc::new(nothing), from, Buffer::new(0))
    }
}

/// Enqueues a copy after two events, and gives the one after it.
fn enqueue(
    stream: &Arc<CudaStream>,
    after: [&CudaEvent; 2],
    block: &CudaView<'_, u8>,
    space: &mut CudaViewMut<'_, u8>,
) -> Result<CudaEvent, Error> {
    for event in after {
        stream.wait(event).map_err(failed("cuStreamWaitEvent"))?;
    }
    if !block.is_empty() {
        stream.memcpy_dtod(block, space).map_err(failed("cuMemcpyDtoDAsync"))?;
    }
    stream.record_event(None).map_err(failed("cuEventRecord"))
}

impl<X: Transport> DeviceTransport for OneGpu<X> {
    type Control = X;

    fn control(&mut self) -> &mut X {
        &mut self.control
    }

    fn control_ref(&self) -> &X {
        &self.control
    }

    fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    fn exchange(
        &mut self,
        tag: Tag,
        send: Outgoing,
        recv: Incoming,
        after: &CudaStream,
    ) -> Result<Ticket, Error> {
        check_exchange(&self.control, &send, &recv, after)?;
        self.control.check()?;
        let (rank, Outgoing { to, block, len: send_len }) = (self.control.rank(), send);
        let Incoming { from, space, len: recv_len } = recv;
        let ready = Arc::new(after.record_event(None).map_err(failed("cuEventRecord"))?);
        self.next += 1;
        let ticket = self.next;
        let letter = Letter { ticket, block, len: send_len, ready: ready.clone() };
        let slot = Slot { ticket, space, len: recv_len, ready: ready.clone(), stream: self.stream.clone() };
        let (out, home) = ((rank, to, tag), (from, rank, tag));
        let matches = self.shared.with(|state| {
            let mut matches = Vec::with_capacity(2);
            match state.slots.get_mut(&out).and_then(VecDeque::pop_front) {
                Some(slot) => matches.push((out, letter, slot)),
                None => state.letters.entry(out).or_default().push_back(letter),
            }
            match state.letters.get_mut(&home).and_then(VecDeque::pop_front) {
                Some(letter) => matches.push((home, letter, slot)),
                None => state.slots.entry(home).or_default().push_back(slot),
            }
            matches
        });
        for (channel, letter, slot) in matches {
            self.copy(channel, letter, slot)?;
        }
        // After the copies, so that who hears of both peers finds the copy of what it receives.
        let announced = self.signal(tag, to, from)?;
        self.traffic.sent += send_len as u64;
        self.traffic.messages += 1;
        self.pending.insert(ticket, Pending { tag, to, from, recv_len, ready, announced });
        Ok(Ticket(ticket))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<CudaSlice<u8>, Error> {
        let Some(mut pending) = self.pending.remove(&ticket.0) else {
            return Err(Error::argument("ticket", "one of this transport", format!("{ticket:?}")));
        };
        let (start, rank) = (Instant::now(), self.control.rank());
        let announced = std::mem::replace(&mut pending.announced, Ticket(0));
        self.control.wait(announced)?;
        let (own, to, from) = ((rank, ticket.0), pending.to, pending.from);
        let space = self.complete(start, &pending, (from, rank), |state| state.arriving.remove(&own))?;
        let block = self.complete(start, &pending, (to, to), |state| state.leaving.remove(&own))?;
        drop(block);
        self.traffic.received += pending.recv_len as u64;
        Ok(space)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

//! Ranks as threads of one process on one GPU: each has a stream that blocks move on, and blocks are copied device to device.
//!
//! The receiver's stream waits for the event after which the sender's block is whole, copies it, and the sender gets its block back when
//! the copy is done. So all hazards are ordered on the device, while the control transport orders the threads.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cuda::cudarc::driver::{CudaEvent, CudaSlice, CudaStream};

use super::transport::{DeviceTransport, Incoming, Outgoing, check_exchange, failed, until_complete};
use crate::transport::{Buffer, Tag, Ticket, Traffic, Transport};
use crate::{Error, PeerFault};

/// What the ranks of one GPU share: blocks that were posted and not copied yet.
#[derive(Debug, Clone, Default)]
pub struct Shared {
    posted: Arc<Mutex<HashMap<Post, Posted>>>,
}

/// The n-th block from one rank to another with a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Post {
    from: usize,
    to: usize,
    tag: Tag,
    n: u64,
}

#[derive(Debug)]
struct Posted {
    block: Arc<CudaSlice<u8>>,
    len: usize,
    /// After it the block is whole.
    ready: Arc<CudaEvent>,
    /// Whether it was copied.
    taken: Arc<AtomicBool>,
}

impl Shared {
    fn with<R>(&self, body: impl FnOnce(&mut HashMap<Post, Posted>) -> R) -> R {
        body(&mut self.posted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One rank of several on one GPU.
#[derive(Debug)]
pub struct OneGpu<X> {
    control: X,
    shared: Shared,
    stream: Arc<CudaStream>,
    next: u64,
    /// Blocks sent to each rank with each tag.
    sent: HashMap<(usize, Tag), u64>,
    /// Blocks asked for from each rank with each tag.
    asked: HashMap<(usize, Tag), u64>,
    pending: HashMap<u64, Pending>,
    traffic: Traffic,
}

#[derive(Debug)]
struct Pending {
    to: usize,
    /// The block to be received.
    post: Post,
    recv: CudaSlice<u8>,
    recv_len: usize,
    /// After it nothing reads or writes the receiving block.
    free: Arc<CudaEvent>,
    /// Whether the block that was sent was copied.
    taken: Arc<AtomicBool>,
    /// Says that both ends have posted.
    announced: Ticket,
}

impl<X: Transport> OneGpu<X> {
    /// A rank that moves blocks on `stream`, which is the caller's and its own. All ranks have the same `shared`.
    pub fn new(control: X, shared: Shared, stream: Arc<CudaStream>) -> Self {
        OneGpu {
            control,
            shared,
            stream,
            next: 0,
            sent: HashMap::new(),
            asked: HashMap::new(),
            pending: HashMap::new(),
            traffic: Traffic::default(),
        }
    }

    /// The host's transport.
    pub fn into_control(self) -> X {
        self.control
    }

    /// Copies the block that was posted for this rank, and says so.
    fn copy(&mut self, pending: &mut Pending) -> Result<(), Error> {
        let Post { from, tag, .. } = pending.post;
        let Some(posted) = self.shared.with(|all| all.remove(&pending.post)) else {
            let found = format!("no block of rank {from}");
            return Err(Error::argument("shared", "the same for all ranks", found));
        };
        if posted.len != pending.recv_len {
            let fault = PeerFault::Garbage(format!("{} bytes instead of {}", posted.len, pending.recv_len));
            return Err(self.control.accuse(from, tag, fault));
        }
        for event in [&posted.ready, &pending.free] {
            self.stream.wait(event).map_err(failed("cuStreamWaitEvent"))?;
        }
        if posted.len > 0 {
            let (block, mut space) = (posted.block.slice(..posted.len), pending.recv.slice_mut(..posted.len));
            self.stream.memcpy_dtod(&block, &mut space).map_err(failed("cuMemcpyDtoDAsync"))?;
        }
        let copied = self.stream.record_event(None).map_err(failed("cuEventRecord"))?;
        until_complete(&mut self.control, &copied, from, tag, || Ok(()))?;
        // First the block, then the word: who hears it may take the block back.
        drop(posted.block);
        posted.taken.store(true, Ordering::Release);
        Ok(())
    }

    /// An empty message of the control transport to one rank, for one from another.
    fn signal(&mut self, tag: Tag, to: usize, from: usize) -> Result<Ticket, Error> {
        let mut nothing = Buffer::new(0);
        self.control.seal(&mut nothing, tag);
        self.control.exchange(tag, to, Arc::new(nothing), from, Buffer::new(0))
    }
}

/// Counts the blocks of a channel.
fn count(counts: &mut HashMap<(usize, Tag), u64>, peer: usize, tag: Tag) -> u64 {
    let count = counts.entry((peer, tag)).or_default();
    *count += 1;
    *count
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
        check_exchange(&self.control, &send, &recv)?;
        self.control.check()?;
        let (rank, Outgoing { to, block, len: send_len }) = (self.control.rank(), send);
        let Incoming { from, space: recv, len: recv_len } = recv;
        let ready = Arc::new(after.record_event(None).map_err(failed("cuEventRecord"))?);
        let taken = Arc::new(AtomicBool::new(false));
        let sent = Post { from: rank, to, tag, n: count(&mut self.sent, to, tag) };
        let post = Post { from, to: rank, tag, n: count(&mut self.asked, from, tag) };
        let posted = Posted { block, len: send_len, ready: ready.clone(), taken: taken.clone() };
        self.shared.with(|all| all.insert(sent, posted));
        let announced = self.signal(tag, to, from)?;
        self.traffic.sent += send_len as u64;
        self.traffic.messages += 1;
        self.next += 1;
        self.pending.insert(self.next, Pending { to, post, recv, recv_len, free: ready, taken, announced });
        Ok(Ticket(self.next))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<CudaSlice<u8>, Error> {
        let Some(mut pending) = self.pending.remove(&ticket.0) else {
            return Err(Error::argument("ticket", "one of this transport", format!("{ticket:?}")));
        };
        let announced = std::mem::replace(&mut pending.announced, Ticket(0));
        self.control.wait(announced)?;
        self.copy(&mut pending)?;
        // The sender gets its block back, and this rank its own. Words of several exchanges are alike, so the flag decides.
        let Post { from, tag, .. } = pending.post;
        let back = self.signal(tag, from, pending.to)?;
        self.control.wait(back)?;
        let start = Instant::now();
        while !pending.taken.load(Ordering::Acquire) {
            self.control.check()?;
            let waited = start.elapsed();
            if waited >= self.control.deadline() {
                let fault = PeerFault::Stalled { waited_ms: waited.as_millis() as u64 };
                return Err(self.control.accuse(pending.to, tag, fault));
            }
            std::thread::yield_now();
        }
        self.traffic.received += pending.recv_len as u64;
        Ok(pending.recv)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

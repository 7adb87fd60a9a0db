//! Transports of device memory: blocks that a kernel has written go to another rank's GPU without a stop on the host.
//!
//! As with [`Transport`], a block that is being sent is shared and cannot be written, and one that is being received into is gone until it
//! has arrived. A third party watches over both: the *control* transport, on the host, which every exchange is announced on. It finds who
//! is silent, tells all of faults, and keeps the deadlines; the device transport polls and never waits without bound.
//!
//! | transport | ranks are |
//! |---|---|
//! | [`OneGpu`] | threads with streams of one GPU; blocks are copied by its copy engine |
//! | `Nccl` (feature `nccl`) | threads or processes with a GPU each; blocks go through NCCL |
//! | [`Staged`] | any of these as a [`Transport`] of host buffers |

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cuda::cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DriverError};

pub use super::transport_local::{OneGpu, Shared};
#[cfg(feature = "nccl")]
pub use super::transport_nccl::Nccl;
#[cfg(feature = "nccl")]
pub use super::transport_nccl_library::{Library as NcclLibrary, VARIABLE as NCCL_VARIABLE};
use crate::transport::{self, Buffer, Tag, Ticket, Traffic, Transport};
use crate::{Error, PeerFault};

/// A block on its way to another rank: the first `len` bytes of `block`.
#[derive(Debug)]
pub struct Outgoing {
    /// The rank that gets it.
    pub to: usize,
    /// The block, shared until it has left.
    pub block: Arc<CudaSlice<u8>>,
    /// Bytes of it.
    pub len: usize,
}

/// Space for a block of another rank: the first `len` bytes of `space`.
#[derive(Debug)]
pub struct Incoming {
    /// The rank that sends it.
    pub from: usize,
    /// The space, gone until the block is here.
    pub space: CudaSlice<u8>,
    /// Bytes of the block.
    pub len: usize,
}

/// One rank's end of a group whose messages lie in device memory.
///
/// Calls of a rank belong to one thread, and it is the only one that issues work for its device here: with one communicator per device
/// there is one order.
pub trait DeviceTransport: Send {
    /// The host's transport beside it.
    type Control: Transport;

    /// The host's transport beside it: for ranks, deadlines, fingerprints and barriers.
    fn control(&mut self) -> &mut Self::Control;

    /// The same, to be read.
    fn control_ref(&self) -> &Self::Control;

    /// The caller's stream that blocks move on.
    fn stream(&self) -> &Arc<CudaStream>;

    /// Starts sending one block and receiving another, once what is queued on `after` is done. Does not wait for other
    /// ranks, but over NCCL, where a group between ranks that are not connected yet must be launched before the next.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank that is not there or is this one, or for a block that is too short; [`Error::Peer`] when a rank has
    /// failed; [`Error::Library`] when CUDA or NCCL refuses a call.
    fn exchange(
        &mut self,
        tag: Tag,
        send: Outgoing,
        recv: Incoming,
        after: &CudaStream,
    ) -> Result<Ticket, Error>;

    /// Waits until the block is here and nothing reads what was sent any more.
    ///
    /// # Errors
    /// [`Error::Peer`] when a rank has failed, which is at the deadline at the latest; [`Error::Library`] when CUDA or NCCL fails.
    fn wait(&mut self, ticket: Ticket) -> Result<CudaSlice<u8>, Error>;

    /// Bytes and messages so far.
    fn traffic(&self) -> Traffic;
}

/// An error of a driver call.
pub(super) fn failed(call: &'static str) -> impl FnOnce(DriverError) -> Error {
    // `DriverError` is never formatted, since that calls the driver once more.
    move |error| Error::Library {
        library: "CUDA",
        call,
        code: error.0 as i64,
        message: format!("{:?}", error.0),
    }
}

/// Checks the two ends and blocks of an exchange.
pub(super) fn check_exchange<X: Transport>(
    control: &X,
    send: &Outgoing,
    recv: &Incoming,
) -> Result<(), Error> {
    transport::check_ends(control.rank(), control.ranks(), send.to, recv.from)?;
    for (argument, len, asked) in [("send", send.block.len(), send.len), ("recv", recv.space.len(), recv.len)]
    {
        if asked > len {
            return Err(Error::argument(argument, format!("at least {asked} bytes"), len));
        }
    }
    Ok(())
}

/// Polls until an event is complete. `watch` looks after what may have gone wrong meanwhile and says why it cannot become complete.
pub(super) fn until_complete<X: Transport>(
    control: &mut X,
    event: &CudaEvent,
    peer: usize,
    tag: Tag,
    mut watch: impl FnMut() -> Result<(), PeerFault>,
) -> Result<(), Error> {
    let start = Instant::now();
    loop {
        control.check()?;
        match event.try_is_complete() {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => {
                // The context is lost, and with it this rank.
                let error = failed("cuEventQuery")(error);
                control.abort(tag, &error.to_string());
                return Err(error);
            }
        }
        if let Err(fault) = watch() {
            return Err(control.accuse(peer, tag, fault));
        }
        let waited = start.elapsed();
        if waited >= control.deadline() {
            let fault = PeerFault::Stalled { waited_ms: waited.as_millis() as u64 };
            return Err(control.accuse(peer, tag, fault));
        }
        match waited.as_micros() {
            0..50 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}

/// A device transport as one of host buffers: each message is copied to the device, sent, and copied back.
///
/// The copies have a stream of their own: those of pageable memory wait in the driver, with no deadline, for what is queued before them,
/// which must not be a message whose peer has died.
#[derive(Debug)]
pub struct Staged<D> {
    inner: D,
    /// For the copies, from the first on.
    stream: Option<Arc<CudaStream>>,
    next: u64,
    pending: HashMap<u64, Message>,
    traffic: Traffic,
}

#[derive(Debug)]
struct Message {
    ticket: Ticket,
    tag: Tag,
    from: usize,
    recv: Buffer,
}

impl<D: DeviceTransport> Staged<D> {
    /// Stages messages of this transport.
    pub fn new(inner: D) -> Self {
        Staged { inner, stream: None, next: 0, pending: HashMap::new(), traffic: Traffic::default() }
    }

    /// The stream for copies.
    fn staging(&mut self) -> Result<Arc<CudaStream>, Error> {
        if let Some(stream) = &self.stream {
            return Ok(stream.clone());
        }
        let stream = self.inner.stream().context().new_stream().map_err(failed("cuStreamCreate"))?;
        self.stream = Some(stream.clone());
        Ok(stream)
    }

    /// The transport inside.
    pub fn into_inner(self) -> D {
        self.inner
    }
}

impl<D: DeviceTransport> Transport for Staged<D> {
    fn rank(&self) -> usize {
        self.inner.control_ref().rank()
    }

    fn ranks(&self) -> usize {
        self.inner.control_ref().ranks()
    }

    fn exchange(
        &mut self,
        tag: Tag,
        to: usize,
        send: Arc<Buffer>,
        from: usize,
        recv: Buffer,
    ) -> Result<Ticket, Error> {
        transport::check_ends(self.rank(), self.ranks(), to, from)?;
        let stream = self.staging()?;
        let block = stream.clone_htod(send.message()).map_err(failed("cuMemcpyHtoDAsync"))?;
        let space = stream.alloc_zeros(recv.message().len()).map_err(failed("cuMemAllocAsync"))?;
        let (send_len, recv_len) = (send.message().len(), recv.message().len());
        let outgoing = Outgoing { to, block: Arc::new(block), len: send_len };
        let incoming = Incoming { from, space, len: recv_len };
        let ticket = self.inner.exchange(tag, outgoing, incoming, &stream)?;
        self.traffic.sent += send.len() as u64;
        self.traffic.messages += 1;
        self.next += 1;
        self.pending.insert(self.next, Message { ticket, tag, from, recv });
        Ok(Ticket(self.next))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        let Some(Message { ticket, tag, from, mut recv }) = self.pending.remove(&ticket.0) else {
            return Err(Error::argument("ticket", "one of this transport", format!("{ticket:?}")));
        };
        let block = self.inner.wait(ticket)?;
        let stream = self.staging()?;
        // It waits for a copy of what is here already.
        stream.memcpy_dtoh(&block, recv.message_mut()).map_err(failed("cuMemcpyDtoHAsync"))?;
        if let Err(fault) = transport::open(&recv, tag, from) {
            return Err(self.inner.control().accuse(from, tag, fault));
        }
        self.traffic.received += recv.len() as u64;
        Ok(recv)
    }

    fn abort(&mut self, at: Tag, reason: &str) {
        self.inner.control().abort(at, reason);
    }

    fn check(&mut self) -> Result<(), Error> {
        self.inner.control().check()
    }

    fn accuse(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error {
        self.inner.control().accuse(peer, at, fault)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }

    fn deadline(&self) -> Duration {
        self.inner.control_ref().deadline()
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.inner.control().set_deadline(deadline);
    }
}

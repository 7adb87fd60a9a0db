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

use std::sync::Arc;
use std::time::{Duration, Instant};

use cuda::cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DriverError};

pub use super::transport_local::OneGpu;
#[cfg(feature = "nccl")]
pub use super::transport_nccl::Nccl;
#[cfg(feature = "nccl")]
pub use super::transport_nccl_library::{Library as NcclLibrary, VARIABLE as NCCL_VARIABLE};
pub use super::transport_staged::Staged;
use crate::transport::{self, Tag, Ticket, Traffic, Transport};
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

    /// Starts sending one block and receiving another, once what is queued on `after` is done: the kernels' stream, which both blocks were
    /// allocated on. A slice has one event for its readers, which a copy records anew, so only that stream's order keeps the memory until the
    /// kernels are done. Does not wait for other ranks, but over NCCL, where a group between ranks that are not connected yet must be
    /// launched before the next.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank that is not there or is this one, for a block that is too short, or for one of another stream than
    /// `after`, or of the stream that is each thread's own; [`Error::Peer`] when a rank has failed; [`Error::Library`] when CUDA or NCCL refuses a call.
    fn exchange(
        &mut self,
        tag: Tag,
        send: Outgoing,
        recv: Incoming,
        after: &CudaStream,
    ) -> Result<Ticket, Error>;

    /// Waits until the block is here and nothing reads what was sent any more. Asks of the other ranks that they have posted their
    /// halves, not that they wait too.
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
    after: &CudaStream,
) -> Result<(), Error> {
    transport::check_ends(control.rank(), control.ranks(), send.to, recv.from)?;
    for (argument, len, asked) in [("send", send.block.len(), send.len), ("recv", recv.space.len(), recv.len)]
    {
        if asked > len {
            return Err(Error::argument(argument, format!("at least {asked} bytes"), len));
        }
    }
    check_stream("send", &send.block, after)?;
    check_stream("recv", &recv.space, after)
}

/// The handle of the calling thread's own default stream, `CU_STREAM_PER_THREAD`.
const PER_THREAD: usize = 2;

/// Checks that a block was allocated on the stream of the kernels that use it. A slice has one event for its readers, which a copy records
/// anew, so only the order of that stream keeps the memory until the kernels are done.
pub(super) fn check_stream(
    argument: &'static str,
    block: &CudaSlice<u8>,
    kernels: &CudaStream,
) -> Result<(), Error> {
    let own = block.stream().as_ref();
    // Every thread means another stream by that handle.
    let is_per_thread = own.cu_stream().addr() == PER_THREAD;
    if own != kernels || is_per_thread {
        let name = |stream: &CudaStream| {
            format!("{:?} of device {}", stream.cu_stream(), stream.context().ordinal())
        };
        let expected = format!("memory of the kernels' stream {}, not one of each thread", name(kernels));
        return Err(Error::argument(argument, expected, format!("that of {}", name(own))));
    }
    Ok(())
}

/// Between looks at who is late, of whoever waits for long.
const LOOK: Duration = Duration::from_millis(1);

/// Asks until there is an answer, within the deadline since `start`; the rank that `late` names is accused then, and those who wait for
/// this rank meanwhile know that it waits for that one. A rank that has failed ends it.
pub(super) fn poll<X: Transport, T>(
    control: &mut X,
    start: Instant,
    tag: Tag,
    late: impl Fn() -> usize,
    mut ask: impl FnMut(&mut X) -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    let (rank, mut look, mut said) = (control.rank(), LOOK, None);
    loop {
        // Before the question: a thread that got no core for long is late itself, and asks once more before it accuses anybody.
        let waited = start.elapsed();
        control.check()?;
        if let Some(answer) = ask(control)? {
            if said.is_some() {
                control.waits_for(None, tag);
            }
            return Ok(answer);
        }
        if waited >= control.deadline() {
            return Err(control.accuse(late(), tag, stalled(waited)));
        }
        if waited >= look {
            look = waited + LOOK;
            let waits_for = Some(late()).filter(|peer| *peer != rank);
            if waits_for != said {
                control.waits_for(waits_for, tag);
                said = waits_for;
            }
        }
        match waited.as_micros() {
            0..50 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(20)),
        }
    }
}

pub(super) fn stalled(waited: Duration) -> PeerFault {
    PeerFault::Stalled { waited_ms: waited.as_millis() as u64 }
}

/// Whether an event is complete. A driver that does not say so has lost its context, and with it this rank, which all others hear.
pub(super) fn is_complete<X: Transport>(control: &mut X, tag: Tag, event: &CudaEvent) -> Result<bool, Error> {
    event.try_is_complete().map_err(failed("cuEventQuery")).inspect_err(|error| {
        control.abort(tag, &error.to_string());
    })
}

/// Memory that enqueued work reads or writes until an event: it is given back when the event is complete, and leaked, not freed, if
/// nobody waits for that.
#[derive(Debug)]
pub(super) struct UnderWay<B> {
    memory: Option<B>,
    done: Arc<CudaEvent>,
}

impl<B> UnderWay<B> {
    /// Memory that is used by what is on `stream` now.
    pub(super) fn on(stream: &CudaStream, memory: B) -> Result<Self, Error> {
        match stream.record_event(None) {
            Ok(done) => Ok(Self::until(Arc::new(done), memory)),
            Err(error) => {
                std::mem::forget(memory);
                Err(failed("cuEventRecord")(error))
            }
        }
    }

    /// Memory that is used until `done`.
    pub(super) fn until(done: Arc<CudaEvent>, memory: B) -> Self {
        UnderWay { memory: Some(memory), done }
    }

    /// Waits for the event, as in [`poll`], and gives the memory back.
    pub(super) fn complete<X: Transport>(
        mut self,
        control: &mut X,
        start: Instant,
        tag: Tag,
        late: impl Fn() -> usize,
    ) -> Result<B, Error> {
        poll(control, start, tag, late, |control| {
            let done = is_complete(control, tag, &self.done)?;
            Ok(self.memory.take_if(|_| done))
        })
    }
}

impl<B> Drop for UnderWay<B> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take()
            && !(self.done.context().bind_to_thread().is_ok() && self.done.try_is_complete() == Ok(true))
        {
            std::mem::forget(memory);
        }
    }
}

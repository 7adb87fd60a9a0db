//! NCCL: ranks as threads or processes, each with a GPU of its own.
//!
//! The communicator is nonblocking; what is under way is polled, never waited for without bound. Every exchange is one group of a send and
//! a receive, enqueued on the caller's stream, and is announced on the control transport first, which knows who is silent: NCCL does not
//! say so of a process that died on the same host. NCCL has no tags: two ranks must post their exchanges with each other in one order.
//! The first group between two ranks connects them, which needs both; a communicator takes no other group until then, so an exchange
//! that is posted meanwhile waits for that, within the deadline.
//!
//! After a fault every survivor aborts its communicator. First the fault is told to all, then each aborts its own: aborting one while
//! others still poll theirs can wait for them. An abort that does not come back is left to a thread of its own, and the process should
//! end.

use std::collections::HashMap;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use cuda::cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};

use super::transport::{
    DeviceTransport, Incoming, Outgoing, check_exchange, failed, is_complete, poll, stalled,
};
use super::transport_nccl_library::{Communicator, IN_PROGRESS, Library, SUCCESS, UniqueId};
use crate::transport::{Buffer, Operation, Tag, Ticket, Traffic, Transport};
use crate::{Error, PeerFault};

/// One rank of an NCCL communicator. `X` is the control transport: any of the host's.
#[derive(Debug)]
pub struct Nccl<X: Transport> {
    control: X,
    library: Arc<Library>,
    /// None after a fault.
    comm: Option<Communicator>,
    stream: Arc<CudaStream>,
    next: u64,
    pending: HashMap<u64, Pending>,
    /// The exchange whose group is perhaps not on the stream yet.
    launching: Option<u64>,
    traffic: Traffic,
}

#[derive(Debug)]
struct Pending {
    tag: Tag,
    from: usize,
    send: Arc<CudaSlice<u8>>,
    recv: CudaSlice<u8>,
    recv_len: usize,
    /// After it this rank's work on both blocks is done.
    ready: CudaEvent,
    /// After it both halves are done. None until the group is on the stream.
    done: Option<CudaEvent>,
    /// The announcement, until it was waited for.
    announced: Option<Ticket>,
}

/// How long kernels of an aborted communicator are waited for, at most.
const STOPPING: Duration = Duration::from_secs(1);

/// What is being set up is waited for here.
const SET_UP: Tag = Tag::new(Operation::Barrier, 0);

impl<X: Transport> Nccl<X> {
    /// Makes a communicator of all ranks of `control`, on the device of `stream`, which is the caller's: blocks move on it.
    ///
    /// # Errors
    /// [`Error::Library`] when NCCL refuses a call, [`Error::Peer`] when a rank has failed.
    pub fn connect(library: Arc<Library>, mut control: X, stream: Arc<CudaStream>) -> Result<Self, Error> {
        let (rank, ranks) = (control.rank(), control.ranks());
        let id = if rank == 0 { library.unique_id()?.0.to_vec() } else { Vec::new() };
        let mut lens = vec![0; ranks];
        lens[0] = size_of::<UniqueId>();
        let id = control.all_gather_v(&id, &lens)?;
        let id = UniqueId(id.try_into().map_err(|_| Error::argument("control", "the unique id", "another"))?);
        stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let comm = match library.init(ranks, id, rank) {
            Ok(comm) => Some(comm),
            Err(error) => {
                control.abort(SET_UP, &error.to_string());
                return Err(error);
            }
        };
        let (pending, traffic) = (HashMap::new(), Traffic::default());
        let mut nccl = Nccl { control, library, comm, stream, next: 0, pending, launching: None, traffic };
        // A rank that never asked for its communicator is found here, by name; what is late after this is NCCL.
        if let Err(error) = nccl.control.barrier() {
            return Err(nccl.spent(error));
        }
        nccl.settle("ncclCommInitRankConfig")?;
        Ok(nccl)
    }

    /// Ends the communicator in order, then drops the control transport. Without it the communicator is aborted.
    ///
    /// # Errors
    /// [`Error::Library`] when NCCL refuses a call, [`Error::Peer`] when a rank has failed.
    pub fn close(mut self) -> Result<(), Error> {
        self.control.barrier()?;
        self.bind()?;
        if let Some(comm) = &self.comm {
            let finalized = self.library.finalize(comm);
            finalized.inspect_err(|_| self.abort_communicator())?;
            self.settle("ncclCommFinalize")?;
            // Nobody leaves while others need it.
            let met = self.control.barrier();
            met.inspect_err(|_| self.abort_communicator())?;
        }
        self.comm.take().map_or(Ok(()), |comm| self.library.destroy(comm))
    }

    /// Makes the device current for NCCL.
    fn bind(&self) -> Result<(), Error> {
        self.stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))
    }

    /// Waits until the communicator has done what it was asked for, which takes every rank.
    fn settle(&mut self, call: &'static str) -> Result<(), Error> {
        let start = Instant::now();
        let (rank, ranks) = (self.control.rank(), self.control.ranks());
        loop {
            let waited = start.elapsed();
            if let Err(error) = self.control.check() {
                return Err(self.spent(error));
            }
            let state = self.state();
            if state == SUCCESS {
                return Ok(());
            }
            if let Some(gone) = (0..ranks).find(|&peer| peer != rank && self.control.is_gone(peer)) {
                let error = self.control.accuse(gone, SET_UP, PeerFault::Gone);
                return Err(self.spent(error));
            }
            if state == IN_PROGRESS && waited < self.control.deadline() {
                std::thread::sleep(Duration::from_micros(20));
                continue;
            }
            let message = match state {
                IN_PROGRESS => format!("not done after {} ms", waited.as_millis()),
                _ => self.library.message(state),
            };
            let error = Error::Library { library: "NCCL", call, code: state.into(), message };
            self.control.abort(SET_UP, &error.to_string());
            return Err(self.spent(error));
        }
    }

    /// Aborts the communicator, once the fault is known to all.
    fn spent(&mut self, error: Error) -> Error {
        self.abort_communicator();
        error
    }

    /// Aborts the communicator within the deadline, or leaves that to a thread that never ends.
    fn abort_communicator(&mut self) {
        let Some(comm) = self.comm.take() else { return };
        let (library, context) = (self.library.clone(), self.stream.context().clone());
        let (done, wait) = mpsc::channel();
        std::thread::spawn(move || {
            // An abort without its device would still free what is on the host.
            let _ = context.bind_to_thread();
            let _ = done.send(library.abort(comm));
        });
        let deadline = self.control.deadline();
        let aborted = matches!(wait.recv_timeout(deadline), Ok(Ok(())));
        self.launching = None;
        // NCCL may still write to blocks under way, even after an abort: of ranks that are threads, only the last one waits for kernels.
        let end = Instant::now() + STOPPING.min(deadline / 4);
        for (_, pending) in self.pending.drain() {
            let stopped = pending.done.as_ref().is_some_and(|done| {
                loop {
                    match done.try_is_complete() {
                        Ok(true) => return true,
                        Ok(false) if aborted && Instant::now() < end => {
                            std::thread::sleep(Duration::from_micros(100))
                        }
                        _ => return false,
                    }
                }
            });
            if !stopped {
                std::mem::forget(pending);
            }
        }
    }

    fn state(&self) -> i32 {
        state(&self.library, &self.comm)
    }

    /// Waits until both peers of an exchange have announced theirs. Who does not is found by the control transport, whose waits include that
    /// the receiver has posted.
    fn announced(&mut self, id: u64) -> Result<(), Error> {
        let Some(pending) = self.pending.get_mut(&id) else { return Ok(()) };
        let Some(announced) = pending.announced.take() else { return Ok(()) };
        let there = self.control.wait(announced)?;
        let there = there.values::<u64>()[0];
        if there != pending.recv_len as u64 {
            let fault = PeerFault::Garbage(format!("{there} bytes instead of {}", pending.recv_len));
            return Err(self.control.accuse(pending.from, pending.tag, fault));
        }
        Ok(())
    }

    /// Waits until the last group is on the stream, within the deadline since `start`.
    fn launched(&mut self, start: Instant) -> Result<(), Error> {
        let Some(id) = self.launching else { return Ok(()) };
        if self.state() == IN_PROGRESS {
            self.announced(id)?;
        }
        let Some(&Pending { tag, from, .. }) = self.pending.get(&id) else { return Ok(()) };
        let (library, comm) = (&self.library, &self.comm);
        poll(
            &mut self.control,
            start,
            tag,
            || from,
            |control| match state(library, comm) {
                SUCCESS => Ok(Some(())),
                IN_PROGRESS => Ok(None),
                code => {
                    let failed = library.check("ncclGroupEnd", code);
                    failed.map(Some).inspect_err(|error| control.abort(tag, &error.to_string()))
                }
            },
        )?;
        self.on_stream(id)
    }

    /// Records that an exchange is done after what is on the stream now.
    fn on_stream(&mut self, id: u64) -> Result<(), Error> {
        let Some(pending) = self.pending.get_mut(&id) else { return Ok(()) };
        // The blocks' own events have to come after the group as well.
        drop(pending.send.device_ptr(&self.stream));
        drop(pending.recv.device_ptr_mut(&self.stream));
        pending.done = Some(self.stream.record_event(None).map_err(failed("cuEventRecord"))?);
        self.launching = None;
        Ok(())
    }

    /// Waits for both halves of an exchange.
    ///
    /// NCCL does not say which half is late. A rank whose own work is late says so shortly before the deadline, before others accuse it
    /// or somebody else.
    fn complete(&mut self, id: u64) -> Result<(), Error> {
        let (start, rank) = (Instant::now(), self.control.rank());
        self.announced(id)?;
        if self.launching == Some(id) {
            self.launched(start)?;
        }
        let Some(Pending { tag, from, ready, done: Some(done), .. }) = self.pending.get(&id) else {
            return Ok(());
        };
        let (library, comm, tag, from) = (&self.library, &self.comm, *tag, *from);
        poll(
            &mut self.control,
            start,
            tag,
            || from,
            |control| {
                let waited = start.elapsed();
                if is_complete(control, tag, done)? {
                    return Ok(Some(()));
                }
                match state(library, comm) {
                    SUCCESS | IN_PROGRESS if waited < control.deadline() / 8 * 7 => Ok(None),
                    SUCCESS | IN_PROGRESS if is_complete(control, tag, ready)? => Ok(None),
                    SUCCESS | IN_PROGRESS => Err(control.accuse(rank, tag, stalled(waited))),
                    code => {
                        let words = format!("NCCL: {} ({code})", library.message(code));
                        Err(control.accuse(from, tag, PeerFault::Unreachable(words)))
                    }
                }
            },
        )
    }
}

/// How a communicator fares, as a code; one that was aborted has nothing more to do.
fn state(library: &Library, comm: &Option<Communicator>) -> i32 {
    comm.as_ref().map_or(SUCCESS, |comm| library.state(comm))
}

impl<X: Transport> DeviceTransport for Nccl<X> {
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
        if let Err(error) = self.control.check() {
            return Err(self.spent(error));
        }
        if let Err(error) = self.launched(Instant::now()) {
            return Err(self.spent(error));
        }
        if self.comm.is_none() {
            return Err(Error::argument("communicator", "one that was not aborted", "an aborted one"));
        }
        self.bind()?;
        let Outgoing { to, block: send, len: send_len } = send;
        let Incoming { from, space: recv, len: recv_len } = recv;
        let ready = after.record_event(None).map_err(failed("cuEventRecord"))?;
        self.stream.wait(&ready).map_err(failed("cuStreamWaitEvent"))?;
        let mut announcement = Buffer::of(&[send_len as u64]);
        self.control.seal(&mut announcement, tag);
        let announced = match self.control.exchange(tag, to, Arc::new(announcement), from, Buffer::new(8)) {
            Ok(announced) => Some(announced),
            Err(error) => return Err(self.spent(error)),
        };
        self.next += 1;
        let id = self.next;
        let mut pending = Pending { tag, from, send, recv, recv_len, ready, done: None, announced };
        let enqueued = self.enqueue(to, send_len, &mut pending);
        // Without its event it is leaked when the communicator is aborted: half a group may be under way.
        self.pending.insert(id, pending);
        self.launching = Some(id);
        if let Err(error) = enqueued {
            self.control.abort(tag, &error.to_string());
            return Err(self.spent(error));
        }
        if self.state() == SUCCESS
            && let Err(error) = self.on_stream(id)
        {
            self.control.abort(tag, &error.to_string());
            return Err(self.spent(error));
        }
        self.traffic.sent += send_len as u64;
        self.traffic.messages += 1;
        Ok(Ticket(id))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<CudaSlice<u8>, Error> {
        if self.pending.contains_key(&ticket.0)
            && let Err(error) = self.complete(ticket.0)
        {
            // The kernels of NCCL stop at the abort; until then they may write.
            return Err(self.spent(error));
        }
        let Some(Pending { recv, recv_len, .. }) = self.pending.remove(&ticket.0) else {
            self.control.check()?;
            return Err(Error::argument("ticket", "one of this transport", format!("{ticket:?}")));
        };
        self.traffic.received += recv_len as u64;
        Ok(recv)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

impl<X: Transport> Nccl<X> {
    /// Enqueues a send and a receive as one group.
    fn enqueue(&self, to: usize, send_len: usize, pending: &mut Pending) -> Result<(), Error> {
        let Some(comm) = &self.comm else { return Ok(()) };
        let Pending { from, send, recv, recv_len, .. } = pending;
        let (send, _read) = send.device_ptr(&self.stream);
        let (recv, _written) = recv.device_ptr_mut(&self.stream);
        // SAFETY: `pending` keeps both blocks until the event after this is complete, or leaks them; the stream was made to wait for what
        // wrote and read them; a shared block cannot be written, and the other is in nobody else's hands.
        unsafe {
            let stream = self.stream.cu_stream().cast();
            self.library.exchange(comm, (to, send, send_len), (*from, recv, *recv_len), stream)
        }
    }
}

impl<X: Transport> Drop for Nccl<X> {
    /// Aborts a communicator that was not closed.
    fn drop(&mut self) {
        self.abort_communicator();
    }
}

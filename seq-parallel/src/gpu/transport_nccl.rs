//! NCCL: ranks as threads or processes, each with a GPU of its own.
//!
//! The communicator is nonblocking; what is under way is polled, never waited for without bound. Every exchange is one group of a send and
//! a receive, enqueued on the caller's stream, and is announced on the control transport, which knows who is silent: NCCL does not say so
//! of a process that died on the same host. NCCL has no tags: two ranks must post their exchanges with each other in one order.
//!
//! After a fault every survivor aborts its communicator. First the fault is told to all, then each aborts its own: aborting one while
//! others still poll theirs can wait for them. An abort that does not come back is left to a thread of its own, and the process should
//! end.

use std::collections::HashMap;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use cuda::cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};

use super::transport::{DeviceTransport, Incoming, Outgoing, check_exchange, failed, until_complete};
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
    traffic: Traffic,
}

#[derive(Debug)]
struct Pending {
    tag: Tag,
    from: usize,
    send: Arc<CudaSlice<u8>>,
    recv: CudaSlice<u8>,
    recv_len: usize,
    /// After it both halves are done.
    done: CudaEvent,
    announced: Ticket,
}

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
        let mut nccl = Nccl { control, library, comm, stream, next: 0, pending, traffic };
        nccl.settle("ncclCommInitRankConfig")?;
        Ok(nccl)
    }

    /// Ends the communicator in order and gives the control transport back. Without it the communicator is aborted.
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
        }
        self.comm.take().map_or(Ok(()), |comm| self.library.destroy(comm))
    }

    /// Makes the device current for NCCL.
    fn bind(&self) -> Result<(), Error> {
        self.stream.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))
    }

    /// Waits until the communicator has done what it was asked for.
    fn settle(&mut self, call: &'static str) -> Result<(), Error> {
        let start = Instant::now();
        loop {
            if let Err(error) = self.control.check() {
                return Err(self.spent(error));
            }
            let state = self.comm.as_ref().map_or(SUCCESS, |comm| self.library.state(comm));
            match state {
                SUCCESS => return Ok(()),
                IN_PROGRESS if start.elapsed() < self.control.deadline() => {
                    std::thread::sleep(Duration::from_micros(20));
                }
                _ => {
                    let message = match state {
                        IN_PROGRESS => format!("not done after {} ms", start.elapsed().as_millis()),
                        _ => self.library.message(state),
                    };
                    let error = Error::Library { library: "NCCL", call, code: state.into(), message };
                    self.control.abort(SET_UP, &error.to_string());
                    return Err(self.spent(error));
                }
            }
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
        let aborted = wait.recv_timeout(self.control.deadline());
        if aborted.is_err() {
            // NCCL may still write to blocks under way.
            self.pending.drain().for_each(|(_, pending)| std::mem::forget(pending));
        }
    }

    /// Waits for both halves of an exchange.
    fn complete(&mut self, pending: &mut Pending) -> Result<(), Error> {
        let announced = std::mem::replace(&mut pending.announced, Ticket(0));
        let there = self.control.wait(announced)?;
        let there = there.values::<u64>()[0];
        if there != pending.recv_len as u64 {
            let fault = PeerFault::Garbage(format!("{there} bytes instead of {}", pending.recv_len));
            return Err(self.control.accuse(pending.from, pending.tag, fault));
        }
        let (library, comm) = (&self.library, &self.comm);
        until_complete(&mut self.control, &pending.done, pending.from, pending.tag, || {
            match comm.as_ref().map_or(SUCCESS, |comm| library.state(comm)) {
                SUCCESS | IN_PROGRESS => Ok(()),
                code => Err(PeerFault::Unreachable(format!("NCCL: {} ({code})", library.message(code)))),
            }
        })
    }
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
        check_exchange(&self.control, &send, &recv)?;
        if let Err(error) = self.control.check() {
            return Err(self.spent(error));
        }
        let Some(comm) = &self.comm else {
            return Err(Error::argument("communicator", "one that was not aborted", "an aborted one"));
        };
        self.bind()?;
        let Outgoing { to, block: send, len: send_len } = send;
        let Incoming { from, space: mut recv, len: recv_len } = recv;
        let ready = after.record_event(None).map_err(failed("cuEventRecord"))?;
        self.stream.wait(&ready).map_err(failed("cuStreamWaitEvent"))?;
        let enqueued = {
            let (send, _read) = send.device_ptr(&self.stream);
            let (recv, _written) = recv.device_ptr_mut(&self.stream);
            // SAFETY: `pending` keeps both blocks until the event after this is complete, or leaks them; the stream was made to wait for
            // what wrote and read them; a shared block cannot be written, and the other is in nobody else's hands.
            unsafe {
                let stream = self.stream.cu_stream().cast();
                self.library.exchange(comm, (to, send, send_len), (from, recv, recv_len), stream)
            }
        };
        if let Err(error) = enqueued.and_then(|()| self.settled_group()) {
            self.control.abort(tag, &error.to_string());
            // Half a group may be under way.
            std::mem::forget((send, recv));
            return Err(self.spent(error));
        }
        let done = self.stream.record_event(None).map_err(failed("cuEventRecord"))?;
        let mut announcement = Buffer::of(&[send_len as u64]);
        self.control.seal(&mut announcement, tag);
        let announced = match self.control.exchange(tag, to, Arc::new(announcement), from, Buffer::new(8)) {
            Ok(announced) => announced,
            Err(error) => {
                std::mem::forget((send, recv));
                return Err(self.spent(error));
            }
        };
        self.traffic.sent += send_len as u64;
        self.traffic.messages += 1;
        self.next += 1;
        self.pending.insert(self.next, Pending { tag, from, send, recv, recv_len, done, announced });
        Ok(Ticket(self.next))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<CudaSlice<u8>, Error> {
        let Some(mut pending) = self.pending.remove(&ticket.0) else {
            return Err(Error::argument("ticket", "one of this transport", format!("{ticket:?}")));
        };
        if let Err(error) = self.complete(&mut pending) {
            // The kernels of NCCL stop at the abort; until then they may write.
            self.pending.insert(ticket.0, pending);
            return Err(self.spent(error));
        }
        self.traffic.received += pending.recv_len as u64;
        let Pending { send, recv, .. } = pending;
        drop(send);
        Ok(recv)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

impl<X: Transport> Nccl<X> {
    /// A group of a nonblocking communicator may still be launching; the event has to come after it.
    fn settled_group(&mut self) -> Result<(), Error> {
        let start = Instant::now();
        loop {
            let state = self.comm.as_ref().map_or(SUCCESS, |comm| self.library.state(comm));
            match state {
                IN_PROGRESS if start.elapsed() < self.control.deadline() => {
                    self.control.check()?;
                    std::thread::yield_now();
                }
                IN_PROGRESS => {
                    let message = format!("not launched after {} ms", start.elapsed().as_millis());
                    let code = state.into();
                    return Err(Error::Library { library: "NCCL", call: "ncclGroupEnd", code, message });
                }
                code => return self.library.check("ncclGroupEnd", code),
            }
        }
    }
}

impl<X: Transport> Drop for Nccl<X> {
    /// Aborts a communicator that was not closed.
    fn drop(&mut self) {
        self.abort_communicator();
    }
}

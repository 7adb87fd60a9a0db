//! The transport: nonblocking sends and receives that are tested until a deadline, and notices beside them.
//!
//! Collectives are those of the trait, made of exchanges: MPI's own do not say which rank keeps the others waiting. Long messages move
//! while a rank is in a call of this transport, or by themselves where the network adapter moves them.
//!
//! A rank that waits for long tells all others for whom. At the deadline the one that is silent is at the end of the chain of those who
//! wait; that, or a process that is gone, is a fault, which is told to all. Ranks that find faults at the same time agree on the one of
//! the earliest step.

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use mpi::environment::Universe;
use seq_parallel::transport::{self, Buffer, FRAME_BYTES, Tag, Ticket, Traffic, Transport};
use seq_parallel::{Error, PeerFault};

use crate::alive::Identity;
use crate::calls::{self, Comm, Failed, Request};
use crate::notice::{self, Notice};

/// Steps that have tags of their own; MPI promises tags up to 32767 only. The frame has the whole step.
const STEPS: u32 = 4096;
/// How long messages of a rank that has left may be on their way.
const LAST_WORDS: Duration = Duration::from_millis(20);
/// How long ranks listen for faults that others found at the same time.
const SETTLING: Duration = Duration::from_millis(100);
/// Between looks at the process table.
const LOOK: Duration = Duration::from_millis(10);

/// This process's end of all processes of an MPI job.
pub struct Mpi {
    rank: usize,
    ranks: usize,
    data: Comm,
    notices: Comm,
    /// Who the processes are.
    identities: Vec<Identity>,
    /// Of each rank that has said so: for whom it waits, and where.
    waiting: Vec<Option<(usize, Tag)>>,
    /// Ranks that have left in order.
    left: Vec<bool>,
    /// Faults that this rank or others have found: who, and what.
    found: Vec<(usize, Fault)>,
    /// The one that all agree on.
    fault: Option<Fault>,
    /// Notices under way.
    outbox: Vec<(Request, Arc<[u64; notice::WORDS]>)>,
    next: u64,
    pending: HashMap<u64, Pending>,
    traffic: Traffic,
    deadline: Duration,
    /// Dropped, which is MPI_Finalize, by `close` alone: it waits for everyone.
    universe: ManuallyDrop<Universe>,
}

#[derive(Debug, Clone)]
struct Fault {
    peer: usize,
    at: Tag,
    fault: PeerFault,
}

/// An exchange under way, with its buffers: MPI has their addresses until both requests are done, so one that is given up is leaked.
struct Pending {
    tag: Tag,
    to: usize,
    from: usize,
    _send: Arc<Buffer>,
    recv: Buffer,
    sending: Request,
    receiving: Request,
}

impl Mpi {
    /// Initialises MPI and meets the other processes, which takes as long as the last of them needs.
    ///
    /// # Errors
    /// [`Error::Library`] if MPI is initialised already, has no calls from several threads in turn, or fails.
    pub fn start() -> Result<Self, Error> {
        let universe = ManuallyDrop::new(calls::initialise()?);
        let (data, notices) = (Comm::of_world()?, Comm::of_world()?);
        let (rank, ranks) = data.place()?;
        let identities = data.introduce(Identity::own().words(), ranks)?;
        notices.introduce([0], ranks)?;
        Ok(Mpi {
            rank,
            ranks,
            data,
            notices,
            identities: identities.into_iter().map(Identity::of_words).collect(),
            waiting: vec![None; ranks],
            left: vec![false; ranks],
            found: Vec::new(),
            fault: None,
            outbox: Vec::new(),
            next: 0,
            pending: HashMap::new(),
            traffic: Traffic::default(),
            deadline: transport::DEADLINE,
            universe,
        })
    }

    /// Waits for every rank, then ends MPI. A process whose end is dropped without it leaves the job without `MPI_Finalize`: the way out
    /// after a fault.
    ///
    /// # Errors
    /// [`Error::Peer`] when a rank has failed; MPI is not ended then.
    pub fn close(mut self) -> Result<(), Error> {
        self.barrier()?;
        // Nobody can bound MPI_Finalize, which waits for a process that dies this late.
        let (done, watch) = mpsc::channel::<()>();
        let (rank, deadline) = (self.rank, self.deadline);
        std::thread::spawn(move || {
            if watch.recv_timeout(deadline) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("rank {rank}: MPI_Finalize did not return within {} ms", deadline.as_millis());
                std::process::exit(1);
            }
        });
        // SAFETY: this is the one place that drops it, and the end is forgotten next.
        unsafe { ManuallyDrop::drop(&mut self.universe) };
        // Nothing is under way after a barrier in a program that waits for its tickets; what is, is leaked with the rest.
        std::mem::forget(self);
        drop(done);
        Ok(())
    }

    /// Reads what the other ranks have to say.
    fn listen(&mut self) -> Result<(), Failed> {
        while let Some(words) = self.notices.take::<{ notice::WORDS }>(0)? {
            match Notice::of_words(&words, self.ranks) {
                Some(Notice::Waits { from, for_rank, at }) => self.waiting[from] = Some((for_rank, at)),
                Some(Notice::GoesOn { from }) => self.waiting[from] = None,
                Some(Notice::Leaves { from }) => self.left[from] = true,
                Some(Notice::Fault { from, peer, at, fault }) => {
                    self.found.push((from, Fault { peer, at, fault }));
                }
                // Whoever sends such things is found out by what it sends elsewhere.
                None => {}
            }
        }
        let mut outbox = std::mem::take(&mut self.outbox);
        // One that cannot be sent is one that its rank does not need.
        outbox.retain_mut(|(request, _)| matches!(request.test(), Ok(None)));
        self.outbox.append(&mut outbox);
        Ok(())
    }

    /// Tells all others.
    fn tell(&mut self, notice: &Notice) {
        let words = Arc::new(notice.words());
        for to in (0..self.ranks).filter(|&to| to != self.rank) {
            // SAFETY: the outbox keeps the words until the request is done; it is leaked, not dropped.
            let sent = unsafe { self.notices.send(&words[..], to, 0) };
            // Whom it cannot reach finds out for itself.
            if let Ok(request) = sent {
                self.outbox.push((request, words.clone()));
            }
        }
    }

    /// The fault that the ranks agree on, if any has found one.
    fn hear(&mut self) -> Result<(), Error> {
        self.listen()?;
        if self.fault.is_none() && !self.found.is_empty() {
            let settled = Instant::now() + SETTLING.min(self.deadline / 8);
            while Instant::now() < settled {
                self.listen()?;
                std::thread::sleep(Duration::from_millis(1));
            }
            let first = self.found.iter().min_by_key(|(from, fault)| (fault.at.step, *from));
            self.fault = first.map(|(_, fault)| fault.clone());
        }
        match self.fault.clone() {
            None => Ok(()),
            Some(Fault { peer, at, fault }) => Err(Error::Peer { rank: self.rank, peer, at, fault }),
        }
    }

    /// Tells all others of a fault, and gives the one that all agree on.
    fn fail(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error {
        self.tell(&Notice::Fault { from: self.rank, peer, at, fault: fault.clone() });
        self.found.push((self.rank, Fault { peer, at, fault: fault.clone() }));
        self.hear().err().unwrap_or(Error::Peer { rank: self.rank, peer, at, fault })
    }

    /// Tests a request until it is done, which `peer` has to bring about. Gives the words that came.
    fn until(&mut self, peer: usize, tag: Tag, request: &mut Request) -> Result<usize, Error> {
        let start = Instant::now();
        let (mut turns, mut told) = (0u32, false);
        let (mut looked, mut missed) = (start, None);
        loop {
            self.hear()?;
            match request.test() {
                Ok(None) => {}
                Ok(Some(words)) => {
                    if told {
                        self.waiting[self.rank] = None;
                        self.tell(&Notice::GoesOn { from: self.rank });
                    }
                    return Ok(words);
                }
                Err(failed) if failed.is_truncation() => {
                    return Err(self.fail(
                        peer,
                        tag,
                        PeerFault::Garbage("more bytes than there should be".into()),
                    ));
                }
                Err(failed) => return Err(self.fail(peer, tag, PeerFault::Unreachable(failed.message()))),
            }
            let waited = start.elapsed();
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                if missed.is_none()
                    && (self.left[peer] || self.identities[peer].is_gone(self.identities[self.rank]))
                {
                    missed = Some(looked);
                }
            }
            if missed.is_some_and(|missed: Instant| missed.elapsed() >= LAST_WORDS) {
                return Err(self.fail(peer, tag, PeerFault::Gone));
            }
            if waited >= self.deadline {
                let (culprit, at) = self.silent(peer, tag);
                let fault = PeerFault::Stalled { waited_ms: waited.as_millis() as u64 };
                return Err(self.fail(culprit, at, fault));
            }
            if !told && waited >= self.deadline / 8 {
                told = true;
                self.waiting[self.rank] = Some((peer, tag));
                self.tell(&Notice::Waits { from: self.rank, for_rank: peer, at: tag });
            }
            // Ranks may share a core.
            turns = turns.saturating_add(1);
            match turns {
                0..200 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    /// Who is silent: the end of the chain of ranks that wait for each other, and where it is waited for; `peer` itself when they
    /// wait in a circle.
    fn silent(&self, peer: usize, tag: Tag) -> (usize, Tag) {
        let (mut last, mut at) = (peer, tag);
        for _ in 0..self.ranks {
            match self.waiting[last] {
                Some((next, _)) if next == self.rank => break,
                Some((next, tag)) => (last, at) = (next, tag),
                None => return (last, at),
            }
        }
        (peer, tag)
    }

    fn complete(&mut self, pending: &mut Pending) -> Result<(), Error> {
        let Pending { tag, to, from, .. } = *pending;
        let words = self.until(from, tag, &mut pending.receiving)?;
        let expected = pending.recv.words().len();
        let opened = if words == expected {
            transport::open(&pending.recv, tag, from)
        } else {
            let payload = (8 * words).saturating_sub(FRAME_BYTES);
            Err(PeerFault::Garbage(format!("{payload} bytes instead of {}", pending.recv.len())))
        };
        if let Err(fault) = opened {
            return Err(self.fail(from, tag, fault));
        }
        self.traffic.received += pending.recv.len() as u64;
        self.until(to, tag, &mut pending.sending).map(drop)
    }
}

/// The tag of messages.
fn number(tag: Tag) -> i32 {
    (tag.operation as i32) * STEPS as i32 + (tag.step % STEPS) as i32
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn exchange(
        &mut self,
        tag: Tag,
        to: usize,
        send: Arc<Buffer>,
        from: usize,
        mut recv: Buffer,
    ) -> Result<Ticket, Error> {
        transport::check_ends(self.rank, self.ranks, to, from)?;
        self.hear()?;
        // SAFETY: the words are on the heap, where they stay while `recv` moves into `pending`; nobody reaches them there, and they
        // leave it when the request is done or are leaked.
        let receiving = unsafe { self.data.receive(recv.words_mut(), from, number(tag)) }?;
        // SAFETY: likewise; what is shared by an `Arc` that is kept cannot be written.
        let sending = match unsafe { self.data.send(send.words(), to, number(tag)) } {
            Ok(sending) => sending,
            Err(failed) => {
                std::mem::forget(recv);
                return Err(self.fail(to, tag, PeerFault::Unreachable(failed.message())));
            }
        };
        let ticket = self.next;
        self.next += 1;
        self.traffic.sent += send.len() as u64;
        self.traffic.messages += 1;
        self.pending.insert(ticket, Pending { tag, to, from, _send: send, recv, sending, receiving });
        Ok(Ticket(ticket))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        let Some(mut pending) = self.pending.remove(&ticket.0) else {
            return Err(Error::argument("ticket", "one of this transport", format!("{ticket:?}")));
        };
        match self.complete(&mut pending) {
            Ok(()) => Ok(pending.recv),
            Err(error) => {
                std::mem::forget(pending);
                Err(error)
            }
        }
    }

    fn abort(&mut self, at: Tag, reason: &str) {
        if self.fault.is_none() {
            self.fail(self.rank, at, PeerFault::Aborted(reason.into()));
        }
    }

    fn check(&mut self) -> Result<(), Error> {
        self.hear()
    }

    fn is_gone(&mut self, peer: usize) -> bool {
        // What cannot be heard is found out by whoever waits.
        let _ = self.listen();
        self.left.get(peer).is_some_and(|left| *left)
            || self.identities.get(peer).is_some_and(|peer| peer.is_gone(self.identities[self.rank]))
    }

    fn accuse(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error {
        match self.hear() {
            Ok(()) => self.fail(peer, at, fault),
            Err(known) => known,
        }
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }
}

impl Drop for Mpi {
    /// Leaves without `MPI_Finalize`: whoever waits for this rank hears that it is gone.
    fn drop(&mut self) {
        if self.fault.is_none() {
            self.tell(&Notice::Leaves { from: self.rank });
            let end = Instant::now() + LAST_WORDS;
            while !self.outbox.is_empty() && Instant::now() < end && self.listen().is_ok() {
                std::thread::yield_now();
            }
        }
        // MPI may still write to what was not waited for.
        std::mem::forget(std::mem::take(&mut self.pending));
        std::mem::forget(std::mem::take(&mut self.outbox));
    }
}

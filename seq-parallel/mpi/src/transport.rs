//! The transport: nonblocking sends and receives that are tested until a deadline, and notices beside them.
//!
//! Collectives are those of the trait, made of exchanges: MPI's own do not say which rank keeps the others waiting. Messages are sent in
//! MPI's synchronous mode, so that a wait that ends says of both peers that they have posted, of short messages, too. Long ones move
//! while a rank is in a call of this transport, or by themselves where the network adapter moves them.
//!
//! A rank whose deadline is near tells all others for whom it waits, and hears the same of everybody who waits, however shortly. At the
//! deadline the one that is silent is at the end of the chain of those who wait; that, or a process that is gone, is a fault, which is
//! told to all. Ranks that find faults at the same time agree on the one of the earliest exchange, by numbers that are those of all ranks:
//! each passes on what it has heard first, and waits a while until all others have.

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mpi::environment::Universe;
use seq_parallel::transport::{self, Buffer, FRAME_BYTES, Operation, Tag, Ticket, Traffic, Transport};
use seq_parallel::{Error, PeerFault};

use crate::alive::Identity;
use crate::calls::{self, Comm, Failed, Request};
use crate::notice::{self, Notice};
use crate::number::Numbers;
use crate::watchdog::{self, Call, Watchdog};

/// Steps that have tags of their own; MPI promises tags up to 32767 only. The frame has the whole step.
const STEPS: u32 = 2048;
/// How long messages of a rank that has left may be on their way, and how many tests it may take to find them.
const LAST_WORDS: (Duration, u32) = (Duration::from_millis(20), 50);
/// How long a rank waits at most, before it reports a fault, until all others have said what they know of.
const SETTLING: Duration = Duration::from_secs(2);
/// The same, for ranks that are accused themselves: they may be silent for good.
const SETTLING_WITH_THE_ACCUSED: Duration = Duration::from_millis(100);
/// The step of a rank that is at none.
const BETWEEN: Tag = Tag::new(Operation::Barrier, 0);
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
    /// Of each rank that has said so: for whom it waits.
    waiting: Vec<Option<Waiting>>,
    /// Ranks that have left in order.
    left: Vec<bool>,
    /// Faults that this rank or others have found: who, and what.
    found: Vec<(usize, Fault)>,
    /// Ranks that have said which faults they know of.
    spoken: Vec<bool>,
    /// The one that all agree on.
    fault: Option<Fault>,
    /// For whom this rank waits by other means than those of this transport, and where.
    elsewhere: Option<(usize, Place)>,
    /// Whether notices cannot be received any more.
    deaf: bool,
    /// Notices under way.
    outbox: Vec<(Request, Arc<[u64; notice::WORDS]>)>,
    next: u64,
    numbers: Numbers,
    pending: HashMap<u64, Pending>,
    traffic: Traffic,
    deadline: Duration,
    watchdog: Watchdog,
    /// Dropped, which is MPI_Finalize, by `close` alone: it waits for everyone.
    universe: ManuallyDrop<Universe>,
}

/// Where an exchange is: its tag, and its number ([`Numbers`]), which says what comes first across operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    at: Tag,
    exchange: u64,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    for_rank: usize,
    place: Place,
    /// Whether others are to say so, too.
    asks: bool,
}

#[derive(Debug, Clone)]
struct Fault {
    peer: usize,
    place: Place,
    fault: PeerFault,
}

/// The fault that ranks agree on: of the earliest exchange; of several, what a rank says of itself, for it knows; then what the first of the
/// ranks has found.
fn first(found: &[(usize, Fault)]) -> Option<&(usize, Fault)> {
    found.iter().min_by_key(|(finder, fault)| (fault.place.exchange, fault.peer != *finder, *finder))
}

/// An exchange under way, with its buffers: MPI has their addresses until both requests are done, so one that is given up is leaked.
struct Pending {
    place: Place,
    to: usize,
    from: usize,
    _send: Arc<Buffer>,
    recv: Buffer,
    sending: Request,
    receiving: Request,
}

impl Mpi {
    /// As [`start_within`](Self::start_within) [`DEADLINE`](transport::DEADLINE).
    ///
    /// # Errors
    /// As [`start_within`](Self::start_within).
    pub fn start() -> Result<Self, Error> {
        Self::start_within(transport::DEADLINE)
    }

    /// Initialises MPI and meets the other processes, which takes as long as the last of them needs. `deadline` is that of waits, too.
    /// Nobody can break MPI_Init off: past the deadline, this ends the process.
    ///
    /// # Errors
    /// [`Error::Library`] if MPI is initialised already, has no calls from several threads in turn, or fails.
    pub fn start_within(deadline: Duration) -> Result<Self, Error> {
        let watchdog = Watchdog::new(watchdog::exit);
        let _watch = watchdog.watch(Call::Start, deadline);
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
            spoken: vec![false; ranks],
            fault: None,
            elsewhere: None,
            deaf: false,
            outbox: Vec::new(),
            next: 0,
            numbers: Numbers::default(),
            pending: HashMap::new(),
            traffic: Traffic::default(),
            deadline,
            watchdog,
            universe,
        })
    }

    /// Waits for every rank, then ends MPI; a process whose MPI_Finalize does not come back within the deadline is ended. One whose end is
    /// dropped without it leaves the job without `MPI_Finalize`: the way out after a fault.
    ///
    /// # Errors
    /// [`Error::Peer`] when a rank has failed; MPI is not ended then.
    pub fn close(mut self) -> Result<(), Error> {
        self.barrier()?;
        // Messages that are here are given, whoever has failed since.
        self.check()?;
        // It waits for a process that dies this late.
        let watch = self.watchdog.watch(Call::Finalize { rank: self.rank }, self.deadline);
        // SAFETY: this is the one place that drops it, and the end is forgotten next.
        unsafe { ManuallyDrop::drop(&mut self.universe) };
        // Nothing is under way after a barrier in a program that waits for its tickets; what is, is leaked with the rest.
        std::mem::forget(self);
        drop(watch);
        Ok(())
    }

    /// Whether rank `peer` waits for others, as far as it has said: it is asked to. For whoever wants to know whether another goes on or
    /// will say something else; until it waits, that one hears that this rank waits for it.
    pub fn is_waiting(&mut self, peer: usize) -> bool {
        let place = self.here(BETWEEN);
        self.listen_at(place);
        let waits = self.waiting.get(peer).is_some_and(Option::is_some);
        match waits {
            true => self.goes_on(),
            false => self.say_for_whom(peer, place, true),
        }
        waits
    }

    /// Where this rank is, between exchanges.
    fn here(&self, at: Tag) -> Place {
        Place { at, exchange: self.numbers.at(at) }
    }

    /// Reads what the other ranks have to say.
    fn listen(&mut self) -> Result<(), Failed> {
        while let Some(words) = self.notices.take::<{ notice::WORDS }>(0)? {
            match Notice::of_words(&words, self.ranks) {
                Some(Notice::Waits { from, for_rank, at, exchange, asks }) => {
                    self.waiting[from] = Some(Waiting { for_rank, place: Place { at, exchange }, asks });
                }
                Some(Notice::GoesOn { from }) => self.waiting[from] = None,
                Some(Notice::Leaves { from }) => self.left[from] = true,
                Some(Notice::Fault { from, finder, peer, at, exchange, fault }) => {
                    self.spoken[from] = true;
                    self.found.push((finder, Fault { peer, place: Place { at, exchange }, fault }));
                }
                // Whoever sends such things is found out by what it sends elsewhere.
                None => {}
            }
        }
        for (mut request, words) in std::mem::take(&mut self.outbox) {
            match request.test() {
                Ok(None) => self.outbox.push((request, words)),
                Ok(Some(_)) => {}
                // One that cannot be sent is one that its rank does not need, but MPI may read its words still.
                Err(_) => std::mem::forget((request, words)),
            }
        }
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

    /// [`listen`](Self::listen), where this rank is at `place`: one that cannot hear the others any more has failed them.
    fn listen_at(&mut self, place: Place) {
        if self.deaf {
            return;
        }
        if let Err(failed) = self.listen() {
            self.deaf = true;
            self.find(self.rank, place, PeerFault::Aborted(Error::from(failed).to_string()));
        }
    }

    /// The fault that the ranks agree on, if any has found one; this one is at `place`.
    fn hear(&mut self, place: Place) -> Result<(), Error> {
        self.listen_at(place);
        if self.fault.is_none() && !self.found.is_empty() {
            self.settle(place);
            self.fault = first(&self.found).map(|(_, fault)| fault.clone());
        }
        match self.fault.clone() {
            None => Ok(()),
            Some(Fault { peer, place, fault }) => {
                Err(Error::Peer { rank: self.rank, peer, at: place.at, fault })
            }
        }
    }

    /// Says which fault this rank knows of, if it has not, and hears the same of all others that can say so. Who has heard all has heard
    /// the same as everybody. What a rank has said before it ended may still be on its way.
    fn settle(&mut self, place: Place) {
        if let Some((finder, fault)) = first(&self.found).cloned()
            && !self.spoken[self.rank]
        {
            self.tell_of(finder, &fault);
        }
        let (start, longest) = (Instant::now(), SETTLING.min(self.deadline / 4));
        loop {
            let waited = start.elapsed();
            self.listen_at(place);
            let accused = |rank| self.found.iter().any(|(_, fault)| fault.peer == rank);
            let is_awaited = |rank: usize| {
                let patience = match accused(rank) {
                    _ if self.identities[rank].is_gone(self.identities[self.rank]) => LAST_WORDS.0,
                    true => SETTLING_WITH_THE_ACCUSED,
                    false => longest,
                };
                waited < patience.min(longest) && !(self.spoken[rank] || self.left[rank])
            };
            if self.deaf || !(0..self.ranks).any(is_awaited) {
                // One that has ended while others were awaited.
                self.listen_at(place);
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Tells all others of a fault that `finder` has found.
    fn tell_of(&mut self, finder: usize, fault: &Fault) {
        let Fault { peer, place: Place { at, exchange }, fault } = fault.clone();
        self.tell(&Notice::Fault { from: self.rank, finder, peer, at, exchange, fault });
        self.spoken[self.rank] = true;
    }

    /// Tells all others of a fault that this rank has found.
    fn find(&mut self, peer: usize, place: Place, fault: PeerFault) {
        let fault = Fault { peer, place, fault };
        self.tell_of(self.rank, &fault);
        self.found.push((self.rank, fault));
    }

    /// Tells all others of a fault, and gives the one that all agree on.
    fn fail(&mut self, peer: usize, place: Place, fault: PeerFault) -> Error {
        self.find(peer, place, fault.clone());
        let known = self.hear(place).err();
        known.unwrap_or(Error::Peer { rank: self.rank, peer, at: place.at, fault })
    }

    /// Tests a request until it is done, which `peer` has to bring about, within the deadline since `start`. Gives the words that came.
    fn until(
        &mut self,
        start: Instant,
        peer: usize,
        place: Place,
        request: &mut Request,
    ) -> Result<usize, Error> {
        // A test that does not come back is not what the deadline is for: who waits is given time to say so.
        let call = Call::Wait { rank: self.rank, peer, at: place.at };
        let _watch = self.watchdog.watch(call, 2 * self.deadline);
        let near = self.deadline - self.deadline / 4;
        let mut turns = 0u32;
        let (mut looked, mut missed) = (Instant::now(), None);
        loop {
            // Before anybody is heard: a process that got no core for long is late itself, and listens once more before it accuses.
            let waited = start.elapsed();
            let heard = self.hear(place);
            // What is here is given, whoever has failed since.
            match request.test() {
                Ok(None) => heard?,
                Ok(Some(words)) => {
                    self.goes_on();
                    return Ok(words);
                }
                Err(failed) if failed.is_truncation() => {
                    let fault = PeerFault::Garbage("more bytes than there should be".into());
                    return Err(self.fail(peer, place, fault));
                }
                Err(failed) => return Err(self.fail(peer, place, PeerFault::Unreachable(failed.message()))),
            }
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                if missed.is_none()
                    && (self.left[peer] || self.identities[peer].is_gone(self.identities[self.rank]))
                {
                    missed = Some((looked, turns));
                }
            }
            let (long, tests) = LAST_WORDS;
            if missed.is_some_and(|(at, turn): (Instant, u32)| at.elapsed() >= long && turns - turn >= tests)
            {
                return Err(self.fail(peer, place, PeerFault::Gone));
            }
            if waited >= self.deadline {
                let (culprit, place) = self.silent(peer, place);
                let fault = PeerFault::Stalled { waited_ms: waited.as_millis() as u64 };
                return Err(self.fail(culprit, place, fault));
            }
            self.say_for_whom(peer, place, waited >= near);
            // Ranks may share a core.
            turns = turns.saturating_add(1);
            match turns {
                0..200 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    /// Tells all others for whom this rank waits, once, if it asks the same of them or is asked.
    fn say_for_whom(&mut self, for_rank: usize, place: Place, asks: bool) {
        let is_asked = self.waiting.iter().flatten().any(|waiting| waiting.asks);
        let says = self.waiting[self.rank].map(|waiting| waiting.asks);
        if (asks && says != Some(true)) || (says.is_none() && is_asked) {
            self.waiting[self.rank] = Some(Waiting { for_rank, place, asks });
            let (from, Place { at, exchange }) = (self.rank, place);
            self.tell(&Notice::Waits { from, for_rank, at, exchange, asks });
        }
    }

    /// Tells all others that this rank waits no more, if they think so.
    fn goes_on(&mut self) {
        if self.waiting[self.rank].take().is_some() {
            self.tell(&Notice::GoesOn { from: self.rank });
        }
    }

    /// Who is silent: the end of the chain of ranks that wait for each other, and where it is waited for; `peer` itself when they
    /// wait in a circle.
    fn silent(&self, peer: usize, place: Place) -> (usize, Place) {
        let (mut last, mut at) = (peer, place);
        for _ in 0..self.ranks {
            match self.waiting[last] {
                Some(Waiting { for_rank, .. }) if for_rank == self.rank => break,
                Some(Waiting { for_rank, place, .. }) => (last, at) = (for_rank, place),
                None => return (last, at),
            }
        }
        (peer, place)
    }

    fn complete(&mut self, pending: &mut Pending) -> Result<(), Error> {
        let Pending { place, to, from, .. } = *pending;
        let start = Instant::now();
        let words = self.until(start, from, place, &mut pending.receiving)?;
        let expected = pending.recv.words().len();
        let opened = if words == expected {
            transport::open(&pending.recv, place.at, from)
        } else {
            let payload = (8 * words).saturating_sub(FRAME_BYTES);
            Err(PeerFault::Garbage(format!("{payload} bytes instead of {}", pending.recv.len())))
        };
        if let Err(fault) = opened {
            return Err(self.fail(from, place, fault));
        }
        self.traffic.received += pending.recv.len() as u64;
        self.until(start, to, place, &mut pending.sending).map(drop)
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
        let place = Place { at: tag, exchange: self.numbers.begin(tag, (to, from)) };
        self.hear(place)?;
        // SAFETY: the words are on the heap, where they stay while `recv` moves into `pending`; nobody reaches them there, and they
        // leave it when the request is done or are leaked.
        let receiving = match unsafe { self.data.receive(recv.words_mut(), from, number(tag)) } {
            Ok(receiving) => receiving,
            Err(failed) => return Err(self.fail(from, place, PeerFault::Unreachable(failed.message()))),
        };
        // SAFETY: likewise; what is shared by an `Arc` that is kept cannot be written.
        let sending = match unsafe { self.data.send_to_receiver(send.words(), to, number(tag)) } {
            Ok(sending) => sending,
            Err(failed) => {
                std::mem::forget(recv);
                return Err(self.fail(to, place, PeerFault::Unreachable(failed.message())));
            }
        };
        let ticket = self.next;
        self.next += 1;
        self.traffic.sent += send.len() as u64;
        self.traffic.messages += 1;
        self.pending.insert(ticket, Pending { place, to, from, _send: send, recv, sending, receiving });
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
            self.fail(self.rank, self.here(at), PeerFault::Aborted(reason.into()));
        }
    }

    fn check(&mut self) -> Result<(), Error> {
        // Where a rank is, between operations, is the barrier that it has not come to.
        self.hear(self.here(BETWEEN))?;
        if let Some((peer, place)) = self.elsewhere {
            self.say_for_whom(peer, place, false);
        }
        Ok(())
    }

    fn waits_for(&mut self, peer: Option<usize>, at: Tag) {
        self.goes_on();
        self.elsewhere = peer.map(|peer| (peer, self.here(at)));
    }

    fn is_gone(&mut self, peer: usize) -> bool {
        self.listen_at(self.here(BETWEEN));
        self.left.get(peer).is_some_and(|left| *left)
            || self.identities.get(peer).is_some_and(|peer| peer.is_gone(self.identities[self.rank]))
    }

    fn accuse(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error {
        let place = self.here(at);
        match self.hear(place) {
            Ok(()) => self.fail(peer, place, fault),
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
        }
        // Or of which fault it knows.
        let end = Instant::now() + LAST_WORDS.0;
        while !self.outbox.is_empty() && Instant::now() < end && self.listen().is_ok() {
            std::thread::yield_now();
        }
        // MPI may still write to what was not waited for.
        std::mem::forget(std::mem::take(&mut self.pending));
        std::mem::forget(std::mem::take(&mut self.outbox));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of different operations say nothing of what came first; the number of the exchange does.
    #[test]
    fn ranks_agree_on_the_fault_of_the_earliest_exchange() {
        let fault = |peer, operation, step, exchange| {
            let place = Place { at: Tag::new(operation, step), exchange };
            Fault { peer, place, fault: PeerFault::Gone }
        };
        let ring = fault(2, Operation::PassKv, 2, 9);
        let barrier = fault(3, Operation::Barrier, 0, 10);
        for found in [[(0, barrier.clone()), (3, ring.clone())], [(3, ring.clone()), (0, barrier.clone())]] {
            assert_eq!(first(&found).map(|(_, fault)| fault.peer), Some(2));
        }
        // Of one exchange, what the first of the ranks has found.
        let found = [(3, ring.clone()), (1, fault(0, Operation::PassKv, 2, 9))];
        assert_eq!(first(&found).map(|(_, fault)| fault.peer), Some(0));
        // But a rank knows best of itself.
        let own = (2, fault(2, Operation::PassKv, 2, 9));
        let found = [(0, fault(3, Operation::PassKv, 2, 9)), own, (1, fault(1, Operation::Barrier, 0, 10))];
        assert_eq!(first(&found).map(|(finder, _)| *finder), Some(2));
        assert!(first(&[]).is_none());
    }
}

//! Ranks as threads of one process.
//!
//! A message is copied once, from the sender's buffer into the receiver's, as soon as both are posted: what a copy engine does between
//! buffers of one GPU. The thread that posts second makes the copy, so that messages arrive whether or not anybody waits for them.
//! Waiting ranks say whom they wait for, so that a silent rank is found at the end of the chain of those who wait, not at its beginning.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Buffer, DEADLINE, Tag, Ticket, Traffic, Transport};
use crate::{Error, PeerFault};

/// A group of threads, and what is needed to make it anew.
#[derive(Debug, Clone)]
pub struct World {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Grows with every rebuilding; ends of an older generation are spent.
    generation: u64,
    /// Messages that were sent and not matched yet.
    letters: HashMap<Channel, VecDeque<Letter>>,
    /// Buffers to receive into that were not matched yet.
    slots: HashMap<Channel, VecDeque<Slot>>,
    /// Messages that are here, by (receiver, ticket).
    arrived: HashMap<(usize, u64), Buffer>,
    /// Exchanges, by (sender, ticket), whose message nobody reads any more.
    taken: HashSet<(usize, u64)>,
    /// Of each rank that waits: for whom, and where.
    waiting: Vec<Option<(usize, Tag)>>,
    /// Ranks whose end was dropped.
    gone: Vec<bool>,
    /// The first failure.
    fault: Option<(usize, Tag, PeerFault)>,
}

/// (from, to, tag): messages of a channel stay in order.
type Channel = (usize, usize, Tag);

#[derive(Debug)]
struct Letter {
    ticket: u64,
    buffer: Arc<Buffer>,
}

#[derive(Debug)]
struct Slot {
    ticket: u64,
    buffer: Buffer,
}

impl World {
    /// A group of `ranks` threads, and the end of each rank.
    ///
    /// # Errors
    /// [`Error::Argument`] for no ranks.
    pub fn new(ranks: usize) -> Result<(Self, Vec<Local>), Error> {
        if ranks == 0 {
            return Err(Error::argument("ranks", "at least 1", 0));
        }
        let world = World { shared: Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() }) };
        let ends = world.rebuild(ranks);
        Ok((world, ends))
    }

    /// Makes the group anew, with as many ranks as asked for: after a failure, or to grow or shrink. Ends of before are spent; a
    /// straggler that still holds one gets an error at its next call.
    pub fn rebuild(&self, ranks: usize) -> Vec<Local> {
        let mut state = self.shared.lock();
        let generation = state.generation + 1;
        *state =
            State { generation, waiting: vec![None; ranks], gone: vec![false; ranks], ..State::default() };
        self.shared.changed.notify_all();
        let end = |rank| Local {
            shared: self.shared.clone(),
            generation,
            rank,
            ranks,
            next: 0,
            pending: HashMap::new(),
            traffic: Traffic::default(),
            deadline: DEADLINE,
        };
        (0..ranks).map(end).collect()
    }
}

/// Runs `body` on `ranks` threads, each with its end, and gives what they return, by rank.
///
/// # Errors
/// [`Error::Argument`] for no ranks.
///
/// # Panics
/// When a thread panics; the others then see it as gone.
pub fn run<R: Send>(ranks: usize, body: impl Fn(Local) -> R + Sync) -> Result<Vec<R>, Error> {
    let (_, ends) = World::new(ranks)?;
    Ok(run_on(ends, body))
}

/// As [`run`], on ends that are there already, wrapped or not.
///
/// # Panics
/// When a thread panics.
pub fn run_on<X: Send, R: Send>(ends: Vec<X>, body: impl Fn(X) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = ends.into_iter().map(|end| scope.spawn(move || body(end))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, R>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    })
}

impl Shared {
    /// The state; a panic of another rank leaves it whole, because nothing panics while it is locked.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One rank's end of a [`World`].
#[derive(Debug)]
pub struct Local {
    shared: Arc<Shared>,
    generation: u64,
    rank: usize,
    ranks: usize,
    next: u64,
    pending: HashMap<u64, Pending>,
    traffic: Traffic,
    deadline: Duration,
}

#[derive(Debug)]
struct Pending {
    tag: Tag,
    to: usize,
    from: usize,
}

impl Local {
    /// Why this end cannot be used any more.
    fn fault(&self, state: &State, at: Tag) -> Option<Error> {
        if state.generation != self.generation {
            let fault = PeerFault::Aborted("the group was made anew".into());
            return Some(Error::Peer { rank: self.rank, peer: self.rank, at, fault });
        }
        let (peer, at, fault) = state.fault.clone()?;
        Some(Error::Peer { rank: self.rank, peer, at, fault })
    }

    /// Makes a failure known to all, unless another is known already, and gives the known one.
    fn fail(&self, state: &mut State, peer: usize, at: Tag, fault: PeerFault) -> Error {
        if state.generation == self.generation && state.fault.is_none() {
            state.fault = Some((peer, at, fault.clone()));
            self.shared.changed.notify_all();
        }
        self.fault(state, at).unwrap_or(Error::Peer { rank: self.rank, peer, at, fault })
    }

    /// Copies a message into the buffer that waits for it, outside the lock: other ranks copy theirs meanwhile.
    fn deliver(&self, (from, to, tag): Channel, letter: Letter, mut slot: Slot) -> Result<(), Error> {
        let checked = if letter.buffer.len() == slot.buffer.len() {
            slot.buffer.message_mut().copy_from_slice(letter.buffer.message());
            super::open(&slot.buffer, tag, from)
        } else {
            let found = format!("{} bytes instead of {}", letter.buffer.len(), slot.buffer.len());
            Err(PeerFault::Garbage(found))
        };
        drop(letter.buffer);
        let mut state = self.shared.lock();
        if state.generation != self.generation {
            return self.fault(&state, tag).map_or(Ok(()), Err);
        }
        match checked {
            Ok(()) => {
                state.arrived.insert((to, slot.ticket), slot.buffer);
                state.taken.insert((from, letter.ticket));
                self.shared.changed.notify_all();
                Ok(())
            }
            Err(fault) => Err(self.fail(&mut state, from, tag, fault)),
        }
    }

    /// Waits until `take` finds what `peer` has to bring about, for as long as is left of the deadline since `start`.
    fn until<T>(
        &self,
        start: Instant,
        peer: usize,
        tag: Tag,
        mut take: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, Error> {
        let mut state = self.shared.lock();
        loop {
            // What is here is given, whoever has failed since: it was sent to be used. A group made anew has nothing for an old end.
            if state.generation == self.generation
                && let Some(found) = take(&mut state)
            {
                state.waiting[self.rank] = None;
                return Ok(found);
            }
            if let Some(error) = self.fault(&state, tag) {
                return Err(error);
            }
            if state.gone[peer] {
                return Err(self.fail(&mut state, peer, tag, PeerFault::Gone));
            }
            let waited = start.elapsed();
            let Some(left) = self.deadline.checked_sub(waited).filter(|left| !left.is_zero()) else {
                let (culprit, at) = state.silent(self.rank, peer, tag);
                let fault = PeerFault::Stalled { waited_ms: waited.as_millis() as u64 };
                return Err(self.fail(&mut state, culprit, at, fault));
            };
            state.waiting[self.rank] = Some((peer, tag));
            let woken = self.shared.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// Who is silent: the end of the chain of ranks that wait for each other, and where it is waited for; `peer` itself when they
    /// wait in a circle.
    fn silent(&self, rank: usize, peer: usize, tag: Tag) -> (usize, Tag) {
        let (mut last, mut at) = (peer, tag);
        for _ in 0..self.waiting.len() {
            match self.waiting[last] {
                Some((next, _)) if next == rank => break,
                Some((next, tag)) => (last, at) = (next, tag),
                None => return (last, at),
            }
        }
        (peer, tag)
    }
}

impl Transport for Local {
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
        recv: Buffer,
    ) -> Result<Ticket, Error> {
        super::check_ends(self.rank, self.ranks, to, from)?;
        let (ticket, bytes) = (self.next, send.len() as u64);
        let (letter, slot) = (Letter { ticket, buffer: send }, Slot { ticket, buffer: recv });
        let (out, home) = ((self.rank, to, tag), (from, self.rank, tag));
        let mut matches = Vec::with_capacity(2);
        let mut state = self.shared.lock();
        if let Some(error) = self.fault(&state, tag) {
            return Err(error);
        }
        match state.slots.get_mut(&out).and_then(VecDeque::pop_front) {
            Some(slot) => matches.push((out, letter, slot)),
            None => state.letters.entry(out).or_default().push_back(letter),
        }
        match state.letters.get_mut(&home).and_then(VecDeque::pop_front) {
            Some(letter) => matches.push((home, letter, slot)),
            None => state.slots.entry(home).or_default().push_back(slot),
        }
        drop(state);
        for (channel, letter, slot) in matches {
            self.deliver(channel, letter, slot)?;
        }
        self.next += 1;
        self.traffic.sent += bytes;
        self.traffic.messages += 1;
        self.pending.insert(ticket, Pending { tag, to, from });
        Ok(Ticket(ticket))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        let Some(Pending { tag, to, from }) = self.pending.remove(&ticket.0) else {
            return Err(Error::argument("ticket", "one of this transport", format!("{ticket:?}")));
        };
        let (own, start) = ((self.rank, ticket.0), Instant::now());
        let received = self.until(start, from, tag, |state| state.arrived.remove(&own))?;
        self.traffic.received += received.len() as u64;
        self.until(start, to, tag, |state| state.taken.remove(&own).then_some(()))?;
        Ok(received)
    }

    fn abort(&mut self, at: Tag, reason: &str) {
        let mut state = self.shared.lock();
        self.fail(&mut state, self.rank, at, PeerFault::Aborted(reason.into()));
    }

    fn check(&mut self) -> Result<(), Error> {
        let state = self.shared.lock();
        // Where a rank is, between operations, is the barrier that it has not come to.
        self.fault(&state, Tag::new(super::Operation::Barrier, 0)).map_or(Ok(()), Err)
    }

    fn is_gone(&mut self, peer: usize) -> bool {
        let state = self.shared.lock();
        state.generation != self.generation || state.gone.get(peer).is_some_and(|gone| *gone)
    }

    fn waits_for(&mut self, peer: Option<usize>, at: Tag) {
        let mut state = self.shared.lock();
        if state.generation == self.generation {
            state.waiting[self.rank] = peer.map(|peer| (peer, at));
        }
    }

    fn accuse(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error {
        let mut state = self.shared.lock();
        self.fail(&mut state, peer, at, fault)
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

impl Drop for Local {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if state.generation == self.generation {
            state.gone[self.rank] = true;
            self.shared.changed.notify_all();
        }
    }
}

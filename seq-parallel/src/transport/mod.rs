//! Transports: how ranks move bytes.
//!
//! A transport gives [`exchange`](Transport::exchange), which starts sending to one rank and receiving from another, and
//! [`wait`](Transport::wait), which ends it; collectives are built of these where a library has none better. Buffers are handed
//! over: what is being sent is shared and cannot be written, what is being received into is gone until it has arrived. So the
//! hazards of double buffering are type errors.
//!
//! | transport | ranks are | for |
//! |---|---|---|
//! | [`local`] | threads of this process | one machine, tests |
//! | MPI: the package `seq-parallel/mpi` | processes of an MPI job | many machines |
//! | `gpu::transport` (features `cuda`, `nccl`) | threads on one GPU, or ranks over NCCL, with blocks in device memory | GPUs |
//! | [`sim`] | any of the others, with modelled links and compute on a clock of their own | planning, tests of overlap |
//!
//! # Faults
//!
//! Every wait has a deadline. A rank that is silent past it, is gone or sends garbage makes **every** other rank fail with an
//! [`Error::Peer`] that names that rank and the step, whoever noticed first. After that the transport is spent; a new one is made
//! of the survivors, or of all ([`local::World::rebuild`]).

mod buffer;
mod faulty;
pub mod local;
pub mod sim;
mod subgroup;

use std::sync::Arc;
use std::time::Duration;

pub use buffer::{Buffer, FRAME_BYTES, PROTOCOL};
pub use faulty::{Failure, Faulty};
pub use subgroup::Subgroup;

use crate::{Error, PeerFault};

/// Writes those methods of [`Transport`] that a wrapper hands on unchanged: where they are read, where they are changed, and their names.
macro_rules! forward {
    ($read:tt $write:tt: $($method:ident),+ $(,)?) => { $($crate::transport::forward!(@$method $read $write);)+ };
    (@rank ($($read:tt)+) $write:tt) => {
        fn rank(&self) -> usize {
            self.$($read)+.rank()
        }
    };
    (@ranks ($($read:tt)+) $write:tt) => {
        fn ranks(&self) -> usize {
            self.$($read)+.ranks()
        }
    };
    (@name_of ($($read:tt)+) $write:tt) => {
        fn name_of(&self, rank: usize) -> usize {
            self.$($read)+.name_of(rank)
        }
    };
    (@wait $read:tt ($($write:tt)+)) => {
        fn wait(&mut self, ticket: $crate::transport::Ticket) -> Result<$crate::transport::Buffer, $crate::Error> {
            self.$($write)+.wait(ticket)
        }
    };
    (@seal $read:tt ($($write:tt)+)) => {
        fn seal(&mut self, buffer: &mut $crate::transport::Buffer, tag: $crate::transport::Tag) {
            self.$($write)+.seal(buffer, tag);
        }
    };
    (@abort $read:tt ($($write:tt)+)) => {
        fn abort(&mut self, at: $crate::transport::Tag, reason: &str) {
            self.$($write)+.abort(at, reason);
        }
    };
    (@check $read:tt ($($write:tt)+)) => {
        fn check(&mut self) -> Result<(), $crate::Error> {
            self.$($write)+.check()
        }
    };
    (@is_gone $read:tt ($($write:tt)+)) => {
        fn is_gone(&mut self, peer: usize) -> bool {
            self.$($write)+.is_gone(peer)
        }
    };
    (@waits_for $read:tt ($($write:tt)+)) => {
        fn waits_for(&mut self, peer: Option<usize>, at: $crate::transport::Tag) {
            self.$($write)+.waits_for(peer, at);
        }
    };
    (@accuse $read:tt ($($write:tt)+)) => {
        fn accuse(&mut self, peer: usize, at: $crate::transport::Tag, fault: $crate::PeerFault) -> $crate::Error {
            self.$($write)+.accuse(peer, at, fault)
        }
    };
    (@gather_words_among $read:tt ($($write:tt)+)) => {
        fn gather_words_among(&mut self, members: &[usize], own: &[u64]) -> Result<Vec<u64>, $crate::Error> {
            self.$($write)+.gather_words_among(members, own)
        }
    };
    (@traffic ($($read:tt)+) $write:tt) => {
        fn traffic(&self) -> $crate::transport::Traffic {
            self.$($read)+.traffic()
        }
    };
    (@deadline ($($read:tt)+) $write:tt) => {
        fn deadline(&self) -> std::time::Duration {
            self.$($read)+.deadline()
        }
    };
    (@set_deadline $read:tt ($($write:tt)+)) => {
        fn set_deadline(&mut self, deadline: std::time::Duration) {
            self.$($write)+.set_deadline(deadline);
        }
    };
    (@computed $read:tt ($($write:tt)+)) => {
        fn computed(&mut self, pairs: u64) {
            self.$($write)+.computed(pairs);
        }
    };
}
pub(crate) use forward;

/// What a message is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Keys and values on their way round a ring.
    PassKv,
    /// Queries on their way round a ring.
    PassQ,
    /// Everyone sends to everyone.
    AllToAll,
    /// Everyone gets what everyone has.
    AllGather,
    /// Everyone gets a part of the sum.
    ReduceScatter,
    /// Nobody goes on before everybody came.
    Barrier,
    /// Queries of new tokens on their way to shards; steps are layers.
    DecodeQuery,
    /// Partial outputs of shards on their way back; steps are layers.
    DecodePartial,
    /// All have done their part (step 0) and wait (step 1); it is kept (step 2); all have been told (step 3).
    Commit,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Operation; 9] = [
        Operation::PassKv,
        Operation::PassQ,
        Operation::AllToAll,
        Operation::AllGather,
        Operation::ReduceScatter,
        Operation::Barrier,
        Operation::DecodeQuery,
        Operation::DecodePartial,
        Operation::Commit,
    ];
}

/// An operation and the step of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag {
    /// The operation.
    pub operation: Operation,
    /// The step, from 0.
    pub step: u32,
}

impl Tag {
    /// A step of an operation.
    pub const fn new(operation: Operation, step: usize) -> Self {
        Tag { operation, step: step as u32 }
    }

    /// As one word.
    pub const fn word(self) -> u64 {
        ((self.operation as u64) << 32) | self.step as u64
    }

    /// What [`word`](Self::word) was made of.
    pub fn of_word(word: u64) -> Option<Self> {
        let operation = *Operation::ALL.get((word >> 32) as usize)?;
        Some(Tag { operation, step: word as u32 })
    }
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.operation {
            Operation::PassKv => "ring (pass-KV)",
            Operation::PassQ => "ring (pass-Q)",
            Operation::AllToAll => "all-to-all",
            Operation::AllGather => "all-gather",
            Operation::ReduceScatter => "reduce-scatter",
            Operation::Barrier => "barrier",
            Operation::DecodeQuery => "decode (queries to shards)",
            Operation::DecodePartial => "decode (outputs of shards)",
            Operation::Commit => "commit",
        };
        write!(f, "{name} step {}", self.step)
    }
}

/// An exchange that was started and has to be waited for.
#[derive(Debug)]
#[must_use = "an exchange ends when it is waited for"]
pub struct Ticket(pub u64);

/// Bytes of payload and messages so far; frames are not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes sent to other ranks.
    pub sent: u64,
    /// Bytes received from other ranks.
    pub received: u64,
    /// Messages sent, empty ones included.
    pub messages: u64,
}

/// The deadline of transports that are not given another.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// One rank's end of a group of ranks.
///
/// Calls of a rank belong to one thread. All ranks make the same collective calls in the same order; exchanges match by sender,
/// receiver and tag, and in order among those of one tag.
pub trait Transport: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How many ranks.
    fn ranks(&self) -> usize;

    /// The rank that errors name when they speak of `rank`: that of the transport inside, for a [`Subgroup`].
    fn name_of(&self, rank: usize) -> usize {
        rank
    }

    /// Starts sending `send`, which was [sealed](Self::seal) with this tag, to rank `to`, and receiving a message of the same tag
    /// from rank `from` into `recv`, whose length says how much is expected. Waits for nobody; where a rank has failed, it may take as long
    /// as [`check`](Self::check) to say so.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank that is not there or is this one; [`Error::Peer`] when a rank has failed.
    fn exchange(
        &mut self,
        tag: Tag,
        to: usize,
        send: Arc<Buffer>,
        from: usize,
        recv: Buffer,
    ) -> Result<Ticket, Error>;

    /// Waits until both halves of an exchange are done: the message is here, and nothing reads what was sent any more. Then both of the
    /// other ranks have posted their halves, for short messages, too; that they wait, is not asked of them. What is done is given even if a
    /// rank has failed since; the next exchange says so.
    ///
    /// # Errors
    /// [`Error::Peer`] when a rank has failed, which is at the deadline at the latest.
    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error>;

    /// Makes a buffer ready to be sent. What was received may be sent on after it was sealed again.
    fn seal(&mut self, buffer: &mut Buffer, tag: Tag) {
        buffer.seal(tag, self.rank(), 0.0);
    }

    /// Tells every other rank that this one gives up, and why. The transport is spent afterwards.
    fn abort(&mut self, at: Tag, reason: &str);

    /// Hears whether a rank has failed: for whoever waits for something else meanwhile. Returns at once unless one has; then ranks that are
    /// processes first agree on which, for 2 s or a fourth of the deadline at most.
    ///
    /// # Errors
    /// [`Error::Peer`] when one has.
    fn check(&mut self) -> Result<(), Error>;

    /// Whether a rank is known to have left, in order or not; what it sent before may still be on its way. For whoever needs every rank
    /// and waits for something else.
    fn is_gone(&mut self, peer: usize) -> bool;

    /// Says for whom this rank waits by other means than [`wait`](Self::wait), or that it does no more: whoever is silent is found at the
    /// end of the chain of those who wait.
    fn waits_for(&mut self, peer: Option<usize>, at: Tag);

    /// Makes it known to all that rank `peer` has failed, unless a failure is known already, and gives the known one.
    fn accuse(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error;

    /// Bytes and messages so far.
    fn traffic(&self) -> Traffic;

    /// How long a wait may last.
    fn deadline(&self) -> Duration;

    /// Sets how long a wait may last.
    fn set_deadline(&mut self, deadline: Duration);

    /// Hears that this rank has computed so many (query, key) pairs of all heads: transports with a clock of their own advance it.
    fn computed(&mut self, pairs: u64) {
        let _ = pairs;
    }

    /// Gives what every rank has, equally many words of each, one rank after the other. For a few words that must not queue behind
    /// messages: ranks may have started different numbers of exchanges with each other, which only those have to match that move blocks
    /// without tags. Wherever those move, these words go through the host, and no clock is modelled for them.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange) and [`wait`](Self::wait).
    fn gather_words(&mut self, own: &[u64]) -> Result<Vec<u64>, Error> {
        let all: Vec<usize> = (0..self.ranks()).collect();
        self.gather_words_among(&all, own)
    }

    /// As [`gather_words`](Self::gather_words), of some ranks only, in this order. Each of them calls it, and this rank is one of them.
    ///
    /// # Errors
    /// As [`gather_words`](Self::gather_words); [`Error::Argument`] for members that are no group of this rank's.
    fn gather_words_among(&mut self, members: &[usize], own: &[u64]) -> Result<Vec<u64>, Error> {
        let mut group = Subgroup::new(self, members.to_vec())?;
        let bytes: &[u8] = bytemuck::cast_slice(own);
        let all = group.all_gather_v(bytes, &vec![bytes.len(); members.len()])?;
        Ok(bytemuck::pod_collect_to_vec(&all))
    }

    /// Sends `send[r]` to every rank r and gives what every rank sent here, `recv_lens[r]` bytes of rank r. A rank's message to itself
    /// moves through.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange) and [`wait`](Self::wait); [`Error::Argument`] unless there is a message and a length for every rank.
    fn all_to_all_v(&mut self, send: Vec<Buffer>, recv_lens: &[usize]) -> Result<Vec<Buffer>, Error> {
        let (rank, ranks) = (self.rank(), self.ranks());
        for (argument, found) in [("send", send.len()), ("recv_lens", recv_lens.len())] {
            if found != ranks {
                return Err(Error::argument(argument, format!("one for each of {ranks} ranks"), found));
            }
        }
        let mut send: Vec<Option<Buffer>> = send.into_iter().map(Some).collect();
        let mut received: Vec<Option<Buffer>> = (0..ranks).map(|_| None).collect();
        received[rank] = send[rank].take();
        let mut tickets = Vec::with_capacity(ranks);
        for step in 1..ranks {
            let (to, from) = ((rank + step) % ranks, (rank + ranks - step) % ranks);
            let tag = Tag::new(Operation::AllToAll, step);
            let mut message = send[to].take().expect("every rank is sent to once");
            self.seal(&mut message, tag);
            tickets
                .push((from, self.exchange(tag, to, Arc::new(message), from, Buffer::new(recv_lens[from]))?));
        }
        for (from, ticket) in tickets {
            received[from] = Some(self.wait(ticket)?);
        }
        Ok(received.into_iter().map(|buffer| buffer.expect("every rank sends once")).collect())
    }

    /// Gives what every rank has, `lens[r]` bytes of rank r, one after the other. `own` is this rank's part.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange) and [`wait`](Self::wait); [`Error::Argument`] when the lengths do not fit.
    fn all_gather_v(&mut self, own: &[u8], lens: &[usize]) -> Result<Vec<u8>, Error> {
        let (rank, ranks) = (self.rank(), self.ranks());
        check_parts("lens", lens, ranks, own.len(), rank)?;
        let starts = starts(lens);
        let mut all = vec![0; starts[ranks]];
        all[starts[rank]..starts[rank + 1]].copy_from_slice(own);
        // Round a ring: at step i every rank passes on what it got at step i - 1.
        let mut held = Buffer::of(own);
        for step in 1..ranks {
            let tag = Tag::new(Operation::AllGather, step);
            self.seal(&mut held, tag);
            let part = (rank + ranks - step) % ranks;
            let (right, left) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
            let ticket = self.exchange(tag, right, Arc::new(held), left, Buffer::new(lens[part]))?;
            held = self.wait(ticket)?;
            all[starts[part]..starts[part + 1]].copy_from_slice(held.bytes());
        }
        Ok(all)
    }

    /// Sums `own` over all ranks and gives this rank its part of the sum, `lens[r]` values for rank r. The order of the sum is that of
    /// the ranks, so that runs are bitwise equal.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange) and [`wait`](Self::wait); [`Error::Argument`] when the lengths do not fit.
    fn reduce_scatter(&mut self, own: &[f32], lens: &[usize]) -> Result<Vec<f32>, Error> {
        let (rank, ranks) = (self.rank(), self.ranks());
        if lens.len() != ranks {
            return Err(Error::argument("lens", format!("one for each of {ranks} ranks"), lens.len()));
        }
        let starts = starts(lens);
        crate::error::check_len("own", own.len(), &[starts[ranks]])?;
        let part = |of: usize| &own[starts[of]..starts[of + 1]];
        let mut tickets = Vec::with_capacity(ranks);
        for step in 1..ranks {
            let (to, from) = ((rank + step) % ranks, (rank + ranks - step) % ranks);
            let tag = Tag::new(Operation::ReduceScatter, step);
            let mut message = Buffer::of(part(to));
            self.seal(&mut message, tag);
            tickets
                .push((from, self.exchange(tag, to, Arc::new(message), from, Buffer::new(4 * lens[rank]))?));
        }
        let mut parts: Vec<Option<Buffer>> = (0..ranks).map(|_| None).collect();
        for (from, ticket) in tickets {
            parts[from] = Some(self.wait(ticket)?);
        }
        let mut sum = vec![0.0f32; lens[rank]];
        for received in &parts {
            // Only the own part was not received.
            let values = received.as_ref().map_or(part(rank), |buffer| buffer.values());
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        Ok(sum)
    }

    /// Waits for every rank.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange) and [`wait`](Self::wait).
    fn barrier(&mut self) -> Result<(), Error> {
        // Dissemination: after step i every rank has heard, directly or not, of 2^(i+1) ranks.
        let (rank, ranks) = (self.rank(), self.ranks());
        let mut distance = 1;
        let mut step = 0;
        while distance < ranks {
            let tag = Tag::new(Operation::Barrier, step);
            let (to, from) = ((rank + distance) % ranks, (rank + ranks - distance) % ranks);
            let mut message = Buffer::new(0);
            self.seal(&mut message, tag);
            let ticket = self.exchange(tag, to, Arc::new(message), from, Buffer::new(0))?;
            self.wait(ticket)?;
            distance *= 2;
            step += 1;
        }
        Ok(())
    }
}

/// Where each part begins in all of them, then where they end.
fn starts(lens: &[usize]) -> Vec<usize> {
    let mut starts = vec![0];
    for len in lens {
        starts.push(starts[starts.len() - 1] + len);
    }
    starts
}

fn check_parts(
    argument: &'static str,
    lens: &[usize],
    ranks: usize,
    own: usize,
    rank: usize,
) -> Result<(), Error> {
    if lens.len() != ranks {
        return Err(Error::argument(argument, format!("one for each of {ranks} ranks"), lens.len()));
    }
    if lens[rank] != own {
        return Err(Error::argument("own", format!("{} bytes, as {argument} says", lens[rank]), own));
    }
    Ok(())
}

/// Checks the two ends of an exchange.
///
/// # Errors
/// [`Error::Argument`] for a rank that is not there, or is the own one.
pub fn check_ends(rank: usize, ranks: usize, to: usize, from: usize) -> Result<(), Error> {
    for (argument, peer) in [("to", to), ("from", from)] {
        if peer >= ranks || peer == rank {
            return Err(Error::argument(argument, format!("another rank than {rank} below {ranks}"), peer));
        }
    }
    Ok(())
}

/// Checks what a rank sent.
///
/// # Errors
/// [`PeerFault::Garbage`] that says what is wrong.
pub fn open(buffer: &Buffer, tag: Tag, from: usize) -> Result<(), PeerFault> {
    buffer.open(tag, from).map_err(PeerFault::Garbage)
}

//! A step that all ranks keep, or none: one rank decides, and the others learn what it has decided even where one of them fails meanwhile.
//!
//! Every rank says to *home* that it has done its part, and once it has heard the same of home, that it waits for home's word. When home has
//! heard so of all, the step is kept: this is the one commit point. Then home says so to all, and last that all have been told: before that
//! nobody goes on, so nobody hears of a fault of something later before it has home's word.
//!
//! | who fails | and when | home | every other rank that has not failed |
//! |---|---|---|---|
//! | any rank | before home has heard that all wait | error | error |
//! | a rank that lives, but comes as a deadline ends | before that | as all others | error on all, or on none |
//! | another rank than home | after that | keeps the step | keeps the step |
//! | home | before it has decided | is lost | error |
//! | home | while it says so | is lost | keeps the step if it has heard so, else error |
//! | home, which lives, but is late by a whole deadline | while it says so | keeps the step if it has told anybody | keeps the step if it has heard so, else error |
//! | another rank, which says so itself ([`PeerFault::Aborted`]) | while it waits for home's word | either | keeps the step if it has heard so, else error |
//! | a rank of the transport inside that is no member of this [`Subgroup`](crate::transport::Subgroup) | at any time | either | keeps the step if it has heard so, else error |
//!
//! A rank that hears of a fault instead of home's word knows from the fault on which side of the commit point home is: home alone waits for
//! the others here, so what is found of another rank at the third or fourth step is found after the decision. Only in the last four cases is
//! there nobody to ask; ranks may differ then, and have to compare what they hold before they go on
//! ([`fingerprint`](crate::fingerprint)).
//!
//! # Why home alone accuses
//!
//! Ranks with equal deadlines would accuse each other as the one that they wait for decides. So home waits for all others one deadline in
//! all, and whoever has heard that home is here waits two for each of its words, which begin after home's one: unless somebody is late by
//! the difference, nobody gives up while home may decide. Whoever gives up before it has heard of home never says that it waits, and home
//! cannot decide: on a transport, too, where home hears of a fault later than it is found. By the same it does not matter that faults of
//! the commit before have the same tags: a rank that hears home's second message knows that all ranks have left that one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::transport::{Buffer, Operation, Tag, Ticket, Transport};
use crate::{Error, PeerFault};

/// All have done their part.
const DONE: Tag = Tag::new(Operation::Commit, 0);
/// All wait for home's word.
const WAITING: Tag = Tag::new(Operation::Commit, 1);
/// Home has decided.
const KEPT: Tag = Tag::new(Operation::Commit, 2);
/// All have been told.
const TOLD: Tag = Tag::new(Operation::Commit, 3);

/// Ends a step that every rank has done its part of: it is kept where this is `Ok`, and not kept where it is not. A rank that fails after the
/// decision is no error here: the next operation names it, on every rank.
///
/// Every rank calls it with the same `home`, a rank of this transport, which may be a [`Subgroup`](crate::transport::Subgroup). Moves empty
/// messages alone: home has four with every other rank. Waits have other deadlines meanwhile, of which the longest is twice the transport's.
///
/// # Errors
/// [`Error::Argument`] for a home that is no rank; [`Error::Peer`] when a rank has failed before the decision, or home has failed.
pub fn commit<X: Transport + ?Sized>(transport: &mut X, home: usize) -> Result<(), Error> {
    let (ranks, deadline) = (transport.ranks(), transport.deadline());
    if home >= ranks {
        return Err(Error::argument("home", format!("a rank below {ranks}"), home));
    }
    let result = match transport.rank() == home {
        true => decide(home, deadline, transport),
        false => hear(home, deadline, transport),
    };
    transport.set_deadline(deadline);
    result
}

/// The part of every other rank.
fn hear<X: Transport + ?Sized>(home: usize, deadline: Duration, transport: &mut X) -> Result<(), Error> {
    let done = meet(DONE, home, transport)?;
    transport.wait(done)?;
    // Home is here, and has one deadline from now at most.
    transport.set_deadline(deadline.saturating_mul(2));
    let waiting = meet(WAITING, home, transport)?;
    transport.wait(waiting)?;
    match meet(KEPT, home, transport).and_then(|kept| transport.wait(kept)) {
        Ok(_) => {}
        // What a rank says of itself does not come from home.
        Err(error @ Error::Peer { fault: PeerFault::Aborted(_), .. }) => return Err(error),
        // Ranks of the transport inside that are no members may be at a step of their own.
        Err(Error::Peer { peer, at: KEPT | TOLD, .. })
            if (0..transport.ranks()).any(|rank| rank != home && transport.name_of(rank) == peer) =>
        {
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    // It knows; one that is lost now is named by the next operation.
    let _ = meet(TOLD, home, transport).and_then(|told| transport.wait(told));
    Ok(())
}

/// Home's part.
fn decide<X: Transport + ?Sized>(home: usize, deadline: Duration, transport: &mut X) -> Result<(), Error> {
    let others = (0..transport.ranks()).filter(|other| *other != home);
    let start = Instant::now();
    for tag in [DONE, WAITING] {
        let met = others.clone().map(|other| meet(tag, other, transport)).collect::<Result<Vec<_>, _>>()?;
        for ticket in met {
            wait_since(start, deadline, ticket, transport)?;
        }
    }
    // Messages that are here are given, whoever has failed since; nobody has been told yet.
    transport.check()?;
    // Decided: whatever happens now, everyone who can be told is told, and one that is lost is named by the next operation.
    for tag in [KEPT, TOLD] {
        let start = Instant::now();
        let (told, failed): (Vec<_>, Vec<_>) =
            others.clone().map(|other| meet(tag, other, transport)).partition(Result::is_ok);
        if let (KEPT, true, Some(Err(error))) = (tag, told.is_empty(), failed.into_iter().next()) {
            // But not where nobody can be.
            return Err(error);
        }
        for ticket in told.into_iter().flatten() {
            let _ = wait_since(start, deadline, ticket, transport);
        }
    }
    Ok(())
}

/// Waits for what is left of the deadline since `start`.
fn wait_since<X: Transport + ?Sized>(
    start: Instant,
    deadline: Duration,
    ticket: Ticket,
    transport: &mut X,
) -> Result<(), Error> {
    transport.set_deadline(deadline.saturating_sub(start.elapsed()));
    transport.wait(ticket).map(drop)
}

/// An empty message to a rank, for one from it.
fn meet<X: Transport + ?Sized>(tag: Tag, peer: usize, transport: &mut X) -> Result<Ticket, Error> {
    let mut nothing = Buffer::new(0);
    transport.seal(&mut nothing, tag);
    transport.exchange(tag, peer, Arc::new(nothing), peer, Buffer::new(0))
}

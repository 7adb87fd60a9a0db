//! A step that all ranks keep, or none: one rank decides, and the others learn what it has decided even where one of them fails meanwhile.
//!
//! Every rank says to *home* that it has done its part. When home has heard of all, the step is kept: this is the one commit point. Then home
//! says so to all, and last that all have been told: before that nobody goes on, so nobody hears of a fault of something later before it has
//! home's word.
//!
//! | who fails | and when | home | every other rank that has not failed |
//! |---|---|---|---|
//! | any rank | before home has heard of all | error | error |
//! | another rank than home | after that | keeps the step | keeps the step |
//! | home | before it has decided | is lost | error |
//! | home | while it says so | is lost | keeps the step if it has heard so, else error |
//! | another rank, which says so itself ([`PeerFault::Aborted`]) | while it waits for home's word | either | keeps the step if it has heard so, else error |
//!
//! A rank that hears of a fault instead of home's word knows from the fault on which side of the commit point home is: home alone waits for
//! the others here, so what is found at the second or third step is found after the decision. Only in the last two cases is there nobody
//! to ask; ranks may differ then, and have to compare what they hold before they go on ([`fingerprint`](crate::fingerprint)).

use std::sync::Arc;

use crate::transport::{Buffer, Operation, Tag, Ticket, Transport};
use crate::{Error, PeerFault};

/// All have done their part.
const DONE: Tag = Tag::new(Operation::Commit, 0);
/// Home has decided.
const KEPT: Tag = Tag::new(Operation::Commit, 1);
/// All have been told.
const TOLD: Tag = Tag::new(Operation::Commit, 2);

/// Ends a step that every rank has done its part of: it is kept where this is `Ok`, and not kept where it is not. A rank that fails after the
/// decision is no error here: the next operation names it, on every rank.
///
/// Every rank calls it with the same `home`. Moves empty messages alone: home has three with every other rank.
///
/// # Errors
/// [`Error::Argument`] for a home that is no rank; [`Error::Peer`] when a rank has failed before the decision, or home has failed.
pub fn commit<X: Transport + ?Sized>(transport: &mut X, home: usize) -> Result<(), Error> {
    let (rank, ranks) = (transport.rank(), transport.ranks());
    if home >= ranks {
        return Err(Error::argument("home", format!("a rank below {ranks}"), home));
    }
    if rank != home {
        let done = meet(DONE, home, transport)?;
        let heard = transport.wait(done).and_then(|_| {
            let kept = meet(KEPT, home, transport)?;
            transport.wait(kept)
        });
        match heard {
            // What a rank says of itself does not come from home.
            Err(Error::Peer { fault: fault @ PeerFault::Aborted(_), peer, at, .. }) => {
                return Err(Error::Peer { rank, peer, at, fault });
            }
            Err(Error::Peer { peer, at: KEPT | TOLD, .. }) if peer != home => return Ok(()),
            heard => drop(heard?),
        }
        // It knows; one that is lost now is named by the next operation.
        let _ = meet(TOLD, home, transport).and_then(|told| transport.wait(told));
        return Ok(());
    }
    let others = (0..ranks).filter(|other| *other != home);
    let done = others.clone().map(|other| meet(DONE, other, transport)).collect::<Result<Vec<_>, _>>()?;
    for ticket in done {
        transport.wait(ticket)?;
    }
    // Decided: whatever happens now, everyone who can be told is told, and one that is lost is named by the next operation.
    for tag in [KEPT, TOLD] {
        let told: Vec<Ticket> = others.clone().filter_map(|other| meet(tag, other, transport).ok()).collect();
        for ticket in told {
            let _ = transport.wait(ticket);
        }
    }
    Ok(())
}

/// An empty message to a rank, for one from it.
fn meet<X: Transport + ?Sized>(tag: Tag, peer: usize, transport: &mut X) -> Result<Ticket, Error> {
    let mut nothing = Buffer::new(0);
    transport.seal(&mut nothing, tag);
    transport.exchange(tag, peer, Arc::new(nothing), peer, Buffer::new(0))
}

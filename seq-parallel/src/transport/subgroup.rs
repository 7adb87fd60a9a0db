//! Some of the ranks as a group of their own: the members of a node, or one member of every node.

use std::sync::Arc;
use std::time::Duration;

use super::{Buffer, Tag, Ticket, Traffic, Transport};
use crate::{Error, PeerFault};

/// A group of some of a transport's ranks, numbered in the order given. Errors name ranks of the transport, not of the group.
#[derive(Debug)]
pub struct Subgroup<'a, X: ?Sized> {
    inner: &'a mut X,
    members: Vec<usize>,
    rank: usize,
}

impl<'a, X: Transport + ?Sized> Subgroup<'a, X> {
    /// The group of these ranks, of which this one is a member.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank that is not there or is there twice, or when this rank is none of them.
    pub fn new(inner: &'a mut X, members: Vec<usize>) -> Result<Self, Error> {
        let mut seen = vec![false; inner.ranks()];
        for &member in &members {
            match seen.get_mut(member) {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    return Err(Error::argument(
                        "members",
                        format!("ranks below {}, each once", inner.ranks()),
                        member,
                    ));
                }
            }
        }
        let rank = members.iter().position(|&member| member == inner.rank());
        let rank = rank.ok_or_else(|| {
            Error::argument("members", format!("rank {} among them", inner.rank()), format!("{members:?}"))
        })?;
        Ok(Subgroup { inner, members, rank })
    }
}

impl<X: Transport + ?Sized> Transport for Subgroup<'_, X> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.members.len()
    }

    fn exchange(
        &mut self,
        tag: Tag,
        to: usize,
        send: Arc<Buffer>,
        from: usize,
        recv: Buffer,
    ) -> Result<Ticket, Error> {
        super::check_ends(self.rank, self.members.len(), to, from)?;
        self.inner.exchange(tag, self.members[to], send, self.members[from], recv)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        self.inner.wait(ticket)
    }

    fn seal(&mut self, buffer: &mut Buffer, tag: Tag) {
        self.inner.seal(buffer, tag);
    }

    fn abort(&mut self, at: Tag, reason: &str) {
        self.inner.abort(at, reason);
    }

    fn check(&mut self) -> Result<(), Error> {
        self.inner.check()
    }

    fn accuse(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error {
        self.inner.accuse(self.members[peer], at, fault)
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }

    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.inner.set_deadline(deadline);
    }

    fn computed(&mut self, pairs: u64) {
        self.inner.computed(pairs);
    }
}

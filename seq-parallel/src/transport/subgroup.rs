//! Some of the ranks as a group of their own: the members of a node, or one member of every node.

use std::sync::Arc;

use super::{Buffer, Tag, Ticket, Transport};
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

    /// What the transport inside calls it.
    fn name_of(&self, rank: usize) -> usize {
        self.members.get(rank).map_or(rank, |&member| self.inner.name_of(member))
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

    fn accuse(&mut self, peer: usize, at: Tag, fault: PeerFault) -> Error {
        self.inner.accuse(self.members[peer], at, fault)
    }

    fn waits_for(&mut self, peer: Option<usize>, at: Tag) {
        self.inner.waits_for(peer.and_then(|peer| self.members.get(peer).copied()), at);
    }

    fn is_gone(&mut self, peer: usize) -> bool {
        self.members.get(peer).is_some_and(|&member| self.inner.is_gone(member))
    }

    /// By the route of the transport inside, which may be another than its messages take.
    fn gather_words_among(&mut self, members: &[usize], own: &[u64]) -> Result<Vec<u64>, Error> {
        let rank = |&member: &usize| {
            let ranks = self.members.len();
            self.members
                .get(member)
                .copied()
                .ok_or_else(|| Error::argument("members", format!("ranks below {ranks}, each once"), member))
        };
        let members = members.iter().map(rank).collect::<Result<Vec<_>, _>>()?;
        self.inner.gather_words_among(&members, own)
    }

    super::forward!((inner) (inner): wait, seal, abort, check, traffic, deadline, set_deadline, computed);
}

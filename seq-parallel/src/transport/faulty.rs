//! A rank that fails on purpose: to see that everyone else notices.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Buffer, Tag, Ticket, Transport};
use crate::{Error, PeerFault};

/// How a rank fails.
#[derive(Debug, Clone, Copy)]
pub enum Failure {
    /// It stops: this exchange and whatever comes after fail at once, and nothing is sent. Its caller should drop it.
    Dies,
    /// It sleeps before it sends, for less than the deadline: it is only late.
    Late(Duration),
    /// It sends nothing until it hears that the others have given it up, or ten of its deadlines have passed.
    Silent,
    /// It sends the right number of wrong bytes.
    SendsGarbage,
    /// It sends too few bytes.
    SendsTooLittle,
    /// It calls this, then goes on if it still can: what kills or stops its process.
    Calls(fn()),
}

/// A transport that fails at one exchange.
#[derive(Debug)]
pub struct Faulty<X> {
    inner: X,
    failure: Failure,
    /// Exchanges until then.
    left: usize,
    /// Where it died.
    died: Option<Tag>,
}

impl<X: Transport> Faulty<X> {
    /// Fails at exchange `exchange`, counted from 0.
    pub fn new(inner: X, failure: Failure, exchange: usize) -> Self {
        Faulty { inner, failure, left: exchange, died: None }
    }

    /// The transport inside.
    pub fn into_inner(self) -> X {
        self.inner
    }

    /// The dead do nothing.
    fn alive(&self) -> Result<(), Error> {
        let Some(at) = self.died else { return Ok(()) };
        let fault = PeerFault::Aborted("planned to die here".into());
        Err(Error::Peer { rank: self.rank(), peer: self.rank(), at, fault })
    }
}

impl<X: Transport> Transport for Faulty<X> {
    fn exchange(
        &mut self,
        tag: Tag,
        to: usize,
        send: Arc<Buffer>,
        from: usize,
        recv: Buffer,
    ) -> Result<Ticket, Error> {
        self.alive()?;
        let now = self.left == 0;
        self.left = self.left.wrapping_sub(1);
        let mut send = send;
        match self.failure {
            _ if !now => {}
            Failure::Dies => {
                self.died = Some(tag);
                self.alive()?;
            }
            Failure::Late(time) => std::thread::sleep(time),
            Failure::Silent => {
                let end = Instant::now() + 10 * self.inner.deadline();
                while self.inner.check().is_ok() && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            Failure::Calls(function) => function(),
            Failure::SendsGarbage => {
                let mut bad = Buffer::clone(&send);
                bad.bytes_mut().iter_mut().for_each(|byte| *byte ^= 0x5a);
                send = Arc::new(bad);
            }
            Failure::SendsTooLittle => {
                let mut bad = Buffer::clone(&send);
                bad.resize(send.len() / 2);
                bad.seal(tag, self.rank(), 0.0);
                send = Arc::new(bad);
            }
        }
        self.inner.exchange(tag, to, send, from, recv)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        self.alive()?;
        self.inner.wait(ticket)
    }

    super::forward!(
        (inner) (inner): rank, ranks, name_of, seal, abort, check, is_gone, waits_for, accuse, gather_words_among, traffic, deadline,
        set_deadline, computed,
    );
}

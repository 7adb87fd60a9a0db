//! Modelled delay: any transport, with links and compute on a clock of their own.
//!
//! Messages really travel over the transport inside; each carries the time at which it would arrive over an α-β link
//! (α + bytes / β after its sender's link is free), and the receiver's clock jumps there. Compute moves the clock by the work that
//! [`Transport::computed`] hears of. Nothing sleeps and nothing depends on this machine's speed: two runs give the same times. What is
//! modelled is the order that the code really has: a message that is posted too late shows as exposed communication.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Buffer, Tag, Ticket, Transport};
use crate::Error;

/// A link in one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Latency of a message, in seconds (α).
    pub alpha_s: f64,
    /// Bandwidth, in bytes per second (β).
    pub bytes_per_s: f64,
}

impl Link {
    /// 450 GB/s and 3 µs: one direction of NVLink 4.
    pub const NVLINK: Link = Link { alpha_s: 3e-6, bytes_per_s: 450e9 };
    /// 50 GB/s and 5 µs: a 400 Gb/s adapter per GPU.
    pub const NIC_400G: Link = Link { alpha_s: 5e-6, bytes_per_s: 50e9 };
    /// 12.5 GB/s and 10 µs: a 100 Gb/s adapter per GPU.
    pub const NIC_100G: Link = Link { alpha_s: 10e-6, bytes_per_s: 12.5e9 };

    /// Seconds that a message takes when the link is free.
    pub fn seconds(&self, bytes: f64) -> f64 {
        self.alpha_s + bytes / self.bytes_per_s
    }
}

/// Where a rank's time went, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Times {
    /// Computing.
    pub compute_s: f64,
    /// Waiting for messages: what communication costs beyond what compute hides.
    pub exposed_s: f64,
}

/// A transport with modelled delay.
#[derive(Debug)]
pub struct Sim<X> {
    inner: X,
    link: Link,
    pairs_per_s: f64,
    /// This rank's time.
    clock_s: f64,
    /// When the own link has sent what was sealed so far.
    link_free_s: f64,
    /// When the message of a ticket has left.
    left_s: HashMap<u64, f64>,
    times: Times,
}

impl<X: Transport> Sim<X> {
    /// Models every rank's link as `link`, and compute as `pairs_per_s` (query, key) pairs of all heads per second.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rate that is not positive or a negative latency.
    pub fn new(inner: X, link: Link, pairs_per_s: f64) -> Result<Self, Error> {
        let positive = |x: f64| x > 0.0 && !x.is_nan();
        for (argument, value, fits) in [
            ("bytes_per_s", link.bytes_per_s, positive(link.bytes_per_s)),
            ("pairs_per_s", pairs_per_s, positive(pairs_per_s)),
            ("alpha_s", link.alpha_s, link.alpha_s >= 0.0),
        ] {
            if !fits {
                return Err(Error::argument(argument, "a time or rate", value));
            }
        }
        let left_s = HashMap::new();
        Ok(Sim { inner, link, pairs_per_s, clock_s: 0.0, link_free_s: 0.0, left_s, times: Times::default() })
    }

    /// This rank's time, in seconds since the start.
    pub fn clock_s(&self) -> f64 {
        self.clock_s
    }

    /// Where it went.
    pub fn times(&self) -> Times {
        self.times
    }

    /// The transport inside.
    pub fn into_inner(self) -> X {
        self.inner
    }
}

impl<X: Transport> Transport for Sim<X> {
    fn seal(&mut self, buffer: &mut Buffer, tag: Tag) {
        let start = self.clock_s.max(self.link_free_s);
        self.link_free_s = start + buffer.len() as f64 / self.link.bytes_per_s;
        buffer.seal(tag, self.rank(), self.link_free_s + self.link.alpha_s);
    }

    fn exchange(
        &mut self,
        tag: Tag,
        to: usize,
        send: Arc<Buffer>,
        from: usize,
        recv: Buffer,
    ) -> Result<Ticket, Error> {
        let left = send.stamp() - self.link.alpha_s;
        let ticket = self.inner.exchange(tag, to, send, from, recv)?;
        self.left_s.insert(ticket.0, left);
        Ok(ticket)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        let left = self.left_s.remove(&ticket.0).unwrap_or(0.0);
        let buffer = self.inner.wait(ticket)?;
        let done = self.clock_s.max(left).max(buffer.stamp());
        self.times.exposed_s += done - self.clock_s;
        self.clock_s = done;
        Ok(buffer)
    }

    fn computed(&mut self, pairs: u64) {
        let seconds = pairs as f64 / self.pairs_per_s;
        self.clock_s += seconds;
        self.times.compute_s += seconds;
        self.inner.computed(pairs);
    }

    super::forward!(
        (inner) (inner): rank, ranks, name_of, abort, check, is_gone, waits_for, accuse, gather_words_among, traffic, deadline, set_deadline,
    );
}

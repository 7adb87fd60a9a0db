//! A device transport as one of host buffers: each message is copied to the device, sent, and copied back.
//!
//! The copies have a stream and pinned memory of their own: with pageable memory the driver would wait, with no deadline, for a copy and
//! for what is queued before it, which may be a message whose peer has died. What is enqueued is polled under the deadline instead.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use cuda::cudarc::driver::{CudaStream, PinnedHostSlice};

use super::transport::{DeviceTransport, Incoming, Outgoing, UnderWay, failed};
use crate::Error;
use crate::transport::{self, Buffer, Tag, Ticket, Traffic, Transport};

/// The shortest pinned buffer, in bytes.
const SHORTEST: usize = 4096;

/// A device transport as one of host buffers.
#[derive(Debug)]
pub struct Staged<D> {
    inner: D,
    /// For the copies, from the first on.
    stream: Option<Arc<CudaStream>>,
    /// Pinned buffers that nothing uses.
    pinned: Vec<PinnedHostSlice<u8>>,
    next: u64,
    pending: HashMap<u64, Message>,
    traffic: Traffic,
}

#[derive(Debug)]
struct Message {
    ticket: Ticket,
    tag: Tag,
    from: usize,
    /// What is sent, on its way to the device.
    sent: UnderWay<PinnedHostSlice<u8>>,
    recv: Buffer,
}

impl<D: DeviceTransport> Staged<D> {
    /// Stages messages of this transport.
    pub fn new(inner: D) -> Self {
        let (pending, traffic) = (HashMap::new(), Traffic::default());
        Staged { inner, stream: None, pinned: Vec::new(), next: 0, pending, traffic }
    }

    /// The stream for copies.
    fn staging(&mut self) -> Result<Arc<CudaStream>, Error> {
        if let Some(stream) = &self.stream {
            return Ok(stream.clone());
        }
        let stream = self.inner.stream().context().new_stream().map_err(failed("cuStreamCreate"))?;
        self.stream = Some(stream.clone());
        Ok(stream)
    }

    /// A pinned buffer of at least `len` bytes, the shortest that there is.
    fn pinned(&mut self, len: usize) -> Result<PinnedHostSlice<u8>, Error> {
        let fitting = self.pinned.iter().enumerate().filter(|(_, buffer)| buffer.len() >= len);
        if let Some((shortest, _)) = fitting.min_by_key(|(_, buffer)| buffer.len()) {
            return Ok(self.pinned.swap_remove(shortest));
        }
        let (context, len) = (self.inner.stream().context(), len.next_power_of_two().max(SHORTEST));
        // SAFETY: every byte is written below, before anybody reads it. Write-combined memory would be slow to read, hence no flag.
        let buffer = unsafe { context.alloc_pinned_with_flags::<u8>(len, 0) };
        let mut buffer = buffer.map_err(failed("cuMemHostAlloc"))?;
        let start = buffer.as_mut_ptr().map_err(failed("cuEventSynchronize"))?;
        // SAFETY: the allocation has `len` bytes, and nobody else knows it yet.
        unsafe { start.write_bytes(0, len) };
        Ok(buffer)
    }

    /// The transport inside.
    pub fn into_inner(self) -> D {
        self.inner
    }
}

impl<D: DeviceTransport> Transport for Staged<D> {
    fn exchange(
        &mut self,
        tag: Tag,
        to: usize,
        send: Arc<Buffer>,
        from: usize,
        recv: Buffer,
    ) -> Result<Ticket, Error> {
        transport::check_ends(self.rank(), self.ranks(), to, from)?;
        let (send_len, recv_len) = (send.message().len(), recv.message().len());
        let (stream, mut host) = (self.staging()?, self.pinned(send_len)?);
        // Its event was never recorded, so this does not wait.
        let bytes = &mut host.as_mut_slice().map_err(failed("cuEventSynchronize"))?[..send_len];
        bytes.copy_from_slice(send.message());
        let block = stream.clone_htod(bytes).map_err(failed("cuMemcpyHtoDAsync"))?;
        let sent = UnderWay::on(&stream, host)?;
        let space = stream.alloc_zeros(recv_len).map_err(failed("cuMemAllocAsync"))?;
        let outgoing = Outgoing { to, block: Arc::new(block), len: send_len };
        let incoming = Incoming { from, space, len: recv_len };
        let ticket = self.inner.exchange(tag, outgoing, incoming, &stream)?;
        self.traffic.sent += send.len() as u64;
        self.traffic.messages += 1;
        self.next += 1;
        self.pending.insert(self.next, Message { ticket, tag, from, sent, recv });
        Ok(Ticket(self.next))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Buffer, Error> {
        let Some(Message { ticket, tag, from, sent, mut recv }) = self.pending.remove(&ticket.0) else {
            return Err(Error::argument("ticket", "one of this transport", format!("{ticket:?}")));
        };
        let start = Instant::now();
        let block = self.inner.wait(ticket)?;
        let len = recv.message().len();
        let (stream, mut host) = (self.staging()?, self.pinned(len)?);
        let bytes = &mut host.as_mut_slice().map_err(failed("cuEventSynchronize"))?[..len];
        stream.memcpy_dtoh(&block, bytes).map_err(failed("cuMemcpyDtoHAsync"))?;
        let copied = UnderWay::on(&stream, (host, block))?;
        // What is late now is this rank's own work: both blocks have been moved.
        let rank = self.rank();
        let (host, _block) = copied.complete(self.inner.control(), start, tag, || rank)?;
        let sent = sent.complete(self.inner.control(), start, tag, || rank)?;
        let bytes = &host.as_slice().map_err(failed("cuEventSynchronize"))?[..len];
        recv.message_mut().copy_from_slice(bytes);
        self.pinned.extend([host, sent]);
        if let Err(fault) = transport::open(&recv, tag, from) {
            return Err(self.inner.control().accuse(from, tag, fault));
        }
        self.traffic.received += recv.len() as u64;
        Ok(recv)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }

    transport::forward!(
        (inner.control_ref()) (inner.control()): rank, ranks, name_of, abort, check, is_gone, waits_for, accuse, gather_words_among, deadline,
        set_deadline,
    );
}

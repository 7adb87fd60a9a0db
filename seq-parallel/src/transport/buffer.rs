//! Messages: a payload behind a frame that says whose and of which step it is.

use bytemuck::{AnyBitPattern, NoUninit};

use super::Tag;

/// Version of the frame and of what the operations put behind it.
pub const PROTOCOL: u32 = 1;

/// `SEQP`, then the version.
const MAGIC: u64 = (0x5345_5150 << 32) | PROTOCOL as u64;

/// Words of the frame: magic and version, tag, sender, payload bytes, CRC-32 of the payload, a time stamp.
const FRAME: usize = 6;

/// Bytes of the frame, which traffic counters leave out.
pub const FRAME_BYTES: usize = 8 * FRAME;

/// A message: a frame and a payload of any number of bytes, aligned to 8. Its memory is kept when it shrinks and grows again.
#[derive(Debug, Clone)]
pub struct Buffer {
    words: Vec<u64>,
    len: usize,
}

impl Buffer {
    /// A payload of `len` zero bytes.
    pub fn new(len: usize) -> Self {
        Buffer { words: vec![0; FRAME + len.div_ceil(8)], len }
    }

    /// A payload that holds these values.
    pub fn of<T: NoUninit>(values: &[T]) -> Self {
        let bytes = bytemuck::cast_slice(values);
        let mut buffer = Buffer::new(bytes.len());
        buffer.bytes_mut().copy_from_slice(bytes);
        buffer
    }

    /// Bytes of the payload.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the payload has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Changes the length of the payload; new bytes are 0. Takes no memory as long as it was that long before.
    pub fn resize(&mut self, len: usize) {
        self.words.resize(FRAME + len.div_ceil(8), 0);
        self.len = len;
    }

    /// The payload.
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words[FRAME..])[..self.len]
    }

    /// The payload, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words[FRAME..])[..self.len]
    }

    /// The payload as values.
    ///
    /// # Panics
    /// When its length is no multiple of the values' size, or they need more than 8 bytes of alignment.
    pub fn values<T: AnyBitPattern>(&self) -> &[T] {
        bytemuck::cast_slice(self.bytes())
    }

    /// Frame and payload, padded to whole words: what goes over a wire.
    pub fn message(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    /// [`message`](Self::message), to be received into.
    pub fn message_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words)
    }

    /// [`message`](Self::message) as words.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// [`words`](Self::words), to be received into.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Writes the frame. The payload must not change afterwards.
    pub fn seal(&mut self, tag: Tag, from: usize, stamp: f64) {
        let crc = u64::from(crc32fast::hash(self.bytes()));
        self.words[..FRAME].copy_from_slice(&[
            MAGIC,
            tag.word(),
            from as u64,
            self.len as u64,
            crc,
            stamp.to_bits(),
        ]);
    }

    /// The frame's time stamp, in seconds.
    pub fn stamp(&self) -> f64 {
        f64::from_bits(self.words[5])
    }

    /// Checks the frame, or says what is wrong with it.
    pub(super) fn open(&self, tag: Tag, from: usize) -> Result<(), String> {
        let crc = u64::from(crc32fast::hash(self.bytes()));
        for (what, expected, found) in [
            ("magic and version", MAGIC, self.words[0]),
            ("tag", tag.word(), self.words[1]),
            ("sender", from as u64, self.words[2]),
            ("payload bytes", self.len as u64, self.words[3]),
            ("CRC-32", crc, self.words[4]),
        ] {
            if expected != found {
                return Err(format!("{what} {found:#x} instead of {expected:#x}"));
            }
        }
        Ok(())
    }
}

//! What a receiver asks for: a sequence, and the segments of it that it lacks.

use std::io::{Read, Write};

use super::frame::{Fields, Summed, VERSION, malformed};
use crate::Error;

const MAGIC: [u8; 8] = *b"longkvRQ";
const FIXED: usize = 24;

/// A request: 8 bytes `longkvRQ`, version (u16), reserved (u16, 0), count (u32), tag (u64), CRC; then `(layer, KV
/// head)` as `[count, 2]` u32, and a CRC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Names the sequence.
    pub tag: u64,
    /// Segments `(layer, KV head)` wanted, of the model's numbers.
    pub segments: Vec<(u32, u32)>,
}

impl Request {
    /// Writes the request.
    ///
    /// # Errors
    /// [`Error::Argument`] past `u32::MAX` segments; [`Error::Stream`] when the writer fails.
    pub fn write<W: Write>(&self, writer: W) -> Result<(), Error> {
        let count = u32::try_from(self.segments.len())
            .map_err(|_| Error::argument("segments", format!("at most {}", u32::MAX), self.segments.len()))?;
        let mut writer = Summed::new(writer);
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(count.to_le_bytes());
        bytes.extend(self.tag.to_le_bytes());
        writer.write("request", &bytes)?;
        writer.close("request")?;
        for &(layer, kv_head) in &self.segments {
            writer.write("request", &layer.to_le_bytes())?;
            writer.write("request", &kv_head.to_le_bytes())?;
        }
        writer.close("request")?;
        writer.inner.flush().map_err(super::frame::failed("request"))
    }

    /// Reads a request for at most `max_segments` segments.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Checksum`] or [`Error::Stream`].
    pub fn read<R: Read>(reader: R, max_segments: usize) -> Result<Self, Error> {
        let mut reader = Summed::new(reader);
        let mut bytes = [0; FIXED];
        reader.read("request", &mut bytes)?;
        let mut fields = Fields::new(&bytes);
        let magic: [u8; 8] = fields.take();
        if magic != MAGIC {
            return Err(malformed("request", "magic", MAGIC.escape_ascii(), magic.escape_ascii()));
        }
        let version = fields.u16();
        if version != VERSION {
            return Err(malformed("request", "version", VERSION, version));
        }
        reader.check("request")?;
        match fields.u16() {
            0 => {}
            found => return Err(malformed("request", "reserved", 0, found)),
        }
        let count = fields.u32();
        if count as usize > max_segments {
            return Err(malformed("request", "count", format!("at most {max_segments}"), count));
        }
        let tag = fields.u64();
        let mut segments = Vec::new();
        for _ in 0..count {
            let mut pair = [0; 8];
            reader.read("request", &mut pair)?;
            let mut fields = Fields::new(&pair);
            segments.push((fields.u32(), fields.u32()));
        }
        reader.check("request")?;
        Ok(Request { tag, segments })
    }
}

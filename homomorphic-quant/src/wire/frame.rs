//! Fixed-size parts, checksums, and errors of readers and writers.

use std::io::{Read, Write};

use crate::Error;

/// The version of the format that this crate writes, and the only one it reads.
pub const VERSION: u16 = 1;

/// Turns an I/O error into ours.
pub(super) fn failed(section: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::Stream { section, kind: error.kind(), message: error.to_string() }
}

pub(super) fn malformed(
    section: &'static str,
    field: &'static str,
    expected: impl ToString,
    found: impl ToString,
) -> Error {
    Error::Malformed { section, field, expected: expected.to_string(), found: found.to_string() }
}

/// Writes with a running checksum.
pub(super) struct Summed<W> {
    pub(super) inner: W,
    crc: crc32fast::Hasher,
}

impl<W> Summed<W> {
    pub(super) fn new(inner: W) -> Self {
        Summed { inner, crc: crc32fast::Hasher::new() }
    }

    /// The checksum since the last one.
    fn take(&mut self) -> u32 {
        std::mem::take(&mut self.crc).finalize()
    }
}

impl<W: Write> Summed<W> {
    pub(super) fn write(&mut self, section: &'static str, bytes: &[u8]) -> Result<(), Error> {
        self.crc.update(bytes);
        self.inner.write_all(bytes).map_err(failed(section))
    }

    /// Writes the checksum of everything since the last one.
    pub(super) fn close(&mut self, section: &'static str) -> Result<(), Error> {
        let crc = self.take();
        self.inner.write_all(&crc.to_le_bytes()).map_err(failed(section))
    }
}

impl<R: Read> Summed<R> {
    pub(super) fn read(&mut self, section: &'static str, bytes: &mut [u8]) -> Result<(), Error> {
        self.inner.read_exact(bytes).map_err(failed(section))?;
        self.crc.update(bytes);
        Ok(())
    }

    /// Reads bytes that nobody wants.
    pub(super) fn skip(&mut self, section: &'static str, mut bytes: u64) -> Result<(), Error> {
        let mut scratch = [0; 4096];
        while bytes > 0 {
            let part = scratch.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
            self.read(section, &mut scratch[..part])?;
            bytes -= part as u64;
        }
        Ok(())
    }

    /// Reads a checksum and compares it with that of everything since the last one.
    pub(super) fn check(&mut self, section: &'static str) -> Result<(), Error> {
        let expected = self.take();
        let mut bytes = [0; 4];
        self.inner.read_exact(&mut bytes).map_err(failed(section))?;
        let found = u32::from_le_bytes(bytes);
        if expected == found {
            Ok(())
        } else {
            Err(Error::Checksum { section, expected: found, found: expected })
        }
    }
}

/// Numbers out of a fixed part, in order.
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Fields { bytes }
    }

    /// The next `N` bytes. The caller knows that they are there: parts have a fixed size.
    pub(super) fn take<const N: usize>(&mut self) -> [u8; N] {
        let (first, rest) = self.bytes.split_first_chunk().expect("a part of fixed size");
        self.bytes = rest;
        *first
    }

    pub(super) fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// The start of a segment, or the end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: u32,
    pub(super) layer: u32,
    pub(super) kv_head: u32,
    pub(super) bytes: u64,
}

pub(super) const SEGMENT: u32 = 1;
pub(super) const END: u32 = 2;

impl Frame {
    const BYTES: usize = 24;

    pub(super) fn write<W: Write>(&self, writer: &mut Summed<W>) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        for number in [self.kind, self.layer, self.kv_head, 0] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.bytes.to_le_bytes());
        writer.write("frame", &bytes)?;
        writer.close("frame")
    }

    pub(super) fn read<R: Read>(reader: &mut Summed<R>) -> Result<Self, Error> {
        let mut bytes = [0; Self::BYTES];
        reader.read("frame", &mut bytes)?;
        reader.check("frame")?;
        let mut fields = Fields::new(&bytes);
        let (kind, layer, kv_head) = (fields.u32(), fields.u32(), fields.u32());
        match fields.u32() {
            0 => Ok(Frame { kind, layer, kv_head, bytes: fields.u64() }),
            found => Err(malformed("frame", "reserved", 0, found)),
        }
    }
}

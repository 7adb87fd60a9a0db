//! The sending side.

use std::io::Write;

use super::frame::{END, Frame, SEGMENT, Summed};
use super::header::Header;
use crate::{Cache, Error, Sequence};

/// Writes a stream, segment by segment. Wrap the writer in a [`BufWriter`](std::io::BufWriter) or not: payload is
/// written in whole blocks.
pub struct Sender<W> {
    writer: Summed<W>,
    header: Header,
    segments: u64,
}

impl<W: Write> Sender<W> {
    /// Writes the header.
    ///
    /// # Errors
    /// [`Error::Argument`] when the model's dims make no pages; [`Error::Stream`] when the writer fails.
    pub fn new(writer: W, header: Header) -> Result<Self, Error> {
        header.segment_bytes(0, 0)?;
        let mut writer = Summed::new(writer);
        header.write(&mut writer)?;
        Ok(Sender { writer, header, segments: 0 })
    }

    /// Writes every KV head of one layer that this node holds, so that it leaves while the next layer computes.
    ///
    /// # Errors
    /// As [`segment`](Self::segment).
    pub fn layer(&mut self, cache: &Cache, sequence: &Sequence) -> Result<(), Error> {
        let heads = cache.first_kv_head()..cache.first_kv_head() + cache.shape().kv_heads as u32;
        for kv_head in heads {
            self.segment(cache, sequence, kv_head)?;
        }
        self.writer.inner.flush().map_err(super::frame::failed("segment"))
    }

    /// Writes one KV head of one layer; `kv_head` counts the model's heads.
    ///
    /// # Errors
    /// [`Error::Argument`] when cache or sequence are not what the header says; [`Error::Attention`] when the
    /// sequence is not the cache's; [`Error::Stream`] when the writer fails. The stream is then of no further use.
    pub fn segment(&mut self, cache: &Cache, sequence: &Sequence, kv_head: u32) -> Result<(), Error> {
        self.check(cache, sequence, kv_head)?;
        let local = (kv_head - cache.first_kv_head()) as usize;
        let bytes = self.header.segment_bytes(cache.layer(), kv_head)?;
        Frame { kind: SEGMENT, layer: cache.layer(), kv_head, bytes }.write(&mut self.writer)?;
        let (geometry, head) = (cache.geometry(), cache.geometry().head(local));
        let mut other = vec![0; self.header.page_layout.segment_bytes(head)];
        for block in 0..sequence.blocks().len() {
            let bytes = cache.block_bytes(sequence, block, local)?;
            if geometry.layout() == self.header.page_layout {
                self.writer.write("segment", bytes)?;
            } else {
                let (from, to) = ((geometry.layout(), bytes), (self.header.page_layout, &mut other[..]));
                crate::page::transcode(head, from, to)?;
                self.writer.write("segment", &other)?;
            }
        }
        let tokens = sequence.tokens();
        for (side, bytes, held) in [
            (cache.sink_page(), cache.sink_bytes(sequence)?, cache.sink_tokens(tokens)),
            (cache.open_page(), cache.open_bytes(sequence)?, cache.open_tokens(tokens)),
        ] {
            if held > 0 {
                let segment = &bytes[side.segment(local)];
                self.writer.write("segment", &segment[side.keys(0..held)])?;
                self.writer.write("segment", &segment[side.values(0..held)])?;
            }
        }
        self.writer.close("segment")?;
        self.segments += 1;
        Ok(())
    }

    fn check(&self, cache: &Cache, sequence: &Sequence, kv_head: u32) -> Result<(), Error> {
        let (header, shape) = (&self.header, cache.shape());
        let dims = (header.model.qk_dim as usize, header.model.v_dim as usize);
        if *cache.config() != header.config || (shape.qk_dim, shape.v_dim) != dims {
            return Err(Error::argument("cache", "the configuration and dims of the header", "others"));
        }
        let first = cache.first_kv_head();
        let heads = first..(first + shape.kv_heads as u32).min(header.model.kv_heads);
        if cache.layer() >= header.model.layers || !heads.contains(&kv_head) {
            let expected = format!("a layer below {} and a head of {heads:?}", header.model.layers);
            return Err(Error::argument(
                "kv_head",
                expected,
                format!("layer {}, head {kv_head}", cache.layer()),
            ));
        }
        if sequence.tokens() as u64 != header.tokens {
            let expected = format!("{} tokens, as the header says", header.tokens);
            return Err(Error::argument("sequence", expected, sequence.tokens()));
        }
        cache.check_parts(sequence)
    }

    /// Ends the stream, flushes it and gives the writer back.
    ///
    /// # Errors
    /// [`Error::Stream`] when the writer fails.
    pub fn finish(mut self) -> Result<W, Error> {
        Frame { kind: END, layer: 0, kv_head: 0, bytes: self.segments }.write(&mut self.writer)?;
        self.writer.inner.flush().map_err(super::frame::failed("end"))?;
        Ok(self.writer.inner)
    }
}

/// Answers a [`Request`](super::Request) for a sequence that this node does not have. The receiver gets an
/// [`Error::Mismatch`].
///
/// # Errors
/// [`Error::Stream`] when the writer fails.
pub fn refuse<W: Write>(writer: W, header: &Header) -> Result<(), Error> {
    let mut writer = Summed::new(writer);
    header.write_refusal(&mut writer)?;
    writer.inner.flush().map_err(super::frame::failed("header"))
}

//! The receiving side.

use std::io::Read;

use super::frame::{END, Frame, SEGMENT, Summed, malformed};
use super::header::{Header, Model};
use super::request::Request;
use crate::page::{PageLayout, transcode};
use crate::{Cache, Error, Sequence};

/// Takes a sequence out of one or several streams.
///
/// What has arrived stays when a stream breaks: [`missing`](Self::missing) says what to ask for again. The pages are
/// taken when the first header is accepted, and handed over when everything is there.
pub struct Receiver {
    header: Header,
    max_tokens: usize,
    /// Per layer; empty until a header is accepted.
    layers: Vec<Layer>,
}

/// What is there of one layer.
struct Layer {
    sequence: Sequence,
    /// Per KV head of this node.
    done: Vec<bool>,
}

impl Receiver {
    /// A receiver of the sequence `tag` with at most `max_tokens` tokens, into `caches`: one per layer, in order, all
    /// of one configuration and shape.
    ///
    /// # Errors
    /// [`Error::Argument`] when the caches are not the layers of `model`.
    pub fn new(tag: u64, model: Model, caches: &[&mut Cache], max_tokens: usize) -> Result<Self, Error> {
        let Some(first) = caches.first() else {
            return Err(Error::argument("caches", "at least 1", 0));
        };
        if caches.len() != model.layers as usize {
            return Err(Error::argument("caches", format!("{} layers", model.layers), caches.len()));
        }
        for (layer, cache) in (0..).zip(caches) {
            let shape = cache.shape();
            let end = u64::from(cache.first_kv_head()) + shape.kv_heads as u64;
            let expected = (layer, first.shape(), first.first_kv_head(), first.config());
            let found = (cache.layer(), shape, cache.first_kv_head(), cache.config());
            let dims = (shape.qk_dim as u64, shape.v_dim as u64);
            if expected != found
                || dims != (model.qk_dim.into(), model.v_dim.into())
                || end > model.kv_heads.into()
            {
                return Err(Error::argument(
                    "caches",
                    format!("layer {layer} of {model:?}, as layer 0"),
                    format!("layer {} of {shape:?} from head {}", cache.layer(), cache.first_kv_head()),
                ));
            }
        }
        let header = Header {
            tag,
            tokens: 0,
            model,
            config: first.config().clone(),
            page_layout: PageLayout::Canonical,
        };
        Ok(Receiver { header, max_tokens, layers: Vec::new() })
    }

    /// Reads one stream to its end frame. Returns whether everything is there.
    ///
    /// `caches` are those of [`new`](Self::new). Segments that this node does not hold, or has already, are skipped.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the sender has another configuration, before any payload; [`Error::Argument`] for
    /// more tokens than allowed, [`Error::Attention`] when the pools are too small for them; [`Error::Malformed`],
    /// [`Error::Checksum`] or [`Error::Stream`] when the stream is damaged or cut. Segments that arrived whole are
    /// kept, and another stream may follow.
    pub fn receive<R: Read>(&mut self, reader: R, caches: &mut [&mut Cache]) -> Result<bool, Error> {
        let mut reader = Summed::new(reader);
        let (tokens, page_layout) = self.header.read(&mut reader)?;
        Header { page_layout, ..self.header.clone() }.segment_bytes(0, 0)?;
        self.accept(tokens, caches)?;
        let header = Header { page_layout, ..self.header.clone() };
        let mut segments = 0u64;
        loop {
            let frame = Frame::read(&mut reader)?;
            match frame.kind {
                SEGMENT => self.segment(&mut reader, &header, frame, caches)?,
                END if (frame.layer, frame.kv_head, frame.bytes) == (0, 0, segments) => {
                    return Ok(self.is_complete());
                }
                END => return Err(malformed("end", "segments", segments, frame.bytes)),
                kind => return Err(malformed("frame", "kind", "1 or 2", kind)),
            }
            segments += 1;
        }
    }

    /// Takes the pages for a sequence, or compares with those taken.
    fn accept(&mut self, tokens: u64, caches: &mut [&mut Cache]) -> Result<(), Error> {
        if caches.len() != self.header.model.layers as usize {
            let expected = format!("{} layers", self.header.model.layers);
            return Err(Error::argument("caches", expected, caches.len()));
        }
        if !self.layers.is_empty() {
            if tokens != self.header.tokens {
                let (expected, found) = (self.header.tokens.to_string(), tokens.to_string());
                return Err(Error::Mismatch { field: "tokens", expected, found });
            }
            return Ok(());
        }
        let fits = usize::try_from(tokens).ok().filter(|&tokens| tokens <= self.max_tokens);
        let Some(count) = fits else {
            return Err(Error::argument("tokens", format!("at most {}", self.max_tokens), tokens));
        };
        let mut layers = Vec::new();
        for cache in caches.iter_mut() {
            match cache.reserve(count) {
                Ok(sequence) => layers.push(Layer { sequence, done: vec![false; cache.shape().kv_heads] }),
                Err(error) => {
                    for (layer, cache) in layers.into_iter().zip(caches.iter_mut()) {
                        cache.release(layer.sequence)?;
                    }
                    return Err(error);
                }
            }
        }
        self.layers = layers;
        self.header.tokens = tokens;
        Ok(())
    }

    /// Reads one segment: into the cache, or past it.
    fn segment<R: Read>(
        &mut self,
        reader: &mut Summed<R>,
        header: &Header,
        frame: Frame,
        caches: &mut [&mut Cache],
    ) -> Result<(), Error> {
        let model = header.model;
        if frame.layer >= model.layers {
            return Err(malformed("frame", "layer", format!("below {}", model.layers), frame.layer));
        }
        if frame.kv_head >= model.kv_heads {
            return Err(malformed("frame", "KV head", format!("below {}", model.kv_heads), frame.kv_head));
        }
        let expected = header.segment_bytes(frame.layer, frame.kv_head)?;
        if frame.bytes != expected {
            return Err(malformed("frame", "bytes", expected, frame.bytes));
        }
        let cache = &mut *caches[frame.layer as usize];
        let layer = &mut self.layers[frame.layer as usize];
        let local = frame.kv_head.checked_sub(cache.first_kv_head()).map(|head| head as usize);
        match local.filter(|&head| layer.done.get(head) == Some(&false)) {
            None => {
                reader.skip("segment", frame.bytes)?;
                reader.check("segment")
            }
            Some(head) => {
                fill(reader, header.page_layout, cache, &layer.sequence, head)?;
                reader.check("segment")?;
                layer.done[head] = true;
                Ok(())
            }
        }
    }

    /// Whether every segment of this node is there.
    pub fn is_complete(&self) -> bool {
        !self.layers.is_empty() && self.layers.iter().all(|layer| layer.done.iter().all(|&done| done))
    }

    /// The segments `(layer, KV head)` that are not there yet, of the model's numbers: what to ask a sender for.
    /// `caches` are those of [`new`](Self::new).
    pub fn missing(&self, caches: &[&mut Cache]) -> Request {
        let mut segments = Vec::new();
        for (i, cache) in caches.iter().enumerate() {
            for head in 0..cache.shape().kv_heads {
                if !self.layers.get(i).is_some_and(|layer| layer.done[head]) {
                    segments.push((cache.layer(), cache.first_kv_head() + head as u32));
                }
            }
        }
        Request { tag: self.header.tag, segments }
    }

    /// The sequences, one per layer, once everything is there.
    ///
    /// # Errors
    /// The receiver itself, when something is missing.
    #[allow(clippy::result_large_err)]
    pub fn finish(self) -> Result<Vec<Sequence>, Self> {
        if self.is_complete() {
            return Ok(self.layers.into_iter().map(|layer| layer.sequence).collect());
        }
        Err(self)
    }

    /// Gives up: the pages go back to the pools of `caches`.
    ///
    /// # Errors
    /// [`Error::Attention`] when the caches are others than before.
    pub fn abort(self, caches: &mut [&mut Cache]) -> Result<(), Error> {
        for (layer, cache) in self.layers.into_iter().zip(caches) {
            cache.release(layer.sequence)?;
        }
        Ok(())
    }
}

/// Reads one segment's payload into its pages.
fn fill<R: Read>(
    reader: &mut Summed<R>,
    page_layout: PageLayout,
    cache: &mut Cache,
    sequence: &Sequence,
    kv_head: usize,
) -> Result<(), Error> {
    let layout = cache.geometry().layout();
    let head = *cache.geometry().head(kv_head);
    let mut other = vec![0; if layout == page_layout { 0 } else { page_layout.segment_bytes(&head) }];
    for &page in sequence.blocks() {
        let target = cache.block_segment_mut(page, kv_head)?;
        if layout == page_layout {
            reader.read("segment", target)?;
        } else {
            reader.read("segment", &mut other)?;
            transcode(&head, (page_layout, &other), (layout, target))?;
        }
    }
    let tokens = sequence.tokens();
    let (sinks, open) = (cache.sink_tokens(tokens), cache.open_tokens(tokens));
    for (held, is_sinks) in [(sinks, true), (open, false)] {
        if held > 0 {
            let side = if is_sinks { cache.sink_page() } else { cache.open_page() };
            let segment = &mut cache.side_bytes_mut(sequence, is_sinks)?[side.segment(kv_head)];
            reader.read("segment", &mut segment[side.keys(0..held)])?;
            reader.read("segment", &mut segment[side.values(0..held)])?;
        }
    }
    Ok(())
}

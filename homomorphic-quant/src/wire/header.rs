//! The header: what kind of cache a stream holds.

use std::io::{Read, Write};

use attention::DType;

use super::frame::{Fields, Summed, VERSION, malformed};
use crate::page::{HeadGeometry, PageLayout};
use crate::{Config, Error, Layout, OpenBlock, Rounding};

const MAGIC: [u8; 8] = *b"longkvHQ";
const FIXED: usize = 64;

/// Sizes of a whole model, as all nodes agree on them, whatever each holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Model {
    /// Layers.
    pub layers: u32,
    /// KV heads of a layer.
    pub kv_heads: u32,
    /// Channels of a key.
    pub qk_dim: u32,
    /// Channels of a value.
    pub v_dim: u32,
}

/// What a stream holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Names the sequence; sender and receiver agree on it elsewhere.
    pub tag: u64,
    /// Tokens of the sequence.
    pub tokens: u64,
    /// The model.
    pub model: Model,
    /// How keys and values are quantized.
    pub config: Config,
    /// Layout of closed blocks in the stream.
    pub page_layout: PageLayout,
}

impl Header {
    /// Bytes on the wire: the fixed part, the widths and two checksums.
    pub fn bytes(&self) -> usize {
        FIXED + 4 + self.model.layers as usize * self.model.kv_heads as usize + 4
    }

    /// One KV head of the model.
    ///
    /// # Errors
    /// [`Error::Argument`] when the dims make no pages.
    pub fn head(&self, layer: u32, kv_head: u32) -> Result<HeadGeometry, Error> {
        let bits = self.config.head_bits(layer as usize, kv_head as usize);
        HeadGeometry::new(&self.config, bits, self.model.qk_dim as usize, self.model.v_dim as usize)
    }

    /// Payload bytes of a segment of this head.
    ///
    /// # Errors
    /// As [`head`](Self::head), and when the page layout is not made for the head.
    pub fn segment_bytes(&self, layer: u32, kv_head: u32) -> Result<u64, Error> {
        let head = self.head(layer, kv_head)?;
        self.page_layout.check(&head)?;
        let tokens = self.tokens.saturating_sub(self.config.sinks() as u64);
        let sinks = self.tokens - tokens;
        let partition = self.config.partition() as u64;
        let side = 2 * (head.qk_dim + head.v_dim) as u64;
        let blocks = (tokens / partition).checked_mul(self.page_layout.segment_bytes(&head) as u64);
        let rest = (sinks + tokens % partition).checked_mul(side);
        let bytes = blocks.zip(rest).and_then(|(blocks, rest)| blocks.checked_add(rest));
        bytes.ok_or_else(|| Error::argument("tokens", "a number whose bytes fit 64 bits", self.tokens))
    }

    /// The widths of one layer, as bytes.
    fn widths(&self, layer: u32) -> impl Iterator<Item = u8> + '_ {
        (0..self.model.kv_heads).map(move |kv_head| {
            let bits = self.config.head_bits(layer as usize, kv_head as usize);
            (bits.k.count() << 4 | bits.v.count()) as u8
        })
    }

    fn fixed(&self, status: u16) -> Vec<u8> {
        let axes: u8 = match self.config.layout() {
            Layout::PerChannelKey => 1,
            Layout::PerTokenKey => 2,
        };
        let dtype: u8 = if self.config.dtype() == DType::F16 { 1 } else { 2 };
        let (rounding, seed) = rounding(&self.config);
        let open_block = u8::from(self.config.open_block() == OpenBlock::Requantized);
        let mut bytes = MAGIC.to_vec();
        for number in [VERSION, status, self.page_layout.id()] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend([axes, dtype]);
        bytes.extend((self.config.partition() as u16).to_le_bytes());
        bytes.extend((self.config.sinks() as u16).to_le_bytes());
        bytes.extend([u8::from(self.config.cached_sums()), open_block, rounding, 0]);
        for number in [seed, self.tag, self.tokens] {
            bytes.extend(number.to_le_bytes());
        }
        for number in [self.model.layers, self.model.kv_heads, self.model.qk_dim, self.model.v_dim] {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    pub(super) fn write<W: Write>(&self, writer: &mut Summed<W>) -> Result<(), Error> {
        writer.write("header", &self.fixed(0))?;
        writer.close("header")?;
        for layer in 0..self.model.layers {
            let widths: Vec<u8> = self.widths(layer).collect();
            writer.write("header", &widths)?;
        }
        writer.close("header")
    }

    /// Writes a header that says that nothing follows.
    pub(super) fn write_refusal<W: Write>(&self, writer: &mut Summed<W>) -> Result<(), Error> {
        writer.write("header", &self.fixed(1))?;
        writer.close("header")
    }

    /// Reads a header and compares it with what the receiver expects: everything but `tokens` and `page_layout`.
    /// Gives the tokens and page layout of the stream. Allocates nothing.
    pub(super) fn read<R: Read>(&self, reader: &mut Summed<R>) -> Result<(u64, PageLayout), Error> {
        let mut bytes = [0; FIXED];
        reader.read("header", &mut bytes)?;
        let mut fields = Fields::new(&bytes);
        let magic: [u8; 8] = fields.take();
        if magic != MAGIC {
            return Err(malformed("header", "magic", MAGIC.escape_ascii(), magic.escape_ascii()));
        }
        let version = fields.u16();
        if version != VERSION {
            return Err(malformed("header", "version", VERSION, version));
        }
        reader.check("header")?;
        let status = fields.u16();
        let layout_id = fields.u16();
        let (axes, dtype) = (fields.u8(), fields.u8());
        let (partition, sinks) = (fields.u16(), fields.u16());
        let (sums, open_block, rounding_kind, reserved) =
            (fields.u8(), fields.u8(), fields.u8(), fields.u8());
        let (seed, tag, tokens) = (fields.u64(), fields.u64(), fields.u64());
        let (layers, kv_heads, qk_dim, v_dim) = (fields.u32(), fields.u32(), fields.u32(), fields.u32());

        match status {
            0 => {}
            1 => return Err(mismatch("tag", self.tag, "no such sequence")),
            found => return Err(malformed("header", "status", "0 or 1", found)),
        }
        if reserved != 0 {
            return Err(malformed("header", "reserved", 0, reserved));
        }
        let page_layout = PageLayout::from_id(layout_id)
            .ok_or_else(|| malformed("header", "page layout", "a known layout", layout_id))?;
        let config = &self.config;
        let named = |names: &[&str], value: u8| match names.get(usize::from(value)) {
            Some(name) if !name.is_empty() => name.to_string(),
            _ => format!("unknown ({value})"),
        };
        let axes_names = ["", "keys per channel", "keys per token"];
        let own_axes = if config.layout() == Layout::PerChannelKey { 1 } else { 2 };
        let own_dtype = if config.dtype() == DType::F16 { 1 } else { 2 };
        let own_open = u8::from(config.open_block() == OpenBlock::Requantized);
        let (own_rounding, own_seed) = rounding(config);
        let names: [(&'static str, &[&str], u8, u8); 5] = [
            ("axes", &axes_names, own_axes, axes),
            ("dtype", &["", "f16", "bf16"], own_dtype, dtype),
            ("sums", &["none", "cached"], u8::from(config.cached_sums()), sums),
            ("open block", &["16 bits", "requantized"], own_open, open_block),
            ("rounding", &["nearest", "stochastic"], own_rounding, rounding_kind),
        ];
        for (field, names, own, found) in names {
            if own != found {
                return Err(mismatch(field, named(names, own), named(names, found)));
            }
        }
        let model = self.model;
        for (field, own, found) in [
            ("partition", config.partition() as u64, u64::from(partition)),
            ("sinks", config.sinks() as u64, u64::from(sinks)),
            ("seed", own_seed, seed),
            ("tag", self.tag, tag),
            ("layers", model.layers.into(), layers.into()),
            ("KV heads", model.kv_heads.into(), kv_heads.into()),
            ("key dim", model.qk_dim.into(), qk_dim.into()),
            ("value dim", model.v_dim.into(), v_dim.into()),
        ] {
            if own != found {
                return Err(mismatch(field, own, found));
            }
        }
        let mut differs = None;
        for layer in 0..model.layers {
            for (kv_head, own) in self.widths(layer).enumerate() {
                let mut found = [0];
                reader.read("header", &mut found)?;
                if own != found[0] && differs.is_none() {
                    differs = Some((layer, kv_head, own, found[0]));
                }
            }
        }
        reader.check("header")?;
        if let Some((layer, kv_head, own, found)) = differs {
            let text = |width: u8| format!("{}/{} at layer {layer}, head {kv_head}", width >> 4, width & 15);
            return Err(mismatch("bits of K/V", text(own), text(found)));
        }
        Ok((tokens, page_layout))
    }
}

fn rounding(config: &Config) -> (u8, u64) {
    match config.rounding() {
        Rounding::Nearest => (0, 0),
        Rounding::Stochastic { seed } => (1, seed),
    }
}

fn mismatch(field: &'static str, expected: impl ToString, found: impl ToString) -> Error {
    Error::Mismatch { field, expected: expected.to_string(), found: found.to_string() }
}

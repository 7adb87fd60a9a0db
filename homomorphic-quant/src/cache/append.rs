//! New tokens: into the sinks, into the open block, and the block that is full becomes codes.

use std::ops::Range;

use attention::HeadsView;
use attention::page_pool::{PagePool, PageRef};
use rayon::prelude::*;

use super::{Cache, Sequence};
use crate::block::{BlockPlace, requantize};
use crate::page::SidePage;
use crate::page::canonical::{pack_halves, unpack_halves};
use crate::quantizer::store;
use crate::{Error, HeadBlock, OpenBlock};

/// Keys and values of new tokens.
#[derive(Clone, Copy)]
struct New<'a> {
    /// `[tokens, kv_heads, qk_dim]`
    k: HeadsView<'a, f32>,
    /// `[tokens, kv_heads, v_dim]`
    v: HeadsView<'a, f32>,
}

impl Cache {
    /// Appends tokens: `k` `[tokens, kv_heads, qk_dim]`, after RoPE, and `v` `[tokens, kv_heads, v_dim]`. They are
    /// rounded to the cache's 16-bit type first, and codes are those of the rounded values.
    ///
    /// # Errors
    /// [`Error::Argument`] when a shape does not fit, [`Error::NotFinite`] for a value that is not finite as stored,
    /// and [`Error::Attention`] when pages run out or the sequence is not the cache's. Nothing changes then.
    pub fn append(
        &mut self,
        sequence: &mut Sequence,
        k: HeadsView<'_, f32>,
        v: HeadsView<'_, f32>,
    ) -> Result<(), Error> {
        self.check_append(sequence, k, v)?;
        let new = New { k, v };
        let (from, to) = (sequence.tokens, sequence.tokens + k.tokens());
        let mut at = from;
        while at < to {
            let rest = at - from..k.tokens();
            let open = self.open_tokens(at);
            at += if at < self.config.sinks() {
                self.append_sinks(sequence, new, rest, at)?
            } else if self.config.open_block() == OpenBlock::Requantized {
                self.append_requantized(sequence, new, rest.start)?
            } else if open == 0 && rest.len() >= self.config.partition() {
                self.append_blocks(sequence, new, rest)?
            } else {
                self.append_open(sequence, new, rest)?
            };
            sequence.tokens = at;
        }
        Ok(())
    }

    /// Whether tokens can be appended; fails as [`append`](Self::append) does.
    pub(crate) fn check_append(
        &self,
        sequence: &Sequence,
        k: HeadsView<'_, f32>,
        v: HeadsView<'_, f32>,
    ) -> Result<(), Error> {
        self.check(k, v)?;
        self.check_parts(sequence)?;
        let to = sequence.tokens + k.tokens();
        if u32::try_from(to).is_err() {
            return Err(Error::argument("k", format!("at most {} tokens in all", u32::MAX), to));
        }
        self.check_room(sequence, to)
    }

    /// Shapes and values.
    fn check(&self, k: HeadsView<'_, f32>, v: HeadsView<'_, f32>) -> Result<(), Error> {
        for (argument, view, dim) in [("k", k, self.shape.qk_dim), ("v", v, self.shape.v_dim)] {
            if (view.tokens(), view.heads(), view.dim()) != (k.tokens(), self.shape.kv_heads, dim) {
                return Err(Error::argument(
                    argument,
                    format!("[{} tokens, {} heads, {dim}]", k.tokens(), self.shape.kv_heads),
                    format!("[{} tokens, {} heads, {}]", view.tokens(), view.heads(), view.dim()),
                ));
            }
            for token in 0..view.tokens() {
                for head in 0..view.heads() {
                    let vector = view.vector(token, head);
                    let stored = |&x: &f32| store(x, self.config.dtype());
                    if let Some(i) = vector.iter().position(|x| !stored(x).is_finite()) {
                        let index = (token * view.heads() + head) * dim + i;
                        let value = stored(&vector[i]).to_string();
                        return Err(Error::NotFinite { argument, index, value });
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the pools have the pages that growing to `to` tokens takes.
    fn check_room(&self, sequence: &Sequence, to: usize) -> Result<(), Error> {
        let out_of = |pool: &PagePool, requested: usize| {
            let usage = pool.usage();
            match requested > usage.free() {
                true => Err(attention::Error::OutOfPages {
                    requested,
                    free: usage.free(),
                    capacity: usage.capacity,
                }),
                false => Ok(()),
            }
        };
        // A page that is written needs a copy while others own it, and one that is not there is taken.
        let side = |pool: &PagePool, page: Option<PageRef>, taken: bool| match page {
            Some(page) => Ok::<_, attention::Error>(usize::from(pool.owners(page)? > 1)),
            None => Ok(usize::from(taken)),
        };
        if to == sequence.tokens {
            return Ok(());
        }
        // The handles of a sequence of another cache are refused before anything changes.
        if let Some(&page) = sequence.blocks.first() {
            self.blocks.owners(page)?;
        }
        out_of(&self.blocks, self.closed_blocks(to).saturating_sub(sequence.blocks.len()))?;
        if let Some(pool) = &self.sinks
            && sequence.tokens < self.config.sinks()
        {
            out_of(pool, side(pool, sequence.sinks, true)?)?;
        }
        if to > self.config.sinks() {
            let requantized = self.config.open_block() == OpenBlock::Requantized;
            let taken = requantized || self.open_tokens(to) > 0;
            out_of(&self.open, side(&self.open, sequence.open, taken)?)?;
        }
        Ok(())
    }

    /// Fills the sinks. Gives how many tokens went there, as do the other parts of `append`.
    fn append_sinks(
        &mut self,
        sequence: &mut Sequence,
        new: New<'_>,
        rest: Range<usize>,
        at: usize,
    ) -> Result<usize, Error> {
        let Some(pool) = &mut self.sinks else { return Ok(0) };
        let page = match sequence.sinks {
            Some(page) => pool.make_unique(page)?,
            None => pool.allocate()?,
        };
        sequence.sinks = Some(page);
        let tokens = rest.len().min(self.sink_page.tokens - at);
        let bytes = pool.bytes_mut(page)?;
        write_side(&self.sink_page, self.config.dtype(), bytes, at, new, rest.start..rest.start + tokens);
        Ok(tokens)
    }

    /// Adds to the open block, and closes it when it is full.
    fn append_open(
        &mut self,
        sequence: &mut Sequence,
        new: New<'_>,
        rest: Range<usize>,
    ) -> Result<usize, Error> {
        let open = self.open_tokens(sequence.tokens);
        let page = match sequence.open {
            Some(page) => self.open.make_unique(page)?,
            None => self.open.allocate()?,
        };
        sequence.open = Some(page);
        let tokens = rest.len().min(self.open_page.tokens - open);
        let bytes = self.open.bytes_mut(page)?;
        write_side(&self.open_page, self.config.dtype(), bytes, open, new, rest.start..rest.start + tokens);
        if open + tokens == self.open_page.tokens {
            self.seal(sequence, page)?;
        }
        Ok(tokens)
    }

    /// Turns a full open block into codes.
    fn seal(&mut self, sequence: &mut Sequence, open: PageRef) -> Result<(), Error> {
        let place = self.place(sequence.blocks.len());
        let side = self.open_page;
        let source = self.open.bytes(open)?;
        let page = self.blocks.allocate()?;
        sequence.blocks.push(page);
        let target = self.blocks.bytes_mut(page)?;
        for kv_head in 0..self.shape.kv_heads {
            let segment = &source[side.segment(kv_head)];
            let dtype = self.config.dtype();
            let k: Vec<f32> = unpack_halves(&segment[side.keys(0..side.tokens)], dtype).collect();
            let v: Vec<f32> = unpack_halves(&segment[side.values(0..side.tokens)], dtype).collect();
            let head = self.geometry.head(kv_head);
            let place = place.of_head(kv_head);
            let block = HeadBlock::quantize(head, self.config.rounding(), place, &k, &v)?;
            self.geometry.layout().write(head, &block, &mut target[self.geometry.segment(kv_head)])?;
        }
        sequence.open = None;
        self.open.release(open)?;
        Ok(())
    }

    /// Whole blocks, straight into codes.
    fn append_blocks(
        &mut self,
        sequence: &mut Sequence,
        new: New<'_>,
        rest: Range<usize>,
    ) -> Result<usize, Error> {
        let partition = self.config.partition();
        let blocks = rest.len() / partition;
        let first = sequence.blocks.len();
        let heads = self.shape.kv_heads;
        let (this, dtype) = (&*self, self.config.dtype());
        let segments = (0..blocks * heads)
            .into_par_iter()
            .map(|task| {
                let (block, kv_head) = (task / heads, task % heads);
                let start = rest.start + block * partition;
                let gather = |view: HeadsView<'_, f32>| {
                    let tokens = start..start + partition;
                    let vectors = tokens.flat_map(|token| view.vector(token, kv_head));
                    vectors.map(|&x| store(x, dtype)).collect::<Vec<f32>>()
                };
                let head = this.geometry.head(kv_head);
                let place = this.place(first + block).of_head(kv_head);
                let (k, v) = (gather(new.k), gather(new.v));
                let block = HeadBlock::quantize(head, this.config.rounding(), place, &k, &v)?;
                let mut segment = vec![0; this.geometry.segment(kv_head).len()];
                this.geometry.layout().write(head, &block, &mut segment)?;
                Ok(segment)
            })
            .collect::<Result<Vec<_>, Error>>()?;
        for segments in segments.chunks_exact(heads) {
            let page = self.blocks.allocate()?;
            sequence.blocks.push(page);
            let target = self.blocks.bytes_mut(page)?;
            for (kv_head, segment) in segments.iter().enumerate() {
                target[self.geometry.segment(kv_head)].copy_from_slice(segment);
            }
        }
        Ok(blocks * partition)
    }

    /// One token into an open block that is quantized, and quantized again, at every step.
    fn append_requantized(
        &mut self,
        sequence: &mut Sequence,
        new: New<'_>,
        token: usize,
    ) -> Result<usize, Error> {
        let open = self.open_tokens(sequence.tokens);
        let page = match sequence.open {
            Some(page) => self.open.make_unique(page)?,
            None => self.open.allocate()?,
        };
        sequence.open = Some(page);
        let (side, dtype, held) = (self.open_page, self.config.dtype(), open + 1);
        let place = self.place(sequence.blocks.len());
        let bytes = self.open.bytes_mut(page)?;
        write_side(&side, dtype, bytes, open, new, token..token + 1);
        for kv_head in 0..self.shape.kv_heads {
            let segment = &mut bytes[side.segment(kv_head)];
            let mut k: Vec<f32> = unpack_halves(&segment[side.keys(0..held)], dtype).collect();
            let mut v: Vec<f32> = unpack_halves(&segment[side.values(0..held)], dtype).collect();
            let place = place.of_head(kv_head);
            requantize(self.geometry.head(kv_head), self.config.rounding(), place, &mut k, &mut v);
            pack_halves(k.into_iter(), dtype, &mut segment[side.keys(0..held)]);
            pack_halves(v.into_iter(), dtype, &mut segment[side.values(0..held)]);
        }
        if held == side.tokens {
            self.seal(sequence, page)?;
        }
        Ok(1)
    }

    /// Where the noise of a closed block comes from; of the first KV head.
    fn place(&self, block: usize) -> BlockPlace {
        let token = self.config.sinks() + block * self.config.partition();
        BlockPlace { layer: self.layer, kv_head: self.first_kv_head, token: token as u32 }
    }
}

/// Writes tokens of `new` to a side page, the first at slot `slot`.
fn write_side(
    side: &SidePage,
    dtype: attention::DType,
    bytes: &mut [u8],
    slot: usize,
    new: New<'_>,
    tokens: Range<usize>,
) {
    for kv_head in 0..side.kv_heads {
        let segment = &mut bytes[side.segment(kv_head)];
        for (slot, token) in (slot..).zip(tokens.clone()) {
            let slot = slot..slot + 1;
            let (k, v) = (new.k.vector(token, kv_head), new.v.vector(token, kv_head));
            pack_halves(k.iter().copied(), dtype, &mut segment[side.keys(slot.clone())]);
            pack_halves(v.iter().copied(), dtype, &mut segment[side.values(slot)]);
        }
    }
}

//! Cached sequences, as the CPU's cache has them and as the kernels take them.

use attention::testing::Inputs;
use attention::{Element, HeadShape, HeadsView};
use cuda::storage::Storage;
use emulator::rig::Rig;
use homomorphic_quant::cache::Segment;
use homomorphic_quant::gpu::{Counts, Places, Pools};
use homomorphic_quant::page::{HeadGeometry, PageLayout};
use homomorphic_quant::quantizer::{Group, eight_bit};
use homomorphic_quant::{Bits, Cache, Capacity, Config, Error, KvShape, Sequence};

/// Heads, sizes and widths of a case.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) q_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dims: (usize, usize),
    pub(crate) bits: (usize, usize),
    pub(crate) partition: usize,
    pub(crate) sinks: usize,
}

impl Shape {
    pub(crate) fn new(heads: (usize, usize), dim: usize, bits: (usize, usize), partition: usize) -> Self {
        Shape { q_heads: heads.0, kv_heads: heads.1, dims: (dim, dim), bits, partition, sinks: 4 }
    }

    pub(crate) fn heads(&self) -> HeadShape {
        HeadShape::new(self.q_heads, self.kv_heads, self.dims.0, self.dims.1).expect("a valid shape")
    }

    pub(crate) fn config<E: Element>(&self) -> Config {
        let bits = |bits| Bits::new(bits).expect("a width");
        Config::new(bits(self.bits.0), bits(self.bits.1))
            .with_partition(self.partition)
            .and_then(|config| config.with_sinks(self.sinks))
            .and_then(|config| config.with_dtype(E::DTYPE))
            .expect("a valid configuration")
    }

    pub(crate) fn kv(&self) -> KvShape {
        KvShape { kv_heads: self.kv_heads, qk_dim: self.dims.0, v_dim: self.dims.1 }
    }
}

/// New keys and values of one sequence.
pub(crate) struct Tokens<E> {
    pub(crate) len: usize,
    /// `[len, kv_heads, qk_dim]`
    pub(crate) k: Vec<E>,
    /// `[len, kv_heads, v_dim]`
    pub(crate) v: Vec<E>,
}

impl<E: Element> Tokens<E> {
    pub(crate) fn new(shape: &Shape, len: usize, kinds: (Inputs, Inputs), seed: u64) -> Self {
        // Heads side by side, so that each channel of each head has its own distribution.
        let k = kinds.0.generate(len, shape.kv_heads * shape.dims.0, seed);
        let v = kinds.1.generate(len, shape.kv_heads * shape.dims.1, seed + 1000);
        Tokens { len, k, v }
    }

    /// One block whose codes are all at one end, for a shape without sinks and with one KV head: one small value per group, the
    /// others at its largest code; keys by channel, values by token and channel partition.
    pub(crate) fn saturated(shape: &Shape) -> Self {
        let (len, dim) = (shape.partition, shape.dims.0);
        let channels = len.min(dim);
        let fill = |small: &dyn Fn(usize, usize) -> bool| -> Vec<E> {
            (0..len * dim).map(|i| E::from_f64(if small(i / dim, i % dim) { -1.0 } else { 1.0 })).collect()
        };
        Tokens { len, k: fill(&|token, _| token == 0), v: fill(&|_, channel| channel % channels == 0) }
    }

    /// Appends tokens `from..to` to a sequence of the CPU's cache.
    pub(crate) fn append(
        &self,
        shape: &Shape,
        cache: &mut Cache,
        sequence: &mut Sequence,
        from: usize,
        to: usize,
    ) {
        let widen = |values: &[E]| -> Vec<f32> { values.iter().map(|x| x.to_f64() as f32).collect() };
        let (k, v) = (widen(&self.k), widen(&self.v));
        let k = HeadsView::nhd(&k, self.len, shape.kv_heads, shape.dims.0).expect("keys");
        let v = HeadsView::nhd(&v, self.len, shape.kv_heads, shape.dims.1).expect("values");
        cache.append(sequence, k.slice(from..to), v.slice(from..to)).expect("room for the tokens");
    }
}

/// Makes queries whose codes against [`Tokens::saturated`] are at one end too, with scores nearly equal: in every channel partition
/// one low value, so that the others have code 255.
pub(crate) fn saturate_queries<E: Element>(shape: &Shape, queries: &mut [E]) {
    let (dim, channels) = (shape.dims.0, shape.partition.min(shape.dims.0));
    for (i, q) in queries.iter_mut().enumerate() {
        *q = E::from_f64(if (i % dim).is_multiple_of(channels) { 0.0 } else { 0.01 });
    }
}

/// Fails unless a plan refuses, by name, head sizes that pages may have but no kernel is written for.
pub(crate) fn refuse_dims(shape: &Shape, plan: impl Fn(&Shape, Pools) -> Result<(), Error>) {
    for (dims, named) in [
        ((32, 32), "qk_dim"),
        ((160, 160), "qk_dim"),
        ((192, 128), "qk_dim"),
        ((224, 256), "qk_dim"),
        ((64, 160), "v_dim"),
        ((256, 192), "v_dim"),
    ] {
        let shape = Shape { dims, ..*shape };
        let counts = Counts { pages: 4, sink_pages: 1, open_pages: 1, max_pages: 2 };
        let pools = Pools::new(&shape.config::<half::f16>(), 0, shape.heads(), counts).expect("pools");
        match plan(&shape, pools) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named, "{dims:?}"),
            other => panic!("{dims:?}: {other:?}"),
        }
    }
}

/// Which of a token's vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    K,
    V,
}

/// A cached element that is not finite, as an append leaves it: in 16 bits as it is, in a closed block as a group of NaN.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spoilt {
    pub(crate) sequence: usize,
    pub(crate) kv_head: usize,
    /// Position in the sequence.
    pub(crate) token: usize,
    pub(crate) side: Side,
    pub(crate) channel: usize,
    pub(crate) value: f32,
}

/// Sequences in a CPU cache of packed pages.
pub(crate) struct Cached {
    pub(crate) cache: Cache,
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) table: Table,
    /// What [`upload`](Self::upload) changes: the CPU's cache refuses it.
    pub(crate) spoilt: Option<Spoilt>,
}

/// Where the kernels find the sequences' pages.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub(crate) max_pages: usize,
    /// `[batch, max_pages]`; entries without a block are no page's.
    pub(crate) block_table: Vec<u32>,
    pub(crate) sink_page: Vec<u32>,
    pub(crate) open_page: Vec<u32>,
}

impl Cached {
    /// Sequences of these tokens. They grow in turns, so that their pages mix.
    pub(crate) fn new<E: Element>(shape: &Shape, tokens: &[Tokens<E>]) -> Self {
        Self::with_room(shape, tokens, 0)
    }

    /// With room for `room` more tokens in each.
    pub(crate) fn with_room<E: Element>(shape: &Shape, tokens: &[Tokens<E>], room: usize) -> Self {
        let config = shape.config::<E>();
        let longest = tokens.iter().map(|tokens| tokens.len).max().unwrap_or(0);
        let capacity = Capacity::of_tokens(&config, tokens.len(), longest + room + shape.partition);
        let mut cache =
            Cache::shard(&config, 0, 0, shape.kv(), capacity, PageLayout::Packed).expect("a valid cache");
        let mut sequences: Vec<Sequence> = tokens.iter().map(|_| cache.sequence()).collect();
        let step = shape.partition * 2 + 5;
        for from in (0..longest).step_by(step) {
            for (tokens, sequence) in tokens.iter().zip(&mut sequences) {
                let to = tokens.len.min(from + step);
                if from < to {
                    tokens.append(shape, &mut cache, sequence, from, to);
                }
            }
        }
        let max_pages = sequences.iter().map(|s| s.blocks().len()).max().unwrap_or(0) + 1;
        let mut table = Table {
            max_pages,
            block_table: vec![u32::MAX; sequences.len() * max_pages],
            sink_page: vec![u32::MAX; sequences.len()],
            open_page: vec![u32::MAX; sequences.len()],
        };
        for (s, sequence) in sequences.iter().enumerate() {
            for (entry, page) in table.block_table[s * max_pages..].iter_mut().zip(sequence.blocks()) {
                *entry = page.index();
            }
            // Places that are not there must not be looked at.
            table.sink_page[s] = sequence.sinks().map_or(u32::MAX, |page| page.index());
            table.open_page[s] = sequence.open().map_or(u32::MAX, |page| page.index());
        }
        Cached { cache, sequences, table, spoilt: None }
    }

    /// Fails unless all codes that the products over the first block take are at one end: keys' and probabilities' but for the first
    /// token's, values' and queries' but for the first channel's of each channel partition. `queries` are `[rows, dim]`.
    pub(crate) fn assert_saturated<E: Element>(&self, shape: &Shape, queries: &[E], name: &str) {
        let (head, dim) = (self.cache.geometry().head(0), shape.dims.0);
        let block = self.cache.block(&self.sequences[0], 0, 0).expect("a block");
        // The scale's own rounding may cost the last code.
        let at_end = |code: &u8, bits: usize| {
            let largest = ((1u32 << bits) - 1) as u8;
            *code >= largest - largest / 64
        };
        let keys = block.k_codes[dim..].iter().all(|code| at_end(code, shape.bits.0));
        assert!(keys, "{name}: the keys' codes are not saturated");
        let (channels, partitions) = (head.v_channels, head.v_partitions());
        let values = block.v_codes.chunks_exact(channels);
        let values = values.flat_map(|codes| &codes[1..]).all(|code| at_end(code, shape.bits.1));
        assert!(values, "{name}: the values' codes are not saturated");

        let codes_of = |values: &[f32]| {
            let mut codes = vec![0; values.len()];
            eight_bit(values, &mut codes);
            codes
        };
        for q in queries.chunks_exact(dim) {
            let q: Vec<f32> = q.iter().map(|x| x.to_f64() as f32).collect();
            let folded: Vec<f32> = q.iter().zip(&block.k_groups).map(|(q, group)| q * group.scale).collect();
            let mut of_q = folded.chunks_exact(head.k_channels).map(codes_of);
            let saturated = of_q.all(|codes| codes[1..].iter().all(|code| *code == 255));
            assert!(saturated, "{name}: the queries' codes are not saturated");

            let keys = block.keys(head);
            let score = |key: &[f64]| {
                q.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum::<f64>() * (dim as f64).powf(-0.5)
            };
            let scores: Vec<f64> = keys.chunks_exact(dim).map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            for partition in 0..partitions {
                let groups = block.v_groups[partition..].iter().step_by(partitions);
                let p = scores.iter().map(|score| (score - largest).exp() as f32);
                let folded: Vec<f32> = p.zip(groups).map(|(p, group)| p * group.scale).collect();
                let saturated = codes_of(&folded)[1..].iter().all(|code| *code == 255);
                assert!(saturated, "{name}: the probabilities' codes are not saturated");
            }
        }
    }

    pub(crate) fn pools(&self, shape: &Shape) -> Pools {
        let counts = Counts {
            pages: self.cache.block_pool().usage().capacity,
            sink_pages: self.cache.sink_pool().map_or(0, |pool| pool.usage().capacity),
            open_pages: self.cache.open_pool().usage().capacity,
            max_pages: self.table.max_pages,
        };
        Pools::new(self.cache.config(), 0, shape.heads(), counts).expect("pools of the device")
    }

    /// The bytes of the pools: pages, sinks, open blocks.
    pub(crate) fn upload<R: Rig, E: Storage + Element>(
        &self,
        rig: &R,
    ) -> (R::Buffer<u8>, R::Buffer<E>, R::Buffer<E>) {
        let mut pages = self.cache.block_pool().elements::<u8>().expect("bytes").to_vec();
        let sinks = self.cache.sink_pool().map_or(&[] as &[E], |pool| pool.elements().expect("elements"));
        let mut sinks = sinks.to_vec();
        let mut open = self.cache.open_pool().elements::<E>().expect("elements").to_vec();
        if let Some(spoilt) = &self.spoilt {
            self.spoil(spoilt, &mut pages, &mut sinks, &mut open);
        }
        (rig.upload(&pages), rig.upload(&sinks), rig.upload(&open))
    }

    fn spoil<E: Element>(&self, spoilt: &Spoilt, pages: &mut [u8], sinks: &mut [E], open: &mut [E]) {
        let Spoilt { kv_head, token, side, channel, value, .. } = *spoilt;
        let sequence = &self.sequences[spoilt.sequence];
        let segments = self.cache.segments(sequence);
        let segment = segments.iter().find(|segment| segment.tokens().contains(&token)).expect("a token");
        let slot = token - segment.tokens().start;
        match segment {
            Segment::Codes { block, .. } => {
                let geometry = self.cache.geometry();
                let (head, layout) = (geometry.head(kv_head), geometry.layout());
                let page = sequence.blocks()[*block].index() as usize * geometry.bytes();
                let bytes = &mut pages[page..][geometry.segment(kv_head)];
                let mut block = layout.read(head, bytes).expect("a segment");
                let (groups, codes, dim, group_of): (_, _, _, fn(&_, _, _) -> usize) = match side {
                    Side::K => (&mut block.k_groups, &mut block.k_codes, head.qk_dim, HeadGeometry::k_group),
                    Side::V => (&mut block.v_groups, &mut block.v_codes, head.v_dim, HeadGeometry::v_group),
                };
                let bad = group_of(head, slot, channel);
                groups[bad] = Group { scale: f32::NAN, min: f32::NAN };
                for (i, code) in codes.iter_mut().enumerate() {
                    if group_of(head, i / dim, i % dim) == bad {
                        *code = 0;
                    }
                }
                block.add_up_sums(head);
                layout.write(head, &block, bytes).expect("a segment");
            }
            Segment::Dense { sinks: is_sinks, .. } => {
                let (pool, page, place) = match is_sinks {
                    true => (sinks, self.cache.sink_page(), sequence.sinks()),
                    false => (open, self.cache.open_page(), sequence.open()),
                };
                let vector = match side {
                    Side::K => page.keys(slot..slot + 1),
                    Side::V => page.values(slot..slot + 1),
                };
                let page =
                    place.expect("a page").index() as usize * page.bytes() + page.segment(kv_head).start;
                pool[(page + vector.start) / 2 + channel] = E::from_f32(value);
            }
        }
    }
}

/// A [`Table`] on the device.
pub(crate) struct DeviceTable<R: Rig> {
    block_table: R::Buffer<u32>,
    sink_page: R::Buffer<u32>,
    open_page: R::Buffer<u32>,
}

impl<R: Rig> DeviceTable<R> {
    pub(crate) fn new(rig: &R, table: &Table) -> Self {
        DeviceTable {
            block_table: rig.upload(&table.block_table),
            sink_page: rig.upload(&table.sink_page),
            open_page: rig.upload(&table.open_page),
        }
    }

    /// Hands the places to `run`.
    pub(crate) fn with<T>(&self, rig: &R, run: impl FnOnce(Places<'_>) -> T) -> T {
        let (block_table, sink_page, open_page) =
            (rig.view(&self.block_table), rig.view(&self.sink_page), rig.view(&self.open_page));
        run(Places { block_table: &block_table, sink_page: &sink_page, open_page: &open_page })
    }
}

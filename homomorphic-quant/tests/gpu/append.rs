//! Appending: pages, sinks and open blocks have the CPU's bytes, in whatever chunks tokens arrive.

use attention::Element;
use attention::testing::{Inputs, shuffled_pages};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use homomorphic_quant::Error;
use homomorphic_quant::gpu::{Append, AppendArgs, AppendConfig, AppendPlan, Counts, Pools};
use homomorphic_quant::page::SidePage;

use crate::sequences::{Cached, DeviceTable, Shape, Table, Tokens, refuse_dims};

emulator::device_test!(
    bytes_equal_the_cpu,
    bad_sequences_are_reported_and_the_others_stay_right,
    values_that_are_not_finite_make_their_group_nan,
    appending_again_changes_nothing_else,
);

/// A cache on the device that grows by appends.
pub(crate) struct Grown<R: Rig, E: Storage> {
    pub(crate) shape: Shape,
    pub(crate) pools: Pools,
    pub(crate) table: Table,
    pub(crate) pages: R::Buffer<u8>,
    pub(crate) sinks: R::Buffer<E>,
    pub(crate) open: R::Buffer<E>,
    pub(crate) lens: Vec<usize>,
}

impl<R: Rig, E: Storage + Element> Grown<R, E> {
    /// Empty sequences of up to `max_len` tokens, with shuffled pages.
    pub(crate) fn new(rig: &R, shape: &Shape, batch: usize, max_len: usize, seed: u64) -> Self {
        let max_pages = max_len / shape.partition;
        let pages = batch * max_pages + 2;
        let mut block_table = shuffled_pages(pages, seed);
        block_table.truncate(batch * max_pages);
        let table = Table {
            max_pages,
            block_table,
            sink_page: shuffled_pages(batch, seed + 1),
            open_page: shuffled_pages(batch, seed + 2),
        };
        let counts = Counts { pages, sink_pages: batch, open_pages: batch, max_pages };
        let pools = Pools::new(&shape.config::<E>(), 0, shape.heads(), counts).expect("pools");
        let elements = |page: SidePage| batch * page.bytes() / size_of::<E>();
        Grown {
            shape: *shape,
            pages: rig.poisoned(pages * pools.page_bytes()),
            sinks: rig.poisoned(elements(pools.sink_page())),
            open: rig.poisoned(elements(pools.open_page())),
            pools,
            table,
            lens: vec![0; batch],
        }
    }

    /// Appends tokens up to `to` to each sequence; reports the fault.
    pub(crate) fn append(&mut self, rig: &R, tokens: &[Tokens<E>], to: &[usize]) -> Option<Fault> {
        type Rows<'a, E> = &'a dyn Fn(&Tokens<E>) -> (Vec<E>, usize);
        let rows = |values: Rows<'_, E>| -> Vec<E> {
            let new = tokens.iter().zip(self.lens.iter().zip(to));
            new.flat_map(|(tokens, (&from, &to))| {
                let (values, row) = values(tokens);
                values[from * row..to * row].to_vec()
            })
            .collect()
        };
        let (heads, (qk_dim, v_dim)) = (self.shape.kv_heads, self.shape.dims);
        let k = rows(&|tokens| (tokens.k.clone(), heads * qk_dim));
        let v = rows(&|tokens| (tokens.v.clone(), heads * v_dim));
        let mut start = vec![0u32];
        for (from, to) in self.lens.iter().zip(to) {
            start.push(start.last().expect("a start") + (to - from) as u32);
        }
        let lens: Vec<u32> = to.iter().map(|len| *len as u32).collect();
        let fault = self.launch(rig, (&k, &v), &start, &lens);
        self.lens = to.to_vec();
        fault
    }

    fn launch(&mut self, rig: &R, (k, v): (&[E], &[E]), start: &[u32], lens: &[u32]) -> Option<Fault> {
        let num_new = k.len() / (self.shape.kv_heads * self.shape.dims.0);
        let plan = AppendPlan::new(AppendConfig {
            pools: self.pools,
            batch: lens.len(),
            max_new: num_new.max(1),
            num_new,
            max_kv_len: 4096,
            strides: None,
        })
        .expect("a valid plan");
        let kernel = Append::<_, E>::prepare(rig.device(), &plan).expect("prepare the kernel");
        let (k, v) = (rig.upload(k), rig.upload(v));
        let (start, lens) = (rig.upload(start), rig.upload(lens));
        let mut status = rig.zeroed::<u64>(1);
        let table = DeviceTable::new(rig, &self.table);
        table
            .with(rig, |places| {
                kernel.run(
                    rig.queue(),
                    AppendArgs {
                        k_new: &rig.view(&k),
                        v_new: &rig.view(&v),
                        new_start: &rig.view(&start),
                        kv_len: &rig.view(&lens),
                        places,
                        pages: rig.view_mut(&mut self.pages),
                        sink_pool: rig.view_mut(&mut self.sinks),
                        open_pool: rig.view_mut(&mut self.open),
                        status: rig.view_mut(&mut status),
                    },
                )
            })
            .unwrap_or_else(|error| panic!("{:?} on {}: {error}", self.shape, rig.name()));
        Fault::decode(rig.download(&status)[0])
    }

    /// Compares every byte that a sequence owns with the CPU's cache.
    fn assert_equals(&self, rig: &R, cached: &Cached, sequence: usize, name: &str) {
        let cpu = &cached.sequences[sequence];
        let pages = rig.download(&self.pages);
        for (block, page) in cpu.blocks().iter().enumerate() {
            let at = self.table.block_table[sequence * self.table.max_pages + block] as usize;
            let found = &pages[at * self.pools.page_bytes()..][..self.pools.page_bytes()];
            let expected = cached.cache.block_pool().bytes(*page).expect("a page");
            let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
            assert_eq!(wrong, None, "{name}: first wrong byte of block {block} of sequence {sequence}");
        }
        let side = |pool: &R::Buffer<E>, at: u32, page: SidePage, tokens: usize, expected: &[u8]| {
            let pool = rig.download(pool);
            let bytes: &[u8] = bytemuck::cast_slice(&pool);
            for head in 0..page.kv_heads {
                let segment = page.segment(head);
                for part in [page.keys(0..tokens), page.values(0..tokens)] {
                    let range = segment.start + part.start..segment.start + part.end;
                    let found = &bytes[at as usize * page.bytes()..][range.clone()];
                    assert_eq!(found, &expected[range], "{name}: sequence {sequence}, head {head}");
                }
            }
        };
        let tokens = cpu.tokens();
        if let (Some(page), Some(pool)) = (cpu.sinks(), cached.cache.sink_pool()) {
            let expected = pool.bytes(page).expect("a page");
            let tokens = cached.cache.sink_tokens(tokens);
            side(&self.sinks, self.table.sink_page[sequence], self.pools.sink_page(), tokens, expected);
        }
        if let Some(page) = cpu.open() {
            let expected = cached.cache.open_pool().bytes(page).expect("a page");
            let tokens = cached.cache.open_tokens(tokens);
            side(&self.open, self.table.open_page[sequence], self.pools.open_page(), tokens, expected);
        }
    }
}

const OUTLIERS: (Inputs, Inputs) = (Inputs::OutlierChannels, Inputs::OutlierElements);

fn tokens<E: Element>(shape: &Shape, lens: &[usize], kinds: (Inputs, Inputs), seed: u64) -> Vec<Tokens<E>> {
    lens.iter().enumerate().map(|(s, &len)| Tokens::new(shape, len, kinds, seed + s as u64)).collect()
}

/// Appends in the given rounds of lengths and compares after each.
fn check<R: Rig, E: Storage + Element>(
    rig: &R,
    shape: Shape,
    rounds: &[&[usize]],
    kinds: (Inputs, Inputs),
    seed: u64,
) {
    let last = rounds.last().expect("a round");
    let tokens = tokens::<E>(&shape, last, kinds, seed);
    let longest = *last.iter().max().expect("a sequence");
    let mut grown = Grown::<R, E>::new(rig, &shape, last.len(), longest.max(shape.partition), seed);
    for (i, lens) in rounds.iter().enumerate() {
        assert_eq!(grown.append(rig, &tokens, lens), None);
        let so_far: Vec<Tokens<E>> = tokens
            .iter()
            .zip(*lens)
            .map(|(tokens, &len)| Tokens {
                len,
                k: tokens.k[..len * shape.kv_heads * shape.dims.0].to_vec(),
                v: tokens.v[..len * shape.kv_heads * shape.dims.1].to_vec(),
            })
            .collect();
        let cached = Cached::new(&shape, &so_far);
        for sequence in 0..lens.len() {
            let name = format!("{shape:?} as {} seed {seed} on {}, round {i}", E::NAME, rig.name());
            grown.assert_equals(rig, &cached, sequence, &name);
        }
    }
}

fn bytes_equal_the_cpu<R: Rig>(rig: &R) {
    let shape = |kv_heads, dim, bits, partition| Shape::new((kv_heads, kv_heads), dim, bits, partition);
    // A prompt at once, a token at a time across a closing block, chunks that close two, sequences that stay empty.
    let growth: &[&[usize]] = &[&[0, 3, 67, 4], &[1, 4, 68, 4], &[200, 5, 69, 68], &[200, 150, 132, 197]];
    check::<R, bf16>(rig, shape(2, 128, (2, 2), 64), growth, OUTLIERS, 1);
    check::<R, bf16>(rig, shape(1, 128, (4, 4), 64), &[&[68], &[132]], OUTLIERS, 2);
    check::<R, bf16>(
        rig,
        shape(1, 128, (8, 8), 64),
        &[&[67, 0], &[68, 70]],
        (Inputs::Normal, Inputs::Normal),
        3,
    );
    check::<R, f16>(rig, shape(2, 96, (4, 2), 64), &[&[100], &[140]], OUTLIERS, 4);
    check::<R, f16>(rig, shape(3, 64, (2, 4), 32), &[&[31, 4], &[36, 36], &[101, 37]], OUTLIERS, 5);
    check::<R, bf16>(rig, shape(1, 256, (8, 2), 128), &[&[140]], OUTLIERS, 6);
    let unequal = Shape { dims: (256, 128), ..shape(2, 256, (2, 2), 32) };
    check::<R, f16>(rig, unequal, &[&[35, 3], &[36, 70]], OUTLIERS, 9);
    let no_sinks = Shape { sinks: 0, ..shape(1, 64, (2, 4), 32) };
    check::<R, f16>(rig, no_sinks, &[&[31], &[32], &[33]], (Inputs::Constant, Inputs::Constant), 7);
    check::<R, f16>(rig, shape(1, 64, (2, 4), 32), &[&[70]], (Inputs::Saturated, Inputs::Constant), 8);
}

fn bad_sequences_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    const BAD_LENGTH: u32 = 1;
    const BAD_PAGE: u32 = 2;
    const BAD_INDEX: u32 = 4;
    const BAD_RANGE: u32 = 5;
    let shape = Shape::new((2, 2), 64, (2, 4), 32);
    let lens = [40, 50, 70];
    let tokens = tokens::<f16>(&shape, &lens, OUTLIERS, 11);
    let cached = Cached::new(&shape, &tokens);
    type Change = fn(&mut Table, &mut Vec<u32>, &mut Vec<u32>);
    let cases: [(&str, Change, (u32, u32)); 6] = [
        ("a page outside the pool", |table, _, _| table.block_table[table.max_pages] = 1000, (BAD_PAGE, 1)),
        ("sinks outside the pool", |table, _, _| table.sink_page[1] = 3, (BAD_INDEX, 1)),
        ("an open block outside the pool", |table, _, _| table.open_page[1] = u32::MAX, (BAD_INDEX, 1)),
        ("longer than its pages", |_, _, lens| lens[1] = 32 * 3 + 4, (BAD_LENGTH, 1)),
        ("shorter than what is new", |_, _, lens| lens[1] = 49, (BAD_LENGTH, 1)),
        ("a range past the new tokens", |_, start, _| start[3] = 161, (BAD_RANGE, 2)),
    ];
    for (what, change, (code, index)) in cases {
        let mut grown = Grown::<R, f16>::new(rig, &shape, 3, 70, 11);
        let (mut start, mut kv_len) = (vec![0u32, 40, 90, 160], lens.map(|len| len as u32).to_vec());
        change(&mut grown.table, &mut start, &mut kv_len);
        let whole = |values: fn(&Tokens<f16>) -> &Vec<f16>| -> Vec<f16> {
            tokens.iter().flat_map(|tokens| values(tokens).clone()).collect()
        };
        let (k, v) = (whole(|tokens| &tokens.k), whole(|tokens| &tokens.v));
        let fault = grown.launch(rig, (&k, &v), &start, &kv_len);
        let name = format!("{what} on {}", rig.name());
        assert_eq!(fault, Some(Fault { code, index }), "{name}");
        for good in (0..3).filter(|&good| good != index as usize) {
            grown.assert_equals(rig, &cached, good, &name);
        }
        // Nothing was written for the bad one: not to its second page, nor to any other that is no other sequence's.
        let pages = rig.download(&grown.pages);
        let bytes = grown.pools.page_bytes();
        let owned =
            |good: usize| grown.table.block_table[good * grown.table.max_pages..][..lens[good] / 32].to_vec();
        let owned: Vec<u32> = (0..3).filter(|&good| good != index as usize).flat_map(owned).collect();
        for (page, bytes) in
            pages.chunks_exact(bytes).enumerate().filter(|(page, _)| !owned.contains(&(*page as u32)))
        {
            assert!(bytes.iter().all(|byte| *byte == 0xff), "{name}: page {page}");
        }
    }
}

/// NaN or infinity makes scale and minimum of its group NaN, and its codes 0; other groups are as ever.
fn values_that_are_not_finite_make_their_group_nan<R: Rig>(rig: &R) {
    let shape = Shape { sinks: 0, ..Shape::new((1, 1), 64, (2, 4), 32) };
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        let mut tokens = tokens::<f16>(&shape, &[32], OUTLIERS, 13);
        let cached = Cached::new(&shape, &tokens);
        tokens[0].k[7 * 64 + 5] = bad; // token 7, channel 5
        tokens[0].v[9 * 64 + 40] = bad; // token 9, channel partition 1
        let mut grown = Grown::<R, f16>::new(rig, &shape, 1, 32, 13);
        assert_eq!(grown.append(rig, &tokens, &[32]), None);
        let page = grown.table.block_table[0] as usize * grown.pools.page_bytes();
        let pages = rig.download(&grown.pages);
        let head = grown.pools.geometry();
        let layout = homomorphic_quant::page::PageLayout::Packed;
        let found = layout.read(head, &pages[page..page + grown.pools.page_bytes()]).expect("a segment");
        let expected = cached.cache.block(&cached.sequences[0], 0, 0).expect("a block");
        let name = format!("{bad} on {}", rig.name());
        for (channel, (found, expected)) in found.k_groups.iter().zip(&expected.k_groups).enumerate() {
            match channel {
                5 => assert!(found.scale.is_nan() && found.min.is_nan(), "{name}: {found:?}"),
                _ => assert_eq!(found, expected, "{name}: key channel {channel}"),
            }
        }
        for (i, (found, expected)) in found.v_groups.iter().zip(&expected.v_groups).enumerate() {
            match i {
                19 => assert!(found.scale.is_nan() && found.min.is_nan(), "{name}: {found:?}"),
                _ => assert_eq!(found, expected, "{name}: value group {i}"),
            }
        }
        for i in 0..32 * 64 {
            let (token, channel) = (i / 64, i % 64);
            let key = if channel == 5 { 0 } else { expected.k_codes[i] };
            let value = if token == 9 && channel >= 32 { 0 } else { expected.v_codes[i] };
            assert_eq!((found.k_codes[i], found.v_codes[i]), (key, value), "{name}: {token}, {channel}");
        }
    }
}

/// A replayed append of nothing new to a sequence leaves it as it was: a captured step may run for sequences that wait.
fn appending_again_changes_nothing_else<R: Rig>(rig: &R) {
    let shape = Shape::new((1, 1), 64, (2, 4), 32);
    let tokens = tokens::<f16>(&shape, &[36, 69], OUTLIERS, 15);
    let mut grown = Grown::<R, f16>::new(rig, &shape, 2, 96, 15);
    assert_eq!(grown.append(rig, &tokens, &[36, 20]), None);
    for to in 21..=69 {
        assert_eq!(grown.append(rig, &tokens, &[36, to]), None);
    }
    let cached = Cached::new(&shape, &tokens);
    for sequence in 0..2 {
        grown.assert_equals(rig, &cached, sequence, &format!("{shape:?} on {}", rig.name()));
    }
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    use homomorphic_quant::{Bits, BitsOverride, Config, Layout, OpenBlock, Rounding};
    let shape = Shape::new((4, 2), 64, (2, 4), 32);
    let counts = Counts { pages: 4, sink_pages: 1, open_pages: 1, max_pages: 2 };
    let good = || shape.config::<f16>();
    let eight = BitsOverride { kv_head: Some(1), k: Some(Bits::Eight), ..BitsOverride::default() };
    let refused: [(&str, Config, Counts); 6] = [
        ("rounding", good().with_rounding(Rounding::Stochastic { seed: 1 }), counts),
        ("open_block", good().with_open_block(OpenBlock::Requantized), counts),
        ("layout", good().with_layout(Layout::PerTokenKey), counts),
        ("cached_sums", good().with_cached_sums(false), counts),
        ("bits", good().with_override(eight), counts),
        ("pages", good(), Counts { pages: 1 << 31, ..counts }),
    ];
    for (named, config, counts) in refused {
        match Pools::new(&config, 0, shape.heads(), counts) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
    let pools = Pools::new(&good(), 0, shape.heads(), counts).expect("valid pools");
    let config = AppendConfig { pools, batch: 1, max_new: 1, num_new: 1, max_kv_len: 100, strides: None };
    AppendPlan::new(config).expect("a valid plan");
    for (named, config) in [
        ("batch", AppendConfig { batch: 0, ..config }),
        ("max_new", AppendConfig { max_new: 0, ..config }),
        ("num_new", AppendConfig { num_new: 1 << 31, ..config }),
        ("batch", AppendConfig { batch: 70_000, ..config }),
        ("max_new", AppendConfig { max_new: (1 << 30) + 1, ..config }),
        ("max_kv_len", AppendConfig { max_kv_len: 1 << 31, ..config }),
        ("strides", AppendConfig { strides: Some([5, 5]), ..config }),
        ("strides", AppendConfig { num_new: 2, strides: Some([128, 120]), ..config }),
    ] {
        match AppendPlan::new(config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
    refuse_dims(&shape, |_, pools| AppendPlan::new(AppendConfig { pools, ..config }).map(drop));
}

//! Appending to a cache, bit for bit.

use attention::gpu::{Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, CacheLayout};
use attention::rope::{Rope, RopeConfig, RopeLayout};
use attention::testing::{Inputs, Rng};
use attention::{Element, Error, HeadShape, PageLayout};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use longkv_attention as attention;

emulator::device_test!(equals_the_reference_bit_for_bit, bad_slots_and_positions_are_reported);

const POSITIONS: usize = 50;

#[derive(Debug, Clone, Copy)]
struct Case {
    heads: (usize, usize),
    dim: usize,
    /// Layout and channels that rotate.
    rotary: Option<(RopeLayout, usize)>,
    with_queries: bool,
    /// Page size, or one run of slots.
    page_size: Option<usize>,
    tokens: usize,
    /// Whether new vectors are slices of one fused projection.
    fused: bool,
}

impl Case {
    const SLOTS: usize = 64;

    fn shape(&self) -> HeadShape {
        HeadShape::new(self.heads.0, self.heads.1, self.dim, self.dim).expect("a valid shape")
    }

    fn rope(&self) -> Option<Rope> {
        let (layout, rotary_dim) = self.rotary?;
        let config = RopeConfig { layout, rotary_dim, ..RopeConfig::new(self.dim, 10_000.0) };
        Some(Rope::new(config, POSITIONS).expect("a valid rotation"))
    }

    fn layout(&self) -> PageLayout {
        match self.page_size {
            Some(page_size) => PageLayout::hnd(page_size, self.heads.1, self.dim),
            None => PageLayout::nhd(1, self.heads.1, self.dim),
        }
    }

    fn plan(&self) -> AppendPlan {
        let (k, v) = (self.layout(), self.layout());
        let cache = match self.page_size {
            Some(page_size) => {
                let pages = Self::SLOTS / page_size;
                CacheLayout::Paged { page_size, pages, max_pages: 1, per_head: false, k, v }
            }
            None => CacheLayout::Contiguous { tokens: Self::SLOTS, k, v },
        };
        let rope = self.rope();
        let rope = rope.as_ref().map(|rope| (rope.config(), POSITIONS));
        let mut config = AppendConfig::packed(self.shape(), self.tokens, rope, self.with_queries, cache);
        if self.fused {
            config.strides = [self.width(); 3];
        }
        AppendPlan::new(config).expect("a valid plan")
    }

    /// Elements of a token of the fused projection: q, k and v side by side.
    fn width(&self) -> usize {
        (self.heads.0 + 2 * self.heads.1) * self.dim
    }

    /// Place of a slot's vector in the cache.
    fn offset(&self, slot: usize, head: usize) -> usize {
        let page_size = self.page_size.unwrap_or(1);
        let page = (slot / page_size) as u64;
        self.layout().offset(page, (slot % page_size) as u64, head as u64).expect("small offsets") as usize
    }
}

/// What an append works on and leaves behind.
#[derive(Debug, Clone, PartialEq)]
struct Memory<E> {
    /// q, k and v of each token, side by side `[tokens, width]`.
    fused: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
}

struct Tokens {
    slots: Vec<i64>,
    positions: Vec<u32>,
}

fn tokens(case: Case, seed: u64) -> Tokens {
    let mut random = Rng::new(seed);
    let mut slots: Vec<i64> = (0..Case::SLOTS as i64).collect();
    random.shuffle(&mut slots);
    slots.truncate(case.tokens);
    for skipped in slots.iter_mut().skip(2).step_by(5) {
        *skipped = -1;
    }
    Tokens { slots, positions: (0..case.tokens).map(|_| random.below(POSITIONS) as u32).collect() }
}

/// Rotates in f32, operation by operation, and rounds once.
fn reference<E: Element>(case: Case, tokens: &Tokens, before: &Memory<E>) -> Memory<E> {
    let mut after = before.clone();
    let rope = case.rope();
    let rotate = |vector: &[E], position: u32| -> Vec<E> {
        let mut x: Vec<f32> = vector.iter().map(|x| x.to_f32()).collect();
        if let Some(rope) = &rope {
            rope.apply(&mut x, 1, &[position]).expect("a position of the table");
        }
        x.into_iter().map(E::from_f32).collect()
    };
    for (token, (&slot, &position)) in tokens.slots.iter().zip(&tokens.positions).enumerate() {
        if slot < 0 {
            continue;
        }
        let (q_heads, kv_heads) = case.heads;
        let at = |vector: usize| token * case.width() + vector * case.dim;
        for head in 0..if case.with_queries { q_heads } else { 0 } {
            let turned = rotate(&before.fused[at(head)..][..case.dim], position);
            after.fused[at(head)..][..case.dim].copy_from_slice(&turned);
        }
        for head in 0..kv_heads {
            let to = case.offset(slot as usize, head);
            let turned = rotate(&before.fused[at(q_heads + head)..][..case.dim], position);
            after.k[to..][..case.dim].copy_from_slice(&turned);
            after.v[to..][..case.dim]
                .copy_from_slice(&before.fused[at(q_heads + kv_heads + head)..][..case.dim]);
        }
    }
    after
}

fn append<R: Rig, E: Storage>(
    rig: &R,
    case: Case,
    tokens: &Tokens,
    before: &Memory<E>,
) -> (Memory<E>, Option<Fault>) {
    let plan = case.plan();
    let kernel = Append::<_, E>::prepare(rig.device(), &plan).expect("prepare");
    let (q_width, kv_width) = (case.heads.0 * case.dim, case.heads.1 * case.dim);
    let (mut k, mut v) = (rig.upload(&before.k), rig.upload(&before.v));
    let (slot, position) = (rig.upload(&tokens.slots), rig.upload(&tokens.positions));
    let rope = case.rope();
    let tables = rope.as_ref().map(|rope| (rig.upload(rope.cos()), rig.upload(rope.sin())));
    let mut status = rig.zeroed::<u64>(1);
    // Keys and values come from a copy, because queries in the same buffer are written.
    let source = rig.upload(&before.fused);
    let column = |first: usize, width: usize| -> Vec<E> {
        let rows = before.fused.chunks(case.width());
        rows.flat_map(|row| row[first..first + width].iter().copied()).collect()
    };
    let mut q_packed = rig.upload(&column(0, q_width));
    let k_packed = rig.upload(&column(q_width, kv_width));
    let v_packed = rig.upload(&column(q_width + kv_width, kv_width));
    let mut q_fused = rig.upload(&before.fused);
    let source = rig.view(&source);
    let end = case.tokens * case.width();
    let (k_new, v_new) = if case.fused {
        (source.part(q_width..end).expect("keys"), source.part(q_width + kv_width..end).expect("values"))
    } else {
        (rig.view(&k_packed), rig.view(&v_packed))
    };
    let (position, slot) = (rig.view(&position), rig.view(&slot));
    let tables = tables.as_ref().map(|(cos, sin)| (rig.view(cos), rig.view(sin)));
    let args = AppendArgs {
        q_new: case.with_queries.then(|| rig.view_mut(if case.fused { &mut q_fused } else { &mut q_packed })),
        k_new: &k_new,
        v_new: &v_new,
        tables: tables.as_ref().map(|(cos, sin)| AppendTables { cos, sin, position: &position }),
        slot: &slot,
        k: rig.view_mut(&mut k),
        v: rig.view_mut(&mut v),
        status: rig.view_mut(&mut status),
    };
    kernel.run(rig.queue(), args).unwrap_or_else(|error| panic!("{case:?} on {}: {error}", rig.name()));

    let mut fused = before.fused.clone();
    if case.fused {
        fused = rig.download(&q_fused);
    } else {
        for (row, q) in fused.chunks_mut(case.width()).zip(rig.download(&q_packed).chunks(q_width)) {
            row[..q_width].copy_from_slice(q);
        }
    }
    let after = Memory { fused, k: rig.download(&k), v: rig.download(&v) };
    (after, Fault::decode(rig.download(&status)[0]))
}

fn memory<E: Element>(case: Case, seed: u64) -> Memory<E> {
    let cache = Case::SLOTS * case.heads.1;
    Memory {
        fused: Inputs::OutlierChannels.generate(case.tokens, case.width(), seed),
        k: Inputs::Normal.generate(cache, case.dim, seed + 1),
        v: Inputs::Normal.generate(cache, case.dim, seed + 2),
    }
}

fn check<R: Rig, E: Storage + Element>(rig: &R, case: Case, seed: u64) {
    let (tokens, before) = (tokens(case, seed), memory::<E>(case, seed));
    let expected = reference(case, &tokens, &before);
    let (after, fault) = append(rig, case, &tokens, &before);
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    for (what, after, expected) in
        [("q", &after.fused, &expected.fused), ("k", &after.k, &expected.k), ("v", &after.v, &expected.v)]
    {
        let differs =
            after.iter().zip(expected).position(|(a, b)| a.to_f32().to_bits() != b.to_f32().to_bits());
        assert_eq!(differs, None, "{what} of {name}");
    }
    assert_eq!(fault, None, "{name}");
}

fn equals_the_reference_bit_for_bit<R: Rig>(rig: &R) {
    let case = Case {
        heads: (4, 2),
        dim: 64,
        rotary: Some((RopeLayout::HalfSplit, 64)),
        with_queries: true,
        page_size: Some(16),
        tokens: 9,
        fused: false,
    };
    check::<R, f16>(rig, case, 1);
    check::<R, f16>(rig, Case { rotary: Some((RopeLayout::HalfSplit, 32)), fused: true, ..case }, 2);
    check::<R, bf16>(
        rig,
        Case { dim: 96, heads: (3, 1), rotary: Some((RopeLayout::HalfSplit, 96)), page_size: None, ..case },
        3,
    );
    check::<R, bf16>(
        rig,
        Case {
            dim: 128,
            heads: (8, 1),
            rotary: Some((RopeLayout::HalfSplit, 112)),
            page_size: Some(8),
            ..case
        },
        4,
    );
    check::<R, f16>(
        rig,
        Case { dim: 128, rotary: Some((RopeLayout::Interleaved, 128)), fused: true, tokens: 1, ..case },
        5,
    );
    check::<R, f16>(
        rig,
        Case { dim: 128, rotary: Some((RopeLayout::Interleaved, 64)), with_queries: false, ..case },
        6,
    );
    check::<R, bf16>(rig, Case { dim: 256, heads: (2, 2), rotary: None, with_queries: false, ..case }, 7);
    check::<R, f16>(rig, Case { tokens: 0, ..case }, 8);
}

fn bad_slots_and_positions_are_reported<R: Rig>(rig: &R) {
    let case = Case {
        heads: (2, 1),
        dim: 64,
        rotary: Some((RopeLayout::HalfSplit, 64)),
        with_queries: true,
        page_size: Some(16),
        tokens: 4,
        fused: false,
    };
    let good = Tokens { slots: vec![3, 17, 0, 63], positions: vec![0, 1, 2, 49] };
    let cases = [
        ("a slot past the cache", Tokens { slots: vec![3, 17, 64, 63], ..tokens_like(&good) }, 2),
        ("a slot far past the cache", Tokens { slots: vec![3, i64::MAX, 0, 63], ..tokens_like(&good) }, 1),
        (
            "a position past the tables",
            Tokens { positions: vec![0, 1, 2, POSITIONS as u32], ..tokens_like(&good) },
            3,
        ),
    ];
    for (what, bad, index) in cases {
        let before = memory::<f16>(case, 9);
        let (after, fault) = append(rig, case, &bad, &before);
        let name = format!("{what} on {}", rig.name());
        let code = attention::FaultCode::BadIndex as u32;
        assert_eq!(fault, Some(Fault { code, index: index as u32 }), "{name}");
        // The bad token is skipped, the others are appended.
        let mut slots = bad.slots.clone();
        slots[index] = -1;
        let mut positions = bad.positions.clone();
        positions[index] = 0;
        assert!(after == reference(case, &Tokens { slots, positions }, &before), "{name}");
    }
}

fn tokens_like(tokens: &Tokens) -> Tokens {
    Tokens { slots: tokens.slots.clone(), positions: tokens.positions.clone() }
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let shape = HeadShape::new(4, 2, 64, 64).expect("a valid shape");
    let layout = PageLayout::nhd(16, 2, 64);
    let paged = |per_head, layout| CacheLayout::Paged {
        page_size: 16,
        pages: 4,
        max_pages: 1,
        per_head,
        k: layout,
        v: layout,
    };
    let good = AppendConfig::packed(shape, 3, None, true, paged(false, layout));
    AppendPlan::new(good).expect("a valid plan");
    let rotary = |dim| Some((RopeLayout::HalfSplit, dim, POSITIONS));
    let bad = [
        ("rotary", AppendConfig { rotary: rotary(0), ..good }),
        ("rotary", AppendConfig { rotary: rotary(40), ..good }),
        ("rotary", AppendConfig { rotary: rotary(80), ..good }),
        ("strides", AppendConfig { strides: [256, 127, 128], ..good }),
        ("strides", AppendConfig { strides: [256, 132, 128], ..good }),
        ("tokens", AppendConfig { tokens: usize::MAX, ..good }),
        ("cache", AppendConfig { cache: paged(true, layout), ..good }),
        ("k", AppendConfig { cache: paged(false, PageLayout { head_stride: 0, ..layout }), ..good }),
        ("k", AppendConfig { cache: paged(false, PageLayout { head_stride: 56, ..layout }), ..good }),
    ];
    for (argument, config) in bad {
        match AppendPlan::new(config) {
            Err(Error::Argument { argument: found, .. }) => assert_eq!(found, argument),
            other => panic!("{argument}: {other:?}"),
        }
    }
}

//! Appending to a low-rank cache.

use attention::rope::{Rope, RopeConfig, RopeLayout};
use attention::testing::{Comparison, Inputs, Rng, Tolerance};
use attention::{Element, FaultCode, HeadShape};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use kv_compress::Error;
use kv_compress::cache::PageLayout;
use kv_compress::gpu::{Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, Queries, Vectors};

use crate::cache::ranks;

emulator::device_test!(
    equals_the_reference,
    bad_slots_and_positions_are_reported,
    one_token_gives_what_many_give
);

const POSITIONS: usize = 50;
const PAGES: usize = 5;

#[derive(Debug, Clone)]
struct Case {
    group: usize,
    head_dim: usize,
    ranks: Vec<(usize, usize)>,
    /// Layout and channels that rotate.
    rotary: Option<(RopeLayout, usize)>,
    page_size: usize,
    tokens: usize,
    with_queries: bool,
    keys: Vectors,
    values: Vectors,
    /// Whether new vectors are slices of one fused projection.
    fused: bool,
}

impl Case {
    fn new(
        group: usize,
        head_dim: usize,
        ranks: &[(usize, usize)],
        rotary: Option<(RopeLayout, usize)>,
    ) -> Self {
        Case {
            group,
            head_dim,
            ranks: ranks.to_vec(),
            rotary,
            page_size: 16,
            tokens: 9,
            with_queries: true,
            keys: Vectors::Full,
            values: Vectors::Full,
            fused: false,
        }
    }

    fn shape(&self) -> HeadShape {
        let kv_heads = self.ranks.len();
        HeadShape::new(self.group * kv_heads, kv_heads, self.head_dim, self.head_dim).expect("a valid shape")
    }

    fn layout(&self) -> PageLayout {
        PageLayout::new(&ranks(&self.shape(), &self.ranks), self.page_size).expect("a valid page size")
    }

    fn rope(&self) -> Option<Rope> {
        let (layout, rotary_dim) = self.rotary?;
        let config = RopeConfig { layout, rotary_dim, ..RopeConfig::new(self.head_dim, 10_000.0) };
        Some(Rope::new(config, POSITIONS).expect("a valid rotation"))
    }

    fn config(&self) -> AppendConfig {
        let rotary = self.rotary.map(|(layout, dim)| (layout, dim, POSITIONS));
        let mut config =
            AppendConfig::packed(self.shape(), self.layout(), PAGES, self.tokens, rotary, self.values);
        config.with_queries = self.with_queries;
        config.keys = self.keys;
        config.strides = config.widths();
        if self.fused {
            config.strides = [config.widths().iter().sum(); 3];
        }
        config
    }
}

struct Tokens {
    slots: Vec<i64>,
    positions: Vec<u32>,
}

fn tokens(case: &Case, seed: u64) -> Tokens {
    let mut random = Rng::new(seed);
    let mut slots: Vec<i64> = (0..(PAGES * case.page_size) as i64).collect();
    random.shuffle(&mut slots);
    slots.truncate(case.tokens);
    for skipped in slots.iter_mut().skip(2).step_by(5) {
        *skipped = -1;
    }
    Tokens { slots, positions: (0..case.tokens).map(|_| random.below(POSITIONS) as u32).collect() }
}

/// What an append reads, and the cache before it.
struct Memory<E> {
    /// New queries, keys and values `[tokens, width]` each.
    new: [Vec<E>; 3],
    /// R_q, R_k and R_v, head after head `[head_dim, r]`.
    project: [Vec<E>; 3],
    pages: Vec<E>,
}

fn memory<E: Element>(case: &Case, seed: u64) -> Memory<E> {
    let widths = case.config().widths();
    let [k, v] = [|r: &(usize, usize)| r.0, |r: &(usize, usize)| r.1]
        .map(|rank| case.ranks.iter().map(rank).sum::<usize>() * case.head_dim);
    let project = |elements: usize, seed| {
        let scale = (case.head_dim as f32).powf(-0.5);
        let values = Inputs::Normal.values(elements, 1, seed);
        values.into_iter().map(|x| E::from_f32(x * scale)).collect()
    };
    let new = |i: usize| Inputs::OutlierChannels.generate(case.tokens, widths[i], seed + i as u64);
    Memory {
        new: [new(0), new(1), new(2)],
        project: [project(k, seed + 3), project(k, seed + 4), project(v, seed + 5)],
        pages: Inputs::Normal.generate(PAGES * case.layout().page_elements(), 1, seed + 6),
    }
}

/// Queries `[tokens, Σ group · r_k]`, and elements of the pages that change, with their values; others stay as they are.
struct Expected {
    q: Vec<f64>,
    pages: Vec<Option<f64>>,
}

/// Rotates in f32, operation by operation, rounds, and projects in f64.
fn reference<E: Element>(case: &Case, tokens: &Tokens, memory: &Memory<E>) -> Expected {
    let (layout, rope, dim) = (case.layout(), case.rope(), case.head_dim);
    let widths = case.config().widths();
    let rotate = |vector: &[E], position: u32| -> Vec<f64> {
        let mut x: Vec<f32> = vector.iter().map(|x| x.to_f32()).collect();
        if let Some(rope) = &rope {
            rope.apply(&mut x, 1, &[position]).expect("a position of the table");
        }
        x.into_iter().map(|x| E::from_f32(x).to_f64()).collect()
    };
    let project = |x: &[f64], matrix: &[E], rank: usize| -> Vec<f64> {
        (0..rank).map(|c| (0..dim).map(|i| x[i] * matrix[i * rank + c].to_f64()).sum()).collect()
    };
    let plain = |x: &[E]| -> Vec<f64> { x.iter().map(|x| x.to_f64()).collect() };
    let k_sum: usize = case.ranks.iter().map(|(k, _)| k).sum();
    let mut expected = Expected { q: Vec::new(), pages: vec![None; memory.pages.len()] };
    for (token, (&slot, &position)) in tokens.slots.iter().zip(&tokens.positions).enumerate() {
        let [q, k, v] = [0, 1, 2].map(|i| &memory.new[i][token * widths[i]..][..widths[i]]);
        if slot < 0 {
            expected
                .q
                .extend(std::iter::repeat_n(0.0, if case.with_queries { case.group * k_sum } else { 0 }));
            continue;
        }
        let page = slot as usize / case.page_size * layout.page_elements();
        let (mut k_before, mut v_before) = (0, 0);
        for (head, &(r_k, r_v)) in case.ranks.iter().enumerate() {
            for g in 0..if case.with_queries { case.group } else { 0 } {
                let x = rotate(&q[(head * case.group + g) * dim..][..dim], position);
                expected.q.extend(project(&x, &memory.project[0][k_before * dim..], r_k));
            }
            let key = match case.keys {
                Vectors::Full => {
                    let x = rotate(&k[head * dim..][..dim], position);
                    project(&x, &memory.project[1][k_before * dim..], r_k)
                }
                Vectors::Reduced => plain(&k[k_before..][..r_k]),
            };
            let value = match case.values {
                Vectors::Full => {
                    project(&plain(&v[head * dim..][..dim]), &memory.project[2][v_before * dim..], r_v)
                }
                Vectors::Reduced => plain(&v[v_before..][..r_v]),
            };
            for (region, row) in [(layout.keys(head), key), (layout.values(head), value)] {
                for (i, x) in row.into_iter().enumerate() {
                    expected.pages[page + region.element(slot as usize % case.page_size, i)] = Some(x);
                }
            }
            k_before += r_k;
            v_before += r_v;
        }
    }
    expected
}

/// Projected queries, the pages, and what the status word says.
type Appended<E> = (Vec<E>, Vec<E>, Option<Fault>);

fn append<R: Rig, E: Storage + Element>(
    rig: &R,
    case: &Case,
    tokens: &Tokens,
    memory: &Memory<E>,
) -> Appended<E> {
    let config = case.config();
    let widths = config.widths();
    let plan = AppendPlan::new(config).expect("a valid plan");
    let kernel = Append::<_, E>::prepare(rig.device(), &plan)
        .unwrap_or_else(|error| panic!("{case:?} on {}: {error}", rig.name()));
    let k_sum: usize = case.ranks.iter().map(|(k, _)| k).sum();
    let mut q = rig.poisoned::<E>(case.tokens * case.group * k_sum);
    let mut pages = rig.upload(&memory.pages);
    let (slot, position) = (rig.upload(&tokens.slots), rig.upload(&tokens.positions));
    let rope = case.rope();
    let tables = rope.as_ref().map(|rope| (rig.upload(rope.cos()), rig.upload(rope.sin())));
    let mut status = rig.zeroed::<u64>(1);
    let fused: Vec<E> = (0..case.tokens)
        .flat_map(|t| (0..3).flat_map(move |i| memory.new[i][t * widths[i]..][..widths[i]].iter().copied()))
        .collect();
    let packed = [0, 1, 2].map(|i| rig.upload(if case.fused { &fused } else { &memory.new[i] }));
    let packed = [0, 1, 2].map(|i| rig.view(&packed[i]));
    let new = [0, 1, 2].map(|i| {
        let first = if case.fused { widths[..i].iter().sum() } else { 0 };
        packed[i].part(first..packed[i].len()).expect("a slice")
    });
    let project = [0, 1, 2].map(|i| rig.upload(&memory.project[i]));
    let project = [0, 1, 2].map(|i| rig.view(&project[i]));
    let (position, slot) = (rig.view(&position), rig.view(&slot));
    let tables = tables.as_ref().map(|(cos, sin)| (rig.view(cos), rig.view(sin)));
    let args = AppendArgs {
        queries: case.with_queries.then(|| Queries {
            q_new: &new[0],
            project: &project[0],
            q: rig.view_mut(&mut q),
        }),
        k_new: &new[1],
        v_new: &new[2],
        project_k: (case.keys == Vectors::Full).then_some(&project[1]),
        project_v: (case.values == Vectors::Full).then_some(&project[2]),
        tables: tables.as_ref().map(|(cos, sin)| AppendTables { cos, sin, position: &position }),
        slot: &slot,
        pages: rig.view_mut(&mut pages),
        status: rig.view_mut(&mut status),
    };
    kernel.run(rig.queue(), args).unwrap_or_else(|error| panic!("{case:?} on {}: {error}", rig.name()));
    let q = if case.with_queries { rig.download(&q) } else { Vec::new() };
    (q, rig.download(&pages), Fault::decode(rig.download(&status)[0]))
}

/// One rounding, and f32's error in sums of products of size about 10.
fn tolerance<E: Element>() -> Tolerance {
    Tolerance::new(3e-5, E::DTYPE.epsilon())
}

fn assert_appended<E: Element>(
    (q, pages, _): &Appended<E>,
    expected: &Expected,
    memory: &Memory<E>,
    name: &str,
) {
    Comparison::new(q, &expected.q, tolerance::<E>()).assert(format_args!("q of {name}"));
    let mut written = (Vec::new(), Vec::new());
    for (i, (after, expected)) in pages.iter().zip(&expected.pages).enumerate() {
        match expected {
            Some(x) => {
                written.0.push(*after);
                written.1.push(*x);
            }
            None => {
                let [before, after] = [memory.pages[i], *after].map(|x| x.to_f32().to_bits());
                assert_eq!(before, after, "element {i} of the pages belongs to no token of {name}");
            }
        }
    }
    Comparison::new(&written.0, &written.1, tolerance::<E>()).assert(format_args!("pages of {name}"));
}

fn check<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let (tokens, memory) = (tokens(case, seed), memory::<E>(case, seed));
    let expected = reference(case, &tokens, &memory);
    let appended = append(rig, case, &tokens, &memory);
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    assert_appended(&appended, &expected, &memory, &name);
    assert_eq!(appended.2, None, "{name}");
}

fn equals_the_reference<R: Rig>(rig: &R) {
    let half_split = |dim| Some((RopeLayout::HalfSplit, dim));
    let mixed = [(128, 16), (16, 128), (48, 80)];
    check::<R, f16>(rig, &Case::new(2, 64, &[(16, 64), (48, 32)], half_split(64)), 1);
    check::<R, f16>(rig, &Case { fused: true, ..Case::new(3, 64, &[(64, 16)], half_split(32)) }, 2);
    check::<R, bf16>(rig, &Case { tokens: 1, ..Case::new(4, 128, &mixed, half_split(128)) }, 3);
    // More rows than a block has, of queries and of tokens; and a value projection that is in the weights already.
    let values = Vectors::Reduced;
    check::<R, bf16>(
        rig,
        &Case { tokens: 70, page_size: 64, values, ..Case::new(5, 128, &mixed, half_split(112)) },
        4,
    );
    check::<R, f16>(
        rig,
        &Case { page_size: 32, ..Case::new(1, 128, &mixed, Some((RopeLayout::Interleaved, 128))) },
        5,
    );
    check::<R, f16>(
        rig,
        &Case { with_queries: false, ..Case::new(7, 128, &mixed, Some((RopeLayout::Interleaved, 64))) },
        6,
    );
    // Without RoPE, projected here or in the weights.
    check::<R, bf16>(rig, &Case::new(16, 96, &[(96, 32), (32, 96)], None), 7);
    check::<R, bf16>(
        rig,
        &Case {
            with_queries: false,
            keys: Vectors::Reduced,
            values,
            fused: true,
            ..Case::new(2, 96, &[(96, 32), (32, 96)], None)
        },
        8,
    );
    check::<R, f16>(rig, &Case { tokens: 0, ..Case::new(2, 64, &[(16, 64)], half_split(64)) }, 9);
}

fn bad_slots_and_positions_are_reported<R: Rig>(rig: &R) {
    let case =
        Case { tokens: 4, ..Case::new(2, 64, &[(16, 64), (48, 32)], Some((RopeLayout::HalfSplit, 64))) };
    let slots = |slots: [i64; 4]| Tokens { slots: slots.to_vec(), positions: vec![0, 1, 2, 49] };
    let past = (PAGES * case.page_size) as i64;
    let cases = [
        ("a slot past the cache", slots([3, 17, past, 63]), 2),
        ("a slot far past the cache", slots([3, i64::MAX, 0, 63]), 1),
        (
            "a position past the tables",
            Tokens { positions: vec![0, 1, 2, POSITIONS as u32], ..slots([3, 17, 0, 63]) },
            3,
        ),
    ];
    for (what, bad, index) in cases {
        let memory = memory::<f16>(&case, 9);
        let appended = append(rig, &case, &bad, &memory);
        let name = format!("{what} on {}", rig.name());
        let fault = Fault { code: FaultCode::BadIndex as u32, index: index as u32 };
        assert_eq!(appended.2, Some(fault), "{name}");
        // The bad token is skipped, the others are appended.
        let mut rest = bad;
        rest.slots[index] = -1;
        rest.positions[index] = 0;
        assert_appended(&appended, &reference(&case, &rest, &memory), &memory, &name);
    }
}

/// A prompt appended at once leaves the bits that decoding it token by token leaves.
fn one_token_gives_what_many_give<R: Rig>(rig: &R) {
    let case = Case::new(3, 64, &[(16, 64), (48, 32)], Some((RopeLayout::HalfSplit, 64)));
    let (all, mut memory) = (tokens(&case, 11), memory::<f16>(&case, 11));
    let (q, pages, _) = append(rig, &case, &all, &memory);
    let widths = case.config().widths();
    let one = Case { tokens: 1, ..case.clone() };
    let new = memory.new.clone();
    let mut q_one_by_one = Vec::new();
    for token in 0..case.tokens {
        memory.new = [0, 1, 2].map(|i| new[i][token * widths[i]..][..widths[i]].to_vec());
        let token = Tokens { slots: vec![all.slots[token]], positions: vec![all.positions[token]] };
        let appended = append(rig, &one, &token, &memory);
        q_one_by_one.extend(appended.0);
        memory.pages = appended.1;
    }
    assert!(q == q_one_by_one, "queries on {}", rig.name());
    assert!(pages == memory.pages, "pages on {}", rig.name());
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let case = Case::new(2, 64, &[(16, 64), (48, 32)], Some((RopeLayout::HalfSplit, 64)));
    let good = case.config();
    AppendPlan::new(good.clone()).expect("a valid plan");
    let rotary = |dim| Some((RopeLayout::HalfSplit, dim, POSITIONS));
    let values_of_another_size = HeadShape::new(4, 2, 64, 32).expect("a valid shape");
    let bad = [
        ("shape", AppendConfig { shape: values_of_another_size, ..good.clone() }),
        ("rotary", AppendConfig { rotary: rotary(0), ..good.clone() }),
        ("rotary", AppendConfig { rotary: rotary(40), ..good.clone() }),
        ("rotary", AppendConfig { rotary: rotary(80), ..good.clone() }),
        ("keys", AppendConfig { keys: Vectors::Reduced, with_queries: false, ..good.clone() }),
        ("keys", AppendConfig { keys: Vectors::Reduced, rotary: None, ..good.clone() }),
        ("strides", AppendConfig { strides: [256, 120, 128], ..good.clone() }),
        ("strides", AppendConfig { strides: [256, 132, 128], ..good.clone() }),
        ("tokens", AppendConfig { tokens: usize::MAX, ..good.clone() }),
        ("pages", AppendConfig { pages: usize::MAX, ..good.clone() }),
    ];
    for (argument, config) in bad {
        match AppendPlan::new(config) {
            Err(Error::Argument { argument: found, .. }) => assert_eq!(found, argument),
            other => panic!("{argument}: {other:?}"),
        }
    }
}

//! Prefill on codes, against the reference on the same codes.

mod exact;
mod product;

use std::ops::Range;

use attention::softmax_state::Raw;
use attention::testing::{Comparison, Inputs, Tolerance};
use attention::{AttentionSpec, Element, FaultCode, HeadsView, Mask, Score};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use homomorphic_quant::cache::Segment;
use homomorphic_quant::gpu::{
    Prefill, PrefillConfig, PrefillInputs, PrefillOutput, PrefillPlan, PrefillState,
};
use homomorphic_quant::reference::Prefill as Mode;
use homomorphic_quant::{Error, reference};

use crate::close::assert_close;
use crate::sequences::{Cached, DeviceTable, Shape, Side, Spoilt, Tokens, refuse_dims, saturate_queries};

emulator::device_test!(
    equals_the_reference,
    states_of_two_caches_make_one,
    saturated_codes_do_not_overflow,
    bad_sequences_are_reported_and_the_others_stay_right,
    nan_is_never_dropped,
    what_is_not_finite_in_the_cache_stays_with_those_that_load_it,
);

/// Sequences of (queries, cached tokens).
#[derive(Debug, Clone)]
struct Case {
    shape: Shape,
    sequences: Vec<(usize, usize)>,
    mask: Mask,
    soft_cap: Option<f32>,
    kinds: (Inputs, Inputs),
    mode: Mode,
}

impl Case {
    fn new(shape: Shape, sequences: &[(usize, usize)]) -> Self {
        Case {
            shape,
            sequences: sequences.to_vec(),
            mask: Mask::Causal,
            soft_cap: None,
            kinds: (Inputs::OutlierChannels, Inputs::Normal),
            mode: Mode::Codes,
        }
    }

    fn spec(&self) -> AttentionSpec {
        let score = Score::new((self.shape.dims.0 as f32).powf(-0.5)).expect("a finite scale");
        let score = self.soft_cap.map_or(score, |cap| score.with_soft_cap(cap).expect("a positive cap"));
        AttentionSpec { shape: self.shape.heads(), score, mask: self.mask }
    }

    fn queries(&self) -> usize {
        self.sequences.iter().map(|(queries, _)| queries).sum()
    }

    fn rows(&self) -> usize {
        self.queries() * self.shape.q_heads
    }

    /// First query of each sequence, then one past the last.
    fn cu_queries(&self) -> Vec<u32> {
        let mut begin = 0;
        let ends = self.sequences.iter().map(|(queries, _)| {
            begin += *queries as u32;
            begin
        });
        [0].into_iter().chain(ends.collect::<Vec<_>>()).collect()
    }

    fn lens(&self) -> Vec<u32> {
        self.sequences.iter().map(|(_, len)| *len as u32).collect()
    }

    fn config(&self, cached: &Cached) -> PrefillConfig {
        let spec = self.spec();
        PrefillConfig {
            mode: self.mode,
            pools: cached.pools(&self.shape),
            shape: spec.shape,
            score: spec.score,
            mask: spec.mask,
            batch: self.sequences.len(),
            max_queries: self.sequences.iter().map(|(queries, _)| *queries).max().unwrap_or(1).max(1),
            num_queries: self.queries(),
            max_kv_len: 4096,
        }
    }
}

/// Queries `[num_queries, q_heads, qk_dim]` and cached sequences of a case.
struct Inputs16<E> {
    q: Vec<E>,
    cached: Cached,
}

fn inputs<E: Element>(case: &Case, seed: u64) -> Inputs16<E> {
    inputs_with_room(case, 0, seed)
}

/// With room for `room` more tokens in each sequence.
fn inputs_with_room<E: Element>(case: &Case, room: usize, seed: u64) -> Inputs16<E> {
    let tokens: Vec<Tokens<E>> = (case.sequences.iter().zip(seed * 100..))
        .map(|(&(_, len), seed)| Tokens::new(&case.shape, len, case.kinds, seed))
        .collect();
    Inputs16 {
        q: Inputs::Normal.generate(case.rows(), case.shape.dims.0, seed + 7),
        cached: Cached::with_room(&case.shape, &tokens, room),
    }
}

fn widened<E: Element>(values: &[E]) -> Vec<f32> {
    values.iter().map(|x| x.to_f64() as f32).collect()
}

/// Outputs and LSEs of all rows.
type Rows = (Vec<f64>, Vec<f64>);

/// What the reference computes on the same codes.
fn expected<E: Element>(case: &Case, inputs: &Inputs16<E>) -> Rows {
    let (q_heads, (qk_dim, v_dim)) = (case.shape.q_heads, case.shape.dims);
    let q = widened(&inputs.q);
    let (mut out, mut lse) = (vec![f32::NAN; case.rows() * v_dim], vec![f32::NAN; case.rows()]);
    let mut row = 0;
    for (&(queries, _), sequence) in case.sequences.iter().zip(&inputs.cached.sequences) {
        let end = row + queries * q_heads;
        let q = HeadsView::nhd(&q[row * qk_dim..end * qk_dim], queries, q_heads, qk_dim).expect("queries");
        let (out, lse) = (&mut out[row * v_dim..end * v_dim], &mut lse[row..end]);
        reference::attend(&case.spec(), &inputs.cached.cache, sequence, q, None, out, lse)
            .expect("a valid case");
        row = end;
    }
    (out.into_iter().map(f64::from).collect(), lse.into_iter().map(f64::from).collect())
}

/// A raw softmax state: O `[rows, v_dim]`, (m, l) `[rows, 2]`.
#[derive(Debug, Clone, PartialEq)]
struct State {
    o: Vec<f32>,
    ml: Vec<f32>,
}

impl State {
    /// Outputs `[rows, dim]` and LSEs of a state of rows that all have seen something.
    fn output(&self, dim: usize) -> Rows {
        let l = |row: usize| f64::from(self.ml[2 * row + 1]);
        let out = |(i, o): (usize, &f32)| f64::from(*o) / l(i / dim);
        let lse = |row: usize| f64::from(self.ml[2 * row]) + l(row).ln();
        (self.o.iter().enumerate().map(out).collect(), (0..self.ml.len() / 2).map(lse).collect())
    }
}

/// What to do with a state.
enum Step<'a> {
    /// Start empty and write outputs.
    Whole,
    /// Continue it and write outputs.
    Finish(&'a State),
    /// Continue it, or start anew over it, and leave it.
    Keep(&'a State, bool),
}

/// What a launch leaves behind. Only one of outputs and state is given to it.
struct Prefilled<E> {
    out: Vec<E>,
    lse: Vec<f32>,
    state: State,
    fault: Option<Fault>,
}

fn prefill<R: Rig, E: Storage + Element>(
    rig: &R,
    case: &Case,
    inputs: &Inputs16<E>,
    cu_queries: &[u32],
    kv_len: &[u32],
    step: Step<'_>,
) -> Prefilled<E> {
    let fail = |error: Error| -> ! { panic!("{case:?} on {}: {error}", rig.name()) };
    let plan = PrefillPlan::new(case.config(&inputs.cached)).unwrap_or_else(|error| fail(error));
    let kernel = Prefill::<_, E>::prepare(rig.device(), &plan).unwrap_or_else(|error| fail(error));
    let (pages, sinks, open) = inputs.cached.upload::<R, E>(rig);
    let (q, cu_queries, kv_len) = (rig.upload(&inputs.q), rig.upload(cu_queries), rig.upload(kv_len));
    let table = DeviceTable::new(rig, &inputs.cached.table);
    let mut status = rig.zeroed::<u64>(1);
    let (rows, v_dim) = (case.rows(), case.shape.dims.1);
    let (mut out, mut lse) = (rig.poisoned::<E>(rows * v_dim), rig.poisoned::<f32>(rows));
    let empty = State { o: Vec::new(), ml: Vec::new() };
    let given = match step {
        Step::Whole => &empty,
        Step::Finish(state) | Step::Keep(state, _) => state,
    };
    let (mut o, mut ml) = (rig.upload(&given.o), rig.upload(&given.ml));
    table
        .with(rig, |places| {
            let inputs = PrefillInputs {
                q: &rig.view(&q),
                cu_queries: &rig.view(&cu_queries),
                kv_len: &rig.view(&kv_len),
                pages: &rig.view(&pages),
                sink_pool: &rig.view(&sinks),
                open_pool: &rig.view(&open),
                places,
                status: rig.view_mut(&mut status),
            };
            let state = PrefillState { o: rig.view_mut(&mut o), ml: rig.view_mut(&mut ml) };
            let output = PrefillOutput { out: rig.view_mut(&mut out), lse: rig.view_mut(&mut lse) };
            match step {
                Step::Whole => kernel.run(rig.queue(), inputs, output),
                Step::Finish(_) => kernel.finish(rig.queue(), inputs, state, output),
                Step::Keep(_, resume) => kernel.run_step(rig.queue(), inputs, state, resume),
            }
        })
        .unwrap_or_else(|error| fail(error));
    Prefilled {
        out: rig.download(&out),
        lse: rig.download(&lse),
        state: State { o: rig.download(&o), ml: rig.download(&ml) },
        fault: Fault::decode(rig.download(&status)[0]),
    }
}

fn check<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let inputs = inputs::<E>(case, seed);
    let (out, lse) = expected(case, &inputs);
    let found = prefill(rig, case, &inputs, &case.cu_queries(), &case.lens(), Step::Whole);
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    assert_eq!(found.fault, None, "{name}");
    assert_close((&found.out, &found.lse), (&out, &lse), case.shape.dims.1, &name);
}

fn equals_the_reference<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    // Every shipped width, partition and head size; chunks after a cached prefix, whole prompts, rows that fill no tile, more
    // queries than tokens, sequences without queries or without tokens.
    let two = |heads| Shape::new(heads, 128, (2, 2), 64);
    check::<R, bf16>(rig, &Case::new(two((8, 1)), &[(9, 200), (0, 70), (1, 68), (3, 3)]), 1);
    check::<R, bf16>(rig, &Case { mask: window(70, 4), ..Case::new(two((6, 2)), &[(30, 230), (20, 20)]) }, 2);
    let four = |heads| Shape::new(heads, 128, (4, 4), 64);
    check::<R, bf16>(rig, &Case::new(four((1, 1)), &[(65, 150), (5, 2), (4, 0)]), 3);
    check::<R, bf16>(rig, &Case { mask: window(33, 0), ..Case::new(four((5, 1)), &[(14, 333)]) }, 4);
    check::<R, bf16>(rig, &Case::new(Shape::new((7, 1), 128, (8, 8), 64), &[(10, 140), (2, 64)]), 5);
    let small = |heads| Shape::new(heads, 64, (2, 4), 32);
    check::<R, f16>(rig, &Case::new(small((4, 2)), &[(35, 35), (36, 36), (37, 100)]), 6);
    let capped = Case { soft_cap: Some(20.0), ..Case::new(Shape::new((3, 1), 96, (4, 2), 64), &[(25, 200)]) };
    check::<R, f16>(rig, &capped, 7);
    let no_sinks = Shape { sinks: 0, ..small((2, 1)) };
    check::<R, f16>(rig, &Case::new(no_sinks, &[(40, 64), (1, 31)]), 8);
    // Two warps to a row: long vectors, long blocks, and keys longer than values.
    let long = |heads| Shape::new(heads, 256, (4, 4), 64);
    check::<R, bf16>(
        rig,
        &Case { mask: window(90, 4), ..Case::new(long((2, 1)), &[(25, 150), (3, 68)]) },
        10,
    );
    check::<R, f16>(rig, &Case::new(Shape::new((3, 1), 128, (2, 2), 128), &[(18, 270), (2, 5)]), 11);
    let unequal = |heads| Shape { dims: (256, 128), ..Shape::new(heads, 256, (2, 2), 32) };
    check::<R, f16>(rig, &Case::new(unequal((4, 2)), &[(20, 90), (5, 36)]), 12);
    // Four warps to a row: both.
    let longest = Shape::new((3, 1), 256, (2, 2), 128);
    check::<R, f16>(rig, &Case { mask: window(90, 4), ..Case::new(longest, &[(9, 150), (2, 5)]) }, 13);
    for kinds in [
        (Inputs::Constant, Inputs::Constant),
        (Inputs::Saturated, Inputs::OutlierElements),
        (Inputs::OutlierElements, Inputs::OutlierChannels),
    ] {
        check::<R, f16>(rig, &Case { kinds, ..Case::new(small((4, 1)), &[(20, 170)]) }, 9);
    }
}

/// The states over two caches, one after the other, are those of the sequence that is cut in two; rows that see nothing of the second
/// keep their bits.
fn states_of_two_caches_make_one<R: Rig>(rig: &R) {
    states_make_one(rig, Shape::new((4, 1), 64, (2, 4), 32));
    states_make_one(rig, Shape { dims: (256, 128), ..Shape::new((4, 1), 256, (2, 2), 32) });
}

fn states_make_one<R: Rig>(rig: &R, shape: Shape) {
    let dim = shape.dims.1;
    let case = |len| Case { mode: Mode::Exact, ..Case::new(shape, &[(9, len), (30, len / 2)]) };
    let (first, second) = (case(101), Case { sequences: vec![(9, 70), (30, 0)], ..case(0) });
    let (a, b) = (inputs::<f16>(&first, 31), inputs::<f16>(&second, 32));
    let b = Inputs16 { q: a.q.clone(), cached: b.cached };
    // Whatever is there is no state to start from.
    let anything = State { o: vec![f32::NAN; first.rows() * dim], ml: vec![f32::NAN; first.rows() * 2] };
    let one = prefill(rig, &first, &a, &first.cu_queries(), &first.lens(), Step::Keep(&anything, false));
    let both = prefill(rig, &second, &b, &second.cu_queries(), &second.lens(), Step::Keep(&one.state, true));
    let none = prefill(rig, &second, &b, &second.cu_queries(), &[0, 0], Step::Keep(&both.state, true));
    let name = format!("two caches of {shape:?} on {}", rig.name());
    assert_eq!((one.fault, both.fault, none.fault), (None, None, None), "{name}");
    assert_eq!(none.state, both.state, "{name}: nothing was there to see");
    let split = 9 * 4;
    assert_eq!(one.state.o[split * dim..], both.state.o[split * dim..], "{name}: rows that saw nothing new");

    // Each cache on its own, merged on the CPU.
    let alone = |case, inputs| prefill(rig, case, inputs, &case.cu_queries(), &case.lens(), Step::Whole);
    let (first, second): (Prefilled<f16>, Prefilled<f16>) = (alone(&first, &a), alone(&second, &b));
    for row in 0..first.lse.len() {
        let raw = |found: &Prefilled<f16>| Raw {
            m: found.lse[row],
            l: if found.lse[row] == f32::NEG_INFINITY { 0.0 } else { 1.0 },
            o: widened(&found.out[row * dim..][..dim]),
        };
        let mut merged = raw(&first);
        merged.merge(&raw(&second)).expect("states of one width");
        let merged = merged.normalise();
        let (m, l) = (both.state.ml[2 * row], both.state.ml[2 * row + 1]);
        let lse = m + l.ln();
        assert!((lse - merged.lse).abs() < 1e-4, "{name}: lse of row {row}: {lse} and {}", merged.lse);
        let found: Vec<f32> = both.state.o[row * dim..][..dim].iter().map(|o| o / l).collect();
        let expected: Vec<f64> = merged.out.iter().map(|x| f64::from(*x)).collect();
        Comparison::new(&found, &expected, Tolerance::new(2e-3, 2e-3))
            .assert(format_args!("row {row} of {name}"));
    }
}

/// Keys, values and queries whose codes are all at one end, so that integer sums are as large as they get.
fn saturated_codes_do_not_overflow<R: Rig>(rig: &R) {
    for (bits, dim) in [((2, 2), 128), ((4, 4), 128), ((8, 8), 128), ((4, 4), 256)] {
        saturated::<R, bf16>(rig, Shape::new((2, 1), dim, bits, 64));
    }
    saturated::<R, f16>(rig, Shape::new((2, 1), 128, (2, 2), 128));
    saturated::<R, f16>(rig, Shape::new((2, 1), 256, (2, 2), 128));
}

fn saturated<R: Rig, E: Storage + Element>(rig: &R, shape: Shape) {
    let shape = Shape { sinks: 0, ..shape };
    let case = Case::new(shape, &[(1, shape.partition)]);
    let mut saturated = inputs::<E>(&case, 17);
    saturated.cached = Cached::new(&shape, &[Tokens::<E>::saturated(&shape)]);
    saturate_queries(&shape, &mut saturated.q);
    let (out, lse) = expected(&case, &saturated);
    let found = prefill(rig, &case, &saturated, &case.cu_queries(), &case.lens(), Step::Whole);
    let name = format!("{case:?} on {}", rig.name());
    assert_close((&found.out, &found.lse), (&out, &lse), shape.dims.1, &name);
    saturated.cached.assert_saturated(&shape, &saturated.q, &name);
}

/// A bad length, page, place or range is named; its sequence sees nothing or is not written, and no other changes.
fn bad_sequences_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    let case = Case::new(Shape::new((4, 2), 64, (2, 4), 32), &[(5, 70), (12, 170), (9, 40)]);
    let good = inputs::<f16>(&case, 34);
    let (out, lse) = expected(&case, &good);
    let row = |sequence: usize| case.cu_queries()[sequence] as usize * 4;
    type Spoil = fn(&mut Inputs16<f16>, &mut Vec<u32>);
    let cases: [(&str, FaultCode, Spoil); 5] = [
        ("too long", FaultCode::BadLength, |_, kv_len| kv_len[1] = 5000),
        ("longer than the table", FaultCode::BadLength, |_, kv_len| kv_len[1] = 4000),
        ("a page outside", FaultCode::BadPage, |inputs, _| {
            let max_pages = inputs.cached.table.max_pages;
            inputs.cached.table.block_table[max_pages + 2] = 1 << 20;
        }),
        ("sinks outside", FaultCode::BadIndex, |inputs, _| inputs.cached.table.sink_page[1] = 1 << 20),
        ("an open block outside", FaultCode::BadIndex, |inputs, _| {
            inputs.cached.table.open_page[1] = u32::MAX
        }),
    ];
    let assert_right = |found: &Prefilled<f16>, rows: Range<usize>, name: &String| {
        let values = rows.start * 64..rows.end * 64;
        assert_close(
            (&found.out[values.clone()], &found.lse[rows.clone()]),
            (&out[values], &lse[rows]),
            64,
            name,
        );
    };
    for (what, code, spoil) in cases {
        let mut inputs = inputs::<f16>(&case, 34);
        let mut kv_len = case.lens();
        spoil(&mut inputs, &mut kv_len);
        let found = prefill(rig, &case, &inputs, &case.cu_queries(), &kv_len, Step::Whole);
        let name = format!("{what} on {}", rig.name());
        assert_eq!(found.fault, Some(Fault { code: code as u32, index: 1 }), "{name}");
        assert!(found.out[row(1) * 64..row(2) * 64].iter().all(|x| x.to_f64() == 0.0), "{name}: outputs");
        assert!(found.lse[row(1)..row(2)].iter().all(|lse| *lse == f32::NEG_INFINITY), "{name}: lse");
        assert_right(&found, 0..row(1), &name);
        assert_right(&found, row(2)..case.rows(), &name);
    }

    // (what, first queries, sequences that are bad, queries that stay right). Rows of bad sequences are not written; the last
    // sequence's queries are its last tokens, however many there are.
    type Ranges = (&'static str, [u32; 4], Range<u32>, [Range<usize>; 2]);
    let ranges: [Ranges; 3] = [
        ("queries that descend, and begin before another's", [0, 5, 4, 26], 1..3, [0..5, 0..0]),
        ("past num_queries", [0, 5, 17, 27], 2..3, [0..5, 5..17]),
        ("more than the most", [0, 5, 18, 26], 1..2, [0..5, 18..26]),
    ];
    for (what, cu_queries, bad, right) in ranges {
        let found = prefill(rig, &case, &good, &cu_queries, &case.lens(), Step::Whole);
        let name = format!("{what} on {}", rig.name());
        let fault = found.fault.unwrap_or_else(|| panic!("{name}: no fault"));
        assert_eq!(fault.code, FaultCode::BadRange as u32, "{name}");
        assert!(bad.contains(&fault.index), "{name}: {fault:?}");
        for query in (0..case.queries()).filter(|query| !right.iter().any(|right| right.contains(query))) {
            let rows = query * 4..(query + 1) * 4;
            assert!(found.lse[rows].iter().all(|lse| lse.to_bits() == u32::MAX), "{name}: query {query}");
            let out = &found.out[query * 4 * 64..(query + 1) * 4 * 64];
            assert!(out.iter().all(|x| x.to_bits() == u16::MAX), "{name}: query {query}");
        }
        for queries in right.into_iter().filter(|right| !right.is_empty()) {
            assert_right(&found, queries.start * 4..queries.end * 4, &name);
        }
    }
}

/// A query of NaN gives NaN, in an output and in a state, and harms no other row.
fn nan_is_never_dropped<R: Rig>(rig: &R) {
    // One, two and four warps to a row.
    query_of_nan(rig, Shape::new((4, 2), 64, (2, 4), 32), 70);
    query_of_nan(rig, Shape { dims: (256, 128), ..Shape::new((4, 2), 256, (2, 2), 32) }, 70);
    query_of_nan(rig, Shape::new((4, 2), 256, (2, 2), 128), 140);
}

fn query_of_nan<R: Rig>(rig: &R, shape: Shape, len: usize) {
    let (case, dim) = (Case::new(shape, &[(3, len)]), shape.dims.1);
    let good = inputs::<f16>(&case, 35);
    let (out, lse) = expected(&case, &good);
    let mut spoilt = inputs::<f16>(&case, 35);
    spoilt.q[5] = f16::NAN; // of head 0
    let found = prefill(rig, &case, &spoilt, &case.cu_queries(), &case.lens(), Step::Whole);
    let name = format!("a query of NaN, {shape:?} on {}", rig.name());
    assert!(found.out[..dim].iter().all(|x| x.is_nan()), "{name}: {:?}", &found.out[..dim]);
    assert!(found.lse[0].is_nan(), "{name}: {}", found.lse[0]);
    assert_close((&found.out[dim..], &found.lse[1..]), (&out[dim..], &lse[1..]), dim, &name);
    let zeros = State { o: vec![0.0; case.rows() * dim], ml: vec![0.0; case.rows() * 2] };
    let state =
        prefill(rig, &case, &spoilt, &case.cu_queries(), &case.lens(), Step::Keep(&zeros, true)).state;
    let nan = state.ml[..2].iter().chain(&state.o[..dim]).all(|x| x.is_nan());
    assert!(nan, "{name}: {:?} and {:?}", &state.ml[..2], &state.o[..dim]);
}

/// A key or value that is not finite reaches the queries that see it, and may reach others of their tile, which loads it for all;
/// queries of other tiles, KV heads and sequences keep their bits.
fn what_is_not_finite_in_the_cache_stays_with_those_that_load_it<R: Rig>(rig: &R) {
    let mask = Mask::sliding_window(40, 0).expect("a window");
    let case = |shape, sequences: &[_]| Case { mask, ..Case::new(shape, sequences) };
    // (case, queries of a tile, tokens): of closed blocks that a part of a tile sees, that only the first tile loads, that none loads,
    // and one of the open block. 64, 32 and 16 rows make a tile of two query heads.
    let small = Shape::new((4, 2), 64, (2, 4), 32);
    not_finite(rig, &case(small, &[(64, 166), (9, 50)]), 32, &[99, 65, 13, 164]);
    let long = Shape { dims: (256, 128), ..Shape::new((4, 2), 256, (2, 2), 32) };
    not_finite(rig, &case(long, &[(32, 134), (9, 50)]), 16, &[65, 13, 132]);
    let longest = Shape::new((4, 2), 256, (2, 2), 128);
    not_finite(rig, &case(longest, &[(12, 303), (3, 50)]), 8, &[255, 20, 300]);
}

/// Spoils each of `tokens` of the first sequence, which is of `case` with a window without sinks.
fn not_finite<R: Rig>(rig: &R, case: &Case, tile: usize, tokens: &[usize]) {
    let mut inputs = inputs::<f16>(case, 36);
    let run = |inputs: &Inputs16<f16>| {
        let found = prefill(rig, case, inputs, &case.cu_queries(), &case.lens(), Step::Whole);
        assert_eq!(found.fault, None, "{case:?} on {}", rig.name());
        found
    };
    let good = run(&inputs);
    let ((queries, len), dim) = (case.sequences[0], case.shape.dims.1);
    let visible = |query: usize| -> Range<usize> {
        let ranges = case.mask.keys(query, queries, len);
        let first = ranges.iter().next().expect("a token").clone();
        assert_eq!(ranges.len(), first.len(), "one run");
        first
    };
    let overlap = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
    let v_channels = inputs.cached.cache.geometry().head(1).v_channels;
    // Queries of the KV head that are hit, that only may be since their tile loads the token, and that are neither.
    let mut met = [0; 3];
    for (&token, side) in tokens.iter().flat_map(|token| [(token, Side::K), (token, Side::V)]) {
        let value = if side == Side::K { f32::NAN } else { f32::INFINITY };
        let name = format!("{value} in {side:?} of token {token}, {case:?} on {}", rig.name());
        let segments = inputs.cached.cache.segments(&inputs.cached.sequences[0]);
        let segment = segments.iter().find(|segment| segment.tokens().contains(&token)).expect("a token");
        let closed = matches!(segment, Segment::Codes { .. });
        let block = segment.tokens();
        // A key spoils its channel's scale, and with it every token of a closed block.
        let seen = |query: usize| match side {
            Side::K if closed => overlap(&visible(query), &block),
            _ => visible(query).contains(&token),
        };
        // Every tile loads all tokens in 16 bits.
        let loaded = |query: usize| {
            let first = query / tile * tile;
            let last = (first + tile).min(queries) - 1;
            !closed || overlap(&(visible(first).start..visible(last).end), &block)
        };
        let channels = match side {
            Side::K => 0..dim,
            Side::V if closed => 40 / v_channels * v_channels..(40 / v_channels + 1) * v_channels,
            Side::V => 40..41,
        };
        let (sequence, kv_head) = (0, 1);
        inputs.cached.spoilt = Some(Spoilt { sequence, kv_head, token, side, channel: 40, value });
        let bad = run(&inputs);
        for row in 0..case.rows() {
            let (query, head) = (row / 4, row % 4);
            let near = query < queries && head >= 2;
            let (hit, may_be) = (near && seen(query), near && loaded(query));
            if near {
                met[if hit {
                    0
                } else if may_be {
                    1
                } else {
                    2
                }] += 1;
            }
            if side == Side::K && hit {
                assert!(bad.lse[row].is_nan(), "{name}: lse of query {query}, head {head}");
            } else {
                // Scores of what a query does not see are masked, whatever they are.
                assert_eq!(bad.lse[row], good.lse[row], "{name}: lse of query {query}, head {head}");
            }
            for c in 0..dim {
                let [bad, good] = [&bad, &good].map(|found| found.out[row * dim + c]);
                let place = || format!("{name}: query {query}, head {head}, channel {c}");
                if hit && channels.contains(&c) {
                    assert!(!bad.is_finite(), "{}: {bad}", place());
                } else if !(may_be && channels.contains(&c)) {
                    assert_eq!(bad, good, "{}", place());
                }
            }
        }
    }
    assert!(met.iter().all(|count| *count > 0), "{case:?}: {met:?}");
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let case = Case::new(Shape::new((4, 2), 64, (2, 4), 32), &[(3, 70)]);
    let cached = inputs::<f16>(&case, 1).cached;
    let good = case.config(&cached);
    PrefillPlan::new(good).expect("a valid plan");
    for (named, config) in [
        ("batch", PrefillConfig { batch: 0, ..good }),
        ("batch", PrefillConfig { batch: 40_000, ..good }),
        ("max_queries", PrefillConfig { max_queries: 0, ..good }),
        ("q_len", PrefillConfig { max_queries: 1 << 31, ..good }),
        ("num_queries", PrefillConfig { num_queries: 1 << 31, ..good }),
        ("max_kv_len", PrefillConfig { max_kv_len: i32::MAX as usize, ..good }),
        ("shape", PrefillConfig { shape: Shape::new((4, 1), 64, (2, 4), 32).heads(), ..good }),
        ("mask", PrefillConfig { mask: Mask::Full, ..good }),
        ("max_kv_len", PrefillConfig { batch: 30_000, max_kv_len: 1 << 22, ..good }),
    ] {
        match PrefillPlan::new(config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
    refuse_dims(&case.shape, |shape, pools| {
        PrefillPlan::new(PrefillConfig { pools, shape: shape.heads(), ..good }).map(drop)
    });
}

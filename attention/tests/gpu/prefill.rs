//! Flash prefill.

use attention::gpu::{
    CacheLayout, Prefill, PrefillConfig, PrefillInputs, PrefillKernel, PrefillOutput, PrefillPlan,
    PrefillState, PrefillTiles, PrefillTilesArgs,
};
use attention::testing::{Comparison, Inputs, Tolerance};
use attention::{
    AttentionSpec, Element, Error, HeadShape, HeadsView, Mask, PageLayout, RaggedView, Score, reference,
};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use longkv_attention as attention;

use crate::cache::{Cache, KeysValues};

emulator::device_test!(
    equals_the_oracle,
    warpgroup_products_equal_the_oracle,
    warpgroup_products_carry_a_state,
    warpgroup_products_are_deaf_to_hidden_keys,
    steps_over_chunks_of_keys_equal_one_prefill,
    bad_sequences_are_reported_and_the_others_stay_right,
    a_bad_page_of_one_head_harms_that_head_alone,
    keys_that_no_query_sees_hold_anything,
    every_query_is_written_once_whatever_cu_queries_say,
    page_order_does_not_matter,
    more_sequences_than_threads,
    rows_without_keys_keep_their_state,
    nan_survives_the_steps_that_follow,
);

#[derive(Debug, Clone)]
struct Case {
    q_heads: usize,
    kv_heads: usize,
    dims: (usize, usize),
    /// (queries, keys) of each sequence.
    sequences: Vec<(usize, usize)>,
    cache: Cache,
    mask: Mask,
    soft_cap: Option<f32>,
    inputs: Inputs,
    kernel: PrefillKernel,
}

impl Case {
    fn new(
        (q_heads, kv_heads): (usize, usize),
        dims: (usize, usize),
        sequences: &[(usize, usize)],
        cache: Cache,
        mask: Mask,
    ) -> Self {
        let sequences = sequences.to_vec();
        let (inputs, kernel) = (Inputs::Normal, PrefillKernel::MmaSync);
        Case { q_heads, kv_heads, dims, sequences, cache, mask, soft_cap: None, inputs, kernel }
    }

    fn spec(&self) -> AttentionSpec {
        let shape =
            HeadShape::new(self.q_heads, self.kv_heads, self.dims.0, self.dims.1).expect("a valid shape");
        let score = Score::new((self.dims.0 as f32).powf(-0.5)).expect("a finite scale");
        let score = self.soft_cap.map_or(score, |cap| score.with_soft_cap(cap).expect("a positive cap"));
        AttentionSpec { shape, score, mask: self.mask }
    }

    fn queries(&self) -> usize {
        self.sequences.iter().map(|(queries, _)| queries).sum()
    }

    fn kv_lens(&self) -> Vec<usize> {
        self.sequences.iter().map(|(_, keys)| *keys).collect()
    }

    fn cu_queries(&self) -> Vec<u32> {
        let mut cu_queries = vec![0];
        cu_queries.extend(self.sequences.iter().scan(0, |sum, (queries, _)| {
            *sum += *queries as u32;
            Some(*sum)
        }));
        cu_queries
    }
}

struct Tensors<E> {
    /// `[queries, q_heads, qk_dim]`.
    q: Vec<E>,
    kv: KeysValues<E>,
}

fn tensors<E: Element>(case: &Case, seed: u64) -> Tensors<E> {
    Tensors {
        q: case.inputs.generate(case.queries() * case.q_heads, case.dims.0, seed),
        kv: KeysValues::random(&case.kv_lens(), case.kv_heads, case.dims, case.cache, case.inputs, seed),
    }
}

fn oracle<E: Element>(case: &Case, tensors: &Tensors<E>) -> reference::Output {
    let cu_queries = case.cu_queries();
    let q = HeadsView::nhd(&tensors.q, case.queries(), case.q_heads, case.dims.0).expect("q");
    let q = RaggedView::new(q, &cu_queries).expect("ragged q");
    let kv = tensors.kv.packed();
    reference::prefill_parallel(&case.spec(), &q, &kv, reference::Probabilities::Rounded)
        .expect("a valid case")
}

fn plan(case: &Case, cache: CacheLayout, carry: bool) -> PrefillPlan {
    PrefillPlan::new(PrefillConfig {
        spec: case.spec(),
        batch: case.sequences.len(),
        num_queries: case.queries(),
        max_kv_len: 4096,
        cache,
        carry,
        kernel: case.kernel,
    })
    .expect("a valid plan")
}

/// What a prefill leaves behind.
struct Prefilled<E> {
    out: Vec<E>,
    lse: Vec<f32>,
    fault: Option<Fault>,
}

fn prefill<R: Rig, E: Storage>(
    rig: &R,
    case: &Case,
    tensors: &Tensors<E>,
    cu_queries: &[u32],
    kv_len: &[u32],
) -> Prefilled<E> {
    let plan = plan(case, tensors.kv.layout, false);
    let kernel = Prefill::<_, E>::prepare(rig.device(), &plan).expect("prepare");
    let rows = case.queries() * case.q_heads;
    let (q, k, v) =
        (rig.upload(&tensors.q), rig.upload(&tensors.kv.k_cache), rig.upload(&tensors.kv.v_cache));
    let (cu_queries, kv_len) = (rig.upload(cu_queries), rig.upload(kv_len));
    let contiguous = matches!(tensors.kv.layout, CacheLayout::Contiguous { .. });
    let block_table = (!contiguous).then(|| rig.upload(&tensors.kv.block_table));
    let kv_start = contiguous.then(|| rig.upload(&tensors.kv.kv_start));
    let (block_table, kv_start) =
        (block_table.as_ref().map(|x| rig.view(x)), kv_start.as_ref().map(|x| rig.view(x)));
    let mut status = rig.zeroed::<u64>(1);
    let mut out = rig.poisoned::<E>(rows * case.dims.1);
    let mut lse = rig.poisoned::<f32>(rows);
    let mut workspace = rig.workspace(plan.workspace());
    let args = PrefillTilesArgs {
        cu_queries: &rig.view(&cu_queries),
        kv_len: &rig.view(&kv_len),
        block_table: block_table.as_ref(),
        kv_start: kv_start.as_ref(),
        status: rig.view_mut(&mut status),
    };
    let fail = |error: Error| -> ! { panic!("{case:?} on {}: {error}", rig.name()) };
    let mut tiles = PrefillTiles::prepare(rig.device(), &plan)
        .and_then(|planner| planner.run(rig.queue(), args, rig.workspace_view(&mut workspace)))
        .unwrap_or_else(|error| fail(error));
    let inputs = PrefillInputs {
        q: &rig.view(&q),
        k: &rig.view(&k),
        v: &rig.view(&v),
        block_table: block_table.as_ref(),
    };
    let output = PrefillOutput { out: rig.view_mut(&mut out), lse: rig.view_mut(&mut lse) };
    kernel.run(rig.queue(), inputs, output, &mut tiles).unwrap_or_else(|error| fail(error));
    drop(tiles);
    assert!(rig.counters_are_zero(&mut workspace, plan.workspace()), "{case:?}: counters");
    let (out, lse) = (rig.download(&out), rig.download(&lse));
    Prefilled { out, lse, fault: Fault::decode(rig.download(&status)[0]) }
}

fn lens(case: &Case) -> Vec<u32> {
    case.sequences.iter().map(|(_, keys)| *keys as u32).collect()
}

fn check<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let tensors = tensors::<E>(case, seed);
    let expected = oracle(case, &tensors);
    let prefilled = prefill(rig, case, &tensors, &case.cu_queries(), &lens(case));
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(format_args!("out of {name}"));
    Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(format_args!("lse of {name}"));
    assert_eq!(prefilled.fault, None, "{name}");
}

fn equals_the_oracle<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    // Every mask, head size, head ratio and layout; chunks after a cached prefix, more queries than keys, empty sequences.
    let edges = [(0, 5), (1, 1), (3, 0), (64, 64), (65, 129)];
    check::<R, f16>(rig, &Case::new((2, 2), (64, 64), &edges, Cache::Contiguous, Mask::Causal), 1);
    check::<R, f16>(rig, &Case::new((3, 1), (64, 64), &[(50, 70)], Cache::Contiguous, Mask::Full), 2);
    check::<R, bf16>(
        rig,
        &Case::new((8, 2), (128, 128), &[(70, 70), (5, 200), (0, 0)], Cache::Nhd(16), Mask::Causal),
        3,
    );
    check::<R, bf16>(rig, &Case::new((5, 1), (128, 128), &[(30, 230)], Cache::Hnd(8), window(40, 0)), 4);
    check::<R, bf16>(rig, &Case::new((8, 1), (128, 128), &[(20, 300)], Cache::Nhd(64), window(33, 70)), 5);
    check::<R, bf16>(
        rig,
        &Case::new((16, 1), (128, 128), &[(30, 90), (10, 4)], Cache::Hnd(128), Mask::Prefix { prefix: 40 }),
        6,
    );
    check::<R, f16>(
        rig,
        &Case {
            inputs: Inputs::Saturated,
            ..Case::new((7, 1), (128, 128), &[(20, 80)], Cache::Contiguous, Mask::Causal)
        },
        7,
    );
    check::<R, f16>(rig, &Case::new((3, 1), (96, 96), &[(50, 90)], Cache::Hnd(16), Mask::Causal), 10);
    check::<R, bf16>(rig, &Case::new((4, 4), (192, 128), &[(66, 80)], Cache::Nhd(16), Mask::Causal), 8);
    check::<R, bf16>(
        rig,
        &Case {
            soft_cap: Some(30.0),
            inputs: Inputs::OutlierChannels,
            ..Case::new((2, 1), (256, 256), &[(40, 100)], Cache::Hnd(32), window(50, 4))
        },
        9,
    );
}

/// Whether the device has warpgroup products; says so where it has not.
fn has_wgmma<R: Rig>(rig: &R) -> bool {
    let arch = cuda::launch::Device::arch(rig.device());
    let has = cuda::table::ArchClass::Hopper.runs_on(arch);
    if !has {
        println!("SKIPPED warpgroup products: {arch} is not sm_90a");
    }
    has
}

fn wgmma(case: Case) -> Case {
    Case { kernel: PrefillKernel::Wgmma, ..case }
}

fn by_copies(case: &Case) -> Case {
    Case { kernel: PrefillKernel::WgmmaCopies, ..case.clone() }
}

/// The kernel of Hopper, on the same cases: tiles of keys of 128, so lengths on both sides of that. Contiguous caches come by
/// tensor maps, heads side by side or one after another, pages by cp.async.
fn warpgroup_products_equal_the_oracle<R: Rig>(rig: &R) {
    if !has_wgmma(rig) {
        return;
    }
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let edges = [(0, 5), (1, 1), (3, 0), (127, 128), (65, 129)];
    check::<R, f16>(rig, &wgmma(Case::new((2, 2), (64, 64), &edges, Cache::Contiguous, Mask::Causal)), 61);
    check::<R, f16>(rig, &wgmma(Case::new((3, 1), (64, 64), &[(50, 270)], Cache::Gaps, Mask::Full)), 62);
    let ragged = [(70, 70), (5, 390), (0, 0)];
    check::<R, bf16>(rig, &wgmma(Case::new((8, 2), (128, 128), &ragged, Cache::Nhd(16), Mask::Causal)), 63);
    check::<R, bf16>(
        rig,
        &wgmma(Case::new((5, 1), (128, 128), &[(30, 430)], Cache::Hnd(8), window(40, 0))),
        64,
    );
    check::<R, bf16>(
        rig,
        &wgmma(Case::new((2, 1), (128, 128), &[(20, 400)], Cache::PerHead(64), window(33, 70))),
        65,
    );
    let prefix = Mask::Prefix { prefix: 140 };
    check::<R, bf16>(
        rig,
        &wgmma(Case::new((4, 1), (128, 128), &[(30, 190), (10, 4)], Cache::Nhd(128), prefix)),
        66,
    );
    let saturated = Case::new((7, 1), (128, 128), &[(20, 280)], Cache::Contiguous, Mask::Causal);
    let saturated = wgmma(Case { inputs: Inputs::Saturated, ..saturated });
    check::<R, f16>(rig, &saturated, 67);
    check::<R, f16>(rig, &by_copies(&saturated), 67);
    let whole_tiles = Case::new((2, 2), (128, 128), &[(64, 256), (3, 128)], Cache::Gaps, window(100, 130));
    check::<R, f16>(rig, &wgmma(whole_tiles), 68);
    // Gemma 2 27B.
    let capped = Case::new((2, 1), (128, 128), &[(70, 210)], Cache::Nhd(16), Mask::Causal);
    let capped = Case { soft_cap: Some(50.0), inputs: Inputs::OutlierChannels, ..capped };
    check::<R, bf16>(rig, &wgmma(capped), 70);
    // Strides that no map can hold.
    let odd = Case::new((2, 2), (128, 128), &[(40, 150)], Cache::OddGaps, Mask::Causal);
    check::<R, f16>(rig, &wgmma(odd), 69);
}

/// Boxes bring in what lies beside a sequence and what its mask hides: NaN and infinity there change nothing.
fn warpgroup_products_are_deaf_to_hidden_keys<R: Rig>(rig: &R) {
    if !has_wgmma(rig) {
        return;
    }
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    // The keys of a sequence without queries are all hidden: before, between and behind the others.
    let neighbours = [(0, 70), (40, 150), (0, 200), (130, 130), (3, 20), (0, 9)];
    let cases = [
        Case::new((2, 1), (128, 128), &neighbours, Cache::Contiguous, Mask::Causal),
        Case::new((2, 2), (128, 128), &[(20, 300), (0, 90)], Cache::Gaps, window(33, 5)),
        Case::new((3, 1), (64, 64), &neighbours, Cache::Contiguous, window(90, 0)),
        Case::new((2, 2), (64, 64), &[(3, 150), (40, 41), (20, 600)], Cache::Gaps, window(33, 140)),
    ];
    for (seed, case) in cases.into_iter().enumerate() {
        forgetful::<R, f16>(rig, &wgmma(case), seed as u64 + 81);
    }
    let paged = Case::new((2, 2), (128, 128), &[(20, 300), (0, 90)], Cache::Nhd(16), window(33, 5));
    forgetful::<R, bf16>(rig, &wgmma(paged), 85);
}

/// What `Auto` is on a device: `prefill` before Hopper and for other sizes, boxes where maps hold the cache.
#[test]
fn the_kernel_follows_device_and_cache() {
    let emulator = emulator::emulator_or_skip!();
    let ampere = emulator::Emulator::with_arch(cuda::table::Arch::new(8, 0));
    let case = |cache| Case {
        kernel: PrefillKernel::Auto,
        ..Case::new((2, 2), (128, 128), &[(4, 9)], cache, Mask::Causal)
    };
    let capped = Case { soft_cap: Some(50.0), ..case(Cache::Nhd(16)) };
    let wide = Case { dims: (256, 256), ..capped.clone() };
    use PrefillKernel::{MmaSync, Wgmma, WgmmaCopies};
    let why_not = |case: &Case, expected: Option<&str>| {
        let plan = plan(case, tensors::<f16>(case, 1).kv.layout, false);
        match (plan.tensor_maps(), expected) {
            (Ok(()), None) => {}
            (Err(error), Some(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (found, _) => panic!("{case:?}: {found:?}"),
        }
    };
    why_not(&case(Cache::Contiguous), None);
    why_not(&case(Cache::Gaps), None);
    why_not(&case(Cache::OddGaps), Some("whole tokens apart"));
    why_not(&case(Cache::Nhd(16)), Some("pages"));
    why_not(&Case { soft_cap: Some(50.0), ..case(Cache::Contiguous) }, Some("no soft cap"));
    let kernel = |device: &emulator::Emulator, case: &Case| {
        let layout = tensors::<f16>(case, 1).kv.layout;
        Prefill::<_, f16>::prepare(device, &plan(case, layout, false)).expect("prepare").kernel()
    };
    assert_eq!(kernel(&emulator, &case(Cache::Contiguous)), Wgmma);
    assert_eq!(kernel(&emulator, &case(Cache::OddGaps)), WgmmaCopies);
    assert_eq!(kernel(&ampere, &case(Cache::Contiguous)), MmaSync);
    // Paged and soft-capped rows are bf16.
    let kernel = |device: &emulator::Emulator, case: &Case| {
        let layout = tensors::<bf16>(case, 1).kv.layout;
        Prefill::<_, bf16>::prepare(device, &plan(case, layout, false)).expect("prepare").kernel()
    };
    assert_eq!(kernel(&emulator, &case(Cache::Nhd(16))), WgmmaCopies);
    assert_eq!(kernel(&ampere, &case(Cache::Nhd(16))), MmaSync);
    // Gemma 2: 27B has heads of 128 channels, the smaller ones of 256.
    assert_eq!(kernel(&emulator, &capped), WgmmaCopies);
    assert_eq!(kernel(&emulator, &wide), MmaSync);
}

/// Steps over chunks of keys, as in a ring.
fn warpgroup_products_carry_a_state<R: Rig>(rig: &R) {
    if !has_wgmma(rig) {
        return;
    }
    let full = |keys: &'static [usize]| (keys, Mask::Full);
    let ragged =
        Case::new((2, 1), (128, 128), &[(70, 0), (5, 0), (0, 0), (90, 0)], Cache::Contiguous, Mask::Full);
    let ring: [(&[usize], Mask); 3] =
        [full(&[200, 0, 3, 64]), full(&[1, 7, 0, 129]), (&[70, 3, 5, 20], Mask::Causal)];
    carried::<R, bf16>(rig, &wgmma(ragged), &ring, 71);
}

/// One step: its sequences' queries, which are those of every step, with keys of its own.
struct Step<E> {
    case: Case,
    tensors: Tensors<E>,
}

/// Steps of equal queries with these (keys of each sequence, mask).
fn steps<E: Element>(case: &Case, chunks: &[(&[usize], Mask)], seed: u64) -> Vec<Step<E>> {
    let q = tensors::<E>(case, seed).q;
    let step = |(index, (keys, mask)): (usize, &(&[usize], Mask))| {
        let sequences = case.sequences.iter().zip(*keys).map(|((queries, _), keys)| (*queries, *keys));
        let case = Case { sequences: sequences.collect(), mask: *mask, ..case.clone() };
        let tensors = Tensors { q: q.clone(), ..tensors(&case, seed + 100 * (index as u64 + 1)) };
        Step { case, tensors }
    };
    chunks.iter().enumerate().map(step).collect()
}

/// The states (m, l, O) that steps leave, as they lie in memory: `[queries, q_heads, v_dim]` and `[queries, q_heads, 2]`.
#[derive(Debug, PartialEq)]
struct States {
    o: Vec<f32>,
    ml: Vec<f32>,
}

impl States {
    fn output(&self) -> (Vec<f64>, Vec<f64>) {
        let (rows, dim) = (self.ml.len() / 2, self.o.len() / (self.ml.len() / 2));
        let l = |row: usize| f64::from(self.ml[2 * row + 1]);
        let out = |i: usize| if l(i / dim) == 0.0 { 0.0 } else { f64::from(self.o[i]) / l(i / dim) };
        let lse = |row: usize| f64::from(self.ml[2 * row]) + l(row).ln();
        ((0..self.o.len()).map(out).collect(), (0..rows).map(lse).collect())
    }
}

fn run_steps<R: Rig, E: Storage + Element>(rig: &R, steps: &[Step<E>]) -> States {
    let rows = steps[0].case.queries() * steps[0].case.q_heads;
    // NaN: the first step starts anew over whatever is there.
    let (mut o, mut ml) = (rig.poisoned::<f32>(rows * steps[0].case.dims.1), rig.poisoned::<f32>(rows * 2));
    let mut status = rig.zeroed::<u64>(1);
    for (index, Step { case, tensors }) in steps.iter().enumerate() {
        let plan = plan(case, tensors.kv.layout, true);
        let kernel = Prefill::<_, E>::prepare(rig.device(), &plan).expect("prepare");
        let planner = PrefillTiles::prepare(rig.device(), &plan).expect("prepare the plan");
        let mut workspace = rig.workspace(plan.workspace());
        let (q, k, v) =
            (rig.upload(&tensors.q), rig.upload(&tensors.kv.k_cache), rig.upload(&tensors.kv.v_cache));
        let (cu_queries, kv_len) = (rig.upload(&case.cu_queries()), rig.upload(&lens(case)));
        let contiguous = matches!(case.cache, Cache::Contiguous);
        let kv_start = contiguous.then(|| rig.upload(&tensors.kv.kv_start));
        let table = (!contiguous).then(|| rig.upload(&tensors.kv.block_table));
        let (kv_start, table) = (kv_start.as_ref().map(|x| rig.view(x)), table.as_ref().map(|x| rig.view(x)));
        let args = PrefillTilesArgs {
            cu_queries: &rig.view(&cu_queries),
            kv_len: &rig.view(&kv_len),
            block_table: table.as_ref(),
            kv_start: kv_start.as_ref(),
            status: rig.view_mut(&mut status),
        };
        let mut tiles =
            planner.run(rig.queue(), args, rig.workspace_view(&mut workspace)).expect("plan the tiles");
        let inputs = PrefillInputs {
            q: &rig.view(&q),
            k: &rig.view(&k),
            v: &rig.view(&v),
            block_table: table.as_ref(),
        };
        let state = PrefillState { o: rig.view_mut(&mut o), ml: rig.view_mut(&mut ml), resume: index > 0 };
        kernel
            .run_step(rig.queue(), inputs, state, &mut tiles)
            .unwrap_or_else(|error| panic!("{case:?}, step {index} on {}: {error}", rig.name()));
    }
    assert_eq!(Fault::decode(rig.download(&status)[0]), None, "{:?} on {}", steps[0].case, rig.name());
    States { o: rig.download(&o), ml: rig.download(&ml) }
}

/// The oracle of several steps: that of each, merged by LSE.
fn oracle_of_steps<E: Element>(steps: &[Step<E>]) -> (Vec<f64>, Vec<f64>) {
    let parts: Vec<reference::Output> = steps.iter().map(|step| oracle(&step.case, &step.tensors)).collect();
    let dim = steps[0].case.dims.1;
    let lse: Vec<f64> = (0..parts[0].lse.len())
        .map(|row| parts.iter().map(|part| part.lse[row]).fold(f64::NEG_INFINITY, log_add))
        .collect();
    let weight = |part: &reference::Output, row: usize| {
        if part.lse[row] == f64::NEG_INFINITY { 0.0 } else { (part.lse[row] - lse[row]).exp() }
    };
    let out = |i: usize| parts.iter().map(|part| weight(part, i / dim) * part.out[i]).sum();
    ((0..parts[0].out.len()).map(out).collect(), lse)
}

fn log_add(a: f64, b: f64) -> f64 {
    let (low, high) = (a.min(b), a.max(b));
    if high == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// A ring step sees a chunk of the keys; the state that steps carry is that of all of them. The last chunk lies on the
/// diagonal, where some queries of a tile see keys and others none.
fn steps_over_chunks_of_keys_equal_one_prefill<R: Rig>(rig: &R) {
    let wide = Case::new((4, 2), (128, 128), &[(70, 0)], Cache::Contiguous, Mask::Full);
    let full = |keys: &'static [usize]| (keys, Mask::Full);
    let causal = |keys: &'static [usize]| (keys, Mask::Causal);
    carried::<R, bf16>(rig, &wide, &[full(&[64]), full(&[0]), full(&[37]), full(&[69])], 11);
    let ragged =
        Case::new((2, 1), (128, 128), &[(70, 0), (5, 0), (0, 0), (90, 0)], Cache::Contiguous, Mask::Full);
    let ring = [full(&[100, 0, 3, 64]), full(&[1, 7, 0, 65]), causal(&[70, 3, 5, 20])];
    carried::<R, bf16>(rig, &ragged, &ring, 12);
    let paged = Case::new((2, 2), (64, 64), &[(33, 0), (40, 0)], Cache::Nhd(16), Mask::Full);
    carried::<R, bf16>(rig, &paged, &[causal(&[10, 40]), full(&[32, 1]), full(&[64, 0])], 13);
}

fn carried<R: Rig, E: Storage + Element>(rig: &R, case: &Case, chunks: &[(&[usize], Mask)], seed: u64) {
    let steps = steps::<E>(case, chunks, seed);
    let (expected_out, expected_lse) = oracle_of_steps(&steps);
    let (out, lse) = run_steps(rig, &steps).output();
    let name = format!("{case:?} in steps {chunks:?} with seed {seed} on {}", rig.name());
    Comparison::attention_f64(&out, &expected_out, case.dims.1, Tolerance::tensor_core::<E>())
        .assert(format_args!("out of {name}"));
    Comparison::of_f64(&lse, &expected_lse, Tolerance::LSE).assert(format_args!("lse of {name}"));
}

/// A query of NaN has no maximum; the next step must not take its state for an empty one.
fn nan_survives_the_steps_that_follow<R: Rig>(rig: &R) {
    let case = Case::new((2, 2), (64, 64), &[(5, 0)], Cache::Nhd(16), Mask::Full);
    let mut steps = steps::<bf16>(&case, &[(&[32], Mask::Full), (&[64], Mask::Full)], 13);
    // Of query 0, head 0. The second step sees an ordinary query, so that only the state can bring the NaN.
    steps[0].tensors.q[3] = bf16::NAN;
    let (out, lse) = run_steps(rig, &steps).output();
    assert!(out[..64].iter().all(|x| x.is_nan()) && lse[0].is_nan(), "on {}: {:?}", rig.name(), &out[..4]);
    assert!(out[64..].iter().chain(&lse[1..]).all(|x| x.is_finite()), "on {}", rig.name());
}

/// What is wrong, the input, the lengths given to the kernel, and code and sequence of the report.
type BadCase<'a> = (&'a str, &'a Tensors<bf16>, [u32; 3], (u32, u32));

fn bad_sequences_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (128, 128), &[(20, 40), (10, 50), (5, 60)], Cache::Nhd(16), Mask::Causal);
    let good = tensors::<bf16>(&case, 31);
    let CacheLayout::Paged { max_pages, pages, .. } = good.kv.layout else { panic!("not paged") };
    let mut bad_page = tensors::<bf16>(&case, 31);
    bad_page.kv.block_table[max_pages + 2] = pages as u32;
    let cases: [BadCase<'_>; 3] = [
        ("longer than its pages", &good, [40, 16 * max_pages as u32 + 1, 60], (1, 1)),
        ("longer than the plan allows", &good, [40, 50, u32::MAX], (1, 2)),
        ("a page outside the pool", &bad_page, [40, 50, 60], (2, 1)),
    ];
    for (what, tensors, kv_len, (code, index)) in cases {
        let prefilled = prefill(rig, &case, tensors, &case.cu_queries(), &kv_len);
        let name = format!("{what} on {}", rig.name());
        assert_eq!(prefilled.fault, Some(Fault { code, index }), "{name}");
        let mut expected = oracle(&case, tensors);
        let cu_queries = case.cu_queries();
        let bad = cu_queries[index as usize] as usize..cu_queries[index as usize + 1] as usize;
        let (heads, row) = (case.q_heads, case.q_heads * case.dims.1);
        expected.out[bad.start * row..bad.end * row].fill(0.0);
        expected.lse[bad.start * heads..bad.end * heads].fill(f64::NEG_INFINITY);
        Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(&name);
        Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(&name);
    }
}

fn a_bad_page_of_one_head_harms_that_head_alone<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (128, 128), &[(6, 40), (9, 150)], Cache::PerHead(16), Mask::Causal);
    let mut tensors = tensors::<bf16>(&case, 32);
    let CacheLayout::Paged { max_pages, pages, .. } = tensors.kv.layout else { panic!("not paged") };
    // Table row of head 1 and sequence 1.
    tensors.kv.block_table[3 * max_pages + 4] = pages as u32;
    let prefilled = prefill(rig, &case, &tensors, &case.cu_queries(), &lens(&case));
    assert_eq!(prefilled.fault, Some(Fault { code: 2, index: 1 }), "on {}", rig.name());
    let mut expected = oracle(&case, &tensors);
    for row in (6 * 4..15 * 4).filter(|row| row % 4 >= 2) {
        expected.out[row * 128..][..128].fill(0.0);
        expected.lse[row] = f64::NEG_INFINITY;
    }
    Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(rig.name());
    Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(rig.name());
}

/// Before every window, past the length and in unused pages there may be NaN and infinity, and no page at all.
fn keys_that_no_query_sees_hold_anything<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let sequences = [(3, 150), (40, 41), (20, 200)];
    let cases = [
        Case::new((4, 2), (128, 128), &sequences, Cache::Nhd(16), window(37, 0)),
        Case::new((2, 2), (128, 128), &sequences, Cache::PerHead(8), window(20, 9)),
        Case::new((2, 1), (96, 96), &sequences, Cache::Hnd(32), window(70, 40)),
        Case::new((3, 1), (64, 64), &sequences, Cache::Gaps, window(33, 70)),
    ];
    for (seed, case) in cases.iter().enumerate() {
        if case.dims.0 == 128 {
            forgetful::<R, bf16>(rig, case, seed as u64 + 51);
        } else {
            forgetful::<R, f16>(rig, case, seed as u64 + 51);
        }
    }
}

fn forgetful<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let mut tensors = tensors::<E>(case, seed);
    let expected = oracle(case, &tensors);
    let hidden = tensors.kv.forget_hidden(case.mask, |sequence| case.sequences[sequence].0);
    assert!(hidden > 0, "{case:?} hides nothing");
    let prefilled = prefill(rig, case, &tensors, &case.cu_queries(), &lens(case));
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(&name);
    Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(&name);
    assert_eq!(prefilled.fault, None, "{name}");
}

fn page_order_does_not_matter<R: Rig>(rig: &R) {
    let case = Case::new((2, 1), (128, 128), &[(20, 100), (70, 90)], Cache::Nhd(16), Mask::Causal);
    let straight = tensors::<bf16>(&case, 5);
    let mut reversed = tensors::<bf16>(&case, 5);
    reversed.kv = reversed.kv.reverse_pages();
    let [straight, reversed] =
        [straight, reversed].map(|tensors| prefill(rig, &case, &tensors, &case.cu_queries(), &lens(&case)));
    assert_eq!(straight.lse, reversed.lse, "on {}", rig.name());
    assert_eq!(straight.out, reversed.out, "on {}", rig.name());
}

/// More sequences than the plan has threads, of few and many tiles each.
fn more_sequences_than_threads<R: Rig>(rig: &R) {
    let sequences: Vec<(usize, usize)> = (0..300)
        .map(|i| match i {
            17 => (130, 130),
            200 => (70, 260),
            _ => (usize::from(i % 16 == 0), i % 5),
        })
        .collect();
    check::<R, f16>(rig, &Case::new((2, 1), (64, 64), &sequences, Cache::Contiguous, Mask::Causal), 41);
}

/// A step that shows a row no key leaves its state bit for bit: on the diagonal some rows of a tile, and every row where the
/// chunk is empty.
fn rows_without_keys_keep_their_state<R: Rig>(rig: &R) {
    let case = Case::new((2, 2), (64, 64), &[(40, 0), (9, 0)], Cache::Nhd(16), Mask::Full);
    let mut steps = steps::<bf16>(&case, &[(&[50, 20], Mask::Full), (&[10, 0], Mask::Causal)], 14);
    let both = run_steps(rig, &steps);
    steps.truncate(1);
    let first = run_steps(rig, &steps);
    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    for row in 0..49 * 2 {
        let same = [(&both.o, &first.o, 64), (&both.ml, &first.ml, 2)].iter().all(|(both, first, width)| {
            bits(&both[row * width..][..*width]) == bits(&first[row * width..][..*width])
        });
        let sees = (30..40).contains(&(row / 2));
        assert_eq!(same, !sees, "query {}, head {} on {}", row / 2, row % 2, rig.name());
    }
}

/// Sequences whose queries make no sense are refused, wherever they are, and queries of no sequence see nothing.
fn every_query_is_written_once_whatever_cu_queries_say<R: Rig>(rig: &R) {
    let case = Case::new((2, 2), (64, 64), &[(2, 4); 10], Cache::Contiguous, Mask::Causal);
    let tensors = tensors::<f16>(&case, 33);
    let expected = oracle(&case, &tensors);
    let straight = case.cu_queries();
    let changed = |changes: &[(usize, u32)]| {
        let mut cu_queries = straight.clone();
        changes.iter().for_each(|(index, value)| cu_queries[*index] = *value);
        cu_queries
    };
    // cu_queries, the sequences that are refused or lost, the sequences that may be reported.
    let cases = [
        ("the last sequence ends past the queries", changed(&[(10, 21)]), 9..10, Some(9..10)),
        ("queries behind the last sequence", changed(&[(9, 16), (10, 16)]), 8..10, None),
        ("queries before the first sequence", changed(&[(0, 2), (1, 2)]), 0..1, None),
        // Sequence 7 descends, and 8 begins among the queries of an earlier one, which keep their only writer.
        ("a sequence descends", changed(&[(8, 13)]), 7..9, Some(7..9)),
        ("no sequence at all", vec![20; 11], 0..10, None),
        ("far out of range", changed(&[(5, u32::MAX)]), 4..6, Some(4..6)),
    ];
    for (what, cu_queries, lost, reported) in cases {
        let prefilled = prefill(rig, &case, &tensors, &cu_queries, &lens(&case));
        let name = format!("{what} on {}", rig.name());
        match (prefilled.fault, reported) {
            (None, None) => {}
            (Some(Fault { code, index }), Some(reported)) => {
                assert_eq!(code, attention::FaultCode::BadRange as u32, "{name}");
                assert!(reported.contains(&index), "{name}: {index}");
            }
            (fault, _) => panic!("{name}: {fault:?}"),
        }
        // Two queries and two heads a sequence.
        let rows = lost.start * 4..lost.end * 4;
        let mut expected = expected.clone();
        expected.out[rows.start * 64..rows.end * 64].fill(0.0);
        expected.lse[rows].fill(f64::NEG_INFINITY);
        Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(&name);
        Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(&name);
    }
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let case = Case::new((4, 2), (128, 128), &[(20, 40)], Cache::Nhd(16), Mask::Causal);
    let layout = PageLayout::nhd(16, 2, 128);
    let cache = |page_size, pages, head_stride| CacheLayout::Paged {
        page_size,
        pages,
        max_pages: 4,
        per_head: false,
        k: layout,
        v: PageLayout { head_stride, ..layout },
    };
    let good = PrefillConfig {
        spec: case.spec(),
        batch: 1,
        num_queries: 20,
        max_kv_len: 64,
        cache: cache(16, 8, 128),
        carry: false,
        kernel: PrefillKernel::MmaSync,
    };
    PrefillPlan::new(good).expect("a valid plan");
    let bad = [
        ("batch", PrefillConfig { batch: 0, ..good }),
        (
            "mask",
            PrefillConfig {
                spec: AttentionSpec { mask: Mask::SlidingWindow { window: 0, sinks: 1 }, ..good.spec },
                ..good
            },
        ),
        ("num_queries", PrefillConfig { num_queries: usize::MAX, ..good }),
        ("max_kv_len", PrefillConfig { max_kv_len: usize::MAX, ..good }),
        ("page_size", PrefillConfig { cache: cache(12, 8, 128), ..good }),
        ("pages", PrefillConfig { cache: cache(16, 0, 128), ..good }),
        ("v", PrefillConfig { cache: cache(16, 8, 127), ..good }),
    ];
    for (argument, config) in bad {
        match PrefillPlan::new(config) {
            Err(Error::Argument { argument: found, .. }) => assert_eq!(found, argument),
            other => panic!("{argument}: {other:?}"),
        }
    }
    let odd = HeadShape::new(2, 1, 80, 64).expect("a valid shape");
    let contiguous = |dim| PageLayout { page_stride: 0, token_stride: dim, head_stride: dim };
    let tokens = CacheLayout::Contiguous { tokens: 64, k: contiguous(80), v: contiguous(64) };
    let spec = AttentionSpec { shape: odd, ..good.spec };
    match PrefillPlan::new(PrefillConfig { spec, cache: tokens, ..good }) {
        Err(Error::Cuda(error)) => assert!(error.to_string().contains("QK_DIM"), "{error}"),
        other => panic!("{other:?}"),
    }
}

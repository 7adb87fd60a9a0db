//! Chunks of prompts: an append and a prefill recorded once, replayed as tokens, slots and lengths in device memory change.

use std::cell::RefCell;

use attention::gpu::{
    Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, CacheLayout, Prefill, PrefillConfig,
    PrefillInputs, PrefillKernel, PrefillOutput, PrefillPlan, PrefillTiles, PrefillTilesArgs,
};
use attention::rope::{Rope, RopeConfig, RopeLayout};
use attention::testing::{Comparison, Inputs, Tolerance};
use attention::{
    AttentionSpec, HeadShape, HeadsView, Mask, PageLayout, RaggedKv, RaggedView, Score, reference,
};
use cuda::status::Fault;
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip};
use half::bf16;
use longkv_attention as attention;

use crate::prefill::has_wgmma;

const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 128;
const PAGE: usize = 16;
/// Pages of a sequence.
const MAX_PAGES: usize = 5;
/// Tokens of a chunk, over both sequences.
const CHUNK: usize = 70;

/// New tokens of the two sequences, chunk by chunk: one prompt alone, both, decoding beside a prompt, nothing, one token each.
const CHUNKS: [[usize; 2]; 6] = [[40, 0], [9, 61], [1, 5], [0, 0], [1, 1], [13, 0]];

#[test]
fn emulator() {
    emulator::emulator_or_skip!();
    for order in Order::ALL {
        chunks_change_between_replays(&EmulatorRig::new(order), Where::Pages);
        chunks_change_between_replays(&EmulatorRig::new(order), Where::Maps);
    }
}

#[test]
fn gpu() {
    if let Some(rig) = gpu_or_skip("chunk_replay") {
        let rig = rig.on_own_stream().expect("a stream of its own");
        chunks_change_between_replays(&rig, Where::Pages);
        if has_wgmma(&rig) {
            chunks_change_between_replays(&rig, Where::Maps);
        }
    }
}

/// Where K and V lie, and how the prefill loads them.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Where {
    /// In pages, loaded by cp.async.
    Pages,
    /// One run of tokens per sequence, loaded by tensor maps, which the recorded launch keeps.
    Maps,
}

impl Where {
    fn cache(self) -> CacheLayout {
        let (pages, layout) = (2 * MAX_PAGES, PageLayout::nhd(PAGE, KV_HEADS, DIM));
        match self {
            Where::Pages => CacheLayout::Paged {
                page_size: PAGE,
                pages,
                max_pages: MAX_PAGES,
                per_head: false,
                k: layout,
                v: layout,
            },
            Where::Maps => CacheLayout::Contiguous { tokens: pages * PAGE, k: layout, v: layout },
        }
    }

    /// Place of a token in the cache.
    fn slot(self, sequence: usize, token: usize) -> usize {
        match self {
            Where::Pages => page(sequence, token / PAGE) * PAGE + token % PAGE,
            Where::Maps => START[sequence] + token,
        }
    }

    fn kernel(self) -> PrefillKernel {
        match self {
            Where::Pages => PrefillKernel::MmaSync,
            Where::Maps => PrefillKernel::Wgmma,
        }
    }
}

/// A sequence as the host knows it.
#[derive(Default)]
struct Sequence {
    /// `[tokens, KV_HEADS, DIM]`.
    k: Vec<bf16>,
    v: Vec<bf16>,
    len: usize,
}

/// What a chunk writes to device memory.
struct Chunk {
    /// Before the rotation, and after it for the oracle.
    q: [Vec<bf16>; 2],
    k: Vec<bf16>,
    v: Vec<bf16>,
    position: Vec<u32>,
    /// −1 for places of the chunk that have no token.
    slot: Vec<i64>,
    cu_queries: [u32; 3],
    kv_len: [u32; 2],
}

fn spec() -> AttentionSpec {
    AttentionSpec {
        shape: HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape"),
        score: Score::new((DIM as f32).powf(-0.5)).expect("a finite scale"),
        mask: Mask::Causal,
    }
}

/// First tokens of the two sequences, where there are no pages.
const START: [usize; 2] = [MAX_PAGES * PAGE, 0];

/// Pages of the two sequences, interleaved and in falling order.
fn page(sequence: usize, index: usize) -> usize {
    2 * MAX_PAGES - 1 - (2 * index + sequence)
}

fn rope() -> Rope {
    let config = RopeConfig { layout: RopeLayout::HalfSplit, ..RopeConfig::new(DIM, 10_000.0) };
    Rope::new(config, MAX_PAGES * PAGE).expect("a valid rotation")
}

/// Rotates vectors `[CHUNK, heads, DIM]`.
fn rotated(vectors: &[bf16], heads: usize, position: &[u32]) -> Vec<bf16> {
    let mut x: Vec<f32> = vectors.iter().map(|x| x.to_f32()).collect();
    rope().apply(&mut x, heads, position).expect("positions of the table");
    x.into_iter().map(bf16::from_f32).collect()
}

fn chunk(place: Where, new: [usize; 2], sequences: &mut [Sequence; 2], seed: u64) -> Chunk {
    let vectors = |heads: usize, seed| Inputs::Normal.generate::<bf16>(CHUNK * heads, DIM, seed);
    let (q, k, v) = (vectors(Q_HEADS, seed), vectors(KV_HEADS, seed + 1), vectors(KV_HEADS, seed + 2));
    let (mut slot, mut position) = (vec![-1; CHUNK], vec![0; CHUNK]);
    let mut first = 0;
    for (sequence, &count) in sequences.iter().zip(&new) {
        (0..count).for_each(|token| position[first + token] = (sequence.len + token) as u32);
        first += count;
    }
    let turned = rotated(&k, KV_HEADS, &position);
    first = 0;
    for (number, (sequence, &count)) in sequences.iter_mut().zip(&new).enumerate() {
        for slot in &mut slot[first..first + count] {
            *slot = place.slot(number, sequence.len) as i64;
            sequence.len += 1;
        }
        let vectors = first * KV_HEADS * DIM..(first + count) * KV_HEADS * DIM;
        sequence.k.extend(&turned[vectors.clone()]);
        sequence.v.extend(&v[vectors]);
        first += count;
    }
    let cu_queries = [0, new[0] as u32, (new[0] + new[1]) as u32];
    let kv_len = [0, 1].map(|number: usize| sequences[number].len as u32);
    Chunk { q: [q.clone(), rotated(&q, Q_HEADS, &position)], k, v, position, slot, cu_queries, kv_len }
}

/// Outputs `[CHUNK, Q_HEADS, DIM]` and LSEs `[CHUNK, Q_HEADS]`: 0 and −∞ for places without a token.
fn oracle(chunk: &Chunk, sequences: &[Sequence; 2]) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (sequence, bounds) in sequences.iter().zip(chunk.cu_queries.windows(2)) {
        let [first, end] = [bounds[0] as usize, bounds[1] as usize];
        let q = HeadsView::nhd(
            &chunk.q[1][first * Q_HEADS * DIM..][..(end - first) * Q_HEADS * DIM],
            end - first,
            Q_HEADS,
            DIM,
        );
        let heads = |x| HeadsView::nhd(x, sequence.len, KV_HEADS, DIM).expect("keys and values");
        let kv = RaggedKv::single(heads(&sequence.k), heads(&sequence.v)).expect("keys and values");
        let q = RaggedView::single(q.expect("queries")).expect("one sequence");
        let expected = reference::prefill_parallel(&spec(), &q, &kv, reference::Probabilities::Rounded)
            .expect("a valid case");
        out.extend(expected.out);
        lse.extend(expected.lse);
    }
    out.resize(CHUNK * Q_HEADS * DIM, 0.0);
    lse.resize(CHUNK * Q_HEADS, f64::NEG_INFINITY);
    (out, lse)
}

fn chunks_change_between_replays<R: Rig>(rig: &R, place: Where) {
    let (pages, rope) = (2 * MAX_PAGES, rope());
    let (cos, sin) = (rig.upload(rope.cos()), rig.upload(rope.sin()));
    let cache = place.cache();
    let append_config =
        AppendConfig::packed(spec().shape, CHUNK, Some((rope.config(), MAX_PAGES * PAGE)), true, cache);
    let append_plan = AppendPlan::new(append_config).expect("a plan of the append");
    let plan = PrefillPlan::new(PrefillConfig {
        spec: spec(),
        batch: 2,
        num_queries: CHUNK,
        max_kv_len: MAX_PAGES * PAGE,
        cache,
        carry: false,
        kernel: place.kernel(),
    })
    .expect("a plan of the prefill");
    let append = Append::<_, bf16>::prepare(rig.device(), &append_plan).expect("prepare the append");
    let planner = PrefillTiles::prepare(rig.device(), &plan).expect("prepare the list of tiles");
    let prefill = Prefill::<_, bf16>::prepare(rig.device(), &plan).expect("prepare the prefill");
    assert_eq!(prefill.kernel(), place.kernel(), "by maps where they are asked for");

    let vectors = |heads: usize| RefCell::new(rig.zeroed::<bf16>(CHUNK * heads * DIM));
    let (q, k_new, v_new) = (vectors(Q_HEADS), vectors(KV_HEADS), vectors(KV_HEADS));
    let (slot, position, cu_queries, kv_len) = (
        RefCell::new(rig.zeroed::<i64>(CHUNK)),
        RefCell::new(rig.zeroed::<u32>(CHUNK)),
        RefCell::new(rig.zeroed::<u32>(3)),
        RefCell::new(rig.zeroed::<u32>(2)),
    );
    let table: Vec<u32> = (0..2).flat_map(|s| (0..MAX_PAGES).map(move |i| page(s, i) as u32)).collect();
    let (table, start) = (rig.upload(&table), rig.upload(&START.map(|token| token as u32)));
    // NaN: no key counts before it was appended.
    let poisoned = || RefCell::new(rig.poisoned::<bf16>(pages * PAGE * KV_HEADS * DIM));
    let (k, v) = (poisoned(), poisoned());
    let status = RefCell::new(rig.zeroed::<u64>(1));
    let workspace = RefCell::new(rig.workspace(plan.workspace()));
    let out = RefCell::new(rig.poisoned::<bf16>(CHUNK * Q_HEADS * DIM));
    let lse = RefCell::new(rig.poisoned::<f32>(CHUNK * Q_HEADS));
    let poison = (rig.download(&out.borrow()), rig.download(&lse.borrow()));

    let replay = rig.record(Box::new(|| {
        let (mut q, k_new, v_new) = (q.borrow_mut(), k_new.borrow(), v_new.borrow());
        let (slot, position) = (slot.borrow(), position.borrow());
        let (mut k, mut v, mut status) = (k.borrow_mut(), v.borrow_mut(), status.borrow_mut());
        let args = AppendArgs {
            q_new: Some(rig.view_mut(&mut q)),
            k_new: &rig.view(&k_new),
            v_new: &rig.view(&v_new),
            tables: Some(AppendTables {
                cos: &rig.view(&cos),
                sin: &rig.view(&sin),
                position: &rig.view(&position),
            }),
            slot: &rig.view(&slot),
            k: rig.view_mut(&mut k),
            v: rig.view_mut(&mut v),
            status: rig.view_mut(&mut status),
        };
        append.run(rig.queue(), args).unwrap_or_else(|error| panic!("append on {}: {error}", rig.name()));
        let (table, start) = (rig.view(&table), rig.view(&start));
        let table = (place == Where::Pages).then_some(&table);
        let (cu_queries, kv_len, mut workspace) =
            (cu_queries.borrow(), kv_len.borrow(), workspace.borrow_mut());
        let args = PrefillTilesArgs {
            cu_queries: &rig.view(&cu_queries),
            kv_len: &rig.view(&kv_len),
            block_table: table,
            kv_start: (place == Where::Maps).then_some(&start),
            status: rig.view_mut(&mut status),
        };
        let mut tiles = planner
            .run(rig.queue(), args, rig.workspace_view(&mut workspace))
            .unwrap_or_else(|error| panic!("list of tiles on {}: {error}", rig.name()));
        let inputs =
            PrefillInputs { q: &rig.view(&q), k: &rig.view(&k), v: &rig.view(&v), block_table: table };
        let (mut out, mut lse) = (out.borrow_mut(), lse.borrow_mut());
        let output = PrefillOutput { out: rig.view_mut(&mut out), lse: rig.view_mut(&mut lse) };
        prefill
            .run(rig.queue(), inputs, output, &mut tiles)
            .unwrap_or_else(|error| panic!("prefill on {}: {error}", rig.name()));
    }));

    let mut sequences = [Sequence::default(), Sequence::default()];
    for (index, new) in CHUNKS.into_iter().enumerate() {
        let chunk = chunk(place, new, &mut sequences, 10 * index as u64 + 1);
        rig.write(&mut q.borrow_mut(), 0, &chunk.q[0]);
        rig.write(&mut position.borrow_mut(), 0, &chunk.position);
        rig.write(&mut k_new.borrow_mut(), 0, &chunk.k);
        rig.write(&mut v_new.borrow_mut(), 0, &chunk.v);
        rig.write(&mut slot.borrow_mut(), 0, &chunk.slot);
        rig.write(&mut cu_queries.borrow_mut(), 0, &chunk.cu_queries);
        rig.write(&mut kv_len.borrow_mut(), 0, &chunk.kv_len);
        rig.write(&mut out.borrow_mut(), 0, &poison.0);
        rig.write(&mut lse.borrow_mut(), 0, &poison.1);
        replay();
        let name = format!("chunk {index} of {new:?} in {place:?} on {}", rig.name());
        assert_eq!(Fault::decode(rig.download(&status.borrow())[0]), None, "{name}");
        let (expected_out, expected_lse) = oracle(&chunk, &sequences);
        Comparison::attention(&rig.download(&out.borrow()), &expected_out, DIM)
            .assert(format_args!("out of {name}"));
        Comparison::new(&rig.download(&lse.borrow()), &expected_lse, Tolerance::LSE)
            .assert(format_args!("lse of {name}"));
    }
    drop(replay);
    assert!(
        rig.counters_are_zero(&mut workspace.borrow_mut(), plan.workspace()),
        "counters on {}",
        rig.name()
    );
}

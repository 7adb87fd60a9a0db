//! Ring steps: P ranks on one device, against the f64 oracle and against one rank, which is one launch of the same kernel.

use attention::gpu::PrefillKernel;
use attention::testing::{Comparison, Tolerance};
use attention::{AttentionSpec, Element, Mask};
use cuda::params::PrefillTile;
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use seq_parallel::gpu::{RingStep, RingStepArgs, RingStepPlan};
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ring::{Direction, RingPlan};
use seq_parallel::schedule::source;
use seq_parallel::testing::{Contents, sequences, spec};

emulator::device_test!(
    rings_equal_the_oracle,
    cached_prefixes_and_other_masks,
    warpgroup_products_make_rings_too,
    queries_go_round_too,
    runs_are_bitwise_equal,
    tiles_outside_their_arrays_are_skipped,
);

/// Outputs and LSEs of a batch, packed `[new tokens, q_heads, v_dim]` and `[new tokens, q_heads]`.
#[derive(Debug, Clone, PartialEq)]
struct Packed<E> {
    out: Vec<E>,
    lse: Vec<f32>,
}

/// A rank's queries, and the blocks of all ranks.
struct World<'a, E> {
    contents: &'a Contents<E>,
    ring: RingPlan,
    kernel: PrefillKernel,
}

impl<'a, E: Element> World<'a, E> {
    fn new(contents: &'a Contents<E>, placement: Placement, cached: Placement, ranks: usize) -> Self {
        let shards = Shards::new(contents.sequences.iter().copied(), placement, ranks).unwrap();
        World {
            contents,
            ring: RingPlan::new(contents.spec, shards.with_cached(cached)).unwrap(),
            kernel: PrefillKernel::MmaSync,
        }
    }

    fn shards(&self) -> &Shards {
        self.ring.shards()
    }

    fn queries(&self, rank: usize) -> Vec<E> {
        self.contents.rows(&self.shards().queries(rank), &[]).q
    }

    /// K, then V, as they travel.
    fn block(&self, rank: usize) -> Vec<E> {
        let rows = self.contents.rows(&[], &self.ring.keys(rank));
        [rows.k, rows.v].concat()
    }
}

/// Runs all steps of a rank where keys go round.
fn run_rank<R: Rig, E: Storage + Element>(rig: &R, world: &World<'_, E>, rank: usize) -> Packed<E> {
    let plan = RingStepPlan::new(&world.ring, rank).unwrap().with_kernel(world.kernel).unwrap();
    let step = RingStep::<_, E>::prepare(rig.device(), &plan).unwrap();
    let shape = world.contents.spec.shape;
    let rows = plan.query_tokens(0) * shape.q_heads();
    let q = rig.upload(&world.queries(rank));
    let (tiles, counts) = (rig.upload(plan.tiles()), rig.upload(plan.tile_counts()));
    let (mut o, mut ml) = (rig.poisoned::<f32>(rows * shape.v_dim()), rig.poisoned::<f32>(rows * 2));
    let (mut out, mut lse) = (rig.poisoned::<E>(rows * shape.v_dim()), rig.poisoned::<f32>(rows));
    let mut status = rig.zeroed::<u64>(1);
    let mut workspace = rig.workspace(plan.workspace());
    for index in 0..plan.steps() {
        let block = world.block(source(rank, index, world.ring.ranks()));
        assert_eq!(block.len(), plan.block_len(index));
        let block = rig.upload(&block);
        let args = RingStepArgs {
            tiles: &rig.view(&tiles),
            tile_counts: &rig.view(&counts),
            q: &rig.view(&q),
            block: &rig.view(&block),
            o: rig.view_mut(&mut o),
            ml: rig.view_mut(&mut ml),
            out: Some(rig.view_mut(&mut out)),
            lse: rig.view_mut(&mut lse),
            status: rig.view_mut(&mut status),
        };
        step.run(rig.queue(), index, args, rig.workspace_view(&mut workspace)).unwrap();
    }
    assert!(rig.counters_are_zero(&mut workspace, plan.workspace()));
    assert_eq!(Fault::decode(rig.download(&status)[0]), None);
    Packed { out: rig.download(&out), lse: rig.download(&lse) }
}

/// Runs all ranks, one after another.
fn run<R: Rig, E: Storage + Element>(rig: &R, world: &World<'_, E>) -> Packed<E> {
    let shape = world.contents.spec.shape;
    let width = shape.q_heads() * shape.v_dim();
    let tokens = world.shards().new_tokens();
    let mut packed =
        Packed { out: vec![E::zeroed(); tokens * width], lse: vec![f32::NAN; tokens * shape.q_heads()] };
    for rank in 0..world.ring.ranks() {
        let Packed { out, lse } = run_rank(rig, world, rank);
        world.shards().put(rank, &out, width, &mut packed.out).unwrap();
        world.shards().put(rank, &lse, shape.q_heads(), &mut packed.lse).unwrap();
    }
    packed
}

fn compare<E: Element>(case: &str, contents: &Contents<E>, packed: &Packed<E>) -> Comparison {
    let dim = contents.spec.shape.v_dim();
    let compared = Comparison::attention(&packed.out, &contents.oracle.out, dim);
    compared.assert(format!("{case}: outputs"));
    Comparison::new(&packed.lse, &contents.oracle.lse, Tolerance::LSE).assert(format!("{case}: LSEs"));
    compared
}

fn check<R: Rig, E: Storage + Element>(
    rig: &R,
    (spec, lens): (AttentionSpec, &[(usize, usize)]),
    rings: &[(Placement, Placement, usize)],
    seed: u64,
) {
    if !crate::runs(rig, seed) {
        return;
    }
    let contents = Contents::<E>::new(spec, sequences(lens), seed);
    for &(placement, cached, ranks) in rings {
        let case = format!(
            "{:?} of {lens:?}, {placement}, cached {cached}, {ranks} ranks, {} with seed {seed} on {}",
            spec.mask,
            E::NAME,
            rig.name()
        );
        let packed = run(rig, &World::new(&contents, placement, cached, ranks));
        compare(&case, &contents, &packed);
    }
}

/// Every placement with 2, 3 and 4 ranks, with and without a causal mask, grouped heads of several ratios, packed batches with
/// sequences of one token and of no whole tile.
fn rings_equal_the_oracle<R: Rig>(rig: &R) {
    use Placement::{Contiguous, Striped, Zigzag};
    let rings = |placement, ranks: &[usize]| -> Vec<_> {
        ranks.iter().map(|&ranks| (placement, Contiguous, ranks)).collect()
    };
    let packed: &[(usize, usize)] = &[(0, 70), (0, 1), (0, 9)];
    check::<R, f16>(rig, (spec(4, 1, 64, Mask::Causal), packed), &rings(Zigzag, &[2, 4]), 1);
    check::<R, f16>(rig, (spec(3, 3, 64, Mask::Causal), packed), &rings(Striped, &[2, 3]), 2);
    check::<R, f16>(rig, (spec(2, 1, 64, Mask::Causal), &[(0, 130)]), &rings(Contiguous, &[3]), 3);
    check::<R, f16>(rig, (spec(2, 2, 64, Mask::Full), packed), &rings(Zigzag, &[3]), 4);
    check::<R, bf16>(rig, (spec(8, 1, 128, Mask::Causal), &[(0, 37), (0, 10)]), &rings(Zigzag, &[2]), 5);
    check::<R, bf16>(rig, (spec(5, 1, 128, Mask::Causal), &[(0, 3), (0, 70)]), &rings(Striped, &[4]), 6);
    check::<R, bf16>(rig, (spec(2, 2, 128, Mask::Full), &[(0, 66)]), &rings(Contiguous, &[2]), 7);
}

/// New tokens after cached ones that lie otherwise than the new ones; windows, sinks and prefixes across shards.
fn cached_prefixes_and_other_masks<R: Rig>(rig: &R) {
    use Placement::{Contiguous, Striped, Zigzag};
    let window = |window, sinks| Mask::sliding_window(window, sinks).unwrap();
    let lens: &[(usize, usize)] = &[(90, 20), (3, 40), (65, 1)];
    check::<R, f16>(
        rig,
        (spec(4, 2, 64, Mask::Causal), lens),
        &[(Zigzag, Contiguous, 3), (Striped, Striped, 2)],
        11,
    );
    check::<R, f16>(
        rig,
        (spec(2, 1, 64, window(17, 4)), lens),
        &[(Zigzag, Contiguous, 2), (Striped, Contiguous, 2)],
        12,
    );
    check::<R, bf16>(
        rig,
        (spec(2, 1, 128, Mask::Prefix { prefix: 50 }), &[(0, 80)]),
        &[(Zigzag, Zigzag, 2)],
        13,
    );
}

/// The kernel of Hopper on the same lists.
fn warpgroup_products_make_rings_too<R: Rig>(rig: &R) {
    let arch = cuda::launch::Device::arch(rig.device());
    if !cuda::table::ArchClass::Hopper.runs_on(arch) {
        println!("SKIPPED warpgroup products: {arch} is not sm_90a");
        return;
    }
    let contents = Contents::<bf16>::new(spec(4, 2, 128, Mask::Causal), sequences(&[(0, 150), (20, 9)]), 15);
    for placement in [Placement::Zigzag, Placement::Striped] {
        let world = World::new(&contents, placement, Placement::Contiguous, 2);
        let packed = run(rig, &World { kernel: PrefillKernel::Wgmma, ..world });
        compare(&format!("{placement} by warpgroups on {}", rig.name()), &contents, &packed);
    }
}

/// Where queries go round, every rank leaves normalised partial outputs in f32; merged by LSE they are the whole.
fn queries_go_round_too<R: Rig>(rig: &R) {
    let ranks = 3;
    let contents = Contents::<f16>::new(spec(4, 2, 64, Mask::Causal), sequences(&[(100, 7), (40, 30)]), 21);
    let mut world = World::new(&contents, Placement::Zigzag, Placement::Contiguous, ranks);
    world.ring = world.ring.passing(Direction::PassQ);
    let shape = contents.spec.shape;
    let width = shape.q_heads() * shape.v_dim();
    let tokens = world.shards().new_tokens();
    // Of each rank's keys, over all queries.
    let mut partials = Vec::new();
    for rank in 0..ranks {
        let plan = RingStepPlan::new(&world.ring, rank).unwrap().with_kernel(world.kernel).unwrap();
        let step = RingStep::<_, f16>::prepare(rig.device(), &plan).unwrap();
        let (tiles, counts) = (rig.upload(plan.tiles()), rig.upload(plan.tile_counts()));
        let block = rig.upload(&world.block(rank));
        let mut workspace = rig.workspace(plan.workspace());
        let mut status = rig.zeroed::<u64>(1);
        let (mut out, mut lse) = (vec![0f32; tokens * width], vec![0f32; tokens * shape.q_heads()]);
        for index in 0..plan.steps() {
            let visitor = source(rank, index, ranks);
            let rows = plan.query_tokens(index) * shape.q_heads();
            let q = rig.upload(&world.queries(visitor));
            let (mut o, mut ml) = (rig.poisoned::<f32>(rows * shape.v_dim()), rig.poisoned::<f32>(2 * rows));
            let mut row_lse = rig.poisoned::<f32>(rows);
            let args = RingStepArgs {
                tiles: &rig.view(&tiles),
                tile_counts: &rig.view(&counts),
                q: &rig.view(&q),
                block: &rig.view(&block),
                o: rig.view_mut(&mut o),
                ml: rig.view_mut(&mut ml),
                out: None,
                lse: rig.view_mut(&mut row_lse),
                status: rig.view_mut(&mut status),
            };
            step.run(rig.queue(), index, args, rig.workspace_view(&mut workspace)).unwrap();
            world.shards().put(visitor, &rig.download(&o), width, &mut out).unwrap();
            world.shards().put(visitor, &rig.download(&row_lse), shape.q_heads(), &mut lse).unwrap();
        }
        partials.push((out, lse));
    }
    let rows = tokens * shape.q_heads();
    let lse: Vec<f64> = (0..rows)
        .map(|row| {
            let parts = || partials.iter().map(|(_, lse)| f64::from(lse[row]));
            let most = parts().fold(f64::NEG_INFINITY, f64::max);
            most + parts().map(|x| (x - most).exp()).sum::<f64>().ln()
        })
        .collect();
    let out: Vec<f64> = (0..rows * shape.v_dim())
        .map(|i| {
            let row = i / shape.v_dim();
            partials
                .iter()
                .map(|(out, part)| f64::from(out[i]) * (f64::from(part[row]) - lse[row]).exp())
                .sum()
        })
        .collect();
    let tolerance = Tolerance::tensor_core::<f16>();
    Comparison::attention_f64(&out, &contents.oracle.out, shape.v_dim(), tolerance).assert(rig.name());
    Comparison::of_f64(&lse, &contents.oracle.lse, Tolerance::LSE).assert(rig.name());
}

/// Whichever block draws which tile.
fn runs_are_bitwise_equal<R: Rig>(rig: &R) {
    let contents = Contents::<f16>::new(spec(4, 2, 64, Mask::Causal), sequences(&[(0, 90), (0, 20)]), 41);
    let world = World::new(&contents, Placement::Zigzag, Placement::Contiguous, 2);
    assert_eq!(run(rig, &world), run(rig, &world), "on {}", rig.name());
}

/// A list that is not the plan's: whatever it holds, the kernel stays within its arrays, says so, and does the other tiles.
fn tiles_outside_their_arrays_are_skipped<R: Rig>(rig: &R) {
    let contents = Contents::<f16>::new(spec(2, 1, 64, Mask::Full), sequences(&[(0, 30), (0, 40)]), 51);
    let world = World::new(&contents, Placement::Contiguous, Placement::Contiguous, 1);
    let plan = RingStepPlan::new(&world.ring, 0).unwrap().with_kernel(world.kernel).unwrap();
    let step = RingStep::<_, f16>::prepare(rig.device(), &plan).unwrap();
    let shape = contents.spec.shape;
    let rows = 70 * shape.q_heads();
    let (range, index) = (attention::FaultCode::BadRange as u32, attention::FaultCode::BadIndex as u32);
    type Change = fn(&mut PrefillTile);
    let cases: [(&str, Change, u32); 6] = [
        ("queries past q", |tile| tile.queries = 41, range),
        ("queries that wrap", |tile| tile.first_query = u32::MAX, range),
        ("a row past the segment", |tile| tile.first_row = 128, range),
        ("keys past the cache", |tile| tile.kv_start = 71 - tile.kv_len, range),
        ("a mask past the keys", |tile| tile.end = i32::MAX, range),
        ("a span that was there before", |tile| tile.next = u32::MAX, index),
    ];
    for (what, change, code) in cases {
        let mut list = plan.tiles().to_vec();
        assert_eq!(list.len(), 2, "one tile each; the longer sequence, the second, comes first");
        change(&mut list[0]);
        let (tiles, counts) = (rig.upload(&list), rig.upload(plan.tile_counts()));
        let (q, block) = (rig.upload(&world.queries(0)), rig.upload(&world.block(0)));
        let (mut o, mut ml) = (rig.poisoned::<f32>(rows * 64), rig.poisoned::<f32>(rows * 2));
        let (mut out, mut lse) = (rig.zeroed::<f16>(rows * 64), rig.zeroed::<f32>(rows));
        let mut status = rig.zeroed::<u64>(1);
        let mut workspace = rig.workspace(plan.workspace());
        let args = RingStepArgs {
            tiles: &rig.view(&tiles),
            tile_counts: &rig.view(&counts),
            q: &rig.view(&q),
            block: &rig.view(&block),
            o: rig.view_mut(&mut o),
            ml: rig.view_mut(&mut ml),
            out: Some(rig.view_mut(&mut out)),
            lse: rig.view_mut(&mut lse),
            status: rig.view_mut(&mut status),
        };
        step.run(rig.queue(), 0, args, rig.workspace_view(&mut workspace)).unwrap();
        let name = format!("{what} on {}", rig.name());
        assert_eq!(Fault::decode(rig.download(&status)[0]), Some(Fault { code, index: 0 }), "{name}");
        assert!(rig.counters_are_zero(&mut workspace, plan.workspace()), "{name}");
        let (out, lse) = (rig.download(&out), rig.download(&lse));
        let first = 30 * shape.q_heads();
        Comparison::attention(&out[..first * 64], &contents.oracle.out[..first * 64], 64).assert(&name);
        assert!(lse[..first].iter().all(|lse| *lse != 0.0), "{name}");
        assert!(lse[first..].iter().all(|lse| *lse == 0.0), "{name}: the bad tile's rows are left alone");
    }
}

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let shards = Shards::new(sequences(&[(0, 10)]), Placement::Zigzag, 2).unwrap();
    let ring = RingPlan::new(spec(2, 1, 64, Mask::Causal), shards.clone()).unwrap();
    RingStepPlan::new(&ring, 1).unwrap();
    let error = RingStepPlan::new(&ring, 2).unwrap_err().to_string();
    assert!(error.contains("`rank`") && error.contains("below 2"), "{error}");
    let odd = RingPlan::new(spec(2, 1, 80, Mask::Causal), shards).unwrap();
    let error = RingStepPlan::new(&odd, 0).unwrap_err().to_string();
    assert!(error.contains("QK_DIM"), "{error}");
}

/// Extra traffic of the carried state: nothing in a ring of one rank; in longer ones a state per step and row, once read and once
/// written, but for the first and the last.
#[test]
fn traffic_is_counted() {
    let (tokens, heads, dim) = (512, 4, 64);
    let bytes = |ranks: usize| -> Vec<u64> {
        let shards = Shards::new(sequences(&[(0, tokens)]), Placement::Contiguous, ranks).unwrap();
        let plan = RingStepPlan::new(&RingPlan::new(spec(heads, heads, dim, Mask::Full), shards).unwrap(), 0)
            .unwrap();
        (0..ranks).map(|step| plan.bytes_moved(step, attention::DType::F16)).collect()
    };
    let inputs = |tokens: usize| (tokens * heads * dim * 3 * 2) as u64;
    let (state, output) = ((heads * (dim + 2) * 4) as u64, (heads * (dim * 2 + 4)) as u64);
    assert_eq!(bytes(1), [inputs(512) + 512 * output]);
    let quarter = inputs(128);
    assert_eq!(
        bytes(4),
        [
            quarter + 128 * state,
            quarter + 256 * state,
            quarter + 256 * state,
            quarter + 128 * (state + output)
        ]
    );
}

//! Caches that lie past 2³² elements of their pools.

use attention::gpu::Splits;
use attention::testing::Inputs;
use attention::{AttentionSpec, HeadsView, Mask, Score};
use cuda::status::Fault;
use emulator::rig::Rig;
use half::f16;
use homomorphic_quant::gpu::{
    Counts, Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, Method, Pools, Prefill,
    PrefillConfig, PrefillInputs, PrefillOutput, PrefillPlan,
};
use homomorphic_quant::page::SidePage;
use homomorphic_quant::{Error, reference};

use crate::append::Grown;
use crate::close::assert_close;
use crate::sequences::{Cached, DeviceTable, Shape, Table, Tokens};

emulator::device_test!(offsets_past_2_to_the_32_elements);

const LENS: [usize; 3] = [75, 40, 110];
/// Queries of each sequence.
const QUERIES: usize = 2;

fn shape() -> Shape {
    Shape::new((4, 2), 64, (2, 4), 32)
}

fn spec() -> AttentionSpec {
    let shape = shape().heads();
    let score = Score::new((shape.qk_dim() as f32).powf(-0.5)).expect("a finite scale");
    AttentionSpec { shape, score, mask: Mask::Causal }
}

/// Empty sequences, of whose pages, sinks and open blocks every second one lies past 2³² elements of its pool. Offsets of 32 bits,
/// whether they count elements or bytes, lead to another sequence's place.
fn far<R: Rig>(rig: &R) -> Grown<R, f16> {
    let shape = shape();
    let near = Grown::<R, f16>::new(rig, &shape, LENS.len(), *LENS.iter().max().expect("a length"), 61);
    let before = |elements: usize| (1usize << 32).div_ceil(elements);
    let of_side = |page: SidePage| page.bytes() / size_of::<f16>();
    let (sink, open) = (of_side(near.pools.sink_page()), of_side(near.pools.open_page()));
    let page = near.pools.page_bytes();
    let moved = |places: &[u32], before: usize| -> Vec<u32> {
        let far = |id: &u32| if id.is_multiple_of(2) { *id } else { id - 1 + before as u32 };
        let places: Vec<u32> = places.iter().map(far).collect();
        assert!(places.iter().any(|id| *id as usize >= before), "{places:?}");
        places
    };
    let counts = near.pools.counts();
    let counts = Counts {
        pages: counts.pages + before(page),
        sink_pages: counts.sink_pages + before(sink),
        open_pages: counts.open_pages + before(open),
        ..counts
    };
    Grown {
        shape,
        pools: Pools::new(&shape.config::<f16>(), 0, shape.heads(), counts).expect("pools"),
        table: Table {
            max_pages: near.table.max_pages,
            block_table: moved(&near.table.block_table, before(page)),
            sink_page: moved(&near.table.sink_page, before(sink)),
            open_page: moved(&near.table.open_page, before(open)),
        },
        pages: rig.zeroed(counts.pages * page),
        sinks: rig.zeroed(counts.sink_pages * sink),
        open: rig.zeroed(counts.open_pages * open),
        lens: vec![0; LENS.len()],
    }
}

/// Outputs and LSEs.
type Attended = (Vec<f16>, Vec<f32>);

/// A decode step of [`QUERIES`] queries of each sequence, and a prefill of the same.
fn attend<R: Rig>(rig: &R, grown: &Grown<R, f16>, q: &[f16]) -> Result<[Attended; 2], Error> {
    let (spec, batch, rows) = (spec(), LENS.len(), LENS.len() * QUERIES * shape().q_heads);
    let plan = DecodePlan::new(DecodeConfig {
        method: Method::Codes,
        pools: grown.pools,
        shape: spec.shape,
        score: spec.score,
        mask: spec.mask,
        batch,
        q_len: QUERIES,
        max_kv_len: 4096,
        splits: Splits::Balanced,
        sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
    })?;
    let planner = DecodeStep::prepare(rig.device(), &plan)?;
    let decode = Decode::<_, f16>::prepare(rig.device(), &plan)?;
    let mut step_workspace = rig.workspace(plan.step_workspace());
    let mut workspace = rig.workspace(plan.workspace());
    let plan = PrefillPlan::new(PrefillConfig {
        mode: reference::Prefill::Codes,
        pools: grown.pools,
        shape: spec.shape,
        score: spec.score,
        mask: spec.mask,
        batch,
        max_queries: QUERIES,
        num_queries: batch * QUERIES,
        max_kv_len: 4096,
    })?;
    let prefill = Prefill::<_, f16>::prepare(rig.device(), &plan)?;

    let cu_queries: Vec<u32> = (0..=batch).map(|sequence| (sequence * QUERIES) as u32).collect();
    let (q, cu_queries) = (rig.upload(q), rig.upload(&cu_queries));
    let kv_len = rig.upload(&LENS.map(|len| len as u32));
    let table = DeviceTable::new(rig, &grown.table);
    let mut status = rig.zeroed::<u64>(1);
    let mut attended = [(); 2].map(|_| {
        let out = rig.poisoned::<f16>(rows * spec.shape.v_dim());
        (out, rig.poisoned::<f32>(rows))
    });
    let [of_decode, of_prefill] = &mut attended;
    let (q, pages) = (rig.view(&q), rig.view(&grown.pages));
    let (sinks, open) = (rig.view(&grown.sinks), rig.view(&grown.open));
    let planned = table.with(rig, |places| {
        let args = DecodeStepArgs { kv_len: &rig.view(&kv_len), places, status: rig.view_mut(&mut status) };
        planner.run(rig.queue(), args, rig.workspace_view(&mut step_workspace))
    })?;
    table.with(rig, |places| {
        let args = DecodeArgs {
            q: &q,
            pages: &pages,
            sink_pool: &sinks,
            open_pool: &open,
            places,
            out: rig.view_mut(&mut of_decode.0),
            lse: rig.view_mut(&mut of_decode.1),
        };
        decode.run(rig.queue(), args, &planned, rig.workspace_view(&mut workspace))
    })?;
    table.with(rig, |places| {
        let inputs = PrefillInputs {
            q: &q,
            cu_queries: &rig.view(&cu_queries),
            kv_len: &rig.view(&kv_len),
            pages: &pages,
            sink_pool: &sinks,
            open_pool: &open,
            places,
            status: rig.view_mut(&mut status),
        };
        let output =
            PrefillOutput { out: rig.view_mut(&mut of_prefill.0), lse: rig.view_mut(&mut of_prefill.1) };
        prefill.run(rig.queue(), inputs, output)
    })?;
    assert_eq!(Fault::decode(rig.download(&status)[0]), None, "on {}", rig.name());
    Ok(attended.map(|(out, lse)| (rig.download(&out), rig.download(&lse))))
}

/// What is appended far out is read there, by decode and by prefill; most of the pools is never touched.
fn offsets_past_2_to_the_32_elements<R: Rig>(rig: &R) {
    let shape = shape();
    let tokens: Vec<Tokens<f16>> = (LENS.iter().zip(70..))
        .map(|(&len, seed)| Tokens::new(&shape, len, (Inputs::OutlierChannels, Inputs::Normal), seed))
        .collect();
    let mut grown = far(rig);
    // Blocks that close from new tokens alone, and with tokens of the open block.
    for lens in [[50, 3, 80], LENS] {
        assert_eq!(grown.append(rig, &tokens, &lens), None, "on {}", rig.name());
    }
    let rows = QUERIES * shape.q_heads;
    let q: Vec<f16> = Inputs::Normal.generate(LENS.len() * rows, 64, 77);
    let attended = attend(rig, &grown, &q).unwrap_or_else(|error| panic!("on {}: {error}", rig.name()));

    let cached = Cached::new(&shape, &tokens);
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (sequence, q) in cached.sequences.iter().zip(q.chunks_exact(rows * 64)) {
        let q: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();
        let q = HeadsView::nhd(&q, QUERIES, shape.q_heads, 64).expect("queries");
        let (mut o, mut l) = (vec![f32::NAN; rows * 64], vec![f32::NAN; rows]);
        reference::attend(&spec(), &cached.cache, sequence, q, None, &mut o, &mut l).expect("a valid case");
        out.extend(o.into_iter().map(f64::from));
        lse.extend(l.into_iter().map(f64::from));
    }
    for (what, (found_out, found_lse)) in ["decode", "prefill"].into_iter().zip(&attended) {
        let name = format!("{what} on {}", rig.name());
        assert_close((found_out, found_lse), (&out, &lse), 64, &name);
    }
}

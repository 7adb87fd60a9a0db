//! From calibration to attention: a plan's maps are packed for the device, new tokens are appended and attended to there, and all
//! of it equals the CPU's cache and reference.

use attention::reference::{Probabilities, prefill_parallel};
use attention::rope::{Rope, RopeConfig, RopeLayout};
use attention::testing::{Comparison, Inputs, Tolerance, shuffled_pages};
use attention::{
    AttentionSpec, BlockTable, Element, HeadShape, HeadsView, Mask, RaggedKv, RaggedView, Score,
};
use cuda::status::Fault;
use emulator::rig::{Rig, zeroed_or_skip};
use half::f16;
use kv_compress::cache::{LayerCache, PageLayout, PagedView};
use kv_compress::calibrate::Calibration;
use kv_compress::gpu::{
    Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, Decode, DecodeArgs, DecodeConfig, DecodePlan,
    DecodeStep, DecodeStepArgs, PackedMaps, Queries, Splits, Vectors,
};
use kv_compress::merge::{fold_output, fold_values};
use kv_compress::projection::{Projection, project};
use kv_compress::rank_plan::{Planner, Profile, RankPlan, Weights};
use kv_compress::reference::{self, Attend};
use kv_compress::{CompressionPlan, Error, HeadMaps, LayerProjection};

emulator::device_test!(
    a_plan_on_the_device_is_the_plan_on_the_cpu,
    full_ranks_are_dense_attention,
    pages_past_2_to_the_32_elements,
);

const DIM: usize = 64;
const GROUP: usize = 2;
const KV_HEADS: usize = 3;
const Q_HEADS: usize = GROUP * KV_HEADS;
const HIDDEN: usize = 96;
const PAGE: usize = 16;
const POSITIONS: usize = 256;
/// Tokens of each sequence: pages that are full, one token, pages that are not.
const LENS: [usize; 4] = [64, 1, 101, 18];

fn shape() -> HeadShape {
    HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).expect("a valid shape")
}

fn score() -> Score {
    Score::new((DIM as f32).powf(-0.5)).expect("a finite scale")
}

fn rope() -> Rope {
    Rope::new(RopeConfig { layout: RopeLayout::HalfSplit, ..RopeConfig::new(DIM, 10_000.0) }, POSITIONS)
        .expect("a valid rotation")
}

/// A layer of a model with RoPE: queries and keys of tokens before it, and weights. Directions of head h fall in size like
/// `decay^i`, differently in each, so that heads want different ranks.
struct Layer {
    /// `[tokens, q_heads, DIM]`, values of f16
    q: Vec<f32>,
    /// `[tokens, kv_heads, DIM]`, values of f16
    k: Vec<f32>,
    /// Hidden states `[tokens, HIDDEN]`.
    x: Vec<f32>,
    /// `[kv_heads · DIM, HIDDEN]`
    w_v: Vec<f32>,
    /// `[HIDDEN, q_heads · DIM]`
    w_o: Vec<f32>,
}

impl Layer {
    /// `text` makes tokens, `model` the weights and what tokens have in common.
    fn new(tokens: usize, model: u64, text: u64) -> Self {
        let decay = |head: usize| [0.80f32, 0.97, 0.90][head % KV_HEADS];
        // Random directions of every head, shared by all tokens.
        let falling = |rows: usize, heads: usize, head_of: fn(usize) -> usize, seed: u64| -> Vec<f32> {
            let raw = Inputs::Normal.values(rows * heads, DIM, seed + text);
            let turns = Inputs::Normal.values(heads * DIM, DIM, seed + model);
            raw.chunks_exact(DIM)
                .enumerate()
                .flat_map(|(row, raw)| {
                    let head = row % heads;
                    let turn = &turns[head * DIM * DIM..][..DIM * DIM];
                    let mut rotated = vec![0.0; DIM];
                    for (i, (x, turn)) in raw.iter().zip(turn.chunks_exact(DIM)).enumerate() {
                        let size = x * decay(head_of(head)).powi(i as i32) * (DIM as f32).powf(-0.5) * 2.0;
                        rotated.iter_mut().zip(turn).for_each(|(sum, y)| *sum += size * y);
                    }
                    rotated
                })
                .map(|x| f16::from_f32(x).to_f32())
                .collect()
        };
        let mut w_v = Inputs::Normal.values(KV_HEADS * DIM, HIDDEN, 5 + model);
        for (row, weights) in w_v.chunks_exact_mut(HIDDEN).enumerate() {
            let size = decay(row / DIM).powi((row % DIM) as i32) * (HIDDEN as f32).powf(-0.5);
            weights.iter_mut().for_each(|w| *w *= size);
        }
        Layer {
            q: falling(tokens, Q_HEADS, |head| head / GROUP, 1),
            k: falling(tokens, KV_HEADS, |head| head, 2),
            x: Inputs::Normal.values(tokens, HIDDEN, 3 + text),
            w_o: Inputs::Normal.values(HIDDEN, Q_HEADS * DIM, 6 + model),
            w_v,
        }
    }

    fn tokens(&self) -> usize {
        self.x.len() / HIDDEN
    }

    /// `[tokens, kv_heads, DIM]`
    fn v(&self) -> Vec<f32> {
        product(&self.x, &self.w_v, HIDDEN)
    }
}

/// `x` `[rows, inner]` times the transpose of `weight` `[out, inner]`: `[rows, out]`.
fn product(x: &[f32], weight: &[f32], inner: usize) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    x.chunks_exact(inner).flat_map(|x| weight.chunks_exact(inner).map(|w| dot(x, w) as f32)).collect()
}

/// Positions of packed tokens of these lengths.
fn positions(lens: &[usize]) -> Vec<u32> {
    lens.iter().flat_map(|&len| 0..len as u32).collect()
}

fn rotated(x: &[f32], heads: usize, positions: &[u32]) -> Vec<f32> {
    let mut x = x.to_vec();
    rope().apply(&mut x, heads, positions).expect("positions of the table");
    x
}

/// A plan from calibration on a text, through its file.
fn plan(layer: &Layer, ranks: impl FnOnce(&Planner) -> Result<RankPlan, Error>) -> CompressionPlan {
    let made = (|| {
        let mut calibration = Calibration::new([shape()]);
        let at = positions(&[128; 4]);
        assert_eq!(at.len(), layer.tokens());
        let (q, k) = (rotated(&layer.q, Q_HEADS, &at), rotated(&layer.k, KV_HEADS, &at));
        calibration.layer_mut(0)?.add(&q, &k, &layer.v())?;
        calibration.layer_mut(0)?.set_w_o(&layer.w_o, HIDDEN)?;
        let bases = vec![project(0, &calibration.layers()[0], Projection::Optimal)?];
        let profile = Profile::new(&calibration, &bases, &[score().scale()])?;
        let planner = Planner::new(&profile, &Weights::equal(&profile))?;
        let plan = CompressionPlan::new(&calibration, Projection::Optimal, &bases, &ranks(&planner)?)?;
        CompressionPlan::from_bytes(&plan.to_bytes()?)
    })();
    made.expect("a plan")
}

/// The layer's maps as the device has them: rounded to f16, in f32.
fn stored(projection: &LayerProjection) -> LayerProjection {
    let round = |map: &[f32]| map.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
    let heads = projection.heads().iter().map(|maps| HeadMaps {
        query: round(&maps.query),
        key: round(&maps.key),
        value: round(&maps.value),
        output: round(&maps.output),
    });
    LayerProjection::from_maps(*projection.shape(), projection.ranks().clone(), heads.collect())
        .expect("the same maps")
}

/// Whether the values' maps are folded into W_V, or applied by the append.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Values {
    Folded,
    Applied,
}

/// What both sides start from: packed tokens of all sequences, of which the last of each decodes.
struct Step<'a> {
    projection: &'a LayerProjection,
    layer: &'a Layer,
    values: Values,
    /// Pages in the pool, and those that each sequence gets.
    pages: usize,
    tables: Vec<Vec<u32>>,
}

impl<'a> Step<'a> {
    fn new(projection: &'a LayerProjection, layer: &'a Layer, values: Values) -> Self {
        let needed = LENS.map(|len| len.div_ceil(PAGE));
        let pages = needed.iter().sum::<usize>() + 1;
        let mut free = shuffled_pages(pages, 3).into_iter();
        let tables = needed.iter().map(|&needed| free.by_ref().take(needed).collect()).collect();
        Step { projection, layer, values, pages, tables }
    }

    fn layout(&self) -> PageLayout {
        PageLayout::new(self.projection.ranks(), PAGE).expect("a valid page size")
    }

    /// New values as they come to the append, in f16: `[tokens, kv_heads, DIM]` or `[tokens, Σ r_v]`.
    fn new_values(&self) -> Vec<f16> {
        let values = match self.values {
            Values::Applied => self.layer.v(),
            Values::Folded => {
                let folded = fold_values(self.projection, &self.layer.w_v, None, HIDDEN).expect("folds");
                product(&self.layer.x, &folded.weight, HIDDEN)
            }
        };
        values.into_iter().map(f16::from_f32).collect()
    }

    /// Slots of the tokens.
    fn slots(&self) -> Vec<i64> {
        let of = |(table, &len): (&Vec<u32>, &usize)| -> Vec<i64> {
            (0..len).map(|t| i64::from(table[t / PAGE]) * PAGE as i64 + (t % PAGE) as i64).collect()
        };
        self.tables.iter().zip(&LENS).flat_map(of).collect()
    }
}

/// Index in packed tokens of the last one of each sequence.
fn last_tokens() -> Vec<usize> {
    let mut end = 0;
    LENS.iter()
        .map(|len| {
            end += len;
            end - 1
        })
        .collect()
}

/// Attention outputs in the reduced basis `[batch, Σ group · r_v]` and LSEs `[batch, q_heads]`.
struct Attended {
    out: Vec<f64>,
    lse: Vec<f64>,
}

/// The CPU's cache and reference; pages of each sequence, in order.
fn on_the_cpu(step: &Step<'_>, projection: &LayerProjection) -> (Attended, Vec<Vec<f16>>) {
    let made = (|| {
        let at = positions(&LENS);
        let narrow = |x: Vec<f32>| -> Vec<f32> { x.into_iter().map(|x| f16::from_f32(x).to_f32()).collect() };
        // The append rounds what it has rotated.
        let q = projection.queries(&narrow(rotated(&step.layer.q, Q_HEADS, &at)))?;
        let k = projection.keys(&narrow(rotated(&step.layer.k, KV_HEADS, &at)))?;
        let v: Vec<f32> = step.new_values().into_iter().map(f32::from).collect();
        let v = match step.values {
            Values::Applied => projection.values(&v)?,
            Values::Folded => v,
        };
        let tokens = step.layer.tokens();
        let [k_row, v_row, q_row] = [&k, &v, &q].map(|x| x.len() / tokens);
        let mut cache = LayerCache::<f16>::new(step.layout(), step.pages)?;
        let mut ids = Vec::new();
        let mut begin = 0;
        for len in LENS {
            let id = cache.create()?;
            let end = begin + len;
            cache.append(id, &k[begin * k_row..end * k_row], &v[begin * v_row..end * v_row])?;
            ids.push(id);
            begin = end;
        }
        let max_pages = LENS.iter().max().map_or(0, |len| len.div_ceil(PAGE));
        let (table, lengths) = cache.block_table(&ids, max_pages)?;
        let view = PagedView {
            layout: cache.layout(),
            pages: cache.pages()?,
            block_table: BlockTable::shared(&table, LENS.len(), max_pages)?,
            lengths: &lengths,
        };
        let queries: Vec<f16> = last_tokens()
            .iter()
            .flat_map(|&t| q[t * q_row..(t + 1) * q_row].iter().map(|x| f16::from_f32(*x)))
            .collect();
        let attend = Attend { group: GROUP, score: score(), mask: Mask::Causal };
        let found = reference::attend(&attend, &queries, &[0, 1, 2, 3, 4], &view, Probabilities::Rounded)?;
        let page = cache.layout().page_elements();
        let pages = LENS.iter().enumerate().map(|(s, len)| {
            let ids = &table[s * max_pages..][..len.div_ceil(PAGE)];
            ids.iter()
                .flat_map(|&id| cache.pages().expect("pages")[id as usize * page..][..page].to_vec())
                .collect()
        });
        Ok::<_, Error>((Attended { out: found.out, lse: found.lse }, pages.collect()))
    })();
    made.expect("the CPU's attention")
}

/// The kernels: an append of all tokens but the last of each sequence, one of the last, and a decode step. `pages` is the cache.
fn on_the_device<R: Rig>(rig: &R, step: &Step<'_>, pages: &mut R::Buffer<f16>) -> Attended {
    let fail = |error: Error| -> ! { panic!("{:?} on {}: {error}", step.values, rig.name()) };
    let maps = PackedMaps::<f16>::new(step.projection).unwrap_or_else(|error| fail(error));
    let [project_q, project_k, project_v] =
        [&maps.project_q, &maps.project_k, &maps.project_v].map(|map| rig.upload(map));
    let rope = rope();
    let (cos, sin) = (rig.upload(rope.cos()), rig.upload(rope.sin()));
    let narrow = |x: &[f32]| -> Vec<f16> { x.iter().map(|x| f16::from_f32(*x)).collect() };
    let (q, k, v) = (narrow(&step.layer.q), narrow(&step.layer.k), step.new_values());
    let (slots, at) = (step.slots(), positions(&LENS));
    let mut status = rig.zeroed::<u64>(1);

    let mut append = |tokens: &[usize]| -> Vec<f16> {
        let vectors = if step.values == Values::Folded { Vectors::Reduced } else { Vectors::Full };
        let rotary = Some((RopeLayout::HalfSplit, DIM, POSITIONS));
        let config = AppendConfig::packed(shape(), step.layout(), step.pages, tokens.len(), rotary, vectors);
        let widths = config.widths();
        let plan = AppendPlan::new(config).unwrap_or_else(|error| fail(error));
        let kernel = Append::<_, f16>::prepare(rig.device(), &plan).unwrap_or_else(|error| fail(error));
        let of = |x: &[f16], width: usize| -> Vec<f16> {
            tokens.iter().flat_map(|t| x[t * width..(t + 1) * width].iter().copied()).collect()
        };
        let new =
            [(&q, widths[0]), (&k, widths[1]), (&v, widths[2])].map(|(x, width)| rig.upload(&of(x, width)));
        let slot: Vec<i64> = tokens.iter().map(|t| slots[*t]).collect();
        let position: Vec<u32> = tokens.iter().map(|t| at[*t]).collect();
        let (slot, position) = (rig.upload(&slot), rig.upload(&position));
        let width: usize = step.projection.ranks().heads().iter().map(|ranks| GROUP * ranks.k).sum();
        let mut reduced = rig.poisoned::<f16>(tokens.len() * width);
        let project_v_view = (step.values == Values::Applied).then(|| rig.view(&project_v));
        let args = AppendArgs {
            queries: Some(Queries {
                q_new: &rig.view(&new[0]),
                project: &rig.view(&project_q),
                q: rig.view_mut(&mut reduced),
            }),
            k_new: &rig.view(&new[1]),
            v_new: &rig.view(&new[2]),
            project_k: Some(&rig.view(&project_k)),
            project_v: project_v_view.as_ref(),
            tables: Some(AppendTables {
                cos: &rig.view(&cos),
                sin: &rig.view(&sin),
                position: &rig.view(&position),
            }),
            slot: &rig.view(&slot),
            pages: rig.view_mut(pages),
            status: rig.view_mut(&mut status),
        };
        kernel.run(rig.queue(), args).unwrap_or_else(|error| fail(error));
        rig.download(&reduced)
    };
    let last = last_tokens();
    let prompt: Vec<usize> = (0..step.layer.tokens()).filter(|t| !last.contains(t)).collect();
    append(&prompt);
    let queries = append(&last);

    let max_pages = step.tables.iter().map(Vec::len).max().expect("a sequence");
    let plan = DecodePlan::new(DecodeConfig {
        shape: shape(),
        layout: step.layout(),
        pages: step.pages,
        max_pages,
        score: score(),
        mask: Mask::Causal,
        batch: LENS.len(),
        q_len: 1,
        max_kv_len: 128,
        splits: Splits::Balanced,
        sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
    })
    .unwrap_or_else(|error| fail(error));
    let planner = DecodeStep::prepare(rig.device(), &plan).unwrap_or_else(|error| fail(error));
    let kernel = Decode::<_, f16>::prepare(rig.device(), &plan).unwrap_or_else(|error| fail(error));
    let table: Vec<u32> = step
        .tables
        .iter()
        .flat_map(|pages| (0..max_pages).map(|i| pages.get(i).copied().unwrap_or(u32::MAX)))
        .collect();
    let (table, lens) = (rig.upload(&table), rig.upload(&LENS.map(|len| len as u32)));
    let (queries, v_width) = (
        rig.upload(&queries),
        step.projection.ranks().heads().iter().map(|ranks| GROUP * ranks.v).sum::<usize>(),
    );
    let mut step_workspace = rig.workspace(plan.step_workspace());
    let mut workspace = rig.workspace(plan.workspace());
    let mut out = rig.poisoned::<f16>(LENS.len() * v_width);
    let mut lse = rig.poisoned::<f32>(LENS.len() * Q_HEADS);
    let args = DecodeStepArgs {
        kv_len: &rig.view(&lens),
        block_table: &rig.view(&table),
        status: rig.view_mut(&mut status),
    };
    let planned = planner
        .run(rig.queue(), args, rig.workspace_view(&mut step_workspace))
        .unwrap_or_else(|error| fail(error));
    let args = DecodeArgs {
        q: &rig.view(&queries),
        pages: &rig.view(pages),
        block_table: &rig.view(&table),
        out: rig.view_mut(&mut out),
        lse: rig.view_mut(&mut lse),
    };
    kernel
        .run(rig.queue(), args, &planned, rig.workspace_view(&mut workspace))
        .unwrap_or_else(|error| fail(error));
    assert_eq!(Fault::decode(rig.download(&status)[0]), None, "{:?} on {}", step.values, rig.name());
    Attended {
        out: rig.download(&out).into_iter().map(f64::from).collect(),
        lse: rig.download(&lse).into_iter().map(f64::from).collect(),
    }
}

/// The layer's output `[batch, HIDDEN]` of reduced attention outputs.
fn layer_output(step: &Step<'_>, attended: &Attended) -> Vec<f32> {
    let w_o = fold_output(step.projection, &step.layer.w_o, HIDDEN).expect("folds");
    let out: Vec<f32> = attended.out.iter().map(|x| *x as f32).collect();
    product(&out, &w_o, w_o.len() / HIDDEN)
}

/// The layer's output `[batch, HIDDEN]` by dense attention in f64 over keys and values in full.
fn dense_output(layer: &Layer) -> Vec<f32> {
    let at = positions(&LENS);
    let (q, k) = (rotated(&layer.q, Q_HEADS, &at), rotated(&layer.k, KV_HEADS, &at));
    let v = layer.v();
    let last: Vec<f32> =
        last_tokens().iter().flat_map(|t| q[t * Q_HEADS * DIM..(t + 1) * Q_HEADS * DIM].to_vec()).collect();
    let view = |x, tokens, heads| HeadsView::nhd(x, tokens, heads, DIM).expect("vectors");
    let mut begin = 0;
    let starts: Vec<u32> = std::iter::once(0)
        .chain(LENS.map(|len| {
            begin += len as u32;
            begin
        }))
        .collect();
    let tokens = layer.tokens();
    let kv = RaggedKv::new(view(&k, tokens, KV_HEADS), view(&v, tokens, KV_HEADS), &starts).expect("kv");
    let q = RaggedView::new(view(&last, LENS.len(), Q_HEADS), &[0, 1, 2, 3, 4]).expect("queries");
    let spec = AttentionSpec { shape: shape(), score: score(), mask: Mask::Causal };
    let dense = prefill_parallel(&spec, &q, &kv, Probabilities::Exact).expect("a case");
    let out: Vec<f32> = dense.out.iter().map(|x| *x as f32).collect();
    product(&out, &layer.w_o, Q_HEADS * DIM)
}

/// ‖found − expected‖ / ‖expected‖
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x).powi(2);
    let error: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (error / expected.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

fn tokens() -> usize {
    LENS.iter().sum()
}

fn assert_attended(found: &Attended, expected: &Attended, name: &str) {
    // Pages may differ by the rounding of one element, which moves scores by less than 1e-3.
    let tolerance = Tolerance::tensor_core::<f16>();
    Comparison::of_f64(&found.out, &expected.out, tolerance).assert(format_args!("out of {name}"));
    Comparison::of_f64(&found.lse, &expected.lse, Tolerance::new(1e-3, 1e-5))
        .assert(format_args!("lse of {name}"));
}

/// Calibrate, plan, pack, append, decode: mixed ranks, a ragged batch, grouped heads, RoPE.
fn a_plan_on_the_device_is_the_plan_on_the_cpu<R: Rig>(rig: &R) {
    let (model, dense_bytes) = (40, 2 * 2 * KV_HEADS * DIM);
    let plan = plan(&Layer::new(512, model, 1), |planner| planner.within(dense_bytes / 2));
    let (projection, layer) = (&plan.layers()[0], Layer::new(tokens(), model, 100));
    let heads = projection.ranks().heads();
    assert!(heads.iter().any(|ranks| *ranks != heads[0]), "mixed ranks: {heads:?}");
    let dense = dense_output(&layer);
    for values in [Values::Folded, Values::Applied] {
        let step = Step::new(projection, &layer, values);
        let name = format!("{heads:?}, values {values:?} on {}", rig.name());
        let mut pages = rig.poisoned::<f16>(step.pages * step.layout().page_elements());
        let found = on_the_device(rig, &step, &mut pages);
        let (expected, cached) = on_the_cpu(&step, &stored(projection));

        // Every element that the CPU's cache has.
        let (layout, pages) = (step.layout(), rig.download(&pages));
        let (mut written, mut wanted) = (Vec::new(), Vec::new());
        for (s, (&len, table)) in LENS.iter().zip(&step.tables).enumerate() {
            for t in 0..len {
                for head in 0..KV_HEADS {
                    for region in [layout.keys(head), layout.values(head)] {
                        for i in 0..region.rank() {
                            let at = region.element(t % PAGE, i);
                            written.push(pages[table[t / PAGE] as usize * layout.page_elements() + at]);
                            wanted.push(cached[s][t / PAGE * layout.page_elements() + at].to_f64());
                        }
                    }
                }
            }
        }
        Comparison::new(&written, &wanted, Tolerance::new(3e-5, <f16 as Element>::DTYPE.epsilon()))
            .assert(format_args!("pages of {name}"));
        assert_attended(&found, &expected, &name);

        // Against dense attention the device loses what the method loses, and no more.
        let lost = relative(&layer_output(&step, &found), &dense);
        let (ideal, _) = on_the_cpu(&step, projection);
        let of_method = relative(&layer_output(&step, &ideal), &dense);
        assert!(of_method > 1e-3 && of_method < 0.3, "{name}: the method loses {of_method}");
        assert!((lost - of_method).abs() < 2e-3 + 0.05 * of_method, "{name}: {lost}, the method {of_method}");
    }
}

/// Ranks that keep everything: what is left is the rounding of f16.
fn full_ranks_are_dense_attention<R: Rig>(rig: &R) {
    let model = 41;
    let plan = plan(&Layer::new(512, model, 1), |_| RankPlan::full(&[shape()]));
    let layer = Layer::new(tokens(), model, 100);
    let step = Step::new(&plan.layers()[0], &layer, Values::Folded);
    let mut pages = rig.poisoned::<f16>(step.pages * step.layout().page_elements());
    let found = on_the_device(rig, &step, &mut pages);
    let lost = relative(&layer_output(&step, &found), &dense_output(&layer));
    assert!(lost < 2e-3, "on {}: {lost}", rig.name());
}

/// Pages at the end of a pool of more than 2³² elements are appended to and read; what lies between is never touched. 32-bit
/// arithmetic, with a sign or without, would meet pages at the start, which belong to others.
fn pages_past_2_to_the_32_elements<R: Rig>(rig: &R) {
    let model = 40;
    let plan = plan(&Layer::new(512, model, 1), |planner| planner.within(KV_HEADS * DIM * 2));
    let layer = Layer::new(tokens(), model, 100);
    let near = Step::new(&plan.layers()[0], &layer, Values::Folded);
    let page = near.layout().page_elements();
    let before = (1usize << 32).div_ceil(page);
    // Odd pages go where 32 bits see the even page before them.
    let moved = |id: &u32| if id.is_multiple_of(2) { *id } else { *id - 1 + before as u32 };
    let far = Step {
        pages: near.pages + before,
        tables: near.tables.iter().map(|table| table.iter().map(moved).collect()).collect(),
        ..Step::new(near.projection, &layer, Values::Folded)
    };
    let starts = far.tables.iter().flatten().map(|id| *id as usize * page);
    assert!(starts.clone().any(|start| start > u32::MAX as usize) && starts.min() < Some(page * near.pages));
    let Some(mut pages) = zeroed_or_skip::<_, f16>(rig, far.pages * page, "pages_past_2_to_the_32_elements")
    else {
        return;
    };
    let found = on_the_device(rig, &far, &mut pages);
    let (expected, _) = on_the_cpu(&near, &stored(near.projection));
    assert_attended(&found, &expected, &format!("pages from {before} on, on {}", rig.name()));
}

#[test]
fn maps_that_the_storage_type_does_not_hold_are_refused() {
    let plan = plan(&Layer::new(512, 40, 1), |planner| planner.within(KV_HEADS * DIM * 2));
    let layer = &plan.layers()[0];
    type Map = fn(&mut HeadMaps) -> &mut Vec<f32>;
    let maps: [(&str, Map); 4] = [
        ("query", |maps| &mut maps.query),
        ("key", |maps| &mut maps.key),
        ("value", |maps| &mut maps.value),
        ("output", |maps| &mut maps.output),
    ];
    for (named, map) in maps {
        let mut heads = layer.heads().to_vec();
        let at = map(&mut heads[0]).len() + 3;
        let mut with = |x: f32| {
            map(&mut heads[1])[3] = x;
            LayerProjection::from_maps(*layer.shape(), layer.ranks().clone(), heads.clone())
        };
        let refused = |error: &Error| matches!(error, Error::NotFinite { argument, index, .. } if (*argument, *index) == (named, at));
        let error = with(f32::NAN).expect_err("NaN");
        assert!(refused(&error), "{named}, element {at}: {error}");
        let large = with(1e6).expect("finite maps");
        let error = PackedMaps::<f16>::new(&large).expect_err("1e6 is infinite in f16");
        assert!(refused(&error), "{named}, element {at}: {error}");
        assert!(PackedMaps::<half::bf16>::new(&large).is_ok(), "{named}");
    }
}

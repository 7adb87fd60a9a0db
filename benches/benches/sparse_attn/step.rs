//! A whole sparse step of one layer: contexts of 32K and 128K, 2048 tokens read. The dense decode of the same contexts is
//! `attention/decode`.
//!
//! The plain names repeat a step whose pages are all resident. Steps of `-misses` go on through a text: queries drift, so that part of
//! what they select has to be fetched, and every 16th fills a page, which is closed, summarised and written back.

use std::sync::Arc;

use ::sparse_attn::gpu::{Extent, Memories, NewTokens, State, Step, StepArgs, StepConfig, StepPlan, Tables};
use ::sparse_attn::metadata::NONE;
use ::sparse_attn::{Config, Plan};
use criterion::Criterion;
use half::bf16;
use longkv_attention::gpu::Splits;
use longkv_attention::testing::Inputs;
use longkv_attention::{AttentionSpec, HeadShape, Mask, Score};
use longkv_benches::data::{Vectors, poisoned};
use longkv_benches::{Case, GpuBench, Steps, Work, check};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::driver::{GpuFunction, Mapped, MappedKind};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

use super::select::Summaries;

const DIM: usize = 128;
const PAGE: usize = 16;
/// Host pages that all requests share.
const HOST_PAGES: usize = 64;
/// (Requests of 8 KV heads, tokens of each).
const CASES: [(usize, usize); 4] = [(1, 32 << 10), (1, 128 << 10), (8, 32 << 10), (8, 128 << 10)];
/// Steps of a text before it starts again.
const TEXT: usize = 64;
/// How much of a step's query comes from the one before.
const DRIFT: f32 = 0.995;

pub(super) fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "sparse-attn/step", "bf16");
    for (requests, tokens) in CASES {
        let name = format!("{requests}x{}K", tokens >> 10);
        bench.case(&mut group, &name, |case| Layer::new(case, requests, tokens, 1).resident(case));
        bench.case(&mut group, &format!("{name}-misses"), |case| {
            Layer::new(case, requests, tokens, TEXT).drifting(case);
        });
    }
}

/// What a step changes.
struct Changed {
    owners: CudaSlice<u32>,
    ages: CudaSlice<u8>,
    dirty: CudaSlice<u8>,
    slot_table: CudaSlice<u32>,
    open_table: CudaSlice<u32>,
    closed: CudaSlice<u32>,
    partitions: CudaSlice<u32>,
    epoch: CudaSlice<u32>,
    counts: CudaSlice<u64>,
    rows: CudaSlice<u32>,
    summaries: CudaSlice<bf16>,
    runs: CudaSlice<bf16>,
    host: Mapped<u8>,
    out: CudaSlice<bf16>,
    lse: CudaSlice<f32>,
    status: StatusWord,
}

impl Changed {
    /// Makes the tables those of a `copy`. Keys, values and summaries stay: a page is made again before it is read.
    fn reset(&mut self, copy: &Tables, stream: &Arc<CudaStream>) {
        let words = [
            (&copy.owners, &mut self.owners),
            (&copy.slot_table, &mut self.slot_table),
            (&copy.open_table, &mut self.open_table),
            (&copy.closed, &mut self.closed),
            (&copy.partitions, &mut self.partitions),
            (&copy.epoch, &mut self.epoch),
            (&copy.rows, &mut self.rows),
        ];
        for (from, to) in words {
            stream.memcpy_htod(from, to).expect("copy");
        }
        stream.memcpy_htod(&copy.ages, &mut self.ages).expect("copy");
        stream.memcpy_htod(&copy.dirty, &mut self.dirty).expect("copy");
        stream.memcpy_htod(&copy.counts, &mut self.counts).expect("copy");
    }

    fn tables(&self, stream: &Arc<CudaStream>) -> Tables {
        let words = |words: &CudaSlice<u32>| check::download(stream, words, 0, words.len());
        Tables {
            owners: words(&self.owners),
            ages: check::download(stream, &self.ages, 0, self.ages.len()),
            dirty: check::download(stream, &self.dirty, 0, self.dirty.len()),
            slot_table: words(&self.slot_table),
            open_table: words(&self.open_table),
            closed: words(&self.closed),
            partitions: words(&self.partitions),
            epoch: words(&self.epoch),
            counts: check::download(stream, &self.counts, 0, self.counts.len()),
            rows: words(&self.rows),
        }
    }
}

/// One layer of some requests on the device.
struct Layer {
    requests: usize,
    tokens: usize,
    plan: StepPlan,
    step: Step<GpuFunction, bf16>,
    changed: Changed,
    /// Keys and values in host memory `[HOST_PAGES, 8, K|V, PAGE, DIM]`.
    host_vectors: Vec<bf16>,
    host_table: CudaSlice<u32>,
    budget: CudaSlice<u32>,
    /// Lengths of each step `[steps, requests]`.
    lens: CudaSlice<u32>,
    /// Queries of each step `[steps, requests, 32, DIM]`, and those of the first on the host.
    queries: CudaSlice<bf16>,
    first_queries: Vec<bf16>,
    /// New keys, which are the values too `[requests, 8, DIM]`.
    new: Vectors<bf16>,
    new_device: CudaSlice<bf16>,
    workspace: Workspace,
    side: Arc<CudaStream>,
}

impl Layer {
    fn new(case: &Case<'_, '_>, requests: usize, tokens: usize, steps: usize) -> Self {
        let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
        let shape = HeadShape::new(32, 8, DIM, DIM).expect("a valid shape");
        let spec = AttentionSpec { shape, score: score(), mask: Mask::Causal };
        let plan = Plan::new(&Config::quest(2048), &[spec]).expect("a valid configuration");
        let extent = Extent::of(&plan, requests, tokens + PAGE + steps, PAGE, 5.0).expect("fixed partitions");
        let extent = Extent { host_pages: HOST_PAGES, ..extent };
        let plan = StepPlan::new(
            &plan,
            0,
            StepConfig {
                extent,
                prompt_tokens: 1,
                splits: Splits::Balanced,
                link_blocks: 8,
                sm_count: gpu.sm_count(),
            },
        )
        .expect("a valid plan");
        let step = Step::<_, bf16>::prepare(gpu, &plan).expect("prepare");
        let rows = requests * 8;
        let upload = |words: &[u32]| stream.clone_htod(words).expect("copy");
        // All tokens but the new one are in closed pages.
        let tables = plan.tables();
        let bytes = HOST_PAGES * 8 * extent.page.bytes();
        let mut host = Mapped::<u8>::zeroed(gpu, bytes, MappedKind::Cached).expect("pinned memory");
        let host_vectors: Vec<bf16> = Inputs::Normal.generate(HOST_PAGES * 8 * 2 * PAGE, DIM, 2);
        host.write().expect("host memory").copy_from_slice(bytemuck::cast_slice(&host_vectors));
        let table: Vec<u32> =
            (0..requests * extent.max_pages).map(|page| (page % HOST_PAGES) as u32).collect();
        let lens: Vec<u32> = (0..steps).flat_map(|step| vec![(tokens + 1 + step) as u32; requests]).collect();
        let queries = drifting(requests * 32, steps);
        let new = Vectors::<bf16>::new(DIM, 4);
        let changed = Changed {
            owners: upload(&tables.owners),
            ages: stream.clone_htod(&tables.ages).expect("copy"),
            dirty: stream.clone_htod(&tables.dirty).expect("copy"),
            slot_table: upload(&tables.slot_table),
            open_table: upload(&tables.open_table),
            closed: upload(&vec![tokens as u32; rows]),
            partitions: upload(&vec![(tokens / PAGE) as u32; rows]),
            epoch: upload(&tables.epoch),
            counts: stream.clone_htod(&tables.counts).expect("copy"),
            rows: upload(&tables.rows),
            summaries: Summaries::new(1).upload(&stream, plan.summary_elements()),
            runs: poisoned(&stream, extent.runs * extent.page.elements()),
            host,
            out: poisoned(&stream, requests * 32 * DIM),
            lse: poisoned(&stream, requests * 32),
            status: StatusWord::new(&stream).expect("allocate"),
        };
        let layer = Layer {
            requests,
            tokens,
            step,
            changed,
            host_vectors,
            host_table: upload(&table),
            budget: upload(&vec![extent.max_selected as u32; rows]),
            lens: upload(&lens),
            queries: stream.clone_htod(&queries).expect("copy"),
            first_queries: queries[..requests * 32 * DIM].to_vec(),
            new_device: new.upload(&stream, requests * 8),
            new,
            workspace: Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate"),
            side: case.bench.second_stream(),
            plan,
        };
        stream.synchronize().expect("the copies ran");
        layer
    }

    /// The same step again and again.
    fn resident(self, case: &mut Case<'_, '_>) {
        let selected = self.plan.config().extent.max_selected;
        let work =
            Work::new(self.plan.bytes_moved(self.tokens / PAGE, selected), 0).note("all pages resident");
        self.time(case, work, 1, None);
    }

    /// Steps of a text, from a state in which the pages of its beginning are resident.
    fn drifting(mut self, case: &mut Case<'_, '_>) {
        let stream = case.bench.stream.clone();
        let extent = self.plan.config().extent;
        // What the text misses is counted in a first reading, after a step that makes its beginning resident.
        self.launch(0, &stream);
        let begun = self.changed.tables(&stream);
        (0..TEXT).for_each(|step| self.launch(step, &stream));
        check::no_fault(&stream, &self.changed.status);
        let counts =
            |tables: &Tables, which: usize| tables.counts.chunks_exact(8).map(|row| row[which]).sum::<u64>();
        let read = self.changed.tables(&stream);
        let of_text = |which: usize| counts(&read, which) - counts(&begun, which);
        let (selected, misses, written) = (of_text(1), of_text(3), of_text(6));
        assert!(misses > 0 && written > 0, "{misses} pages missed, {written} written back");
        self.changed.reset(&begun, &stream);
        let link = (misses + written) * extent.page.bytes() as u64 / TEXT as u64;
        let note = format!(
            "{TEXT} steps of a text in turn: {:.1} % of the pages selected are fetched, {written} pages written back",
            100.0 * misses as f64 / selected as f64
        );
        let work = Work::new(self.plan.bytes_moved(self.tokens / PAGE, extent.max_selected), 0);
        self.time(case, work.over_link(link).note(note), TEXT, Some(begun));
    }

    fn time(self, case: &mut Case<'_, '_>, work: Work, count: usize, begun: Option<Tables>) {
        let stream = case.bench.stream.clone();
        let resident = begun.is_none();
        let steps = Steps {
            count,
            launch: |layer: &mut Layer, step, stream: &Arc<CudaStream>| layer.launch(step, stream),
            reset: |layer: &mut Layer, stream: &Arc<CudaStream>| {
                if let Some(begun) = &begun {
                    layer.changed.reset(begun, stream);
                }
            },
        };
        let layer = case.time_steps(work, self, steps, |layer, stream| {
            check::no_fault(stream, &layer.changed.status);
            if resident {
                layer.check_first(stream);
            }
        });
        check::no_fault(&stream, &layer.changed.status);
    }

    fn launch(&mut self, step: usize, stream: &Arc<CudaStream>) {
        let (requests, q_len) = (self.requests, self.requests * 32 * DIM);
        let (queries, all_lens) = (View::device(&self.queries, stream), View::device(&self.lens, stream));
        let lens = all_lens.part(step * requests..(step + 1) * requests).expect("a step");
        let k = View::device(&self.new_device, stream);
        let changed = &mut self.changed;
        let args = StepArgs {
            q: &queries.part(step * q_len..(step + 1) * q_len).expect("a step"),
            new: NewTokens { k: &k, v: &k, kv_len: &lens, new_len: None },
            budget: &View::device(&self.budget, stream),
            state: State {
                owners: ViewMut::device(&mut changed.owners, stream),
                ages: ViewMut::device(&mut changed.ages, stream),
                dirty: ViewMut::device(&mut changed.dirty, stream),
                slot_table: ViewMut::device(&mut changed.slot_table, stream),
                open_table: ViewMut::device(&mut changed.open_table, stream),
                closed: ViewMut::device(&mut changed.closed, stream),
                partitions: ViewMut::device(&mut changed.partitions, stream),
                epoch: ViewMut::device(&mut changed.epoch, stream),
                counts: ViewMut::device(&mut changed.counts, stream),
                summaries: ViewMut::device(&mut changed.summaries, stream),
                rows: ViewMut::device(&mut changed.rows, stream),
            },
            memories: Memories {
                runs: ViewMut::device(&mut changed.runs, stream),
                host: changed.host.view_mut(stream),
                host_table: &View::device(&self.host_table, stream),
            },
            out: ViewMut::device(&mut changed.out, stream),
            lse: ViewMut::device(&mut changed.lse, stream),
            status: changed.status.view_mut(stream),
        };
        self.step.run(stream, &self.side, args, self.workspace.view_mut(stream)).expect("run");
    }

    /// After the first step of all the owners of slots are the pages that it selected.
    fn check_first(&self, stream: &Arc<CudaStream>) {
        let extent = self.plan.config().extent;
        for (request, head) in [(0, 0), (self.requests - 1, 31)] {
            let (row, kv_head) = (request * 32 + head, head / 4);
            let slots = check::download(
                stream,
                &self.changed.owners,
                (request * 8 + kv_head) * extent.slots,
                extent.slots,
            );
            let pages: Vec<usize> =
                slots.into_iter().filter(|page| *page != NONE).map(|page| page as usize).collect();
            let most = extent.max_selected;
            assert!(
                (most - 1..=most).contains(&pages.len()),
                "row {row} selected {} of {most} pages",
                pages.len()
            );
            let new = self.new.get(request * 8 + kv_head);
            let at = |token: usize, part: usize| {
                let Some(page) = pages.get(token / PAGE) else { return new };
                let host_page = (request * extent.max_pages + page) % HOST_PAGES;
                &self.host_vectors[(((host_page * 8 + kv_head) * 2 + part) * PAGE + token % PAGE) * DIM..]
                    [..DIM]
            };
            let q = &self.first_queries[row * DIM..][..DIM];
            let keys = pages.len() * PAGE + 1;
            let expected = check::attention(score(), q, keys, |t| at(t, 0), |t| at(t, 1));
            check::rows(stream, &self.changed.out, &self.changed.lse, &[(row, expected)]);
        }
    }
}

fn score() -> Score {
    Score::new(0.088).expect("a finite scale")
}

/// Queries `[steps, heads, DIM]`, each step's near those of the one before.
fn drifting(heads: usize, steps: usize) -> Vec<bf16> {
    let mut queries = Inputs::Normal.values(heads, DIM, 3);
    let mut all = Vec::with_capacity(steps * queries.len());
    for step in 0..steps {
        all.extend(queries.iter().map(|x| bf16::from_f32(*x)));
        let news = Inputs::Normal.values(heads, DIM, 100 + step as u64);
        for (q, new) in queries.iter_mut().zip(news) {
            *q = DRIFT * *q + (1.0 - DRIFT * DRIFT).sqrt() * new;
        }
    }
    all
}

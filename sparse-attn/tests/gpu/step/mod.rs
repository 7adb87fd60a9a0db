//! The whole step and the CPU's cache, driven with the same tokens: the same slots, ages, hits and victims after every step, the same
//! bytes in both memories, and the same attention.

use std::cell::RefCell;

use attention::gpu::Splits;
use attention::testing::Rng;
use attention::{AttentionSpec, DType, FaultCode, HeadShape, Mask, Score};
use cuda::params::SparseCounts;
use cuda::status::Fault;
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, gpu_or_skip};
use half::f16;
use sparse_attn::gpu::{
    Extent, Memories, NewTokens, PrefetchArgs, PromptArgs, State, Step, StepArgs, StepConfig, StepPlan,
    Tables,
};
use sparse_attn::metadata::{Metadata, NONE};
use sparse_attn::select::Aggregation;
use sparse_attn::{Cache, Capacity, Config, Counters, Error, Plan, Queries, RequestId, Tokens};

mod refusals;
mod replay;
mod requests;
mod trace;

const DIM: usize = 64;
const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const REQUESTS: usize = 3;
const MAX_TOKENS: usize = 256;
const PROMPT: usize = 200;

/// Scores of small integers are exact on both sides, whatever the order of their sums.
fn config() -> Config {
    Config { dtype: DType::F16, buffering: 1.0, aggregation: Aggregation::Raw, ..Config::quest(96) }
}

fn spec() -> AttentionSpec {
    let shape = HeadShape::new(Q_HEADS, KV_HEADS, DIM, DIM).unwrap();
    AttentionSpec { shape, score: Score::new(0.01).unwrap(), mask: Mask::Causal }
}

/// Queries, keys and values of one request.
struct Text {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Text {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        // Keys that drift, so that selections of neighbouring steps resemble each other.
        let mut integers = |vectors: usize, period: usize| {
            let base: Vec<f32> = (0..DIM).map(|_| rng.below(5) as f32 - 2.0).collect();
            (0..vectors * DIM)
                .map(|i| if rng.below(period) == 0 { rng.below(7) as f32 - 3.0 } else { base[i % DIM] })
                .collect::<Vec<f32>>()
        };
        let (q, k) = (integers(MAX_TOKENS * Q_HEADS, 2), integers(MAX_TOKENS * KV_HEADS, 1));
        let v = (0..MAX_TOKENS * KV_HEADS * DIM).map(|_| f16::from_f64(rng.normal()).to_f32()).collect();
        Text { q, k, v }
    }

    fn tokens(&self, range: std::ops::Range<usize>) -> Tokens<'_> {
        let part = range.start * KV_HEADS * DIM..range.end * KV_HEADS * DIM;
        Tokens { k: &self.k[part.clone()], k_unrotated: None, v: &self.v[part] }
    }

    fn queries(&self, token: usize) -> Queries<'_> {
        Queries { q: &self.q[token * Q_HEADS * DIM..(token + 1) * Q_HEADS * DIM], q_unrotated: None }
    }
}

/// One layer on the device.
struct Layer<'r, R: Rig> {
    rig: &'r R,
    plan: StepPlan,
    step: Step<R::Function, f16>,
    owners: RefCell<R::Buffer<u32>>,
    ages: RefCell<R::Buffer<u8>>,
    dirty: RefCell<R::Buffer<u8>>,
    slot_table: RefCell<R::Buffer<u32>>,
    open_table: RefCell<R::Buffer<u32>>,
    closed: RefCell<R::Buffer<u32>>,
    partitions: RefCell<R::Buffer<u32>>,
    epoch: RefCell<R::Buffer<u32>>,
    counts: RefCell<R::Buffer<u64>>,
    summaries: RefCell<R::Buffer<f16>>,
    rows: RefCell<R::Buffer<u32>>,
    runs: RefCell<R::Buffer<f16>>,
    host: RefCell<R::Buffer<u8>>,
    host_table: RefCell<R::Buffer<u32>>,
    workspace: RefCell<R::Workspace>,
    status: RefCell<R::Buffer<u64>>,
    out: RefCell<R::Buffer<f16>>,
    lse: RefCell<R::Buffer<f32>>,
}

/// Borrowed buffers of a [`Layer`], as arguments; a macro, because each borrow is a variable of the caller.
macro_rules! arguments {
    ($layer:ident, |$state:ident, $memories:ident, $status:ident, $workspace:ident| $run:expr) => {{
        let rig = $layer.rig;
        let (mut owners, mut ages) = ($layer.owners.borrow_mut(), $layer.ages.borrow_mut());
        let (mut dirty, mut counts) = ($layer.dirty.borrow_mut(), $layer.counts.borrow_mut());
        let (mut slots, mut open) = ($layer.slot_table.borrow_mut(), $layer.open_table.borrow_mut());
        let (mut closed, mut partitions) = ($layer.closed.borrow_mut(), $layer.partitions.borrow_mut());
        let (mut epoch, mut summaries) = ($layer.epoch.borrow_mut(), $layer.summaries.borrow_mut());
        let (mut runs, mut host) = ($layer.runs.borrow_mut(), $layer.host.borrow_mut());
        let (host_table, mut status) = ($layer.host_table.borrow(), $layer.status.borrow_mut());
        let (mut workspace, mut states) = ($layer.workspace.borrow_mut(), $layer.rows.borrow_mut());
        let host_table = rig.view(&host_table);
        let $state = State {
            owners: rig.view_mut(&mut owners),
            ages: rig.view_mut(&mut ages),
            dirty: rig.view_mut(&mut dirty),
            slot_table: rig.view_mut(&mut slots),
            open_table: rig.view_mut(&mut open),
            closed: rig.view_mut(&mut closed),
            partitions: rig.view_mut(&mut partitions),
            epoch: rig.view_mut(&mut epoch),
            counts: rig.view_mut(&mut counts),
            summaries: rig.view_mut(&mut summaries),
            rows: rig.view_mut(&mut states),
        };
        let $memories = Memories {
            runs: rig.view_mut(&mut runs),
            host: rig.view_mut(&mut host),
            host_table: &host_table,
        };
        let $status = rig.view_mut(&mut status);
        let $workspace = rig.workspace_view(&mut workspace);
        $run.unwrap_or_else(|error| panic!("on {}: {error}", rig.name()));
    }};
}

impl<'r, R: Rig> Layer<'r, R> {
    fn new(rig: &'r R) -> Self {
        Self::with(rig, Splits::Balanced)
    }

    fn with(rig: &'r R, splits: Splits) -> Self {
        let plan = Plan::new(&config(), &[spec()]).unwrap();
        let extent = Extent::of(&plan, REQUESTS, MAX_TOKENS, PROMPT, 1.0).unwrap();
        let plan = StepPlan::new(
            &plan,
            0,
            StepConfig {
                extent,
                prompt_tokens: PROMPT,
                splits,
                link_blocks: 2,
                sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
            },
        )
        .unwrap();
        let tables = plan.tables();
        assert_eq!(tables.check(&extent), None);
        let page = &extent.page;
        let host_table: Vec<u32> = attention::testing::shuffled_pages(REQUESTS * extent.max_pages, 3);
        Layer {
            step: Step::prepare(rig.device(), &plan).unwrap(),
            owners: RefCell::new(rig.upload(&tables.owners)),
            ages: RefCell::new(rig.upload(&tables.ages)),
            dirty: RefCell::new(rig.upload(&tables.dirty)),
            slot_table: RefCell::new(rig.upload(&tables.slot_table)),
            open_table: RefCell::new(rig.upload(&tables.open_table)),
            closed: RefCell::new(rig.upload(&tables.closed)),
            partitions: RefCell::new(rig.upload(&tables.partitions)),
            epoch: RefCell::new(rig.upload(&tables.epoch)),
            counts: RefCell::new(rig.upload(&tables.counts)),
            rows: RefCell::new(rig.upload(&tables.rows)),
            summaries: RefCell::new(rig.poisoned(plan.summary_elements())),
            runs: RefCell::new(rig.poisoned(extent.runs * page.elements())),
            host: RefCell::new(rig.pin(&vec![0xff; extent.host_pages * KV_HEADS * page.bytes()])),
            host_table: RefCell::new(rig.upload(&host_table)),
            workspace: RefCell::new(rig.workspace(plan.workspace())),
            status: RefCell::new(rig.zeroed(1)),
            out: RefCell::new(rig.poisoned(REQUESTS * Q_HEADS * DIM)),
            lse: RefCell::new(rig.poisoned(REQUESTS * Q_HEADS)),
            rig,
            plan,
        }
    }

    fn prompt(&self, k: &R::Buffer<f16>, v: &R::Buffer<f16>, kv_len: &R::Buffer<u32>) {
        self.ragged_prompt(k, v, kv_len, None);
    }

    fn ragged_prompt(
        &self,
        k: &R::Buffer<f16>,
        v: &R::Buffer<f16>,
        kv_len: &R::Buffer<u32>,
        new_len: Option<&R::Buffer<u32>>,
    ) {
        let (k, v, kv_len) = (self.rig.view(k), self.rig.view(v), self.rig.view(kv_len));
        let new_len = new_len.map(|new_len| self.rig.view(new_len));
        let new = NewTokens { k: &k, v: &v, kv_len: &kv_len, new_len: new_len.as_ref() };
        let (layer, rig) = (self, self.rig);
        arguments!(layer, |state, memories, status, workspace| {
            let args = PromptArgs { new, state, memories, status };
            self.step.prompt(rig.queue(), args, workspace)
        });
    }

    fn run(
        &self,
        q: &R::Buffer<f16>,
        [k, v]: [&R::Buffer<f16>; 2],
        kv_len: &R::Buffer<u32>,
        budget: &R::Buffer<u32>,
    ) {
        let (k, v, kv_len) = (self.rig.view(k), self.rig.view(v), self.rig.view(kv_len));
        let new = NewTokens { k: &k, v: &v, kv_len: &kv_len, new_len: None };
        let (mut out, mut lse) = (self.out.borrow_mut(), self.lse.borrow_mut());
        let (layer, rig) = (self, self.rig);
        arguments!(layer, |state, memories, status, workspace| {
            let args = StepArgs {
                q: &rig.view(q),
                new,
                budget: &rig.view(budget),
                state,
                memories,
                out: rig.view_mut(&mut out),
                lse: rig.view_mut(&mut lse),
                status,
            };
            self.step.run(rig.queue(), rig.side_queue(), args, workspace)
        });
    }

    fn prefetch(&self, q: &R::Buffer<f16>, budget: &R::Buffer<u32>) {
        let (layer, rig) = (self, self.rig);
        arguments!(layer, |state, memories, status, workspace| {
            let args = PrefetchArgs { q: &rig.view(q), budget: &rig.view(budget), state, memories, status };
            self.step.prefetch(rig.queue(), args, workspace)
        });
    }

    fn tables(&self) -> Tables {
        let rig = self.rig;
        Tables {
            owners: rig.download(&self.owners.borrow()),
            ages: rig.download(&self.ages.borrow()),
            dirty: rig.download(&self.dirty.borrow()),
            slot_table: rig.download(&self.slot_table.borrow()),
            open_table: rig.download(&self.open_table.borrow()),
            closed: rig.download(&self.closed.borrow()),
            partitions: rig.download(&self.partitions.borrow()),
            epoch: rig.download(&self.epoch.borrow()),
            counts: rig.download(&self.counts.borrow()),
            rows: rig.download(&self.rows.borrow()),
        }
    }

    fn fault(&self) -> Option<Fault> {
        Fault::decode(self.rig.download(&self.status.borrow())[0])
    }

    fn budget(&self) -> Vec<u32> {
        vec![self.plan.config().extent.max_selected as u32; REQUESTS * KV_HEADS]
    }
}

fn halves(values: &[f32]) -> Vec<f16> {
    values.iter().map(|&x| f16::from_f32(x)).collect()
}

/// Compares the device with the cache, row by row and byte by byte.
fn compare<R: Rig>(name: &str, layer: &Layer<'_, R>, cache: &mut Cache<f16>, ids: &[RequestId]) {
    let extent = layer.plan.config().extent;
    let tables = layer.tables();
    assert_eq!(tables.check(&extent), None, "{name}");
    assert_eq!(layer.fault(), None, "{name}");
    let (runs, host) = (layer.rig.download(&layer.runs.borrow()), layer.rig.download(&layer.host.borrow()));
    let host_table = layer.rig.download(&layer.host_table.borrow());
    let elements = extent.page.elements();
    for (request, &id) in ids.iter().enumerate() {
        let mut counts = Counters::default();
        for kv_head in 0..KV_HEADS {
            let row = request * KV_HEADS + kv_head;
            let of = row * extent.slots..(row + 1) * extent.slots;
            let lru = cache.lru(id, 0, kv_head).unwrap();
            let owners: Vec<u32> = (0..lru.slots()).map(|slot| lru.metadata().owner(slot)).collect();
            assert_eq!(tables.owners[of.clone()], owners, "{name}, row {row}: owners");
            let ages = |ages: &[u8]| -> Vec<u8> {
                // Of a free slot anything.
                owners.iter().zip(ages).map(|(&page, &age)| if page == NONE { 0 } else { age }).collect()
            };
            assert_eq!(ages(&tables.ages[of.clone()]), ages(lru.ages()), "{name}, row {row}: ages");
            assert!(tables.dirty[of.clone()].iter().all(|&dirty| dirty == 0), "{name}, row {row}: in flight");
            let (k, v) = cache.read(id, 0, kv_head).unwrap();
            let place = |page: usize| {
                let at = host_table[request * extent.max_pages + page] as usize * KV_HEADS + kv_head;
                bytemuck::cast_slice::<u8, f16>(&host[at * extent.page.bytes()..][..extent.page.bytes()])
            };
            let pages = tables.closed[row] as usize / extent.page.tokens();
            for page in 0..pages {
                let of = page * extent.page.tokens() * DIM..(page + 1) * extent.page.tokens() * DIM;
                assert_eq!(place(page), [&k[of.clone()], &v[of]].concat(), "{name}, row {row}: page {page}");
            }
            for (&run, &page) in tables.slot_table[of].iter().zip(&owners).filter(|(_, page)| **page != NONE)
            {
                let run = &runs[run as usize * elements..][..elements];
                assert!(run == place(page as usize), "{name}, row {row}: page {page} in its slot");
            }
            let words = &tables.counts[row * 8..row * 8 + 8];
            let of_row = Counters::of_device(words, extent.page.bytes());
            assert_eq!(of_row.hits + of_row.misses, of_row.selected, "{name}, row {row}");
            counts += Counters { steps: 0, ..of_row };
            counts.steps = of_row.steps;
        }
        let expected = cache.layer_counters(id, 0).unwrap();
        let plain = |c: &Counters| {
            [c.steps, c.selected, c.hits, c.misses, c.evicted, c.prefetched, c.bytes_in, c.bytes_out]
        };
        assert_eq!(plain(&counts), plain(&expected), "{name}, request {request}: counts");
    }
    // Places without a request are as they were.
    let (fresh, row) = (layer.plan.tables(), ids.len() * KV_HEADS);
    let slots = row * extent.slots..;
    assert_eq!(tables.owners[slots.clone()], fresh.owners[slots.clone()], "{name}: nobody's owners");
    assert_eq!(tables.ages[slots.clone()], fresh.ages[slots.clone()], "{name}: nobody's ages");
    assert_eq!(tables.slot_table[slots.clone()], fresh.slot_table[slots], "{name}: nobody's runs");
    assert_eq!(tables.counts[row * 8..], fresh.counts[row * 8..], "{name}: nobody's counts");
}

/// A whole step or prompt is refused before any of it is enqueued: its tables are as they were.
#[test]
fn host_pages_on_the_device_are_refused() {
    use cuda::memory::{Space, ViewMut};
    emulator::emulator_or_skip!();
    let rig = &EmulatorRig::new(Order::Forward);
    let layer = Layer::new(rig);
    let vectors = rig.zeroed::<f16>(REQUESTS * PROMPT * KV_HEADS * DIM);
    let lens = rig.upload(&[1u32, 0, 0]);
    let (k, v, kv_len) = (rig.view(&vectors), rig.view(&vectors), rig.view(&lens));
    let before = layer.tables();
    arguments!(layer, |state, memories, status, workspace| {
        // SAFETY: refused before anybody follows the address.
        let host = unsafe { ViewMut::from_raw(4096, memories.host.len(), Space::Device(0)) };
        let new = NewTokens { k: &k, v: &v, kv_len: &kv_len, new_len: None };
        let args = PromptArgs { new, state, memories: Memories { host, ..memories }, status };
        let refused = layer.step.prompt(rig.queue(), args, workspace).expect_err("refused").to_string();
        assert!(refused.contains("`host`") && refused.contains("pinned memory of the host"), "{refused}");
        Ok::<(), Error>(())
    });
    assert_eq!(layer.tables(), before);
}

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

emulator::device_test!(faults_harm_their_row_alone, prompts_continue_beside_decoding_requests);

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
            host: RefCell::new(rig.poisoned(extent.host_pages * KV_HEADS * page.bytes())),
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

/// On a GPU what crosses the link runs on a stream of its own.
mod every_step_equals_the_cache {
    use super::*;

    #[test]
    fn emulator() {
        emulator::emulator_or_skip!();
        for order in Order::ALL {
            drive(&EmulatorRig::new(order));
        }
    }

    #[test]
    fn gpu() {
        if let Some(rig) = gpu_or_skip("step::every_step_equals_the_cache") {
            drive(&rig.on_own_stream().expect("streams of its own"));
        }
    }
}

fn drive<R: Rig>(rig: &R) {
    const STEPS: usize = 34;
    // A long prompt, a short one that becomes too long for the budget on the way, and a place without a request.
    let prompts = [PROMPT, 86];
    let texts = [Text::new(1), Text::new(2)];
    let plan = Plan::new(&config(), &[spec()]).unwrap();
    let mut cache = Cache::<f16>::new(plan.clone(), Capacity::of_requests(&plan, 2, MAX_TOKENS)).unwrap();
    let ids: Vec<RequestId> = (0..2).map(|_| cache.try_admit().unwrap()).collect();
    let layer = Layer::new(rig);
    assert_eq!(cache.lru(ids[0], 0, 0).unwrap().slots(), layer.plan.config().extent.slots);

    let (mut k, mut v) = (vec![f16::NAN; REQUESTS * PROMPT * KV_HEADS * DIM], Vec::new());
    v.clone_from(&k);
    for (request, (text, &len)) in texts.iter().zip(&prompts).enumerate() {
        let tokens = text.tokens(0..len);
        let (mut out, mut lse) = (vec![0.0; len * Q_HEADS * DIM], vec![0.0; len * Q_HEADS]);
        let queries = Queries { q: &text.q[..len * Q_HEADS * DIM], q_unrotated: None };
        cache.prefill(ids[request], 0, &queries, &tokens, &mut out, &mut lse).unwrap();
        // Aligned to the end.
        let at = ((request + 1) * PROMPT - len) * KV_HEADS * DIM;
        k[at..][..tokens.k.len()].copy_from_slice(&halves(tokens.k));
        v[at..][..tokens.v.len()].copy_from_slice(&halves(tokens.v));
    }
    let lens = |step: usize| [(prompts[0] + step) as u32, (prompts[1] + step) as u32, 0];
    layer.prompt(&rig.upload(&k), &rig.upload(&v), &rig.upload(&lens(0)));
    compare(&format!("prompts on {}", rig.name()), &layer, &mut cache, &ids);

    let budget = rig.upload(&layer.budget());
    for step in 0..STEPS {
        let name = format!("step {step} on {}", rig.name());
        let mut q = vec![f16::NAN; REQUESTS * Q_HEADS * DIM];
        let (mut k, mut v) = (vec![f16::NAN; REQUESTS * KV_HEADS * DIM], Vec::new());
        v.clone_from(&k);
        let (mut expected, mut expected_lse) = (Vec::new(), Vec::new());
        let mut dense = Vec::new();
        for (request, (text, &len)) in texts.iter().zip(&prompts).enumerate() {
            let (tokens, queries) = (text.tokens(len + step..len + step + 1), text.queries(len + step));
            q[request * Q_HEADS * DIM..][..Q_HEADS * DIM].copy_from_slice(&halves(queries.q));
            k[request * KV_HEADS * DIM..][..KV_HEADS * DIM].copy_from_slice(&halves(tokens.k));
            v[request * KV_HEADS * DIM..][..KV_HEADS * DIM].copy_from_slice(&halves(tokens.v));
            let (mut out, mut lse) = (vec![0.0; Q_HEADS * DIM], vec![0.0; Q_HEADS]);
            cache.decode(ids[request], 0, &queries, &tokens, &mut out, &mut lse).unwrap();
            dense.push(cache.is_dense(ids[request], 0).unwrap());
            expected.extend(out);
            expected_lse.extend(lse);
        }
        assert_eq!(dense, [false, step < 10], "{name}");
        let (q, k, v) = (rig.upload(&q), rig.upload(&k), rig.upload(&v));
        layer.run(&q, [&k, &v], &rig.upload(&lens(step + 1)), &budget);
        // The cache writes pages back when the next step begins.
        ids.iter().for_each(|&id| cache.write_back(id, 0).unwrap());
        compare(&name, &layer, &mut cache, &ids);
        let (out, lse) = (rig.download(&layer.out.borrow()), rig.download(&layer.lse.borrow()));
        for (i, (&found, &expected)) in out.iter().zip(&expected).enumerate() {
            let (found, allowed) = (found.to_f32(), 2e-3 + 2e-3 * expected.abs());
            assert!((found - expected).abs() <= allowed, "{name}: out {i} is {found}, not {expected}");
        }
        for (i, (&found, &expected)) in lse.iter().zip(&expected_lse).enumerate() {
            assert!((found - expected).abs() <= 1e-3, "{name}: lse {i} is {found}, not {expected}");
        }
        assert!(out[2 * Q_HEADS * DIM..].iter().all(|&x| x == f16::ZERO), "{name}: nobody's output");
        assert_eq!(lse[2 * Q_HEADS..], [f32::NEG_INFINITY; Q_HEADS], "{name}: nobody's lse");

        if step % 4 == 3 {
            for (text, (&id, &len)) in texts.iter().zip(ids.iter().zip(&prompts)) {
                let selection = cache.select(id, 0, &text.queries(len + step + 1)).unwrap();
                cache.prefetch(id, &selection).unwrap();
            }
            let mut q = vec![f16::NAN; REQUESTS * Q_HEADS * DIM];
            for (request, (text, &len)) in texts.iter().zip(&prompts).enumerate() {
                let queries = halves(text.queries(len + step + 1).q);
                q[request * Q_HEADS * DIM..][..Q_HEADS * DIM].copy_from_slice(&queries);
            }
            layer.prefetch(&rig.upload(&q), &budget);
            compare(&format!("prefetch after {name}"), &layer, &mut cache, &ids);
        }
    }
    let counters = cache.counters();
    assert!(counters.hits > 0 && counters.misses > 0 && counters.evicted > 0, "{counters:?}");
    assert!(counters.prefetched > 0 && counters.dense_steps > 0, "{counters:?}");
    let mut workspace = layer.workspace.borrow_mut();
    assert!(rig.counters_are_zero(&mut workspace, layer.plan.workspace()), "on {}", rig.name());
}

/// A host page out of range is zeros and a fault, a budget past the plan's selects nothing; the other rows do not notice.
fn faults_harm_their_row_alone<R: Rig>(rig: &R) {
    let text = Text::new(5);
    let extent = Layer::new(rig).plan.config().extent;
    let run = |host_page: Option<u32>, budget: Option<u32>| {
        // What others read must not even change how a row is split.
        let layer = Layer::with(rig, Splits::Fixed { tokens: 64 });
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for _ in 0..REQUESTS {
            k.extend(halves(text.tokens(0..PROMPT).k));
            v.extend(halves(text.tokens(0..PROMPT).v));
        }
        let lens = rig.upload(&[PROMPT as u32; REQUESTS]);
        layer.prompt(&rig.upload(&k), &rig.upload(&v), &lens);
        if let Some(page) = host_page {
            let at = extent.max_pages; // of request 1
            rig.write(&mut layer.host_table.borrow_mut(), at, &vec![page; extent.max_pages]);
        }
        let mut budgets = layer.budget();
        if let Some(budget) = budget {
            budgets[KV_HEADS] = budget; // of row 2, request 1
        }
        let q = halves(text.queries(PROMPT).q).repeat(REQUESTS);
        let (k, v) = (text.tokens(PROMPT..PROMPT + 1).k, text.tokens(PROMPT..PROMPT + 1).v);
        let (k, v) = (halves(k).repeat(REQUESTS), halves(v).repeat(REQUESTS));
        let lens = rig.upload(&[PROMPT as u32 + 1; REQUESTS]);
        let again = || {
            rig.write(&mut layer.status.borrow_mut(), 0, &[0u64]);
            layer.run(&rig.upload(&q), [&rig.upload(&k), &rig.upload(&v)], &lens, &rig.upload(&budgets));
            let bits: Vec<u16> = rig.download(&layer.out.borrow()).iter().map(|x| x.to_bits()).collect();
            (bits, rig.download(&layer.lse.borrow()), layer.fault())
        };
        let first = again();
        if let Some(fault) = first.2 {
            // What did not arrive is no hit the next time.
            let second = again();
            let name = format!("{host_page:?}, {budget:?} on {}", rig.name());
            assert_eq!(second.2.map(|fault| fault.code), Some(fault.code), "{name}: twice");
        }
        (first.0, first.1, first.2, layer.tables())
    };
    let name = format!("on {}", rig.name());
    let (good, _, fault, tables) = run(None, None);
    assert_eq!(fault, None, "{name}");
    let counts: SparseCounts = bytemuck::cast_slice(&tables.counts[..8])[0];
    assert!(counts.misses > 0, "{name}: {counts:?}");
    let of_request = Q_HEADS * DIM;
    let others = |out: &[u16]| [&out[..of_request], &out[2 * of_request..]].concat();
    for (case, host_page, budget, code) in [
        ("host page", Some(u32::MAX), None, FaultCode::BadPage),
        ("budget", None, Some(extent.max_selected as u32 + 1), FaultCode::BadLength),
    ] {
        let (out, lse, fault, after) = run(host_page, budget);
        let fault = fault.unwrap_or_else(|| panic!("{case} {name}: nothing reported"));
        assert_eq!(fault.code, code as u32, "{case} {name}");
        assert!((KV_HEADS..2 * KV_HEADS).contains(&(fault.index as usize)), "{case} {name}: {fault:?}");
        assert!(others(&out) == others(&good), "{case} {name}: others");
        let (row, group) = (fault.index as usize, Q_HEADS / KV_HEADS);
        let of_row = &out[row * group * DIM..][..group * DIM];
        assert!(of_row.iter().all(|&bits| f16::from_bits(bits) == f16::ZERO), "{case} {name}: not 0");
        assert_eq!(lse[row * group..][..group], [f32::NEG_INFINITY; 2], "{case} {name}");
        assert_eq!(after.check(&extent), None, "{case} {name}");
    }
}

/// A prompt goes on in parts while another request decodes: only the new tokens are written, and a request that has ended keeps
/// quiet whatever its tables hold.
fn prompts_continue_beside_decoding_requests<R: Rig>(rig: &R) {
    let text = Text::new(9);
    let plan = Plan::new(&config(), &[spec()]).unwrap();
    let mut cache = Cache::<f16>::new(plan.clone(), Capacity::of_requests(&plan, 2, MAX_TOKENS)).unwrap();
    let ids: Vec<RequestId> = (0..2).map(|_| cache.try_admit().unwrap()).collect();
    let layer = Layer::new(rig);
    let mut lens = [0usize; 2];
    // New tokens of each request: parts that end anywhere, after which a context becomes too long for the budget.
    for (number, new) in [[70, 40], [10, 0], [0, 17], [50, 60], [33, 0]].into_iter().enumerate() {
        let (mut k, mut v) = (vec![f16::NAN; REQUESTS * PROMPT * KV_HEADS * DIM], Vec::new());
        v.clone_from(&k);
        for request in 0..2 {
            let range = lens[request]..lens[request] + new[request];
            if range.is_empty() {
                continue;
            }
            let tokens = text.tokens(range.clone());
            let (mut out, mut lse) =
                (vec![0.0; range.len() * Q_HEADS * DIM], vec![0.0; range.len() * Q_HEADS]);
            let q = &text.q[range.start * Q_HEADS * DIM..range.end * Q_HEADS * DIM];
            let queries = Queries { q, q_unrotated: None };
            cache.prefill(ids[request], 0, &queries, &tokens, &mut out, &mut lse).unwrap();
            let at = ((request + 1) * PROMPT - range.len()) * KV_HEADS * DIM;
            k[at..][..tokens.k.len()].copy_from_slice(&halves(tokens.k));
            v[at..][..tokens.v.len()].copy_from_slice(&halves(tokens.v));
            lens[request] = range.end;
        }
        let new = rig.upload(&[new[0] as u32, new[1] as u32, 0]);
        let kv_len = rig.upload(&[lens[0] as u32, lens[1] as u32, 0]);
        layer.ragged_prompt(&rig.upload(&k), &rig.upload(&v), &kv_len, Some(&new));
        ids.iter().for_each(|&id| cache.write_back(id, 0).unwrap());
        compare(&format!("part {number} on {}", rig.name()), &layer, &mut cache, &ids);
    }
    // Request 1 has ended: its tables stay, and nothing of it changes or is read.
    let before = layer.tables();
    let (tokens, queries) = (text.tokens(lens[0]..lens[0] + 1), text.queries(lens[0]));
    let pad = |values: &[f32]| [halves(values), vec![f16::NAN; 2 * values.len()]].concat();
    let inputs = [pad(queries.q), pad(tokens.k), pad(tokens.v)].map(|values| rig.upload(&values));
    let kv_len = rig.upload(&[lens[0] as u32 + 1, 0, 0]);
    layer.run(&inputs[0], [&inputs[1], &inputs[2]], &kv_len, &rig.upload(&layer.budget()));
    let (after, name) = (layer.tables(), rig.name());
    assert_eq!(layer.fault(), None, "on {name}");
    let slots = layer.plan.config().extent.slots * KV_HEADS;
    assert_eq!(after.owners[slots..], before.owners[slots..], "owners on {name}");
    assert_eq!(after.ages[slots..], before.ages[slots..], "ages on {name}");
    assert_eq!(after.counts[KV_HEADS * 8..], before.counts[KV_HEADS * 8..], "counts on {name}");
    assert!(after.counts[..8] != before.counts[..8], "the other one goes on, on {name}");
    let out = rig.download(&layer.out.borrow());
    assert!(out[Q_HEADS * DIM..].iter().all(|&x| x == f16::ZERO), "out on {name}");
}

/// One recorded step, replayed: lengths, budgets and tables change in device memory.
mod replay {
    use super::*;

    #[test]
    fn emulator() {
        emulator::emulator_or_skip!();
        for order in [Order::Forward, Order::Random(1)] {
            replays_equal_single_steps(&EmulatorRig::new(order));
        }
    }

    #[test]
    fn gpu() {
        if let Some(rig) = gpu_or_skip("step::replay") {
            replays_equal_single_steps(&rig.on_own_stream().expect("streams of its own"));
        }
    }

    fn replays_equal_single_steps<R: Rig>(rig: &R) {
        const STEPS: usize = 8;
        let text = Text::new(7);
        let start = 200; // with pages to miss, and one that is closed on the way
        let layers = [Layer::new(rig), Layer::new(rig)];
        let tokens = text.tokens(0..start);
        let (mut k, mut v) = (vec![f16::ZERO; REQUESTS * PROMPT * KV_HEADS * DIM], Vec::new());
        let at = (PROMPT - start) * KV_HEADS * DIM;
        k[at..][..tokens.k.len()].copy_from_slice(&halves(tokens.k));
        v.clone_from(&k);
        let lens = rig.upload(&[start as u32, 0, 0]);
        layers.iter().for_each(|layer| layer.prompt(&rig.upload(&k), &rig.upload(&v), &lens));

        let budget = rig.upload(&layers[0].budget());
        let input = |token: usize| {
            let pad = |values: &[f32]| [halves(values), vec![f16::ZERO; 2 * values.len()]].concat();
            let tokens = text.tokens(token..token + 1);
            [pad(text.queries(token).q), pad(tokens.k), pad(tokens.v)]
        };
        let [q, k, v] = input(start).map(|values| RefCell::new(rig.upload(&values)));
        let kv_len = RefCell::new(rig.upload(&[start as u32 + 1, 0, 0]));
        let replay = rig.record(Box::new(|| {
            layers[0].run(&q.borrow(), [&k.borrow(), &v.borrow()], &kv_len.borrow(), &budget);
        }));
        for step in 0..STEPS {
            let inputs = input(start + step);
            let len = [(start + step + 1) as u32, 0, 0];
            for (buffer, values) in [&q, &k, &v].into_iter().zip(&inputs) {
                rig.write(&mut buffer.borrow_mut(), 0, values);
            }
            rig.write(&mut kv_len.borrow_mut(), 0, &len);
            replay();
            let [q, k, v] = inputs.map(|values| rig.upload(&values));
            layers[1].run(&q, [&k, &v], &rig.upload(&len), &budget);
            let name = format!("step {step} on {}", rig.name());
            assert_eq!(layers[0].tables(), layers[1].tables(), "{name}");
            let [a, b] = layers.each_ref().map(|layer| rig.download(&layer.out.borrow()));
            assert!(a == b, "{name}: out");
            assert_eq!((layers[0].fault(), layers[1].fault()), (None, None), "{name}");
        }
        let counts: SparseCounts = bytemuck::cast_slice(&layers[0].tables().counts[..8])[0];
        assert!(counts.misses > 0 && counts.written > 12, "{counts:?}");
    }
}

#[test]
fn refused_plans_name_the_argument() {
    let plan = Plan::new(&config(), &[spec()]).unwrap();
    let extent = Extent::of(&plan, 2, MAX_TOKENS, PROMPT, 1.0).unwrap();
    let good =
        StepConfig { extent, prompt_tokens: PROMPT, splits: Splits::Balanced, link_blocks: 8, sm_count: 4 };
    let wide = sparse_attn::page::PageSpec::new(32, DIM, DIM, DType::F16).unwrap();
    assert!(StepPlan::new(&plan, 0, good).is_ok_and(|plan| plan.bytes_moved(16, 6) > 0));
    for (layer, config, named) in [
        (1, good, "layer"),
        (0, StepConfig { prompt_tokens: 0, ..good }, "tokens"),
        (0, StepConfig { prompt_tokens: 10_000, ..good }, "prompt_tokens"),
        (0, StepConfig { extent: Extent { max_pages: 0, ..extent }, ..good }, "max_pages"),
        (0, StepConfig { extent: Extent { page: wide, ..extent }, ..good }, "extent"),
        (0, StepConfig { link_blocks: 0, ..good }, "blocks"),
        (0, StepConfig { extent: Extent { slots: 1, ..extent }, ..good }, "max_selected"),
        (0, StepConfig { extent: Extent { max_selected: 1, ..extent }, ..good }, "pages"),
    ] {
        match StepPlan::new(&plan, layer, config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {:?}", other.map(|_| ())),
        }
    }
    let retro = Plan::new(&Config { dtype: DType::F16, ..Config::retro_infer(1600) }, &[spec()]).unwrap();
    assert!(matches!(
        Extent::of(&retro, 1, 4096, 4096, 1.0),
        Err(Error::Argument { argument: "algorithm", .. })
    ));
    // Kernels have no f32 pages.
    let f32_pages = Plan::new(&Config { dtype: DType::F32, ..config() }, &[spec()]).unwrap();
    let extent = Extent::of(&f32_pages, 1, MAX_TOKENS, PROMPT, 1.0).unwrap();
    let plan = StepPlan::new(&f32_pages, 0, StepConfig { extent, ..good }).unwrap();
    let refused = Step::<_, f16>::prepare(&emulator::Emulator::new(), &plan);
    assert!(matches!(refused, Err(Error::Argument { argument: "dtype", .. }) | Err(Error::Cuda(_))));
}

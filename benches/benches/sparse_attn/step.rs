//! A whole sparse step of one layer, everything selected resident: contexts of 32K and 128K, 2048 tokens read. The dense decode of the
//! same contexts is `attention/decode`.

use ::sparse_attn::gpu::{Extent, Memories, NewTokens, State, Step, StepArgs, StepConfig, StepPlan};
use ::sparse_attn::{Config, Plan};
use criterion::Criterion;
use half::bf16;
use longkv_attention::gpu::Splits;
use longkv_attention::testing::Inputs;
use longkv_attention::{AttentionSpec, HeadShape, Mask, Score};
use longkv_benches::GpuBench;
use longkv_cuda::driver::{Mapped, MappedKind};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

const DIM: usize = 128;
/// Host pages that all requests share: nothing is fetched after the first steps, and what they fetch is not looked at.
const HOST_PAGES: usize = 64;
/// (Requests of 8 KV heads, tokens of each).
const CASES: [(usize, usize); 4] = [(1, 32 << 10), (1, 128 << 10), (8, 32 << 10), (8, 128 << 10)];

pub(super) fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "sparse-attn/step", "bf16");
    for (requests, tokens) in CASES {
        let shape = HeadShape::new(32, 8, DIM, DIM).expect("a valid shape");
        let score = Score::new(0.088).expect("a finite scale");
        let spec = AttentionSpec { shape, score, mask: Mask::Causal };
        let plan = Plan::new(&Config::quest(2048), &[spec]).expect("a valid configuration");
        let extent = Extent::of(&plan, requests, tokens + 16, 16, 5.0).expect("fixed partitions");
        let extent = Extent { host_pages: HOST_PAGES, ..extent };
        let plan = StepPlan::new(
            &plan,
            0,
            StepConfig {
                extent,
                prompt_tokens: 1,
                splits: Splits::Balanced,
                link_blocks: 8,
                sm_count: bench.gpu.sm_count(),
            },
        )
        .expect("a valid plan");
        let step = Step::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let (stream, rows) = (bench.stream.clone(), requests * 8);
        let upload = |words: &[u32]| stream.clone_htod(words).expect("copy");
        // All tokens but the new one are in closed pages.
        let tables = plan.tables();
        let (mut owners, mut slot_table) = (upload(&tables.owners), upload(&tables.slot_table));
        let mut open_table = upload(&tables.open_table);
        let mut ages = stream.clone_htod(&tables.ages).expect("copy");
        let mut dirty = stream.clone_htod(&tables.dirty).expect("copy");
        let mut counts = stream.clone_htod(&tables.counts).expect("copy");
        let mut closed = upload(&vec![tokens as u32; rows]);
        let mut partitions = upload(&vec![(tokens / 16) as u32; rows]);
        let (mut epoch, mut states) = (upload(&tables.epoch), upload(&tables.rows));
        let some: Vec<bf16> = Inputs::Normal.generate(1000, DIM, 1);
        let summaries: Vec<bf16> = some.into_iter().cycle().take(plan.summary_elements()).collect();
        let mut summaries = stream.clone_htod(&summaries).expect("copy");
        let mut runs = stream.alloc_zeros::<bf16>(extent.runs * extent.page.elements()).expect("allocate");
        let bytes = HOST_PAGES * 8 * extent.page.bytes();
        let mut host = Mapped::<u8>::zeroed(&bench.gpu, bytes, MappedKind::Cached).expect("pinned memory");
        let values: Vec<bf16> = Inputs::Normal.generate(HOST_PAGES * 8 * 2 * 16, DIM, 2);
        let values = values.iter().flat_map(|x| x.to_bits().to_le_bytes());
        host.write().expect("host memory").iter_mut().zip(values).for_each(|(to, byte)| *to = byte);
        let host_table: Vec<u32> =
            (0..requests * extent.max_pages).map(|page| (page % HOST_PAGES) as u32).collect();
        let host_table = upload(&host_table);
        let (lens, budget) =
            (upload(&vec![tokens as u32 + 1; requests]), upload(&vec![extent.max_selected as u32; rows]));
        let q = stream.clone_htod(&Inputs::Normal.generate::<bf16>(requests * 32, DIM, 3)).expect("copy");
        let k = stream.clone_htod(&Inputs::Normal.generate::<bf16>(requests * 8, DIM, 4)).expect("copy");
        let mut out = stream.alloc_zeros::<bf16>(requests * 32 * DIM).expect("allocate");
        let mut lse = stream.alloc_zeros::<f32>(requests * 32).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let work = (plan.bytes_moved(tokens / 16, extent.max_selected), 0);
        bench.case(&mut group, &format!("{requests}x{}K", tokens >> 10), work, |stream| {
            let (k, lens) = (View::device(&k, stream), View::device(&lens, stream));
            let args = StepArgs {
                q: &View::device(&q, stream),
                new: NewTokens { k: &k, v: &k, kv_len: &lens, new_len: None },
                budget: &View::device(&budget, stream),
                state: State {
                    owners: ViewMut::device(&mut owners, stream),
                    ages: ViewMut::device(&mut ages, stream),
                    dirty: ViewMut::device(&mut dirty, stream),
                    slot_table: ViewMut::device(&mut slot_table, stream),
                    open_table: ViewMut::device(&mut open_table, stream),
                    closed: ViewMut::device(&mut closed, stream),
                    partitions: ViewMut::device(&mut partitions, stream),
                    epoch: ViewMut::device(&mut epoch, stream),
                    counts: ViewMut::device(&mut counts, stream),
                    summaries: ViewMut::device(&mut summaries, stream),
                    rows: ViewMut::device(&mut states, stream),
                },
                memories: Memories {
                    runs: ViewMut::device(&mut runs, stream),
                    host: host.view_mut(stream),
                    host_table: &View::device(&host_table, stream),
                },
                out: ViewMut::device(&mut out, stream),
                lse: ViewMut::device(&mut lse, stream),
                status: status.view_mut(stream),
            };
            step.run(stream, stream, args, workspace.view_mut(stream)).expect("run");
        });
        assert_eq!(status.read(&stream).expect("read the status"), None, "{requests}x{tokens}");
    }
}

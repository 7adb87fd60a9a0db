//! Attention over lists of pages: 256 MB and more in the order of memory, against the same pages gathered from all over it.

use ::sparse_attn::gpu::{
    Attend, AttendArgs, AttendConfig, AttendPlan, Extent, List, Lists, ListsArgs, Output,
};
use ::sparse_attn::metadata::NONE;
use ::sparse_attn::page::PageSpec;
use criterion::Criterion;
use half::bf16;
use longkv_attention::gpu::Splits;
use longkv_attention::testing::shuffled_pages;
use longkv_attention::{DType, HeadShape, Score};
use longkv_benches::data::{Vectors, poisoned};
use longkv_benches::{Case, GpuBench, Work, check};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;
use longkv_cuda::workspace::Workspace;

const DIM: usize = 128;
/// (Requests of 8 KV heads, pages of a row, tokens of a page): 256 MB and 1 GB, and a budget of 2048 tokens.
const CASES: [(usize, usize, usize); 4] = [(8, 512, 16), (8, 2048, 16), (8, 256, 32), (1, 128, 16)];

pub(super) fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "sparse-attn/attend", "bf16");
    for (requests, pages, tokens) in CASES {
        for order in ["identity", "gathered"] {
            bench.case(&mut group, &format!("{order}/{requests}x8x{pages}of{tokens}"), |case| {
                attend(case, (requests, pages, tokens), order == "gathered");
            });
        }
    }
}

fn attend(case: &mut Case<'_, '_>, (requests, pages, tokens): (usize, usize, usize), gathered: bool) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let shape = HeadShape::new(32, 8, DIM, DIM).expect("a valid shape");
    let score = Score::new(0.088).expect("a finite scale");
    let rows = requests * 8;
    let extent = Extent {
        requests,
        shape,
        page: PageSpec::new(tokens, DIM, DIM, DType::BF16).expect("a valid page"),
        max_pages: pages,
        max_selected: pages,
        slots: pages,
        max_open: 1,
        // Four times as many as are read, so that gathered pages have gaps between them.
        runs: 4 * rows * pages,
        host_pages: 1,
    };
    let plan =
        AttendPlan::new(AttendConfig { extent, score, splits: Splits::Balanced, sm_count: gpu.sm_count() })
            .expect("a valid plan");
    let lists = Lists::prepare(gpu, &plan).expect("prepare");
    let attend = Attend::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let upload = |words: &[u32]| stream.clone_htod(words).expect("copy");
    let numbers: Vec<u32> = (0..rows).flat_map(|_| 0..pages as u32).collect();
    let (selected, open_table) = (upload(&numbers), upload(&vec![0; rows]));
    let (misses, num_misses) = (upload(&vec![NONE; rows * pages * 4]), upload(&vec![0; rows]));
    let lens = upload(&vec![(pages * tokens) as u32; requests]);
    let host_table = upload(&vec![0; requests * pages]);
    let closed = upload(&vec![(pages * tokens) as u32; rows]);
    let (q, vectors) = (Vectors::<bf16>::new(DIM, 2), Vectors::<bf16>::new(DIM, 1));
    let runs = vectors.upload(&stream, extent.runs * 2 * tokens);
    let q_device = q.upload(&stream, requests * 32);
    let (out, lse) =
        (poisoned::<bf16>(&stream, requests * 32 * DIM), poisoned::<f32>(&stream, requests * 32));
    let mut status = StatusWord::new(&stream).expect("allocate");
    let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
    let table: Vec<u32> = match gathered {
        false => (0..(rows * pages) as u32).collect(),
        true => shuffled_pages(extent.runs, 3)[..rows * pages].to_vec(),
    };
    let slot_table = upload(&table);
    let mut list_workspace = Workspace::zeroed(&stream, plan.list_workspace().bytes()).expect("allocate");
    let listed = lists
        .run(
            &stream,
            ListsArgs {
                selected: &View::device(&selected, &stream),
                resolved: [
                    &View::device(&selected, &stream),
                    &View::device(&misses, &stream),
                    &View::device(&num_misses, &stream),
                ],
                slot_table: &View::device(&slot_table, &stream),
                open_table: &View::device(&open_table, &stream),
                host_table: &View::device(&host_table, &stream),
                rows: None,
                page_len: None,
                kv_len: &View::device(&lens, &stream),
                closed: &View::device(&closed, &stream),
                status: status.view_mut(&stream),
            },
            list_workspace.view_mut(&stream),
        )
        .expect("list");
    let work = Work::new(plan.bytes_moved(rows * pages), plan.flops(rows * pages))
        .note("attention and merge, without the lists of the step");
    case.time(
        work,
        (out, lse),
        |(out, lse), stream| {
            let args = AttendArgs {
                q: &View::device(&q_device, stream),
                runs: &View::device(&runs, stream),
                list: List::Hits,
                prior: None,
                out: Output::Final(ViewMut::device(out, stream)),
                lse: ViewMut::device(lse, stream),
            };
            attend.run(stream, args, &listed, workspace.view_mut(stream)).expect("run");
        },
        |(out, lse), stream| {
            let expected = [(0, 0), (requests - 1, 31)].map(|(request, head)| {
                let (row, kv_row) = (request * 32 + head, request * 8 + head / 4);
                // A run is keys, then values.
                let at = |token: usize, part: usize| {
                    let run = table[kv_row * pages + token / tokens] as usize;
                    vectors.get((run * 2 + part) * tokens + token % tokens)
                };
                let keys = pages * tokens;
                (row, check::attention(score, q.get(row), keys, |t| at(t, 0), |t| at(t, 1)))
            });
            check::rows(stream, out, lse, &expected);
        },
    );
    drop(listed);
    check::no_fault(&stream, &status);
}

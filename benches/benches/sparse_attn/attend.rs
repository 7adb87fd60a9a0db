//! Attention over lists of pages: 256 MB and more in the order of memory, against the same pages gathered from all over it.

use ::sparse_attn::gpu::{
    Attend, AttendArgs, AttendConfig, AttendPlan, Extent, List, Lists, ListsArgs, Output,
};
use ::sparse_attn::metadata::NONE;
use ::sparse_attn::page::PageSpec;
use criterion::Criterion;
use half::bf16;
use longkv_attention::gpu::Splits;
use longkv_attention::testing::{Inputs, shuffled_pages};
use longkv_attention::{DType, HeadShape, Score};
use longkv_benches::GpuBench;
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
        let shape = HeadShape::new(32, 8, DIM, DIM).expect("a valid shape");
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
        let plan = AttendPlan::new(AttendConfig {
            extent,
            score: Score::new(0.088).expect("a finite scale"),
            splits: Splits::Balanced,
            sm_count: bench.gpu.sm_count(),
        })
        .expect("a valid plan");
        let lists = Lists::prepare(&bench.gpu, &plan).expect("prepare");
        let attend = Attend::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let stream = bench.stream.clone();
        let upload = |words: &[u32]| stream.clone_htod(words).expect("copy");
        let numbers: Vec<u32> = (0..rows).flat_map(|_| 0..pages as u32).collect();
        let (selected, open_table) = (upload(&numbers), upload(&vec![0; rows]));
        let (misses, num_misses) = (upload(&vec![NONE; rows * pages * 4]), upload(&vec![0; rows]));
        let lens = upload(&vec![(pages * tokens) as u32; requests]);
        let host_table = upload(&vec![0; requests * pages]);
        let closed = upload(&vec![(pages * tokens) as u32; rows]);
        let some: Vec<bf16> = Inputs::Normal.generate(1024, DIM, 1);
        let mut runs = stream.alloc_zeros::<bf16>(extent.runs * extent.page.elements()).expect("allocate");
        for part in 0..extent.runs * extent.page.elements() / some.len() {
            let mut to = runs.slice_mut(part * some.len()..(part + 1) * some.len());
            stream.memcpy_htod(&some, &mut to).expect("copy");
        }
        let q = stream.clone_htod(&Inputs::Normal.generate::<bf16>(requests * 32, DIM, 2)).expect("copy");
        let mut out = stream.alloc_zeros::<bf16>(requests * 32 * DIM).expect("allocate");
        let mut lse = stream.alloc_zeros::<f32>(requests * 32).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut workspace = Workspace::zeroed(&stream, plan.workspace().bytes()).expect("allocate");
        let in_order: Vec<u32> = (0..(rows * pages) as u32).collect();
        for (order, table) in
            [("identity", in_order), ("gathered", shuffled_pages(extent.runs, 3)[..rows * pages].to_vec())]
        {
            let slot_table = upload(&table);
            let mut list_workspace =
                Workspace::zeroed(&stream, plan.list_workspace().bytes()).expect("allocate");
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
            let work = (plan.bytes_moved(rows * pages), plan.flops(rows * pages));
            bench.case(&mut group, &format!("{order}/{requests}x8x{pages}of{tokens}"), work, |stream| {
                let args = AttendArgs {
                    q: &View::device(&q, stream),
                    runs: &View::device(&runs, stream),
                    list: List::Hits,
                    prior: None,
                    out: Output::Final(ViewMut::device(&mut out, stream)),
                    lse: ViewMut::device(&mut lse, stream),
                };
                attend.run(stream, args, &listed, workspace.view_mut(stream)).expect("run");
            });
            drop(listed);
            assert_eq!(status.read(&stream).expect("read the status"), None, "{order}");
        }
    }
}

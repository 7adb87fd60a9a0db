//! RoPE, projection and append in one kernel.

use criterion::Criterion;
use half::bf16;
use kv_compress::gpu::{Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, Queries, Vectors};
use longkv_attention::DType;
use longkv_attention::rope::{Rope, RopeConfig, RopeLayout};
use longkv_attention::testing::Inputs;
use longkv_benches::GpuBench;
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;

use super::{DIM, KV_HEADS, MIXED, PAGE, Q_HEADS, layout, shape};

const POSITIONS: usize = 8192;

/// A decode step of one sequence and of 64, and a chunk of prefill.
const TOKENS: [usize; 3] = [1, 64, 8192];

pub(super) fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "kv-compress/append", "bf16");
    let rope = Rope::new(RopeConfig::new(DIM, 10_000.0), POSITIONS).expect("a valid rotation");
    let pages = POSITIONS / PAGE;
    let (k_sum, v_sum) = MIXED.iter().fold((0, 0), |(k, v), ranks| (k + ranks.0, v + ranks.1));
    for tokens in TOKENS {
        // Values come projected, as merged weights give them.
        let rotary = Some((RopeLayout::HalfSplit, DIM, POSITIONS));
        let config = AppendConfig::packed(shape(), layout(&MIXED), pages, tokens, rotary, Vectors::Reduced);
        let plan = AppendPlan::new(config).expect("a valid plan");
        let append = Append::<_, bf16>::prepare(&bench.gpu, &plan).expect("prepare");
        let stream = bench.stream.clone();
        let upload = |rows: usize, width: usize, seed| {
            stream.clone_htod(&Inputs::Normal.generate::<bf16>(rows, width, seed)).expect("copy")
        };
        let (q_new, k_new) = (upload(tokens * Q_HEADS, DIM, 1), upload(tokens * KV_HEADS, DIM, 2));
        let v_new = upload(tokens, v_sum, 3);
        let (project_q, project_k) = (upload(k_sum, DIM, 4), upload(k_sum, DIM, 5));
        let (cos, sin) =
            (stream.clone_htod(rope.cos()).expect("copy"), stream.clone_htod(rope.sin()).expect("copy"));
        // A step writes one token to each of many pages, a chunk fills pages one after the other.
        let stride = POSITIONS / tokens;
        let slots: Vec<i64> = (0..tokens).map(|token| (token * stride) as i64).collect();
        let slots = stream.clone_htod(&slots).expect("copy");
        let positions: Vec<u32> = (0..tokens as u32).collect();
        let positions = stream.clone_htod(&positions).expect("copy");
        let mut q = stream.alloc_zeros::<bf16>(tokens * k_sum * (Q_HEADS / KV_HEADS)).expect("allocate");
        let mut cache = stream.alloc_zeros::<bf16>(pages * layout(&MIXED).page_elements()).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let work = (plan.bytes_moved(DType::BF16), plan.flops());
        bench.case(&mut group, &tokens.to_string(), work, |stream| {
            let args = AppendArgs {
                queries: Some(Queries {
                    q_new: &View::device(&q_new, stream),
                    project: &View::device(&project_q, stream),
                    q: ViewMut::device(&mut q, stream),
                }),
                k_new: &View::device(&k_new, stream),
                v_new: &View::device(&v_new, stream),
                project_k: Some(&View::device(&project_k, stream)),
                project_v: None,
                tables: Some(AppendTables {
                    cos: &View::device(&cos, stream),
                    sin: &View::device(&sin, stream),
                    position: &View::device(&positions, stream),
                }),
                slot: &View::device(&slots, stream),
                pages: ViewMut::device(&mut cache, stream),
                status: status.view_mut(stream),
            };
            append.run(stream, args).expect("launch");
        });
        assert_eq!(status.read(&stream).expect("read the status"), None, "{tokens} tokens");
    }
}

//! RoPE, projection and append in one kernel.

use criterion::Criterion;
use half::bf16;
use kv_compress::gpu::{Append, AppendArgs, AppendConfig, AppendPlan, AppendTables, Queries, Vectors};
use longkv_attention::DType;
use longkv_attention::rope::{Rope, RopeConfig, RopeLayout};
use longkv_attention::testing::Inputs;
use longkv_benches::{Case, GpuBench, Work, check, data};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;

use super::{DIM, KV_HEADS, MIXED, PAGE, Q_HEADS, layout, shape};

const POSITIONS: usize = 8192;

/// A decode step of one sequence and of 64, and a chunk of prefill.
const TOKENS: [usize; 3] = [1, 64, 8192];

pub(super) fn gpu(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "kv-compress/append", "bf16");
    for tokens in TOKENS {
        bench.case(&mut group, &tokens.to_string(), |case| append(case, tokens));
    }
}

fn append(case: &mut Case<'_, '_>, tokens: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let rope = Rope::new(RopeConfig::new(DIM, 10_000.0), POSITIONS).expect("a valid rotation");
    let (pages, layout) = (POSITIONS / PAGE, layout(&MIXED));
    let (k_sum, v_sum) = MIXED.iter().fold((0, 0), |(k, v), ranks| (k + ranks.0, v + ranks.1));
    // Values come projected, as merged weights give them.
    let rotary = Some((RopeLayout::HalfSplit, DIM, POSITIONS));
    let config = AppendConfig::packed(shape(), layout.clone(), pages, tokens, rotary, Vectors::Reduced);
    let plan = AppendPlan::new(config).expect("a valid plan");
    let append = Append::<_, bf16>::prepare(gpu, &plan).expect("prepare");
    let (q, k, v) =
        (data::Vectors::<bf16>::new(DIM, 1), data::Vectors::new(DIM, 2), data::Vectors::new(v_sum, 3));
    let (q_new, k_new) = (q.upload(&stream, tokens * Q_HEADS), k.upload(&stream, tokens * KV_HEADS));
    let v_new = v.upload(&stream, tokens);
    let maps = |seed| Inputs::Normal.generate::<bf16>(k_sum, DIM, seed);
    let (map_q, map_k) = (maps(4), maps(5));
    let (project_q, project_k) =
        (stream.clone_htod(&map_q).expect("copy"), stream.clone_htod(&map_k).expect("copy"));
    let (cos, sin) =
        (stream.clone_htod(rope.cos()).expect("copy"), stream.clone_htod(rope.sin()).expect("copy"));
    // A step writes one token to each of many pages, a chunk fills pages one after the other.
    let stride = POSITIONS / tokens;
    let slots: Vec<i64> = (0..tokens).map(|token| (token * stride) as i64).collect();
    let slots = stream.clone_htod(&slots).expect("copy");
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let positions = stream.clone_htod(&positions).expect("copy");
    let q = data::poisoned::<bf16>(&stream, tokens * k_sum * (Q_HEADS / KV_HEADS));
    let cache = data::poisoned::<bf16>(&stream, pages * layout.page_elements());
    let status = StatusWord::new(&stream).expect("allocate");
    let (.., status) = case.time(
        Work::new(plan.bytes_moved(DType::BF16), plan.flops()),
        (q, cache, status),
        |(q, cache, status), stream| {
            let args = AppendArgs {
                queries: Some(Queries {
                    q_new: &View::device(&q_new, stream),
                    project: &View::device(&project_q, stream),
                    q: ViewMut::device(q, stream),
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
                pages: ViewMut::device(cache, stream),
                status: status.view_mut(stream),
            };
            append.run(stream, args).expect("launch");
        },
        |(_, cache, status), stream| {
            check::no_fault(stream, status);
            let (token, head) = (tokens - 1, KV_HEADS - 1);
            let slot = token * stride;
            let elements = layout.page_elements();
            let page: Vec<bf16> = check::download(stream, cache, slot / PAGE * elements, elements);
            let (k_starts, v_start) = (
                MIXED[..head].iter().map(|ranks| ranks.0).sum::<usize>(),
                MIXED[..head].iter().map(|ranks| ranks.1).sum::<usize>(),
            );
            // R_k of the head [dim, r_k], and its key turned, then projected.
            let (r_k, r_v) = MIXED[head];
            let map = &map_k[k_starts * DIM..][..DIM * r_k];
            let mut turned: Vec<f32> =
                k.get(token * KV_HEADS + head).iter().map(|x: &bf16| x.to_f32()).collect();
            rope.apply(&mut turned, 1, &[token as u32]).expect("a position of the table");
            let inner = |i: usize| {
                (0..DIM).map(|c| f64::from(turned[c]) * f64::from(map[c * r_k + i].to_f32())).sum()
            };
            let expected: Vec<f64> = (0..r_k).map(inner).collect();
            let (mut key, mut value) = (vec![bf16::ZERO; r_k], vec![bf16::ZERO; r_v]);
            layout.keys(head).read(&page, slot % PAGE, &mut key);
            layout.values(head).read(&page, slot % PAGE, &mut value);
            check::products("a reduced key", &key, &expected);
            assert!(value == v.get(token)[v_start..][..r_v], "value of token {token}");
        },
    );
    check::no_fault(&stream, &status);
}

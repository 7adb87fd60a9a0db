//! Replacement and gather of `sparse-attn`: a layer's step with 2048 pages selected of 12,288 slots per KV head, and misses
//! over the host link.

use ::sparse_attn::gpu::calibrate;
use ::sparse_attn::gpu::{
    Gather, GatherArgs, GatherConfig, GatherPlan, Resolve, ResolveArgs, ResolveConfig, ResolvePlan,
};
use ::sparse_attn::metadata::NONE;
use ::sparse_attn::page::PageSpec;
use ::sparse_attn::{BucketedLru, bucketed_lru::BUCKETS};
use criterion::{BenchmarkId, Criterion};
use longkv_attention::DType;
use longkv_attention::testing::shuffled_pages;
use longkv_benches::{GpuBench, throughput};
use longkv_cuda::driver::{Mapped, MappedKind};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;

/// (Rows, pages selected, slots): one request of 8 KV heads and a batch of 8.
const STEPS: [(usize, usize, usize); 3] = [(8, 256, 1536), (8, 2048, 12288), (64, 2048, 12288)];
/// Tokens of a page, and misses of a row of 8 that share them.
const GATHERS: [(usize, usize); 4] = [(8, 512), (16, 512), (32, 512), (16, 16)];

/// Two selections of a row that share nine of ten pages.
fn selections(selected: usize, seed: u64) -> [Vec<u32>; 2] {
    let pages = shuffled_pages(8 * selected, seed);
    let late = selected / 10;
    [pages[..selected].to_vec(), pages[late..selected + late].to_vec()]
}

pub(super) fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sparse-attn/resolve/cpu-reference/u32");
    for (_, selected, slots) in STEPS.into_iter().take(2) {
        let plan = plan(1, selected, slots);
        group.throughput(throughput(plan.bytes_moved(), 0));
        group.bench_function(BenchmarkId::from_parameter(format!("1x{selected}of{slots}")), |bencher| {
            let mut lru: BucketedLru = BucketedLru::new(slots, BUCKETS).expect("valid buckets");
            let steps = selections(selected, 1);
            let mut step = 0;
            bencher.iter(|| {
                step += 1;
                lru.resolve(&steps[step % 2]).expect("room for the selection")
            });
        });
    }
}

fn plan(rows: usize, max_selected: usize, slots: usize) -> ResolvePlan {
    ResolvePlan::new(ResolveConfig { rows, max_selected, slots, buckets: BUCKETS }).expect("a valid plan")
}

pub(super) fn resolve(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "sparse-attn/resolve", "u32");
    for (rows, selected, slots) in STEPS {
        let plan = plan(rows, selected, slots);
        let kernel = Resolve::prepare(&bench.gpu, &plan).expect("prepare");
        let stream = bench.stream.clone();
        let upload = |step: usize| {
            let all: Vec<u32> =
                (0..rows as u64).flat_map(|row| selections(selected, row)[step].clone()).collect();
            stream.clone_htod(&all).expect("copy")
        };
        let steps = [upload(0), upload(1)];
        let mut owners = stream.clone_htod(&vec![NONE; rows * slots]).expect("copy");
        let mut ages = stream.alloc_zeros::<u8>(rows * slots).expect("allocate");
        let dirty = stream.alloc_zeros::<u8>(rows * slots).expect("allocate");
        let mut slot_of = stream.alloc_zeros::<u32>(rows * selected).expect("allocate");
        let mut misses = stream.alloc_zeros::<u32>(rows * selected * 4).expect("allocate");
        let mut num_misses = stream.alloc_zeros::<u32>(rows).expect("allocate");
        let mut counts = stream.alloc_zeros::<u64>(rows * 8).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        let mut step = 0;
        bench.case(&mut group, &format!("{rows}x{selected}of{slots}"), (plan.bytes_moved(), 0), |stream| {
            step += 1;
            let args = ResolveArgs {
                selected: &View::device(&steps[step % 2], stream),
                rows: None,
                epochs: None,
                prefetch: false,
                owners: ViewMut::device(&mut owners, stream),
                ages: ViewMut::device(&mut ages, stream),
                dirty: &View::device(&dirty, stream),
                slot_of: ViewMut::device(&mut slot_of, stream),
                misses: ViewMut::device(&mut misses, stream),
                num_misses: ViewMut::device(&mut num_misses, stream),
                counts: ViewMut::device(&mut counts, stream),
                status: status.view_mut(stream),
            };
            kernel.run(stream, args).expect("run");
        });
    }
}

/// Over the link: the ceiling is the link's rate, not the memory's, and L2 holds none of it.
pub(super) fn gather(criterion: &mut Criterion) {
    const ROWS: usize = 8;
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "sparse-attn/gather", "bf16");
    for (tokens, misses) in GATHERS {
        let page = PageSpec::new(tokens, 128, 128, DType::BF16).expect("a valid page");
        let resolve = ResolveConfig { rows: ROWS, max_selected: misses, slots: misses, buckets: BUCKETS };
        let (host_pages, device_pages) = (4 * misses, ROWS * misses);
        let config = GatherConfig {
            resolve,
            kv_heads: ROWS,
            page,
            max_pages: host_pages,
            host_pages,
            device_pages,
            blocks: 8,
        };
        let plan = GatherPlan::new(config).expect("a valid plan");
        let kernel = Gather::prepare(&bench.gpu, &plan).expect("prepare");
        let stream = bench.stream.clone();
        let upload = |words: &[u32]| stream.clone_htod(words).expect("copy");
        let list: Vec<u32> = (0..ROWS as u64)
            .flat_map(|row| shuffled_pages(host_pages, row).into_iter().take(misses).zip(0..))
            .flat_map(|(page, place)| [place, page, place, NONE])
            .collect();
        let list = upload(&list);
        let counts = upload(&[misses as u32; ROWS]);
        let host_table = upload(&shuffled_pages(host_pages, 9));
        let slot_table = upload(&shuffled_pages(device_pages, 10));
        let bytes = host_pages * ROWS * page.bytes();
        let host = Mapped::<u8>::zeroed(&bench.gpu, bytes, MappedKind::Cached).expect("pinned memory");
        let mut device = stream.alloc_zeros::<u8>(device_pages * page.bytes()).expect("allocate");
        let mut owners = stream.alloc_zeros::<u32>(ROWS * misses).expect("allocate");
        let mut status = StatusWord::new(&stream).expect("allocate");
        // What a grid of its own choice, one large copy and a copy per run reach on this link.
        let measured =
            calibrate::measure(&bench.gpu, &stream, page, ROWS * misses).expect("measure the link");
        let choice = calibrate::choose(&measured, 0.03).expect("rates above 0");
        println!(
            "{} runs of {} KiB: gather by {} blocks at {:.1} % of a 64 MiB copy's {:.1} GB/s, a copy per run {:.1} GB/s",
            ROWS * misses,
            page.bytes() / 1024,
            choice.blocks,
            choice.share * 100.0,
            measured.copy_engine / 1e9,
            measured.copies / 1e9
        );
        let work = (plan.bytes_moved(ROWS * misses), 0);
        bench.case(&mut group, &format!("{}of{}KiB", ROWS * misses, page.bytes() / 1024), work, |stream| {
            let args = GatherArgs {
                misses: &View::device(&list, stream),
                num_misses: &View::device(&counts, stream),
                host_table: &View::device(&host_table, stream),
                slot_table: &View::device(&slot_table, stream),
                host: &host.view(),
                device: ViewMut::device(&mut device, stream),
                owners: ViewMut::device(&mut owners, stream),
                status: status.view_mut(stream),
            };
            kernel.run(stream, args).expect("run");
        });
    }
}

//! Replacement and gather of `sparse-attn`: a layer's step with 2048 pages selected of 12,288 slots per KV head, and misses
//! over the host link.

use std::sync::Arc;

use ::sparse_attn::gpu::calibrate;
use ::sparse_attn::gpu::{
    Gather, GatherArgs, GatherConfig, GatherPlan, Resolve, ResolveArgs, ResolveConfig, ResolvePlan,
};
use ::sparse_attn::metadata::NONE;
use ::sparse_attn::page::PageSpec;
use ::sparse_attn::{BucketedLru, bucketed_lru::BUCKETS};
use criterion::{BenchmarkId, Criterion};
use half::bf16;
use longkv_attention::DType;
use longkv_attention::testing::{Inputs, shuffled_pages};
use longkv_benches::data::{poisoned, repeated};
use longkv_benches::{Case, GpuBench, Steps, Work, check, throughput};
use longkv_cuda::cudarc::driver::{CudaSlice, CudaStream};
use longkv_cuda::driver::{Mapped, MappedKind};
use longkv_cuda::memory::{View, ViewMut};
use longkv_cuda::status::StatusWord;

/// (Rows, pages selected, slots): one request of 8 KV heads and a batch of 8.
const STEPS: [(usize, usize, usize); 3] = [(8, 256, 1536), (8, 2048, 12288), (64, 2048, 12288)];
/// Tokens of a page, and misses of a row of 8 that share them.
const GATHERS: [(usize, usize); 4] = [(8, 512), (16, 512), (32, 512), (16, 16)];

/// Steps before a row's selections come again.
const TURN: usize = 80;

/// Pages that each step brings in: a tenth of those selected.
fn late(selected: usize) -> usize {
    selected / 10
}

/// A row's selection at a step of the turn: it shares nine of ten pages with the one before. A turn goes over eight times the pages
/// selected, more than there are slots, so that what comes in again has lost its slot: every step misses a tenth.
fn selection(pages: &[u32], selected: usize, step: usize) -> Vec<u32> {
    (0..selected).map(|i| pages[(step * late(selected) + i) % pages.len()]).collect()
}

/// Pages of a row in the order in which its selections go over them.
fn drift(selected: usize, seed: u64) -> Vec<u32> {
    shuffled_pages(TURN * late(selected), seed)
}

pub(super) fn cpu(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sparse-attn/resolve/cpu-reference/u32");
    for (_, selected, slots) in STEPS.into_iter().take(2) {
        let plan = plan(1, selected, slots);
        group.throughput(throughput(plan.bytes_moved(), 0));
        group.bench_function(BenchmarkId::from_parameter(format!("1x{selected}of{slots}")), |bencher| {
            let mut lru: BucketedLru = BucketedLru::new(slots, BUCKETS).expect("valid buckets");
            let pages = drift(selected, 1);
            let steps: Vec<_> = (0..TURN).map(|step| selection(&pages, selected, step)).collect();
            let mut step = 0;
            bencher.iter(|| {
                step += 1;
                lru.resolve(&steps[step % TURN]).expect("room for the selection")
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
        bench.case(&mut group, &format!("{rows}x{selected}of{slots}"), |case| {
            resolve_case(case, rows, selected, slots);
        });
    }
}

/// What a step leaves: slots of the selection, pages to fetch, how many these are.
struct Resolved {
    slot_of: CudaSlice<u32>,
    misses: CudaSlice<u32>,
    num_misses: CudaSlice<u32>,
    status: StatusWord,
}

fn resolve_case(case: &mut Case<'_, '_>, rows: usize, selected: usize, slots: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    let plan = plan(rows, selected, slots);
    let kernel = Resolve::prepare(gpu, &plan).expect("prepare");
    let drifts: Vec<Vec<u32>> = (0..rows as u64).map(|row| drift(selected, row)).collect();
    let turn: Vec<u32> = (0..TURN)
        .flat_map(|step| drifts.iter().flat_map(move |pages| selection(pages, selected, step)))
        .collect();
    let turn = stream.clone_htod(&turn).expect("copy");
    let mut owners = stream.clone_htod(&vec![NONE; rows * slots]).expect("copy");
    let mut ages = stream.alloc_zeros::<u8>(rows * slots).expect("allocate");
    let dirty = stream.alloc_zeros::<u8>(rows * slots).expect("allocate");
    let mut counts = stream.alloc_zeros::<u64>(rows * 8).expect("allocate");
    let words = |len: usize| repeated(&stream, &[NONE], len);
    let mut resolved = Resolved {
        slot_of: words(rows * selected),
        misses: words(rows * selected * 4),
        num_misses: words(rows),
        status: StatusWord::new(&stream).expect("allocate"),
    };
    let mut launch = |resolved: &mut Resolved, step: usize, stream: &Arc<CudaStream>| {
        let all = View::device(&turn, stream);
        let args = ResolveArgs {
            selected: &all.part(step * rows * selected..(step + 1) * rows * selected).expect("a step"),
            rows: None,
            epochs: None,
            prefetch: false,
            owners: ViewMut::device(&mut owners, stream),
            ages: ViewMut::device(&mut ages, stream),
            dirty: &View::device(&dirty, stream),
            slot_of: ViewMut::device(&mut resolved.slot_of, stream),
            misses: ViewMut::device(&mut resolved.misses, stream),
            num_misses: ViewMut::device(&mut resolved.num_misses, stream),
            counts: ViewMut::device(&mut counts, stream),
            status: resolved.status.view_mut(stream),
        };
        kernel.run(stream, args).expect("run");
    };
    // A whole turn fills the slots, on the device and on the host.
    (0..TURN).for_each(|step| launch(&mut resolved, step, &stream));
    let resolved = case.time_steps(
        Work::new(plan.bytes_moved(), 0).note("a tenth of the selection misses"),
        resolved,
        Steps { count: TURN, launch: &mut launch, reset: |_: &mut Resolved, _: &_| {} },
        |resolved, stream| {
            check::no_fault(stream, &resolved.status);
            for row in [0, rows - 1] {
                let mut lru: BucketedLru = BucketedLru::new(slots, BUCKETS).expect("valid buckets");
                let mut step = |step| {
                    lru.resolve(&selection(&drifts[row], selected, step)).expect("room for the selection")
                };
                (0..TURN).for_each(|number| {
                    step(number);
                });
                let expected = step(0);
                let found = check::download(stream, &resolved.slot_of, row * selected, selected);
                assert!(found == expected.slots, "slots of row {row}");
                let list: Vec<u32> =
                    expected.misses.iter().flat_map(|m| [m.place, m.page, m.slot, m.evicted]).collect();
                let found = check::download(stream, &resolved.misses, row * selected * 4, list.len());
                assert!(found == list, "pages that row {row} fetches");
            }
            every_tenth_misses(resolved, stream, rows, selected);
        },
    );
    check::no_fault(&stream, &resolved.status);
    every_tenth_misses(&resolved, &stream, rows, selected);
}

fn every_tenth_misses(resolved: &Resolved, stream: &Arc<CudaStream>, rows: usize, selected: usize) {
    let misses: Vec<u32> = check::download(stream, &resolved.num_misses, 0, rows);
    assert_eq!(misses, vec![late(selected) as u32; rows], "pages that each row fetches");
}

/// Over the link: the ceiling is the link's rate, not the memory's, and L2 holds none of it.
pub(super) fn gather(criterion: &mut Criterion) {
    let Some(mut bench) = GpuBench::new() else { return };
    let mut group = bench.group(criterion, "sparse-attn/gather", "bf16");
    for (tokens, misses) in GATHERS {
        let page = PageSpec::new(tokens, 128, 128, DType::BF16).expect("a valid page");
        let name = format!("{}of{}KiB", ROWS * misses, page.bytes() / 1024);
        bench.case(&mut group, &name, |case| gather_case(case, page, misses));
    }
}

const ROWS: usize = 8;

fn gather_case(case: &mut Case<'_, '_>, page: PageSpec, misses: usize) {
    let (gpu, stream) = (&case.bench.gpu, case.bench.stream.clone());
    // What a grid of its own choice, one large copy and a copy per run reach on this link.
    let measured = calibrate::measure(gpu, &stream, page, ROWS * misses).expect("measure the link");
    let choice = calibrate::choose(&measured, 0.03).expect("rates above 0");
    let resolve = ResolveConfig { rows: ROWS, max_selected: misses, slots: misses, buckets: BUCKETS };
    let (host_pages, device_pages) = (4 * misses, ROWS * misses);
    let config = GatherConfig {
        resolve,
        kv_heads: ROWS,
        page,
        max_pages: host_pages,
        host_pages,
        device_pages,
        blocks: choice.blocks,
    };
    let plan = GatherPlan::new(config).expect("a valid plan");
    let kernel = Gather::prepare(gpu, &plan).expect("prepare");
    let upload = |words: &[u32]| stream.clone_htod(words).expect("copy");
    let pages_of = |row: usize| shuffled_pages(host_pages, row as u64).into_iter().take(misses);
    let list: Vec<u32> = (0..ROWS)
        .flat_map(|row| pages_of(row).zip(0..))
        .flat_map(|(page, place)| [place, page, place, NONE])
        .collect();
    let list = upload(&list);
    let counts = upload(&[misses as u32; ROWS]);
    let (hosts, slots) = (shuffled_pages(host_pages, 9), shuffled_pages(device_pages, 10));
    let (host_table, slot_table) = (upload(&hosts), upload(&slots));
    let bytes = host_pages * ROWS * page.bytes();
    let mut host = Mapped::<u8>::zeroed(gpu, bytes, MappedKind::Cached).expect("pinned memory");
    let block: Vec<bf16> = Inputs::Normal.generate(8191, 128, 1);
    let block: &[u8] = bytemuck::cast_slice(&block);
    host.write()
        .expect("nothing runs")
        .chunks_mut(block.len())
        .for_each(|to| to.copy_from_slice(&block[..to.len()]));
    let device = poisoned::<bf16>(&stream, device_pages * page.elements());
    let mut owners = stream.alloc_zeros::<u32>(ROWS * misses).expect("allocate");
    let status = StatusWord::new(&stream).expect("allocate");
    let work = Work::new(plan.bytes_moved(ROWS * misses), 0).over_link(plan.bytes_moved(ROWS * misses)).note(
        format!(
            "{} blocks, as calibrated: {:.1} % of a 64 MiB copy's {:.1} GB/s; a copy per run {:.1} GB/s",
            choice.blocks,
            choice.share * 100.0,
            measured.copy_engine / 1e9,
            measured.copies / 1e9
        ),
    );
    let (_, status) = case.time(
        work,
        (device, status),
        |(device, status), stream| {
            let args = GatherArgs {
                misses: &View::device(&list, stream),
                num_misses: &View::device(&counts, stream),
                host_table: &View::device(&host_table, stream),
                slot_table: &View::device(&slot_table, stream),
                host: &host.view(),
                device: ViewMut::device(device, stream).cast(),
                owners: ViewMut::device(&mut owners, stream),
                status: status.view_mut(stream),
            };
            kernel.run(stream, args).expect("run");
        },
        |(device, status), stream| {
            check::no_fault(stream, status);
            let bytes = host.read().expect("nothing runs");
            for (row, place) in [(0, 0), (3, misses / 2), (ROWS - 1, misses - 1)] {
                let fetched = pages_of(row).nth(place).expect("a page") as usize;
                let at = (hosts[fetched] as usize * ROWS + row) * page.bytes();
                let run = slots[row * misses + place] as usize * page.elements();
                let found = check::download(stream, device, run, page.elements());
                let expected = &bytes[at..at + page.bytes()];
                assert!(bytemuck::cast_slice::<bf16, u8>(&found) == expected, "run {place} of row {row}");
            }
        },
    );
    check::no_fault(&stream, &status);
}

//! Attention over lists of pages: against an f64 oracle, in parts, and bit by bit against the dense kernel.

use attention::gpu::{
    CacheLayout, Decode, DecodeArgs, DecodeConfig, DecodePlan, DecodeStep, DecodeStepArgs, Splits,
};
use attention::testing::{Comparison, Inputs, Rng, Tolerance, shuffled_pages};
use attention::{Element, FaultCode, HeadShape, Mask, PageLayout, Score};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use sparse_attn::Error;
use sparse_attn::gpu::{
    Attend, AttendArgs, AttendConfig, AttendPlan, Extent, List, Lists, ListsArgs, Output,
};
use sparse_attn::metadata::NONE;
use sparse_attn::page::PageSpec;

emulator::device_test!(
    lists_of_any_pages_equal_the_oracle,
    hits_and_misses_merge_to_the_whole,
    a_list_of_all_pages_is_the_dense_kernel_bit_by_bit,
    bad_rows_read_nothing_and_the_others_are_right,
    many_launches_repeat_bitwise,
);

/// What a row reads.
#[derive(Debug, Clone, Default)]
struct RowPages {
    /// Tokens of each selected page, and whether it is fetched.
    selected: Vec<(usize, bool)>,
    /// Open tokens.
    open: usize,
}

struct Case {
    extent: Extent,
    score: Score,
    splits: Splits,
    rows: Vec<RowPages>,
    seed: u64,
}

impl Case {
    fn new(
        heads: (usize, usize),
        dim: usize,
        page: usize,
        dtype: attention::DType,
        rows: &[RowPages],
    ) -> Self {
        let shape = HeadShape::new(heads.0, heads.1, dim, dim).unwrap();
        let most = rows.iter().map(|row| row.selected.len()).max().unwrap().max(1);
        let open = rows.iter().map(|row| row.open.div_ceil(page)).max().unwrap().max(1);
        let extent = Extent {
            requests: rows.len() / heads.1,
            shape,
            page: PageSpec::new(page, dim, dim, dtype).unwrap(),
            max_pages: most + 3,
            max_selected: most + 1,
            slots: most + 2,
            max_open: open,
            runs: rows.len() * (most + 2 + open) + 3,
            host_pages: 1,
        };
        let score = Score::new((dim as f32).powf(-0.5)).unwrap();
        Case { extent, score, splits: Splits::Balanced, rows: rows.to_vec(), seed: 1 }
    }

    fn plan<R: Rig>(&self, rig: &R) -> AttendPlan {
        let sm_count = cuda::launch::Device::sm_count(rig.device()).unwrap_or(2);
        AttendPlan::new(AttendConfig {
            extent: self.extent,
            score: self.score,
            splits: self.splits,
            sm_count,
        })
        .unwrap()
    }
}

/// Tables and tensors of a case, on the host.
struct Data<E> {
    selected: Vec<u32>,
    slot_of: Vec<u32>,
    misses: Vec<u32>,
    num_misses: Vec<u32>,
    slot_table: Vec<u32>,
    open_table: Vec<u32>,
    page_len: Vec<u8>,
    kv_len: Vec<u32>,
    closed: Vec<u32>,
    q: Vec<E>,
    runs: Vec<E>,
    /// Places of each row's tokens in `runs`: of the first list, and of the second.
    tokens: Vec<[Vec<(usize, usize)>; 2]>,
}

impl<E: Element> Data<E> {
    fn new(case: &Case) -> Self {
        let Extent { page, max_pages, max_selected, slots, max_open, runs, shape, requests, .. } =
            case.extent;
        let (rows, per_page) = (case.extent.rows(), page.tokens());
        let mut rng = Rng::new(case.seed);
        let ids = shuffled_pages(runs, case.seed);
        let (slot_table, rest) = ids.split_at(rows * slots);
        let open_table = rest[..rows * max_open].to_vec();
        let mut data = Data {
            selected: vec![NONE; rows * max_selected],
            slot_of: vec![NONE; rows * max_selected],
            misses: vec![NONE; rows * max_selected * 4],
            num_misses: vec![0; rows],
            slot_table: slot_table.to_vec(),
            open_table,
            page_len: vec![0; rows * max_pages],
            kv_len: vec![0; requests],
            closed: vec![0; rows],
            q: Inputs::Normal.generate(requests * shape.q_heads(), shape.qk_dim(), case.seed),
            // Tokens past a page's length, and runs that nobody reads, are NaN.
            runs: attention::testing::poison(runs * page.elements()),
            tokens: Vec::new(),
        };
        for (row, pages) in case.rows.iter().enumerate() {
            let mut lists = [Vec::new(), Vec::new()];
            let (numbers, to) =
                (shuffled_pages(max_pages, row as u64), shuffled_pages(slots, 9 + row as u64));
            let mut place = 0;
            for (i, &(tokens, missed)) in pages.selected.iter().enumerate() {
                // Padding lies anywhere.
                if place + (pages.selected.len() - i) < max_selected && rng.below(2) == 0 {
                    place += 1;
                }
                let at = row * max_selected + place;
                (data.selected[at], data.slot_of[at]) = (numbers[i], to[i]);
                data.page_len[row * max_pages + numbers[i] as usize] = tokens as u8;
                if missed {
                    let entry = (row * max_selected + data.num_misses[row] as usize) * 4;
                    data.misses[entry..entry + 4].copy_from_slice(&[place as u32, numbers[i], to[i], NONE]);
                    data.num_misses[row] += 1;
                }
                let run = data.slot_table[row * slots + to[i] as usize] as usize;
                lists[usize::from(missed)].extend((0..tokens).map(|token| (run, token)));
                place += 1;
            }
            let request = row / shape.kv_heads();
            data.kv_len[request] = data.kv_len[request].max(pages.open as u32);
            data.tokens.push(lists);
        }
        for (row, pages) in case.rows.iter().enumerate() {
            // Heads of a request may have closed different numbers of tokens.
            data.closed[row] = data.kv_len[row / shape.kv_heads()] - pages.open as u32;
            for token in 0..pages.open {
                let run = data.open_table[row * max_open + token / per_page] as usize;
                data.tokens[row][0].push((run, token % per_page));
            }
        }
        let all: Vec<(usize, usize)> = data.tokens.iter().flatten().flatten().copied().collect();
        let values: Vec<E> = Inputs::Normal.generate(2 * all.len(), shape.qk_dim(), case.seed + 1);
        for (i, &(run, token)) in all.iter().enumerate() {
            let [k, v] = places(case, run, token);
            let vector = |i: usize| &values[i * shape.qk_dim()..][..shape.qk_dim()];
            data.runs[k..k + shape.qk_dim()].copy_from_slice(vector(2 * i));
            data.runs[v..v + shape.v_dim()].copy_from_slice(vector(2 * i + 1));
        }
        data
    }

    /// Attention of every row over its tokens in these of its lists, in f64.
    fn oracle(&self, case: &Case, lists: &[usize]) -> (Vec<f64>, Vec<f64>) {
        let shape = case.extent.shape;
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for (row, tokens) in self.tokens.iter().enumerate() {
            for head in row * shape.group()..(row + 1) * shape.group() {
                let q = &self.q[head * shape.qk_dim()..][..shape.qk_dim()];
                let mut state = attention::softmax_state::Raw::<f64>::empty(shape.v_dim());
                for &(run, token) in lists.iter().flat_map(|&list| &tokens[list]) {
                    let [k, v] = places(case, run, token);
                    let of =
                        |at: usize, dim: usize| self.runs[at..at + dim].iter().map(|x| f64::from(x.to_f32()));
                    let dot =
                        q.iter().zip(of(k, shape.qk_dim())).map(|(q, k)| f64::from(q.to_f32()) * k).sum();
                    state.push(case.score.apply_f64(dot), of(v, shape.v_dim()));
                }
                let state = state.normalise();
                out.extend(state.out);
                lse.push(state.lse);
            }
        }
        (out, lse)
    }
}

/// Where a token's key and value lie.
fn places(case: &Case, run: usize, token: usize) -> [usize; 2] {
    let page = &case.extent.page;
    [page.keys(token).end, page.values(token).end].map(|place| run * page.elements() + place)
}

/// What attention leaves.
struct Found<E> {
    out: Vec<E>,
    lse: Vec<f32>,
    fault: Option<Fault>,
}

/// Outputs and LSEs of a partial state.
type Partial = (Vec<f32>, Vec<f32>);

/// Lists and attends: hits first, then misses on top of them; hits alone and misses alone are given too.
fn run<R: Rig, E: Storage + Element>(rig: &R, case: &Case, data: &Data<E>) -> (Found<E>, [Partial; 2]) {
    let plan = case.plan(rig);
    let lists = Lists::prepare(rig.device(), &plan).unwrap();
    let attend = Attend::<_, E>::prepare(rig.device(), &plan).unwrap();
    let shape = case.extent.shape;
    let heads = case.extent.requests * shape.q_heads();
    let (selected, slot_of) = (rig.upload(&data.selected), rig.upload(&data.slot_of));
    let (misses, num_misses) = (rig.upload(&data.misses), rig.upload(&data.num_misses));
    let (slot_table, open_table) = (rig.upload(&data.slot_table), rig.upload(&data.open_table));
    let (page_len, kv_len) = (rig.upload(&data.page_len), rig.upload(&data.kv_len));
    let (closed, q, runs) = (rig.upload(&data.closed), rig.upload(&data.q), rig.upload(&data.runs));
    let host_table = rig.zeroed::<u32>(case.extent.requests * case.extent.max_pages);
    let mut status = rig.zeroed::<u64>(1);
    let mut list_workspace = rig.workspace(plan.list_workspace());
    let mut workspace = rig.workspace(plan.workspace());
    let listed = lists
        .run(
            rig.queue(),
            ListsArgs {
                selected: &rig.view(&selected),
                resolved: [&rig.view(&slot_of), &rig.view(&misses), &rig.view(&num_misses)],
                slot_table: &rig.view(&slot_table),
                open_table: &rig.view(&open_table),
                host_table: &rig.view(&host_table),
                rows: None,
                page_len: Some(&rig.view(&page_len)),
                kv_len: &rig.view(&kv_len),
                closed: &rig.view(&closed),
                status: rig.view_mut(&mut status),
            },
            rig.workspace_view(&mut list_workspace),
        )
        .unwrap();
    let parts = [List::Hits, List::Misses].map(|list| {
        let (mut out, mut lse) = (rig.poisoned::<f32>(heads * shape.v_dim()), rig.poisoned::<f32>(heads));
        let args = AttendArgs {
            q: &rig.view(&q),
            runs: &rig.view(&runs),
            list,
            prior: None,
            out: Output::Partial(rig.view_mut(&mut out)),
            lse: rig.view_mut(&mut lse),
        };
        attend.run(rig.queue(), args, &listed, rig.workspace_view(&mut workspace)).unwrap();
        (out, lse)
    });
    let (mut out, mut lse) = (rig.poisoned::<E>(heads * shape.v_dim()), rig.poisoned::<f32>(heads));
    attend
        .run(
            rig.queue(),
            AttendArgs {
                q: &rig.view(&q),
                runs: &rig.view(&runs),
                list: List::Misses,
                prior: Some([&rig.view(&parts[0].0), &rig.view(&parts[0].1)]),
                out: Output::Final(rig.view_mut(&mut out)),
                lse: rig.view_mut(&mut lse),
            },
            &listed,
            rig.workspace_view(&mut workspace),
        )
        .unwrap();
    drop(listed);
    assert!(rig.counters_are_zero(&mut list_workspace, plan.list_workspace()));
    assert!(rig.counters_are_zero(&mut workspace, plan.workspace()));
    let fault = Fault::decode(rig.download(&status)[0]);
    let found = Found { out: rig.download(&out), lse: rig.download(&lse), fault };
    (found, parts.map(|(out, lse)| (rig.download(&out), rig.download(&lse))))
}

fn check<R: Rig, E: Storage + Element>(rig: &R, name: &str, case: &Case) {
    let data = Data::<E>::new(case);
    let (found, parts) = run(rig, case, &data);
    let name = format!("{name}, {:?} on {}", case.extent, rig.name());
    assert_eq!(found.fault, None, "{name}");
    let dim = case.extent.shape.v_dim();
    let compare = |out: &[f64], lse: &[f64], what: &str, found: (&[f32], Option<&[E]>, &[f32])| {
        match found.1 {
            Some(elements) => Comparison::attention(elements, out, dim),
            // Not rounded at the end, but P was.
            None => {
                Comparison::attention(&found.0.iter().map(|&x| E::from_f32(x)).collect::<Vec<_>>(), out, dim)
            }
        }
        .assert(format_args!("{what}, out of {name}"));
        Comparison::new(found.2, lse, Tolerance::LSE).assert(format_args!("{what}, lse of {name}"));
    };
    let (out, lse) = data.oracle(case, &[0, 1]);
    compare(&out, &lse, "whole", (&[], Some(&found.out), &found.lse));
    for (list, (part_out, part_lse)) in parts.iter().enumerate() {
        let (out, lse) = data.oracle(case, &[list]);
        compare(&out, &lse, ["hits", "misses"][list], (part_out, None, part_lse));
    }
}

/// Pages of random lengths.
fn pages(rng: &mut Rng, count: usize, page: usize, open: usize) -> RowPages {
    let selected = (0..count).map(|_| (1 + rng.below(page), rng.below(3) == 0)).collect();
    RowPages { selected, open }
}

fn lists_of_any_pages_equal_the_oracle<R: Rig>(rig: &R) {
    let mut rng = Rng::new(3);
    // (heads, page, pages and open tokens of each row): every page size, groups of 1, 3 and 8, empty rows, ragged rows.
    type Rows = &'static [(usize, usize)];
    let cases: [(&str, (usize, usize), usize, Rows); 5] = [
        ("pages of 8", (3, 1), 8, &[(13, 5), (0, 0), (2, 9)]),
        ("pages of 16", (2, 2), 16, &[(7, 16), (5, 16)]),
        ("pages of 32, one row of many", (8, 1), 32, &[(1, 0), (17, 1), (0, 64)]),
        ("pages of 64", (1, 1), 64, &[(3, 65)]),
        ("nothing at all", (2, 1), 16, &[(0, 0), (0, 0)]),
    ];
    for (name, heads, page, rows) in cases {
        let rows: Vec<RowPages> =
            rows.iter().map(|&(count, open)| pages(&mut rng, count, page, open)).collect();
        check::<R, f16>(rig, name, &Case::new(heads, 64, page, attention::DType::F16, &rows));
    }
}

fn hits_and_misses_merge_to_the_whole<R: Rig>(rig: &R) {
    let mut rng = Rng::new(4);
    let row = |all: Option<bool>, rng: &mut Rng| {
        let mut row = pages(rng, 6, 16, 3);
        if let Some(missed) = all {
            row.selected.iter_mut().for_each(|page| page.1 = missed);
        }
        row
    };
    // Every hit, every miss, both; 4 heads to a row, and 12 with a soft-cap; one split policy and the other.
    let rows = [row(Some(false), &mut rng), row(Some(true), &mut rng), row(None, &mut rng)];
    let mut case = Case::new((4, 1), 128, 16, attention::DType::BF16, &rows);
    check::<R, bf16>(rig, "128 channels", &case);
    case.splits = Splits::Fixed { tokens: 64 };
    check::<R, bf16>(rig, "fixed parts", &case);
    let mut wide = Case::new((12, 1), 128, 16, attention::DType::BF16, &rows);
    wide.score = wide.score.with_soft_cap(20.0).unwrap();
    check::<R, bf16>(rig, "a group of 12", &wide);
}

fn a_list_of_all_pages_is_the_dense_kernel_bit_by_bit<R: Rig>(rig: &R) {
    const PAGE: usize = 16;
    for (tokens, splits) in
        [([1, 300, 0, 64], Splits::Balanced), ([63, 129, 65, 17], Splits::Fixed { tokens: 64 })]
    {
        let rows: Vec<RowPages> =
            tokens.iter().flat_map(|&open| vec![RowPages { selected: Vec::new(), open }; 2]).collect();
        let mut case = Case::new((6, 2), 64, PAGE, attention::DType::F16, &rows);
        case.splits = splits;
        let data = Data::<f16>::new(&case);
        let (found, _) = run(rig, &case, &data);

        let Extent { shape, page, runs, max_open, requests, .. } = case.extent;
        let layout = PageLayout {
            page_stride: page.elements() as u64,
            token_stride: shape.qk_dim() as u64,
            head_stride: 0,
        };
        let cache = CacheLayout::Paged {
            page_size: PAGE,
            pages: runs,
            max_pages: max_open,
            per_head: true,
            k: layout,
            v: layout,
        };
        let plan = DecodePlan::new(DecodeConfig {
            shape,
            score: case.score,
            mask: Mask::Causal,
            batch: requests,
            q_len: 1,
            max_kv_len: max_open * PAGE,
            cache,
            splits,
            sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
        })
        .unwrap();
        // The dense kernel takes [kv_heads, batch, pages].
        let entry =
            |head: usize, request: usize| &data.open_table[(request * 2 + head) * max_open..][..max_open];
        let table: Vec<u32> =
            (0..2).flat_map(|head| (0..requests).flat_map(move |r| entry(head, r).to_vec())).collect();
        let (table, kv_len) = (rig.upload(&table), rig.upload(&data.kv_len));
        let (q, keys) = (rig.upload(&data.q), rig.upload(&data.runs));
        let values = rig.upload(&data.runs[page.values(0).start..]);
        let mut status = rig.zeroed::<u64>(1);
        let mut step_workspace = rig.workspace(plan.step_workspace());
        let mut workspace = rig.workspace(plan.workspace());
        let heads = requests * shape.q_heads();
        let (mut out, mut lse) = (rig.poisoned::<f16>(heads * shape.v_dim()), rig.poisoned::<f32>(heads));
        let args = DecodeStepArgs {
            kv_len: &rig.view(&kv_len),
            block_table: Some(&rig.view(&table)),
            kv_start: None,
            status: rig.view_mut(&mut status),
        };
        let planned = DecodeStep::prepare(rig.device(), &plan).unwrap();
        let planned = planned.run(rig.queue(), args, rig.workspace_view(&mut step_workspace)).unwrap();
        let args = DecodeArgs {
            q: &rig.view(&q),
            k: &rig.view(&keys),
            v: &rig.view(&values),
            block_table: Some(&rig.view(&table)),
            kv_start: None,
            out: rig.view_mut(&mut out),
            lse: rig.view_mut(&mut lse),
        };
        let dense = Decode::<_, f16>::prepare(rig.device(), &plan).unwrap();
        dense.run(rig.queue(), args, &planned, rig.workspace_view(&mut workspace)).unwrap();
        let name = format!("{tokens:?}, {splits:?} on {}", rig.name());
        assert_eq!((found.fault, rig.download(&status)[0]), (None, 0), "{name}");
        let bits = |values: &[f16]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found.out), bits(&rig.download(&out)), "{name}: out");
        assert_eq!(found.lse, rig.download(&lse), "{name}: lse");
    }
}

fn bad_rows_read_nothing_and_the_others_are_right<R: Rig>(rig: &R) {
    type Spoil = fn(&Case, &mut Data<f16>);
    let cases: [(&str, Spoil, FaultCode); 5] = [
        (
            "slot out of range",
            |case, data| data.slot_of[case.extent.max_selected..].fill(99),
            FaultCode::BadIndex,
        ),
        (
            "run of a slot out of range",
            |case, data| data.slot_table[case.extent.slots..][..case.extent.slots].fill(1000),
            FaultCode::BadPage,
        ),
        (
            "run of an open page out of range",
            |case, data| data.open_table[case.extent.max_open..][..case.extent.max_open].fill(1000),
            FaultCode::BadPage,
        ),
        ("more closed than there is", |_, data| data.closed[1] = data.kv_len[1] + 1, FaultCode::BadLength),
        (
            "page out of range",
            |case, data| {
                let (first, count) = (case.extent.max_selected, case.extent.max_selected);
                let pages = data.selected[first..][..count].iter_mut();
                pages.filter(|page| **page != NONE).for_each(|page| *page = 1000);
            },
            FaultCode::BadPage,
        ),
    ];
    let rows = [3, 2].map(|count| RowPages { selected: vec![(16, false); count], open: 5 });
    for (name, spoil, code) in cases {
        let case = Case::new((2, 1), 64, 16, attention::DType::F16, &rows);
        let mut data = Data::<f16>::new(&case);
        let (mut out, mut lse) = data.oracle(&case, &[0, 1]);
        spoil(&case, &mut data);
        let (found, _) = run(rig, &case, &data);
        let name = format!("{name} on {}", rig.name());
        assert_eq!(found.fault, Some(Fault { code: code as u32, index: 1 }), "{name}");
        out[2 * 64..].fill(0.0);
        lse[2..].fill(f64::NEG_INFINITY);
        Comparison::attention(&found.out, &out, 64).assert(&name);
        Comparison::new(&found.lse, &lse, Tolerance::LSE).assert(&name);
    }
}

/// Parts of a row meet in whichever block comes last: the bits must not show which.
fn many_launches_repeat_bitwise<R: Rig>(rig: &R) {
    let mut rng = Rng::new(8);
    let rows: Vec<RowPages> = [9, 1, 17].map(|count| pages(&mut rng, count, 32, 7)).to_vec();
    let case = Case::new((4, 1), 64, 32, attention::DType::F16, &rows);
    let data = Data::<f16>::new(&case);
    let bits = |found: Found<f16>| {
        (found.out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), found.lse, found.fault)
    };
    let first = bits(run(rig, &case, &data).0);
    for launch in 1..(rig.stress_launches() / 10).min(10_000) {
        assert!(bits(run(rig, &case, &data).0) == first, "launch {launch} on {} differs", rig.name());
    }
}

#[test]
fn refused_plans_name_the_argument() {
    let rows = [RowPages { selected: vec![(16, false)], open: 0 }];
    let case = Case::new((2, 1), 64, 16, attention::DType::F16, &rows);
    let good = AttendConfig { extent: case.extent, score: case.score, splits: Splits::Balanced, sm_count: 2 };
    assert_eq!(AttendPlan::new(good).unwrap().bytes_moved(3), 3 * 16 * 64 * 2 * 2);
    for (config, named) in [
        (AttendConfig { splits: Splits::Fixed { tokens: 100 }, ..good }, "splits"),
        (AttendConfig { sm_count: 0, ..good }, "sm_count"),
        (AttendConfig { extent: Extent { requests: 0, ..case.extent }, ..good }, "requests"),
        (AttendConfig { extent: Extent { runs: 1 << 31, ..case.extent }, ..good }, "runs"),
        (AttendConfig { extent: Extent { slots: 0, ..case.extent }, ..good }, "slots"),
    ] {
        match AttendPlan::new(config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
    let odd = HeadShape::new(2, 1, 80, 80).unwrap();
    let page = PageSpec::new(16, 80, 80, attention::DType::F16).unwrap();
    let refused =
        AttendPlan::new(AttendConfig { extent: Extent { shape: odd, page, ..case.extent }, ..good });
    assert!(matches!(refused, Err(Error::Cuda(_))), "{refused:?}");
}

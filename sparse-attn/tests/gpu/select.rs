//! Selection on the device: summaries and scores up to rounding, and of equal scores the same pages as on the CPU.

use std::sync::Arc;

use attention::rope::{Rope, RopeConfig};
use attention::testing::Rng;
use attention::{DType, Element, FaultCode, HeadShape, Score};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use sparse_attn::Error;
use sparse_attn::gpu::{
    Choose, ChooseArgs, ChooseConfig, Extent, Select, SelectArgs, SelectConfig, SelectPlan, SummariseArgs,
};
use sparse_attn::index::gate::{GateIndex, GateWeights};
use sparse_attn::index::pages::{PageIndex, Scorer};
use sparse_attn::index::{Closing, GroupQuery, Index};
use sparse_attn::metadata::NONE;
use sparse_attn::page::PageSpec;
use sparse_attn::partition::Partitions;
use sparse_attn::select::{Aggregation, SelectRule, aggregate, choose, select as cpu_select};

emulator::device_test!(
    chunks_are_scored_as_on_the_cpu,
    integers_are_scored_exactly,
    of_given_scores_the_same_pages,
    gates_choose_by_their_scores,
    bad_rows_select_nothing,
);

fn rule(sinks: usize, recent: usize, estimate: f64) -> SelectRule {
    let score = Score::new(0.125).unwrap();
    SelectRule { aggregation: Aggregation::Raw, score, pages: 0, sinks, recent, estimate }
}

/// Keys of every row, closed in two rounds, summarised, scored and selected on the device.
struct Found {
    summaries: Vec<f32>,
    aggregated: Vec<f32>,
    selected: Vec<u32>,
    fault: Option<Fault>,
}

struct Case {
    extent: Extent,
    scorer: Scorer,
    partition_pages: usize,
    rule: SelectRule,
    /// Partitions of each row.
    partitions: Vec<usize>,
    /// Keys `[rows, max_partitions · tokens, dim]` and queries `[rows, group, dim]`.
    k: Vec<f32>,
    q: Vec<f32>,
}

impl Case {
    fn new(
        (heads, dim, dtype): ((usize, usize), usize, DType),
        scorer: Scorer,
        (page, partition_pages): (usize, usize),
        partitions: &[usize],
        values: impl Fn(&mut Rng) -> f32,
    ) -> Self {
        let shape = HeadShape::new(heads.0, heads.1, dim, dim).unwrap();
        let max_pages = partitions.iter().max().unwrap() * partition_pages;
        let extent = Extent {
            requests: partitions.len() / heads.1,
            shape,
            page: PageSpec::new(page, dim, dim, dtype).unwrap(),
            max_pages,
            max_selected: max_pages,
            slots: max_pages,
            max_open: max_pages,
            runs: partitions.len() * max_pages,
            host_pages: 1,
        };
        let pages = (max_pages / 2).max(partition_pages);
        let rule = SelectRule { aggregation: Aggregation::Mean, pages, ..rule(1, 1, 0.0) };
        let mut rng = Rng::new(11);
        let k = (0..partitions.len() * max_pages * page * dim).map(|_| values(&mut rng)).collect();
        let q = (0..partitions.len() * shape.group() * dim).map(|_| values(&mut rng)).collect();
        Case { extent, scorer, partition_pages, rule, partitions: partitions.to_vec(), k, q }
    }

    fn run<R: Rig, E: Storage + Element>(&self, rig: &R) -> Found {
        let Extent { page, max_pages, max_selected, runs, .. } = self.extent;
        let rows = self.extent.rows();
        let plan = SelectPlan::new(SelectConfig {
            extent: self.extent,
            scorer: self.scorer,
            partition_pages: self.partition_pages,
            rule: self.rule,
            max_closing: max_pages,
            sm_count: cuda::launch::Device::sm_count(rig.device()).unwrap_or(2),
        })
        .unwrap();
        let kernel = Select::<_, E>::prepare(rig.device(), &plan).unwrap();
        // Page p of row r lies in run r·max_pages + p; values are nobody's business here.
        let mut memory: Vec<E> = attention::testing::poison(runs * page.elements());
        let keys = page.keys(page.tokens()).end;
        for (run, k) in memory.chunks_exact_mut(page.elements()).zip(self.k.chunks_exact(keys)) {
            run[..keys].iter_mut().zip(k).for_each(|(to, &x)| *to = E::from_f32(x));
        }
        let memory = rig.upload(&memory);
        let mut summaries = rig.poisoned::<E>(plan.summary_elements());
        let mut status = rig.zeroed::<u64>(1);
        // Half of the partitions, then the others.
        for round in 0..2 {
            let (mut closing, mut counts) = (vec![NONE; rows * max_pages * 4], vec![0; rows]);
            for (row, &partitions) in self.partitions.iter().enumerate() {
                let half = partitions / 2 * self.partition_pages;
                let of = if round == 0 { 0..half } else { half..partitions * self.partition_pages };
                counts[row] = of.len() as u32;
                for (i, number) in of.enumerate() {
                    let entry = [number as u32, (row * max_pages + number) as u32, NONE, NONE];
                    closing[(row * max_pages + i) * 4..][..4].copy_from_slice(&entry);
                }
            }
            let (closing, counts) = (rig.upload(&closing), rig.upload(&counts));
            let args = SummariseArgs {
                closing: [&rig.view(&closing), &rig.view(&counts)],
                runs: &rig.view(&memory),
                summaries: rig.view_mut(&mut summaries),
                status: rig.view_mut(&mut status),
            };
            kernel.summarise(rig.queue(), args).unwrap();
        }
        let counts: Vec<u32> = self.partitions.iter().map(|&n| n as u32).collect();
        let (counts, budget) = (rig.upload(&counts), rig.upload(&vec![self.rule.pages as u32; rows]));
        let q = rig.upload(&self.q.iter().map(|&x| E::from_f32(x)).collect::<Vec<_>>());
        let epoch = rig.upload(&(0..rows as u32).collect::<Vec<_>>());
        let mut selected_epoch = rig.poisoned::<u32>(rows);
        let mut aggregated = rig.poisoned::<f32>(rows * plan.max_partitions());
        let mut selected = rig.poisoned::<u32>(rows * max_selected);
        let mut workspace = rig.workspace(plan.workspace());
        let args = SelectArgs {
            q: &rig.view(&q),
            summaries: &rig.view(&summaries),
            num_partitions: &rig.view(&counts),
            budget: &rig.view(&budget),
            rows: None,
            epoch: Some((&rig.view(&epoch), rig.view_mut(&mut selected_epoch))),
            aggregated: rig.view_mut(&mut aggregated),
            selected: rig.view_mut(&mut selected),
            status: rig.view_mut(&mut status),
        };
        kernel.run(rig.queue(), args, rig.workspace_view(&mut workspace)).unwrap();
        assert_eq!(rig.download(&selected_epoch), rig.download(&epoch));
        Found {
            summaries: rig.download(&summaries).iter().map(|x| x.to_f32()).collect(),
            aggregated: rig.download(&aggregated),
            selected: rig.download(&selected),
            fault: Fault::decode(rig.download(&status)[0]),
        }
    }

    /// Compares with the CPU's index, within `tolerance` of a score and with its choice by the device's scores.
    fn check<R: Rig, E: Storage + Element>(&self, rig: &R, tolerance: f32) {
        let found = self.run::<R, E>(rig);
        let Extent { shape, page, max_pages, max_selected, .. } = self.extent;
        let (dim, most) = (shape.qk_dim(), max_pages / self.partition_pages);
        let tokens = self.partition_pages * page.tokens();
        let name = format!("{:?}, {:?}, {:?} on {}", self.scorer, self.rule, self.extent, rig.name());
        assert_eq!(found.fault, None, "{name}");
        for (row, &count) in self.partitions.iter().enumerate() {
            let round = |x: &f32| E::from_f32(*x).to_f32();
            let k: Vec<f32> = self.k[row * max_pages * page.tokens() * dim..][..count * tokens * dim]
                .iter()
                .map(round)
                .collect();
            let q: Vec<f32> =
                self.q[row * shape.group() * dim..][..shape.group() * dim].iter().map(round).collect();
            let mut index = PageIndex::new(self.scorer, tokens, dim);
            index.close(&Closing { k: &k, k_unrotated: None, v: &k, position: 0 }).unwrap();
            let width = self.scorer.vectors() * dim;
            let of_row = &found.summaries[row * most * width..][..count * width];
            let step = 2.0 * <E as Element>::DTYPE.epsilon() as f32;
            for (i, (&found, &expected)) in of_row.iter().zip(index.summaries()).enumerate() {
                let close = (found - expected).abs() <= step * expected.abs().max(0.05);
                assert!(close, "{name}, row {row}, summary element {i}: {found}, not {expected}");
            }
            let (mut raw, mut scores) = (Vec::new(), Vec::new());
            index.score(&GroupQuery { q: &q, q_unrotated: None, position: 0 }, &mut raw).unwrap();
            aggregate(self.rule.aggregation, &self.rule.score, &raw, count, &mut scores);
            let aggregated = &found.aggregated[row * most..][..count];
            for (i, (&found, &expected)) in aggregated.iter().zip(&scores).enumerate() {
                let close = (found - expected).abs() <= tolerance * expected.abs().max(1e-3);
                assert!(close, "{name}, row {row}, partition {i}: {found}, not {expected}");
            }
            let mut partitions = Partitions::default();
            (0..count).for_each(|_| partitions.push(&page, tokens));
            let mut pages = choose(aggregated, &partitions, &self.rule).pages;
            pages.resize(max_selected, NONE);
            assert_eq!(found.selected[row * max_selected..][..max_selected], pages, "{name}, row {row}");
        }
    }
}

fn chunks_are_scored_as_on_the_cpu<R: Rig>(rig: &R) {
    let normal = |rng: &mut Rng| rng.normal() as f32;
    // Every scorer and aggregation; partitions of one page and of two, a row without any, more than a block's worth.
    for (scorer, aggregation) in [
        (Scorer::MinMax, Aggregation::Mean),
        (Scorer::CuboidMean, Aggregation::Max),
        (Scorer::MeanStd { weight: 0.25 }, Aggregation::Sum),
    ] {
        let mut case = Case::new(((3, 1), 64, DType::F16), scorer, (8, 2), &[9, 0, 83], normal);
        case.rule.aggregation = aggregation;
        case.check::<R, f16>(rig, 2e-2);
    }
    let mean = Case::new(((3, 1), 128, DType::F16), Scorer::Mean, (8, 1), &[20], normal);
    mean.check::<R, f16>(rig, 2e-2);
    let mut case = Case::new(((20, 2), 128, DType::BF16), Scorer::MinMax, (16, 1), &[5, 21], normal);
    case.rule.score = case.rule.score.with_soft_cap(50.0).unwrap();
    case.check::<R, bf16>(rig, 2e-2);
}

/// Products and sums of small integers are exact in any order, so that even the scores are equal bit by bit.
fn integers_are_scored_exactly<R: Rig>(rig: &R) {
    let integers = |rng: &mut Rng| rng.below(7) as f32 - 3.0;
    let mut case = Case::new(((4, 2), 64, DType::F16), Scorer::MinMax, (16, 1), &[40, 17], integers);
    case.rule.aggregation = Aggregation::Raw;
    case.check::<R, f16>(rig, 0.0);
}

/// Scores of one row and the partitions' pages.
fn choose_on_device<R: Rig>(
    rig: &R,
    config: &ChooseConfig,
    scores: &[f32],
    first_page: Option<&[u32]>,
    num_partitions: &[u32],
    budget: &[u32],
) -> (Vec<u32>, Vec<u32>, Option<Fault>) {
    let kernel = Choose::prepare(rig.device(), config).unwrap();
    let (scores, budget) = (rig.upload(scores), rig.upload(budget));
    let (counts, first_page) = (rig.upload(num_partitions), first_page.map(|pages| rig.upload(pages)));
    let mut aggregated = rig.poisoned::<f32>(config.rows * config.max_partitions);
    let mut selected = rig.poisoned::<u32>(config.rows * config.max_selected);
    let mut estimated = rig.poisoned::<u32>(config.rows * config.max_estimated);
    let mut status = rig.zeroed::<u64>(1);
    let first_page = first_page.as_ref().map(|pages| rig.view(pages));
    let args = ChooseArgs {
        scores: &rig.view(&scores),
        num_partitions: &rig.view(&counts),
        budget: &rig.view(&budget),
        first_page: first_page.as_ref(),
        aggregated: rig.view_mut(&mut aggregated),
        selected: rig.view_mut(&mut selected),
        estimated: (config.max_estimated > 0).then(|| rig.view_mut(&mut estimated)),
        status: rig.view_mut(&mut status),
    };
    kernel.run(rig.queue(), args).unwrap();
    let fault = Fault::decode(rig.download(&status)[0]);
    (rig.download(&selected), rig.download(&estimated), fault)
}

fn of_given_scores_the_same_pages<R: Rig>(rig: &R) {
    let spec = PageSpec::new(8, 64, 64, DType::F16).unwrap();
    let mut rng = Rng::new(5);
    type Draw = fn(&mut Rng) -> f32;
    let draws: [(&str, Draw); 5] = [
        ("normal", |rng| rng.normal() as f32),
        ("probabilities, close together", |rng| 1e-4 + 1e-7 * rng.uniform() as f32),
        ("many ties", |rng| rng.below(3) as f32 - 1.0),
        ("all equal", |_| 0.5),
        ("with NaN and infinities", |rng| match rng.below(5) {
            0 => f32::NAN,
            1 => f32::NEG_INFINITY,
            2 => f32::INFINITY,
            3 => -0.0,
            _ => 0.0,
        }),
    ];
    for (name, draw) in draws {
        // Partitions of one size, then of sizes of their own; budgets from nothing to everything.
        for (counts, sizes) in [([0, 1, 70, 600], None), ([5, 33, 64, 131], Some(40))] {
            let most = 600;
            let config = ChooseConfig {
                rows: 4,
                columns: 1,
                max_partitions: most,
                partition_pages: 2,
                max_selected: 1200,
                max_estimated: 60,
                rule: rule(1, 2, 0.1),
            };
            let scores: Vec<f32> = (0..4 * most).map(|_| draw(&mut rng)).collect();
            let mut first_page = vec![0u32; 4 * (most + 1)];
            let mut all = Vec::new();
            for (row, &count) in counts.iter().enumerate() {
                let mut partitions = Partitions::default();
                for number in 0..count {
                    let tokens = sizes.map_or(16, |largest| 1 + rng.below(largest));
                    partitions.push(&spec, tokens);
                    first_page[row * (most + 1) + number + 1] = partitions.pages() as u32;
                }
                all.push(partitions);
            }
            for budget in [[0, 3, 11, 100], [1, 2, 40, 1200], [7, 10, 64, 333]] {
                let counts = counts.map(|count| count as u32);
                let pages = sizes.map(|_| first_page.as_slice());
                let (selected, estimated, fault) =
                    choose_on_device(rig, &config, &scores, pages, &counts, &budget);
                let name = format!("{name}, {counts:?}, {sizes:?}, {budget:?} on {}", rig.name());
                assert_eq!(fault, None, "{name}");
                for (row, partitions) in all.iter().enumerate() {
                    let rule = SelectRule { pages: budget[row] as usize, ..config.rule };
                    let scores = &scores[row * most..][..partitions.len()];
                    let mut expected = choose(scores, partitions, &rule);
                    expected.pages.resize(1200, NONE);
                    expected.estimated.resize(60, NONE);
                    assert_eq!(selected[row * 1200..][..1200], expected.pages, "{name}, row {row}");
                    assert_eq!(estimated[row * 60..][..60], expected.estimated, "{name}, row {row}");
                }
            }
        }
    }
}

/// SeerAttention-R: one gate query for the group, blocks of two pages, scores that a gate has made.
fn gates_choose_by_their_scores<R: Rig>(rig: &R) {
    let (group, dim, gate_dim, blocks) = (4, 32, 16, 50);
    let mut rng = Rng::new(23);
    let mut normal = |count: usize| (0..count).map(|_| rng.normal() as f32).collect::<Vec<f32>>();
    let rope = Rope::new(RopeConfig::new(gate_dim, 10_000.0), 4096).unwrap();
    let (w_q, w_k) = (normal(gate_dim * group * dim), normal(gate_dim * 3 * dim));
    let weights = GateWeights::new(w_q, w_k, (group, dim, gate_dim), rope).unwrap();
    let mut index = GateIndex::new(Arc::new(weights), 32);
    let k = normal(blocks * 32 * dim);
    index.close(&Closing { k: &k, k_unrotated: Some(&k), v: &k, position: 0 }).unwrap();
    let q = normal(group * dim);
    let query = GroupQuery { q: &q, q_unrotated: Some(&q), position: blocks * 32 };
    let mut scores = Vec::new();
    index.score(&query, &mut scores).unwrap();

    let spec = PageSpec::new(16, 64, 64, DType::F16).unwrap();
    let mut partitions = Partitions::default();
    (0..blocks).for_each(|_| partitions.push(&spec, 32));
    let rule = SelectRule { pages: 20, ..rule(1, 1, 0.0) };
    let expected = cpu_select(&index, &partitions, &query, &rule).unwrap();
    let config = ChooseConfig {
        rows: 1,
        columns: 1,
        max_partitions: blocks,
        partition_pages: 2,
        max_selected: 20,
        max_estimated: 0,
        rule,
    };
    let (selected, _, fault) = choose_on_device(rig, &config, &scores, None, &[blocks as u32], &[20]);
    assert_eq!((selected, fault), (expected.pages, None), "on {}", rig.name());
}

fn bad_rows_select_nothing<R: Rig>(rig: &R) {
    let config = ChooseConfig {
        rows: 2,
        columns: 1,
        max_partitions: 8,
        partition_pages: 1,
        max_selected: 4,
        max_estimated: 0,
        rule: rule(0, 1, 0.0),
    };
    let scores: Vec<f32> = (0..16).map(|i| i as f32).collect();
    let ascending: Vec<u32> = (0..9).chain(0..9).collect();
    let mut descending = ascending.clone();
    descending[9 + 4] = 1;
    for (name, counts, budget, first_page, code) in [
        ("too many partitions", [8, 9], [3, 3], None, FaultCode::BadLength),
        ("too large a budget", [8, 8], [3, 5], None, FaultCode::BadLength),
        ("pages do not ascend", [8, 8], [3, 3], Some(&descending), FaultCode::BadRange),
    ] {
        let first_page = first_page.map(Vec::as_slice);
        let (selected, _, fault) = choose_on_device(rig, &config, &scores, first_page, &counts, &budget);
        let name = format!("{name} on {}", rig.name());
        assert_eq!(selected, [5, 6, 7, NONE, NONE, NONE, NONE, NONE], "{name}");
        assert_eq!(fault, Some(Fault { code: code as u32, index: 1 }), "{name}");
    }
}

#[test]
fn refused_plans_name_the_argument() {
    let case = Case::new(((2, 1), 64, DType::F16), Scorer::MinMax, (8, 2), &[4], |_| 0.0);
    let good = SelectConfig {
        extent: case.extent,
        scorer: case.scorer,
        partition_pages: 2,
        rule: case.rule,
        max_closing: 8,
        sm_count: 2,
    };
    let plan = SelectPlan::new(good).unwrap();
    assert_eq!((plan.max_partitions(), plan.summary_elements()), (4, 4 * 128));
    assert_eq!((plan.bytes_moved(3), plan.flops(3)), (3 * 128 * 2, 3 * 128 * 2 * 2));
    for (config, named) in [
        (SelectConfig { rule: SelectRule { pages: 100, ..case.rule }, ..good }, "pages"),
        (SelectConfig { max_closing: 7, ..good }, "max_closing"),
        (SelectConfig { partition_pages: 0, ..good }, "max_closing"),
        (SelectConfig { partition_pages: 16, max_closing: 16, ..good }, "max_pages"),
    ] {
        match SelectPlan::new(config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
}

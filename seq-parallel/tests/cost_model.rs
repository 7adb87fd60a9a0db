//! The planner: the paper's formulas and crossovers, the corrected model, selection, thresholds of pass-KV and pass-Q, simulation.

use seq_parallel::Error;
use seq_parallel::cost_model::corrected::{self, Rates};
use seq_parallel::cost_model::{Cluster, Layer, Mlp, Profile, Scheme, paper};
use seq_parallel::placement::Placement;
use seq_parallel::ring::{Direction, Rates as DirectionRates};
use seq_parallel::select::{self, Model, combinations, fastest};
use seq_parallel::simulate::{LLAMA_405B_TP8, Machines, Prefill, simulate};
use seq_parallel::transport::sim::Link;

/// The paper's testbed: four nodes of eight, regions of four.
const P4DE: Cluster = Cluster { nodes: 4, gpus: 8, region: 4 };
/// Rates of the order of an H100's; only their ratios matter here.
const RATES: Rates = Rates {
    attention_flops_per_s: 540e12,
    half_rate_tokens: 512.0,
    matmul_flops_per_s: 650e12,
    intra: Link::NVLINK,
    inter: Link::NIC_400G,
    element_bytes: 2.0,
    kv_bytes: 2.0,
};

#[test]
fn volumes_as_printed() {
    // Written out by hand for d 8192, 64 query and 8 KV heads of 128, T 4, G 8: 2·s·8192·3·8, 2·s·72·128·7 + (8192·72·128 + 8192²)·8·3/4 …
    for (s, megatron, ulysses) in [
        (1024.0, 402_653_184.0, 987_758_592.0),
        (4096.0, 1_610_612_736.0, 1_384_120_320.0),
        (8192.0, 3_221_225_472.0, 1_912_602_624.0),
        (16384.0, 6_442_450_944.0, 2_969_567_232.0),
    ] {
        let volumes = |scheme| paper::attention(scheme, &Layer::LLAMA_70B, &P4DE, s);
        assert_eq!(volumes(Scheme::Megatron).elements, megatron, "Megatron, {s} tokens");
        assert_eq!(volumes(Scheme::Ulysses).elements, ulysses, "Ulysses, {s} tokens");
        let mlp = |scheme| paper::mlp(scheme, &Layer::LLAMA_70B, &P4DE, s);
        assert_eq!(mlp(Scheme::Megatron).elements, megatron, "the MLP gathers and scatters the same tokens");
        assert_eq!(mlp(Scheme::Ulysses).elements, 3_221_225_472.0, "8·8192²·3·8/4, whatever the tokens");
        assert_eq!(mlp(Scheme::Ulysses).flops, 16.0 * s * 8192.0 * 8192.0);
    }
    // At s = 1024: 2sd·9216/4 + 4(4s)²d/4 + 2sd², and 2sd·9216 + 4(8s)²d/8 + 2sd².
    let flops = |scheme| paper::attention(scheme, &Layer::LLAMA_70B, &P4DE, 1024.0).flops;
    assert_eq!(flops(Scheme::Megatron), 38_654_705_664.0 + 137_438_953_472.0 + 137_438_953_472.0);
    assert_eq!(flops(Scheme::Ulysses), 154_618_822_656.0 + 274_877_906_944.0 + 137_438_953_472.0);
}

#[test]
fn crossovers_of_communication() {
    for (name, layer, attention, mlp) in
        [("Llama 70B", Layer::LLAMA_70B, 3239.0, 8192.0), ("Yi 34B", Layer::YI_34B, 2880.0, 7168.0)]
    {
        let found = paper::attention_crossover(&layer, &P4DE).unwrap();
        assert!((found - attention).abs() < 1.0, "{name}: {found}");
        assert_eq!(paper::mlp_crossover(&layer, &P4DE), Some(mlp), "{name}");
        // On either side of it the other scheme moves less.
        let less = |s: f64| {
            let volume = |scheme| paper::attention(scheme, &layer, &P4DE, s).elements;
            volume(Scheme::Megatron) < volume(Scheme::Ulysses)
        };
        assert!(less(found - 1.0) && !less(found + 1.0), "{name}");
    }
    let alone = Cluster { region: 1, ..P4DE };
    assert_eq!(paper::attention_crossover(&Layer::LLAMA_70B, &alone), None);
    assert_eq!(paper::mlp_crossover(&Layer::LLAMA_70B, &alone), None);
}

#[test]
fn the_corrected_model_agrees_with_itself() {
    let layer = Layer::LLAMA_70B_SWIGLU;
    let exact = Rates { half_rate_tokens: 0.0, ..RATES };
    for s in [256.0, 4096.0, 32768.0] {
        let [megatron, ulysses] = [Scheme::Megatron, Scheme::Ulysses]
            .map(|scheme| corrected::attention(scheme, &layer, &P4DE, &exact, s, f64::INFINITY));
        // The same work, whoever does it, once blocks fill a GPU: and that is the FLOPs of the layer.
        assert_eq!(megatron.compute, ulysses.compute, "{s} tokens");
        let projections = 2.0 * s * 8192.0 * (64.0 + 16.0 + 64.0) * 128.0 / 650e12;
        let attention = 2.0 * s * (s * 32.0) * 8192.0 / 540e12;
        assert!((megatron.compute / (projections + attention) - 1.0).abs() < 1e-12);
        // Small blocks cost more, and a shorter ring has larger ones.
        let real = |scheme| corrected::attention(scheme, &layer, &P4DE, &RATES, s, f64::INFINITY).compute;
        assert!(real(Scheme::Megatron) > real(Scheme::Ulysses) && real(Scheme::Ulysses) > ulysses.compute);
        // A ring is hidden once the blocks of a node are long: c = sG ≥ F·e/(g·B) = 2700 tokens at g = 8, 540 TFLOP/s and 50 GB/s.
        assert_eq!(ulysses.exposed_ring > 0.0, 8.0 * s < 2700.0, "{s} tokens: {} s", ulysses.exposed_ring);
        // Weights that arrive while the stage before runs cost nothing.
        let waiting = corrected::mlp(Scheme::Ulysses, &layer, &P4DE, &RATES, s, 0.0);
        assert!(waiting.exposed_weights > 0.0);
        assert_eq!(corrected::mlp(Scheme::Ulysses, &layer, &P4DE, &RATES, s, 1.0).exposed_weights, 0.0);
    }
}

#[test]
fn the_fastest_combination_depends_on_the_length() {
    for model in [Model::Paper, Model::Corrected] {
        let choose = |s| fastest(model, &Layer::LLAMA_70B, &P4DE, &RATES, s).unwrap();
        let (short, long) = (choose(16.0), choose(65536.0));
        assert_eq!((short.attention, short.mlp), (Scheme::Megatron, Scheme::Megatron), "{model:?}, short");
        assert_eq!(long.mlp, Scheme::Ulysses, "{model:?}, long");
        let all = combinations(model, &Layer::LLAMA_70B, &P4DE, &RATES, 4096.0).unwrap();
        assert_eq!(all.len(), 4);
        assert!(all.is_sorted_by(|a, b| a.seconds <= b.seconds));
    }
    // The paper's printed attention terms penalise Ulysses by G/T, so that it never wins the attention stage; corrected it does.
    assert_eq!(
        fastest(Model::Paper, &Layer::LLAMA_70B, &P4DE, &RATES, 65536.0).unwrap().attention,
        Scheme::Megatron
    );
    assert_eq!(
        fastest(Model::Corrected, &Layer::LLAMA_70B, &P4DE, &RATES, 65536.0).unwrap().attention,
        Scheme::Ulysses
    );
    // Without tensor parallelism there is nothing to split by weights.
    let alone = Cluster { region: 1, ..P4DE };
    let all = combinations(Model::Corrected, &Layer::LLAMA_70B, &alone, &RATES, 4096.0).unwrap();
    assert_eq!(
        all.iter().map(|choice| (choice.attention, choice.mlp)).collect::<Vec<_>>(),
        [(Scheme::Ulysses, Scheme::Ulysses)]
    );
}

#[test]
fn clusters_and_heads_that_do_not_fit() {
    let fails =
        |layer: &Layer, cluster| fastest(Model::Corrected, layer, &cluster, &RATES, 1024.0).unwrap_err();
    assert!(matches!(
        fails(&Layer::LLAMA_70B, Cluster { nodes: 0, ..P4DE }),
        Error::Argument { argument: "nodes", .. }
    ));
    assert!(matches!(
        fails(&Layer::LLAMA_70B, Cluster { region: 3, ..P4DE }),
        Error::Divisibility { what: "gpus", .. }
    ));
    let odd = Layer { q_heads: 7.0, kv_heads: 1.0, ..Layer::LLAMA_70B };
    assert!(matches!(fails(&odd, P4DE), Error::Divisibility { what: "q_heads", count: 7, .. }));
}

/// Ways to share a prompt: all of them, the fastest first; what cannot be says why.
#[test]
fn every_way_is_estimated() {
    let schemes = |way: &select::Way| (way.attention, way.mlp, way.group, way.ring);
    let (m, u) = (Scheme::Megatron, Scheme::Ulysses);
    let all = select::ways(&Layer::LLAMA_70B_SWIGLU, &Profile::H100, 16, 4, 1 << 17).unwrap();
    let mut found: Vec<_> = all.iter().map(schemes).collect();
    found.sort_by_key(|&(attention, mlp, group, _)| (attention == u, mlp == u, group));
    let of = |attention, mlp, groups: &[usize]| -> Vec<_> {
        groups.iter().map(|&group| (attention, mlp, group, 16 / group)).collect()
    };
    let expected = [of(m, m, &[4]), of(m, u, &[4]), of(u, m, &[4, 8, 16]), of(u, u, &[4, 8, 16])].concat();
    assert_eq!(found, expected);
    assert!(all.is_sorted_by(|a, b| a.seconds() <= b.seconds()));
    // 8 KV heads go to 16 ranks, two of which have the same; a group of 16 crosses nodes, so that the network is what it uses.
    let [node, across] = [8, 16].map(|group| {
        let way = all.iter().find(|way| schemes(way) == (u, u, group, 16 / group)).unwrap();
        way.estimate.as_ref().unwrap()[0].intra
    });
    assert!(across > 5.0 * node, "{across} s and {node} s");
    // Groups that lie across the border of a node of 8 are as slow as the network: 3 ranks of 9 do, 2 of 10 do not.
    assert!(!Profile::H100.holds(3, 9) && Profile::H100.holds(2, 10) && Profile::H100.holds(3, 6));
    assert!(Profile::HOST.holds(3, 3000));
    // Weights that all ranks have leave Megatron nothing to split.
    let whole = select::ways(&Layer::LLAMA_8B_SWIGLU, &Profile::H100, 6, 1, 1000).unwrap();
    assert!(whole.iter().all(|way| (way.attention, way.mlp) == (u, u)));
    let cannot: Vec<usize> = whole.iter().filter(|way| way.estimate.is_err()).map(|way| way.group).collect();
    assert_eq!(cannot, [3, 6], "32 heads are not dealt to these, and they come last");
    // Keys in fewer bytes are carried faster; nothing else changes.
    let profile = |kv_bytes| Profile { rates: Rates { kv_bytes, ..Profile::H100.rates }, ..Profile::H100 };
    let seconds = |kv_bytes| {
        let ways = select::ways(&Layer::LLAMA_70B_SWIGLU, &profile(kv_bytes), 8, 1, 1 << 17).unwrap();
        let way = ways.into_iter().find(|way| way.group == 8).unwrap();
        way.estimate.unwrap()[0].intra
    };
    let elements = (1 << 14) as f64 * 2.0 * 8.0 * 128.0 * 7.0 / 8.0;
    let saved = elements / Link::NVLINK.bytes_per_s;
    assert!(((seconds(2.0) - seconds(1.0)) / saved - 1.0).abs() < 1e-9);

    let refused = |ranks, region| {
        select::ways(&Layer::LLAMA_70B, &Profile::H100, ranks, region, 1000).unwrap_err().to_string()
    };
    assert!(refused(0, 1).contains("`ranks`") && refused(4, 0).contains("`region`"));
    assert!(refused(6, 4).contains("ranks = 6 cannot be dealt to 4 ranks: regions must divide the ranks"));
    let odd = Layer { mlp: Mlp::SwiGlu { inner: 30.0 }, ..Layer::LLAMA_70B };
    let ways = select::ways(&odd, &Profile::H100, 4, 4, 1000).unwrap();
    let error = ways.iter().find_map(|way| way.estimate.as_ref().err()).unwrap().to_string();
    assert!(error.contains("the MLP's inner dimension = 30 cannot be dealt to 4 ranks"), "{error}");
}

/// Llama 405B on four ranks of 540 TFLOP/s and 50 GB/s.
#[test]
fn thresholds_of_pass_kv_and_pass_q() {
    let rates = DirectionRates {
        ranks: 4,
        q_heads: 128,
        kv_heads: 8,
        q_bytes: 2,
        kv_bytes: 2,
        flops_per_s: 540e12,
        bytes_per_s: 50e9,
    };
    assert_eq!(rates.small_query_share(), 0.125);
    assert_eq!(rates.hidden_kv_tokens(), 2700.0);
    assert_eq!(rates.hidden_q_tokens(), 21_600.0);
    let total = 128_000;
    for (new, algorithm_1, refined) in [
        (total, Direction::PassKv, Direction::PassKv),
        (2700, Direction::PassKv, Direction::PassKv),
        (2600, Direction::PassQ, Direction::PassKv), // the all-to-all costs more than passing keys
        (2000, Direction::PassQ, Direction::PassQ),
        (1, Direction::PassQ, Direction::PassQ),
    ] {
        assert_eq!(rates.algorithm_1(new, total - new), algorithm_1, "{new} new tokens");
        assert_eq!(rates.choose(new, total - new), refined, "{new} new tokens, refined");
    }
    // The tipping share of the refined rule: 1.8 % at 50 GB/s, 3.1 % at 26 GB/s, of 128K tokens.
    for (bytes_per_s, percent) in [(50e9, 1.8), (26e9, 3.1)] {
        let rates = DirectionRates { bytes_per_s, ..rates };
        let tips = (1..total).find(|&new| rates.choose(new, total - new) == Direction::PassKv).unwrap();
        let found = 100.0 * tips as f64 / total as f64;
        assert!((found - percent).abs() < 0.1, "{bytes_per_s}: {found} %");
    }
    // Queries in f32 and keys in 16 bits: queries are the smaller message half as early.
    let mixed = DirectionRates { q_bytes: 4, ..rates };
    assert_eq!((mixed.small_query_share(), mixed.hidden_q_tokens()), (0.0625, 43_200.0));
    assert_eq!(mixed.hidden_kv_tokens(), 2700.0);
    // A short prefix: queries are no smaller than keys.
    assert_eq!(rates.choose(100, 100), Direction::PassKv);
}

fn machines(link: Link) -> Machines {
    Machines { link, attention_flops_per_s: 527e12, matmul_flops_per_s: 527e12, stragglers: vec![] }
}

fn prefill(tokens: usize, placement: Placement) -> Prefill {
    Prefill { tokens, placement, layer: LLAMA_405B_TP8, layers: 126, element_bytes: 2.0 }
}

/// Llama 405B, 128K tokens, published by Meta for 1 to 8 nodes of eight H100 (arXiv 2411.01783). The one free number is the rate, from
/// one node; the rest is the ring.
#[test]
fn simulated_prefills_are_like_published_ones() {
    for (nodes, published_s) in [(1, 42.01), (2, 21.04), (4, 10.95), (8, 5.85)] {
        let found = simulate(&prefill(131_072, Placement::Zigzag), &machines(Link::NIC_400G), nodes).unwrap();
        let off = found.total_s / published_s - 1.0;
        assert!(off.abs() < 0.12, "{nodes} nodes: {} s, not {published_s} s", found.total_s);
    }
}

#[test]
fn simulated_rings() {
    let fast = Link { alpha_s: 0.0, bytes_per_s: f64::INFINITY };
    let of = |placement, link, ranks| simulate(&prefill(131_072, placement), &machines(link), ranks).unwrap();
    // Without communication zigzag is perfect, and contiguous as bad as its imbalance.
    assert!((of(Placement::Zigzag, fast, 64).efficiency - 1.0).abs() < 1e-9);
    let [contiguous, zigzag] =
        [Placement::Contiguous, Placement::Zigzag].map(|placement| of(placement, fast, 64).attention_s);
    // No rank waits for keys that come at once, so the last takes its own work: (2P - 1)/P of the mean.
    assert!((contiguous / zigzag - 127.0 / 64.0).abs() < 1e-3, "{}", contiguous / zigzag);
    // What is exposed: (P - 1)(t_comm - t_comp) in steps that are all alike.
    let slow = Link { alpha_s: 1e-4, bytes_per_s: 1e9 };
    let found = of(Placement::Zigzag, slow, 16);
    let comm = slow.seconds(131_072.0 / 16.0 * 2.0 * 128.0 * 2.0);
    let step = of(Placement::Zigzag, fast, 16).attention_s / 16.0;
    assert!(comm > step, "the case is one of exposed communication");
    assert!((found.exposed_s / (15.0 * (comm - step)) - 1.0).abs() < 0.01, "{} s exposed", found.exposed_s);
    // One rank at half speed holds all of them up.
    let straggler = Machines { stragglers: vec![(5, 2.0)], ..machines(Link::NVLINK) };
    let late = simulate(&prefill(131_072, Placement::Zigzag), &straggler, 16).unwrap();
    let even = of(Placement::Zigzag, Link::NVLINK, 16);
    assert!(
        (1.9..2.1).contains(&(late.total_s / even.total_s)),
        "{} s after {} s",
        late.total_s,
        even.total_s
    );
    // Hundreds of ranks.
    let many = of(Placement::Zigzag, Link::NIC_400G, 512);
    assert!(many.efficiency > 0.0 && many.efficiency < 0.5, "{}", many.efficiency);
}

#[test]
fn what_a_simulation_refuses() {
    let prefill = prefill(1024, Placement::Zigzag);
    let good = machines(Link::NVLINK);
    let stragglers = Machines { stragglers: vec![(4, 2.0)], ..good.clone() };
    let rate = Machines { attention_flops_per_s: 0.0, ..good.clone() };
    for (named, machines, ranks) in
        [("ranks", good, 0), ("stragglers", stragglers, 4), ("attention_flops_per_s", rate, 4)]
    {
        let message = simulate(&prefill, &machines, ranks).unwrap_err().to_string();
        assert!(message.contains(named), "{named}: {message}");
    }
}

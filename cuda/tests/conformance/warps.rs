//! What threads of one block do together: reductions, named barriers, mbarriers.

use cuda::kernels::conformance::{MbarrierRounds, NamedBarriers, WarpReductions};
use cuda::launch::Device;
use cuda::table::ArchClass;
use emulator::rig::Rig;

use crate::data::{Random, assert_same};

emulator::device_test!(reductions, named_barriers, mbarrier_rounds);

fn reductions<R: Rig>(rig: &R) {
    let kernel = WarpReductions::prepare(rig.device()).expect("prepare");
    let (seed, warps) = (41, 5);
    let mut random = Random::new(seed);
    let integers = random.words(warps * 32);
    // Small integers: sums are exact in any order.
    let values: Vec<f32> = (0..warps * 32).map(|_| random.integer(-1000, 1000) as f32).collect();
    let mut out = rig.poisoned::<u32>(16 * warps * 32);
    let (given, numbers) = (rig.upload(&integers), rig.upload(&values));
    let (given, numbers) = (rig.view(&given), rig.view(&numbers));
    kernel.launch(rig.queue(), warps, &given, &numbers, &mut rig.view_mut(&mut out)).expect("launch");
    let out = rig.download(&out);

    // Which lanes a result of `lane` covers.
    let everyone = |_: usize, _: usize| true;
    let neighbours = |width: usize| move |lane: usize, other: usize| lane / width == other / width;
    let strided = |stride: usize| move |lane: usize, other: usize| lane % stride == other % stride;
    let sum = |values: &[f32]| values.iter().sum::<f32>();
    let maximum = |values: &[f32]| values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    type Covers<'a> = &'a dyn Fn(usize, usize) -> bool;
    type Fold<'a> = &'a dyn Fn(&[f32]) -> f32;
    let floats: [(&str, Covers<'_>, Fold<'_>); 8] = [
        ("warp_sum", &everyone, &sum),
        ("warp_max", &everyone, &maximum),
        ("warp_sum<4>", &neighbours(4), &sum),
        ("warp_max<4>", &neighbours(4), &maximum),
        ("warp_sum<16>", &neighbours(16), &sum),
        ("warp_sum_strided<4>", &strided(4), &sum),
        ("warp_max_strided<4>", &strided(4), &maximum),
        ("warp_sum_strided<8>", &strided(8), &sum),
    ];
    let plane = |index: usize| &out[index * warps * 32..(index + 1) * warps * 32];
    for (index, (name, covers, fold)) in floats.into_iter().enumerate() {
        let expected: Vec<u32> = (0..warps * 32)
            .map(|at| {
                let (warp, lane) = (at / 32, at % 32);
                let covered: Vec<f32> = (0..32)
                    .filter(|&other| covers(lane, other))
                    .map(|other| values[warp * 32 + other])
                    .collect();
                fold(&covered).to_bits()
            })
            .collect();
        assert_same(&format!("{name} (seed {seed}), {}", rig.name()), plane(index), &expected);
    }

    let signed = |warp: &[u32]| warp.iter().map(|&x| x as i32).collect::<Vec<i32>>();
    type Reduce<'a> = &'a dyn Fn(&[u32]) -> u32;
    let whole: [(&str, Reduce<'_>); 6] = [
        ("sum u32", &|warp| warp.iter().fold(0, |sum: u32, &x| sum.wrapping_add(x))),
        ("max u32", &|warp| *warp.iter().max().unwrap()),
        ("min u32", &|warp| *warp.iter().min().unwrap()),
        ("sum s32", &|warp| signed(warp).iter().fold(0, |sum: i32, &x| sum.wrapping_add(x)) as u32),
        ("max s32", &|warp| *signed(warp).iter().max().unwrap() as u32),
        ("min s32", &|warp| *signed(warp).iter().min().unwrap() as u32),
    ];
    for (index, (name, reduce)) in whole.into_iter().enumerate() {
        let expected: Vec<u32> = integers.chunks(32).flat_map(|warp| vec![reduce(warp); 32]).collect();
        assert_same(&format!("{name} (seed {seed}), {}", rig.name()), plane(8 + index), &expected);
    }
    let prefixes: Vec<u32> = integers
        .chunks(32)
        .flat_map(|warp| warp.iter().scan(0u32, |sum, &x| Some(std::mem::replace(sum, sum.wrapping_add(x)))))
        .collect();
    assert_same(&format!("prefix sum (seed {seed}), {}", rig.name()), plane(14), &prefixes);
    for elected in plane(15).chunks(32) {
        assert_eq!(elected.iter().sum::<u32>(), 1, "elect_one, {}: {elected:?}", rig.name());
    }
}

fn named_barriers<R: Rig>(rig: &R) {
    let kernel = NamedBarriers::prepare(rig.device()).expect("prepare");
    let seed = 42;
    let given = Random::new(seed).words(128);
    let input = rig.upload(&given);
    let mut out = rig.poisoned::<u32>(128);
    kernel.launch(rig.queue(), &rig.view(&input), &mut rig.view_mut(&mut out)).expect("launch");
    let expected: Vec<u32> = (0..128)
        .map(|thread| match thread / 32 {
            0 => given[thread + 32],
            1 => given[thread - 32],
            2 => given[thread].wrapping_mul(2),
            _ => given[thread].wrapping_add(given[thread - 32]),
        })
        .collect();
    assert_same(&format!("seed {seed}, {}", rig.name()), &rig.download(&out), &expected);
}

fn mbarrier_rounds<R: Rig>(rig: &R) {
    if !ArchClass::Hopper.runs_on(rig.device().arch()) {
        println!("SKIPPED mbarrier_rounds: {} is not sm_90a", rig.device().arch());
        return;
    }
    let kernel = MbarrierRounds::prepare(rig.device()).expect("prepare");
    let seed = 43;
    let mut random = Random::new(seed);
    for rounds in [0, 1, 2, 3, 4, 5, 17] {
        let given = random.words(rounds * 32);
        let input = rig.upload(&given);
        let mut out = rig.poisoned::<u32>(rounds * 96);
        let launched = kernel.launch(rig.queue(), rounds, &rig.view(&input), &mut rig.view_mut(&mut out));
        let what = format!("{rounds} rounds (seed {seed}), {}", rig.name());
        launched.unwrap_or_else(|error| panic!("{what}: {error}"));
        let expected: Vec<u32> = (0..rounds * 96)
            .map(|at| {
                let (round, consumer, lane) = (at / 96, at / 32 % 3, at % 32);
                given[round * 32 + 31 - lane].wrapping_add(consumer as u32)
            })
            .collect();
        assert_same(&what, &rig.download(&out), &expected);
    }
}

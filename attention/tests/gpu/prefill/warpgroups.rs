//! The kernel of Hopper: warpgroup products, caches by tensor maps.

use cuda::table::dtype;

use super::steps::{Step, carried, run_steps};
use super::*;

emulator::device_test!(
    equals_the_oracle,
    is_deaf_to_hidden_keys,
    carries_a_state,
    maxima_that_climb_slowly_are_kept_all_the_same,
);

/// Whether the device has warpgroup products; says so where it has not.
pub(crate) fn has_wgmma<R: Rig>(rig: &R) -> bool {
    let arch = cuda::launch::Device::arch(rig.device());
    let has = cuda::table::ArchClass::Hopper.runs_on(arch);
    if !has {
        println!("SKIPPED warpgroup products: {arch} is not sm_90a");
    }
    has
}

fn wgmma(case: Case) -> Case {
    Case { kernel: PrefillKernel::Wgmma, ..case }
}

fn by_copies(case: &Case) -> Case {
    Case { kernel: PrefillKernel::WgmmaCopies, ..case.clone() }
}

/// The kernel of Hopper, on the same cases: tiles of keys of 128, so lengths on both sides of that. Caches come by tensor maps, heads
/// side by side or one after another, in pages of less than a tile to several.
fn equals_the_oracle<R: Rig>(rig: &R) {
    if !has_wgmma(rig) {
        return;
    }
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let edges = [(0, 5), (1, 1), (3, 0), (127, 128), (65, 129)];
    check::<R, f16>(rig, &wgmma(Case::new((2, 2), (64, 64), &edges, Cache::Contiguous, Mask::Causal)), 61);
    check::<R, f16>(rig, &wgmma(Case::new((3, 1), (64, 64), &[(50, 270)], Cache::Gaps, Mask::Full)), 62);
    let ragged = [(70, 70), (5, 390), (0, 0)];
    check::<R, bf16>(rig, &wgmma(Case::new((8, 2), (128, 128), &ragged, Cache::Nhd(16), Mask::Causal)), 63);
    check::<R, bf16>(
        rig,
        &wgmma(Case::new((5, 1), (128, 128), &[(30, 430)], Cache::Hnd(8), window(40, 0))),
        64,
    );
    check::<R, bf16>(
        rig,
        &wgmma(Case::new((2, 1), (128, 128), &[(20, 400)], Cache::PerHead(64), window(33, 70))),
        65,
    );
    check::<R, bf16>(
        rig,
        &wgmma(Case::new((2, 2), (128, 128), &[(70, 300), (0, 9)], Cache::Hnd(256), Mask::Causal)),
        73,
    );
    let prefix = Mask::Prefix { prefix: 140 };
    check::<R, bf16>(
        rig,
        &wgmma(Case::new((4, 1), (128, 128), &[(30, 190), (10, 4)], Cache::Nhd(128), prefix)),
        66,
    );
    let saturated = Case::new((7, 1), (128, 128), &[(20, 280)], Cache::Contiguous, Mask::Causal);
    let saturated = wgmma(Case { inputs: Inputs::Saturated, ..saturated });
    check::<R, bf16>(rig, &saturated, 67);
    check::<R, bf16>(rig, &by_copies(&saturated), 67);
    let whole_tiles = Case::new((2, 2), (128, 128), &[(64, 256), (3, 128)], Cache::Gaps, window(100, 130));
    check::<R, bf16>(rig, &wgmma(whole_tiles), 68);
    // Gemma 2 27B.
    let capped = Case::new((2, 1), (128, 128), &[(70, 210)], Cache::Nhd(16), Mask::Causal);
    let capped = Case { soft_cap: Some(50.0), inputs: Inputs::OutlierChannels, ..capped };
    check::<R, bf16>(rig, &wgmma(capped.clone()), 70);
    check::<R, bf16>(rig, &wgmma(Case { soft_cap: Some(MAX_SOFT_CAP), ..capped }), 72);
    // Strides that no map can hold.
    let odd = Case::new((2, 2), (128, 128), &[(40, 150)], Cache::OddGaps, Mask::Causal);
    check::<R, bf16>(rig, &wgmma(odd), 69);
}

/// Boxes bring in what lies beside a sequence and what its mask hides: NaN and infinity there change nothing.
fn is_deaf_to_hidden_keys<R: Rig>(rig: &R) {
    if !has_wgmma(rig) {
        return;
    }
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    // The keys of a sequence without queries are all hidden: before, between and behind the others.
    let neighbours = [(0, 70), (40, 150), (0, 200), (130, 130), (3, 20), (0, 9)];
    let cases = [
        Case::new((2, 1), (128, 128), &neighbours, Cache::Contiguous, Mask::Causal),
        Case::new((2, 2), (128, 128), &[(20, 300), (0, 90)], Cache::Gaps, window(33, 5)),
        Case::new((3, 1), (64, 64), &neighbours, Cache::Contiguous, window(90, 0)),
        Case::new((2, 2), (64, 64), &[(3, 150), (40, 41), (20, 600)], Cache::Gaps, window(33, 140)),
    ];
    for (seed, case) in cases.into_iter().enumerate() {
        match case.dims.0 {
            128 => forgetful::<R, bf16>(rig, &wgmma(case), seed as u64 + 81),
            _ => forgetful::<R, f16>(rig, &wgmma(case), seed as u64 + 81),
        }
    }
    for (cache, seed) in [(Cache::Nhd(16), 85), (Cache::PerHead(8), 86), (Cache::Hnd(64), 87)] {
        let paged = Case::new((2, 2), (128, 128), &[(20, 300), (0, 90)], cache, window(33, 5));
        forgetful::<R, bf16>(rig, &wgmma(paged), seed);
    }
}

/// What `Auto` is on a device: `prefill` before Hopper and for what is not shipped by warpgroup products, boxes where maps hold the
/// cache, copies where they do not.
#[test]
fn the_kernel_follows_device_and_cache() {
    let emulator = emulator::emulator_or_skip!();
    let ampere = emulator::Emulator::with_arch(cuda::table::Arch::new(8, 0));
    let case = |dim, cache| Case {
        kernel: PrefillKernel::Auto,
        ..Case::new((2, 2), (dim, dim), &[(4, 9)], cache, Mask::Causal)
    };
    let capped = |case| Case { soft_cap: Some(50.0), ..case };
    use PrefillKernel::{MmaSync, Wgmma, WgmmaCopies};
    fn kernel<E: Storage + Element>(device: &emulator::Emulator, case: &Case) -> PrefillKernel {
        let layout = tensors::<E>(case, 1).kv.layout;
        Prefill::<_, E>::prepare(device, &plan(case, layout, false)).expect("prepare").kernel()
    }
    // Gemma 2: 27B has heads of 128 channels, the smaller ones of 256.
    let cases = [
        (case(128, Cache::Contiguous), Wgmma),
        (case(128, Cache::OddGaps), WgmmaCopies),
        (case(128, Cache::Nhd(16)), Wgmma),
        (capped(case(128, Cache::Nhd(16))), Wgmma),
        (capped(case(256, Cache::Nhd(16))), MmaSync),
    ];
    for (case, expected) in cases {
        assert_eq!(kernel::<bf16>(&emulator, &case), expected, "{case:?}");
    }
    assert_eq!(kernel::<bf16>(&ampere, &case(128, Cache::Contiguous)), MmaSync);
    assert_eq!(kernel::<bf16>(&ampere, &case(128, Cache::Nhd(16))), MmaSync);
    // In f16 heads of 64 channels are shipped, by maps.
    assert_eq!(kernel::<f16>(&emulator, &case(64, Cache::Contiguous)), Wgmma);
    assert_eq!(kernel::<f16>(&emulator, &case(64, Cache::OddGaps)), MmaSync);
    assert_eq!(kernel::<f16>(&ampere, &case(64, Cache::Contiguous)), MmaSync);
}

/// Every variant that `Auto` is on Hopper by warpgroup products is a row of the table, so that it is compiled, emulated and
/// measured: what is not emulated could not be prepared here.
#[test]
fn auto_takes_shipped_kernels_alone() {
    let emulator = emulator::emulator_or_skip!();
    let mut taken = Vec::new();
    for dims in [(64, 64), (64, 128), (128, 64), (128, 128)] {
        for cache in [Cache::Contiguous, Cache::OddGaps, Cache::Nhd(16)] {
            for (soft_cap, carry) in [(None, false), (None, true), (Some(50.0), false), (Some(50.0), true)] {
                let case = Case::new((2, 2), dims, &[(4, 9)], cache, Mask::Causal);
                let case = Case { soft_cap, kernel: PrefillKernel::Auto, ..case };
                let plan = plan(&case, tensors::<f16>(&case, 1).kv.layout, carry);
                let kernels = [
                    Prefill::<_, f16>::prepare(&emulator, &plan).map(|prefill| prefill.kernel()),
                    Prefill::<_, bf16>::prepare(&emulator, &plan).map(|prefill| prefill.kernel()),
                ];
                for (dtype, kernel) in [dtype::F16, dtype::BF16].into_iter().zip(kernels) {
                    let kernel = match kernel {
                        Ok(kernel) => kernel,
                        // `prefill` is not emulated in all of these.
                        Err(error) => {
                            let error = error.to_string();
                            assert!(!error.contains("prefill_sm90a"), "{case:?}: {error}");
                            continue;
                        }
                    };
                    if kernel != PrefillKernel::MmaSync {
                        let [paged, soft_cap, carry, maps] = [
                            matches!(cache, Cache::Nhd(_)),
                            soft_cap.is_some(),
                            carry,
                            kernel == PrefillKernel::Wgmma,
                        ]
                        .map(i64::from);
                        taken.push([dims.0 as i64, dims.1 as i64, dtype, paged, soft_cap, carry, maps]);
                    }
                }
            }
        }
    }
    let rows = cuda::table::kernel("prefill_sm90a").expect("a kernel of the table").rows;
    let mut rows: Vec<[i64; 7]> = rows.iter().map(|row| row.values.try_into().expect("seven")).collect();
    rows.sort_unstable();
    taken.sort_unstable();
    assert_eq!(taken, rows, "each of them, and no other");
}

/// A plan says why no maps are used.
#[test]
fn plans_say_why_no_maps_are_used() {
    let why_not = |case: &Case, expected: Option<&str>| {
        let plan = plan(case, tensors::<f16>(case, 1).kv.layout, false);
        match (plan.tensor_maps(), expected) {
            (Ok(()), None) => {}
            (Err(error), Some(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (found, _) => panic!("{case:?}: {found:?}"),
        }
    };
    let case =
        |dims, cache, kernel| Case { kernel, ..Case::new((2, 2), dims, &[(4, 9)], cache, Mask::Causal) };
    for kernel in [PrefillKernel::Auto, PrefillKernel::Wgmma] {
        let case = |cache| case((128, 128), cache, kernel);
        why_not(&case(Cache::Contiguous), None);
        why_not(&case(Cache::Gaps), None);
        why_not(&case(Cache::OddGaps), Some("whole tokens apart"));
        why_not(&case(Cache::Nhd(16)), None);
        why_not(&case(Cache::PerHead(8)), None);
        why_not(&Case { soft_cap: Some(50.0), ..case(Cache::Nhd(16)) }, None);
    }
    for kernel in [PrefillKernel::MmaSync, PrefillKernel::WgmmaCopies] {
        why_not(&case((128, 128), Cache::Contiguous, kernel), Some("Auto or Wgmma"));
    }
    why_not(&case((96, 96), Cache::Contiguous, PrefillKernel::Auto), Some("64 or 128 channels"));
    why_not(&case((192, 128), Cache::Contiguous, PrefillKernel::Auto), Some("64 or 128 channels"));
    why_not(&case((128, 64), Cache::Contiguous, PrefillKernel::Wgmma), None);
    why_not(&case((128, 64), Cache::Contiguous, PrefillKernel::Auto), Some("sizes of a shipped kernel"));
}

/// Steps over chunks of keys, as in a ring.
fn carries_a_state<R: Rig>(rig: &R) {
    if !has_wgmma(rig) {
        return;
    }
    let full = |keys: &'static [usize]| (keys, Mask::Full);
    let ragged =
        Case::new((2, 1), (128, 128), &[(70, 0), (5, 0), (0, 0), (90, 0)], Cache::Contiguous, Mask::Full);
    let ring: [(&[usize], Mask); 3] =
        [full(&[200, 0, 3, 64]), full(&[1, 7, 0, 129]), (&[70, 3, 5, 20], Mask::Causal)];
    carried::<R, bf16>(rig, &wgmma(ragged), &ring, 71);
}

/// Maxima that rise from tile to tile, by less than what O follows at once and by more: the output is the oracle's, and the state has
/// the maximum itself, not the reference that O was held at.
fn maxima_that_climb_slowly_are_kept_all_the_same<R: Rig>(rig: &R) {
    if !has_wgmma(rig) {
        return;
    }
    // The largest of 128 scores is some 3.6, in units of log2; then 4.7, 6.5, 11, and 40 after that.
    let factors = [1.0, 1.3, 1.8, 3.0, 11.0, 10.5];
    let case = wgmma(Case::new((4, 2), (128, 128), &[(60, 700)], Cache::Contiguous, Mask::Full));
    let mut climbing = tensors::<bf16>(&case, 91);
    climbing.kv.scale_keys(|token| factors[token / 128]);
    let expected = oracle(&case, &climbing);
    let prefilled = prefill(rig, &case, &climbing, &case.cu_queries(), &lens(&case));
    Comparison::attention(&prefilled.out, &expected.out, case.dims.1).assert(rig.name());
    Comparison::new(&prefilled.lse, &expected.lse, Tolerance::LSE).assert(rig.name());

    for keys in [500, 700] {
        let (queries, heads, dim) = (case.queries(), case.q_heads, case.dims.0);
        let case = Case { sequences: vec![(queries, keys)], ..case.clone() };
        let mut climbing = tensors::<bf16>(&case, 92);
        climbing.kv.scale_keys(|token| factors[token / 128]);
        let dot = |row: usize, key: &[bf16]| -> f64 {
            let q = &climbing.q[row * dim..][..dim];
            q.iter().zip(key).map(|(q, k)| f64::from(q.to_f32()) * f64::from(k.to_f32())).sum()
        };
        let largest: Vec<f64> = (0..queries * heads)
            .map(|row| {
                let vectors = climbing.kv.k_cache.chunks(dim);
                let of_head = vectors.skip(row % heads / 2).step_by(2);
                of_head.map(|key| dot(row, key) / (dim as f64).sqrt()).fold(f64::NEG_INFINITY, f64::max)
            })
            .collect();
        let states = run_steps(rig, &[Step { case, tensors: climbing }]);
        let maxima: Vec<f32> = states.ml.iter().copied().step_by(2).collect();
        Comparison::new(&maxima, &largest, Tolerance::LSE)
            .assert(format_args!("{keys} keys on {}", rig.name()));
    }
}

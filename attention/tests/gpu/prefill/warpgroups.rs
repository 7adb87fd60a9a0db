//! The kernel of Hopper: warpgroup products, contiguous caches by tensor maps.

use super::steps::carried;
use super::*;

emulator::device_test!(equals_the_oracle, is_deaf_to_hidden_keys, carries_a_state);

/// Whether the device has warpgroup products; says so where it has not.
pub(super) fn has_wgmma<R: Rig>(rig: &R) -> bool {
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

/// The kernel of Hopper, on the same cases: tiles of keys of 128, so lengths on both sides of that. Contiguous caches come by
/// tensor maps, heads side by side or one after another, pages by cp.async.
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
    let prefix = Mask::Prefix { prefix: 140 };
    check::<R, bf16>(
        rig,
        &wgmma(Case::new((4, 1), (128, 128), &[(30, 190), (10, 4)], Cache::Nhd(128), prefix)),
        66,
    );
    let saturated = Case::new((7, 1), (128, 128), &[(20, 280)], Cache::Contiguous, Mask::Causal);
    let saturated = wgmma(Case { inputs: Inputs::Saturated, ..saturated });
    check::<R, f16>(rig, &saturated, 67);
    check::<R, f16>(rig, &by_copies(&saturated), 67);
    let whole_tiles = Case::new((2, 2), (128, 128), &[(64, 256), (3, 128)], Cache::Gaps, window(100, 130));
    check::<R, f16>(rig, &wgmma(whole_tiles), 68);
    // Gemma 2 27B.
    let capped = Case::new((2, 1), (128, 128), &[(70, 210)], Cache::Nhd(16), Mask::Causal);
    let capped = Case { soft_cap: Some(50.0), inputs: Inputs::OutlierChannels, ..capped };
    check::<R, bf16>(rig, &wgmma(capped), 70);
    // Strides that no map can hold.
    let odd = Case::new((2, 2), (128, 128), &[(40, 150)], Cache::OddGaps, Mask::Causal);
    check::<R, f16>(rig, &wgmma(odd), 69);
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
        forgetful::<R, f16>(rig, &wgmma(case), seed as u64 + 81);
    }
    let paged = Case::new((2, 2), (128, 128), &[(20, 300), (0, 90)], Cache::Nhd(16), window(33, 5));
    forgetful::<R, bf16>(rig, &wgmma(paged), 85);
}

/// What `Auto` is on a device: `prefill` before Hopper and for other sizes, boxes where maps hold the cache.
#[test]
fn the_kernel_follows_device_and_cache() {
    let emulator = emulator::emulator_or_skip!();
    let ampere = emulator::Emulator::with_arch(cuda::table::Arch::new(8, 0));
    let case = |cache| Case {
        kernel: PrefillKernel::Auto,
        ..Case::new((2, 2), (128, 128), &[(4, 9)], cache, Mask::Causal)
    };
    let capped = Case { soft_cap: Some(50.0), ..case(Cache::Nhd(16)) };
    let wide = Case { dims: (256, 256), ..capped.clone() };
    use PrefillKernel::{MmaSync, Wgmma, WgmmaCopies};
    let why_not = |case: &Case, expected: Option<&str>| {
        let plan = plan(case, tensors::<f16>(case, 1).kv.layout, false);
        match (plan.tensor_maps(), expected) {
            (Ok(()), None) => {}
            (Err(error), Some(expected)) => assert!(error.to_string().contains(expected), "{error}"),
            (found, _) => panic!("{case:?}: {found:?}"),
        }
    };
    why_not(&case(Cache::Contiguous), None);
    why_not(&case(Cache::Gaps), None);
    why_not(&case(Cache::OddGaps), Some("whole tokens apart"));
    why_not(&case(Cache::Nhd(16)), Some("pages"));
    why_not(&Case { soft_cap: Some(50.0), ..case(Cache::Contiguous) }, Some("no soft cap"));
    let kernel = |device: &emulator::Emulator, case: &Case| {
        let layout = tensors::<f16>(case, 1).kv.layout;
        Prefill::<_, f16>::prepare(device, &plan(case, layout, false)).expect("prepare").kernel()
    };
    assert_eq!(kernel(&emulator, &case(Cache::Contiguous)), Wgmma);
    assert_eq!(kernel(&emulator, &case(Cache::OddGaps)), WgmmaCopies);
    assert_eq!(kernel(&ampere, &case(Cache::Contiguous)), MmaSync);
    // Paged and soft-capped rows are bf16.
    let kernel = |device: &emulator::Emulator, case: &Case| {
        let layout = tensors::<bf16>(case, 1).kv.layout;
        Prefill::<_, bf16>::prepare(device, &plan(case, layout, false)).expect("prepare").kernel()
    };
    assert_eq!(kernel(&emulator, &case(Cache::Nhd(16))), WgmmaCopies);
    assert_eq!(kernel(&ampere, &case(Cache::Nhd(16))), MmaSync);
    // Gemma 2: 27B has heads of 128 channels, the smaller ones of 256.
    assert_eq!(kernel(&emulator, &capped), WgmmaCopies);
    assert_eq!(kernel(&emulator, &wide), MmaSync);
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

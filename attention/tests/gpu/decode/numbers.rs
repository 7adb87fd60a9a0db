//! Decode against the oracle, and what must not change its results.

use super::*;

emulator::device_test!(
    equals_the_oracle,
    page_order_does_not_matter,
    fixed_splits_are_batch_invariant,
    nan_is_never_dropped,
    many_steps_repeat_bitwise,
);

fn equals_the_oracle<R: Rig>(rig: &R) {
    let window = |window| Mask::sliding_window(window, 0).expect("a window");
    let edges = [0, 1, 63, 64, 65];
    // Every head ratio, head size, page size, layout, mask and kind of input occurs with several values of the others.
    check::<R, f16>(rig, &Case::new((4, 4), (64, 64), 1, &edges, Cache::Nhd(16)), 1);
    check::<R, f16>(rig, &Case::new((8, 2), (64, 64), 2, &[15, 16, 130], Cache::Hnd(8)), 2);
    check::<R, bf16>(
        rig,
        &Case { soft_cap: Some(20.0), ..Case::new((16, 1), (64, 64), 1, &[1, 127, 128], Cache::Contiguous) },
        3,
    );
    check::<R, bf16>(rig, &Case::new((6, 2), (128, 128), 1, &[129, 0, 33], Cache::Nhd(64)), 4);
    check::<R, bf16>(
        rig,
        &Case { mask: window(40), ..Case::new((5, 1), (128, 128), 1, &[39, 40, 41, 300], Cache::Hnd(32)) },
        5,
    );
    check::<R, bf16>(rig, &Case::new((7, 1), (128, 128), 2, &[1, 2, 65, 200], Cache::Nhd(128)), 6);
    check::<R, bf16>(
        rig,
        &Case { mask: window(9), ..Case::new((4, 1), (128, 128), 8, &[3, 8, 70], Cache::Hnd(16)) },
        7,
    );
    check::<R, f16>(
        rig,
        &Case { inputs: Inputs::Saturated, ..Case::new((8, 1), (128, 128), 1, &[1, 190], Cache::Contiguous) },
        8,
    );
    check::<R, f16>(
        rig,
        &Case { soft_cap: Some(8.0), ..Case::new((16, 1), (128, 128), 1, &[64, 90], Cache::Nhd(16)) },
        9,
    );
    check::<R, bf16>(rig, &Case::new((2, 1), (192, 128), 1, &[100, 31], Cache::Nhd(16)), 10);
    check::<R, bf16>(
        rig,
        &Case {
            soft_cap: Some(50.0),
            inputs: Inputs::OutlierChannels,
            ..Case::new((4, 2), (256, 256), 1, &[80, 17], Cache::Hnd(16))
        },
        11,
    );
    check::<R, f16>(rig, &Case::new((3, 1), (96, 96), 2, &[75, 16, 2], Cache::Hnd(16)), 15);
    check::<R, bf16>(rig, &Case::new((9, 1), (256, 256), 1, &[70, 1], Cache::Contiguous), 12);
    // One long among short, and every tie and outlier that a softmax can meet.
    check::<R, bf16>(rig, &Case::new((4, 1), (128, 128), 1, &[1, 900, 2, 0, 5], Cache::Nhd(32)), 13);
    // Every head's own pages, and sequences with gaps between them.
    check::<R, bf16>(rig, &Case::new((6, 3), (128, 128), 1, &[50, 0, 130], Cache::PerHead(16)), 16);
    check::<R, f16>(rig, &Case::new((4, 2), (128, 128), 2, &[70, 1, 64], Cache::Gaps), 17);
    // Several queries over fixed splits, and with a soft-cap.
    check::<R, bf16>(
        rig,
        &Case {
            splits: Splits::Fixed { tokens: 64 },
            ..Case::new((4, 2), (128, 128), 3, &[200, 66, 2], Cache::Nhd(16))
        },
        18,
    );
    check::<R, f16>(
        rig,
        &Case { soft_cap: Some(5.0), ..Case::new((8, 1), (128, 128), 2, &[90, 1], Cache::Hnd(16)) },
        19,
    );
    for inputs in [Inputs::Constant, Inputs::OutlierElements] {
        check::<R, f16>(rig, &Case { inputs, ..Case::new((2, 1), (64, 64), 1, &[200], Cache::Nhd(16)) }, 14);
    }
}

fn page_order_does_not_matter<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (64, 64), 1, &[100, 257], Cache::Nhd(16));
    let straight = tensors::<f16>(&case, 5);
    let mut reversed = tensors::<f16>(&case, 5);
    reversed.kv = reversed.kv.reverse_pages();
    let [straight, reversed] =
        [straight, reversed].map(|tensors| decode(rig, &case, &tensors, &lens(&case), 1));
    assert_eq!(straight.lse, reversed.lse, "on {}", rig.name());
    assert_eq!(straight.out, reversed.out, "on {}", rig.name());
}

fn fixed_splits_are_batch_invariant<R: Rig>(rig: &R) {
    let fixed = |kv_lens: &[usize]| Case {
        splits: Splits::Fixed { tokens: 128 },
        ..Case::new((4, 1), (128, 128), 1, kv_lens, Cache::Nhd(32))
    };
    // The first sequence alone, and before others that change every block's share.
    let together = fixed(&[400, 64, 3, 0, 300]);
    check::<R, bf16>(rig, &together, 21);
    let tensors_together = tensors::<bf16>(&together, 21);
    let decoded = decode(rig, &together, &tensors_together, &lens(&together), 1);
    let mut alone = together.clone();
    alone.kv_lens = vec![400, 0, 0, 0, 0];
    let only = decode(rig, &together, &tensors_together, &lens(&alone), 1);
    let row = 4 * 128;
    assert_eq!(decoded.out[..row], only.out[..row], "on {}", rig.name());
    assert_eq!(decoded.lse[..4], only.lse[..4], "on {}", rig.name());
}

/// A query of NaN gives NaN, however many warps and parts share its keys, and harms no other row.
fn nan_is_never_dropped<R: Rig>(rig: &R) {
    for kv_len in [1, 40, 300] {
        let case = Case::new((4, 2), (64, 64), 1, &[kv_len, 20], Cache::Nhd(16));
        let mut tensors = tensors::<f16>(&case, 35);
        let expected = oracle(&case, &tensors);
        tensors.q[5] = f16::NAN; // of head 0
        let decoded = decode(rig, &case, &tensors, &lens(&case), 1);
        let name = format!("{kv_len} keys on {}", rig.name());
        assert!(decoded.out[..64].iter().all(|x| x.is_nan()), "{name}: {:?}", &decoded.out[..4]);
        assert!(decoded.lse[0].is_nan(), "{name}: {}", decoded.lse[0]);
        Comparison::attention(&decoded.out[64..], &expected.out[64..], case.v_dim)
            .assert(format_args!("out of {name}"));
        Comparison::new(&decoded.lse[1..], &expected.lse[1..], Tolerance::LSE)
            .assert(format_args!("lse of {name}"));
    }
}

/// The last arriver differs from step to step; results and counters must not.
fn many_steps_repeat_bitwise<R: Rig>(rig: &R) {
    let case = Case::new((4, 1), (64, 64), 1, &[300, 7], Cache::Nhd(16));
    let tensors = tensors::<f16>(&case, 41);
    decode(rig, &case, &tensors, &lens(&case), rig.stress_launches());
}

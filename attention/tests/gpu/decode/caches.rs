//! Caches with bad lengths, bad pages, forgotten keys and far places.

use super::*;

emulator::device_test!(
    bad_sequences_are_reported_and_the_others_stay_right,
    a_bad_page_of_one_head_harms_that_head_alone,
    starts_that_change_after_the_plan_read_nothing_outside,
    keys_that_no_query_sees_hold_anything,
    offsets_past_2_to_the_31_elements,
);

/// What is wrong, the input, the lengths given to the kernel, and code and sequence of the report.
type BadCase<'a> = (&'a str, &'a Case, &'a Tensors<f16>, [u32; 3], (u32, u32));

fn bad_sequences_are_reported_and_the_others_stay_right<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (64, 64), 1, &[40, 50, 60], Cache::Nhd(16));
    let good = tensors::<f16>(&case, 31);
    let CacheLayout::Paged { max_pages, pages, .. } = good.kv.layout else { panic!("{case:?} is not paged") };
    let mut bad_page = tensors::<f16>(&case, 31);
    bad_page.kv.block_table[max_pages + 2] = pages as u32;
    let contiguous = Case { cache: Cache::Contiguous, ..case.clone() };
    let contiguous = Case { qk_dim: 128, v_dim: 128, ..contiguous };
    let past_the_end = tensors::<f16>(&contiguous, 31);
    let cases: [BadCase<'_>; 3] = [
        ("longer than its pages", &case, &good, [40, 16 * max_pages as u32 + 1, 60], (1, 1)),
        ("a page outside the pool", &case, &bad_page, [40, 50, 60], (2, 1)),
        ("past the end of the cache", &contiguous, &past_the_end, [40, 50, 61], (1, 2)),
    ];
    for (what, case, tensors, kv_len, (code, index)) in cases {
        let decoded = decode(rig, case, tensors, &kv_len, 1);
        let name = format!("{what} on {}", rig.name());
        assert_eq!(decoded.fault, Some(Fault { code, index }), "{name}");
        let mut expected = oracle(case, tensors);
        let (heads, row) = (case.q_heads, case.q_heads * case.v_dim);
        expected.out[index as usize * row..][..row].fill(0.0);
        expected.lse[index as usize * heads..][..heads].fill(f64::NEG_INFINITY);
        Comparison::attention(&decoded.out, &expected.out, case.v_dim).assert(&name);
        Comparison::new(&decoded.lse, &expected.lse, Tolerance::LSE).assert(&name);
    }
}

fn starts_that_change_after_the_plan_read_nothing_outside<R: Rig>(rig: &R) {
    let planned = Case::new((4, 2), (128, 128), 1, &[40, 50, 60], Cache::Contiguous);
    let tensors = tensors::<f16>(&planned, 33);
    // Sequence 0 stays; 1 begins past the cache and 2 ends past it. The emulator faults a read outside.
    let case = Case { late_starts: Some(vec![0, u32::MAX - 3, 149]), ..planned.clone() };
    let decoded = decode(rig, &case, &tensors, &lens(&case), 1);
    let expected = oracle(&planned, &tensors);
    let (heads, row) = (case.q_heads, case.q_heads * case.v_dim);
    let name = format!("moved starts on {}", rig.name());
    Comparison::attention(&decoded.out[..row], &expected.out[..row], case.v_dim).assert(&name);
    assert!(decoded.out[row..2 * row].iter().all(|x| x.to_f32() == 0.0), "{name}");
    assert_eq!(decoded.lse[heads..2 * heads], [f32::NEG_INFINITY; 4], "{name}");
    assert!(decoded.lse[2 * heads..].iter().all(|x| x.is_finite()), "{name}");
}

fn a_bad_page_of_one_head_harms_that_head_alone<R: Rig>(rig: &R) {
    let case = Case::new((4, 2), (64, 64), 1, &[40, 150], Cache::PerHead(16));
    let mut tensors = tensors::<f16>(&case, 32);
    let CacheLayout::Paged { max_pages, pages, .. } = tensors.kv.layout else {
        panic!("{case:?} is not paged")
    };
    // Table row of head 1 and sequence 1.
    tensors.kv.block_table[3 * max_pages + 4] = pages as u32;
    let decoded = decode(rig, &case, &tensors, &lens(&case), 1);
    assert_eq!(decoded.fault, Some(Fault { code: 2, index: 1 }), "on {}", rig.name());
    let mut expected = oracle(&case, &tensors);
    // Query heads 2 and 3 of sequence 1.
    expected.out[6 * 64..].fill(0.0);
    expected.lse[6..].fill(f64::NEG_INFINITY);
    Comparison::attention(&decoded.out, &expected.out, case.v_dim).assert(rig.name());
    Comparison::new(&decoded.lse, &expected.lse, Tolerance::LSE).assert(rig.name());
}

/// Before every window and past the length there may be NaN and infinity, and no page at all.
fn keys_that_no_query_sees_hold_anything<R: Rig>(rig: &R) {
    let window = |window| Mask::sliding_window(window, 0).expect("a window");
    let paged = |q_len, cache| Case {
        mask: window(37),
        ..Case::new((4, 2), (128, 128), q_len, &[30, 100, 37, 129, 200], cache)
    };
    for (case, seed) in [(paged(1, Cache::Nhd(16)), 51), (paged(3, Cache::PerHead(32)), 52)] {
        forgetful::<R, bf16>(rig, &case, seed);
    }
    let gaps = Case { mask: window(20), ..Case::new((2, 2), (128, 128), 2, &[90, 19, 150], Cache::Gaps) };
    forgetful::<R, f16>(rig, &gaps, 53);
}

fn forgetful<R: Rig, E: Storage + Element>(rig: &R, case: &Case, seed: u64) {
    let mut tensors = tensors::<E>(case, seed);
    let expected = oracle(case, &tensors);
    assert!(tensors.kv.forget_hidden(case.mask, |_| case.q_len) > 0, "{case:?} hides nothing");
    let decoded = decode(rig, case, &tensors, &lens(case), 1);
    let name = format!("{case:?} as {} with seed {seed} on {}", E::NAME, rig.name());
    Comparison::attention(&decoded.out, &expected.out, case.v_dim).assert(&name);
    Comparison::new(&decoded.lse, &expected.lse, Tolerance::LSE).assert(&name);
    assert_eq!(decoded.fault, None, "{name}");
}

/// The second page of keys begins past 2³¹ elements; what lies between is never touched.
fn offsets_past_2_to_the_31_elements<R: Rig>(rig: &R) {
    let case = Case::new((2, 2), (64, 64), 1, &[30], Cache::Nhd(16));
    let mut tensors = tensors::<f16>(&case, 61);
    let expected = oracle(&case, &tensors);
    let CacheLayout::Paged { page_size, pages, max_pages, per_head, k: near, v } = tensors.kv.layout else {
        panic!("{case:?} is not paged")
    };
    let far = PageLayout { page_stride: (1 << 31) + 64, ..near };
    tensors.kv.layout = CacheLayout::Paged { page_size, pages: 2, max_pages, per_head, k: far, v };
    // Both keys' pages move: page 0 stays at the start, page 1 lies far out.
    let used: Vec<u32> = tensors.kv.block_table[..2].to_vec();
    assert_eq!(pages, 3);
    let page = near.page_stride as usize;
    let mut k = rig.zeroed::<f16>(far.page_stride as usize + page);
    for (to, from) in used.iter().enumerate() {
        let keys = &tensors.kv.k_cache[*from as usize * page..][..page];
        rig.write(&mut k, to * far.page_stride as usize, keys);
    }
    let values: Vec<f16> =
        used.iter().flat_map(|from| tensors.kv.v_cache[*from as usize * page..][..page].to_vec()).collect();
    tensors.kv.v_cache = values;
    tensors.kv.block_table[..2].copy_from_slice(&[0, 1]);
    let decoded = decode_keys(rig, &case, &tensors, &k, &lens(&case), 1);
    Comparison::attention(&decoded.out, &expected.out, case.v_dim).assert(rig.name());
    Comparison::new(&decoded.lse, &expected.lse, Tolerance::LSE).assert(rig.name());
}

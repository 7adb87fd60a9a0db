//! Every shipped row with all that a case may vary: `EXHAUSTIVE=1` runs the whole product, else a few of it.

use attention::testing::product;

use super::*;

emulator::device_test!(every_combination);

fn every_combination<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let rows = cuda::table::kernel("decode").expect("a kernel of the table").rows;
    let mut all = Vec::new();
    for &[qk_dim, v_dim, column_tiles, dtype, paged, soft_cap] in
        rows.iter().filter_map(|row| <&[i64; 6]>::try_from(row.values).ok())
    {
        // (q_heads, kv_heads, q_len); their columns fill the row's tiles, or more than one block's.
        let heads: &[(usize, usize, usize)] = match column_tiles {
            1 => &[(1, 1, 1), (4, 2, 3), (8, 1, 1), (7, 1, 1)],
            _ => &[(16, 1, 1), (10, 2, 2), (3, 1, 5), (8, 1, 4)],
        };
        let caches: &[Cache] = match paged {
            0 => &[Cache::Contiguous, Cache::Gaps],
            _ => &[Cache::Nhd(16), Cache::Hnd(64), Cache::PerHead(8)],
        };
        for &(q_heads, kv_heads, q_len) in heads {
            for &cache in caches {
                for mask in [Mask::Causal, window(33, 0), window(100, 0)] {
                    for inputs in Inputs::ALL {
                        for kv_lens in [&[0, 1, 63, 64, 65][..], &[129, 5], &[300]] {
                            let dims = (qk_dim as usize, v_dim as usize);
                            let case = Case::new((q_heads, kv_heads), dims, q_len, kv_lens, cache);
                            let soft_cap = (soft_cap == 1).then_some(20.0);
                            all.push((dtype, Case { mask, inputs, soft_cap, ..case }));
                        }
                    }
                }
            }
        }
    }
    assert!(all.len() > 4000, "{} cases", all.len());
    for (seed, (dtype, case)) in product::cases(all, 12) {
        match dtype {
            cuda::table::dtype::F16 => check::<R, f16>(rig, &case, seed as u64),
            _ => check::<R, bf16>(rig, &case, seed as u64),
        }
    }
}

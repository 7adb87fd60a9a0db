//! Every shipped row with all that a case may vary: `EXHAUSTIVE=1` runs the whole product, else a few of it.

use attention::testing::product;
use cuda::table::dtype;

use super::*;

emulator::device_test!(every_combination);

fn every_combination<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let mut all = Vec::new();
    // Not of the kernel that dequantizes: it rounds keys, values and P, so what the codes stand for is its oracle, in its own test.
    let rows = cuda::table::kernel("hack_decode").expect("a kernel of the table").rows;
    for values in rows.iter().filter_map(|row| <&[i64; 8]>::try_from(row.values).ok()) {
        let [k_bits, v_bits, partition, qk_dim, v_dim, column_tiles, ..] = values.map(|value| value as usize);
        let [.., dtype, soft_cap] = *values;
        // (q_heads, kv_heads, q_len); their columns fill the row's tiles, or more than one block's.
        let heads: &[(usize, usize, usize)] = match column_tiles {
            1 => &[(1, 1, 1), (4, 2, 3), (8, 1, 1), (7, 1, 1)],
            2 => &[(16, 1, 1), (10, 2, 2), (3, 1, 5)],
            _ => &[(4, 1, 5), (2, 1, 40), (8, 2, 6)],
        };
        for &(q_heads, kv_heads, q_len) in heads {
            for sinks in [0, 4] {
                let shape = Shape {
                    dims: (qk_dim, v_dim),
                    sinks,
                    ..Shape::new((q_heads, kv_heads), qk_dim, (k_bits, v_bits), partition)
                };
                for mask in [Mask::Causal, window(70, 0), window(100, sinks)] {
                    for keys in Inputs::ALL {
                        // Lengths on both sides of a closed block, and of several.
                        let closed = |blocks: usize| sinks + blocks * partition;
                        let lens = [
                            vec![0, 1, closed(1) - 1, closed(1), closed(1) + 1],
                            vec![closed(2) + partition / 2, 3],
                            vec![closed(3)],
                        ];
                        for kv_lens in lens {
                            let kinds = (keys, Inputs::Normal);
                            let soft_cap = (soft_cap == 1).then_some(20.0);
                            let case = Case::new(shape, q_len, &kv_lens);
                            all.push((dtype, Case { mask, soft_cap, kinds, ..case }));
                        }
                    }
                }
            }
        }
    }
    assert!(all.len() > 3000, "{} cases", all.len());
    for (seed, (dtype, case)) in product::cases(all, 12) {
        match dtype {
            dtype::F16 => check::<R, f16>(rig, &case, seed as u64),
            _ => check::<R, bf16>(rig, &case, seed as u64),
        }
    }
}

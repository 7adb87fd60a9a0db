//! Every shipped row with all that a case may vary: `EXHAUSTIVE=1` runs the whole product, else a few of it.

use attention::testing::product;
use cuda::table::dtype;

use super::*;

emulator::device_test!(every_combination);

fn every_combination<R: Rig>(rig: &R) {
    let window = |window| Mask::sliding_window(window, 0).expect("a window");
    let rows = cuda::table::kernel("fdc_decode").expect("a kernel of the table").rows;
    let mut all = Vec::new();
    for &[head_dim, column_tiles, dtype, soft_cap] in
        rows.iter().filter_map(|row| <&[i64; 4]>::try_from(row.values).ok())
    {
        let dim = head_dim as usize;
        // (group, q_len); their columns fill the row's tiles, or more than one block's.
        let heads: &[(usize, usize)] = match column_tiles {
            1 => &[(1, 1), (2, 3), (8, 1), (7, 1)],
            _ => &[(16, 1), (5, 2), (3, 5), (8, 4)],
        };
        let ranks = [
            vec![(dim, dim)],
            vec![(16, 16), (dim, 16), (16, dim)],
            vec![(48, 32), (16, 16), (16, 16), (dim - 16, 48)],
        ];
        for &(group, q_len) in heads {
            for ranks in &ranks {
                for page_size in [16, 64, 128] {
                    for mask in [Mask::Causal, window(33), window(100)] {
                        for inputs in Inputs::ALL {
                            for kv_lens in [&[0, 1, 15, 16, 17, 65][..], &[129, 5], &[300]] {
                                let soft_cap = (soft_cap == 1).then_some(20.0);
                                let case = Case::new(group, dim, ranks, q_len, kv_lens);
                                all.push((dtype, Case { page_size, mask, inputs, soft_cap, ..case }));
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(all.len() > 6000, "{} cases", all.len());
    for (seed, (dtype, case)) in product::cases(all, 12) {
        match dtype {
            dtype::F16 => check::<R, f16>(rig, &case, seed as u64),
            _ => check::<R, bf16>(rig, &case, seed as u64),
        }
    }
}

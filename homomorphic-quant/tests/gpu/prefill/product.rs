//! Every shipped row with all that a case may vary: `EXHAUSTIVE=1` runs the whole product, else a few of it.

use attention::testing::product;
use cuda::table::dtype;

use super::*;

emulator::device_test!(every_combination);

fn every_combination<R: Rig>(rig: &R) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let rows = cuda::table::kernel("hack_prefill").expect("a kernel of the table").rows;
    let mut all = Vec::new();
    for values in rows.iter().filter_map(|row| <&[i64; 7]>::try_from(row.values).ok()) {
        let [k_bits, v_bits, partition, qk_dim, v_dim, ..] = values.map(|value| value as usize);
        let [.., dtype, soft_cap] = *values;
        for (q_heads, kv_heads) in [(1, 1), (4, 2), (7, 1)] {
            for sinks in [0, 4] {
                let shape = Shape {
                    dims: (qk_dim, v_dim),
                    sinks,
                    ..Shape::new((q_heads, kv_heads), qk_dim, (k_bits, v_bits), partition)
                };
                let closed = |blocks: usize| sinks + blocks * partition;
                // (queries, cached tokens): whole prompts, chunks behind a prefix, more queries than tokens, nothing.
                let batches = [
                    vec![(closed(1) + 1, closed(1) + 1), (1, 1), (0, 3)],
                    vec![(17, closed(2)), (3, 0), (5, closed(1) - 1)],
                    vec![(9, 5), (33, closed(2) + partition / 2)],
                ];
                for mask in [Mask::Causal, window(40, 0), window(70, sinks)] {
                    for keys in Inputs::ALL {
                        for sequences in &batches {
                            let kinds = (keys, Inputs::Normal);
                            let soft_cap = (soft_cap == 1).then_some(20.0);
                            all.push((dtype, Case { mask, soft_cap, kinds, ..Case::new(shape, sequences) }));
                        }
                    }
                }
            }
        }
    }
    assert!(all.len() > 2000, "{} cases", all.len());
    for (seed, (dtype, case)) in product::cases(all, 9) {
        match dtype {
            dtype::F16 => check::<R, f16>(rig, &case, seed as u64),
            _ => check::<R, bf16>(rig, &case, seed as u64),
        }
    }
}

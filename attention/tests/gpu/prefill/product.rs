//! Every shipped row with all that a case may vary: `EXHAUSTIVE=1` runs the whole product, else a few of it.

use attention::testing::product;
use cuda::table::dtype;

use super::steps::carried;
use super::warpgroups::has_wgmma;
use super::*;

emulator::device_test!(every_combination, every_combination_of_warpgroups);

fn every_combination<R: Rig>(rig: &R) {
    let rows = cuda::table::kernel("prefill").expect("a kernel of the table").rows;
    let rows = rows.iter().filter_map(|row| <[i64; 6]>::try_from(row.values).ok());
    run(rig, rows.map(|row| (PrefillKernel::MmaSync, row)).collect(), 9);
}

fn every_combination_of_warpgroups<R: Rig>(rig: &R) {
    if !has_wgmma(rig) {
        return;
    }
    let rows = cuda::table::kernel("prefill_sm90a").expect("a kernel of the table").rows;
    let rows = rows.iter().filter_map(|row| <[i64; 7]>::try_from(row.values).ok());
    let kernel = |maps| if maps == 1 { PrefillKernel::Wgmma } else { PrefillKernel::WgmmaCopies };
    let rows = rows.map(|[a, b, c, d, e, f, maps]| (kernel(maps), [a, b, c, d, e, f]));
    run(rig, rows.collect(), 6);
}

/// Cases of rows `[QK_DIM, V_DIM, KV_DTYPE, PAGED, SOFT_CAP, CARRY]`.
fn run<R: Rig>(rig: &R, rows: Vec<(PrefillKernel, [i64; 6])>, few: usize) {
    let window = |window, sinks| Mask::sliding_window(window, sinks).expect("a window");
    let mut all = Vec::new();
    for (kernel, [qk_dim, v_dim, dtype, paged, soft_cap, carry]) in rows {
        let caches: &[Cache] = match paged {
            0 => &[Cache::Contiguous, Cache::Gaps],
            _ => &[Cache::Nhd(16), Cache::Hnd(64), Cache::PerHead(8)],
        };
        // (queries, keys): tiles and their neighbours, chunks behind a prefix, more queries than keys, nothing.
        let batches = [
            vec![(0, 5), (1, 1), (3, 0), (63, 64), (65, 129)],
            vec![(20, 300), (1, 257)],
            vec![(130, 130), (9, 4)],
        ];
        for heads in [(1, 1), (4, 2), (7, 1)] {
            for &cache in caches {
                for mask in
                    [Mask::Causal, Mask::Full, window(33, 0), window(40, 70), Mask::Prefix { prefix: 40 }]
                {
                    for inputs in Inputs::ALL {
                        for sequences in &batches {
                            let dims = (qk_dim as usize, v_dim as usize);
                            let soft_cap = (soft_cap == 1).then_some(20.0);
                            let case = Case::new(heads, dims, sequences, cache, mask);
                            all.push((dtype, carry == 1, Case { soft_cap, inputs, kernel, ..case }));
                        }
                    }
                }
            }
        }
    }
    assert!(all.len() > 3000, "{} cases", all.len());
    for (seed, (dtype, carry, case)) in product::cases(all, few) {
        match dtype {
            dtype::F16 => one::<R, f16>(rig, &case, carry, seed as u64),
            _ => one::<R, bf16>(rig, &case, carry, seed as u64),
        }
    }
}

fn one<R: Rig, E: Storage + Element>(rig: &R, case: &Case, carry: bool, seed: u64) {
    if !carry {
        return check::<R, E>(rig, case, seed);
    }
    // The case's keys after as many of another chunk, which everybody sees, and before none.
    let keys = case.kv_lens();
    let before: Vec<usize> = keys.iter().rev().copied().collect();
    let chunks =
        [(&before[..], Mask::Full), (&keys[..], case.mask), (&vec![0; keys.len()][..], Mask::Causal)];
    carried::<R, E>(rig, case, &chunks, seed);
}

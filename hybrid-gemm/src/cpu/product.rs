//! A weight tile times a panel of tokens, added to sums.

use crate::Summation;
use crate::pack::TILE_ROWS;

/// Independent sums of a dot product, which the compiler turns into vector code without leave to reorder sums.
const LANES: usize = 16;

/// `sums[tokens, 64] += x[tokens, k] · w[64, k]ᵀ`; rows of x are `stride` apart.
pub(super) fn accumulate(
    summation: Summation,
    x: &[f32],
    stride: usize,
    w: &[f32],
    k: usize,
    sums: &mut [f32],
) {
    match summation {
        #[cfg(feature = "gemm")]
        Summation::Fast => fast(x, stride, w, k, sums),
        _ => in_order(x, stride, w, k, sums),
    }
}

/// The sum of a tile is the same whatever else is computed beside it.
fn in_order(x: &[f32], stride: usize, w: &[f32], k: usize, sums: &mut [f32]) {
    for (token, sums) in sums.chunks_exact_mut(TILE_ROWS).enumerate() {
        let x = &x[token * stride..][..k];
        for (w, sum) in w.chunks_exact(k).zip(sums) {
            *sum += dot(x, w);
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + tail
}

/// By the crate `gemm`, which groups sums by the shape of the product.
#[cfg(feature = "gemm")]
fn fast(x: &[f32], stride: usize, w: &[f32], k: usize, sums: &mut [f32]) {
    let tokens = sums.len() / TILE_ROWS;
    if tokens == 0 || k == 0 {
        return;
    }
    assert!(x.len() >= (tokens - 1) * stride + k && w.len() >= TILE_ROWS * k, "operands of a tile");
    let (rows, stride, k) = (TILE_ROWS as isize, stride as isize, k);
    // SAFETY: the strides address x `[tokens, k]`, w `[64, k]` transposed and sums `[tokens, 64]`, which the lengths checked
    // above hold; sums is borrowed exclusively, so it overlaps neither.
    unsafe {
        gemm::gemm(
            tokens,
            TILE_ROWS,
            k,
            sums.as_mut_ptr(),
            1,
            rows,
            true,
            x.as_ptr(),
            1,
            stride,
            w.as_ptr(),
            k as isize,
            1,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_the_plain_loop() {
        for (tokens, k, gap) in
            [(0, 8, 0), (1, 1, 0), (1, 256, 3), (3, 17, 0), (5, 64, 64), (64, 100, 1), (200, 256, 0)]
        {
            let mut rng = fastrand::Rng::with_seed(4);
            let stride = k + gap;
            let x: Vec<f32> = (0..tokens * stride).map(|_| rng.f32() - 0.5).collect();
            let w: Vec<f32> = (0..TILE_ROWS * k).map(|_| rng.f32() - 0.5).collect();
            let start: Vec<f32> = (0..tokens * TILE_ROWS).map(|_| rng.f32()).collect();
            for summation in [Summation::Bitwise, Summation::Fast] {
                let mut sums = start.clone();
                accumulate(summation, &x, stride, &w, k, &mut sums);
                for (index, sum) in sums.iter().enumerate() {
                    let (token, row) = (index / TILE_ROWS, index % TILE_ROWS);
                    let products =
                        (0..k).map(|i| f64::from(x[token * stride + i]) * f64::from(w[row * k + i]));
                    let exact = f64::from(start[index]) + products.sum::<f64>();
                    assert!(
                        (f64::from(*sum) - exact).abs() < 1e-5,
                        "{summation:?}, {tokens} × {k}, seed 4: [{token}, {row}] is {sum}, not {exact}"
                    );
                }
            }
        }
    }
}

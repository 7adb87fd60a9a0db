//! Folding the maps into weights, where that is exact: then projecting costs nothing.
//!
//! - **W_V and W_O, always**: `ṽ = (A_vᵀ·W_V)·x + A_vᵀ·b_V`, and a query head's block of W_O becomes `W_O·B_v`. W_O's own bias
//!   stays.
//! - **W_Q and W_K, without RoPE and without QK-norm**: `q̃ = (A_kᵀ·W_Q)·x + A_kᵀ·b_Q`, likewise for keys. RoPE turns planes by
//!   the position and a general map does not commute with it; a norm between weight and map does not either. There the maps
//!   are applied to the new token after RoPE ([`LayerProjection::queries`], [`LayerProjection::keys`]).
//!
//! Weights are row-major `[out_features, in_features]`, as checkpoints hold them.

use crate::error::{at_least_1, check_finite, check_len};
use crate::maps::LayerProjection;
use crate::{Error, HeadRanks};

/// A weight after folding: row-major `[out_features, in_features]`, and its bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Folded {
    /// `[out_features, in_features]`
    pub weight: Vec<f32>,
    /// `[out_features]`, where there was one.
    pub bias: Option<Vec<f32>>,
}

/// What stands between W_Q or W_K and the product of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QkPath {
    /// Rotary position embedding.
    pub rope: bool,
    /// A norm of each head (Qwen3).
    pub qk_norm: bool,
}

/// W_V `[kv_heads · v_dim, hidden]` and its bias `[kv_heads · v_dim]` to `[Σ r_v, hidden]`.
///
/// # Errors
/// [`Error::Argument`] for lengths that do not fit, [`Error::NotFinite`].
pub fn fold_values(
    projection: &LayerProjection,
    w_v: &[f32],
    bias: Option<&[f32]>,
    hidden: usize,
) -> Result<Folded, Error> {
    let shape = projection.shape();
    let maps = projection.heads().iter().map(|maps| maps.value.as_slice());
    fold_rows("w_v", maps, shape.v_dim(), w_v, bias, hidden)
}

/// W_Q `[q_heads · qk_dim, hidden]` and its bias to `[Σ r_k, hidden]`, query head after query head.
///
/// # Errors
/// [`Error::Argument`] when RoPE or a norm lies between, or for lengths that do not fit; [`Error::NotFinite`].
pub fn fold_queries(
    projection: &LayerProjection,
    path: QkPath,
    w_q: &[f32],
    bias: Option<&[f32]>,
    hidden: usize,
) -> Result<Folded, Error> {
    check_path(path)?;
    let shape = projection.shape();
    let maps =
        projection.heads().iter().flat_map(|maps| std::iter::repeat_n(maps.query.as_slice(), shape.group()));
    fold_rows("w_q", maps, shape.qk_dim(), w_q, bias, hidden)
}

/// W_K `[kv_heads · qk_dim, hidden]` and its bias to `[Σ r_k, hidden]`, KV head after KV head.
///
/// # Errors
/// As [`fold_queries`].
pub fn fold_keys(
    projection: &LayerProjection,
    path: QkPath,
    w_k: &[f32],
    bias: Option<&[f32]>,
    hidden: usize,
) -> Result<Folded, Error> {
    check_path(path)?;
    let maps = projection.heads().iter().map(|maps| maps.key.as_slice());
    fold_rows("w_k", maps, projection.shape().qk_dim(), w_k, bias, hidden)
}

/// W_O `[hidden, q_heads · v_dim]` to `[hidden, Σ r_v]`, query head after query head.
///
/// # Errors
/// [`Error::Argument`] for a length that does not fit, [`Error::NotFinite`].
pub fn fold_output(projection: &LayerProjection, w_o: &[f32], hidden: usize) -> Result<Vec<f32>, Error> {
    let shape = projection.shape();
    check_len("w_o", w_o.len(), &[at_least_1("hidden", hidden)?, shape.q_heads(), shape.v_dim()])?;
    check_finite("w_o", w_o)?;
    let mut folded = Vec::new();
    for row in w_o.chunks_exact(shape.q_heads() * shape.v_dim()) {
        for (q_head, block) in row.chunks_exact(shape.v_dim()).enumerate() {
            let map = &projection.heads()[shape.kv_head_of(q_head)].output;
            folded.extend(map.chunks_exact(shape.v_dim()).map(|map| dot(map, block)));
        }
    }
    Ok(folded)
}

fn check_path(path: QkPath) -> Result<(), Error> {
    let found = match path {
        QkPath { rope: false, qk_norm: false } => return Ok(()),
        QkPath { rope: true, .. } => "RoPE, with which a map does not commute: apply it after RoPE",
        QkPath { .. } => {
            "a norm of queries and keys, with which a map does not commute: apply it after the norm"
        }
    };
    Err(Error::argument("path", "nothing between weight and product", found))
}

/// Maps `[rank, dim]` of consecutive blocks of `dim` rows of a weight, applied from the left.
fn fold_rows<'a>(
    argument: &'static str,
    maps: impl Iterator<Item = &'a [f32]>,
    dim: usize,
    weight: &[f32],
    bias: Option<&[f32]>,
    columns: usize,
) -> Result<Folded, Error> {
    let maps: Vec<&[f32]> = maps.collect();
    check_len(argument, weight.len(), &[maps.len(), dim, at_least_1("hidden", columns)?])?;
    check_finite(argument, weight)?;
    if let Some(bias) = bias {
        check_len("bias", bias.len(), &[maps.len(), dim])?;
        check_finite("bias", bias)?;
    }
    let mut folded = Folded { weight: Vec::new(), bias: bias.map(|_| Vec::new()) };
    let mut sums = vec![0f64; columns];
    for (head, map) in maps.iter().enumerate() {
        let rows = &weight[head * dim * columns..(head + 1) * dim * columns];
        for map in map.chunks_exact(dim) {
            sums.fill(0.0);
            for (&factor, row) in map.iter().zip(rows.chunks_exact(columns)) {
                for (sum, &x) in sums.iter_mut().zip(row) {
                    *sum += f64::from(factor) * f64::from(x);
                }
            }
            folded.weight.extend(sums.iter().map(|&x| x as f32));
            if let (Some(folded), Some(bias)) = (&mut folded.bias, bias) {
                folded.push(dot(map, &bias[head * dim..(head + 1) * dim]));
            }
        }
    }
    Ok(folded)
}

/// Folds a Hadamard rotation into the value maps: each group of `group` cached channels is turned by a Hadamard matrix, which
/// spreads its energy evenly, as a quantizer with one scale per group wants; outputs are turned back, so that attention is
/// unchanged. A head whose r_v is no multiple of `group` has groups of the largest smaller size by 16 that divides it, as
/// quantizers choose them; a group whose size is no power of two is turned in the largest blocks that are.
///
/// # Errors
/// [`Error::Argument`] when `group` is no multiple of 16.
pub fn fold_hadamard(projection: &mut LayerProjection, group: usize) -> Result<(), Error> {
    if group == 0 || !group.is_multiple_of(16) {
        return Err(Error::argument("group", "a multiple of 16", group));
    }
    let (dim, ranks) = (projection.shape().v_dim(), projection.ranks().heads().to_vec());
    for (maps, HeadRanks { v: rank, .. }) in projection.heads_mut().iter_mut().zip(ranks) {
        let group = value_group(rank, group);
        let block = 1 << group.trailing_zeros();
        for map in [&mut maps.value, &mut maps.output] {
            map.chunks_exact_mut(block * dim).for_each(|rows| hadamard(rows, dim));
        }
    }
    Ok(())
}

/// Channels of a group of a row of `rank`: `group`, made smaller by 16 until it divides.
pub fn value_group(rank: usize, group: usize) -> usize {
    let mut group = group.min(rank);
    while group > 16 && !rank.is_multiple_of(group) {
        group -= 16;
    }
    group
}

/// Multiplies rows `[n, dim]` by the orthonormal Hadamard matrix of order n, a power of two (Sylvester's), in place.
fn hadamard(rows: &mut [f32], dim: usize) {
    let n = rows.len() / dim;
    let mut half = 1;
    while half < n {
        for block in rows.chunks_exact_mut(2 * half * dim) {
            let (low, high) = block.split_at_mut(half * dim);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = (n as f32).sqrt().recip();
    rows.iter_mut().for_each(|x| *x *= scale);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>() as f32
}

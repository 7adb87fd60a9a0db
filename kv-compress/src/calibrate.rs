//! Calibration: what queries, keys, values and W_O look like, as Gram matrices.
//!
//! A projection depends on activations only through Gram matrices, one per KV head: QᵀQ over all query heads of its group
//! and KᵀK, both **after RoPE** (and after QK-norm and biases), VᵀV (with bias), and Σ_g W_g·W_gᵀ over the blocks W_g
//! `[v_dim, hidden]` of W_O that the group's outputs meet. They are sums over tokens, so calibration streams, and shards,
//! threads and processes merge by addition. Sums are f64.

use attention::HeadShape;
use nalgebra::DMatrix;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::error::{at_least_1, check_finite, check_len};
use crate::format::Format;
use crate::linalg::{Matrix, add_gram, from_rows, to_rows};

/// The calibration file that this crate writes and reads.
const FORMAT: Format = Format { what: "calibration", version: 1 };

/// Gram matrices of one KV head.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HeadGrams {
    /// QᵀQ `[qk_dim, qk_dim]`, summed over the queries of the group.
    pub(crate) q: Matrix,
    /// KᵀK `[qk_dim, qk_dim]`.
    pub(crate) k: Matrix,
    /// VᵀV `[v_dim, v_dim]`.
    pub(crate) v: Matrix,
    /// W·Wᵀ `[v_dim, v_dim]`, W the blocks of W_O that the group's outputs meet, side by side.
    pub(crate) w_o: Matrix,
}

/// Calibration of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCalibration {
    shape: HeadShape,
    tokens: u64,
    has_w_o: bool,
    heads: Vec<HeadGrams>,
}

impl LayerCalibration {
    /// Nothing seen yet.
    pub fn new(shape: HeadShape) -> Self {
        let zero = |dim| DMatrix::zeros(dim, dim);
        let (qk, v) = (shape.qk_dim(), shape.v_dim());
        let head = HeadGrams { q: zero(qk), k: zero(qk), v: zero(v), w_o: zero(v) };
        LayerCalibration { shape, tokens: 0, has_w_o: false, heads: vec![head; shape.kv_heads()] }
    }

    /// Heads of the layer.
    pub fn shape(&self) -> &HeadShape {
        &self.shape
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Adds tokens, on the current rayon thread pool (one task per KV head, so sums do not depend on the threads).
    ///
    /// - `q` `[tokens, q_heads, qk_dim]`, `k` `[tokens, kv_heads, qk_dim]`: as attention multiplies them, after RoPE;
    /// - `v` `[tokens, kv_heads, v_dim]`, bias included.
    ///
    /// # Errors
    /// [`Error::Argument`] for lengths that do not fit, [`Error::NotFinite`] for a NaN or an infinity; nothing is added then.
    pub fn add(&mut self, q: &[f32], k: &[f32], v: &[f32]) -> Result<(), Error> {
        let shape = self.shape;
        let (q_row, k_row) = (shape.q_heads() * shape.qk_dim(), shape.kv_heads() * shape.qk_dim());
        let tokens = k.len() / k_row;
        check_len("k", k.len(), &[tokens, shape.kv_heads(), shape.qk_dim()])?;
        check_len("q", q.len(), &[tokens, shape.q_heads(), shape.qk_dim()])?;
        check_len("v", v.len(), &[tokens, shape.kv_heads(), shape.v_dim()])?;
        for (argument, values) in [("q", q), ("k", k), ("v", v)] {
            check_finite(argument, values)?;
        }
        let v_row = shape.kv_heads() * shape.v_dim();
        self.heads.par_iter_mut().enumerate().for_each(|(head, grams)| {
            for q_head in shape.q_heads_of(head) {
                let start = q_head * shape.qk_dim();
                add_gram(&mut grams.q, q.chunks_exact(q_row).map(|row| &row[start..start + shape.qk_dim()]));
            }
            let start = head * shape.qk_dim();
            add_gram(&mut grams.k, k.chunks_exact(k_row).map(|row| &row[start..start + shape.qk_dim()]));
            let start = head * shape.v_dim();
            add_gram(&mut grams.v, v.chunks_exact(v_row).map(|row| &row[start..start + shape.v_dim()]));
        });
        self.tokens = self.tokens.saturating_add(tokens as u64);
        Ok(())
    }

    /// Sets W_O `[hidden, q_heads · v_dim]`, as checkpoints hold it; its bias plays no part.
    ///
    /// # Errors
    /// [`Error::Argument`] for a length that does not fit, [`Error::NotFinite`] for a NaN or an infinity.
    pub fn set_w_o(&mut self, w_o: &[f32], hidden: usize) -> Result<(), Error> {
        let shape = self.shape;
        check_len("w_o", w_o.len(), &[at_least_1("hidden", hidden)?, shape.q_heads(), shape.v_dim()])?;
        check_finite("w_o", w_o)?;
        let row_len = shape.q_heads() * shape.v_dim();
        self.heads.par_iter_mut().enumerate().for_each(|(head, grams)| {
            grams.w_o.fill(0.0);
            for q_head in shape.q_heads_of(head) {
                let start = q_head * shape.v_dim();
                add_gram(
                    &mut grams.w_o,
                    w_o.chunks_exact(row_len).map(|row| &row[start..start + shape.v_dim()]),
                );
            }
        });
        self.has_w_o = true;
        Ok(())
    }

    /// Adds what another shard saw of the same layer.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when its heads differ, or both have a W_O and these differ; nothing is merged then.
    pub fn merge(&mut self, other: &LayerCalibration) -> Result<(), Error> {
        if self.shape != other.shape {
            return Err(Error::mismatch("the layer's shape", other.shape, self.shape));
        }
        if self.has_w_o && other.has_w_o {
            for (head, (mine, others)) in self.heads.iter().zip(&other.heads).enumerate() {
                let (mine, others) = (mine.w_o.trace(), others.w_o.trace());
                if !same_energy(mine, others) {
                    return Err(Error::mismatch(format!("‖W_O‖² of KV head {head}"), others, mine));
                }
            }
        }
        for (mine, others) in self.heads.iter_mut().zip(&other.heads) {
            mine.q += &others.q;
            mine.k += &others.k;
            mine.v += &others.v;
            if !self.has_w_o {
                mine.w_o.copy_from(&others.w_o);
            }
        }
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.has_w_o |= other.has_w_o;
        Ok(())
    }

    /// Gram matrices by KV head.
    ///
    /// # Errors
    /// [`Error::EmptyCalibration`] when no token or no W_O was seen.
    pub(crate) fn heads(&self, layer: usize) -> Result<&[HeadGrams], Error> {
        match (self.tokens, self.has_w_o) {
            (0, _) => Err(Error::EmptyCalibration { layer, what: "tokens" }),
            (_, false) => Err(Error::EmptyCalibration { layer, what: "W_O" }),
            _ => Ok(&self.heads),
        }
    }
}

/// Whether two energies are of the same weights, up to rounding to a 16-bit type.
pub(crate) fn same_energy(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-3 * a.abs().max(b.abs())
}

/// Calibration of a model, layer by layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    layers: Vec<LayerCalibration>,
}

/// What the file's metadata says of a layer.
#[derive(Serialize, Deserialize)]
struct LayerHeader {
    q_heads: usize,
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    tokens: u64,
    has_w_o: bool,
}

impl Calibration {
    /// Nothing seen yet of layers of these shapes.
    pub fn new(shapes: impl IntoIterator<Item = HeadShape>) -> Self {
        Calibration { layers: shapes.into_iter().map(LayerCalibration::new).collect() }
    }

    /// Layers.
    pub fn layers(&self) -> &[LayerCalibration] {
        &self.layers
    }

    /// A layer, to add to.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is none of this number.
    pub fn layer_mut(&mut self, layer: usize) -> Result<&mut LayerCalibration, Error> {
        let layers = self.layers.len();
        self.layers.get_mut(layer).ok_or_else(|| Error::argument("layer", format!("below {layers}"), layer))
    }

    /// Adds what another shard saw.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when layers differ; nothing is merged then.
    pub fn merge(&mut self, other: &Calibration) -> Result<(), Error> {
        if self.layers.len() != other.layers.len() {
            return Err(Error::mismatch("the number of layers", other.layers.len(), self.layers.len()));
        }
        let mut merged = self.layers.clone();
        for (mine, others) in merged.iter_mut().zip(&other.layers) {
            mine.merge(others)?;
        }
        self.layers = merged;
        Ok(())
    }

    /// The calibration as one `.safetensors` file, f64: tensors `layers.{l}.heads.{h}.{q,k,v,w_o}`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it does not serialize.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let fail = |error: &dyn std::fmt::Display| Error::malformed("calibration", error);
        let headers: Vec<LayerHeader> = self
            .layers
            .iter()
            .map(|layer| LayerHeader {
                q_heads: layer.shape.q_heads(),
                kv_heads: layer.shape.kv_heads(),
                qk_dim: layer.shape.qk_dim(),
                v_dim: layer.shape.v_dim(),
                tokens: layer.tokens,
                has_w_o: layer.has_w_o,
            })
            .collect();
        let mut tensors = Vec::new();
        for (l, layer) in self.layers.iter().enumerate() {
            for (h, grams) in layer.heads.iter().enumerate() {
                for (name, gram) in [("q", &grams.q), ("k", &grams.k), ("v", &grams.v), ("w_o", &grams.w_o)] {
                    let bytes: Vec<u8> = to_rows(gram).iter().flat_map(|x| x.to_le_bytes()).collect();
                    tensors.push((format!("layers.{l}.heads.{h}.{name}"), gram.nrows(), bytes));
                }
            }
        }
        let views = tensors
            .iter()
            .map(|(name, dim, bytes)| Ok((name, TensorView::new(Dtype::F64, vec![*dim, *dim], bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|error| fail(&error))?;
        let metadata = FORMAT.metadata(&headers)?;
        safetensors::serialize(views, Some(metadata)).map_err(|error| fail(&error))
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// [`Error::Malformed`] for anything else, another version included; [`Error::Attention`] for heads that make no shape;
    /// [`Error::NotFinite`] for NaN and infinities.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let fail = |reason: String| Error::Malformed { what: "calibration", reason };
        let headers: Vec<LayerHeader> = FORMAT.read(bytes)?;
        let file = SafeTensors::deserialize(bytes).map_err(|error| fail(error.to_string()))?;
        let mut layers = Vec::new();
        for (l, header) in headers.iter().enumerate() {
            let shape = HeadShape::new(header.q_heads, header.kv_heads, header.qk_dim, header.v_dim)?;
            // Before anything is allocated: the shape is what the file says, its tensors are what it holds.
            let sides =
                [("q", shape.qk_dim()), ("k", shape.qk_dim()), ("v", shape.v_dim()), ("w_o", shape.v_dim())];
            for h in 0..shape.kv_heads() {
                for (name, dim) in sides {
                    let name = format!("layers.{l}.heads.{h}.{name}");
                    let tensor = file.tensor(&name).map_err(|error| fail(format!("{name}: {error}")))?;
                    if tensor.dtype() != Dtype::F64 || tensor.shape() != [dim, dim] {
                        let found = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
                        return Err(fail(format!("{name}: expected F64 [{dim}, {dim}], found {found}")));
                    }
                }
            }
            let mut layer = LayerCalibration::new(shape);
            for (h, grams) in layer.heads.iter_mut().enumerate() {
                for (name, gram) in
                    [("q", &mut grams.q), ("k", &mut grams.k), ("v", &mut grams.v), ("w_o", &mut grams.w_o)]
                {
                    let name = format!("layers.{l}.heads.{h}.{name}");
                    let tensor = file.tensor(&name).map_err(|error| fail(format!("{name}: {error}")))?;
                    let dim = gram.nrows();
                    let elements: Vec<f64> =
                        tensor.data().as_chunks().0.iter().copied().map(f64::from_le_bytes).collect();
                    if let Some(index) = elements.iter().position(|x| !x.is_finite()) {
                        return Err(Error::NotFinite {
                            argument: "calibration",
                            index,
                            value: elements[index],
                        });
                    }
                    *gram = from_rows(dim, dim, &elements);
                }
            }
            layer.tokens = header.tokens;
            layer.has_w_o = header.has_w_o;
            layers.push(layer);
        }
        Ok(Calibration { layers })
    }
}

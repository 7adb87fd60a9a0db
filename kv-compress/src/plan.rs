//! A compression plan: ranks and maps of every layer of one model, in one file.

use std::ops::Range;

use attention::HeadShape;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::calibrate::{Calibration, same_energy};
use crate::format::Format;
use crate::maps::{HeadMaps, LayerProjection};
use crate::projection::{HeadBasis, Projection};
use crate::rank_plan::{RankPlan, Reason, Rule};
use crate::{Error, HeadRanks, LayerRanks};

/// The plan file that this crate writes and reads.
const FORMAT: Format = Format { what: "plan", version: 1 };

/// Ranks and maps of every layer, and what they were made from.
#[derive(Debug, Clone, PartialEq)]
pub struct CompressionPlan {
    projection: Projection,
    rule: Rule,
    reasons: Vec<Reason>,
    calibration_tokens: u64,
    layers: Vec<LayerProjection>,
    /// ‖W_O‖² of each KV head's group, `[layers][kv_heads]`: tells one model's weights from another's.
    w_o_energy: Vec<Vec<f64>>,
}

/// The metadata `plan` of the file.
#[derive(Serialize, Deserialize)]
struct Header {
    projection: Projection,
    rule: Rule,
    calibration_tokens: u64,
    layers: Vec<LayerHeader>,
    reasons: Vec<Reason>,
}

#[derive(Serialize, Deserialize)]
struct LayerHeader {
    q_heads: usize,
    kv_heads: usize,
    qk_dim: usize,
    v_dim: usize,
    ranks: Vec<HeadRanks>,
    w_o_energy: Vec<f64>,
}

impl CompressionPlan {
    /// Cuts bases `[layers][kv_heads]` to the ranks of a plan.
    ///
    /// # Errors
    /// [`Error::Argument`] when layers, heads or ranks do not fit each other, [`Error::EmptyCalibration`].
    pub fn new(
        calibration: &Calibration,
        projection: Projection,
        bases: &[Vec<HeadBasis>],
        ranks: &RankPlan,
    ) -> Result<Self, Error> {
        let layers = calibration.layers();
        if bases.len() != layers.len() || ranks.layers().len() != layers.len() {
            let found = format!("{} of bases, {} of ranks", bases.len(), ranks.layers().len());
            return Err(Error::argument("bases", format!("{} layers", layers.len()), found));
        }
        let mut plan = CompressionPlan {
            projection,
            rule: ranks.rule().clone(),
            reasons: ranks.reasons().to_vec(),
            calibration_tokens: layers.iter().map(|layer| layer.tokens()).max().unwrap_or(0),
            layers: Vec::new(),
            w_o_energy: Vec::new(),
        };
        for (l, ((layer, bases), ranks)) in layers.iter().zip(bases).zip(ranks.layers()).enumerate() {
            plan.layers.push(LayerProjection::new(*layer.shape(), ranks.clone(), bases)?);
            plan.w_o_energy.push(layer.heads(l)?.iter().map(|grams| grams.w_o.trace()).collect());
        }
        Ok(plan)
    }

    /// Maps by layer.
    pub fn layers(&self) -> &[LayerProjection] {
        &self.layers
    }

    /// How the bases were chosen.
    pub fn projection(&self) -> Projection {
        self.projection
    }

    /// How the ranks were chosen.
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Why each head has its ranks; empty where no profile was asked for.
    pub fn reasons(&self) -> &[Reason] {
        &self.reasons
    }

    /// Tokens that were calibrated on.
    pub fn calibration_tokens(&self) -> u64 {
        self.calibration_tokens
    }

    /// Bytes that one token costs in all layers, in 16 bits.
    pub fn bytes_per_token(&self) -> usize {
        self.layers.iter().map(|layer| 2 * layer.ranks().elements()).sum()
    }

    /// Bytes that one token costs without compression, in 16 bits.
    pub fn dense_bytes_per_token(&self) -> usize {
        let elements = |shape: &HeadShape| shape.kv_heads() * (shape.qk_dim() + shape.v_dim());
        self.layers.iter().map(|layer| 2 * elements(layer.shape())).sum()
    }

    /// Folds a Hadamard rotation into the value maps of every layer: see [`fold_hadamard`](crate::merge::fold_hadamard).
    ///
    /// # Errors
    /// [`Error::Argument`] when `group` is no multiple of 16.
    pub fn fold_hadamard(&mut self, group: usize) -> Result<(), Error> {
        self.layers.iter_mut().try_for_each(|layer| crate::merge::fold_hadamard(layer, group))
    }

    /// Checks that the plan was made for layers of these shapes.
    ///
    /// # Errors
    /// [`Error::Mismatch`] names the first difference.
    pub fn check(&self, shapes: &[HeadShape]) -> Result<(), Error> {
        if shapes.len() != self.layers.len() {
            return Err(Error::mismatch("the number of layers", self.layers.len(), shapes.len()));
        }
        for (l, (layer, shape)) in self.layers.iter().zip(shapes).enumerate() {
            if layer.shape() != shape {
                return Err(Error::mismatch(format!("the shape of layer {l}"), layer.shape(), shape));
            }
        }
        Ok(())
    }

    /// Checks that W_O `[hidden, q_heads · v_dim]` of a layer is the one that the plan was made with, up to rounding.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for other weights, [`Error::Argument`] for a layer or length that does not fit.
    pub fn check_w_o(&self, layer: usize, w_o: &[f32], hidden: usize) -> Result<(), Error> {
        let Some(projection) = self.layers.get(layer) else {
            return Err(Error::argument("layer", format!("below {}", self.layers.len()), layer));
        };
        let shape = projection.shape();
        crate::error::check_len("w_o", w_o.len(), &[hidden, shape.q_heads(), shape.v_dim()])?;
        let mut energy = vec![0.0; shape.kv_heads()];
        for row in w_o.chunks_exact(shape.q_heads() * shape.v_dim()) {
            for (energy, block) in energy.iter_mut().zip(row.chunks_exact(shape.group() * shape.v_dim())) {
                *energy += block.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
            }
        }
        for (head, (&expected, found)) in self.w_o_energy[layer].iter().zip(energy).enumerate() {
            if !same_energy(expected, found) {
                return Err(Error::mismatch(
                    format!("‖W_O‖² of layer {layer}, KV head {head}"),
                    expected,
                    found,
                ));
            }
        }
        Ok(())
    }

    /// The plan of some of the KV heads of every layer: one rank of a tensor-parallel group.
    ///
    /// # Errors
    /// [`Error::Argument`] when the range is empty or out of bounds.
    pub fn slice(&self, kv_heads: Range<usize>) -> Result<Self, Error> {
        let layers =
            self.layers.iter().map(|layer| layer.slice(kv_heads.clone())).collect::<Result<_, _>>()?;
        let w_o_energy = self.w_o_energy.iter().map(|heads| heads[kv_heads.clone()].to_vec()).collect();
        let mine = self.reasons.iter().filter(|reason| kv_heads.contains(&reason.head));
        let reasons =
            mine.map(|reason| Reason { head: reason.head - kv_heads.start, ..reason.clone() }).collect();
        Ok(CompressionPlan { layers, w_o_energy, reasons, rule: self.rule.clone(), ..*self })
    }

    /// The plan as one `.safetensors` file: f32 tensors `layers.{l}.heads.{h}.{query,key,value,output}`, each `[rank, dim]`,
    /// and all the rest in the metadata.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it does not serialize.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let fail = |error: &dyn std::fmt::Display| Error::malformed("plan", error);
        let mut headers = Vec::new();
        let mut tensors = Vec::new();
        for (l, (layer, w_o_energy)) in self.layers.iter().zip(&self.w_o_energy).enumerate() {
            let shape = layer.shape();
            headers.push(LayerHeader {
                q_heads: shape.q_heads(),
                kv_heads: shape.kv_heads(),
                qk_dim: shape.qk_dim(),
                v_dim: shape.v_dim(),
                ranks: layer.ranks().heads().to_vec(),
                w_o_energy: w_o_energy.clone(),
            });
            for (h, (maps, ranks)) in layer.heads().iter().zip(layer.ranks().heads()).enumerate() {
                for (name, map, rank) in [
                    ("query", &maps.query, ranks.k),
                    ("key", &maps.key, ranks.k),
                    ("value", &maps.value, ranks.v),
                    ("output", &maps.output, ranks.v),
                ] {
                    let bytes: Vec<u8> = map.iter().flat_map(|x| x.to_le_bytes()).collect();
                    tensors.push((
                        format!("layers.{l}.heads.{h}.{name}"),
                        vec![rank, map.len() / rank],
                        bytes,
                    ));
                }
            }
        }
        let header = Header {
            projection: self.projection,
            rule: self.rule.clone(),
            calibration_tokens: self.calibration_tokens,
            layers: headers,
            reasons: self.reasons.clone(),
        };
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|error| fail(&error))?;
        let metadata = FORMAT.metadata(&header)?;
        safetensors::serialize(views, Some(metadata)).map_err(|error| fail(&error))
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// [`Error::Malformed`] for anything else, another version included; [`Error::Argument`] for ranks that make no sense.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let fail = |reason: String| Error::Malformed { what: "plan", reason };
        let header: Header = FORMAT.read(bytes)?;
        let file = SafeTensors::deserialize(bytes).map_err(|error| fail(error.to_string()))?;
        let mut plan = CompressionPlan {
            projection: header.projection,
            rule: header.rule,
            reasons: header.reasons,
            calibration_tokens: header.calibration_tokens,
            layers: Vec::new(),
            w_o_energy: Vec::new(),
        };
        for (l, layer) in header.layers.into_iter().enumerate() {
            let shape = HeadShape::new(layer.q_heads, layer.kv_heads, layer.qk_dim, layer.v_dim)?;
            let ranks = LayerRanks::new(&shape, layer.ranks)?;
            if layer.w_o_energy.len() != shape.kv_heads() {
                return Err(fail(format!("layer {l}: {} energies of W_O", layer.w_o_energy.len())));
            }
            let mut heads = Vec::new();
            for (h, head) in ranks.heads().iter().enumerate() {
                let map = |name: &str, rank: usize, dim: usize| -> Result<Vec<f32>, Error> {
                    let name = format!("layers.{l}.heads.{h}.{name}");
                    let tensor = file.tensor(&name).map_err(|error| fail(format!("{name}: {error}")))?;
                    if tensor.dtype() != Dtype::F32 || tensor.shape() != [rank, dim] {
                        let found = format!("{:?} {:?}", tensor.dtype(), tensor.shape());
                        return Err(fail(format!("{name}: expected F32 [{rank}, {dim}], found {found}")));
                    }
                    Ok(tensor.data().as_chunks().0.iter().copied().map(f32::from_le_bytes).collect())
                };
                heads.push(HeadMaps {
                    query: map("query", head.k, shape.qk_dim())?,
                    key: map("key", head.k, shape.qk_dim())?,
                    value: map("value", head.v, shape.v_dim())?,
                    output: map("output", head.v, shape.v_dim())?,
                });
            }
            plan.layers.push(LayerProjection::from_maps(shape, ranks, heads)?);
            plan.w_o_energy.push(layer.w_o_energy);
        }
        if plan.layers.is_empty() {
            return Err(fail("no layers".into()));
        }
        Ok(plan)
    }
}

//! Low-rank keys and values with per-head ranks, read without decompression (`kv-compress`).
//!
//! A new token's queries and keys are projected after RoPE, its values as they come; attention runs in the reduced basis of
//! each KV head, and W_O with the value maps folded in takes the outputs back to the residual stream. What is projected is
//! stored in 16 bits or, composed with a quantized mode (`fdc:FILE+hack4`), as codes; a Hadamard rotation inside the value
//! groups then evens out their channels, at no cost, because it is folded into the maps.

mod paged;
mod probe;
mod quantized;
mod recorder;
mod store;

use std::path::{Path, PathBuf};

use attention::rope::Rope;
use attention::{DType, HeadShape};
use kv_compress::{CompressionPlan, merge};
use ndarray::{Array2, ArrayView3, CowArray};

use super::{Geometry, HackOptions, KvCache, KvMemory, Step, hack_bits};
use crate::linear::{self, Linear, Weight};
use crate::mode::Mode;
use crate::{Error, Model};
use paged::Paged;
pub use probe::Probe;
use quantized::Quantized;
pub use recorder::Recorder;
use store::Store;

/// Folder beside a checkpoint where the plans of the presets lie.
pub const PLANS: &str = "plans";
/// Modes that stand for `fdc:FILE` with the plan of their name in [`PLANS`].
const PRESETS: [&str; 2] = ["fdc-0.5", "fdc-auto"];

/// The plan that a mode loads: its file, or the one of its name beside the checkpoint.
///
/// # Errors
/// [`Error::Mode`] for a mode that loads none.
pub fn plan_path(mode: &Mode, model: &Path) -> Result<PathBuf, Error> {
    match mode.file() {
        Some(file) => Ok(file.to_path_buf()),
        None if PRESETS.contains(&mode.name()) => {
            Ok(model.join(PLANS).join(format!("{}.safetensors", mode.name())))
        }
        None => Err(mode.refuse("fdc needs a plan: fdc:FILE, as engine compress writes it")),
    }
}

/// Checks a mode of this method without a model.
pub(super) fn check(mode: &Mode) -> Result<(), Error> {
    plan_path(mode, Path::new(""))?;
    Storage::new(mode).map(drop)
}

/// Reads a plan.
///
/// # Errors
/// A file that cannot be read, or that is no plan.
pub fn read_plan(path: &Path) -> Result<CompressionPlan, Error> {
    let bytes = std::fs::read(path).map_err(Error::reading(path))?;
    CompressionPlan::from_bytes(&bytes).map_err(|error| Error::malformed(path, error))
}

/// How projected keys and values are stored.
#[derive(Debug, Clone)]
pub enum Storage {
    /// In 16 bits.
    Half,
    /// In bf16.
    Brain,
    /// As codes.
    Codes(HackOptions),
}

impl Storage {
    /// What a mode asks for.
    ///
    /// # Errors
    /// [`Error::Mode`] for a type that has not 16 bits.
    fn new(mode: &Mode) -> Result<Self, Error> {
        if let Some(with) = mode.with() {
            return Ok(Storage::Codes(HackOptions::new(mode, hack_bits(with))?));
        }
        let name = mode.option("dtype", DType::F16.to_string(), "a name")?;
        match [DType::F16, DType::BF16].into_iter().find(|dtype| dtype.to_string() == name) {
            Some(DType::BF16) => Ok(Storage::Brain),
            Some(_) => Ok(Storage::Half),
            None => Err(mode.refuse(format!("dtype: expected f16 or bf16, found {name:?}"))),
        }
    }
}

/// Low-rank keys and values of every layer.
pub struct Fdc {
    rope: Rope,
    plan: CompressionPlan,
    layers: Vec<Layer>,
}

struct Layer {
    store: Box<dyn Store>,
    /// W_O with the value maps folded in, from the first step on.
    w_o: Option<linear::Dense>,
}

impl Fdc {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Compress`] for a plan of another model, a rotary embedding out of range.
    pub fn new(geometry: &Geometry, mut plan: CompressionPlan, storage: &Storage) -> Result<Self, Error> {
        let shapes: Vec<HeadShape> = geometry.layers.iter().map(|spec| spec.shape).collect();
        plan.check(&shapes)?;
        if let Storage::Codes(options) = storage {
            plan.fold_hadamard(options.config.partition())?;
        }
        let store = |layer: usize| -> Result<Box<dyn Store>, Error> {
            let (spec, ranks, capacity) =
                (&geometry.layers[layer], plan.layers()[layer].ranks(), geometry.capacity);
            Ok(match storage {
                Storage::Half => Box::new(Paged::<half::f16>::new(spec, ranks, capacity)?),
                Storage::Brain => Box::new(Paged::<half::bf16>::new(spec, ranks, capacity)?),
                Storage::Codes(options) => Box::new(Quantized::new(options, layer, spec, ranks, capacity)?),
            })
        };
        let layers = (0..shapes.len())
            .map(|layer| Ok(Layer { store: store(layer)?, w_o: None }))
            .collect::<Result<_, Error>>()?;
        Ok(Fdc { rope: Rope::new(geometry.rope.clone(), geometry.capacity)?, plan, layers })
    }

    /// The cache of a mode: `fdc:FILE`, or a preset of this model.
    ///
    /// # Errors
    /// A plan that is missing, damaged or of another model.
    pub fn open(mode: &Mode, model: &Model, geometry: Geometry) -> Result<Self, Error> {
        Fdc::new(&geometry, read_plan(&plan_path(mode, model.path())?)?, &Storage::new(mode)?)
    }

    fn rotated(&self, x: ArrayView3<'_, f32>, positions: &[u32]) -> Result<Vec<f32>, Error> {
        let mut rotated: Vec<f32> = x.iter().copied().collect();
        self.rope.apply(&mut rotated, x.dim().1, positions)?;
        Ok(rotated)
    }

    /// Projected keys `[new, Σ r_k]` and values `[new, Σ r_v]`.
    fn project(&self, step: &Step<'_>) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let Some(layer) = self.layers.get(step.layer) else {
            return Err(Error::argument("layer", format!("below {}", self.layers.len()), step.layer));
        };
        // Masks count keys from the start of the sequence, so nothing may be left out.
        let held = layer.store.tokens();
        if !step.positions.iter().copied().eq((held as u32..).take(step.positions.len())) {
            let found = format!("{:?}", step.positions);
            return Err(Error::argument("positions", format!("consecutive from {held}"), found));
        }
        let projection = &self.plan.layers()[step.layer];
        let values: Vec<f32> = step.v.iter().copied().collect();
        Ok((projection.keys(&self.rotated(step.k, step.positions)?)?, projection.values(&values)?))
    }

    /// W_O with the value maps folded in.
    fn fold(&self, step: &Step<'_>) -> Result<linear::Dense, Error> {
        let matrix: CowArray<'_, f32, _> = step.w_o.matrix();
        let (hidden, w_o) = (matrix.nrows(), matrix.as_standard_layout());
        let w_o = w_o.as_slice().expect("standard layout");
        self.plan.check_w_o(step.layer, w_o, hidden)?;
        let folded = merge::fold_output(&self.plan.layers()[step.layer], w_o, hidden)?;
        let matrix = Array2::from_shape_vec((hidden, folded.len() / hidden), folded).expect("whole rows");
        let bias = step.w_o.bias().map(<[f32]>::to_vec);
        Ok(linear::Dense::new(Weight { matrix: matrix.into_shared(), bias, stored: DType::F32 }))
    }
}

impl KvCache for Fdc {
    fn forward(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error> {
        let (keys, values) = self.project(step)?;
        let w_o = match self.layers[step.layer].w_o.take() {
            Some(w_o) => w_o,
            None => self.fold(step)?,
        };
        let q = self.plan.layers()[step.layer].queries(&self.rotated(step.q, step.positions)?)?;
        let layer = &mut self.layers[step.layer];
        let out = layer.store.forward(&q, &keys, &values)?;
        layer.w_o.insert(w_o).forward(out.view())
    }

    fn append(&mut self, step: &Step<'_>) -> Result<(), Error> {
        let (keys, values) = self.project(step)?;
        self.layers[step.layer].store.append(&keys, &values)
    }

    fn len(&self) -> usize {
        // The last layer is the last to see a token.
        self.layers.last().map_or(0, |layer| layer.store.tokens())
    }

    /// What is stored of tokens. The maps are no part of it: they belong to the model, like its weights.
    fn memory(&self) -> KvMemory {
        KvMemory { device: self.layers.iter().map(|layer| layer.store.bytes()).sum(), host: 0 }
    }

    fn clear(&mut self) {
        self.layers.iter_mut().for_each(|layer| layer.store.clear());
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        self.layers.iter_mut().for_each(|layer| layer.store.scramble(rng));
    }
}

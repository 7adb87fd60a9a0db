//! The KV seam: what a token leaves behind in a layer, and how attention reads it.
//!
//! A method implements [`KvCache`] and gets a line in [`METHODS`] and in [`open`]. It receives whatever a method may need:
//! queries and keys **before** RoPE, positions, values, and the output projection W_O; it gives back what the layer adds
//! to the residual stream. So a method may rotate keys early or late, hold them in another basis, or fold its own basis
//! into W_O.

mod dense;
mod fdc;
mod hack;
mod sharded;
mod sparse;

use attention::{AttentionSpec, DType, rope::RopeConfig};
use ndarray::{Array2, ArrayView3};

use crate::linear::Linear;
use crate::mode::{Method, Mode};
use crate::{Config, Error, Model};
pub use dense::Dense;
pub use fdc::{Fdc, PLANS, Probe, Recorder, Storage as FdcStorage, plan_path, read_plan};
pub use hack::{Hack, Options as HackOptions, QuantizedLayer};
pub(crate) use sharded::{HOME, RankShard, Shared};
pub use sharded::{ShardedKv, stored_type};
pub use sparse::{Options as SparseOptions, Sparse};

/// The methods of this seam.
pub const METHODS: &[Method] = &[
    Method {
        name: "dense",
        summary: "every key and value, in f16 (dtype=f16, bf16 or f32)",
        file: false,
        options: &["dtype"],
        with: &[],
    },
    fdc_method("fdc", "low-rank keys and values by a plan, fdc:FILE, in f16 (dtype=f16 or bf16)", true),
    fdc_method("fdc-0.5", "fdc by the model's own plan for half the bytes", false),
    fdc_method("fdc-auto", "fdc by the model's own plan that keeps 99 % of its accuracy", false),
    hack_method("hack2", "2-bit codes, attended without dequantization"),
    hack_method("hack4", "4-bit codes, attended without dequantization"),
    hack_method("hack8", "8-bit codes, attended without dequantization"),
    sparse_method("sparse-quest", "pages by minimum and maximum, budget=N tokens at a step", sparse::QUEST),
    sparse_method("sparse-shadowkv", "chunks by their mean, budget=N tokens at a step", sparse::SHADOW_KV),
    sparse_method(
        "sparse-retro",
        "clusters, the next best of them estimated, budget=N tokens",
        sparse::RETRO,
    ),
];

const fn sparse_method(
    name: &'static str,
    summary: &'static str,
    options: &'static [&'static str],
) -> Method {
    Method { name, summary, file: false, options, with: &[] }
}

const fn hack_method(name: &'static str, summary: &'static str) -> Method {
    Method { name, summary, file: false, options: hack::OPTIONS, with: &[] }
}

const fn fdc_method(name: &'static str, summary: &'static str, file: bool) -> Method {
    Method { name, summary, file, options: &["dtype"], with: &["hack2", "hack4", "hack8"] }
}

/// Bits of the codes of a quantized mode.
fn hack_bits(name: &str) -> usize {
    match name {
        "hack2" => 2,
        "hack4" => 4,
        _ => 8,
    }
}

/// The modes that the demo compares. The first is what the others are measured against.
pub const DEMO: &[&str] = &[
    "dense",
    "dense,dtype=bf16",
    "hack8",
    "hack4",
    "hack2",
    "fdc-0.5",
    "fdc-auto",
    "fdc-0.5+hack4",
    "sparse-quest,budget=128",
    "sparse-shadowkv,budget=128",
    "sparse-retro,budget=128",
];

/// New tokens in one layer, on their way into the cache and through attention.
pub struct Step<'a> {
    /// The layer, from 0.
    pub layer: usize,
    /// Position of each token, `[tokens]`, increasing.
    pub positions: &'a [u32],
    /// Queries `[tokens, q_heads, head_dim]` before RoPE, contiguous.
    pub q: ArrayView3<'a, f32>,
    /// Keys `[tokens, kv_heads, head_dim]` before RoPE, contiguous.
    pub k: ArrayView3<'a, f32>,
    /// Values `[tokens, kv_heads, head_dim]`, contiguous.
    pub v: ArrayView3<'a, f32>,
    /// The layer's output projection W_O, `[hidden, q_heads · head_dim]`.
    pub w_o: &'a dyn Linear,
}

/// What a cache holds, in bytes: everything that it keeps between steps, metadata included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvMemory {
    /// On the device (here: what a GPU would hold).
    pub device: usize,
    /// In host memory.
    pub host: usize,
}

/// What a cache in two memories does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvTraffic {
    /// Share of the tokens' keys and values that is on the device now.
    pub device_share: f64,
    /// Share of what was read that was on the device, since the cache was made; `None` if it was never asked.
    pub hit_rate: Option<f64>,
    /// Tokens that a step reads at most.
    pub budget: usize,
    /// Bytes fetched from host memory, since the cache was made.
    pub bytes_in: u64,
}

/// The KV cache of one sequence, all layers.
pub trait KvCache: Send {
    /// Stores new tokens of a layer and attends to them and everything before. Gives `[tokens, hidden]`: the attention
    /// output after W_O.
    ///
    /// # Errors
    /// Shapes or positions that do not fit the cache.
    fn forward(&mut self, step: &Step<'_>) -> Result<Array2<f32>, Error>;

    /// Stores new tokens of a layer whose attention was computed elsewhere: by ranks that share a prompt. Queries are not read.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn append(&mut self, step: &Step<'_>) -> Result<(), Error>;

    /// The type in which ranks that share a prompt attend to its rotated keys and values: what this cache would keep them in, where
    /// that is all it does to them, so that the prompt's logits do not depend on who computed it. Others attend in f32.
    fn stored(&self) -> DType {
        DType::F32
    }

    /// This cache as one whose keys and values are dealt to ranks; `None` for others.
    fn sharded(&self) -> Option<&ShardedKv> {
        None
    }

    /// [`sharded`](Self::sharded), to be changed.
    fn sharded_mut(&mut self) -> Option<&mut ShardedKv> {
        None
    }

    /// Tokens held.
    fn len(&self) -> usize;

    /// Whether nothing is held.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held now.
    fn memory(&self) -> KvMemory;

    /// What moves between the memories; `None` for a cache that is wholly on the device.
    fn traffic(&self) -> Option<KvTraffic> {
        None
    }

    /// Forgets everything, for the next sequence.
    fn clear(&mut self);

    /// Replaces all cached content by noise of like magnitude. An evaluation that does not get worse by it does not read
    /// the cache.
    fn scramble(&mut self, rng: &mut fastrand::Rng);
}

/// What a cache knows of its model, whatever the method.
#[derive(Debug, Clone)]
pub struct Geometry {
    /// What attention computes, per layer: heads, scale, mask. `[layers]`
    pub layers: Vec<AttentionSpec>,
    /// Rotary embedding of queries and keys.
    pub rope: RopeConfig,
    /// Tokens that the cache must be able to hold.
    pub capacity: usize,
}

impl Geometry {
    /// The caches of a model, for sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Context`] when the capacity is over the model's maximum.
    pub fn new(config: &Config, capacity: usize) -> Result<Self, Error> {
        config.check_context(capacity)?;
        let layers = (0..config.layers).map(|layer| config.attention(layer)).collect::<Result<_, _>>()?;
        Ok(Geometry { layers, rope: config.rope.clone(), capacity })
    }
}

/// Makes an empty cache for sequences of up to `capacity` tokens.
///
/// # Errors
/// An unknown mode, one that its method refuses, or a capacity over the model's maximum.
pub fn open(mode: &Mode, model: &Model, capacity: usize) -> Result<Box<dyn KvCache>, Error> {
    let method = mode.accept("KV", METHODS)?;
    let geometry = Geometry::new(model.config(), capacity)?;
    match method.name {
        "dense" => match dense_dtype(mode)? {
            DType::F16 => Ok(Box::new(Dense::<half::f16>::new(geometry)?)),
            DType::BF16 => Ok(Box::new(Dense::<half::bf16>::new(geometry)?)),
            DType::F32 => Ok(Box::new(Dense::<f32>::new(geometry)?)),
        },
        name @ ("hack2" | "hack4" | "hack8") => {
            let options = HackOptions::new(mode, hack_bits(name))?;
            Ok(Box::new(Hack::new(&geometry, &options)?))
        }
        "fdc" | "fdc-0.5" | "fdc-auto" => Ok(Box::new(Fdc::open(mode, model, geometry)?)),
        "sparse-quest" | "sparse-shadowkv" | "sparse-retro" => {
            let options = SparseOptions::new(mode)?;
            match options.dtype() {
                DType::BF16 => Ok(Box::new(Sparse::<half::bf16>::new(mode, &options, &geometry)?)),
                _ => Ok(Box::new(Sparse::<half::f16>::new(mode, &options, &geometry)?)),
            }
        }
        name => unreachable!("method {name} is listed but not built"),
    }
}

/// Checks a mode without a model: its name, options and their values.
///
/// # Errors
/// As [`open`].
pub fn check(mode: &Mode) -> Result<(), Error> {
    match mode.accept("KV", METHODS)?.name {
        "dense" => dense_dtype(mode).map(drop),
        name @ ("hack2" | "hack4" | "hack8") => HackOptions::new(mode, hack_bits(name)).map(drop),
        "fdc" | "fdc-0.5" | "fdc-auto" => fdc::check(mode),
        "sparse-quest" | "sparse-shadowkv" | "sparse-retro" => SparseOptions::new(mode).map(drop),
        _ => Ok(()),
    }
}

/// Why a mode of [`DEMO`] cannot be compared on a model: what it loads is not there. `None` where it can.
pub fn unavailable(mode: &Mode, model: &std::path::Path) -> Option<String> {
    let plan = fdc::plan_path(mode, model).ok().filter(|_| mode.name().starts_with("fdc"))?;
    (!plan.exists()).then(|| format!("no {} (engine compress makes one)", plan.display()))
}

/// Bytes per token of the dense cache in 16 bits: what every other mode is compared with.
pub fn dense_bytes_per_token(config: &Config) -> usize {
    config.kv_elements_per_token() * DType::F16.size()
}

fn dense_dtype(mode: &Mode) -> Result<DType, Error> {
    let name = mode.option("dtype", String::from("f16"), "a name")?;
    let known = [DType::F16, DType::BF16, DType::F32];
    known
        .into_iter()
        .find(|dtype| dtype.to_string() == name)
        .ok_or_else(|| mode.refuse(format!("dtype: expected f16, bf16 or f32, found {name:?}")))
}

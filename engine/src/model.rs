//! The model: embedding, decoder layers, final norm, output projection.

mod layer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ndarray::{ArcArray2, Array2, ArrayView2};

use crate::checkpoint::Checkpoint;
use crate::kv::KvCache;
use crate::linear::{self, Ledger, Linear, Role, StepTraffic, Weight};
use crate::mode::Mode;
use crate::{Config, Error};
use layer::{Layer, RmsNorm};

/// A model whose weights are loaded. It is immutable: sequences live in their [`KvCache`].
pub struct Model {
    path: PathBuf,
    config: Config,
    embedding: ArcArray2<f32>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    output: Box<dyn Linear>,
    ledger: Arc<Ledger>,
}

impl Model {
    /// Loads a Hugging Face checkpoint: a folder with `config.json` and `*.safetensors`. `linear` says where the weight
    /// matrices go.
    ///
    /// # Errors
    /// A configuration or weights that are missing, damaged, unsupported or do not fit each other; an unknown mode.
    pub fn load(path: &Path, linear: &Mode) -> Result<Self, Error> {
        let ledger = Arc::new(linear::check(linear)?);
        let config = Config::read(path)?;
        let mut weights = Loader { checkpoint: Checkpoint::read(path)?, linear, ledger: &ledger };

        let shape = [config.vocab_size, config.hidden_size];
        let (embedding, stored) = weights.matrix("model.embed_tokens", shape)?;
        let layers = (0..config.layers)
            .map(|layer| Layer::load(&config, layer, &mut weights))
            .collect::<Result<_, _>>()?;
        let norm = weights.norm("model.norm", config.hidden_size, config.rms_norm_eps)?;
        let output = if config.tied_embeddings {
            let weight = Weight { matrix: embedding.clone(), bias: None, stored };
            linear::place(linear, Role::Output, weight, &ledger)?
        } else {
            weights.linear("lm_head", Role::Output, shape, false)?
        };
        weights.checkpoint.check_layers(config.layers)?;
        Ok(Model { path: path.to_path_buf(), config, embedding, layers, norm, output, ledger })
    }

    /// The checkpoint's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Runs tokens at positions `start..`, after what `kv` holds. Gives hidden states after the final norm,
    /// `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Token`] and [`Error::Context`] before anything is computed; whatever the cache refuses.
    pub fn forward(&self, tokens: &[u32], start: usize, kv: &mut dyn KvCache) -> Result<Array2<f32>, Error> {
        self.config.check_tokens(tokens)?;
        self.config.check_context(start + tokens.len())?;
        self.ledger.begin(tokens.len());
        let positions: Vec<u32> = (start as u32..).take(tokens.len()).collect();
        let mut x = self.embed(tokens);
        for layer in &self.layers {
            layer.forward(&mut x, &positions, kv)?;
        }
        Ok(self.norm.apply(x.view()))
    }

    /// Embeddings of tokens that are in the vocabulary, `[tokens, hidden]`.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Array2<f32> {
        let mut x = Array2::zeros((tokens.len(), self.config.hidden_size));
        for (&token, mut row) in tokens.iter().zip(x.rows_mut()) {
            row.assign(&self.embedding.row(token as usize));
        }
        x
    }

    /// The decoder layers.
    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The final norm of hidden states `[tokens, hidden]`.
    pub(crate) fn final_norm(&self, hidden: ArrayView2<'_, f32>) -> Array2<f32> {
        self.norm.apply(hidden)
    }

    /// Opens a step of `tokens` tokens in the ledger of weights.
    pub(crate) fn begin_step(&self, tokens: usize) {
        self.ledger.begin(tokens);
    }

    /// Logits `[tokens, vocab_size]` of hidden states `[tokens, hidden]` that [`forward`](Self::forward) gave.
    ///
    /// # Errors
    /// [`Error::Argument`] when the hidden states have another width.
    pub fn logits(&self, hidden: ArrayView2<'_, f32>) -> Result<Array2<f32>, Error> {
        self.output.forward(hidden)
    }

    /// Checks logits `[tokens, vocab_size]` of the tokens at positions `start..`.
    ///
    /// # Errors
    /// [`Error::Logits`] for the first that is not finite.
    pub fn check_logits(logits: ArrayView2<'_, f32>, start: usize) -> Result<(), Error> {
        match logits.indexed_iter().find(|(_, logit)| !logit.is_finite()) {
            Some(((row, token), &value)) => Err(Error::Logits { position: start + row, token, value }),
            None => Ok(()),
        }
    }

    /// What the weights moved in the steps so far, by number of tokens; empty where the linear mode does not count. Products of
    /// [`logits`](Self::logits) belong to the step before. Sequences that run at the same time are not told apart.
    pub fn weight_steps(&self) -> Vec<StepTraffic> {
        match self.output.predict(0, 1) {
            Some(_) => self.ledger.steps(),
            None => Vec::new(),
        }
    }

    /// The devices that [`predict_step`](Self::predict_step) knows.
    pub fn weight_devices(&self) -> &[hybrid_gemm::DeviceProfile] {
        self.ledger.devices()
    }

    /// Seconds that the products of a step of `tokens` tokens and the logits of its last would take on a device of
    /// [`weight_devices`](Self::weight_devices), one after another; `None` where the linear mode does not predict.
    pub fn predict_step(&self, device: usize, tokens: usize) -> Option<f64> {
        let layers =
            self.layers.iter().flat_map(Layer::matrices).map(|matrix| matrix.predict(device, tokens));
        layers.chain([self.output.predict(device, 1)]).map(|prediction| Some(prediction?.time_s)).sum()
    }
}

/// Takes weights out of a checkpoint and hands matrices to the linear seam.
struct Loader<'a> {
    checkpoint: Checkpoint,
    linear: &'a Mode,
    ledger: &'a Arc<Ledger>,
}

impl Loader<'_> {
    /// The matrix `name.weight` and the type it is stored in.
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<(ArcArray2<f32>, attention::DType), Error> {
        let tensor = self.checkpoint.take(&format!("{name}.weight"), &shape)?;
        let matrix = ArcArray2::from_shape_vec(shape, tensor.data).expect("the shape was checked");
        Ok((matrix, tensor.stored))
    }

    /// The layer `name`: its weight `[out, in]` and, where the model has one, its bias `[out]`.
    fn linear(
        &mut self,
        name: &str,
        role: Role,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<Box<dyn Linear>, Error> {
        let (matrix, stored) = self.matrix(name, shape)?;
        let bias = match bias {
            true => Some(self.checkpoint.take(&format!("{name}.bias"), &shape[..1])?.data),
            false => None,
        };
        linear::place(self.linear, role, Weight { matrix, bias, stored }, self.ledger)
    }

    fn norm(&mut self, name: &str, size: usize, eps: f32) -> Result<RmsNorm, Error> {
        let weight = self.checkpoint.take(&format!("{name}.weight"), &[size])?.data;
        Ok(RmsNorm { weight, eps })
    }
}

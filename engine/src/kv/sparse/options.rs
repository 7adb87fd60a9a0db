//! The knobs of the modes `sparse-quest`, `sparse-shadowkv` and `sparse-retro`.

use attention::{AttentionSpec, DType};
use sparse_attn::index::clusters::Clustering;
use sparse_attn::index::pages::Scorer;
use sparse_attn::select::Aggregation;
use sparse_attn::{Algorithm, Config, Plan};

use crate::Error;
use crate::mode::Mode;

/// The options of all sparse modes.
macro_rules! options {
    ($($own:literal),*) => {
        &["budget", "buffer", "page", "aggregate", "sinks", "recent", "dense-layers", "dtype" $(, $own)*]
    };
}

/// The options of `sparse-quest`.
pub(crate) const QUEST: &[&str] = options!("scorer");
/// The options of `sparse-shadowkv`.
pub(crate) const SHADOW_KV: &[&str] = options!();
/// The options of `sparse-retro`.
pub(crate) const RETRO: &[&str] = options!("cluster", "segment", "reindex", "estimate");

/// Without `budget=`, a step reads at most this share of the tokens that the cache has room for.
const BUDGET_SHARE: usize = 8;

/// How a sparse cache was asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the cache does; its budget is 0 where none was asked for.
    config: Config,
}

impl Options {
    /// Reads a mode's options.
    ///
    /// Defaults are those of the papers, save what they chose for contexts of a hundred thousand tokens: as much buffering
    /// as a step reads (not five times), segments of 1024 tokens, 32 recent tokens beside 32 that wait to be
    /// clustered.
    ///
    /// # Errors
    /// [`Error::Mode`] for a value that is none of those expected.
    pub fn new(mode: &Mode) -> Result<Self, Error> {
        let number = |key, default| mode.option(key, default, "a number");
        let budget = mode.option("budget", 0usize, "a number of tokens")?;
        let mut config = match mode.name() {
            "sparse-quest" => Config::quest(budget),
            "sparse-shadowkv" => Config::shadow_kv(budget),
            _ => Config::retro_infer(budget),
        };
        match &mut config.algorithm {
            Algorithm::Pages { scorer, chunk } if mode.name() == "sparse-quest" => {
                let name = mode.option("scorer", scorer.name().to_string(), "a name")?;
                *scorer = Scorer::ALL.into_iter().find(|scorer| scorer.name() == name).ok_or_else(|| {
                    let known = Scorer::ALL.map(Scorer::name).join(", ");
                    mode.refuse(format!("scorer: expected {known}, found {name:?}"))
                })?;
                *chunk = number("page", *chunk)?;
            }
            Algorithm::Pages { chunk, .. } => *chunk = number("page", *chunk)?,
            Algorithm::Clusters { clustering, reindex, estimate } => {
                *clustering = Clustering {
                    segment: number("segment", 1024)?,
                    cluster: number("cluster", clustering.cluster)?,
                    ..*clustering
                };
                *reindex = number("reindex", 32)?;
                *estimate = mode.option("estimate", *estimate, "a share from 0 to 1")?;
                config.recent = 32;
            }
            Algorithm::Gate { .. } => {}
        }
        config.page = number("page", config.page)?;
        config.sinks = number("sinks", config.sinks)?;
        config.recent = number("recent", config.recent)?;
        config.dense_layers = number("dense-layers", 0)?;
        config.buffering = mode.option("buffer", 1.0, "a number of budgets")?;
        config.min_buffering = config.min_buffering.min(config.buffering);
        config.dtype = one_of(mode, "dtype", DType::F16, &[("f16", DType::F16), ("bf16", DType::BF16)])?;
        let named = [
            ("raw", Aggregation::Raw),
            ("max", Aggregation::Max),
            ("mean", Aggregation::Mean),
            ("sum", Aggregation::Sum),
        ];
        config.aggregation = one_of(mode, "aggregate", config.aggregation, &named)?;
        let options = Options { config };
        // Any head will do to find out whether the knobs fit together, and room enough.
        let shape = attention::HeadShape::new(1, 1, 64, 64)?;
        let spec = AttentionSpec { shape, score: attention::Score::new(1.0)?, mask: attention::Mask::Causal };
        options.plan(mode, &[spec], usize::MAX)?;
        Ok(options)
    }

    /// The plan for a model's layers and sequences of up to `capacity` tokens.
    pub(crate) fn plan(&self, mode: &Mode, layers: &[AttentionSpec], capacity: usize) -> Result<Plan, Error> {
        let refuse = |error: sparse_attn::Error| mode.refuse(error.to_string());
        if self.config.budget > 0 {
            return Plan::new(&self.config, layers).map_err(refuse);
        }
        // As much as the share says, but no less than works.
        let least = (1..=1 << 20).map(|pages| pages * self.config.page).find_map(|budget| {
            Plan::new(&Config { budget, ..self.config.clone() }, layers).ok().map(|_| budget)
        });
        let budget = (capacity / BUDGET_SHARE / self.config.page * self.config.page).min(1 << 20);
        let budget = budget.max(least.unwrap_or(0));
        Plan::new(&Config { budget, ..self.config.clone() }, layers).map_err(refuse)
    }

    /// Storage type of keys and values.
    pub fn dtype(&self) -> DType {
        self.config.dtype
    }
}

/// The value of an option with named values.
fn one_of<T: Copy + PartialEq>(mode: &Mode, key: &str, default: T, values: &[(&str, T)]) -> Result<T, Error> {
    let name = values.iter().find(|(_, value)| *value == default).map_or("", |(name, _)| name);
    let name = mode.option(key, name.to_string(), "a name")?;
    values.iter().find(|(known, _)| *known == name).map(|&(_, value)| value).ok_or_else(|| {
        let known: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        mode.refuse(format!("{key}: expected {}, found {name:?}", known.join(" or ")))
    })
}

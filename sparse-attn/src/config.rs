//! What a cache is asked to do, and what follows from it before any memory is taken.

use std::sync::Arc;

use attention::{AttentionSpec, DType, Mask};

use crate::Error;
use crate::bucketed_lru::BUCKETS;
use crate::index::Index;
use crate::index::clusters::{ClusterIndex, Clustering};
use crate::index::gate::{GateIndex, GateWeights};
use crate::index::pages::{PageIndex, Scorer};
use crate::page::PageSpec;
use crate::select::{Aggregation, SelectRule};

/// How tokens are cut into partitions and scored.
#[derive(Debug, Clone)]
pub enum Algorithm {
    /// Chunks of whole pages with training-free summaries: Quest, ArkVale, ShadowKV and their like.
    Pages {
        /// The summary.
        scorer: Scorer,
        /// Tokens of a chunk.
        chunk: usize,
    },
    /// Clusters with an estimation zone: RetroInfer.
    Clusters {
        /// How tokens are clustered.
        clustering: Clustering,
        /// Tokens beyond the recent ones that are collected before they are clustered.
        reindex: usize,
        /// Share of the clusters that is estimated, after those that are read.
        estimate: f64,
    },
    /// Trained gates over blocks: SeerAttention-R.
    Gate {
        /// Tokens of a block.
        block: usize,
        /// The gate of each layer and KV head `[layers][kv_heads]`.
        weights: Vec<Vec<Arc<GateWeights>>>,
    },
}

/// What a cache is asked to do.
#[derive(Debug, Clone)]
pub struct Config {
    /// Partitions and scores.
    pub algorithm: Algorithm,
    /// How the query heads of a group agree.
    pub aggregation: Aggregation,
    /// Tokens of a page.
    pub page: usize,
    /// Storage type of keys and values.
    pub dtype: DType,
    /// Tokens that a head may read at a step: everything that is read, sinks, recent and open ones included. See
    /// [`Plan::effective_budget`] for what of it can be used.
    pub budget: usize,
    /// First tokens of a sequence that are always read, rounded up to whole partitions.
    pub sinks: usize,
    /// Last tokens that are always read. Rounded up to whole partitions, at least one, and the open ones come on top;
    /// clusters leave exactly so many out.
    pub recent: usize,
    /// Device pages kept for reuse, as a multiple of the pages that a step may read. Gains saturate at 4; SPIN takes 5.
    pub buffering: f64,
    /// Least buffering: below it a request is not admitted.
    pub min_buffering: f64,
    /// Context up to which attention is dense and nothing leaves the device; `None` for what the budget holds.
    pub dense_context: Option<usize>,
    /// First layers that are dense at any context: 2 in Quest and ArkVale.
    pub dense_layers: usize,
    /// Ages that replacement tells apart.
    pub buckets: u8,
}

impl Config {
    fn new(algorithm: Algorithm, aggregation: Aggregation, page: usize, budget: usize) -> Self {
        Config {
            algorithm,
            aggregation,
            page,
            dtype: DType::BF16,
            budget,
            sinks: page,
            recent: page,
            buffering: 5.0,
            min_buffering: 1.0,
            dense_context: None,
            dense_layers: 0,
            buckets: BUCKETS,
        }
    }

    /// Quest: pages of 16 tokens by minimum and maximum.
    pub fn quest(budget: usize) -> Self {
        let algorithm = Algorithm::Pages { scorer: Scorer::MinMax, chunk: 16 };
        Config::new(algorithm, Aggregation::Mean, 16, budget)
    }

    /// ShadowKV: chunks of 8 tokens by their mean, the last four always kept. Keys stay as they are, without its low-rank
    /// path and its outliers, as in SPIN.
    pub fn shadow_kv(budget: usize) -> Self {
        let algorithm = Algorithm::Pages { scorer: Scorer::Mean, chunk: 8 };
        Config { recent: 32, ..Config::new(algorithm, Aggregation::Max, 8, budget) }
    }

    /// RetroInfer: clusters of 16 tokens on average in pages of 8, 4 sinks, 64 recent tokens, 23.2 % of the clusters
    /// estimated.
    pub fn retro_infer(budget: usize) -> Self {
        let clustering = Clustering::default();
        let algorithm = Algorithm::Clusters { clustering, reindex: 1024, estimate: 0.232 };
        Config { sinks: 4, recent: 64, ..Config::new(algorithm, Aggregation::Sum, 8, budget) }
    }

    /// SeerAttention-R with blocks of 32 tokens, as in SPIN (its own default is 64).
    pub fn seer(budget: usize, weights: Vec<Vec<Arc<GateWeights>>>) -> Self {
        Config::new(Algorithm::Gate { block: 32, weights }, Aggregation::Raw, 32, budget)
    }
}

/// What of a budget is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EffectiveBudget {
    /// Closed pages that a head may read.
    pub pages: usize,
    /// Of these, pages that are always read: sinks and recent ones.
    pub kept_pages: usize,
    /// Open tokens at most, which are always read.
    pub open_tokens: usize,
    /// Tokens at most: full pages and open ones. Contexts up to here are dense.
    pub tokens: usize,
}

/// A checked configuration for a model's layers.
#[derive(Debug, Clone)]
pub struct Plan {
    config: Config,
    layers: Vec<AttentionSpec>,
    page: PageSpec,
    effective: EffectiveBudget,
    rule: SelectRule,
}

impl Plan {
    /// Checks a configuration against layers, which must all have one shape.
    ///
    /// # Errors
    /// [`Error::Argument`]: a page or partition size that does not fit, a budget below the mandatory set, layers of
    /// several shapes, gates for other layers or heads, shares out of range.
    pub fn new(config: &Config, layers: &[AttentionSpec]) -> Result<Self, Error> {
        let Some(first) = layers.first() else { return Err(Error::argument("layers", "at least 1", 0)) };
        for spec in layers {
            if spec.shape != first.shape {
                return Err(Error::argument("layers", format!("all {}", first.shape), spec.shape));
            }
        }
        for (argument, value) in [("buffering", config.buffering), ("min_buffering", config.min_buffering)] {
            if !(0.0..=1024.0).contains(&value) {
                return Err(Error::argument(argument, "0 to 1024", value));
            }
        }
        if config.min_buffering > config.buffering {
            let expected = format!("at most buffering, {}", config.buffering);
            return Err(Error::argument("min_buffering", expected, config.min_buffering));
        }
        let page = PageSpec::new(config.page, first.shape.qk_dim(), first.shape.v_dim(), config.dtype)?;
        if let Algorithm::Gate { weights, .. } = &config.algorithm {
            let heads = first.shape.kv_heads();
            let fits = weights.len() == layers.len() && weights.iter().all(|layer| layer.len() == heads);
            if !fits {
                let expected = format!("{} layers of {heads} KV heads", layers.len());
                return Err(Error::argument("weights", expected, format!("{} layers", weights.len())));
            }
        }
        let (effective, rule) = effective(config, &page, first)?;
        Ok(Plan { config: config.clone(), layers: layers.to_vec(), page, effective, rule })
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What each layer computes `[layers]`.
    pub fn layers(&self) -> &[AttentionSpec] {
        &self.layers
    }

    /// What a page looks like.
    pub fn page(&self) -> &PageSpec {
        &self.page
    }

    /// What of the budget is used.
    pub fn effective_budget(&self) -> EffectiveBudget {
        self.effective
    }

    /// What heads of a layer select by.
    pub fn rule(&self, layer: usize) -> SelectRule {
        SelectRule { score: self.layers[layer].score, ..self.rule }
    }

    /// Longest context that a layer attends to densely: without end in the first layers, as far as the configuration says
    /// so, and in layers whose mask is not the causal one.
    pub fn dense_tokens(&self, layer: usize) -> usize {
        // A window is no context to select from.
        let dense = layer < self.config.dense_layers || self.layers[layer].mask != Mask::Causal;
        match dense {
            true => usize::MAX,
            false => self.config.dense_context.unwrap_or(self.effective.tokens),
        }
    }

    /// Tokens that are closed at once: a partition, or what is clustered together.
    pub(crate) fn closing(&self) -> usize {
        match self.config.algorithm {
            Algorithm::Pages { chunk, .. } => chunk,
            Algorithm::Gate { block, .. } => block,
            Algorithm::Clusters { reindex, .. } => reindex,
        }
    }

    /// Tokens that stay open when others are closed.
    pub(crate) fn stays_open(&self) -> usize {
        match self.config.algorithm {
            Algorithm::Clusters { .. } => self.config.recent,
            _ => 0,
        }
    }

    /// Whether any number of tokens can be closed, or only whole partitions.
    pub(crate) fn closes_any_number(&self) -> bool {
        matches!(self.config.algorithm, Algorithm::Clusters { .. })
    }

    /// Slots of a head with this much buffering.
    pub fn slots(&self, buffering: f64) -> usize {
        self.effective.pages + (self.effective.pages as f64 * buffering).round() as usize
    }

    /// Device pages of one head that are no slots: open tokens.
    fn open_pages(&self) -> usize {
        self.page.pages_of(self.effective.open_tokens)
    }

    /// Device pages that a request needs with this much buffering, if it holds up to `max_tokens` tokens: over all layers
    /// and KV heads, open tokens included.
    pub fn request_pages(&self, buffering: f64, max_tokens: usize) -> usize {
        let heads = self.layers[0].shape.kv_heads();
        let whole = self.page.pages_of(max_tokens);
        let pages = |layer: usize| {
            let sparse = (self.slots(buffering) + self.open_pages())
                .max(self.page.pages_of(self.dense_tokens(layer).min(max_tokens)));
            if self.dense_tokens(layer) >= max_tokens { whole } else { sparse }
        };
        (0..self.layers.len()).map(pages).sum::<usize>() * heads
    }

    /// Host pages that a request of up to `max_tokens` tokens may fill. Clusters leave pages in part empty, and heads
    /// differ in how many they fill.
    pub fn host_pages(&self, max_tokens: usize) -> usize {
        let pages = match &self.config.algorithm {
            // A cluster has at least a token, and at most one page of it is not full.
            Algorithm::Clusters { clustering, .. } => {
                let clusters =
                    max_tokens.div_ceil(clustering.cluster) + max_tokens / self.closing().max(1) + 2;
                self.page.pages_of(max_tokens) + clusters
            }
            _ => self.page.pages_of(max_tokens),
        };
        pages * self.layers.len()
    }

    /// An empty index of one head.
    pub(crate) fn index(&self, layer: usize, kv_head: usize) -> Box<dyn Index> {
        let (qk_dim, v_dim) = (self.page.qk_dim(), self.page.v_dim());
        match &self.config.algorithm {
            Algorithm::Pages { scorer, chunk } => Box::new(PageIndex::new(*scorer, *chunk, qk_dim)),
            Algorithm::Clusters { clustering, .. } => {
                Box::new(ClusterIndex::new(*clustering, self.config.sinks, qk_dim, v_dim))
            }
            Algorithm::Gate { block, weights } => {
                Box::new(GateIndex::new(Arc::clone(&weights[layer][kv_head]), *block))
            }
        }
    }
}

/// What of a budget is used, and the rule that keeps to it.
fn effective(
    config: &Config,
    page: &PageSpec,
    spec: &AttentionSpec,
) -> Result<(EffectiveBudget, SelectRule), Error> {
    let tokens = page.tokens();
    let (open, partition, sinks, recent, estimate) = match &config.algorithm {
        Algorithm::Pages { chunk: size, .. } | Algorithm::Gate { block: size, .. } => {
            if *size == 0 || !size.is_multiple_of(tokens) {
                return Err(Error::argument("partition", format!("whole pages of {tokens} tokens"), size));
            }
            (*size, size / tokens, config.sinks.div_ceil(*size), config.recent.div_ceil(*size).max(1), 0.0)
        }
        Algorithm::Clusters { clustering, reindex, estimate } => {
            for (argument, value) in [
                ("segment", clustering.segment),
                ("cluster", clustering.cluster),
                ("iterations", clustering.iterations),
                ("reindex", *reindex),
            ] {
                if value == 0 {
                    return Err(Error::argument(argument, "at least 1", 0));
                }
            }
            if !(0.0..=1.0).contains(estimate) {
                return Err(Error::argument("estimate", "0 to 1", estimate));
            }
            // A cluster of twice the average size must still fit.
            let largest = page.pages_of(2 * clustering.cluster);
            (config.recent + reindex, largest, usize::from(config.sinks > 0), 0, *estimate)
        }
    };
    let kept_pages = match config.algorithm {
        Algorithm::Clusters { .. } => page.pages_of(config.sinks),
        _ => (sinks + recent) * partition,
    };
    let least = open + (kept_pages + partition) * tokens;
    if config.budget < least {
        let expected = format!(
            "at least {least} tokens: {open} open, {} of sinks and recent ones, {} to select",
            kept_pages * tokens,
            partition * tokens
        );
        return Err(Error::argument("budget", expected, config.budget));
    }
    let pages = match config.algorithm {
        Algorithm::Clusters { .. } => (config.budget - open) / tokens,
        // Partitions are selected whole.
        _ => (config.budget - open) / tokens / partition * partition,
    };
    let effective = EffectiveBudget { pages, kept_pages, open_tokens: open, tokens: pages * tokens + open };
    let rule =
        SelectRule { aggregation: config.aggregation, score: spec.score, pages, sinks, recent, estimate };
    Ok((effective, rule))
}

//! Perplexity of a text, as the KV mode's own decode path gives it.
//!
//! The text is cut into windows of `context` tokens. The first `prefill` tokens of a window are prefilled at once, the
//! rest are decoded one by one (teacher-forced) through the cache that the mode keeps, and each decoded token's logits
//! are scored against the token that follows. Nothing that prefill predicts is scored: a compressed cache acts on what is
//! decoded through it. The last token of a window is scored against the first one after it; at the end of the text there
//! is none, and one score less.

use std::time::{Duration, Instant};

use ndarray::ArrayView1;
use serde::Serialize;

use crate::kv::{self, KvCache};
use crate::{Error, Session};

/// What part of a text is evaluated, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct Windows {
    /// Length of a window.
    pub context: usize,
    /// Tokens of each window that are prefilled.
    pub prefill: usize,
    /// How many windows, from the start of the text.
    pub count: usize,
}

/// Result of an evaluation. A speed is what this machine's CPU reaches, not what a kernel on a GPU would.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The checkpoint.
    pub model: String,
    /// The KV mode.
    pub kv: String,
    /// Length of a window, in tokens.
    pub context: usize,
    /// Tokens of each window that were prefilled.
    pub prefill: usize,
    /// Tokens scored, in all windows.
    pub tokens: usize,
    /// Mean negative log likelihood of a scored token, in nats.
    pub nll_per_token: f64,
    /// Negative log likelihood of each, in order: differences between modes are paired token by token.
    #[serde(skip)]
    pub nlls: Vec<f64>,
    /// `exp(nll_per_token)`; infinite, which JSON writes as null, from 710 nats on.
    pub perplexity: f64,
    /// Bytes that the cache held on the device at the end of a window, metadata included, per token.
    pub kv_bytes_per_token: f64,
    /// Bytes per token of a dense cache in 16 bits.
    pub dense_kv_bytes_per_token: f64,
    /// Bytes that the cache held in host memory at the end of a window, per token.
    pub host_kv_bytes_per_token: f64,
    /// Share of the tokens' keys and values that the device held at the end of a window.
    pub device_kv_share: f64,
    /// Share of what decoded tokens read that the device held; `None` for a cache in one memory, or if nothing was chosen.
    pub kv_hit_rate: Option<f64>,
    /// Tokens that a decoded token reads at most; `None` where it reads all.
    pub kv_budget: Option<usize>,
    /// Prefilled tokens per second.
    pub prefill_tokens_per_s: f64,
    /// Decoded tokens per second.
    pub decode_tokens_per_s: f64,
}

impl Windows {
    /// Windows of `context` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `0 < prefill < context` and `count > 0`.
    pub fn new(context: usize, prefill: usize, count: usize) -> Result<Self, Error> {
        if prefill == 0 {
            return Err(Error::argument("prefill", "at least 1 token", 0));
        }
        if prefill >= context {
            return Err(Error::argument(
                "prefill",
                format!("fewer tokens than the context of {context}"),
                prefill,
            ));
        }
        if count == 0 {
            return Err(Error::argument("windows", "at least 1", 0));
        }
        Ok(Windows { context, prefill, count })
    }

    /// What is given, and defaults for the rest: a context of `longest` tokens, less where the model or the text has fewer
    /// (a short text is one short window); a quarter of it prefilled; up to `most` windows.
    ///
    /// # Errors
    /// As [`new`](Self::new) and [`check`](Self::check).
    pub fn fitting(
        config: &crate::Config,
        tokens: usize,
        [context, prefill, count]: [Option<usize>; 3],
        longest: usize,
        most: usize,
    ) -> Result<Self, Error> {
        let context = context.unwrap_or_else(|| tokens.max(4).min(longest.min(config.max_positions)));
        let prefill = prefill.unwrap_or((context / 4).max(1));
        let count = count.unwrap_or_else(|| (tokens / context.max(1)).clamp(1, most.max(1)));
        let windows = Windows::new(context, prefill, count)?;
        windows.check(config, tokens)?;
        Ok(windows)
    }

    /// Checks that a text has enough tokens, and a model enough context.
    ///
    /// # Errors
    /// [`Error::Context`] or [`Error::Argument`].
    pub fn check(&self, config: &crate::Config, tokens: usize) -> Result<(), Error> {
        config.check_context(self.context)?;
        // The last scored token may be the last of the text, so one window of prefill + 1 scores nothing at its end.
        let needed = self.context.saturating_mul(self.count).max(self.prefill + 2);
        if tokens < needed {
            let expected = format!("at least {needed} tokens for {} × {}", self.count, self.context);
            return Err(Error::argument("text", expected, tokens));
        }
        Ok(())
    }
}

/// Sums over the windows so far.
#[derive(Debug, Default)]
struct Totals {
    nlls: Vec<f64>,
    prefill: (usize, Duration),
    decode: (usize, Duration),
}

/// Evaluates the first windows of a text. `progress` hears of tokens done and tokens in all.
///
/// # Errors
/// A text that is too short, a context over the model's maximum, tokens out of range.
pub fn evaluate(
    session: &mut Session<'_>,
    kv_name: &str,
    text: &[u32],
    windows: Windows,
    progress: impl FnMut(usize, usize),
) -> Result<Report, Error> {
    evaluate_with(session, kv_name, text, windows, progress, |_| {})
}

/// As [`evaluate`]; `after_prefill` may change the cache of each window before it decodes. A test that puts garbage there
/// proves that the score depends on what the cache holds.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_with(
    session: &mut Session<'_>,
    kv_name: &str,
    text: &[u32],
    windows: Windows,
    mut progress: impl FnMut(usize, usize),
    mut after_prefill: impl FnMut(&mut dyn KvCache),
) -> Result<Report, Error> {
    windows.check(session.model().config(), text.len())?;
    let all = windows.count * windows.context;
    let mut totals = Totals::default();
    for window in 0..windows.count {
        let start = window * windows.context;
        let (prompt, rest) = text[start..start + windows.context].split_at(windows.prefill);
        session.clear();
        let begin = Instant::now();
        session.prefill(prompt)?;
        totals.prefill.0 += prompt.len();
        totals.prefill.1 += begin.elapsed();
        progress(start + prompt.len(), all);
        after_prefill(session.kv_mut());
        for (i, &token) in rest.iter().enumerate() {
            let at = start + prompt.len() + i;
            let begin = Instant::now();
            let logits = session.decode(token)?;
            totals.decode.0 += 1;
            totals.decode.1 += begin.elapsed();
            if let Some(&next) = text.get(at + 1) {
                totals.nlls.push(negative_log_likelihood(logits.view(), next)?);
            }
            progress(at + 1, all);
        }
    }

    let (memory, traffic, held) = (session.memory(), session.traffic(), session.len() as f64);
    let nll_per_token = mean(&totals.nlls);
    let speed = |(tokens, time): (usize, Duration)| tokens as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE);
    let model = session.model();
    Ok(Report {
        model: model.path().display().to_string(),
        kv: kv_name.to_string(),
        context: windows.context,
        prefill: windows.prefill,
        tokens: totals.nlls.len(),
        nll_per_token,
        nlls: totals.nlls,
        perplexity: nll_per_token.exp(),
        kv_bytes_per_token: memory.device as f64 / held,
        dense_kv_bytes_per_token: kv::dense_bytes_per_token(model.config()) as f64,
        host_kv_bytes_per_token: memory.host as f64 / held,
        device_kv_share: traffic.map_or(1.0, |traffic| traffic.device_share),
        kv_hit_rate: traffic.and_then(|traffic| traffic.hit_rate),
        kv_budget: traffic.map(|traffic| traffic.budget),
        prefill_tokens_per_s: speed(totals.prefill),
        decode_tokens_per_s: speed(totals.decode),
    })
}

impl Report {
    /// Nats per token above another mode's on the same tokens, and the standard error of this mean of paired differences
    /// (tokens taken as independent).
    ///
    /// # Errors
    /// [`Error::Argument`] when the other scored another number of tokens.
    pub fn above(&self, other: &Report) -> Result<(f64, f64), Error> {
        if self.nlls.len() != other.nlls.len() {
            let expected = format!("{} scored tokens", self.nlls.len());
            return Err(Error::argument("other", expected, other.nlls.len()));
        }
        let differences: Vec<f64> = self.nlls.iter().zip(&other.nlls).map(|(a, b)| a - b).collect();
        let difference = mean(&differences);
        let squares: f64 = differences.iter().map(|d| (d - difference).powi(2)).sum();
        let count = differences.len() as f64;
        Ok((difference, (squares / (count - 1.0).max(1.0) / count).sqrt()))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// `-ln softmax(logits)[token]`, in nats.
///
/// # Errors
/// [`Error::Token`] when there is no such logit.
pub fn negative_log_likelihood(logits: ArrayView1<'_, f32>, token: u32) -> Result<f64, Error> {
    let target = logits.get(token as usize).ok_or(Error::Token { token, vocab_size: logits.len() })?;
    let max = logits.fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    Ok(sum.ln() + f64::from(max) - f64::from(*target))
}

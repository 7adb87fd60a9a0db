//! The ranks seam: who computes a prompt, and who holds its keys and values.
//!
//! A method implements [`Ranks`] and gets a line in [`METHODS`] and in [`open`]. Ranks may be this one process, threads
//! that share a prompt, or processes on other machines. Afterwards the whole prompt's keys and values are gathered in the KV cache
//! of the rank that decodes ([`KvCache::append`] takes what other ranks computed), or they stay with the ranks that computed them
//! (`kv=sharded`), and queries are sent to them.

mod choice;
mod gather;
mod holdings;
mod prefill;
mod sharded;
mod sharing;
mod single;
mod threads;
mod weights;

use ndarray::{Array1, Axis};

use crate::kv::{self, KvCache};
use crate::mode::{Method, Mode};
use crate::{Error, Model};
pub use choice::Choice;
pub use gather::{SharedPrompt, prefill_shared};
pub use holdings::{Holding, Holdings};
pub use sharded::extend_sharded;
pub use sharing::Sharing;
pub use single::Single;
pub use threads::Threads;

/// The methods of this seam.
pub const METHODS: &[Method] = &[
    Method {
        name: "single",
        summary: "one rank computes the whole prompt",
        file: false,
        options: &["ranks"],
        with: &[],
    },
    sharing(
        "auto",
        "what the cost model finds fastest (profile=host, h100, h100-100g or a100; region=T), and says why",
        &["ranks", "placement", "kv", "profile", "region"],
    ),
    sharing(
        "ring",
        "ring attention (placement=zigzag, contiguous or striped; these take kv=gathered or sharded)",
        &["ranks", "placement", "kv"],
    ),
    sharing("ulysses", "heads dealt to all ranks", &["ranks", "placement", "kv"]),
    sharing(
        "hybrid",
        "heads dealt to groups of ulysses=2 ranks, a ring over the groups",
        &["ranks", "placement", "kv", "ulysses"],
    ),
    sharing(
        "megatron",
        "weights split over regions of region=T ranks (default: all), a ring over the regions",
        &["ranks", "placement", "kv", "region"],
    ),
    sharing(
        "fast",
        "attention= and mlp=megatron or ulysses inside nodes of node=G ranks, regions of region=T, a ring between",
        &["ranks", "placement", "kv", "node", "region", "attention", "mlp"],
    ),
];

const fn sharing(name: &'static str, summary: &'static str, options: &'static [&'static str]) -> Method {
    Method { name, summary, file: false, options, with: &[] }
}

/// Those who compute a prompt together.
pub trait Ranks: Send {
    /// How many they are.
    fn count(&self) -> usize;

    /// Makes the cache of a sequence of up to `capacity` tokens.
    ///
    /// # Errors
    /// As [`kv::open`]; heads or channels that cannot be dealt to these ranks; a mode that cannot be sharded, where they shard it.
    fn cache(&self, mode: &Mode, model: &Model, capacity: usize) -> Result<Box<dyn KvCache>, Error> {
        kv::open(mode, model, capacity)
    }

    /// Runs a prompt, which continues whatever `kv` already holds, and leaves its keys and values there. Gives the last
    /// token's hidden state after the final norm, `[hidden]`.
    ///
    /// # Errors
    /// An empty prompt, tokens out of range, or a sequence over the model's maximum.
    fn prefill(&mut self, model: &Model, tokens: &[u32], kv: &mut dyn KvCache) -> Result<Array1<f32>, Error>;

    /// Runs one token through the cache's decode path. Gives its hidden state after the final norm, `[hidden]`.
    ///
    /// # Errors
    /// A token out of range, or a sequence over the model's maximum.
    fn decode(&mut self, model: &Model, token: u32, kv: &mut dyn KvCache) -> Result<Array1<f32>, Error> {
        let hidden = model.forward(&[token], kv.len(), kv)?;
        Ok(hidden.index_axis_move(Axis(0), 0))
    }

    /// How the longest prompt so far was shared, where that was theirs to choose.
    fn choice(&self) -> Option<&Choice> {
        None
    }

    /// What each of several ranks holds of a sequence; `None` for one.
    fn holdings(&self, kv: &dyn KvCache) -> Option<Holdings> {
        let _ = kv;
        None
    }
}

/// Makes the ranks of a mode: as many threads of this process as its option `ranks` says.
///
/// # Errors
/// An unknown mode, or one that the method refuses.
pub fn open(mode: &Mode) -> Result<Box<dyn Ranks>, Error> {
    check(mode)?;
    match mode.name() {
        "single" => Ok(Box::new(Single)),
        _ => Ok(Box::new(Threads::new(Sharing::new(mode)?))),
    }
}

/// Checks a mode's name, options and their values, before anything is loaded.
///
/// # Errors
/// As [`open`].
pub fn check(mode: &Mode) -> Result<(), Error> {
    match mode.accept("ranks", METHODS)?.name {
        "single" => match mode.option("ranks", 1, "a whole number")? {
            1usize => Ok(()),
            found => Err(mode.refuse(format!("ranks: single is one rank, not {found}"))),
        },
        _ => Sharing::new(mode).map(drop),
    }
}

/// Checks that ranks of a mode can hold a sequence of a KV mode.
///
/// # Errors
/// [`Error::Mode`] for a KV mode that cannot be sharded, where the ranks shard it.
pub fn check_kv(mode: &Mode, kv: &Mode) -> Result<(), Error> {
    match mode.name() != "single" && Sharing::new(mode)?.is_sharded() {
        true => kv::stored_type(kv).map(drop),
        false => Ok(()),
    }
}

/// Checks that ranks of a mode can multiply by weights of a linear mode.
///
/// # Errors
/// [`Error::Mode`] for weights that are not all in memory, where the ranks split them.
pub fn check_weights(mode: &Mode, linear: &Mode) -> Result<(), Error> {
    match mode.name() != "single" && Sharing::new(mode)?.splits_weights() && linear.name() != "dense" {
        true => Err(mode.refuse(format!(
            "weights split over ranks: expected --weights dense, found {linear}, which streams whole matrices"
        ))),
        false => Ok(()),
    }
}

/// Keeps the choice of the longest prompt.
pub fn remember(kept: &mut Option<Choice>, choice: Option<Choice>) {
    if let Some(choice) = choice
        && kept.as_ref().is_none_or(|kept| kept.tokens() < choice.tokens())
    {
        *kept = Some(choice);
    }
}

//! The ranks seam: who computes a prompt.
//!
//! A method implements [`Ranks`] and gets a line in [`METHODS`] and in [`open`]. Ranks may be this one process, threads
//! that share a prompt, or processes on other machines; afterwards the whole prompt's keys and values are in the KV cache
//! of the rank that decodes ([`KvCache::append`] takes what other ranks computed).

mod choice;
mod shared;
mod single;
mod threads;

use ndarray::Array1;

use crate::kv::KvCache;
use crate::mode::{Method, Mode};
use crate::{Error, Model};
pub use choice::Choice;
pub use shared::{Scheme, Sharing, prefill_shared};
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
        "what the cost model finds fastest (profile=host, h100, h100-100g or a100), and says why",
        &["ranks", "placement", "profile"],
    ),
    sharing("ring", "ring attention (placement=zigzag, contiguous or striped)", &["ranks", "placement"]),
    sharing("ulysses", "heads dealt to all ranks", &["ranks", "placement"]),
    sharing(
        "hybrid",
        "heads dealt to groups of ulysses=2 ranks, a ring over the groups",
        &["ranks", "placement", "ulysses"],
    ),
];

const fn sharing(name: &'static str, summary: &'static str, options: &'static [&'static str]) -> Method {
    Method { name, summary, file: false, options, with: &[] }
}

/// Those who compute a prompt together.
pub trait Ranks: Send {
    /// How many they are.
    fn count(&self) -> usize;

    /// Runs a prompt, which continues whatever `kv` already holds, and leaves its keys and values there. Gives the last
    /// token's hidden state after the final norm, `[hidden]`.
    ///
    /// # Errors
    /// An empty prompt, tokens out of range, or a sequence over the model's maximum.
    fn prefill(&mut self, model: &Model, tokens: &[u32], kv: &mut dyn KvCache) -> Result<Array1<f32>, Error>;

    /// How the longest prompt so far was shared, where that was theirs to choose.
    fn choice(&self) -> Option<&Choice> {
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

/// Keeps the choice of the longest prompt.
pub fn remember(kept: &mut Option<Choice>, choice: Option<Choice>) {
    if let Some(choice) = choice
        && kept.as_ref().is_none_or(|kept| kept.tokens() < choice.tokens())
    {
        *kept = Some(choice);
    }
}

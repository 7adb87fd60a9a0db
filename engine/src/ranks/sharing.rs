//! How a prompt is to be shared: what a mode asks for, and what it comes to for a prompt.

use attention::DType;
use seq_parallel::cost_model::{Profile, Scheme};
use seq_parallel::placement::Placement;
use seq_parallel::ring::Direction;

use super::Choice;
use crate::mode::Mode;
use crate::{Config, Error};

/// How a prompt is shared. Attention goes over a ring of groups of ranks; a group deals out heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    /// What the cost model finds fastest.
    Auto,
    /// These schemes. `None` is a group, or region, of all ranks.
    Fixed { attention: Scheme, mlp: Scheme, node: Option<usize> },
}

/// How many ranks share a prompt, and how.
#[derive(Debug, Clone)]
pub struct Sharing {
    request: Request,
    ranks: usize,
    region: usize,
    placement: Placement,
    profile: Profile,
    sharded: bool,
}

/// What a prompt is shared by, after all choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// The attention stage's scheme.
    pub(super) attention: Scheme,
    /// The MLP stage's.
    pub(super) mlp: Scheme,
    /// Adjacent ranks that deal out heads.
    pub(super) group: usize,
    /// Adjacent ranks that weights are split over.
    pub(super) region: usize,
    /// What goes round the rings.
    pub(super) direction: Direction,
}

impl Sharing {
    /// What a mode asks for.
    ///
    /// # Errors
    /// [`Error::Mode`] for options that make no sense.
    pub fn new(mode: &Mode) -> Result<Self, Error> {
        let ranks: usize = mode.option("ranks", 1, "a whole number of at least 1")?;
        if ranks == 0 {
            return Err(mode.refuse("ranks: expected a whole number of at least 1, found 0"));
        }
        let name = mode.option("placement", Placement::Zigzag.to_string(), "a name")?;
        let placement = Placement::ALL.into_iter().find(|placement| placement.to_string() == name);
        let placement = placement.ok_or_else(|| {
            mode.refuse(format!("placement: expected zigzag, contiguous or striped, found {name:?}"))
        })?;
        let divides = |what: &str, whole: &str, count: usize, of: usize| match count {
            0 => Err(mode.refuse(format!("{what}: expected a whole number of at least 1, found 0"))),
            count if of.is_multiple_of(count) => Ok(count),
            count => Err(mode.refuse(format!("{what}: expected a divisor of {of} {whole}, found {count}"))),
        };
        let megatron = mode.name() == "megatron";
        let region = mode.option("region", if megatron { ranks } else { 1 }, "a whole number")?;
        let region = divides("region", "ranks", region, ranks)?;
        let scheme = |stage: &'static str| match mode.option(stage, "ulysses".to_string(), "a name")?.as_str()
        {
            "megatron" => Ok(Scheme::Megatron),
            "ulysses" => Ok(Scheme::Ulysses),
            other => Err(mode.refuse(format!("{stage}: expected megatron or ulysses, found {other:?}"))),
        };
        let whole = |node| Request::Fixed { attention: Scheme::Ulysses, mlp: Scheme::Ulysses, node };
        let request = match mode.name() {
            "ring" => whole(Some(1)),
            "ulysses" => whole(None),
            "hybrid" => {
                whole(Some(divides("ulysses", "ranks", mode.option("ulysses", 2, "a whole number")?, ranks)?))
            }
            "megatron" => {
                Request::Fixed { attention: Scheme::Megatron, mlp: Scheme::Megatron, node: Some(region) }
            }
            "fast" => {
                let node = divides("node", "ranks", mode.option("node", ranks, "a whole number")?, ranks)?;
                divides("region", "ranks of a node", region, node)?;
                Request::Fixed { attention: scheme("attention")?, mlp: scheme("mlp")?, node: Some(node) }
            }
            _ => Request::Auto,
        };
        let profile = match request {
            Request::Auto => mode.option("profile", Profile::HOST.name.to_string(), "a name")?,
            Request::Fixed { .. } => Profile::HOST.name.to_string(),
        };
        let profile = Profile::named(&profile).map_err(|error| mode.refuse(error.to_string()))?;
        let sharded = match mode.option("kv", "gathered".to_string(), "a name")?.as_str() {
            "gathered" => false,
            "sharded" => true,
            other => return Err(mode.refuse(format!("kv: expected gathered or sharded, found {other:?}"))),
        };
        Ok(Sharing { request, ranks, region, placement, profile, sharded })
    }

    /// How many ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Whether keys and values stay with the ranks that computed them.
    pub fn is_sharded(&self) -> bool {
        self.sharded
    }

    /// Whether some stage may multiply by parts of the weights.
    pub(super) fn splits_weights(&self) -> bool {
        let split = |scheme: &Scheme| *scheme == Scheme::Megatron;
        match &self.request {
            Request::Auto => self.region > 1,
            Request::Fixed { attention, mlp, .. } => self.region > 1 || split(attention) || split(mlp),
        }
    }

    pub(super) fn placement(&self) -> Placement {
        self.placement
    }

    /// What the cost model chooses for a prompt whose keys and values are stored in this type, if it is asked and there are several
    /// ranks.
    ///
    /// # Errors
    /// [`Error::SeqParallel`], which no sharing that was made brings about.
    pub fn choose(&self, config: &Config, tokens: usize, stored: DType) -> Result<Option<Choice>, Error> {
        match self.request {
            Request::Auto if self.ranks > 1 => {
                Choice::new(config, self.profile, [self.ranks, self.region], tokens, stored).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Checks that a model's heads and channels can be dealt to these ranks.
    ///
    /// # Errors
    /// [`Error::SeqParallel`] that names which divisibility failed.
    pub fn check(&self, config: &Config) -> Result<(), Error> {
        super::prefill::check_model(config, self, self.ranks, DType::F32)
    }

    /// What a prompt is shared by.
    pub(super) fn way(&self, config: &Config, tokens: usize, stored: DType) -> Result<Way, Error> {
        let (ranks, region) = (self.ranks, self.region);
        Ok(match self.request {
            Request::Fixed { attention, mlp, node } => {
                let group = if attention == Scheme::Megatron { region } else { node.unwrap_or(ranks) };
                Way { attention, mlp, group, region, direction: Direction::PassKv }
            }
            Request::Auto => {
                let choice = Choice::new(config, self.profile, [ranks, region], tokens, stored)?;
                let [attention, mlp] = choice.schemes();
                Way { attention, mlp, group: choice.group(), region, direction: choice.direction() }
            }
        })
    }
}

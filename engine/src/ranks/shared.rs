//! One rank of several that share a prompt, over any transport.
//!
//! Every rank has the whole model and runs its own tokens through it; only attention needs the others. Heads are dealt within groups of
//! ranks, and rings go over the groups ([`seq_parallel::hybrid`]): a group of one is a plain ring, one group of all is Ulysses. At the end
//! every rank gets all keys and values, before RoPE as the KV seam wants them.
//!
//! Ulysses gives the logits of a single rank bit for bit: a token's products do not depend on the other rows, and every head sums its keys
//! in the same order. A ring sums them in the order in which blocks come, which moves the bundled model's logits (around 10) by up to
//! 5·10⁻⁶ where keys and values are stored in f32. In 16 bits a key on the border of two values may then round the other way in the next
//! layer, which moves them by up to 4·10⁻⁴.

use attention::rope::Rope;
use attention::{DType, Element};
use ndarray::{Array1, Array2, Array3, Axis};
use seq_parallel::cost_model::Profile;
use seq_parallel::hybrid::HybridPlan;
use seq_parallel::placement::{Placement, Segment, Sequence, Shards};
use seq_parallel::ring::{Direction, Inputs};
use seq_parallel::transport::Transport;

use super::Choice;
use crate::kv::{KvCache, Step};
use crate::mode::Mode;
use crate::{Config, Error, Model};

/// How attention is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// What the cost model finds fastest.
    Auto,
    /// Groups of one.
    Ring,
    /// One group of all.
    Ulysses,
    /// Groups of so many ranks.
    Hybrid {
        /// Ranks of a group.
        ulysses: usize,
    },
}

/// How many ranks share a prompt, and how.
#[derive(Debug, Clone)]
pub struct Sharing {
    scheme: Scheme,
    ranks: usize,
    placement: Placement,
    profile: Profile,
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
        let scheme = match mode.name() {
            "ring" => Scheme::Ring,
            "ulysses" => Scheme::Ulysses,
            "hybrid" => Scheme::Hybrid { ulysses: mode.option("ulysses", 2, "a whole number")? },
            _ => Scheme::Auto,
        };
        if let Scheme::Hybrid { ulysses } = scheme
            && (ulysses == 0 || !ranks.is_multiple_of(ulysses))
        {
            return Err(mode.refuse(format!("ulysses: expected a divisor of {ranks} ranks, found {ulysses}")));
        }
        let profile = match scheme {
            Scheme::Auto => mode.option("profile", Profile::HOST.name.to_string(), "a name")?,
            _ => Profile::HOST.name.to_string(),
        };
        let profile = Profile::named(&profile).map_err(|error| mode.refuse(error.to_string()))?;
        Ok(Sharing { scheme, ranks, placement, profile })
    }

    /// How many ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// What the cost model chooses for a prompt, if it is asked and there are several ranks.
    ///
    /// # Errors
    /// [`Error::SeqParallel`], which no sharing that was made brings about.
    pub fn choose(&self, config: &Config, tokens: usize) -> Result<Option<Choice>, Error> {
        match self.scheme {
            Scheme::Auto if self.ranks > 1 => Choice::new(config, self.profile, self.ranks, tokens).map(Some),
            _ => Ok(None),
        }
    }

    /// Ranks of a group, and what goes round the rings.
    fn degrees(&self, config: &Config, tokens: usize) -> Result<(usize, Direction), Error> {
        Ok(match self.scheme {
            Scheme::Ring => (1, Direction::PassKv),
            Scheme::Ulysses => (self.ranks, Direction::PassKv),
            Scheme::Hybrid { ulysses } => (ulysses, Direction::PassKv),
            Scheme::Auto => {
                let choice = Choice::new(config, self.profile, self.ranks, tokens)?;
                (choice.group(), choice.direction())
            }
        })
    }
}

/// A prompt that was computed, as every rank has it.
#[derive(Debug)]
pub struct SharedPrompt {
    /// Keys before RoPE and values of each layer, `[tokens, kv_heads, head_dim]`.
    layers: Vec<(Array3<f32>, Array3<f32>)>,
    /// The last token's hidden state after the final norm `[hidden]`.
    last: Array1<f32>,
}

impl SharedPrompt {
    /// Puts keys and values into an empty cache and gives the last token's hidden state.
    ///
    /// # Errors
    /// Whatever the cache refuses.
    pub fn append_to(self, model: &Model, kv: &mut dyn KvCache) -> Result<Array1<f32>, Error> {
        for (index, ((k, v), layer)) in self.layers.iter().zip(model.layers()).enumerate() {
            let tokens = k.dim().0;
            let positions: Vec<u32> = (0..tokens as u32).collect();
            let heads = &model.config().heads;
            let q = Array3::zeros((tokens, heads.q_heads(), heads.qk_dim()));
            let step = Step {
                layer: index,
                positions: &positions,
                q: q.view(),
                k: k.view(),
                v: v.view(),
                w_o: layer.output(),
            };
            kv.append(&step)?;
        }
        Ok(self.last)
    }
}

/// Runs one rank's part of a prompt that starts a sequence. Every rank calls it with the same arguments and gets the same result.
///
/// `stored` is the type in which keys and values are attended to and travel.
///
/// # Errors
/// An empty prompt, tokens out of range or too many; heads that cannot be dealt; ranks that are set up differently or have failed.
pub fn prefill_shared<X: Transport + ?Sized>(
    model: &Model,
    sharing: &Sharing,
    tokens: &[u32],
    stored: DType,
    transport: &mut X,
) -> Result<SharedPrompt, Error> {
    if tokens.is_empty() {
        return Err(Error::argument("prompt", "at least 1 token", "none"));
    }
    model.config().check_tokens(tokens)?;
    model.config().check_context(tokens.len())?;
    match stored {
        DType::F32 => run::<f32, X>(model, sharing, tokens, transport),
        DType::F16 => run::<half::f16, X>(model, sharing, tokens, transport),
        DType::BF16 => run::<half::bf16, X>(model, sharing, tokens, transport),
    }
}

fn run<T: Element, X: Transport + ?Sized>(
    model: &Model,
    sharing: &Sharing,
    tokens: &[u32],
    transport: &mut X,
) -> Result<SharedPrompt, Error> {
    let (config, rank) = (model.config(), transport.rank());
    let (group, direction) = sharing.degrees(config, tokens.len())?;
    let shards = Shards::new([Sequence::new(tokens.len())], sharing.placement, sharing.ranks / group)?;
    let plan = |layer: usize| -> Result<HybridPlan, Error> {
        Ok(HybridPlan::new(config.attention(layer)?, shards.clone(), group)?.passing(direction))
    };
    let first = plan(0)?;
    let prompt = seq_parallel::fingerprint::digest(tokens.iter().map(|&token| u64::from(token)));
    first.fingerprint::<f32, T>().with("the prompt (digest)", prompt).agree(transport)?;

    let positions_of = |rank: usize| -> Vec<u32> {
        first.queries(rank).iter().flat_map(Segment::positions).map(|position| position as u32).collect()
    };
    let positions = positions_of(rank);
    let own: Vec<u32> = positions.iter().map(|&position| tokens[position as usize]).collect();
    let rope = Rope::new(config.rope.clone(), tokens.len())?;
    model.begin_step(own.len());
    let mut x = model.embed(&own);
    let mut kept: Vec<f32> = Vec::new();
    for (index, layer) in model.layers().iter().enumerate() {
        let plan = plan(index)?;
        layer.forward_with(&mut x, |q, k, v| {
            let (mut q, v) = (in_order(q), in_order(v));
            let mut k = in_order(k);
            kept.extend(&k);
            kept.extend(&v);
            rope.apply(&mut q, config.heads.q_heads(), &positions)?;
            rope.apply(&mut k, config.heads.kv_heads(), &positions)?;
            let stored = |x: &[f32]| -> Vec<T> { x.iter().map(|&x| T::from_f32(x)).collect() };
            let (k, v) = (stored(&k), stored(&v));
            let output = plan.run(Inputs { q: &q, k: &k, v: &v }, transport)?;
            let width = config.heads.q_heads() * config.heads.v_dim();
            Ok(Array2::from_shape_vec((positions.len(), width), output.out).expect("outputs of these tokens"))
        })?;
    }

    // Everyone gets the last token's hidden state, and all keys and values.
    let last = (tokens.len() - 1) as u32;
    let all_positions: Vec<Vec<u32>> = (0..sharing.ranks).map(positions_of).collect();
    let hidden = model.final_norm(x.view());
    let own_last: Vec<f32> = match positions.iter().position(|&position| position == last) {
        Some(row) => hidden.row(row).to_vec(),
        None => Vec::new(),
    };
    let has_last = |positions: &Vec<u32>| if positions.contains(&last) { 4 * config.hidden_size } else { 0 };
    let lens: Vec<usize> = all_positions.iter().map(has_last).collect();
    let last: Vec<f32> =
        bytemuck::pod_collect_to_vec(&transport.all_gather_v(bytemuck::cast_slice(&own_last), &lens)?);

    let (kv_heads, k_dim, v_dim) = (config.heads.kv_heads(), config.heads.qk_dim(), config.heads.v_dim());
    let (k_width, v_width) = (kv_heads * k_dim, kv_heads * v_dim);
    let per_token = 4 * model.layers().len() * (k_width + v_width);
    let lens: Vec<usize> = all_positions.iter().map(|positions| positions.len() * per_token).collect();
    let gathered: Vec<f32> =
        bytemuck::pod_collect_to_vec(&transport.all_gather_v(bytemuck::cast_slice(&kept), &lens)?);
    let mut layers: Vec<_> = (0..model.layers().len())
        .map(|_| (Array2::zeros((tokens.len(), k_width)), Array2::zeros((tokens.len(), v_width))))
        .collect();
    let mut rest = gathered.as_slice();
    for positions in &all_positions {
        for (k, v) in &mut layers {
            for (matrix, width) in [(k, k_width), (v, v_width)] {
                let (rows, after) = rest.split_at(positions.len() * width);
                rest = after;
                for (row, &position) in rows.chunks_exact(width).zip(positions) {
                    matrix.row_mut(position as usize).assign(&ndarray::aview1(row));
                }
            }
        }
    }
    let by_head = |matrix: Array2<f32>, dim| {
        matrix.into_shape_with_order((tokens.len(), kv_heads, dim)).expect("rows of heads")
    };
    let layers = layers.into_iter().map(|(k, v)| (by_head(k, k_dim), by_head(v, v_dim))).collect();
    let last = Array2::from_shape_vec((1, config.hidden_size), last).expect("one rank has the last token");
    Ok(SharedPrompt { layers, last: last.index_axis_move(Axis(0), 0) })
}

/// The elements of a matrix, row by row.
fn in_order(matrix: Array2<f32>) -> Vec<f32> {
    if matrix.is_standard_layout() {
        matrix.into_raw_vec_and_offset().0
    } else {
        matrix.iter().copied().collect()
    }
}

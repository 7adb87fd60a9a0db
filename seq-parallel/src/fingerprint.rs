//! What ranks must agree on before they start.
//!
//! Ranks that were configured differently would exchange messages of wrong lengths, or worse, of right ones. So they compare notes
//! first: each fact is a number (a count, or a digest of something longer), all ranks exchange all of theirs, and the error names the
//! first fact that differs and the rank that differs in it.

use attention::{AttentionSpec, Mask};

use crate::Error;
use crate::placement::Shards;
use crate::transport::{PROTOCOL, Transport};

/// Named facts about a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    facts: Vec<(&'static str, u64)>,
}

impl Default for Fingerprint {
    fn default() -> Self {
        Self::new()
    }
}

impl Fingerprint {
    /// The protocol's version and nothing else.
    pub fn new() -> Self {
        Fingerprint { facts: vec![("the protocol version", u64::from(PROTOCOL))] }
    }

    /// With one more fact.
    pub fn with(mut self, what: &'static str, value: u64) -> Self {
        self.facts.push((what, value));
        self
    }

    /// What attention over a batch depends on.
    pub(crate) fn of_attention(spec: &AttentionSpec, shards: &Shards) -> Self {
        let mask = match spec.mask {
            Mask::Full => digest([0]),
            Mask::Causal => digest([1]),
            Mask::SlidingWindow { window, sinks } => digest([2, window as u64, sinks as u64]),
            Mask::Prefix { prefix } => digest([3, prefix as u64]),
            other => digest(format!("{other:?}").bytes().map(u64::from)),
        };
        let lengths =
            shards.sequences().iter().flat_map(|sequence| [sequence.cached as u64, sequence.new as u64]);
        Fingerprint::new()
            .with("the number of ranks", shards.ranks() as u64)
            .with("q_heads", spec.shape.q_heads() as u64)
            .with("kv_heads", spec.shape.kv_heads() as u64)
            .with("qk_dim", spec.shape.qk_dim() as u64)
            .with("v_dim", spec.shape.v_dim() as u64)
            .with("the scale (bits of an f32)", u64::from(spec.score.scale().to_bits()))
            .with("the soft-cap (bits of an f32)", u64::from(spec.score.soft_cap().unwrap_or(0.0).to_bits()))
            .with("the mask (digest)", mask)
            .with("the placement", shards.placement() as u64)
            .with("the placement of cached tokens", shards.cached_placement() as u64)
            .with("the shares of ranks (digest)", digest(shards.shares().map(|share| share as u64)))
            .with("the number of sequences", shards.sequences().len() as u64)
            .with("the lengths of sequences (digest)", digest(lengths))
    }

    /// Compares this rank's facts with everyone's.
    ///
    /// # Errors
    /// [`Error::Mismatch`] that names the first fact in which another rank differs, on the ranks that differ from it; [`Error::Peer`]
    /// when a rank has failed, or sent another number of facts.
    pub fn agree<X: Transport + ?Sized>(&self, transport: &mut X) -> Result<(), Error> {
        let (rank, ranks) = (transport.rank(), transport.ranks());
        let own: Vec<u64> = self.facts.iter().map(|(_, value)| *value).collect();
        let bytes: &[u8] = bytemuck::cast_slice(&own);
        let all = transport.all_gather_v(bytes, &vec![bytes.len(); ranks])?;
        let all: Vec<u64> = bytemuck::pod_collect_to_vec(&all);
        for (peer, theirs) in all.chunks_exact(own.len()).enumerate() {
            for ((what, here), &there) in self.facts.iter().zip(theirs) {
                if *here != there {
                    return Err(Error::Mismatch { rank, peer, what, here: *here, there });
                }
            }
        }
        Ok(())
    }
}

/// 64-bit FNV-1a of some numbers.
pub fn digest(values: impl IntoIterator<Item = u64>) -> u64 {
    let bytes = values.into_iter().flat_map(u64::to_le_bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

//! What each rank holds of a sequence.

use std::fmt;

use crate::kv::{KvCache, ShardedKv};

/// What one rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// The rank.
    pub rank: usize,
    /// Tokens whose keys and values it has.
    pub tokens: usize,
    /// Bytes of these, all layers, metadata included.
    pub bytes: usize,
    /// Bytes that it sent for tokens after the first prompt; `None` where it is another process's to say.
    pub sent: Option<u64>,
}

/// What all ranks hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    /// Whether each has its share, or each that is listed everything.
    pub sharded: bool,
    /// How many ranks there are.
    pub ranks: usize,
    /// Tokens after the first prompt.
    pub decoded: usize,
    /// Those who hold something, by rank.
    pub each: Vec<Holding>,
}

impl Holdings {
    /// Of a sharded cache.
    pub fn sharded(kv: &ShardedKv) -> Self {
        let holding = |(rank, &tokens): (usize, &usize)| {
            let bytes = kv.bytes(rank).unwrap_or(tokens * kv.bytes_per_token());
            Holding { rank, tokens, bytes, sent: kv.sent(rank) }
        };
        let each = kv.held().iter().enumerate().map(holding).collect();
        Holdings { sharded: true, ranks: kv.held().len(), decoded: kv.decoded(), each }
    }

    /// Of a cache that some of `ranks` ranks have all of.
    pub fn gathered(kv: &dyn KvCache, ranks: usize, holders: impl IntoIterator<Item = usize>) -> Self {
        let (tokens, memory) = (kv.len(), kv.memory());
        let holding = |rank| Holding { rank, tokens, bytes: memory.device + memory.host, sent: None };
        Holdings { sharded: false, ranks, decoded: 0, each: holders.into_iter().map(holding).collect() }
    }
}

impl fmt::Display for Holdings {
    /// A line for each rank.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.sharded { "sharded over" } else { "computed by" };
        let ranks = if self.ranks == 1 { "rank" } else { "ranks" };
        writeln!(f, "Keys and values, {how} {} {ranks}:", self.ranks)?;
        for Holding { rank, tokens, bytes, sent } in &self.each {
            write!(f, "  rank {rank:<3} holds {tokens:>6} tokens, {bytes:>9} bytes")?;
            match sent {
                Some(sent) => writeln!(f, "; it sent {sent} bytes for {} decoded tokens", self.decoded)?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

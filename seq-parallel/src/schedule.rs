//! Schedule: what is computed when some queries meet some keys, as a list of tiles.
//!
//! A tile is a range of a rank's query rows against a range of some rank's key rows. Almost every tile is [`TileMask::Full`] (no
//! mask) or [`TileMask::Diagonal`] (causal, aligned to the end, the one mask that every attention kernel has); rows and keys that
//! nobody sees are cut off, and what is wholly masked is no tile at all. No mask matrix exists anywhere.
//!
//! In a ring of P ranks, at step i rank r holds the keys of rank (r − i) mod P. With zigzag placement and a causal mask, every
//! step after the first is one unmasked rectangle of half a shard by a whole one, on every rank: the ring never waits for its
//! slowest member.

use std::ops::Range;

use attention::{KeyRanges, Mask};

use crate::placement::{Segment, Shards};

/// Which keys of a tile its queries see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TileMask {
    /// All of them.
    Full,
    /// Query i of n sees the first m − n + i + 1 of m keys: the causal mask, aligned to the end.
    Diagonal,
    /// Those that the layer's mask says, by position: windows, prefixes, and shards of unlike strides.
    Positions {
        /// Position of the first query.
        q_start: usize,
        /// Distance of the queries' positions.
        q_stride: usize,
        /// Position of the first key.
        kv_start: usize,
        /// Distance of the keys' positions.
        kv_stride: usize,
    },
}

/// Queries of one sequence against keys of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tile {
    /// The sequence.
    pub sequence: usize,
    /// Rows of the queries, not empty.
    pub q: Range<usize>,
    /// Rows of the keys, not empty.
    pub kv: Range<usize>,
    /// Who sees whom.
    pub mask: TileMask,
}

impl Tile {
    /// Keys, counted from the tile's first, that its query `i` sees. `mask` is the layer's.
    pub fn seen(&self, mask: &Mask, i: usize) -> KeyRanges {
        let keys = self.kv.len();
        let one = |end: usize| KeyRanges::new(0..end, 0..0);
        let ranges = match self.mask {
            TileMask::Full => one(keys),
            TileMask::Diagonal => one((keys + i + 1).saturating_sub(self.q.len())),
            TileMask::Positions { q_start, q_stride, kv_start, kv_stride } => {
                let position = q_start + i * q_stride;
                let past = kv_start + keys * kv_stride;
                // Positions to places among the tile's keys.
                let place = |position: usize| position.saturating_sub(kv_start).div_ceil(kv_stride).min(keys);
                let seen = mask.keys_at(position as i64, past);
                let mut places = seen.iter().map(|range| place(range.start)..place(range.end));
                let first = places.next().unwrap_or(0..0);
                KeyRanges::new(first, places.next().unwrap_or(0..0))
            }
        };
        ranges.expect("ranges of a mask are in order")
    }

    /// Pairs of a query and a key that it sees. `mask` is the layer's.
    pub fn pairs(&self, mask: &Mask) -> u64 {
        let (n, m) = (self.q.len() as u64, self.kv.len() as u64);
        match self.mask {
            TileMask::Full => n * m,
            // Rows that see 1 key or more: m - n + 1, …, m.
            TileMask::Diagonal => n * (m - n) + n * (n + 1) / 2,
            TileMask::Positions { .. } => (0..self.q.len()).map(|i| self.seen(mask, i).len() as u64).sum(),
        }
    }
}

/// The tiles of some queries against some keys, both by sequence as [`Shards`] gives them.
pub fn tiles(mask: &Mask, queries: &[Segment], keys: &[Segment]) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for_each_tile(mask, queries, keys, |tile| tiles.push(tile));
    tiles
}

/// Pairs of a query and a key that it sees, without a list.
pub fn pairs(mask: &Mask, queries: &[Segment], keys: &[Segment]) -> u64 {
    let mut pairs = 0;
    for_each_tile(mask, queries, keys, |tile| pairs += tile.pairs(mask));
    pairs
}

fn for_each_tile(mask: &Mask, queries: &[Segment], keys: &[Segment], mut emit: impl FnMut(Tile)) {
    let mut keys = keys;
    for q in queries {
        // Both lists are in order of sequences.
        let first = keys.iter().position(|k| k.sequence >= q.sequence).unwrap_or(keys.len());
        keys = &keys[first..];
        for k in keys.iter().take_while(|k| k.sequence == q.sequence) {
            meet(mask, q, k, &mut emit);
        }
    }
}

/// The tiles of one segment of queries and one of keys: at most a diagonal one and a full one.
fn meet(mask: &Mask, q: &Segment, k: &Segment, emit: &mut impl FnMut(Tile)) {
    let mut tile = |rows: Range<usize>, keys: usize, mask: TileMask| {
        if !rows.is_empty() && keys > 0 {
            let q_rows = q.row + rows.start..q.row + rows.end;
            emit(Tile { sequence: q.sequence, q: q_rows, kv: k.row..k.row + keys, mask });
        }
    };
    match visibility(mask, q, k) {
        Visibility::All => tile(0..q.len, k.len, TileMask::Full),
        Visibility::None => {}
        Visibility::Some if *mask == Mask::Causal && q.stride == k.stride => {
            // Query i sees i + offset keys, where that is between 0 and all.
            let (a, b, stride) = (q.start as i64, k.start as i64, q.stride as i64);
            let offset = (a - b).div_euclid(stride) + 1;
            let row = |keys_seen: i64| (keys_seen - offset).clamp(0, q.len as i64) as usize;
            let (first, mut full) = (row(1), row(k.len as i64));
            if first < full {
                // The row that is the first to see all is the diagonal's last.
                full = row(k.len as i64 + 1);
                let seen_by_last = full as i64 - 1 + offset;
                tile(first..full, seen_by_last as usize, TileMask::Diagonal);
            }
            tile(full..q.len, k.len, TileMask::Full);
        }
        Visibility::Some => {
            let (q_start, q_stride, kv_start, kv_stride) = (q.start, q.stride, k.start, k.stride);
            tile(0..q.len, k.len, TileMask::Positions { q_start, q_stride, kv_start, kv_stride });
        }
    }
}

/// How much of a segment of keys a segment of queries sees.
pub(crate) enum Visibility {
    /// Every query every key.
    All,
    /// No query any key.
    None,
    /// Some queries some keys.
    Some,
}

/// Whether every query of a segment sees every key of another, or none sees any: by the positions at their ends.
pub(crate) fn visibility(mask: &Mask, q: &Segment, k: &Segment) -> Visibility {
    let (q_first, q_last, k_first, k_last) = (q.start, q.last(), k.start, k.last());
    let (all_past, all_future) = (k_last <= q_first, k_first > q_last);
    let (all, none) = match *mask {
        Mask::Full => (true, false),
        Mask::Causal => (all_past, all_future),
        Mask::SlidingWindow { window, sinks } => (
            all_past && (k_last < sinks || q_last - k_first < window),
            all_future || k_first >= sinks && q_first >= k_last && q_first - k_last >= window,
        ),
        Mask::Prefix { prefix } => (all_past || k_last < prefix, all_future && k_first >= prefix),
        // A mask that is new to this crate is asked pair by pair.
        _ => (false, false),
    };
    match (all, none) {
        (true, _) => Visibility::All,
        (_, true) => Visibility::None,
        _ => Visibility::Some,
    }
}

/// Which rank's block a rank holds at a step of a ring: (r − i) mod P.
pub const fn source(rank: usize, step: usize, ranks: usize) -> usize {
    (rank + ranks - step % ranks) % ranks
}

/// Work of a ring over a batch, in pairs of a query and a key that it sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Of each rank over all steps `[ranks]`.
    pub per_rank: Vec<u64>,
    /// Of the busiest rank at each step `[steps]`.
    pub busiest: Vec<u64>,
}

impl Work {
    /// Counts the work of a ring that passes keys.
    pub fn of(mask: &Mask, shards: &Shards) -> Self {
        let ranks = shards.ranks();
        let keys: Vec<_> = (0..ranks).map(|rank| shards.keys(rank)).collect();
        let mut work = Work { per_rank: vec![0; ranks], busiest: vec![0; ranks] };
        for rank in 0..ranks {
            let queries = shards.queries(rank);
            for step in 0..ranks {
                let pairs = pairs(mask, &queries, &keys[source(rank, step, ranks)]);
                work.per_rank[rank] += pairs;
                work.busiest[step] = work.busiest[step].max(pairs);
            }
        }
        work
    }

    /// Pairs of all ranks and steps.
    pub fn total(&self) -> u64 {
        self.per_rank.iter().sum()
    }

    /// Ideal time over the time of a ring in which every step lasts as long as on its busiest rank; 1 for no work.
    pub fn efficiency(&self) -> f64 {
        let lockstep: u64 = self.busiest.iter().sum();
        if lockstep == 0 { 1.0 } else { self.total() as f64 / self.per_rank.len() as f64 / lockstep as f64 }
    }
}

//! A rank's schedule as the kernel takes it: tiles of rows, each with the spans of keys that it meets in a step.
//!
//! The kernel works on 128 rows at a time, a row being a query and a query head of its KV head. A row has one writer per step, so
//! that all spans of keys that a tile of rows meets in a step hang together; the tile's state is read and written once. Between
//! segments of one stride what a query sees begins and ends one key later for each query after the first, whatever the mask: a
//! span needs no positions, only where that is for query 0. Where strides differ and the mask cuts between, queries are tiles of
//! their own.

use attention::Mask;
use cuda::params::{PREFILL_TILE_FINISH, PREFILL_TILE_RESUME, PrefillTile};

use crate::Error;
use crate::placement::Segment;
use crate::schedule::{Visibility, visibility};

/// The lists of all steps of a rank.
#[derive(Debug, Clone, Default)]
pub(super) struct TileLists {
    /// One step's tiles behind another's: first those that begin rows, longest first, then the further spans of these.
    pub(super) tiles: Vec<PrefillTile>,
    /// Of each step, where its tiles are.
    pub(super) steps: Vec<std::ops::Range<usize>>,
    /// Of each step, how many of its tiles begin rows.
    pub(super) counts: Vec<u32>,
}

/// The queries and keys that meet in a step.
#[derive(Debug, Clone)]
pub(super) struct Meeting {
    /// Queries, by sequence.
    pub(super) queries: Vec<Segment>,
    /// Keys, by sequence.
    pub(super) keys: Vec<Segment>,
}

/// What the rows of a tile start from and end as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carry {
    /// The same queries in every step: a tile's rows start in the first step that shows them keys and end in the last, so that
    /// steps without keys cost nothing.
    Through,
    /// Other queries in every step, each of which starts and ends there.
    Within,
}

/// Rows that the kernel works on together, and what they meet in each step.
struct Rows {
    segment: Segment,
    /// First row, among the segment's queries · group.
    first: usize,
    /// Spans and their keys, of each step.
    spans: Vec<Vec<(Segment, Bounds)>>,
}

impl TileLists {
    /// Lists `meetings`, one per step, in tiles of `rows` rows of `group` query heads.
    pub(super) fn new(
        mask: &Mask,
        meetings: &[Meeting],
        carry: Carry,
        rows: usize,
        group: usize,
    ) -> Result<Self, Error> {
        let mut lists = TileLists::default();
        match carry {
            Carry::Through => {
                let keys: Vec<&[Segment]> = meetings.iter().map(|meeting| &*meeting.keys).collect();
                let queries = meetings.first().map_or(&[][..], |meeting| &meeting.queries);
                let tiles = tiles_of(mask, queries, &keys, rows, group)?;
                for step in 0..meetings.len() {
                    lists.push(&tiles, step, carry);
                }
            }
            Carry::Within => {
                for Meeting { queries, keys } in meetings {
                    let tiles = tiles_of(mask, queries, &[keys], rows, group)?;
                    lists.push(&tiles, 0, carry);
                }
            }
        }
        Ok(lists)
    }

    /// Appends the list of a step.
    fn push(&mut self, tiles: &[Rows], step: usize, carry: Carry) {
        let start = self.tiles.len();
        let mut listed: Vec<(&Rows, u32)> =
            tiles.iter().filter_map(|rows| Some((rows, rows.flags(step, carry)?))).collect();
        listed.sort_by_key(|(rows, _)| std::cmp::Reverse(rows.cost(step)));
        let mut next = listed.len();
        let mut further = Vec::new();
        for (rows, flags) in &listed {
            let mut entries = rows.entries(step, *flags);
            let behind = entries.split_off(1);
            let mut head = entries[0];
            if !behind.is_empty() {
                head.next = next as u32;
            }
            self.tiles.push(head);
            let last = behind.len();
            for (i, mut entry) in behind.into_iter().enumerate() {
                next += 1;
                entry.next = if i + 1 < last { next as u32 } else { 0 };
                further.push(entry);
            }
        }
        self.tiles.extend(further);
        self.steps.push(start..self.tiles.len());
        self.counts.push(listed.len() as u32);
    }
}

/// The tiles of some queries, with the spans of each step's keys.
fn tiles_of(
    mask: &Mask,
    queries: &[Segment],
    keys: &[&[Segment]],
    rows: usize,
    group: usize,
) -> Result<Vec<Rows>, Error> {
    let mut tiles = Vec::new();
    for query in queries {
        let of_sequence = |keys: &[Segment]| -> Vec<Segment> {
            keys.iter().filter(|key| key.sequence == query.sequence).copied().collect()
        };
        let keys: Vec<Vec<Segment>> = keys.iter().map(|keys| of_sequence(keys)).collect();
        let mut uneven = false;
        for key in keys.iter().flatten() {
            uneven |= Bounds::of(mask, query, key)?.is_none();
        }
        let single =
            |i: usize| Segment { start: query.position(i), stride: 1, len: 1, row: query.row + i, ..*query };
        let parts: Vec<Segment> = if uneven { (0..query.len).map(single).collect() } else { vec![*query] };
        for segment in parts {
            for first in (0..segment.len * group).step_by(rows) {
                let last = (first + rows).min(segment.len * group) - 1;
                let queries = first / group..last / group + 1;
                let mut spans = Vec::with_capacity(keys.len());
                for keys in &keys {
                    let mut seen = Vec::new();
                    for key in keys {
                        let bounds = Bounds::of(mask, &segment, key)?.expect("strides fit");
                        if bounds.keys(&queries, key.len) > 0 {
                            seen.push((*key, bounds));
                        }
                    }
                    spans.push(seen);
                }
                tiles.push(Rows { segment, first, spans });
            }
        }
    }
    Ok(tiles)
}

impl Rows {
    /// The flags of the rows in a step; none where they have nothing to do in it.
    fn flags(&self, step: usize, carry: Carry) -> Option<u32> {
        if carry == Carry::Within {
            return Some(PREFILL_TILE_FINISH);
        }
        let shown = |step: &usize| !self.spans[*step].is_empty();
        // Rows that never see a key end as such in the first step.
        let first = (0..self.spans.len()).find(shown).unwrap_or(0);
        let last = (0..self.spans.len()).rfind(shown).unwrap_or(0);
        let listed = shown(&step) || step == first;
        listed.then_some(
            if step > first { PREFILL_TILE_RESUME } else { 0 }
                | if step == last { PREFILL_TILE_FINISH } else { 0 },
        )
    }

    /// Keys that some row sees in a step: what its work is in proportion to.
    fn cost(&self, step: usize) -> usize {
        let queries = 0..self.segment.len;
        self.spans[step].iter().map(|(key, bounds)| bounds.keys(&queries, key.len)).sum()
    }

    /// The entries of a step, one per span and at least one.
    fn entries(&self, step: usize, flags: u32) -> Vec<PrefillTile> {
        let entry = |kv_start: usize, kv_len: usize, bounds: Bounds| PrefillTile {
            sequence: 0,
            first_query: self.segment.row as u32,
            queries: self.segment.len as u32,
            first_row: self.first as u32,
            kv_start: kv_start as u32,
            kv_len: kv_len as u32,
            end: bounds.end.clamp(-(self.segment.len as i64), kv_len as i64) as i32,
            begin: bounds.begin.clamp(-(self.segment.len as i64), kv_len as i64) as i32,
            sinks: bounds.sinks as u32,
            prefix: bounds.prefix as u32,
            next: 0,
            flags,
        };
        let spans = &self.spans[step];
        if spans.is_empty() {
            return vec![entry(0, 0, Bounds::default())];
        }
        spans.iter().map(|(key, bounds)| entry(key.row, key.len, *bounds)).collect()
    }
}

/// Which keys of a segment query i of another sees: those from i + begin on and before i + end, those before `prefix`, and those
/// before both `sinks` and i + end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Bounds {
    end: i64,
    begin: i64,
    sinks: usize,
    prefix: usize,
}

impl Bounds {
    /// The bounds between two segments of a sequence; none where they do not move by one key per query.
    fn of(mask: &Mask, query: &Segment, key: &Segment) -> Result<Option<Self>, Error> {
        let all = Bounds { end: key.len as i64, begin: -(query.len as i64), sinks: 0, prefix: 0 };
        let stride = match (query.len, key.len) {
            (1, _) => key.stride,
            (_, 1) => query.stride,
            _ if query.stride == key.stride => query.stride,
            _ => {
                return Ok(match visibility(mask, query, key) {
                    Visibility::All => Some(all),
                    Visibility::None => Some(Bounds { end: -(query.len as i64), ..all }),
                    Visibility::Some => None,
                });
            }
        };
        let stride = i64::try_from(stride).unwrap_or(i64::MAX);
        let ahead = query.start as i64 - key.start as i64;
        // The first key at or behind a distance from the segment's first.
        let first_from = |distance: i64| -(-distance).div_euclid(stride);
        let before = |position: usize| {
            let distance = i64::try_from(position).unwrap_or(i64::MAX).saturating_sub(key.start as i64);
            first_from(distance).clamp(0, key.len as i64) as usize
        };
        let causal = Bounds { end: ahead.div_euclid(stride) + 1, ..all };
        Ok(Some(match *mask {
            Mask::Full => all,
            Mask::Causal => causal,
            Mask::SlidingWindow { window, sinks } => {
                let window = i64::try_from(window).unwrap_or(i64::MAX);
                let begin = first_from(ahead.saturating_add(1).saturating_sub(window).max(-i64::MAX));
                Bounds { begin, sinks: before(sinks), ..causal }
            }
            Mask::Prefix { prefix } => Bounds { prefix: before(prefix), ..causal },
            _ => return Err(Error::argument("mask", "a mask that the kernel knows", format!("{mask:?}"))),
        }))
    }

    /// Keys between the first and the last that some of the queries see, those of sinks apart.
    fn keys(&self, queries: &std::ops::Range<usize>, kv_len: usize) -> usize {
        let kv_len = kv_len as i64;
        let end = (queries.end as i64 - 1 + self.end).clamp(0, kv_len);
        let sinks = (self.sinks as i64).min(end);
        let end = end.max(self.prefix as i64);
        let begin = (queries.start as i64 + self.begin).max(0);
        ((end - begin).max(0) + sinks) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::{Placement, Sequence, Shards};

    /// Which keys each query sees, by the list, as (query row, key row) pairs in order.
    fn pairs(list: &[PrefillTile], count: u32, rows: usize, group: usize) -> Vec<(usize, usize)> {
        let mut pairs = Vec::new();
        for head in &list[..count as usize] {
            let mut entry = *head;
            loop {
                let rows = head.first_row as usize
                    ..(head.first_row as usize + rows).min(head.queries as usize * group);
                for i in rows.step_by(group).map(|row| row / group) {
                    let (own, first) = (i as i64 + i64::from(entry.end), i as i64 + i64::from(entry.begin));
                    for key in 0..entry.kv_len as usize {
                        let at = key as i64;
                        let seen = (at >= first && at < own)
                            || at < i64::from(entry.prefix)
                            || (at < i64::from(entry.sinks) && at < own);
                        if seen {
                            pairs.push((head.first_query as usize + i, entry.kv_start as usize + key));
                        }
                    }
                }
                if entry.next == 0 {
                    break;
                }
                assert!(entry.next as usize >= count as usize, "further spans lie behind");
                entry = list[entry.next as usize];
            }
        }
        pairs.sort_unstable();
        pairs
    }

    /// Every step of every rank shows each query the keys that the mask says, by position, each once.
    #[test]
    fn lists_show_what_the_mask_says() {
        let window = |window, sinks| Mask::sliding_window(window, sinks).unwrap();
        let masks = [Mask::Full, Mask::Causal, window(5, 0), window(7, 3), Mask::Prefix { prefix: 9 }];
        let batches: [&[(usize, usize)]; 3] = [&[(0, 33)], &[(5, 17), (0, 1), (13, 4)], &[(7, 40), (0, 8)]];
        let (rows, group) = (8, 2);
        for (mask, batch, placement, ranks) in masks.iter().flat_map(|mask| {
            batches.iter().flat_map(move |batch| {
                Placement::ALL
                    .iter()
                    .flat_map(move |placement| [1, 2, 3, 4].map(|ranks| (mask, batch, placement, ranks)))
            })
        }) {
            let sequences = batch.iter().map(|&(cached, new)| Sequence { cached, new });
            let shards = Shards::new(sequences, *placement, ranks).unwrap();
            for cached in Placement::ALL {
                let shards = shards.clone().with_cached(cached);
                for rank in 0..ranks {
                    let queries = shards.queries(rank);
                    let meetings: Vec<Meeting> = (0..ranks)
                        .map(|source| Meeting { queries: queries.clone(), keys: shards.keys(source) })
                        .collect();
                    let lists = TileLists::new(mask, &meetings, Carry::Through, rows, group).unwrap();
                    let mut ended = Vec::new();
                    for (step, range) in lists.steps.iter().enumerate() {
                        let list = &lists.tiles[range.clone()];
                        let mut expected = Vec::new();
                        for q in &queries {
                            for k in meetings[step].keys.iter().filter(|k| k.sequence == q.sequence) {
                                for (i, j) in (0..q.len).flat_map(|i| (0..k.len).map(move |j| (i, j))) {
                                    if mask.sees(q.position(i) as i64, k.position(j) as u64) {
                                        expected.push((q.row + i, k.row + j));
                                    }
                                }
                            }
                        }
                        expected.sort_unstable();
                        let case = format!(
                            "{mask:?}, {batch:?}, {placement}, cached {cached}, rank {rank} of {ranks}, step {step}"
                        );
                        assert_eq!(pairs(list, lists.counts[step], rows, group), expected, "{case}");
                        let heads = &list[..lists.counts[step] as usize];
                        ended.extend(
                            heads.iter().filter(|tile| tile.flags & PREFILL_TILE_FINISH != 0).flat_map(
                                |tile| {
                                    let last =
                                        (tile.first_row as usize + rows).min(tile.queries as usize * group);
                                    (tile.first_row as usize..last)
                                        .map(|row| tile.first_query as usize * group + row)
                                },
                            ),
                        );
                    }
                    ended.sort_unstable();
                    let all: Vec<usize> = (0..shards.query_tokens(rank) * group).collect();
                    assert_eq!(ended, all, "every row ends once");
                }
            }
        }
    }

    /// With zigzag placement every step after the first is whole rectangles; contiguous ranks have nothing to do in steps that
    /// would show them the future.
    #[test]
    fn masked_steps_cost_nothing() {
        let shards = Shards::new([Sequence::new(64)], Placement::Contiguous, 4).unwrap();
        let meetings: Vec<Meeting> = [1, 0, 3, 2]
            .map(|source| Meeting { queries: shards.queries(1), keys: shards.keys(source) })
            .into();
        let lists = TileLists::new(&Mask::Causal, &meetings, Carry::Through, 128, 4).unwrap();
        assert_eq!(lists.counts, [1, 1, 0, 0]);
        let flags: Vec<u32> = lists.tiles.iter().map(|tile| tile.flags).collect();
        assert_eq!(flags, [0, 3], "started by its own keys, finished by those of rank 0");
    }
}

//! Placement: which rank owns which tokens.
//!
//! | placement | rank r of P owns, of n tokens |
//! |---|---|
//! | contiguous | the r-th of P chunks |
//! | zigzag | chunks r and 2P − 1 − r of 2P (also called head-tail or DualChunkSwap): causal work is the same on every rank |
//! | striped | every token t with t mod P = r |
//!
//! Each sequence of a packed batch is placed by itself, so that every rank gets its part of each. Any length goes: chunks differ by
//! at most one token, nothing is padded, and a sequence shorter than P leaves some ranks without a token of it. Ranks of unequal
//! speed or memory take unequal shares. A cached prefix has a placement of its own.
//!
//! Shards are formulas, not tables: a rank's segments are computed when they are asked for, so that planning for thousands of
//! ranks costs nothing.

use crate::Error;

/// How the tokens of a sequence are dealt to ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Placement {
    /// One chunk each, in order.
    Contiguous,
    /// Two chunks each, the r-th from the front and the r-th from the back.
    Zigzag,
    /// Round robin, token by token.
    Striped,
}

impl Placement {
    /// Every placement.
    pub const ALL: [Placement; 3] = [Placement::Contiguous, Placement::Zigzag, Placement::Striped];
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Placement::Contiguous => "contiguous",
            Placement::Zigzag => "zigzag",
            Placement::Striped => "striped",
        })
    }
}

/// One sequence of a batch: tokens that are cached already, and new ones after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sequence {
    /// Tokens whose keys and values the ranks hold: positions `0..cached`.
    pub cached: usize,
    /// Tokens to prefill: positions `cached..cached + new`.
    pub new: usize,
}

impl Sequence {
    /// New tokens after no prefix.
    pub const fn new(new: usize) -> Self {
        Sequence { cached: 0, new }
    }

    /// Keys that the last query could see.
    pub const fn kv_len(&self) -> usize {
        self.cached + self.new
    }
}

/// Tokens at evenly spaced positions of one sequence that lie in adjacent rows of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Segment {
    /// The sequence.
    pub sequence: usize,
    /// Position of the first token, counted from the start of the sequence, cached prefix included.
    pub start: usize,
    /// Distance of positions.
    pub stride: usize,
    /// Tokens; never 0.
    pub len: usize,
    /// Row of the first token in the rank's own tensor.
    pub row: usize,
}

impl Segment {
    /// Position of the i-th token.
    pub const fn position(&self, i: usize) -> usize {
        self.start + i * self.stride
    }

    /// Positions, in increasing order.
    pub fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        let segment = *self;
        (0..segment.len).map(move |i| segment.position(i))
    }

    /// Position of the last token.
    pub const fn last(&self) -> usize {
        self.position(self.len - 1)
    }

    /// The place of a position among the tokens.
    fn find(&self, position: usize) -> Option<usize> {
        let ahead = position.checked_sub(self.start)?;
        let i = ahead / self.stride;
        (ahead.is_multiple_of(self.stride) && i < self.len).then_some(i)
    }
}

/// The shards of a batch: which rows of which rank are which tokens.
///
/// A rank's queries are its new tokens; its keys are its part of every cached prefix and its new tokens. Both are packed by
/// sequence, a sequence's cached tokens first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    sequences: Vec<Sequence>,
    /// First packed new token of each sequence, then the number of new tokens.
    first: Vec<usize>,
    placement: Placement,
    cached_placement: Placement,
    /// Shares of ranks 0..r, for every r up to P.
    cumulative: Vec<usize>,
}

/// Largest share of a rank: striped placement deals shares token by token.
pub const MAX_SHARE: usize = 64;

impl Shards {
    /// Deals a batch to `ranks` ranks in equal shares; cached prefixes lie contiguous.
    ///
    /// # Errors
    /// [`Error::Argument`] for no ranks.
    pub fn new(
        sequences: impl IntoIterator<Item = Sequence>,
        placement: Placement,
        ranks: usize,
    ) -> Result<Self, Error> {
        if ranks == 0 {
            return Err(Error::argument("ranks", "at least 1", 0));
        }
        Self::uneven(sequences, placement, &vec![1; ranks])
    }

    /// Deals a batch in shares: a rank of share 2 gets twice the tokens of a rank of share 1, one of share 0 gets none.
    ///
    /// # Errors
    /// [`Error::Argument`] for no ranks, shares over [`MAX_SHARE`] or shares that are all 0, or a batch past all memory.
    pub fn uneven(
        sequences: impl IntoIterator<Item = Sequence>,
        placement: Placement,
        shares: &[usize],
    ) -> Result<Self, Error> {
        if shares.is_empty() {
            return Err(Error::argument("ranks", "at least 1", 0));
        }
        if let Some(share) = shares.iter().find(|&&share| share > MAX_SHARE) {
            return Err(Error::argument("shares", format!("at most {MAX_SHARE} each"), share));
        }
        let mut cumulative = vec![0];
        for share in shares {
            cumulative.push(cumulative[cumulative.len() - 1] + share);
        }
        if cumulative.last() == Some(&0) {
            return Err(Error::argument("shares", "at least one above 0", format!("{shares:?}")));
        }
        let sequences: Vec<Sequence> = sequences.into_iter().collect();
        let mut first = vec![0usize];
        let mut all = 0usize;
        for sequence in &sequences {
            // Chunk borders multiply a length by twice the sum of shares.
            let kv_len = sequence.cached.checked_add(sequence.new);
            all = kv_len
                .and_then(|len| all.checked_add(len))
                .filter(|all| all.checked_mul(2 * cumulative[shares.len()]).is_some())
                .ok_or_else(|| {
                    Error::argument("sequences", "lengths that fit memory", format!("{sequence:?}"))
                })?;
            first.push(first[first.len() - 1] + sequence.new);
        }
        Ok(Shards { sequences, first, placement, cached_placement: Placement::Contiguous, cumulative })
    }

    /// The same batch with its cached prefixes placed in this way.
    pub fn with_cached(self, cached_placement: Placement) -> Self {
        Shards { cached_placement, ..self }
    }

    /// How many ranks.
    pub fn ranks(&self) -> usize {
        self.cumulative.len() - 1
    }

    /// The batch.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// How new tokens are placed.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// How cached tokens are placed.
    pub fn cached_placement(&self) -> Placement {
        self.cached_placement
    }

    /// Each rank's share.
    pub fn shares(&self) -> impl Iterator<Item = usize> + '_ {
        self.cumulative.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// New tokens of all sequences.
    pub fn new_tokens(&self) -> usize {
        self.first[self.sequences.len()]
    }

    /// Refuses batches that leave a rank without a new token of some sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the first sequence shorter than P.
    pub fn require_every_rank(&self) -> Result<(), Error> {
        for (i, sequence) in self.sequences.iter().enumerate() {
            let dealt = (0..self.ranks()).all(|rank| self.dealt(self.placement, sequence.new, rank) > 0);
            if !dealt {
                return Err(Error::argument(
                    "sequences",
                    format!("at least one token of sequence {i} for each of {} ranks", self.ranks()),
                    format!("{} tokens", sequence.new),
                ));
            }
        }
        Ok(())
    }

    /// Segments of a rank's queries, by sequence; their rows are the rows of its Q.
    pub fn queries(&self, rank: usize) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(2 * self.sequences.len());
        let mut row = 0;
        for (i, sequence) in self.sequences.iter().enumerate() {
            self.deal(self.placement, sequence.new, rank, |start, stride, len| {
                segments.push(Segment { sequence: i, start: sequence.cached + start, stride, len, row });
                row += len;
            });
        }
        segments
    }

    /// Segments of a rank's keys, by sequence, cached ones first; their rows are the rows of its K and V.
    pub fn keys(&self, rank: usize) -> Vec<Segment> {
        let mut segments = Vec::with_capacity(2 * self.sequences.len());
        let mut row = 0;
        for (i, sequence) in self.sequences.iter().enumerate() {
            let parts = [
                (self.cached_placement, 0, sequence.cached),
                (self.placement, sequence.cached, sequence.new),
            ];
            for (placement, base, n) in parts {
                self.deal(placement, n, rank, |start, stride, len| {
                    segments.push(Segment { sequence: i, start: base + start, stride, len, row });
                    row += len;
                });
            }
        }
        segments
    }

    /// Segments of a rank's part of the cached prefixes, by sequence, with rows counted among these alone.
    pub(crate) fn cached(&self, rank: usize) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut row = 0;
        for (i, sequence) in self.sequences.iter().enumerate() {
            self.deal(self.cached_placement, sequence.cached, rank, |start, stride, len| {
                segments.push(Segment { sequence: i, start, stride, len, row });
                row += len;
            });
        }
        segments
    }

    /// New tokens of a rank.
    pub fn query_tokens(&self, rank: usize) -> usize {
        self.sequences.iter().map(|sequence| self.dealt(self.placement, sequence.new, rank)).sum()
    }

    /// Keys of a rank.
    pub fn key_tokens(&self, rank: usize) -> usize {
        let of = |sequence: &Sequence| {
            self.dealt(self.cached_placement, sequence.cached, rank)
                + self.dealt(self.placement, sequence.new, rank)
        };
        self.sequences.iter().map(of).sum()
    }

    /// The most new tokens and the most keys of any rank, without asking each rank about each sequence.
    pub(crate) fn most_tokens(&self) -> (usize, usize) {
        let (mut queries, mut cached) = (vec![0; self.ranks()], vec![0; self.ranks()]);
        let even = self.shares().all(|share| share == 1);
        for sequence in &self.sequences {
            self.add_dealt(self.placement, sequence.new, even, &mut queries);
            self.add_dealt(self.cached_placement, sequence.cached, even, &mut cached);
        }
        let keys = queries.iter().zip(&cached).map(|(queries, cached)| queries + cached);
        (queries.iter().copied().max().unwrap_or(0), keys.max().unwrap_or(0))
    }

    /// Adds every rank's part of `n` tokens; `even` says that all shares are 1.
    fn add_dealt(&self, placement: Placement, n: usize, even: bool, tokens: &mut [usize]) {
        let ranks = self.ranks();
        if n == 0 {
            return;
        }
        if !even {
            for (rank, tokens) in tokens.iter_mut().enumerate() {
                *tokens += self.dealt(placement, n, rank);
            }
            return;
        }
        match placement {
            Placement::Contiguous => {
                borders(n, ranks).zip(tokens).for_each(|(border, tokens)| *tokens += border.chunk);
            }
            // The chunks r from the front and r from the back: borders rounded down and up.
            Placement::Zigzag => {
                let mut before = false;
                for (border, tokens) in borders(n, 2 * ranks).zip(tokens) {
                    *tokens += 2 * border.chunk + usize::from(border.rounded) - usize::from(before);
                    before = border.rounded;
                }
            }
            Placement::Striped => {
                let (each, more) = (n / ranks, n % ranks);
                tokens.iter_mut().for_each(|tokens| *tokens += each);
                tokens[..more].iter_mut().for_each(|tokens| *tokens += 1);
            }
        }
    }

    /// Where a token is: its rank and its row among that rank's keys.
    pub fn locate_key(&self, sequence: usize, position: usize) -> Option<(usize, usize)> {
        self.locate(sequence, position, |rank| self.keys(rank))
    }

    /// Where a new token is: its rank and its row among that rank's queries.
    pub fn locate_query(&self, sequence: usize, position: usize) -> Option<(usize, usize)> {
        self.locate(sequence, position, |rank| self.queries(rank))
    }

    fn locate(
        &self,
        sequence: usize,
        position: usize,
        segments: impl Fn(usize) -> Vec<Segment>,
    ) -> Option<(usize, usize)> {
        (0..self.ranks()).find_map(|rank| {
            let mut of_sequence = segments(rank).into_iter().filter(|segment| segment.sequence == sequence);
            of_sequence.find_map(|segment| Some((rank, segment.row + segment.find(position)?)))
        })
    }

    /// Of each query row of a rank, its place in the batch with all sequences' new tokens packed one after another.
    pub fn packed(&self, rank: usize) -> Vec<usize> {
        let place = |segment: Segment| {
            let base = self.first[segment.sequence];
            let cached = self.sequences[segment.sequence].cached;
            segment.positions().map(move |position| base + position - cached)
        };
        self.queries(rank).into_iter().flat_map(place).collect()
    }

    /// A rank's rows of a packed tensor `[new tokens, width]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when the tensor has another length.
    pub fn take<T: Copy>(&self, rank: usize, packed: &[T], width: usize) -> Result<Vec<T>, Error> {
        crate::error::check_len("packed", packed.len(), &[self.new_tokens(), width])?;
        Ok(self
            .packed(rank)
            .into_iter()
            .flat_map(|token| packed[token * width..][..width].iter().copied())
            .collect())
    }

    /// Puts a rank's rows where they belong in a packed tensor `[new tokens, width]`: the inverse of [`take`](Self::take).
    ///
    /// # Errors
    /// [`Error::Argument`] when a tensor has another length.
    pub fn put<T: Copy>(&self, rank: usize, rows: &[T], width: usize, packed: &mut [T]) -> Result<(), Error> {
        crate::error::check_len("packed", packed.len(), &[self.new_tokens(), width])?;
        crate::error::check_len("rows", rows.len(), &[self.query_tokens(rank), width])?;
        for (row, token) in self.packed(rank).into_iter().enumerate() {
            packed[token * width..][..width].copy_from_slice(&rows[row * width..][..width]);
        }
        Ok(())
    }

    /// Calls `emit(start, stride, len)` for a rank's parts of `n` tokens, in increasing order of rows.
    fn deal(&self, placement: Placement, n: usize, rank: usize, mut emit: impl FnMut(usize, usize, usize)) {
        let mut chunk = |range: std::ops::Range<usize>| {
            if !range.is_empty() {
                emit(range.start, 1, range.len());
            }
        };
        let shares = self.cumulative[self.ranks()];
        let own = self.cumulative[rank]..self.cumulative[rank + 1];
        match placement {
            Placement::Contiguous => chunk(own.start * n / shares..own.end * n / shares),
            Placement::Zigzag => {
                let border = |i: usize| i * n / (2 * shares);
                let (head, tail) = (
                    border(own.start)..border(own.end),
                    border(2 * shares - own.end)..border(2 * shares - own.start),
                );
                // The last rank's two chunks touch; one segment is half the tiles.
                if head.end == tail.start {
                    chunk(head.start..tail.end);
                } else {
                    chunk(head);
                    chunk(tail);
                }
            }
            Placement::Striped => {
                for start in own {
                    if start < n {
                        emit(start, shares, (n - start).div_ceil(shares));
                    }
                }
            }
        }
    }

    /// Tokens of `n` that a rank gets.
    fn dealt(&self, placement: Placement, n: usize, rank: usize) -> usize {
        let mut tokens = 0;
        self.deal(placement, n, rank, |_, _, len| tokens += len);
        tokens
    }
}

/// The end of a chunk.
struct Border {
    /// Tokens of the chunk.
    chunk: usize,
    /// Whether its end was rounded down.
    rounded: bool,
}

/// The ends of the chunks `i · n / chunks .. (i + 1) · n / chunks`, without a division for each.
fn borders(n: usize, chunks: usize) -> impl Iterator<Item = Border> {
    let (each, more) = (n / chunks, n % chunks);
    let mut rest = 0;
    (0..chunks).map(move |_| {
        rest += more;
        let over = usize::from(rest >= chunks);
        rest -= over * chunks;
        Border { chunk: each + over, rounded: rest > 0 }
    })
}

/// Joins segments whose rows and positions continue each other, and orders them by sequence: what the ranks of a group hold
/// together, one after the other.
pub(crate) fn join(parts: impl IntoIterator<Item = Vec<Segment>>) -> Vec<Segment> {
    let mut joined: Vec<Segment> = Vec::new();
    let mut rows = 0;
    for part in parts {
        let tokens: usize = part.iter().map(|segment| segment.len).sum();
        joined.extend(part.into_iter().map(|segment| Segment { row: rows + segment.row, ..segment }));
        rows += tokens;
    }
    joined.sort_unstable_by_key(|segment| (segment.sequence, segment.row));
    joined.dedup_by(|next, segment| {
        let continues = segment.sequence == next.sequence
            && segment.row + segment.len == next.row
            && (segment.stride == next.stride || segment.len == 1 && next.len == 1)
            && segment.start + segment.len * next.stride == next.start;
        if continues {
            *segment = Segment { len: segment.len + next.len, stride: next.stride, ..*segment };
        }
        continues
    });
    joined
}

/// The rows `rows` of a list of segments, as a list of its own.
pub(crate) fn cut(segments: &[Segment], rows: std::ops::Range<usize>) -> Vec<Segment> {
    let part = |segment: &Segment| {
        let start = rows.start.max(segment.row);
        let end = rows.end.min(segment.row + segment.len);
        (start < end).then(|| Segment {
            start: segment.position(start - segment.row),
            len: end - start,
            row: start - rows.start,
            ..*segment
        })
    };
    segments.iter().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_tokens_of_a_rank() {
        for (lens, shares) in [
            (vec![(0, 100), (7, 31), (0, 0), (5, 1)], vec![1; 7]),
            (vec![(1000, 3), (0, 12_345)], vec![1; 16]),
            (vec![(13, 30), (0, 9)], vec![2, 0, 1, 4]),
            (vec![], vec![1, 1]),
        ] {
            let sequences: Vec<_> = lens.iter().map(|&(cached, new)| Sequence { cached, new }).collect();
            for placement in Placement::ALL {
                for cached in Placement::ALL {
                    let shards =
                        Shards::uneven(sequences.clone(), placement, &shares).unwrap().with_cached(cached);
                    let most = |tokens: &dyn Fn(usize) -> usize| (0..shares.len()).map(tokens).max().unwrap();
                    let expected =
                        (most(&|rank| shards.query_tokens(rank)), most(&|rank| shards.key_tokens(rank)));
                    assert_eq!(shards.most_tokens(), expected, "{placement}, {cached}, {lens:?}, {shares:?}");
                }
            }
        }
    }
}

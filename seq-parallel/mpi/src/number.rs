//! Numbers of exchanges that say on all ranks alike what came first.
//!
//! Ranks make the same operations in the same order, but not as many exchanges: of a layer that is decoded over shards, the home rank has
//! two with every other rank, the others two in all. So what is numbered is not an exchange, but the run of exchanges that have one tag,
//! with different ranks.

use seq_parallel::transport::Tag;

/// Numbers a rank's exchanges.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    /// The tag of the run, and with whom it has had exchanges: (to, from).
    run: Option<(Tag, Vec<(usize, usize)>)>,
    /// Runs begun.
    begun: u64,
}

impl Numbers {
    /// The number of the exchange that begins now.
    pub(crate) fn begin(&mut self, tag: Tag, ends: (usize, usize)) -> u64 {
        match &mut self.run {
            Some((of, with)) if *of == tag && !with.contains(&ends) => with.push(ends),
            _ => {
                self.run = Some((tag, vec![ends]));
                self.begun += 1;
            }
        }
        self.begun - 1
    }

    /// The number of what a rank is at when it begins no exchange: that of the run with this tag, or of the next.
    pub(crate) fn at(&self, tag: Tag) -> u64 {
        match &self.run {
            Some((of, _)) if *of == tag => self.begun - 1,
            _ => self.begun,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use seq_parallel::transport::Operation;

    /// All exchanges of steps that are decoded over shards: what ranks compare, two layers, the gather, the commit.
    fn decode(rank: usize, ranks: usize, numbers: &mut Numbers) -> Vec<(Tag, u64)> {
        let mut given = Vec::new();
        let mut begin = |tag, to, from| given.push((tag, numbers.begin(tag, (to, from))));
        let ring = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        for _ in 0..3 {
            for step in 1..ranks {
                begin(Tag::new(Operation::AllGather, step), ring.0, ring.1);
            }
            for layer in 0..2 {
                for operation in [Operation::DecodeQuery, Operation::DecodePartial] {
                    let peers = if rank == 0 { 1..ranks } else { 0..1 };
                    peers.for_each(|peer| begin(Tag::new(operation, layer), peer, peer));
                }
            }
            for step in 1..ranks {
                begin(Tag::new(Operation::AllGather, step), ring.0, ring.1);
            }
            for step in 0..4 {
                let peers = if rank == 0 { 1..ranks } else { 0..1 };
                peers.for_each(|peer| begin(Tag::new(Operation::Commit, step), peer, peer));
            }
        }
        given
    }

    #[test]
    fn home_and_the_others_count_alike() {
        for ranks in [2, 4, 8] {
            let [mut home, other] = [0, 1].map(|rank| decode(rank, ranks, &mut Numbers::default()));
            assert_eq!(home.len() == other.len(), ranks == 2);
            home.dedup();
            assert_eq!(home, other, "{ranks} ranks");
            assert!(other.windows(2).all(|pair| pair[0].1 + 1 == pair[1].1), "each run has its own number");
        }
    }

    #[test]
    fn a_rank_that_begins_nothing_is_at_its_run_or_the_next() {
        let [ring, barrier] = [Tag::new(Operation::PassKv, 0), Tag::new(Operation::Barrier, 0)];
        let mut numbers = Numbers::default();
        assert_eq!(numbers.at(ring), 0);
        assert_eq!(numbers.begin(ring, (1, 2)), 0);
        assert_eq!((numbers.at(ring), numbers.at(barrier)), (0, 1));
        // The same again with the same ranks is another one.
        assert_eq!(
            (numbers.begin(ring, (1, 2)), numbers.begin(ring, (2, 1)), numbers.begin(barrier, (1, 2))),
            (1, 1, 2)
        );
    }
}

//! A ring one of whose ranks fails, and what every other rank has to say of it.

use std::time::Duration;

use attention::Mask;
use half::bf16;

use super::{Contents, sequences, spec};
use crate::placement::{Placement, Shards};
use crate::ring::{Direction, RingPlan};
use crate::transport::{Failure, Faulty, Operation, Tag, Transport};
use crate::{Error, Output, PeerFault};

/// A deadline that passes in a test. Whoever is alive comes to its next wait long before, on a machine whose cores are busy with other
/// things, too.
pub const PASSES: Duration = Duration::from_secs(2);

/// A deadline that no test waits for: faults that are noticed at once are noticed without it.
pub const NEVER_PASSES: Duration = Duration::from_secs(300);

/// A rank of a ring, how it fails and when.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// The rank that fails.
    pub culprit: usize,
    /// How.
    pub failure: Failure,
    /// At which of its exchanges, from 0; a ring of P ranks has P − 1.
    pub exchange: usize,
    /// What goes round.
    pub direction: Direction,
}

impl Scenario {
    /// Every failure at the first, a middle and the last exchange of a ring of `ranks` ranks; culprits and directions vary.
    pub fn all(ranks: usize) -> Vec<Self> {
        let failures = [Failure::Dies, Failure::Silent, Failure::SendsGarbage, Failure::SendsTooLittle];
        let mut exchanges = vec![0, (ranks - 1) / 2, ranks - 2];
        exchanges.dedup();
        let mut scenarios = Vec::new();
        for failure in failures {
            for &exchange in &exchanges {
                let direction = if exchange % 2 == 1 { Direction::PassQ } else { Direction::PassKv };
                scenarios.push(Scenario { culprit: (exchange + 2) % ranks, failure, exchange, direction });
            }
        }
        scenarios
    }

    /// For the waits of its ranks: only of silence nothing tells before the deadline.
    pub fn deadline(&self) -> Duration {
        match self.failure {
            Failure::Silent => PASSES,
            _ => NEVER_PASSES,
        }
    }

    /// Runs one rank of the ring, then a barrier: who had all that it needed hears of a failure there. The end fails by this scenario
    /// if it is the culprit's.
    ///
    /// # Errors
    /// What the ring or the barrier returns.
    pub fn run<X: Transport>(&self, transport: X) -> Result<Output, Error> {
        // One that never fails is one whose turn never comes.
        let exchange = if transport.rank() == self.culprit { self.exchange } else { usize::MAX };
        self.ring(&mut Faulty::new(transport, self.failure, exchange))
    }

    /// As [`run`](Self::run) with an end that fails by itself or not at all.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn ring<X: Transport + ?Sized>(&self, transport: &mut X) -> Result<Output, Error> {
        let (rank, ranks) = (transport.rank(), transport.ranks());
        let contents = Contents::<bf16>::new(spec(4, 4, 16, Mask::Causal), sequences(&[(0, 16 * ranks)]), 1);
        let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks)?;
        let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
        let plan = RingPlan::new(contents.spec, shards)?.passing(self.direction);
        let output = plan.run(rows.inputs(), transport)?;
        transport.barrier().map(|()| output)
    }

    /// Checks what a rank that did not fail has to say, and gives the step that it names: all ranks name the same.
    ///
    /// # Panics
    /// Unless it is an error that names the culprit, how it failed, and a step of the ring.
    pub fn check_survivor(&self, rank: usize, result: &Result<Output, Error>) -> Tag {
        let operation = match self.direction {
            Direction::PassKv => Operation::PassKv,
            Direction::PassQ => Operation::PassQ,
        };
        match result {
            Err(Error::Peer { rank: reporter, peer, at, fault }) => {
                assert_eq!((*reporter, *peer), (rank, self.culprit), "{self:?}: {result:?}");
                let fits = match self.failure {
                    Failure::Dies => *fault == PeerFault::Gone,
                    Failure::Late(_) => false,
                    Failure::Silent => matches!(fault, PeerFault::Stalled { .. }),
                    Failure::SendsGarbage | Failure::SendsTooLittle => matches!(fault, PeerFault::Garbage(_)),
                    // Whoever has it called knows what it does.
                    Failure::Calls(_) => true,
                };
                assert!(fits, "{self:?}, rank {rank}: {fault:?}");
                assert_eq!(at.operation, operation, "{self:?}, rank {rank}");
                *at
            }
            Err(other) => panic!("{self:?}, rank {rank}: {other}"),
            Ok(_) => panic!("{self:?}, rank {rank} believes that all is well"),
        }
    }
}

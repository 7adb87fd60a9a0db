//! What every transport does: collectives, order, counters, refusals; and every scheme on top of it, held against the oracle.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use attention::Mask;
use half::bf16;

use super::{Contents, sequences, spec};
use crate::fingerprint::Fingerprint;
use crate::hybrid::HybridPlan;
use crate::placement::{Placement, Shards};
use crate::ring::{Direction, Ring, RingPlan};
use crate::transport::{Buffer, Operation, Subgroup, Tag, Transport};
use crate::ulysses::{UlyssesPlan, local_heads};
use crate::{Error, megatron};

/// One case of the suite. Every rank of the group runs it.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What holds.
    pub name: &'static str,
    /// Panics unless it does.
    pub run: fn(&mut dyn Transport),
}

/// The suite.
pub const CASES: &[Case] = &[
    Case { name: "collectives give what they say", run: collectives },
    Case { name: "messages of a tag stay in order", run: order },
    Case { name: "long messages cross", run: long_messages },
    Case { name: "nobody passes a barrier early", run: barrier },
    Case { name: "groups of ranks do not mix", run: subgroups },
    Case { name: "bytes are counted to the byte", run: counters },
    Case { name: "differing configurations are named", run: fingerprints },
    Case { name: "what cannot be is refused, and harms nothing", run: refusals },
    Case { name: "rings equal attention and send what they say", run: rings },
    Case { name: "Ulysses equals attention and sends what it says", run: ulysses },
    Case { name: "hybrids equal attention and send what they say", run: hybrids },
    Case { name: "Megatron stages equal the whole", run: megatron_stages },
    Case { name: "a paused ring goes on bit for bit", run: pauses },
    Case { name: "ranks at unequal steps pause together", run: pauses_apart },
    Case { name: "a ring that is given up leaves the transport usable", run: gives_up },
];

/// Runs the whole suite on one rank.
///
/// # Panics
/// When a case does not hold.
pub fn conform(transport: &mut dyn Transport) {
    for case in CASES {
        (case.run)(transport);
        transport.barrier().unwrap_or_else(|error| panic!("{}: {error}", case.name));
    }
}

/// Rank and number of ranks.
fn place(transport: &dyn Transport) -> (usize, usize) {
    (transport.rank(), transport.ranks())
}

fn collectives(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let at = format!("rank {rank} of {ranks}");
    let lens: Vec<usize> = (0..ranks).map(|of| 3 * of).collect();
    let gathered = transport.all_gather_v(&vec![rank as u8; 3 * rank], &lens).unwrap();
    let expected: Vec<u8> = (0..ranks).flat_map(|of| vec![of as u8; 3 * of]).collect();
    assert_eq!(gathered, expected, "all-gather, {at}");

    let send = (0..ranks).map(|to| Buffer::of(&vec![(10 * rank + to) as u8; rank + to])).collect();
    let lens: Vec<usize> = (0..ranks).map(|from| from + rank).collect();
    for (from, buffer) in transport.all_to_all_v(send, &lens).unwrap().iter().enumerate() {
        let expected = vec![(10 * from + rank) as u8; from + rank];
        assert_eq!(buffer.bytes(), expected, "all-to-all, {at} from {from}");
    }

    let lens: Vec<usize> = (0..ranks).map(|of| of % 3).collect();
    let all: usize = lens.iter().sum();
    let own: Vec<f32> = (0..all).map(|i| (i * (rank + 1)) as f32).collect();
    let sum = transport.reduce_scatter(&own, &lens).unwrap();
    let first: usize = lens[..rank].iter().sum();
    let factor = (ranks * (ranks + 1) / 2) as f32;
    let expected: Vec<f32> = (first..first + lens[rank]).map(|i| i as f32 * factor).collect();
    assert_eq!(sum, expected, "reduce-scatter, {at}");
}

/// Several messages of one tag and of another are under way at once; tickets are waited for out of order.
fn order(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    if ranks == 1 {
        return;
    }
    let (right, left) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
    let mut tickets = Vec::new();
    for i in 0..4u64 {
        for operation in [Operation::PassKv, Operation::PassQ] {
            let tag = Tag::new(operation, 7);
            let mut message = Buffer::of(&[100 * rank as u64 + 10 * operation as u64 + i]);
            transport.seal(&mut message, tag);
            let ticket = transport.exchange(tag, right, Arc::new(message), left, Buffer::new(8)).unwrap();
            tickets.push((100 * left as u64 + 10 * operation as u64 + i, ticket));
        }
    }
    for (expected, ticket) in tickets.into_iter().rev() {
        assert_eq!(transport.wait(ticket).unwrap().values::<u64>(), [expected], "rank {rank} of {ranks}");
    }
}

/// Past every limit up to which a library copies messages aside: both sides have to move them.
fn long_messages(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let words = 100_000;
    let value = |from: usize, i: usize| (from * words + i) as u64;
    for step in 1..ranks {
        let (to, from) = ((rank + step) % ranks, (rank + ranks - step) % ranks);
        let tag = Tag::new(Operation::PassKv, step);
        let mut message = Buffer::of(&(0..words).map(|i| value(rank, i)).collect::<Vec<_>>());
        transport.seal(&mut message, tag);
        let ticket = transport.exchange(tag, to, Arc::new(message), from, Buffer::new(8 * words)).unwrap();
        let received = transport.wait(ticket).unwrap();
        let wrong = received.values::<u64>().iter().enumerate().find(|&(i, &word)| word != value(from, i));
        assert_eq!(wrong, None, "rank {rank} of {ranks}, from {from}");
    }
}

/// By the clock of this machine: the last to come came before the first to leave.
fn barrier(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    std::thread::sleep(Duration::from_millis(3 * rank as u64));
    let came = now();
    transport.barrier().unwrap();
    let left = now();
    let times = transport.all_gather_v(bytemuck::cast_slice(&[came, left]), &vec![16; ranks]).unwrap();
    let times: Vec<u64> = bytemuck::pod_collect_to_vec(&times);
    let last_came = times.chunks_exact(2).map(|times| times[0]).max();
    let first_left = times.chunks_exact(2).map(|times| times[1]).min();
    assert!(last_came <= first_left, "rank {rank} of {ranks}: {times:?}");
    let gone: Vec<usize> = (0..ranks).filter(|&peer| peer != rank && transport.is_gone(peer)).collect();
    assert!(gone.is_empty(), "rank {rank} of {ranks}: {gone:?} are still here");
}

fn subgroups(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    // Even ranks upwards, odd ones downwards.
    let even = (0..ranks).filter(|rank| rank.is_multiple_of(2)).collect::<Vec<_>>();
    let odd = (0..ranks).rev().filter(|rank| !rank.is_multiple_of(2)).collect::<Vec<_>>();
    for members in [even, odd].into_iter().filter(|members| members.contains(&rank)) {
        let mut group = Subgroup::new(transport, members.clone()).unwrap();
        assert_eq!(members[group.rank()], rank);
        assert_eq!(group.ranks(), members.len());
        let gathered = group.all_gather_v(&[rank as u8], &vec![1; members.len()]).unwrap();
        assert_eq!(gathered, members.iter().map(|&member| member as u8).collect::<Vec<_>>());
    }
    for bad in [vec![], vec![rank, rank], vec![rank, ranks]] {
        assert!(matches!(Subgroup::new(transport, bad), Err(Error::Argument { argument: "members", .. })));
    }
}

fn counters(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let mut before = transport.traffic();
    let mut expect =
        |transport: &dyn Transport, what: &str, sent: usize, received: usize, messages: usize| {
            let now = transport.traffic();
            let found =
                (now.sent - before.sent, now.received - before.received, now.messages - before.messages);
            assert_eq!(
                found,
                (sent as u64, received as u64, messages as u64),
                "{what}: bytes sent, bytes received and messages of rank {rank} of {ranks}"
            );
            before = now;
        };
    let others = ranks - 1;
    let sum_but = |but: usize| (0..ranks).filter(|&of| of != but).map(|of| 5 * of + 1).sum::<usize>();
    let lens: Vec<usize> = (0..ranks).map(|of| 5 * of + 1).collect();
    transport.all_gather_v(&vec![0; 5 * rank + 1], &lens).unwrap();
    let passed_on = if ranks > 1 { sum_but((rank + 1) % ranks) } else { 0 };
    expect(transport, "all-gather", passed_on, sum_but(rank), others);
    transport.all_to_all_v((0..ranks).map(|_| Buffer::new(5 * rank + 1)).collect(), &lens).unwrap();
    expect(transport, "all-to-all", others * (5 * rank + 1), sum_but(rank), others);
    transport.reduce_scatter(&vec![1.0; lens.iter().sum()], &lens).unwrap();
    expect(transport, "reduce-scatter", 4 * sum_but(rank), 4 * others * (5 * rank + 1), others);
    transport.barrier().unwrap();
    expect(transport, "barrier", 0, 0, ranks.next_power_of_two().trailing_zeros() as usize);
}

fn fingerprints(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    Fingerprint::new().with("kv_heads", 8).agree(transport).unwrap();
    let odd = ranks - 1;
    let scale = |rank: usize| if rank == odd { 7 } else { 5 };
    let found = Fingerprint::new().with("kv_heads", 8).with("the scale", scale(rank)).agree(transport);
    if ranks == 1 {
        return assert_eq!(found, Ok(()));
    }
    let peer = if rank == odd { 0 } else { odd };
    let expected = Error::Mismatch { rank, peer, what: "the scale", here: scale(rank), there: scale(peer) };
    assert_eq!(found, Err(expected));
}

fn refusals(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let tag = Tag::new(Operation::Barrier, 0);
    let other = (rank + 1) % ranks;
    for (to, from) in [(rank, other), (other, rank), (ranks, other), (other, ranks)] {
        let result = transport.exchange(tag, to, Buffer::new(0).into(), from, Buffer::new(0));
        assert!(matches!(result, Err(Error::Argument { .. })), "{to}, {from} on rank {rank} of {ranks}");
    }
    assert!(matches!(
        transport.all_gather_v(&[1], &vec![2; ranks]),
        Err(Error::Argument { argument: "own", .. })
    ));
    assert!(transport.all_gather_v(&[1], &[]).is_err());
    assert!(transport.all_to_all_v(vec![], &[]).is_err());
    assert!(transport.reduce_scatter(&[1.0], &vec![1; ranks + 1]).is_err());
}

/// The last rank has no token of one of the sequences, and of another nobody has a multiple of 2P.
fn batch(ranks: usize, seed: u64) -> Contents<bf16> {
    let lens = [(7, 5 * ranks + 3), (0, ranks - 1), (0, 11)];
    Contents::new(spec(4, 2, 16, Mask::Causal), sequences(&lens), seed)
}

fn rings(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let contents = batch(ranks, 1);
    for placement in Placement::ALL {
        for direction in [Direction::PassKv, Direction::PassQ] {
            let case = format!("{placement}, {direction:?}, rank {rank} of {ranks}");
            let shards = Shards::new(contents.sequences.clone(), placement, ranks).unwrap();
            let plan = RingPlan::new(contents.spec, shards.clone()).unwrap().passing(direction);
            plan.fingerprint::<bf16, bf16>().agree(transport).unwrap();
            let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
            let before = transport.traffic().sent;
            let output = plan.run(rows.inputs(), transport).unwrap();
            let sent = transport.traffic().sent - before;
            assert_eq!(sent, plan.bytes_sent(rank, 2, 2), "{case}: bytes");
            contents.check_rank(&case, &shards.queries(rank), &output);
        }
    }
}

fn ulysses(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let lens = [(4, 3 * ranks + 2), (0, 1)];
    let contents = Contents::<bf16>::new(spec(2 * ranks, ranks, 16, Mask::Causal), sequences(&lens), 2);
    for placement in Placement::ALL {
        let case = format!("{placement}, rank {rank} of {ranks}");
        let shards = Shards::new(contents.sequences.clone(), placement, ranks).unwrap();
        let plan = UlyssesPlan::new(contents.spec, shards.clone()).unwrap();
        plan.fingerprint::<bf16, bf16>().agree(transport).unwrap();
        let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
        let before = transport.traffic().sent;
        let output = plan.run(rows.inputs(), transport).unwrap();
        assert_eq!(transport.traffic().sent - before, plan.bytes_sent(rank, 2, 2), "{case}: bytes");
        contents.check_rank(&case, &shards.queries(rank), &output);
    }
}

fn hybrids(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let lens = [(3, 4 * ranks + 1), (0, 6)];
    let contents = Contents::<bf16>::new(spec(2 * ranks, ranks, 8, Mask::Causal), sequences(&lens), 3);
    let dealt =
        |group: &usize| ranks.is_multiple_of(*group) && local_heads(&contents.spec.shape, *group, 0).is_ok();
    let directions = [Direction::PassKv, Direction::PassQ];
    let groups = (1..=ranks).filter(dealt);
    for (group, direction) in groups.flat_map(|group| directions.map(|direction| (group, direction))) {
        let case = format!("groups of {group}, {direction:?}, rank {rank} of {ranks}");
        let groups = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks / group).unwrap();
        let plan = HybridPlan::new(contents.spec, groups, group).unwrap().passing(direction);
        plan.fingerprint::<bf16, bf16>().agree(transport).unwrap();
        let rows = contents.rows(&plan.queries(rank), &plan.keys(rank));
        let before = transport.traffic().sent;
        let output = plan.run(rows.inputs(), transport).unwrap();
        assert_eq!(transport.traffic().sent - before, plan.bytes_sent(rank, 2, 2).unwrap(), "{case}: bytes");
        contents.check_rank(&case, &plan.queries(rank), &output);
    }
}

/// A stage y = W₂ relu(W₁ x), the inner dimension dealt to ranks, in whole numbers: the order of sums does not matter.
fn megatron_stages(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let (width, inner) = (6, 2 * ranks);
    let mut rng = fastrand::Rng::with_seed(5);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.i32(-4..=4) as f32).collect() };
    let (w1, w2) = (random(inner * width), random(width * inner));
    let part = |x: &[f32], channels: std::ops::Range<usize>| -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            for channel in channels.clone() {
                let h: f32 = x.iter().zip(&w1[channel * width..]).map(|(x, w)| x * w).sum();
                y.iter_mut().enumerate().for_each(|(i, y)| *y += w2[i * inner + channel] * h.max(0.0));
            }
        }
        y
    };
    for placement in Placement::ALL {
        let shards = Shards::new(sequences(&[(0, 11), (3, 5)]), placement, ranks).unwrap();
        let x = random(shards.new_tokens() * width);
        let rows = shards.take(rank, &x, width).unwrap();
        let channels = megatron::part("the inner dimension", inner, ranks, rank).unwrap();
        let before = transport.traffic().sent;
        let compute = |x: &[f32]| Ok::<_, Error>(part(x, channels));
        let y = megatron::stage(&shards, &rows, width, transport, compute).unwrap();
        let sent = transport.traffic().sent - before;
        assert_eq!(sent, megatron::bytes_sent(&shards, rank, width), "{placement}: bytes of rank {rank}");
        let whole = shards.take(rank, &part(&x, 0..inner), width).unwrap();
        assert_eq!(y, whole, "{placement}, rank {rank} of {ranks}");
    }
}

/// At every boundary, with a short prefill in between.
fn pauses(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let (long, short) = (batch(ranks, 4), batch(ranks, 5));
    let shards = Shards::new(long.sequences.clone(), Placement::Zigzag, ranks).unwrap();
    let queries = shards.queries(rank);
    let [rows, short_rows] = [&long, &short].map(|contents| contents.rows(&queries, &shards.keys(rank)));
    let short_plan = RingPlan::new(short.spec, shards.clone()).unwrap();
    for direction in [Direction::PassKv, Direction::PassQ] {
        let plan = RingPlan::new(long.spec, shards.clone()).unwrap().passing(direction);
        let whole = plan.run(rows.inputs(), transport).unwrap();
        for boundary in 0..=ranks {
            let case = format!("{direction:?}, paused after {boundary} steps, rank {rank} of {ranks}");
            let mut ring = Ring::new(&plan, rank, rows.inputs()).unwrap();
            for _ in 0..boundary {
                ring.step(transport, |_| {}).unwrap();
            }
            ring.pause_together(transport, |_| {}).unwrap();
            assert_eq!(ring.steps_done(), boundary, "{case}");
            let between = short_plan.run(short_rows.inputs(), transport).unwrap();
            short.check_rank(&case, &queries, &between);
            while !ring.is_done() {
                ring.step(transport, |_| {}).unwrap();
            }
            assert_eq!(ring.finish(transport).unwrap(), whole, "{case}");
        }
    }
}

/// On the transport, and in a group of all its ranks, whose words go by the transport's own route.
fn pauses_apart(transport: &mut dyn Transport) {
    pause_apart("all ranks", transport);
    let members = (0..transport.ranks()).rev().collect();
    pause_apart("a group of all ranks", &mut Subgroup::new(transport, members).unwrap());
}

fn pause_apart(group: &str, transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let contents = batch(ranks, 7);
    let shards = Shards::new(contents.sequences.clone(), Placement::Zigzag, ranks).unwrap();
    let queries = shards.queries(rank);
    let rows = contents.rows(&queries, &shards.keys(rank));
    // Neighbours differ by one step at most: a rank that goes on has had its neighbours' messages of the step before.
    type Begun = fn(usize, usize) -> usize;
    let cases: [(&str, Begun); 3] = [
        ("rank 1 has begun", |rank, _| usize::from(rank == 1)),
        ("rank 1 is a step ahead", |rank, _| 1 + usize::from(rank == 1)),
        ("a step more with every rank", |rank, ranks| rank.min(ranks - rank)),
    ];
    for direction in [Direction::PassKv, Direction::PassQ] {
        let plan = RingPlan::new(contents.spec, shards.clone()).unwrap().passing(direction);
        let whole = plan.run(rows.inputs(), transport).unwrap();
        for (name, begun) in cases {
            let case = format!("{group}, {direction:?}, {name}, rank {rank} of {ranks}");
            let mut ring = Ring::new(&plan, rank, rows.inputs()).unwrap();
            for _ in 0..begun(rank, ranks) {
                ring.step(transport, |_| {}).unwrap();
            }
            ring.pause_together(transport, |_| {}).unwrap();
            assert_eq!(Some(ring.steps_done()), (0..ranks).map(|rank| begun(rank, ranks)).max(), "{case}");
            let between = plan.run(rows.inputs(), transport).unwrap();
            assert_eq!(between, whole, "{case}: a ring in between");
            while !ring.is_done() {
                ring.step(transport, |_| {}).unwrap();
            }
            assert_eq!(ring.finish(transport).unwrap(), whole, "{case}");
        }
    }
}

fn gives_up(transport: &mut dyn Transport) {
    let (rank, ranks) = place(transport);
    let contents = batch(ranks, 6);
    let shards = Shards::new(contents.sequences.clone(), Placement::Striped, ranks).unwrap();
    let rows = contents.rows(&shards.queries(rank), &shards.keys(rank));
    for direction in [Direction::PassKv, Direction::PassQ] {
        let plan = RingPlan::new(contents.spec, shards.clone()).unwrap().passing(direction);
        let mut cancelled = Ring::new(&plan, rank, rows.inputs()).unwrap();
        cancelled.step(transport, |_| {}).unwrap();
        cancelled.pause(transport).unwrap();
        drop(cancelled);
        let output = plan.run(rows.inputs(), transport).unwrap();
        contents.check_rank(
            &format!("{direction:?}, rank {rank} of {ranks}"),
            &shards.queries(rank),
            &output,
        );
    }
}

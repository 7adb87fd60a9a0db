//! The wire: what arrives is what was sent, bit for bit, or an error.

mod common;

use std::io::{ErrorKind, Read};

use attention::DType;
use attention::testing::Rng;
use common::{Tokens, config, kv, out_of_pages, state};
use homomorphic_quant::page::PageLayout;
use homomorphic_quant::wire::{Header, Model, Receiver, Request, Sender, refuse};
use homomorphic_quant::{
    Bits, BitsOverride, Cache, Capacity, Config, Error, Layout, OpenBlock, Rounding, Sequence,
};

const TAG: u64 = 0x1234_5678_9abc_def0;

/// The layers of one node.
struct Node {
    caches: Vec<Cache>,
    sequences: Vec<Sequence>,
}

/// A model of some layers and heads, on one node or cut between several by heads.
#[derive(Clone)]
struct Setup {
    config: Config,
    model: Model,
    tokens: usize,
    page_layout: PageLayout,
}

impl Setup {
    fn new(config: Config, layers: u32, kv_heads: u32, tokens: usize) -> Self {
        let model = Model { layers, kv_heads, qk_dim: 16, v_dim: 32 };
        Setup { config, model, tokens, page_layout: PageLayout::Canonical }
    }

    fn header(&self) -> Header {
        Header {
            tag: TAG,
            tokens: self.tokens as u64,
            model: self.model,
            config: self.config.clone(),
            page_layout: self.page_layout,
        }
    }

    /// Empty caches for heads `first..first + heads` of every layer.
    fn empty(&self, first: u32, heads: usize) -> Vec<Cache> {
        let shape = kv(heads, self.model.qk_dim as usize, self.model.v_dim as usize);
        let capacity = Capacity::of_tokens(&self.config, 1, self.tokens);
        (0..self.model.layers)
            .map(|layer| Cache::shard(&self.config, layer, first, shape, capacity, self.page_layout).unwrap())
            .collect()
    }

    /// A node that has computed its heads.
    fn node(&self, first: u32, heads: usize) -> Node {
        let mut caches = self.empty(first, heads);
        let all = self.model.kv_heads as usize;
        let sequences = caches
            .iter_mut()
            .map(|cache| {
                let mut sequence = cache.sequence();
                let shape = kv(all, self.model.qk_dim as usize, self.model.v_dim as usize);
                let whole = Tokens::new(shape, self.tokens, u64::from(cache.layer()));
                let cut = |x: &[f32], dim: usize| -> Vec<f32> {
                    x.chunks_exact(all * dim)
                        .flat_map(|t| &t[first as usize * dim..][..heads * dim])
                        .copied()
                        .collect()
                };
                let k = cut(&whole.k, shape.qk_dim);
                let v = cut(&whole.v, shape.v_dim);
                let part = Tokens { shape: kv(heads, shape.qk_dim, shape.v_dim), tokens: self.tokens, k, v };
                part.append(cache, &mut sequence, 0, self.tokens);
                sequence
            })
            .collect();
        Node { caches, sequences }
    }

    fn send(&self, node: &Node, wanted: impl Fn(u32, u32) -> bool) -> Vec<u8> {
        let mut sender = Sender::new(Vec::new(), self.header()).unwrap();
        for (cache, sequence) in node.caches.iter().zip(&node.sequences) {
            for kv_head in cache.first_kv_head()..cache.first_kv_head() + cache.shape().kv_heads as u32 {
                if wanted(cache.layer(), kv_head) {
                    sender.segment(cache, sequence, kv_head).unwrap();
                }
            }
        }
        sender.finish().unwrap()
    }

    fn receiver(&self, caches: &mut [Cache]) -> Receiver {
        let caches: Vec<&mut Cache> = caches.iter_mut().collect();
        Receiver::new(TAG, self.model, &caches, self.tokens).unwrap()
    }
}

fn receive(receiver: &mut Receiver, stream: impl Read, caches: &mut [Cache]) -> Result<bool, Error> {
    receiver.receive(stream, &mut caches.iter_mut().collect::<Vec<_>>())
}

fn missing(receiver: &Receiver, caches: &mut [Cache]) -> Request {
    receiver.missing(&caches.iter_mut().collect::<Vec<_>>())
}

fn assert_same(found: &[Cache], sequences: &[Sequence], expected: &Node, case: &str) {
    let pairs = found.iter().zip(sequences).zip(expected.caches.iter().zip(&expected.sequences));
    for ((cache, sequence), (other, expected)) in pairs {
        assert_eq!(sequence.tokens(), expected.tokens(), "{case}");
        assert_eq!(state(cache, sequence), state(other, expected), "{case}, layer {}", cache.layer());
    }
}

#[test]
fn what_arrives_is_what_was_sent() {
    let mut cases = 0;
    for (bits, partition, sinks, tokens) in
        [(2, 64, 4, 300), (4, 32, 0, 96), (8, 32, 4, 3), (2, 128, 4, 131), (2, 32, 5, 5 + 64), (4, 32, 4, 0)]
    {
        for layout in [Layout::PerChannelKey, Layout::PerTokenKey] {
            for dtype in [DType::F16, DType::BF16] {
                let mixed = BitsOverride { layer: Some(1), kv_head: Some(2), k: Some(Bits::Eight), v: None };
                let config = config(bits, bits, partition, sinks)
                    .with_layout(layout)
                    .with_dtype(dtype)
                    .unwrap()
                    .with_cached_sums(cases % 2 == 0)
                    .with_override(mixed);
                let setup = Setup::new(config, 2, 3, tokens);
                let name = format!("{bits}-bit Π{partition} S{sinks} {tokens} tokens {layout:?} {dtype}");
                let sender = setup.node(0, 3);
                let stream = setup.send(&sender, |_, _| true);
                // The payload is what the tables say, and nothing else: frames and checksums are known.
                let payload: usize = sender.caches.iter().map(|cache| cache.content_bytes(tokens)).sum();
                assert_eq!(stream.len(), setup.header().bytes() + 6 * (28 + 4) + 28 + payload, "{name}");

                let mut caches = setup.empty(0, 3);
                let mut receiver = setup.receiver(&mut caches);
                assert!(receive(&mut receiver, &stream[..], &mut caches).unwrap(), "{name}");
                let sequences = receiver.finish().unwrap_or_else(|_| panic!("{name}: not complete"));
                assert_same(&caches, &sequences, &sender, &name);
                cases += 1;
            }
        }
    }
}

/// Nodes cut the heads differently, and stream layer by layer.
#[test]
fn differently_sharded_nodes_can_talk() {
    let stochastic = config(2, 4, 32, 4).with_rounding(Rounding::Stochastic { seed: 5 });
    let setup = Setup::new(stochastic, 3, 6, 150);
    for (senders, receivers) in [(1, 2), (2, 1), (2, 3), (3, 2), (1, 6), (6, 1)] {
        let name = format!("{senders} senders, {receivers} receivers");
        let cut = |parts: u32| (0..parts).map(move |part| (part * 6 / parts, 6 / parts as usize));
        let streams: Vec<Vec<u8>> = cut(senders)
            .map(|(first, heads)| {
                let node = setup.node(first, heads);
                let mut sender = Sender::new(Vec::new(), setup.header()).unwrap();
                for (cache, sequence) in node.caches.iter().zip(&node.sequences) {
                    sender.layer(cache, sequence).unwrap();
                }
                sender.finish().unwrap()
            })
            .collect();
        for (first, heads) in cut(receivers) {
            let mut caches = setup.empty(first, heads);
            let mut receiver = setup.receiver(&mut caches);
            for stream in &streams {
                receive(&mut receiver, &stream[..], &mut caches).unwrap();
            }
            assert!(receiver.is_complete(), "{name}");
            let sequences = receiver.finish().unwrap_or_else(|_| panic!("{name}"));
            assert_same(&caches, &sequences, &setup.node(first, heads), &name);
        }
    }
}

/// Every page layout can be sent and is converted on arrival; the state is the same.
#[test]
fn page_layouts_are_transcoded() {
    for &from in PageLayout::ALL {
        for &to in PageLayout::ALL {
            // Dims that every layout takes.
            let mut setup = Setup::new(config(2, 2, 64, 4), 1, 2, 200);
            (setup.model.qk_dim, setup.model.v_dim) = (64, 64);
            let sender = Setup { page_layout: from, ..setup.clone() };
            let node = sender.node(0, 2);
            for wire in [from, to] {
                let stream = Setup { page_layout: wire, ..setup.clone() }.send(&node, |_, _| true);
                let target = Setup { page_layout: to, ..setup.clone() };
                let mut caches = target.empty(0, 2);
                let mut receiver = target.receiver(&mut caches);
                assert!(receive(&mut receiver, &stream[..], &mut caches).unwrap());
                let sequences = receiver.finish().unwrap_or_else(|_| panic!("{from:?} {to:?}"));
                let expected = target.node(0, 2);
                assert_same(&caches, &sequences, &expected, &format!("{from:?} by {wire:?} to {to:?}"));
            }
        }
    }
}

/// A connection that is cut anywhere: what is whole stays, the rest is asked for again.
#[test]
fn a_cut_stream_is_resumed() {
    let setup = Setup::new(config(2, 2, 32, 4), 2, 2, 80);
    let node = setup.node(0, 2);
    let stream = setup.send(&node, |_, _| true);
    for cut in (0..stream.len()).step_by(7).chain([stream.len() - 1]) {
        let mut caches = setup.empty(0, 2);
        let mut receiver = setup.receiver(&mut caches);
        let error = receive(&mut receiver, &stream[..cut], &mut caches).unwrap_err();
        assert!(
            matches!(error, Error::Stream { kind: ErrorKind::UnexpectedEof, .. }),
            "cut at {cut}: {error}"
        );
        // The request travels too.
        let mut bytes = Vec::new();
        missing(&receiver, &mut caches).write(&mut bytes).unwrap();
        let request = Request::read(&bytes[..], 100).unwrap();
        assert_eq!(request.tag, TAG);
        let rest = setup.send(&node, |layer, kv_head| request.segments.contains(&(layer, kv_head)));
        if cut > stream.len() / 2 {
            assert!(rest.len() < stream.len(), "cut at {cut}: the rest is not everything");
        }
        assert!(receive(&mut receiver, &rest[..], &mut caches).unwrap(), "cut at {cut}");
        let sequences = receiver.finish().unwrap_or_else(|_| panic!("cut at {cut}"));
        assert_same(&caches, &sequences, &node, &format!("cut at {cut}"));
    }
}

/// Reads as far as a header and fails the test when more is asked for.
struct HeaderOnly<'a> {
    stream: &'a [u8],
    left: usize,
}

impl Read for HeaderOnly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        assert!(self.left >= buffer.len(), "payload was read before the refusal");
        self.left -= buffer.len();
        self.stream.read(buffer)
    }
}

#[test]
fn another_configuration_is_refused_before_any_payload() {
    let base = || config(2, 4, 64, 4);
    let setup = Setup::new(base(), 2, 2, 140);
    let with = |config: Config| Setup { config, ..setup.clone() };
    let model = |change: &dyn Fn(&mut Model)| {
        let mut other = setup.clone();
        change(&mut other.model);
        other
    };
    let only = BitsOverride { layer: Some(1), kv_head: Some(1), k: Some(Bits::Eight), v: None };
    let stochastic = |seed| base().with_rounding(Rounding::Stochastic { seed });
    let cases: Vec<(&str, Setup, Setup)> = vec![
        ("partition", with(config(2, 4, 32, 4)), setup.clone()),
        ("sinks", with(config(2, 4, 64, 5)), setup.clone()),
        ("bits of K/V", with(config(4, 4, 64, 4)), setup.clone()),
        ("bits of K/V", with(config(2, 2, 64, 4)), setup.clone()),
        ("bits of K/V", with(base().with_override(only)), setup.clone()),
        ("dtype", with(base().with_dtype(DType::F16).unwrap()), setup.clone()),
        ("axes", with(base().with_layout(Layout::PerTokenKey)), setup.clone()),
        ("sums", with(base().with_cached_sums(false)), setup.clone()),
        ("open block", with(base().with_open_block(OpenBlock::Requantized)), setup.clone()),
        ("rounding", with(stochastic(1)), setup.clone()),
        ("seed", with(stochastic(1)), with(stochastic(2))),
        ("layers", model(&|model| model.layers = 3), setup.clone()),
        ("KV heads", model(&|model| model.kv_heads = 1), setup.clone()),
        ("key dim", model(&|model| model.qk_dim = 32), setup.clone()),
        ("value dim", model(&|model| model.v_dim = 16), setup.clone()),
    ];
    for (field, sender, receiver) in cases {
        let node = sender.node(0, sender.model.kv_heads as usize);
        let stream = sender.send(&node, |_, _| true);
        let mut caches = receiver.empty(0, 2);
        let mut target = receiver.receiver(&mut caches);
        let reader = HeaderOnly { stream: &stream, left: sender.header().bytes() };
        match receive(&mut target, reader, &mut caches) {
            Err(Error::Mismatch { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
        assert!(caches.iter().all(|cache| cache.usage().bytes() == 0), "{field}: nothing was taken");
    }

    // Another sequence, one that the sender does not know, one that is too long, and one that does not fit.
    let node = setup.node(0, 2);
    let mut header = setup.header();
    header.tag = 7;
    let mut unknown = Vec::new();
    refuse(&mut unknown, &header).unwrap();
    let mut other = Sender::new(Vec::new(), header).unwrap();
    other.layer(&node.caches[0], &node.sequences[0]).unwrap();
    let long = Setup { tokens: 141, ..setup.clone() };
    for (case, stream) in [
        ("unknown tag", unknown),
        ("other tag", other.finish().unwrap()),
        ("too long", long.send(&long.node(0, 2), |_, _| true)),
    ] {
        let mut caches = setup.empty(0, 2);
        let mut receiver = setup.receiver(&mut caches);
        let reader = HeaderOnly { stream: &stream, left: setup.header().bytes() };
        let error = receive(&mut receiver, reader, &mut caches).unwrap_err();
        match case {
            "too long" => assert!(matches!(error, Error::Argument { argument: "tokens", .. }), "{error}"),
            _ => assert!(matches!(error, Error::Mismatch { field: "tag", .. }), "{case}: {error}"),
        }
    }
    let shape = kv(2, 16, 32);
    let small = Capacity { blocks: 1, sequences: 1 };
    let mut caches: Vec<Cache> =
        (0..2).map(|layer| Cache::new(&setup.config, layer, shape, small).unwrap()).collect();
    let mut receiver = setup.receiver(&mut caches);
    let stream = setup.send(&node, |_, _| true);
    let reader = HeaderOnly { stream: &stream, left: setup.header().bytes() };
    let error = receive(&mut receiver, reader, &mut caches).unwrap_err();
    assert!(out_of_pages(&error), "{error}");
    assert!(caches.iter().all(|cache| cache.usage().bytes() == 0));
}

/// Any flipped bit and any missing tail is an error; nothing is handed over.
#[test]
fn every_flipped_bit_is_noticed() {
    let setup = Setup::new(config(2, 2, 32, 4), 1, 1, 40);
    let node = setup.node(0, 1);
    let stream = setup.send(&node, |_, _| true);
    let mut caches = setup.empty(0, 1);
    for bit in 0..stream.len() * 8 {
        let mut damaged = stream.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let mut receiver = setup.receiver(&mut caches);
        let result = receive(&mut receiver, &damaged[..], &mut caches);
        assert!(result.is_err(), "bit {} of byte {}", bit % 8, bit / 8);
        receiver.abort(&mut caches.iter_mut().collect::<Vec<_>>()).unwrap();
        assert_eq!(caches[0].usage().bytes(), 0);
    }
}

/// Puts valid checksums into a damaged stream, as far as its lengths still lead to them.
fn repair(stream: &mut [u8], header: usize, payload: usize) {
    let mut at = 0;
    for len in [64, header - 72, 24, payload, 24] {
        let Some(part) = stream.get(at..at + len) else { return };
        let crc = crc32fast::hash(part).to_le_bytes();
        let Some(place) = stream.get_mut(at + len..at + len + 4) else { return };
        place.copy_from_slice(&crc);
        at += len + 4;
    }
}

/// A million damaged streams: an error or the sender's state, never a panic, a hang or an allocation beyond the pools.
#[test]
fn a_million_damaged_streams() {
    let setup = Setup::new(config(2, 2, 32, 4), 1, 1, 38);
    let node = setup.node(0, 1);
    let stream = setup.send(&node, |_, _| true);
    let payload = node.caches[0].content_bytes(38);
    let begin = std::time::Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let counts: Vec<[u32; 3]> = std::thread::scope(|scope| {
        let worker = |seed: u64| {
            let (setup, stream) = (&setup, &stream);
            move || {
                let mut rng = Rng::new(seed);
                let mut caches = setup.empty(0, 1);
                let mut counts = [0; 3];
                let mut damaged = Vec::new();
                for _ in 0..1_000_000 / threads + 1 {
                    damaged.clear();
                    damaged.extend_from_slice(stream);
                    for _ in 0..1 + rng.below(3) {
                        // Half of the damage goes to headers and frames, where decisions are made.
                        let area = if rng.below(2) == 0 { damaged.len() } else { damaged.len().min(105) };
                        let at = rng.below(area);
                        match rng.below(6) {
                            0 => damaged[at] ^= 1 << rng.below(8),
                            1 => damaged[at] = rng.bits() as u8,
                            2 => damaged[at] = [0, 1, 0x7f, 0x80, 0xff][rng.below(5)],
                            3 => damaged.truncate(at.max(1)),
                            4 => {
                                let n = rng.below(9).min(damaged.len() - at);
                                damaged[at..at + n].fill(rng.bits() as u8);
                            }
                            _ => damaged.insert(at, rng.bits() as u8),
                        }
                    }
                    let repaired = rng.below(2) == 0;
                    if repaired {
                        repair(&mut damaged, setup.header().bytes(), payload);
                    }
                    let mut receiver = setup.receiver(&mut caches);
                    match receive(&mut receiver, &damaged[..], &mut caches) {
                        Ok(complete) => {
                            counts[0] += 1;
                            assert!(complete == receiver.is_complete());
                            // Only a repaired checksum, or damage past the end, can get through.
                            assert!(repaired || damaged.starts_with(stream), "seed {seed}");
                        }
                        Err(Error::Mismatch { .. } | Error::Argument { .. }) => counts[1] += 1,
                        Err(_) => counts[2] += 1,
                    }
                    receiver.abort(&mut caches.iter_mut().collect::<Vec<_>>()).unwrap();
                    assert_eq!(caches[0].usage().bytes(), 0, "seed {seed}: pages leaked");
                }
                counts
            }
        };
        let workers: Vec<_> = (0..threads as u64).map(|seed| scope.spawn(worker(seed))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let [taken, refused, broken] = counts.iter().fold([0; 3], |mut sum, counts| {
        sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        sum
    });
    println!("{taken} taken, {refused} refused, {broken} broken in {:?}", begin.elapsed());
    assert!(taken > 10_000 && refused > 10_000 && broken > 100_000, "{taken} {refused} {broken}");
}

#[test]
fn requests_are_checked() {
    let request = Request { tag: 3, segments: vec![(0, 1), (7, 2)] };
    let mut bytes = Vec::new();
    request.write(&mut bytes).unwrap();
    assert_eq!(Request::read(&bytes[..], 2).unwrap(), request);
    assert!(matches!(Request::read(&bytes[..], 1), Err(Error::Malformed { field: "count", .. })));
    for len in 0..bytes.len() {
        assert!(matches!(Request::read(&bytes[..len], 2), Err(Error::Stream { .. })), "{len} bytes");
    }
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Request::read(&damaged[..], 2).is_err(), "bit {bit}");
    }
}

#[test]
fn a_sender_refuses_what_its_header_does_not_say() {
    let setup = Setup::new(config(2, 2, 32, 4), 2, 4, 40);
    let node = setup.node(2, 2);
    let sender = |header| Sender::new(Vec::new(), header).unwrap();
    let (cache, sequence) = (&node.caches[1], &node.sequences[1]);
    assert!(sender(setup.header()).segment(cache, sequence, 2).is_ok());
    let shorter = Header { tokens: 39, ..setup.header() };
    let fewer = Header { model: Model { layers: 1, ..setup.model }, ..setup.header() };
    let wider = Header { config: config(4, 2, 32, 4), ..setup.header() };
    for (case, header, kv_head, named) in [
        ("a head of another node", setup.header(), 1, "kv_head"),
        ("past the model", setup.header(), 4, "kv_head"),
        ("another length", shorter, 2, "sequence"),
        ("a layer too many", fewer, 2, "kv_head"),
        ("another width", wider, 2, "cache"),
    ] {
        match sender(header).segment(cache, sequence, kv_head) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named, "{case}"),
            other => panic!("{case}: {other:?}"),
        }
    }
}

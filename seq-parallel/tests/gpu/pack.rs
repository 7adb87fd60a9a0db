//! Messages packed and unpacked on the device: equal, byte for byte, to what plain loops make of the same tensors.

use attention::{DType, HeadShape};
use cuda::status::Fault;
use emulator::rig::Rig;
use half::bf16;
use seq_parallel::gpu::{Pack, PackArgs, PackPlan, Rows};
use seq_parallel::placement::{Placement, Shards};
use seq_parallel::ulysses::local_heads;

use seq_parallel::testing::sequences;

emulator::device_test!(
    tokens_to_heads_and_back,
    blocks_are_keys_then_values,
    shards_are_taken_and_put,
    copies_outside_their_buffers_are_skipped,
);

fn bytes<T: bytemuck::Pod>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// Runs a plan on these sources; what it does not write is 0xff.
fn run<R: Rig>(rig: &R, plan: &PackPlan, sources: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let (destinations, fault) = run_copies(rig, plan, plan.copies(), sources);
    assert_eq!(fault, None, "on {}", rig.name());
    destinations
}

fn run_copies<R: Rig>(
    rig: &R,
    plan: &PackPlan,
    copies: &[cuda::params::PackCopy],
    sources: &[Vec<u8>],
) -> (Vec<Vec<u8>>, Option<Fault>) {
    // As words of 16 bytes, so that host memory is aligned as device memory is.
    let padded = |bytes: &[u8]| -> Vec<u128> {
        let mut words = vec![0u128; bytes.len().div_ceil(16)];
        bytemuck::cast_slice_mut::<u128, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
        words
    };
    let sizes: Vec<usize> = sources.iter().map(Vec::len).collect();
    assert_eq!(sizes, plan.sources());
    let kernel = Pack::prepare(rig.device(), plan).unwrap();
    let copies = rig.upload(copies);
    let uploaded: Vec<_> = sources.iter().map(|source| rig.upload(&padded(source))).collect();
    let mut written: Vec<_> =
        plan.destinations().iter().map(|bytes| rig.poisoned::<u128>(bytes.div_ceil(16))).collect();
    let mut status = rig.zeroed::<u64>(1);
    {
        let sources: Vec<_> = uploaded.iter().map(|source| rig.view(source).cast::<u8>()).collect();
        let mut destinations: Vec<_> =
            written.iter_mut().map(|destination| rig.view_mut(destination).cast::<u8>()).collect();
        let args = PackArgs {
            copies: &rig.view(&copies),
            sources: &sources,
            destinations: &mut destinations,
            status: rig.view_mut(&mut status),
        };
        kernel.run(rig.queue(), args).unwrap();
    }
    let destinations = written
        .iter()
        .zip(plan.destinations())
        .map(|(words, &len)| bytemuck::cast_slice::<u128, u8>(&rig.download(words))[..len].to_vec())
        .collect();
    (destinations, Fault::decode(rig.download(&status)[0]))
}

/// The parts of each rank's message in what all ranks sent, for one receiver, as an all-to-all delivers them.
fn all_to_all(sent: &[Vec<u8>], lens: &[Vec<usize>], receiver: usize) -> Vec<u8> {
    let part = |(message, lens): (&Vec<u8>, &Vec<usize>)| {
        let start: usize = lens[..receiver].iter().sum();
        message[start..start + lens[receiver]].to_vec()
    };
    sent.iter().zip(lens).flat_map(part).collect()
}

/// A value that says where it belongs.
fn value(tensor: usize, token: usize, head: usize, channel: usize) -> bf16 {
    bf16::from_bits(((tensor * 7 + token * 61 + head * 13 + channel) % 30_000) as u16)
}

fn tokens_to_heads_and_back<R: Rig>(rig: &R) {
    let types = (DType::BF16, DType::BF16);
    // Ranks fewer than KV heads, as many, and more, where ranks share a KV head.
    for ((q_heads, kv_heads), ranks) in [((8, 4), 2), ((6, 3), 3), ((8, 2), 4)] {
        let shape = HeadShape::new(q_heads, kv_heads, 16, 8).unwrap();
        let rows: Vec<Rows> = (0..ranks).map(|rank| Rows { queries: rank * 3 % 5, keys: 7 + rank }).collect();
        let first = |count: fn(&Rows) -> usize, rank: usize| rows[..rank].iter().map(count).sum::<usize>();
        let tensor = |which: usize, rank: usize, tokens: usize, heads: usize, dim: usize, first: usize| {
            let _ = rank;
            let mut values = Vec::new();
            for (token, head, channel) in (0..tokens)
                .flat_map(|token| (0..heads).flat_map(move |head| (0..dim).map(move |c| (token, head, c))))
            {
                values.push(value(which, first + token, head, channel));
            }
            values
        };
        let (mut sent, mut lens) = (Vec::new(), Vec::new());
        for (rank, own) in rows.iter().enumerate() {
            let (q0, k0) = (first(|rows| rows.queries, rank), first(|rows| rows.keys, rank));
            let sources = [
                bytes(&tensor(0, rank, own.queries, q_heads, 16, q0)),
                bytes(&tensor(1, rank, own.keys, kv_heads, 16, k0)),
                bytes(&tensor(2, rank, own.keys, kv_heads, 8, k0)),
            ];
            let plan = PackPlan::to_heads(&shape, *own, ranks, types).unwrap();
            sent.push(run(rig, &plan, &sources).remove(0));
            lens.push(plan.messages().to_vec());
        }
        let (all_queries, all_keys) = (first(|rows| rows.queries, ranks), first(|rows| rows.keys, ranks));
        for rank in 0..ranks {
            let plan = PackPlan::from_tokens(&shape, &rows, rank, types).unwrap();
            let received = all_to_all(&sent, &lens, rank);
            let expected: Vec<usize> = lens.iter().map(|lens| lens[rank]).collect();
            assert_eq!(plan.messages(), expected);
            let found = run(rig, &plan, &[received]);
            let heads = local_heads(&shape, ranks, rank).unwrap();
            for (which, part, tokens, dim) in
                [(0, &heads.q, all_queries, 16), (1, &heads.kv, all_keys, 16), (2, &heads.kv, all_keys, 8)]
            {
                let mut expected = Vec::new();
                for token in 0..tokens {
                    for head in part.clone() {
                        expected.extend((0..dim).map(|channel| value(which, token, head, channel)));
                    }
                }
                assert_eq!(
                    found[which],
                    bytes(&expected),
                    "tensor {which} of rank {rank} of {ranks} on {}",
                    rig.name()
                );
            }
        }

        // Outputs and LSEs go back.
        let queries: Vec<usize> = rows.iter().map(|rows| rows.queries).collect();
        let number = |token: usize, head: usize, channel: usize| (token * 1000 + head * 20 + channel) as f32;
        let (mut sent, mut lens) = (Vec::new(), Vec::new());
        for rank in 0..ranks {
            let heads = local_heads(&shape, ranks, rank).unwrap().q;
            let (mut out, mut lse) = (Vec::new(), Vec::new());
            for token in 0..all_queries {
                for head in heads.clone() {
                    out.extend((0..8).map(|channel| number(token, head, channel)));
                    lse.push(-number(token, head, 0));
                }
            }
            let plan = PackPlan::to_tokens(&shape, &queries).unwrap();
            sent.push(run(rig, &plan, &[bytes(&out), bytes(&lse)]).remove(0));
            lens.push(plan.messages().to_vec());
        }
        for rank in 0..ranks {
            let plan = PackPlan::from_heads(&shape, queries[rank], ranks).unwrap();
            let found = run(rig, &plan, &[all_to_all(&sent, &lens, rank)]);
            let (mut out, mut lse) = (Vec::new(), Vec::new());
            let start: usize = queries[..rank].iter().sum();
            for token in start..start + queries[rank] {
                for head in 0..q_heads {
                    out.extend((0..8).map(|channel| number(token, head, channel)));
                    lse.push(-number(token, head, 0));
                }
            }
            assert_eq!(found, [bytes(&out), bytes(&lse)], "rank {rank} of {ranks} on {}", rig.name());
        }
    }
}

fn blocks_are_keys_then_values<R: Rig>(rig: &R) {
    let shape = HeadShape::new(4, 2, 64, 128).unwrap();
    for tokens in [0, 1, 77] {
        let k: Vec<u16> = (0..tokens * 2 * 64).map(|i| i as u16).collect();
        let v: Vec<u16> = (0..tokens * 2 * 128).map(|i| 50_000 - i as u16).collect();
        let plan = PackPlan::block(&shape, tokens, DType::BF16).unwrap();
        assert_eq!(plan.bytes_moved(), (tokens * 2 * 192 * 2) as u64);
        let block = run(rig, &plan, &[bytes(&k), bytes(&v)]);
        assert_eq!(block, [[bytes(&k), bytes(&v)].concat()], "{tokens} tokens on {}", rig.name());
    }
}

/// Rows of 4, 12 and 256 bytes: in chunks of 4, and of 16.
fn shards_are_taken_and_put<R: Rig>(rig: &R) {
    for (placement, width) in
        Placement::ALL.into_iter().flat_map(|placement| [1, 3, 64].map(|width| (placement, width)))
    {
        let lens = sequences(&[(4, 13), (0, 1), (0, 30), (9, 0)]);
        let shards = Shards::new(lens, placement, 3).unwrap();
        let packed: Vec<u32> = (0..44 * width as u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        let mut again = vec![0xffu8; packed.len() * 4];
        for rank in 0..3 {
            let case = format!("{placement}, rank {rank}, {width} words on {}", rig.name());
            let taken = run(rig, &PackPlan::take(&shards, rank, width * 4).unwrap(), &[bytes(&packed)]);
            assert_eq!(taken, [bytes(&shards.take(rank, &packed, width).unwrap())], "{case}");
            let put = run(rig, &PackPlan::put(&shards, rank, width * 4).unwrap(), &taken).remove(0);
            for (token, (row, to)) in put.chunks(width * 4).zip(again.chunks_mut(width * 4)).enumerate() {
                if shards.packed(rank).contains(&token) {
                    to.copy_from_slice(row);
                } else {
                    assert!(row.iter().all(|byte| *byte == 0xff), "{case}: token {token} is another rank's");
                }
            }
        }
        assert_eq!(again, bytes(&packed), "{placement} on {}", rig.name());
    }
}

fn copies_outside_their_buffers_are_skipped<R: Rig>(rig: &R) {
    let shape = HeadShape::new(2, 2, 8, 8).unwrap();
    let plan = PackPlan::block(&shape, 4, DType::F16).unwrap();
    let sources = [vec![1u8; 128], vec![2u8; 128]];
    type Change = fn(&mut cuda::params::PackCopy);
    let cases: [(&str, Change); 7] = [
        ("a source past its end", |copy| copy.source_offset = 16),
        ("a destination past its end", |copy| copy.destination_offset = 144),
        ("an offset that wraps", |copy| copy.source_offset = u64::MAX - 3),
        ("a stride that wraps", |copy| (copy.rows, copy.destination_stride) = (3, 1 << 63)),
        ("a source that is not there", |copy| copy.source = 2),
        ("a destination out of range", |copy| copy.destination = 3),
        ("half a unit", |copy| copy.row_bytes = 126),
    ];
    for (what, change) in cases {
        let mut copies = plan.copies().to_vec();
        assert_eq!(copies.len(), 2);
        change(&mut copies[1]);
        let (found, fault) = run_copies(rig, &plan, &copies, &sources);
        let bad_range = attention::FaultCode::BadRange as u32;
        assert_eq!(fault, Some(Fault { code: bad_range, index: 1 }), "{what} on {}", rig.name());
        assert_eq!(found, [[vec![1; 128], vec![0xff; 128]].concat()], "{what} on {}", rig.name());
    }
}

#[test]
fn plans_refuse_what_does_not_fit() {
    let shards = Shards::new(sequences(&[(0, 10)]), Placement::Striped, 2).unwrap();
    let width = PackPlan::take(&shards, 0, 6).unwrap_err().to_string();
    assert!(width.contains("multiple of 4"), "{width}");
    assert!(PackPlan::put(&shards, 2, 8).unwrap_err().to_string().contains("`rank`"));
    let shape = HeadShape::new(6, 3, 8, 8).unwrap();
    let rows = Rows { queries: 1, keys: 1 };
    let error = PackPlan::to_heads(&shape, rows, 4, (DType::F16, DType::F16)).unwrap_err();
    assert!(matches!(error, seq_parallel::Error::Divisibility { .. }), "{error}");
}

//! The kernels behind the ceilings read, write and multiply everything that they claim to.

extern crate longkv_cuda as cuda;

use cuda::Error;
use cuda::kernels::ceilings::{BulkRead, BulkReadShape, MmaRate, StreamCopy, StreamRead, StreamWrite};
use cuda::kernels::conformance::{MmaFragments, MmaInstruction};
use cuda::launch::Device;
use cuda::table::ArchClass;
use emulator::rig::Rig;

emulator::device_test!(stream_read, stream_copy, stream_write, bulk_read, mma_rate);

/// Bytes without a pattern (splitmix64).
fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    };
    (0..count.div_ceil(8)).flat_map(|_| word().to_le_bytes()).take(count).collect()
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes"))).collect()
}

fn stream_read<R: Rig>(rig: &R) {
    let kernel = StreamRead::prepare(rig.device()).expect("prepare");
    // (pieces, blocks, passes): nothing, one piece, around a chunk, several chunks per block, more blocks than chunks.
    let cases = [(0, 1, 1), (1, 2, 1), (2047, 1, 2), (2049, 2, 1), (3 * 2048 + 5, 2, 3), (100, 3, 2)];
    for (seed, (pieces, blocks, passes)) in (1..).zip(cases) {
        let source = bytes(pieces * 16, seed);
        let from = rig.upload(&source);
        let mut out = rig.poisoned::<u32>(blocks as usize * 8);
        kernel
            .launch(rig.queue(), blocks, passes, &rig.view(&from), &mut rig.view_mut(&mut out))
            .expect("launch");
        // Word by word: which warp of which block takes a piece follows from the mapping in the kernel's head.
        let mut expected = vec![0u32; blocks as usize * 8];
        for (i, word) in words(&source).into_iter().enumerate() {
            let (chunk, place) = (i / 4 / 2048, i / 4 % 2048);
            let warp = chunk % blocks as usize * 8 + place % 256 / 32;
            for pass in 0..passes {
                expected[warp] ^= word.wrapping_add(pass);
            }
        }
        let what = format!("{pieces} pieces, {blocks} blocks, {passes} passes (seed {seed}), {}", rig.name());
        assert_eq!(rig.download(&out), expected, "{what}");
    }
}

fn stream_copy<R: Rig>(rig: &R) {
    let kernel = StreamCopy::prepare(rig.device()).expect("prepare");
    for (seed, (pieces, blocks)) in (1..).zip([(0, 1), (1, 1), (2048, 2), (2 * 2048 + 77, 2), (9000, 1)]) {
        let source = bytes(pieces * 16, seed);
        let from = rig.upload(&source);
        let mut out = rig.poisoned::<u8>(pieces * 16 + 16);
        kernel.launch(rig.queue(), blocks, &rig.view(&from), &mut rig.view_mut(&mut out)).expect("launch");
        let out = rig.download(&out);
        let what = format!("{pieces} pieces, {blocks} blocks (seed {seed}), {}", rig.name());
        assert!(out[..pieces * 16] == source, "{what}");
        assert_eq!(out[pieces * 16..], [0xff; 16], "past the end: {what}");
    }
}

fn stream_write<R: Rig>(rig: &R) {
    let kernel = StreamWrite::prepare(rig.device()).expect("prepare");
    for (pieces, blocks) in [(0, 1), (1, 1), (2048, 2), (2 * 2048 + 77, 2), (9000, 1)] {
        let mut out = rig.poisoned::<u8>(pieces * 16);
        kernel.launch(rig.queue(), blocks, 42, &mut rig.view_mut(&mut out)).expect("launch");
        let expected: Vec<u32> = (0..pieces as u32)
            .flat_map(|piece| [piece, !piece, piece.wrapping_mul(0x9e37_79b9), 42])
            .collect();
        assert!(words(&rig.download(&out)) == expected, "{pieces} pieces, {blocks} blocks, {}", rig.name());
    }
}

fn bulk_read<R: Rig>(rig: &R) {
    if !ArchClass::Hopper.runs_on(rig.device().arch()) {
        println!("SKIPPED bulk_read: {} is not sm_90a", rig.device().arch());
        return;
    }
    let kernel = BulkRead::prepare(rig.device()).expect("prepare");
    // (pieces, bytes, stages, blocks): fewer pieces than blocks and than stages, the ring going round, odd sizes.
    let cases =
        [(0, 16, 1, 1), (1, 16, 4, 2), (7, 2064, 2, 2), (9, 4096, 4, 1), (12, 48, 3, 3), (5, 16384, 1, 2)];
    for (seed, (pieces, piece_bytes, stages, blocks)) in (1..).zip(cases) {
        let source = bytes(pieces * piece_bytes as usize, seed);
        let from = rig.upload(&source);
        let mut out = rig.poisoned::<u32>(blocks as usize * 4);
        let shape = BulkReadShape { blocks, piece_bytes, stages };
        kernel.launch(rig.queue(), shape, &rig.view(&from), &mut rig.view_mut(&mut out)).expect("launch");
        let mut expected = vec![0u32; blocks as usize * 4];
        for (i, word) in words(&source).into_iter().enumerate() {
            let (piece, place) = (i * 4 / piece_bytes as usize, i * 4 % piece_bytes as usize / 16);
            expected[piece % blocks as usize * 4 + place % 128 / 32] ^= word;
        }
        assert_eq!(rig.download(&out), expected, "{pieces} pieces, {shape:?} (seed {seed}), {}", rig.name());
    }
    let from = rig.upload(&bytes(64, 1));
    let mut out = rig.poisoned::<u32>(4);
    for (name, piece_bytes, stages) in [("no stage", 16, 0), ("odd", 20, 1), ("too large", 65_536, 4)] {
        let shape = BulkReadShape { blocks: 1, piece_bytes, stages };
        let refused = kernel.launch(rig.queue(), shape, &rig.view(&from), &mut rig.view_mut(&mut out));
        assert!(matches!(refused, Err(Error::Argument { argument: "shape", .. })), "{name}: {refused:?}");
    }
}

fn mma_rate<R: Rig>(rig: &R) {
    let (blocks, rounds) = (2u32, 5u32);
    for instruction in [MmaInstruction::Bf16, MmaInstruction::S8S8] {
        // Small whole numbers, so that sums of products are exact in f32 too.
        let number = |byte: &u8| i32::from(byte % 7) - 3;
        let fragment = |count: usize, seed| -> Vec<u32> {
            let numbers: Vec<i32> = bytes(count * 4, seed).iter().map(number).collect();
            let pack = |four: &[i32]| match instruction {
                MmaInstruction::Bf16 => {
                    let bits = |x: i32| u32::from(half::bf16::from_f32(x as f32).to_bits());
                    bits(four[0]) | bits(four[1]) << 16
                }
                _ => u32::from_le_bytes([0, 1, 2, 3].map(|i: usize| four[i] as i8 as u8)),
            };
            numbers.chunks_exact(4).map(pack).collect()
        };
        let (a, b) = (fragment(32 * 4, 1), fragment(8 * 32 * 2, 2));

        // One product of each tile, by the kernel that is compared with the PTX ISA's tables.
        let (eight_a, b_buffer) = (rig.upload(&a.repeat(8)), rig.upload(&b));
        let mut once = rig.zeroed::<u32>(8 * 32 * 4);
        MmaFragments::prepare(rig.device(), instruction)
            .expect("prepare")
            .launch(rig.queue(), 8, &rig.view(&eight_a), &rig.view(&b_buffer), &mut rig.view_mut(&mut once))
            .expect("launch");
        let scale = |word: u32| match instruction {
            MmaInstruction::Bf16 => (f32::from_bits(word) * rounds as f32).to_bits(),
            _ => word.wrapping_mul(rounds),
        };
        let one_warp: Vec<u32> = rig.download(&once).into_iter().map(scale).collect();

        let kernel = MmaRate::prepare(rig.device(), instruction).expect("prepare");
        let a_buffer = rig.upload(&a);
        let mut d = rig.poisoned::<u32>(MmaRate::<R::Function>::out_words(blocks));
        kernel
            .launch(
                rig.queue(),
                blocks,
                rounds,
                &rig.view(&a_buffer),
                &rig.view(&b_buffer),
                &mut rig.view_mut(&mut d),
            )
            .expect("launch");
        let normal = |words: Vec<u32>| -> Vec<u32> {
            // -0.0 and 0.0 are the same sum.
            words.into_iter().map(|word| if word == 0x8000_0000 { 0 } else { word }).collect()
        };
        let expected = normal(one_warp.repeat(blocks as usize * 4));
        assert!(normal(rig.download(&d)) == expected, "{instruction:?}, {}", rig.name());
        assert_eq!(
            kernel.operations(1, 1),
            4 * 8 * if instruction == MmaInstruction::Bf16 { 4096 } else { 8192 }
        );
    }
}

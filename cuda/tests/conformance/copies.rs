//! Asynchronous copies, rings of them, vector loads and stores, and bulk copies.

use cuda::kernels::conformance::{BulkCopies, CopyRingSum, CpAsyncSizes, VectorMemory};
use cuda::launch::Device;
use cuda::table::ArchClass;
use emulator::rig::Rig;
use half::{bf16, f16};

use crate::data::{Random, assert_same};

emulator::device_test!(cp_async_sizes, copy_ring, vector_memory, bulk_copies);

fn cp_async_sizes<R: Rig>(rig: &R) {
    let kernel = CpAsyncSizes::prepare(rig.device()).expect("prepare");
    let seed = 21;
    let mut random = Random::new(seed);
    // (form, size, offset in the slot, source bytes): every form, and every length for those that fill with zeros.
    let mut pieces: Vec<(u32, usize, usize, usize)> = (0..4).map(|form| (form, 16, 16, 16)).collect();
    pieces.extend((0..=16).map(|bytes| (4, 16, 16, bytes)));
    pieces.push((5, 8, 8, 8));
    pieces.extend((0..=8).map(|bytes| (6, 8, 8, bytes)));
    pieces.push((7, 4, 8, 4));
    pieces.extend((0..=4).map(|bytes| (8, 4, 8, bytes)));
    let blocks = 3;
    let order: Vec<_> =
        (0..blocks * 128).map(|_| pieces[random.integer(0, pieces.len() as i64 - 1) as usize]).collect();
    assert!(pieces.iter().all(|piece| order.contains(piece)), "seed {seed} leaves a case out");

    let source = random.bytes(order.len() * 16);
    let mut out = rig.poisoned::<u8>(order.len() * 32);
    let form = rig.upload(&order.iter().map(|piece| piece.0).collect::<Vec<_>>());
    let bytes = rig.upload(&order.iter().map(|piece| piece.3 as u32).collect::<Vec<_>>());
    let from = rig.upload(&source);
    let (from, form, bytes) = (rig.view(&from), rig.view(&form), rig.view(&bytes));
    kernel.launch(rig.queue(), blocks, &from, &form, &bytes, &mut rig.view_mut(&mut out)).expect("launch");
    let out = rig.download(&out);
    for (i, &(form, size, offset, bytes)) in order.iter().enumerate() {
        let mut slot = [0xee_u8; 32];
        slot[offset..offset + size].fill(0);
        slot[offset..offset + bytes].copy_from_slice(&source[i * 16..i * 16 + bytes]);
        let what = format!("form {form}, {bytes} of {size} bytes (seed {seed}), {}", rig.name());
        assert_same(&what, &out[i * 32..(i + 1) * 32], &slot);
    }
}

fn copy_ring<R: Rig>(rig: &R) {
    let seed = 22;
    let mut random = Random::new(seed);
    for stages in [2, 3, 4] {
        let kernel = CopyRingSum::prepare(rig.device(), stages).expect("prepare");
        for tiles in 0..=9 {
            let blocks = 2;
            let source = random.words(blocks * tiles * 512);
            let mut out = rig.poisoned::<u32>(blocks * 128);
            let from = rig.upload(&source);
            let launched =
                kernel.launch(rig.queue(), blocks, tiles, &rig.view(&from), &mut rig.view_mut(&mut out));
            let what = format!("{stages} stages, {tiles} tiles (seed {seed}), {}", rig.name());
            launched.unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut expected = vec![0u32; blocks * 128];
            for (i, sum) in expected.iter_mut().enumerate() {
                let (block, thread) = (i / 128, (i % 128 + 37) % 128);
                for tile in 0..tiles {
                    let piece = ((block * tiles + tile) * 128 + thread) * 4;
                    let words =
                        source[piece..piece + 4].iter().fold(0u32, |sum, &word| sum.wrapping_add(word));
                    *sum = sum.wrapping_add(words.wrapping_mul(tile as u32 + 1));
                }
            }
            assert_same(&what, &rig.download(&out), &expected);
        }
    }
}

fn vector_memory<R: Rig>(rig: &R) {
    let kernel = VectorMemory::prepare(rig.device()).expect("prepare");
    let seed = 23;
    let mut random = Random::new(seed);
    for n in [0, 1, 127, 128, 129, 1000] {
        let values: Vec<f32> = (0..n * 4).map(|_| random.unit() * 70000.0).collect();
        let words: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
        let source = rig.upload(&words);
        let mut out = rig.poisoned::<u32>(9 * n * 4);
        let launched = kernel.launch(rig.queue(), n, false, &rig.view(&source), &mut rig.view_mut(&mut out));
        launched.expect("launch");
        let out = rig.download(&out);
        let what = |plane| format!("plane {plane}, {n} pieces (seed {seed}), {}", rig.name());
        for plane in 0..8 {
            let mut expected = words.clone();
            expected.rotate_left(if n == 0 { 0 } else { plane % n * 4 });
            assert_same(&what(plane), &out[plane * n * 4..(plane + 1) * n * 4], &expected);
        }
        let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        let mut rounded: Vec<u32> = values
            .chunks(4)
            .flat_map(|v| {
                let half = |i: usize| f16::from_f32(v[i]).to_bits();
                let brain = |i: usize| bf16::from_f32(v[i]).to_bits();
                [
                    pair(half(0), half(1)),
                    pair(half(2), half(3)),
                    pair(brain(0), brain(1)),
                    pair(brain(2), brain(3)),
                ]
            })
            .collect();
        rounded.rotate_left(if n == 0 { 0 } else { 8 % n * 4 });
        assert_same(&what(8), &out[8 * n * 4..], &rounded);
    }
}

fn bulk_copies<R: Rig>(rig: &R) {
    if !ArchClass::Hopper.runs_on(rig.device().arch()) {
        println!("SKIPPED bulk_copies: {} is not sm_90a", rig.device().arch());
        return;
    }
    let kernel = BulkCopies::prepare(rig.device()).expect("prepare");
    let seed = 24;
    let mut random = Random::new(seed);
    for (pieces, bytes) in [(0, 16), (1, 16), (2, 32), (3, 48), (5, 1040), (4, 8192), (7, 512)] {
        let source = random.bytes(pieces * bytes);
        let mut out = rig.poisoned::<u8>(pieces * bytes);
        let from = rig.upload(&source);
        let launched =
            kernel.launch(rig.queue(), pieces, bytes, &rig.view(&from), &mut rig.view_mut(&mut out));
        let what = format!("{pieces} pieces of {bytes} bytes (seed {seed}), {}", rig.name());
        launched.unwrap_or_else(|error| panic!("{what}: {error}"));
        let expected: Vec<u8> = source
            .chunks(4)
            .flat_map(|word| {
                u32::from_le_bytes([word[0], word[1], word[2], word[3]]).wrapping_add(1).to_le_bytes()
            })
            .collect();
        assert_same(&what, &rig.download(&out), &expected);
    }
}

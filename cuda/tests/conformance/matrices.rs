//! ldmatrix, stmatrix, movmatrix, and the operand fragments of swizzled tiles.

use cuda::kernels::conformance::{LdmatrixFragments, StmatrixFragments, SwizzledFragments};
use emulator::rig::Rig;

use crate::data::{Random, assert_same};
use crate::isa;

emulator::device_test!(ldmatrix_and_movmatrix, stmatrix, swizzled_tiles);

const POISON: u32 = 0xffff_ffff;

/// Two 16-bit elements as a register.
fn pair(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

fn halves(words: &[u32]) -> Vec<u16> {
    words.iter().flat_map(|&word| [word as u16, (word >> 16) as u16]).collect()
}

/// The register of `lane` for one 8x8 matrix given as a function of row and column.
fn fragment(lane: usize, transposed: bool, element: impl Fn(usize, usize) -> u16) -> u32 {
    let at = |i| {
        let (row, column) = isa::row_fragment(lane, i);
        if transposed { element(column, row) } else { element(row, column) }
    };
    pair(at(0), at(1))
}

/// Which row each lane gives: in order, reversed, random, and all lanes the same.
fn row_orders(random: &mut Random) -> [(&'static str, Vec<u32>); 4] {
    [
        ("in order", (0..32).collect()),
        ("reversed", (0..32).rev().collect()),
        ("random", random.permutation(32)),
        ("one row", vec![13; 32]),
    ]
}

fn ldmatrix_and_movmatrix<R: Rig>(rig: &R) {
    let kernel = LdmatrixFragments::prepare(rig.device()).expect("prepare");
    let seed = 11;
    let mut random = Random::new(seed);
    for (order, rows) in row_orders(&mut random) {
        let words = random.words(128);
        let mut out = rig.poisoned::<u32>(7 * 128);
        let (matrices, row_of_lane) = (rig.upload(&words), rig.upload(&rows));
        let (matrices, row_of_lane) = (rig.view(&matrices), rig.view(&row_of_lane));
        kernel.launch(rig.queue(), &matrices, &row_of_lane, &mut rig.view_mut(&mut out)).expect("launch");

        // Lane 8·m + r names the row that becomes row r of matrix m.
        let stored = halves(&words);
        let element = |m: usize, row: usize, column: usize| stored[rows[8 * m + row] as usize * 8 + column];
        let mut expected = vec![POISON; 7 * 128];
        for lane in 0..32 {
            let forms =
                [(0, 1, false), (1, 2, false), (2, 4, false), (3, 1, true), (4, 2, true), (5, 4, true)];
            for (plane, count, transposed) in forms {
                for m in 0..count {
                    expected[plane * 128 + lane * 4 + m] =
                        fragment(lane, transposed, |row, column| element(m, row, column));
                }
            }
            for m in 0..4 {
                expected[6 * 128 + lane * 4 + m] =
                    fragment(lane, true, |row, column| element(m, row, column));
            }
        }
        let what = format!("ldmatrix, rows {order} (seed {seed}), {}", rig.name());
        assert_same(&what, &rig.download(&out), &expected);
    }
}

fn stmatrix<R: Rig>(rig: &R) {
    if !cuda::table::ArchClass::Hopper.runs_on(cuda::launch::Device::arch(rig.device())) {
        println!("SKIPPED stmatrix: {} is not sm_90a", cuda::launch::Device::arch(rig.device()));
        return;
    }
    let kernel = StmatrixFragments::prepare(rig.device()).expect("prepare");
    let seed = 12;
    let mut random = Random::new(seed);
    for (order, rows) in row_orders(&mut random) {
        if order == "one row" {
            continue; // several lanes would store to one address
        }
        let words = random.words(128);
        let mut out = rig.poisoned::<u32>(6 * 128);
        let (registers, row_of_lane) = (rig.upload(&words), rig.upload(&rows));
        let (registers, row_of_lane) = (rig.view(&registers), rig.view(&row_of_lane));
        kernel.launch(rig.queue(), &registers, &row_of_lane, &mut rig.view_mut(&mut out)).expect("launch");

        let mut expected = vec![0xeeee_u16; 6 * 256];
        let forms = [(1, false), (2, false), (4, false), (1, true), (2, true), (4, true)];
        for (plane, (count, transposed)) in forms.into_iter().enumerate() {
            for (lane, m) in (0..32).flat_map(|lane| (0..count).map(move |m| (lane, m))) {
                let register = words[lane * 4 + m];
                for (i, value) in [register as u16, (register >> 16) as u16].into_iter().enumerate() {
                    let (row, column) = isa::row_fragment(lane, i);
                    let (row, column) = if transposed { (column, row) } else { (row, column) };
                    expected[plane * 256 + rows[8 * m + row] as usize * 8 + column] = value;
                }
            }
        }
        let what = format!("stmatrix, rows {order} (seed {seed}), {}", rig.name());
        assert_same(&what, &halves(&rig.download(&out)), &expected);
    }
}

/// Bytes from the start of the tile to 16-byte chunk `chunk` of row `row`, worked out from what the layout is for: after
/// `step` rows the next starts at the same place of a 128-byte line, and rows `step` apart differ by XOR.
fn swizzled_offset(row_bytes: usize, row: usize, chunk: usize) -> usize {
    let step = (1..=8).find(|rows| (rows * row_bytes).is_multiple_of(128)).expect("8 rows of whole chunks");
    row * row_bytes + (chunk ^ (row / step % (8 / step))) * 16
}

fn swizzled_tiles<R: Rig>(rig: &R) {
    let seed = 13;
    for row_bytes in [32, 64, 128, 192, 256] {
        let mut random = Random::new(seed + row_bytes as u64);
        let chunks = row_bytes / 16;
        let kernel = SwizzledFragments::prepare(rig.device(), row_bytes as u32).expect("prepare");
        let bytes = random.bytes(32 * row_bytes);
        let source = rig.upload(&bytes);
        let mut offsets = rig.poisoned::<u32>(32 * chunks);
        let mut fragments = rig.poisoned::<u32>(2 * chunks / 2 * 512);
        let mut places = rig.poisoned::<u32>(128);
        kernel
            .launch(
                rig.queue(),
                &rig.view(&source),
                &mut rig.view_mut(&mut offsets),
                &mut rig.view_mut(&mut fragments),
                &mut rig.view_mut(&mut places),
            )
            .expect("launch");
        let what = format!("{row_bytes}-byte rows (seed {seed}), {}", rig.name());

        let offsets: Vec<usize> = rig.download(&offsets).into_iter().map(|offset| offset as usize).collect();
        let expected: Vec<usize> =
            (0..32 * chunks).map(|i| swizzled_offset(row_bytes, i / chunks, i % chunks)).collect();
        assert_same(&format!("offsets, {what}"), &offsets, &expected);
        let mut taken = offsets.clone();
        taken.sort_unstable();
        assert!(
            taken.iter().enumerate().all(|(i, &offset)| offset == i * 16),
            "{what}: not a permutation of chunks"
        );
        for (first_row, chunk) in
            (0..32).step_by(8).flat_map(|row| (0..chunks).map(move |chunk| (row, chunk)))
        {
            let columns: std::collections::BTreeSet<usize> =
                (first_row..first_row + 8).map(|row| offsets[row * chunks + chunk] / 16 % 8).collect();
            assert_eq!(columns.len(), 8, "{what}: rows {first_row}.. conflict at chunk {chunk}");
        }

        let expected: Vec<u32> = (0..128)
            .map(|at| {
                let (row, column) = isa::c_168(at / 4, at % 4);
                (row * 8 + column) as u32
            })
            .collect();
        assert_same(&format!("accumulator places, {what}"), &rig.download(&places), &expected);

        // The tile as 16-bit elements [32, row_bytes / 2].
        let element = |row: usize, column: usize| {
            u16::from_le_bytes([bytes[row * row_bytes + column * 2], bytes[row * row_bytes + column * 2 + 1]])
        };
        let mut expected = Vec::new();
        for (row0, chunk0) in
            (0..32).step_by(16).flat_map(|row| (0..chunks).step_by(2).map(move |chunk| (row, chunk)))
        {
            let column0 = chunk0 * 8;
            // A of m16n8k16 has eight elements a lane; the two B operands of a load have four each.
            let a = |lane: usize, i: usize| isa::a_16816(lane, i);
            let b = |lane: usize, i: usize| {
                let (k, n) = isa::b_16816(lane, i % 4);
                (k, n + i / 4 * 8)
            };
            for kind in 0..4 {
                for lane in 0..32 {
                    let at = |i: usize| match kind {
                        0 => (a(lane, i).0, a(lane, i).1),
                        1 => (a(lane, i).1, a(lane, i).0), // tile is [K, M]
                        2 => (b(lane, i).1, b(lane, i).0), // tile is [N, K]
                        _ => (b(lane, i).0, b(lane, i).1), // tile is [K, N]
                    };
                    let value = |i: usize| element(row0 + at(i).0, column0 + at(i).1);
                    expected
                        .extend((0..4).map(|register| pair(value(2 * register), value(2 * register + 1))));
                }
            }
        }
        assert_same(&format!("fragments, {what}"), &rig.download(&fragments), &expected);
    }
}

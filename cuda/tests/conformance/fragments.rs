//! Tensor-core products: raw registers against a matrix product.

use cuda::kernels::conformance::{MmaFragments, MmaInstruction};
use emulator::rig::Rig;
use half::{bf16, f16};

use crate::data::Random;
use crate::isa::{self, Layout};

emulator::device_test!(mma_bf16, mma_f16, mma_tf32, mma_s8s8, mma_s8u8, mma_u8s8, mma_u8u8);

const TILES: usize = 8;

/// What a test knows about one instruction.
struct Shape {
    k: usize,
    /// Bits of an A or B element.
    bits: usize,
    a: Layout,
    b: Layout,
}

const K16: Shape = Shape { k: 16, bits: 16, a: isa::a_16816, b: isa::b_16816 };
const K8: Shape = Shape { k: 8, bits: 32, a: isa::a_1688, b: isa::b_1688 };
const K32: Shape = Shape { k: 32, bits: 8, a: isa::a_16832, b: isa::b_16832 };

/// Registers of all lanes for a matrix whose element bits are `value(row, column)`.
fn pack(layout: Layout, registers: usize, bits: usize, value: impl Fn(usize, usize) -> u32) -> Vec<u32> {
    let per_register = 32 / bits;
    let mut packed = vec![0; 32 * registers];
    for lane in 0..32 {
        for i in 0..registers * per_register {
            let (row, column) = layout(lane, i);
            packed[lane * registers + i / per_register] |= value(row, column) << (i % per_register * bits);
        }
    }
    packed
}

/// Runs the products of `TILES` tiles: `a[tile][row * k + column]`, `b[tile][row * 8 + column]` as element bits, `c` and the
/// result `[tile][row * 8 + column]` as register bits.
fn multiply<R: Rig>(
    rig: &R,
    instruction: MmaInstruction,
    shape: &Shape,
    a: &[Vec<u32>],
    b: &[Vec<u32>],
    c: &[Vec<u32>],
) -> Vec<Vec<u32>> {
    let all = |registers: usize, layout: Layout, bits: usize, columns: usize, tiles: &[Vec<u32>]| {
        tiles
            .iter()
            .flat_map(|tile| pack(layout, registers, bits, |row, column| tile[row * columns + column]))
            .collect::<Vec<u32>>()
    };
    let a = rig.upload(&all(4, shape.a, shape.bits, shape.k, a));
    let b = rig.upload(&all(2, shape.b, shape.bits, 8, b));
    let mut d = rig.upload(&all(4, isa::c_168, 32, 8, c));
    let kernel = MmaFragments::prepare(rig.device(), instruction).expect("prepare");
    let (a, b) = (rig.view(&a), rig.view(&b));
    kernel.launch(rig.queue(), TILES, &a, &b, &mut rig.view_mut(&mut d)).expect("launch");
    let registers = rig.download(&d);
    (0..TILES)
        .map(|tile| {
            let mut result = vec![0; 128];
            for lane in 0..32 {
                for i in 0..4 {
                    let (row, column) = isa::c_168(lane, i);
                    result[row * 8 + column] = registers[(tile * 32 + lane) * 4 + i];
                }
            }
            result
        })
        .collect()
}

/// A floating-point product: exact on small integers, within the error of f32 sums on random values.
fn check_float<R: Rig>(
    rig: &R,
    instruction: MmaInstruction,
    shape: &Shape,
    to_bits: impl Fn(f32) -> u32,
    from_bits: impl Fn(u32) -> f32,
) {
    for (case, seed) in [("integers", 1), ("random", 2)] {
        let mut random = Random::new(seed);
        let mut value =
            || if case == "integers" { random.integer(-8, 8) as f32 } else { random.unit() * 4.0 };
        let mut tiles = |n: usize| -> Vec<Vec<u32>> {
            (0..TILES).map(|_| (0..n).map(|_| to_bits(value())).collect()).collect()
        };
        let (a, b) = (tiles(16 * shape.k), tiles(shape.k * 8));
        let c: Vec<Vec<u32>> =
            tiles(128).iter().map(|tile| tile.iter().map(|&x| from_bits(x).to_bits()).collect()).collect();
        let d = multiply(rig, instruction, shape, &a, &b, &c);
        for tile in 0..TILES {
            for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
                let start = f64::from(f32::from_bits(c[tile][row * 8 + column]));
                let (mut sum, mut magnitude) = (start, start.abs());
                for k in 0..shape.k {
                    let x = f64::from(from_bits(a[tile][row * shape.k + k]));
                    let y = f64::from(from_bits(b[tile][k * 8 + column]));
                    sum += x * y;
                    magnitude += (x * y).abs();
                }
                // Products are exact in f32; each of the k + 1 additions may truncate at 2^-22 of the magnitudes.
                let tolerance = if case == "integers" {
                    0.0
                } else {
                    (shape.k + 1) as f64 * magnitude / f64::from(1 << 22)
                };
                let found = f64::from(f32::from_bits(d[tile][row * 8 + column]));
                assert!(
                    (found - sum).abs() <= tolerance,
                    "{instruction:?}, {case} (seed {seed}), {}: tile {tile} row {row} column {column}: \
                     found {found}, expected {sum} ± {tolerance}",
                    rig.name()
                );
            }
        }
    }
}

/// An integer product: exact, and sums wrap.
fn check_integer<R: Rig>(rig: &R, instruction: MmaInstruction, a_signed: bool, b_signed: bool) {
    let seed = 3;
    let mut random = Random::new(seed);
    let mut tiles = |n: usize, mask: u32| -> Vec<Vec<u32>> {
        (0..TILES).map(|_| random.words(n).into_iter().map(|x| x & mask).collect()).collect()
    };
    let (a, b, c) = (tiles(16 * 32, 0xff), tiles(32 * 8, 0xff), tiles(128, u32::MAX));
    let d = multiply(rig, instruction, &K32, &a, &b, &c);
    let element = |bits: u32, signed: bool| if signed { i32::from(bits as u8 as i8) } else { bits as i32 };
    for tile in 0..TILES {
        for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
            let mut sum = c[tile][row * 8 + column] as i32;
            for k in 0..32 {
                let product =
                    element(a[tile][row * 32 + k], a_signed) * element(b[tile][k * 8 + column], b_signed);
                sum = sum.wrapping_add(product);
            }
            let found = d[tile][row * 8 + column] as i32;
            assert_eq!(
                found,
                sum,
                "{instruction:?} (seed {seed}), {}: tile {tile} row {row} column {column}",
                rig.name()
            );
        }
    }
}

fn mma_bf16<R: Rig>(rig: &R) {
    let to_bits = |x| u32::from(bf16::from_f32(x).to_bits());
    check_float(rig, MmaInstruction::Bf16, &K16, to_bits, |bits| bf16::from_bits(bits as u16).to_f32());
}

fn mma_f16<R: Rig>(rig: &R) {
    let to_bits = |x| u32::from(f16::from_f32(x).to_bits());
    check_float(rig, MmaInstruction::F16, &K16, to_bits, |bits| f16::from_bits(bits as u16).to_f32());
}

fn mma_tf32<R: Rig>(rig: &R) {
    let to_bits = |x: f32| x.to_bits() & 0xffff_e000;
    check_float(rig, MmaInstruction::Tf32, &K8, to_bits, f32::from_bits);
    unrounded_tf32(rig);
}

/// Operands with all bits of an f32: PTX does not say what becomes of the low 13, and kernels rely on no more than that either is off by
/// less than 2⁻¹⁰ of its magnitude.
fn unrounded_tf32<R: Rig>(rig: &R) {
    let seed = 4;
    let mut random = Random::new(seed);
    let mut tiles = |n: usize| -> Vec<Vec<u32>> {
        (0..TILES).map(|_| (0..n).map(|_| random.unit().to_bits()).collect()).collect()
    };
    let (a, b) = (tiles(16 * K8.k), tiles(K8.k * 8));
    let d = multiply(rig, MmaInstruction::Tf32, &K8, &a, &b, &vec![vec![0; 128]; TILES]);
    for tile in 0..TILES {
        for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
            let products = (0..K8.k).map(|k| {
                let (x, y) =
                    (f32::from_bits(a[tile][row * K8.k + k]), f32::from_bits(b[tile][k * 8 + column]));
                f64::from(x) * f64::from(y)
            });
            let (sum, magnitude) = products.fold((0.0, 0.0), |(sum, all), x: f64| (sum + x, all + x.abs()));
            let tolerance = magnitude * (2.0 * 2f64.powi(-10) + 2f64.powi(-18));
            let found = f64::from(f32::from_bits(d[tile][row * 8 + column]));
            assert!(
                (found - sum).abs() <= tolerance,
                "tf32, unrounded (seed {seed}), {}: tile {tile} row {row} column {column}: found {found}, \
                 expected {sum} ± {tolerance}",
                rig.name()
            );
        }
    }
}

fn mma_s8s8<R: Rig>(rig: &R) {
    check_integer(rig, MmaInstruction::S8S8, true, true);
}

fn mma_s8u8<R: Rig>(rig: &R) {
    check_integer(rig, MmaInstruction::S8U8, true, false);
}

fn mma_u8s8<R: Rig>(rig: &R) {
    check_integer(rig, MmaInstruction::U8S8, false, true);
}

fn mma_u8u8<R: Rig>(rig: &R) {
    check_integer(rig, MmaInstruction::U8U8, false, false);
}

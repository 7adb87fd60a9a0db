//! Eq. 4: the product of codes is the product of what they stand for.

use attention::DType;
use attention::testing::Inputs;
use homomorphic_quant::homomorphic::{Quantized, product};
use homomorphic_quant::{Bits, Error, Rounding};
use proptest::prelude::*;

fn bits() -> impl Strategy<Value = Bits> {
    prop::sample::select(Bits::ALL.to_vec())
}

fn rounding() -> impl Strategy<Value = Rounding> {
    prop_oneof![Just(Rounding::Nearest), any::<u64>().prop_map(|seed| Rounding::Stochastic { seed })]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn codes_multiply_like_what_they_stand_for(
        rows in 0usize..5, columns in 0usize..5, len in 1usize..200, partition in 1usize..=128,
        a_bits in bits(), b_bits in bits(), rounding in rounding(), seed in any::<u32>(),
        kind in prop::sample::select(Inputs::ALL.to_vec()),
        metadata in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
    ) {
        let seed = u64::from(seed);
        let (a, b) = (kind.values(rows, len, seed), Inputs::Normal.values(columns, len, seed + 1));
        let quantize = |values: &[f32], bits, sums| {
            Quantized::new(values, len, partition, bits, metadata, rounding, sums).unwrap()
        };
        let (qa, qb) = (quantize(&a, a_bits, true), quantize(&b, b_bits, true));
        prop_assert_eq!((qa.vectors(), qb.vectors()), (rows, columns));
        let mut out = vec![f32::NAN; rows * columns];
        product(&qa, &qb, &mut out).unwrap();

        // Without cached sums: the same integers, so the same bits.
        let mut without = vec![f32::NAN; rows * columns];
        product(&quantize(&a, a_bits, false), &quantize(&b, b_bits, false), &mut without).unwrap();
        prop_assert_eq!(&out, &without);

        let (da, db) = (qa.dequantize(), qb.dequantize());
        for (i, row) in da.chunks_exact(len).enumerate() {
            for (j, column) in db.chunks_exact(len).enumerate() {
                let exact: f64 = row.iter().zip(column).map(|(a, b)| a * b).sum();
                // Each of the four terms rounds on its own, at the size of its factors.
                let size = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let spread = |q: &Quantized, v: usize| {
                    let parts = len.div_ceil(partition);
                    q.groups()[v * parts..(v + 1) * parts].iter()
                        .map(|g| f64::from(g.min.abs()).max(f64::from(g.scale) * 255.0)).fold(0.0, f64::max)
                };
                let bound = 4e-6 * (size(row) * size(column) + len as f64 * spread(&qa, i) * spread(&qb, j)) + 1e-6;
                let found = f64::from(out[i * columns + j]);
                prop_assert!((found - exact).abs() <= bound, "({}, {}): {} instead of {}", i, j, found, exact);
            }
        }
    }
}

/// With whole numbers as groups everything is exact: the integer part bit for bit.
#[test]
fn integers_are_exact() {
    for bits in Bits::ALL {
        let levels = bits.levels() as f32;
        // Every partition has 0 and L, so that s = 1, m = 0 and codes are the values.
        let values = |seed| -> Vec<f32> {
            let mut values: Vec<f32> = Inputs::Normal
                .values(3, 256, seed)
                .iter()
                .map(|x| (x.abs() * levels / 2.0).round().min(levels))
                .collect();
            for part in values.chunks_exact_mut(64) {
                (part[0], part[1]) = (0.0, levels);
            }
            values
        };
        let (a, b) = (values(1), values(2));
        let quantize = |values: &[f32]| {
            Quantized::new(values, 256, 64, bits, DType::BF16, Rounding::Nearest, true).unwrap()
        };
        let (qa, qb) = (quantize(&a), quantize(&b));
        assert!(qa.codes().iter().zip(&a).all(|(&code, &x)| f32::from(code) == x), "{bits}");
        let mut out = [f32::NAN; 9];
        product(&qa, &qb, &mut out).unwrap();
        for (i, row) in a.chunks_exact(256).enumerate() {
            for (j, column) in b.chunks_exact(256).enumerate() {
                let exact: f64 = row.iter().zip(column).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                assert_eq!(f64::from(out[i * 3 + j]), exact, "{bits} ({i}, {j})");
            }
        }
    }
    // Saturated codes of the largest partition.
    let mut values = vec![255.0; 256];
    values[0] = 0.0;
    let saturated =
        Quantized::new(&values, 256, 256, Bits::Eight, DType::BF16, Rounding::Nearest, true).unwrap();
    let mut out = [0.0];
    product(&saturated, &saturated, &mut out).unwrap();
    assert_eq!(out[0], 255.0 * 255.0 * 255.0);
}

#[test]
fn refused_operands_name_the_argument() {
    let quantize = |values: &[f32], len, partition| {
        Quantized::new(values, len, partition, Bits::Two, DType::BF16, Rounding::Nearest, true)
    };
    let a = quantize(&[1.0; 8], 4, 2).unwrap();
    for (case, result, named) in [
        ("ragged", quantize(&[0.0; 7], 4, 2).map(drop), "values"),
        ("no elements", quantize(&[], 0, 2).map(drop), "values"),
        ("partition 0", quantize(&[0.0; 8], 4, 0).map(drop), "partition"),
        ("partition 257", quantize(&[0.0; 8], 4, 257).map(drop), "partition"),
        ("other length", product(&a, &quantize(&[1.0; 8], 8, 2).unwrap(), &mut [0.0; 2]), "b.len"),
        ("other partition", product(&a, &quantize(&[1.0; 8], 4, 4).unwrap(), &mut [0.0; 4]), "b.partition"),
        ("short output", product(&a, &a, &mut [0.0; 3]), "out"),
    ] {
        match result {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named, "{case}"),
            other => panic!("{case}: {other:?}"),
        }
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let result = quantize(&[1.0, 2.0, bad, 4.0], 4, 2);
        assert!(matches!(result, Err(Error::NotFinite { argument: "values", index: 2, .. })), "{result:?}");
    }
}

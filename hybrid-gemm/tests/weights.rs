//! Where weights come from and where they live.

mod common;

use std::path::Path as FilePath;

use common::quantised::QuantisedMatrix;
use common::{compare, device, random, run};
use half::bf16;
use hybrid_gemm::cpu::Gemm;
use hybrid_gemm::weights::Layout;
use hybrid_gemm::{
    Activation, Codes, DType, EpilogueSpec, Error, Format, GemmConfig, GemmPlan, MappedFile, MatrixView,
    Residency, RowMajor, Tiling, Weights, reference,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A file with a matrix `w` `[n, k]` of bf16, behind a name that moves its start by some bytes.
fn write(path: &FilePath, name: &str, n: usize, k: usize) -> Vec<bf16> {
    let values: Vec<bf16> = random(21, n * k);
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let codes = vec![0u8; 6];
    let tensors = [
        (name, TensorView::new(Dtype::BF16, vec![n, k], &bytes).unwrap()),
        ("vector", TensorView::new(Dtype::BF16, vec![n * k], &bytes).unwrap()),
        ("codes", TensorView::new(Dtype::U8, vec![2, 3], &codes).unwrap()),
    ];
    safetensors::serialize_to_file(tensors, None, path).unwrap();
    values
}

/// A file that nobody may write is read in place, and gives the same bits as a packed copy.
#[test]
fn a_mapped_file_is_a_weight() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let (n, k) = (200, 300);
    let values = write(&path, "w", n, k);
    let mut permissions = std::fs::metadata(&path).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&path, permissions).unwrap();

    let file = MappedFile::open(&path).unwrap();
    let tensor = file.tensor("w").unwrap();
    assert_eq!((tensor.name(), tensor.shape(), tensor.dtype()), ("w", [n, k], DType::BF16));
    // The mapping outlives its name, and everything but the weights.
    std::fs::remove_file(&path).unwrap();
    let x: Vec<f32> = random(22, 3 * k);
    let mut outputs = Vec::new();
    for residency in [Residency::Host, Residency::HbmFraction(0.5), Residency::Hbm] {
        let packed = RowMajor::from_slice(&values, [n, k]).unwrap();
        let packed = Weights::pack(packed, Format::Float(DType::BF16), residency).unwrap();
        for weights in [Weights::in_place(&tensor, residency).unwrap(), packed] {
            let case = format!("{residency:?}, {:?}", weights.placement().host_layout());
            let config = GemmConfig::new(3, DType::F32, device(8));
            let gemm = Gemm::prepare(&GemmPlan::new(*weights.placement(), config).unwrap(), weights).unwrap();
            let (out, receipt) = run::<f32, f32>(&gemm, &x, None, None).unwrap();
            assert_eq!(receipt.counted, receipt.predicted.traffic, "{case}");
            if gemm.weights().placement().host_layout() != Layout::Packed {
                // No padding: exactly the rows of the file.
                let rows = gemm.weights().placement().host_columns() * 64;
                assert_eq!(receipt.counted.link_bytes, (rows.min(n) * k * 2) as u64, "{case}");
            }
            outputs.push((case, out));
        }
    }
    drop((file, tensor));
    for (case, out) in &outputs {
        assert!(*out == outputs[0].1, "{case}: other bits");
    }
    let packed = Weights::pack(
        RowMajor::from_slice(&values, [n, k]).unwrap(),
        Format::Float(DType::BF16),
        Residency::Host,
    );
    let (view, plain) = (MatrixView::new(&x, 3, k).unwrap(), EpilogueSpec::plain(DType::F32));
    let exact = reference::gemm::<f32, f32>(view, &packed.unwrap(), &plain, None, None).unwrap();
    compare("seeds 21 and 22", &outputs[0].1, &exact, 5e3);
}

#[test]
fn damaged_files() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    write(&whole, "w", 20, 30);
    let bytes = std::fs::read(&whole).unwrap();
    let path = folder.path().join("damaged");
    for (case, len, expected) in [
        ("nothing", 0, 8),
        ("half a length", 4, 8),
        ("half a header", 40, bytes.len() - 2406),
        ("half the data", bytes.len() - 1000, bytes.len()),
        ("one byte short", bytes.len() - 1, bytes.len()),
    ] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        match MappedFile::open(&path) {
            // A header is padded to eight bytes, so where the data starts is known to that.
            Err(Error::Truncated { expected: found, .. }) if case == "half a header" => {
                assert!(found as usize <= expected && found > 40, "{case}: {found}");
            }
            Err(Error::Truncated { expected: wanted, found, .. }) => {
                assert_eq!((wanted, found), (expected as u64, len as u64), "{case}");
            }
            // Nothing to map, on some systems.
            Err(Error::Read { .. }) if len == 0 => {}
            other => panic!("{case}: {other:?}"),
        }
    }
    let mut longer = bytes.clone();
    longer.push(0);
    for (case, bytes) in [("a byte too many", longer), ("no header", vec![0xff; 64]), ("zeros", vec![0; 64])]
    {
        std::fs::write(&path, bytes).unwrap();
        let error = MappedFile::open(&path).expect_err(case);
        assert!(matches!(error, Error::Malformed { .. }), "{case}: {error}");
    }
    assert!(matches!(MappedFile::open(&folder.path().join("none")), Err(Error::Read { .. })));

    let file = MappedFile::open(&whole).unwrap();
    for (name, named) in [("missing", "no tensor named missing"), ("vector", "[600]"), ("codes", "U8")] {
        let error = file.tensor(name).expect_err(name).to_string();
        assert!(error.contains(named), "{name}: {error}");
    }
}

/// Kernels read 16-byte vectors: rows that do not start there are refused for reading in place, and serve the CPU all the same.
#[test]
fn alignment_is_checked_where_kernels_need_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    for (case, k, aligned) in
        [("whole vectors", 64, true), ("half a vector", 60, false), ("one value", 1, false)]
    {
        write(&path, "w", 5, k);
        let weights =
            Weights::in_place(&MappedFile::open(&path).unwrap().tensor("w").unwrap(), Residency::Host)
                .unwrap();
        match weights.check_in_place() {
            Ok(()) => assert!(aligned, "{case}"),
            // A writer may also have put the data between two vectors.
            Err(Error::Misaligned { alignment, offset, .. }) => assert!(offset % alignment != 0, "{case}"),
            Err(other) => panic!("{case}: {other}"),
        }
    }
    // What the device cannot reach says how to change that.
    let weights =
        Weights::pack(RowMajor::from_slice(&[0.0f32; 4], [2, 2]).unwrap(), Format::Int8, Residency::Host);
    let error = weights.unwrap().host_memory().0.device_address(0).unwrap_err();
    assert!(matches!(&error, Error::NotMapped { .. }) && error.to_string().contains("pin"), "{error}");
}

#[test]
fn fractions_become_whole_columns() {
    for (fraction, columns, host) in [
        (0.0, 10, 10),
        (1.0, 10, 0),
        (0.25, 16, 12),
        (0.99, 10, 0),
        (0.5, 1, 0),
        (0.49, 1, 1),
        (0.75, 448, 112),
    ] {
        let found = Residency::HbmFraction(fraction).host_columns(columns).unwrap();
        assert_eq!(found, host, "{fraction} of {columns}");
    }
    for fraction in [-0.01, 1.01, f64::NAN, f64::INFINITY] {
        assert!(Residency::HbmFraction(fraction).host_columns(4).is_err(), "{fraction}");
    }
    // Nothing is lost between the two sides, whatever the last column has.
    let values: Vec<f32> = random(23, 130 * 70);
    let matrix = RowMajor::from_slice(&values, [130, 70]).unwrap();
    for fraction in [0.0, 0.3, 0.6, 1.0] {
        let weights =
            Weights::pack(matrix, Format::Float(DType::F32), Residency::HbmFraction(fraction)).unwrap();
        let placement = weights.placement();
        assert_eq!(
            placement.host_bytes() + placement.hbm_bytes(),
            placement.tiling().packed_bytes() as u64,
            "{fraction}"
        );
    }
}

/// Random codes that are no NaN, random zero points and scales.
fn quantised(seed: u64, shape: [usize; 2], format: Format) -> QuantisedMatrix {
    let int4 = matches!(format, Format::Int4ZeroPoints { .. });
    let code = |rng: &mut fastrand::Rng, _| match int4 {
        true => rng.u8(0..16),
        false => rng.u8(0..=0x7e) | u8::from(rng.bool()) << 7,
    };
    let mut rng = fastrand::Rng::with_seed(seed);
    QuantisedMatrix::new(&mut rng, shape, format, code, |rng, _| rng.u8(0..16))
}

/// The product of a row of X with an output feature in f64, and the sum of the absolute products.
fn product(codes: Codes<'_>, x: &[f32], row: usize) -> (f64, f64) {
    let terms = x.iter().enumerate().map(|(input, x)| f64::from(*x) * codes.weight(row, input));
    terms.fold((0.0, 0.0), |(sum, absolute), term| (sum + term, absolute + term.abs()))
}

const QUANTISED: [Format; 4] = [
    Format::Int4ZeroPoints { group: 32 },
    Format::Int4ZeroPoints { group: 128 },
    Format::Fp8Rows,
    Format::Fp8Blocks,
];

/// The product of X `[3, k]` and packed codes, in f32.
fn multiply(case: &str, codes: Codes<'_>, activation: Activation, x: &[f32]) -> Vec<f32> {
    let weights = Weights::pack_codes(codes, Residency::HbmFraction(0.5)).unwrap();
    let epilogue = EpilogueSpec { activation, ..EpilogueSpec::plain(DType::F32) };
    let config = GemmConfig { epilogue, ..GemmConfig::new(3, DType::F32, device(8)) };
    let gemm = Gemm::prepare(&GemmPlan::new(*weights.placement(), config).unwrap(), weights).unwrap();
    let (out, receipt) = run::<f32, f32>(&gemm, x, None, None).unwrap();
    assert_eq!(receipt.counted, receipt.predicted.traffic, "{case}");
    out
}

/// Products are those of what the codes say, not of what packing makes of them.
#[test]
fn codes_of_a_checkpoint_are_weights() {
    let [n, k] = [200, 300];
    let x: Vec<f32> = random(25, 3 * k);
    for format in QUANTISED {
        let case = format!("{format}, seeds 24 and 25");
        let matrix = quantised(24, [n, k], format);
        let codes = matrix.codes();
        let out = multiply(&case, codes, Activation::Identity, &x);
        assert_eq!(out.len(), 3 * n, "{case}");
        for (index, found) in out.iter().enumerate() {
            let (exact, absolute) = product(codes, &x[index / n * k..][..k], index % n);
            let error = (f64::from(*found) - exact).abs();
            assert!(error <= 2e-6 * absolute, "{case}: output {index} is {found}, not {exact}");
        }
    }
}

/// Interleaved codes give `silu(gate) · up` of the two matrices.
#[test]
fn interleaved_codes_are_gated() {
    let [inner, k] = [104, 300];
    let x: Vec<f32> = random(28, 3 * k);
    for format in QUANTISED.into_iter().filter(|format| *format != Format::Fp8Blocks) {
        let case = format!("{format}, seeds 26 to 28");
        let [gate, up] = [26, 27].map(|seed| quantised(seed, [inner, k], format));
        let [gate, up] = [gate.codes(), up.codes()];
        let both = Codes::interleaved(gate, up).unwrap();
        assert_eq!((both.codes().shape(), both.codes().format()), ([2 * inner, k], format), "{case}");
        let out = multiply(&case, both.codes(), Activation::SwiGlu, &x);
        assert_eq!(out.len(), 3 * inner, "{case}");
        for (index, found) in out.iter().enumerate() {
            let x = &x[index / inner * k..][..k];
            let [(gate, of_gate), (up, of_up)] = [gate, up].map(|codes| product(codes, x, index % inner));
            let silu = gate / (1.0 + (-gate).exp());
            // The slope of SiLU is at most 1.1.
            let bound = 2e-6 * (1.1 * of_gate * (up.abs() + 2e-6 * of_up) + silu.abs() * of_up)
                + 1e-6 * (silu * up).abs();
            let error = (f64::from(*found) - silu * up).abs();
            assert!(error <= bound, "{case}: output {index} is {found}, not {}", silu * up);
        }
    }
}

#[test]
fn refusals_of_codes_name_the_argument() {
    let matrix = quantised(29, [16, 40], Format::Fp8Rows);
    let tiled = |n, k, format| {
        let tiling = Tiling::new(n, k, format).unwrap();
        Weights::pack_codes_tiled(matrix.codes(), tiling, Residency::Host)
    };
    assert!(tiled(16, 40, Format::Fp8Rows).is_ok());
    for (case, result, named) in [
        (
            "another format",
            tiled(16, 40, Format::Fp8Blocks),
            "`codes`: expected [16, 40] of fp8 in blocks of 128 × 128, as the tiling, found [16, 40] of fp8 with",
        ),
        ("another shape", tiled(17, 40, Format::Fp8Rows), "`codes`: expected [17, 40]"),
        ("a fraction", Weights::pack_codes(matrix.codes(), Residency::HbmFraction(1.5)), "hbm_fraction"),
        (
            "nothing",
            Weights::pack_codes(Codes::fp8_rows(&[], &[1.0], [1, 0]).unwrap(), Residency::Host),
            "expected",
        ),
    ] {
        let error = result.expect_err(case).to_string();
        assert!(error.contains(named), "{case}: {error}");
    }
}

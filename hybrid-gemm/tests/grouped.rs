//! Products of experts against a loop of single ones.

mod common;

use common::{device, random, run};
use half::bf16;
use hybrid_gemm::cpu::Gemm;
use hybrid_gemm::grouped::{GroupedArgs, GroupedGemm};
use hybrid_gemm::{
    Activation, DType, EpilogueSpec, Format, GemmConfig, GemmPlan, MatrixView, MatrixViewMut, Path,
    PathChoice, Residency, RowMajor, Weights,
};

const N: usize = 144;
const K: usize = 100;

/// Experts in host memory, in HBM, and in both.
fn experts(count: u64, path: PathChoice) -> Vec<(GemmPlan, Weights)> {
    let residencies = [Residency::Host, Residency::HbmFraction(0.4), Residency::Hbm];
    let expert = |index: u64| {
        let values: Vec<bf16> = random(50 + index, N * K);
        let matrix = RowMajor::from_slice(&values, [N, K]).unwrap();
        let residency = residencies[index as usize % 3];
        let weights = Weights::pack(matrix, Format::Float(DType::BF16), residency).unwrap();
        let epilogue = EpilogueSpec { activation: Activation::SwiGlu, ..EpilogueSpec::plain(DType::F32) };
        let config = GemmConfig { epilogue, path, ..GemmConfig::new(600, DType::BF16, device(8)) };
        (GemmPlan::new(*weights.placement(), config).unwrap(), weights)
    };
    (0..count).map(expert).collect()
}

#[test]
fn a_grouped_product_is_a_loop_of_products() {
    for (case, rows) in [
        ("nobody", vec![0, 0, 0, 0]),
        ("the first has all", vec![600, 0, 0, 0]),
        ("the last has all", vec![0, 0, 0, 300]),
        ("every other", vec![0, 7, 0, 9]),
        ("a Zipf of routes", vec![260, 130, 65, 32]),
        ("one each", vec![1, 1, 1, 1]),
    ] {
        for path in [PathChoice::Fastest, PathChoice::Direct] {
            let experts = experts(4, path);
            let total: usize = rows.iter().sum();
            let x: Vec<bf16> = random(60, (total + 3) * K);
            let mut offsets = vec![0u32];
            offsets.extend(rows.iter().scan(0, |end, rows| {
                *end += *rows as u32;
                Some(*end)
            }));
            let grouped = GroupedGemm::prepare(experts.clone()).unwrap();
            let canary = -7.0f32;
            let mut out = vec![canary; (total + 3) * N / 2];
            let mut workspace = vec![f32::NAN; grouped.workspace_len(600)];
            let args = GroupedArgs {
                x: MatrixView::new(&x, total + 3, K).unwrap(),
                offsets: &offsets,
                out: MatrixViewMut::new(&mut out, total + 3, N / 2).unwrap(),
            };
            let receipt = grouped.run(args, &mut workspace).unwrap();
            assert_eq!(receipt.counted, receipt.predicted.traffic, "{case}");

            let mut link_bytes = 0;
            let mut first = 0;
            for ((plan, weights), rows) in experts.into_iter().zip(&rows) {
                let gemm = Gemm::prepare(&plan, weights).unwrap();
                let (alone, receipt) =
                    run::<bf16, f32>(&gemm, &x[first * K..(first + rows) * K], None, None).unwrap();
                assert!(alone == out[first * N / 2..(first + rows) * N / 2], "{case}: rows from {first}");
                // Experts without rows are not fetched.
                link_bytes += receipt.counted.link_bytes;
                assert_eq!(
                    receipt.counted.link_bytes > 0,
                    *rows > 0 && plan.placement().host_columns() > 0,
                    "{case}"
                );
                first += rows;
            }
            assert_eq!(receipt.counted.link_bytes, link_bytes, "{case}");
            assert!(out[total * N / 2..].iter().all(|value| *value == canary), "{case}: padding was written");
        }
    }
}

/// Experts with few rows do not all meet on the first blocks.
#[test]
fn experts_continue_the_deal() {
    let grouped = GroupedGemm::prepare(experts(9, PathChoice::Only(Path::Direct { alpha: 1.0 }))).unwrap();
    let launches = grouped.launches(&[4; 9]).unwrap();
    let mut steps = vec![0; 8];
    for launch in launches.iter().flatten().filter(|launch| launch.schedule.hbm_columns == 0) {
        for (block, steps) in steps.iter_mut().enumerate() {
            *steps += launch.schedule.steps(block);
        }
    }
    let (most, least) = (steps.iter().max().unwrap(), steps.iter().min().unwrap());
    assert!(*most > 0 && most - least <= launches[0][0].schedule.k_tiles, "{steps:?}");
}

#[test]
fn refusals_name_the_argument() {
    assert!(GroupedGemm::prepare(Vec::new()).unwrap_err().to_string().contains("experts"));
    let mut two = experts(2, PathChoice::Fastest);
    two[1].0 = experts(2, PathChoice::Direct).remove(1).0;
    assert!(GroupedGemm::prepare(two).unwrap_err().to_string().contains("expert 1"));

    let grouped = GroupedGemm::prepare(experts(2, PathChoice::Fastest)).unwrap();
    let x = vec![bf16::ONE; 10 * K];
    for (case, offsets, named) in [
        ("too few", &[0, 10][..], "3 values"),
        ("not from 0", &[1, 5, 10], "0 first"),
        ("falling", &[0, 6, 5], "6 before 5"),
        ("past the rows", &[0, 6, 11], "at most 10"),
    ] {
        let mut out = vec![0.0f32; 10 * N / 2];
        let args = GroupedArgs {
            x: MatrixView::new(&x, 10, K).unwrap(),
            offsets,
            out: MatrixViewMut::new(&mut out, 10, N / 2).unwrap(),
        };
        let error = grouped.run(args, &mut []).unwrap_err().to_string();
        assert!(error.contains("offsets") && error.contains(named), "{case}: {error}");
    }
}

//! Products of experts against a loop of single ones.

mod common;

use common::{device, random, run};
use half::bf16;
use hybrid_gemm::cpu::Gemm;
use hybrid_gemm::grouped::{GroupedArgs, GroupedGemm, GroupedPlan};
use hybrid_gemm::{
    Activation, Alpha, DType, EpilogueSpec, Format, GemmConfig, GemmPlan, MatrixView, MatrixViewMut, Path,
    PathChoice, Residency, RowMajor, Weights,
};

const N: usize = 144;
const K: usize = 100;

/// Experts in host memory, in HBM, and in both.
fn experts(count: u64, alpha: Alpha) -> (GroupedPlan, Vec<Weights>) {
    let residencies = [Residency::Host, Residency::HbmFraction(0.4), Residency::Hbm];
    let expert = |index: u64| {
        let values: Vec<bf16> = random(50 + index, N * K);
        let matrix = RowMajor::from_slice(&values, [N, K]).unwrap();
        Weights::pack(matrix, Format::Float(DType::BF16), residencies[index as usize % 3]).unwrap()
    };
    let weights: Vec<Weights> = (0..count).map(expert).collect();
    let placements = weights.iter().map(|weights| *weights.placement()).collect();
    (GroupedPlan::new(placements, config(alpha)).unwrap(), weights)
}

fn config(alpha: Alpha) -> GemmConfig {
    let epilogue = EpilogueSpec { activation: Activation::SwiGlu, ..EpilogueSpec::plain(DType::F32) };
    GemmConfig { epilogue, alpha, ..GemmConfig::new(600, DType::BF16, device(8)) }
}

#[test]
fn a_grouped_product_is_a_loop_of_products() {
    for (case, rows) in [
        ("nobody", vec![0, 0, 0, 0]),
        ("the first has all", vec![600, 0, 0, 0]),
        ("the last has all", vec![0, 0, 0, 300]),
        ("every other", vec![0, 7, 0, 9]),
        ("a Zipf of routes", vec![260, 130, 65, 32]),
        ("all full", vec![150, 150, 150, 150]),
        ("one each", vec![1, 1, 1, 1]),
    ] {
        for alpha in [Alpha::Auto, Alpha::Fixed(1.0), Alpha::Fixed(0.0), Alpha::Fixed(0.5)] {
            let case = format!("{case}, {alpha:?}");
            let (plan, experts) = experts(4, alpha);
            let total: usize = rows.iter().sum();
            let x: Vec<bf16> = random(60, (total + 3) * K);
            let mut offsets = vec![0u32];
            offsets.extend(rows.iter().scan(0, |end, rows| {
                *end += *rows as u32;
                Some(*end)
            }));
            let grouped = GroupedGemm::prepare(&plan, experts.clone()).unwrap();
            let canary = -7.0f32;
            let mut out = vec![canary; (total + 3) * N / 2];
            let mut workspace = vec![f32::NAN; plan.workspace_len()];
            let args = GroupedArgs {
                x: MatrixView::new(&x, total + 3, K).unwrap(),
                offsets: &offsets,
                out: MatrixViewMut::new(&mut out, total + 3, N / 2).unwrap(),
            };
            let receipt = grouped.run(args, &mut workspace).unwrap();
            assert_eq!(receipt.counted, receipt.predicted.traffic, "{case}");

            let (mut once, mut read_by_each_panel) = (0, 0);
            let mut first = 0;
            for (weights, rows) in experts.into_iter().zip(&rows) {
                let single =
                    GemmConfig { path: PathChoice::Only(Path::Direct { alpha: 1.0 }), ..config(alpha) };
                let gemm =
                    Gemm::prepare(&GemmPlan::new(*weights.placement(), single).unwrap(), weights).unwrap();
                let (alone, receipt) =
                    run::<bf16, f32>(&gemm, &x[first * K..(first + rows) * K], None, None).unwrap();
                assert!(alone == out[first * N / 2..(first + rows) * N / 2], "{case}: rows from {first}");
                // Experts without rows are not fetched.
                read_by_each_panel += receipt.counted.link_bytes;
                once += if *rows > 0 { gemm.plan().placement().host_bytes() } else { 0 };
                first += rows;
            }
            let link = receipt.counted.link_bytes;
            match alpha {
                Alpha::Fixed(1.0) => assert_eq!(link, read_by_each_panel, "{case}"),
                Alpha::Fixed(0.0) => assert_eq!(link, once, "{case}: active experts, each byte once"),
                _ => assert!((once..=read_by_each_panel).contains(&link), "{case}: {link}"),
            }
            assert!(out[total * N / 2..].iter().all(|value| *value == canary), "{case}: padding was written");
        }
    }
}

/// Experts with few rows do not all meet on the first blocks.
#[test]
fn experts_continue_the_deal() {
    let (plan, _) = experts(9, Alpha::Fixed(1.0));
    let launches = plan.launches(&[4; 9]).unwrap();
    let [mut link, mut hbm] = [vec![0; plan.schedule().os_blocks], vec![0; plan.schedule().hbm_blocks]];
    for launch in launches.iter().flatten() {
        for (block, steps) in link.iter_mut().chain(&mut hbm).enumerate() {
            *steps += launch.schedule.steps(block);
        }
    }
    for (role, steps) in [("link", link), ("HBM", hbm)] {
        let (most, least) = (steps.iter().max().unwrap(), steps.iter().min().unwrap());
        assert!(*most > 0 && most - least <= plan.schedule().k_tiles, "{role}: {steps:?}");
    }
}

#[test]
fn refusals_name_the_argument() {
    let nobody = GroupedPlan::new(Vec::new(), config(Alpha::Auto));
    assert!(nobody.unwrap_err().to_string().contains("experts"));
    let (plan, mut weights) = experts(2, Alpha::Auto);
    weights.swap(0, 1);
    assert!(GroupedGemm::prepare(&plan, weights).unwrap_err().to_string().contains("expert 0"));
    assert!(GroupedGemm::prepare(&plan, Vec::new()).unwrap_err().to_string().contains("2, as planned"));

    let (plan, weights) = experts(2, Alpha::Auto);
    let grouped = GroupedGemm::prepare(&plan, weights).unwrap();
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

//! What plans of steps refuse.

use super::*;

#[test]
fn refused_plans_name_the_argument() {
    let plan = Plan::new(&config(), &[spec()]).unwrap();
    let extent = Extent::of(&plan, 2, MAX_TOKENS, PROMPT, 1.0).unwrap();
    let good =
        StepConfig { extent, prompt_tokens: PROMPT, splits: Splits::Balanced, link_blocks: 8, sm_count: 4 };
    let wide = sparse_attn::page::PageSpec::new(32, DIM, DIM, DType::F16).unwrap();
    assert!(StepPlan::new(&plan, 0, good).is_ok_and(|plan| plan.bytes_moved(16, 6) > 0));
    for (layer, config, named) in [
        (1, good, "layer"),
        (0, StepConfig { prompt_tokens: 0, ..good }, "tokens"),
        (0, StepConfig { prompt_tokens: 10_000, ..good }, "prompt_tokens"),
        (0, StepConfig { extent: Extent { max_pages: 0, ..extent }, ..good }, "max_pages"),
        (0, StepConfig { extent: Extent { page: wide, ..extent }, ..good }, "extent"),
        (0, StepConfig { link_blocks: 0, ..good }, "blocks"),
        (0, StepConfig { extent: Extent { slots: 1, ..extent }, ..good }, "max_selected"),
        (0, StepConfig { extent: Extent { max_selected: 1, ..extent }, ..good }, "pages"),
    ] {
        match StepPlan::new(&plan, layer, config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {:?}", other.map(|_| ())),
        }
    }
    let retro = Plan::new(&Config { dtype: DType::F16, ..Config::retro_infer(1600) }, &[spec()]).unwrap();
    assert!(matches!(
        Extent::of(&retro, 1, 4096, 4096, 1.0),
        Err(Error::Argument { argument: "algorithm", .. })
    ));
    // Kernels have no f32 pages.
    let f32_pages = Plan::new(&Config { dtype: DType::F32, ..config() }, &[spec()]).unwrap();
    let extent = Extent::of(&f32_pages, 1, MAX_TOKENS, PROMPT, 1.0).unwrap();
    let plan = StepPlan::new(&f32_pages, 0, StepConfig { extent, ..good }).unwrap();
    let refused = Step::<_, f16>::prepare(&emulator::Emulator::new(), &plan);
    assert!(matches!(refused, Err(Error::Argument { argument: "dtype", .. }) | Err(Error::Cuda(_))));
}

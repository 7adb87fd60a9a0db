//! What plans of a prefill refuse.

use super::*;

#[test]
fn plans_refuse_what_no_kernel_can_do() {
    let case = Case::new((4, 2), (128, 128), &[(20, 40)], Cache::Nhd(16), Mask::Causal);
    let layout = PageLayout::nhd(16, 2, 128);
    let cache = |page_size, pages, head_stride| CacheLayout::Paged {
        page_size,
        pages,
        max_pages: 4,
        per_head: false,
        k: layout,
        v: PageLayout { head_stride, ..layout },
    };
    let good = PrefillConfig {
        spec: case.spec(),
        batch: 1,
        num_queries: 20,
        max_kv_len: 64,
        cache: cache(16, 8, 128),
        carry: false,
        kernel: PrefillKernel::MmaSync,
    };
    PrefillPlan::new(good).expect("a valid plan");
    let bad = [
        ("batch", PrefillConfig { batch: 0, ..good }),
        (
            "mask",
            PrefillConfig {
                spec: AttentionSpec { mask: Mask::SlidingWindow { window: 0, sinks: 1 }, ..good.spec },
                ..good
            },
        ),
        ("num_queries", PrefillConfig { num_queries: usize::MAX, ..good }),
        ("max_kv_len", PrefillConfig { max_kv_len: usize::MAX, ..good }),
        ("page_size", PrefillConfig { cache: cache(12, 8, 128), ..good }),
        ("pages", PrefillConfig { cache: cache(16, 0, 128), ..good }),
        ("v", PrefillConfig { cache: cache(16, 8, 127), ..good }),
    ];
    for (argument, config) in bad {
        match PrefillPlan::new(config) {
            Err(Error::Argument { argument: found, .. }) => assert_eq!(found, argument),
            other => panic!("{argument}: {other:?}"),
        }
    }
    let odd = HeadShape::new(2, 1, 80, 64).expect("a valid shape");
    let contiguous = |dim| PageLayout { page_stride: 0, token_stride: dim, head_stride: dim };
    let tokens = CacheLayout::Contiguous { tokens: 64, k: contiguous(80), v: contiguous(64) };
    let spec = AttentionSpec { shape: odd, ..good.spec };
    match PrefillPlan::new(PrefillConfig { spec, cache: tokens, ..good }) {
        Err(Error::Cuda(error)) => assert!(error.to_string().contains("QK_DIM"), "{error}"),
        other => panic!("{other:?}"),
    }
    for kernel in
        [PrefillKernel::Auto, PrefillKernel::MmaSync, PrefillKernel::Wgmma, PrefillKernel::WgmmaCopies]
    {
        let capped = |cap| {
            let score = good.spec.score.with_soft_cap(cap).expect("a positive cap");
            PrefillPlan::new(PrefillConfig { spec: AttentionSpec { score, ..good.spec }, kernel, ..good })
        };
        capped(MAX_SOFT_CAP).expect("the largest cap");
        for cap in [257.0, 1e6, f32::MAX] {
            match capped(cap) {
                Err(Error::Cuda(error)) => assert!(error.to_string().contains("at most 256"), "{error}"),
                other => panic!("{cap} by {kernel:?}: {other:?}"),
            }
        }
    }
}

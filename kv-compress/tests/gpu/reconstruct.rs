//! Rebuilding dense keys and values.

use attention::testing::{Comparison, Inputs, Tolerance};
use attention::{Element, HeadShape};
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use kv_compress::cache::PageLayout;
use kv_compress::gpu::{Reconstruct, ReconstructArgs, ReconstructPlan};

use crate::cache::ranks;

emulator::device_test!(equals_the_product);

fn check<R: Rig, E: Storage + Element>(rig: &R, head_dim: usize, pairs: &[(usize, usize)], page_size: usize) {
    const PAGES: usize = 3;
    let shape = HeadShape::new(pairs.len(), pairs.len(), head_dim, head_dim).expect("a valid shape");
    let layout = PageLayout::new(&ranks(&shape, pairs), page_size).expect("a valid page size");
    let pages: Vec<E> = Inputs::Normal.generate(PAGES * layout.page_elements(), 1, 1);
    let scale = (head_dim as f32).powf(-0.5);
    let back = |rank: fn(&(usize, usize)) -> usize, seed| -> Vec<E> {
        let elements = pairs.iter().map(rank).sum::<usize>() * head_dim;
        let values = Inputs::Normal.values(elements, 1, seed);
        values.into_iter().map(|x| E::from_f32(x * scale)).collect()
    };
    let (back_k, back_v) = (back(|pair| pair.0, 2), back(|pair| pair.1, 3));
    // [pages, kv_heads, page_size, head_dim] in f64.
    let product = |back: &[E], region: &dyn Fn(usize) -> kv_compress::cache::layout::Region| -> Vec<f64> {
        let mut dense = Vec::new();
        for page in pages.chunks(layout.page_elements()) {
            let mut before = 0;
            for head in 0..pairs.len() {
                let region = region(head);
                let mut row = vec![E::from_f32(0.0); region.rank()];
                for token in 0..page_size {
                    region.read(page, token, &mut row);
                    dense.extend((0..head_dim).map(|c| -> f64 {
                        let column = |i: usize| back[(before + i) * head_dim + c].to_f64();
                        row.iter().enumerate().map(|(i, x)| x.to_f64() * column(i)).sum()
                    }));
                }
                before += region.rank();
            }
        }
        dense
    };
    let expected_k = product(&back_k, &|head| layout.keys(head));
    let expected_v = product(&back_v, &|head| layout.values(head));

    let plan = ReconstructPlan::new(shape, &layout, PAGES).expect("a valid plan");
    let kernel = Reconstruct::<_, E>::prepare(rig.device(), &plan).expect("prepare");
    assert_eq!(plan.dense_elements(), expected_k.len());
    let (mut k, mut v) = (rig.poisoned::<E>(expected_k.len()), rig.poisoned::<E>(expected_v.len()));
    let (pages, back_k, back_v) = (rig.upload(&pages), rig.upload(&back_k), rig.upload(&back_v));
    let args = ReconstructArgs {
        pages: &rig.view(&pages),
        back_k: &rig.view(&back_k),
        back_v: &rig.view(&back_v),
        k: rig.view_mut(&mut k),
        v: rig.view_mut(&mut v),
    };
    kernel.run(rig.queue(), args).expect("run");
    let name = format!("{pairs:?} of {head_dim} in pages of {page_size} on {}", rig.name());
    // One rounding, and f32's error in the sums.
    let tolerance = Tolerance::new(1e-5, <E as Element>::DTYPE.epsilon());
    Comparison::new(&rig.download(&k), &expected_k, tolerance).assert(format_args!("keys, {name}"));
    Comparison::new(&rig.download(&v), &expected_v, tolerance).assert(format_args!("values, {name}"));
}

fn equals_the_product<R: Rig>(rig: &R) {
    check::<R, f16>(rig, 64, &[(16, 64), (48, 32)], 16);
    check::<R, bf16>(rig, 128, &[(128, 16), (80, 96), (16, 128)], 32);
}

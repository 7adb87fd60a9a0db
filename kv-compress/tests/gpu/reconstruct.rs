//! Rebuilding dense keys and values.

use attention::testing::{Comparison, Inputs, Tolerance};
use attention::{Element, HeadShape};
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use kv_compress::cache::PageLayout;
use kv_compress::cache::layout::Region;
use kv_compress::gpu::{PackedMaps, Reconstruct, ReconstructArgs, ReconstructPlan};
use kv_compress::{HeadMaps, LayerProjection};

use crate::cache::ranks;

emulator::device_test!(equals_the_product, packed_maps_lead_back);

const PAGES: usize = 3;

/// What a region of every page stands for: X·B, with B of all heads `[Σ r, head_dim]`, as
/// `[pages, kv_heads, page_size, head_dim]` in f64.
fn product<E: Element>(
    layout: &PageLayout,
    pages: &[E],
    back: &[E],
    head_dim: usize,
    region: fn(&PageLayout, usize) -> Region,
) -> Vec<f64> {
    let mut dense = Vec::new();
    for page in pages.chunks(layout.page_elements()) {
        let mut before = 0;
        for head in 0..layout.ranks().kv_heads() {
            let region = region(layout, head);
            let mut row = vec![E::from_f32(0.0); region.rank()];
            for token in 0..layout.page_size() {
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
}

/// Rebuilds the keys and values of every page and compares them.
fn check<R: Rig, E: Storage + Element>(
    rig: &R,
    (shape, layout): (HeadShape, &PageLayout),
    pages: &[E],
    [back_k, back_v]: [&[E]; 2],
    [expected_k, expected_v]: [Vec<f64>; 2],
) {
    let plan = ReconstructPlan::new(shape, layout, PAGES).expect("a valid plan");
    let kernel = Reconstruct::<_, E>::prepare(rig.device(), &plan).expect("prepare");
    assert_eq!(plan.dense_elements(), expected_k.len());
    let (mut k, mut v) = (rig.poisoned::<E>(expected_k.len()), rig.poisoned::<E>(expected_v.len()));
    let (pages, back_k, back_v) = (rig.upload(pages), rig.upload(back_k), rig.upload(back_v));
    let args = ReconstructArgs {
        pages: &rig.view(&pages),
        back_k: &rig.view(&back_k),
        back_v: &rig.view(&back_v),
        k: rig.view_mut(&mut k),
        v: rig.view_mut(&mut v),
    };
    kernel.run(rig.queue(), args).expect("run");
    let name = format!("{:?} in pages of {} on {}", layout.ranks().heads(), layout.page_size(), rig.name());
    // One rounding, and f32's error in the sums.
    let tolerance = Tolerance::new(1e-5, <E as Element>::DTYPE.epsilon());
    Comparison::new(&rig.download(&k), &expected_k, tolerance).assert(format_args!("keys, {name}"));
    Comparison::new(&rig.download(&v), &expected_v, tolerance).assert(format_args!("values, {name}"));
}

fn check_product<R: Rig, E: Storage + Element>(
    rig: &R,
    head_dim: usize,
    pairs: &[(usize, usize)],
    page_size: usize,
) {
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
    let expected = [
        product(&layout, &pages, &back_k, head_dim, PageLayout::keys),
        product(&layout, &pages, &back_v, head_dim, PageLayout::values),
    ];
    check(rig, (shape, &layout), &pages, [&back_k, &back_v], expected);
}

fn equals_the_product<R: Rig>(rig: &R) {
    check_product::<R, f16>(rig, 64, &[(16, 64), (48, 32)], 16);
    check_product::<R, bf16>(rig, 128, &[(128, 16), (80, 96), (16, 128)], 32);
}

/// With a layer's packed maps, keys come back as what scores see of them, K̃·Aᵀ, and values as [`LayerProjection::lift`] says.
fn packed_maps_lead_back<R: Rig>(rig: &R) {
    const DIM: usize = 64;
    let shape = HeadShape::new(2, 2, DIM, DIM).expect("a valid shape");
    let ranks = ranks(&shape, &[(16, 64), (48, 32)]);
    let layout = PageLayout::new(&ranks, 16).expect("a valid page size");
    // Four unlike maps of each head, of values that f16 holds.
    let map = |rank: usize, seed| -> Vec<f32> {
        let values = Inputs::Normal.values(rank, DIM, seed);
        values.into_iter().map(|x| f16::from_f32(x / 8.0).to_f32()).collect()
    };
    let heads = ranks.heads().iter().zip([10, 20]).map(|(ranks, seed)| HeadMaps {
        query: map(ranks.k, seed),
        key: map(ranks.k, seed + 1),
        value: map(ranks.v, seed + 2),
        output: map(ranks.v, seed + 3),
    });
    let projection = LayerProjection::from_maps(shape, ranks.clone(), heads.collect()).expect("valid maps");
    let packed = PackedMaps::<f16>::new(&projection).expect("maps that f16 holds");

    let pages: Vec<f16> = Inputs::Normal.generate(PAGES * layout.page_elements(), 1, 1);
    let query = projection.heads().iter().flat_map(|maps| &maps.query);
    let query: Vec<f16> = query.map(|x| f16::from_f32(*x)).collect();
    let keys = product(&layout, &pages, &query, DIM, PageLayout::keys);

    // With one query head per KV head, outputs [tokens, Σ r_v] are what the values of a token are.
    let mut out = Vec::new();
    for page in pages.chunks(layout.page_elements()) {
        for token in 0..layout.page_size() {
            for head in 0..shape.kv_heads() {
                let region = layout.values(head);
                out.extend((0..region.rank()).map(|i| page[region.element(token, i)].to_f32()));
            }
        }
    }
    let lifted = projection.lift(&out).expect("outputs");
    let mut values = Vec::new();
    for page in lifted.chunks(layout.page_size() * shape.kv_heads() * DIM) {
        for head in 0..shape.kv_heads() {
            let of_head = page.chunks(DIM).skip(head).step_by(shape.kv_heads());
            values.extend(of_head.flatten().map(|x| f64::from(*x)));
        }
    }
    check(rig, (shape, &layout), &pages, [&packed.back_k, &packed.back_v], [keys, values]);
}

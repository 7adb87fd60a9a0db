//! `sparse-attn`: replacement on a recorded drift, and the kernels of a step: pages, selection, attention, all of it.

mod attend;
mod pages;
mod policies;
mod select;
mod step;

use criterion::criterion_group;

criterion_group!(
    benches,
    policies::hit_rates,
    pages::cpu,
    pages::resolve,
    pages::gather,
    select::cpu,
    select::gpu,
    attend::gpu,
    step::gpu
);

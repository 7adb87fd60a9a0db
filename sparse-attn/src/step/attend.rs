//! Attention over what a layer holds.

use std::ops::Range;

use attention::softmax_state::{Raw, merge_normalised};
use attention::{AttentionSpec, Element, HeadShape, HeadsView, Mask, cpu};

use super::Resolved;
use super::layer::Layer;
use crate::Error;
use crate::device_pool::DevicePool;
use crate::error::check_len;
use crate::host_pool::HostPool;
use crate::index::dot;
use crate::page::PageSpec;

/// Keys `[tokens, qk_dim]` and values `[tokens, v_dim]` of one head, gathered.
struct Gathered<E> {
    k: Vec<E>,
    v: Vec<E>,
}

impl<E: Element> Gathered<E> {
    fn new() -> Self {
        Gathered { k: Vec::new(), v: Vec::new() }
    }

    /// Adds the first tokens of a run.
    fn push_run(&mut self, page: &PageSpec, run: &[E], tokens: usize) {
        self.k.extend_from_slice(&run[page.keys(tokens)]);
        self.v.extend_from_slice(&run[page.values(tokens)]);
    }

    /// Adds a layer's open tokens.
    fn push_open(&mut self, page: &PageSpec, layer: &Layer<E>, kv_head: usize) {
        let heads = layer.heads().len();
        for (to, from, dim) in
            [(&mut self.k, &layer.open.k, page.qk_dim()), (&mut self.v, &layer.open.v, page.v_dim())]
        {
            to.extend(from.chunks_exact(dim).skip(kv_head).step_by(heads).flatten());
        }
    }

    /// Attention of queries `q` `[tokens, group, qk_dim]` over these.
    fn attend(
        &self,
        spec: &AttentionSpec,
        page: &PageSpec,
        q: &[f32],
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        let (group, tokens) = (spec.shape.q_heads(), self.v.len() / page.v_dim());
        Ok(cpu::attend(
            spec,
            HeadsView::nhd(q, q.len() / (group * page.qk_dim()), group, page.qk_dim())?,
            HeadsView::nhd(&self.k, tokens, 1, page.qk_dim())?,
            HeadsView::nhd(&self.v, tokens, 1, page.v_dim())?,
            out,
            lse,
        )?)
    }
}

/// The same attention for one KV head.
fn of_one_head(spec: &AttentionSpec, mask: Mask) -> Result<AttentionSpec, Error> {
    let shape = HeadShape::new(spec.shape.group(), 1, spec.shape.qk_dim(), spec.shape.v_dim())?;
    Ok(AttentionSpec { shape, mask, ..*spec })
}

/// Checks queries and outputs; gives how many tokens there are.
fn check(spec: &AttentionSpec, q: &[f32], out: &[f32], lse: &[f32]) -> Result<usize, Error> {
    let (shape, tokens) = (spec.shape, lse.len() / spec.shape.q_heads());
    check_len("lse", lse.len(), &[tokens, shape.q_heads()])?;
    check_len("q", q.len(), &[tokens, shape.q_heads(), shape.qk_dim()])?;
    check_len("out", out.len(), &[tokens, shape.q_heads(), shape.v_dim()])?;
    Ok(tokens)
}

impl<E: Element> Layer<E> {
    /// Keys and values of one head: closed pages, then open tokens.
    fn everything(&self, page: &PageSpec, host: &HostPool<E>, kv_head: usize) -> Result<Gathered<E>, Error> {
        let mut all = Gathered::new();
        let lengths = self.heads()[kv_head].partitions().page_lengths();
        for (&number, &length) in self.host_pages.iter().zip(lengths) {
            all.push_run(page, host.run(number, kv_head)?, usize::from(length));
        }
        all.push_open(page, self, kv_head);
        Ok(all)
    }

    /// What [`Cache::read`](super::Cache::read) gives.
    pub(super) fn read(
        &self,
        page: &PageSpec,
        host: &HostPool<E>,
        kv_head: usize,
    ) -> Result<(Vec<E>, Vec<E>), Error> {
        let Gathered { k, v } = self.everything(page, host, kv_head)?;
        Ok((k, v))
    }

    /// Dense attention of the last tokens: `q` `[tokens, q_heads, qk_dim]` over everything that is held.
    ///
    /// Clusters keep closed tokens in another order, which does no harm: all of them are before the open ones, and the new
    /// tokens, whose order the mask needs, are open.
    pub(super) fn attend_dense(
        &self,
        spec: &AttentionSpec,
        page: &PageSpec,
        host: &HostPool<E>,
        q: &[f32],
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        let (shape, new) = (spec.shape, check(spec, q, out, lse)?);
        if self.is_dense() {
            let held = self.open_tokens();
            return Ok(cpu::attend(
                spec,
                HeadsView::nhd(q, new, shape.q_heads(), shape.qk_dim())?,
                HeadsView::nhd(&self.open.k, held, shape.kv_heads(), shape.qk_dim())?,
                HeadsView::nhd(&self.open.v, held, shape.kv_heads(), shape.v_dim())?,
                out,
                lse,
            )?);
        }
        let one = of_one_head(spec, spec.mask)?;
        for kv_head in 0..shape.kv_heads() {
            let all = self.everything(page, host, kv_head)?;
            let heads = shape.q_heads_of(kv_head);
            let mine: Vec<f32> = q
                .chunks_exact(shape.q_heads() * shape.qk_dim())
                .flat_map(|token| &token[of(&heads, shape.qk_dim())])
                .copied()
                .collect();
            let mut part = vec![0.0; new * shape.group() * shape.v_dim()];
            let mut part_lse = vec![0.0; new * shape.group()];
            all.attend(&one, page, &mine, &mut part, &mut part_lse)?;
            for token in 0..new {
                let rows = token * shape.q_heads() + heads.start..token * shape.q_heads() + heads.end;
                let mine = token * shape.group()..(token + 1) * shape.group();
                lse[rows.clone()].copy_from_slice(&part_lse[mine.clone()]);
                out[of(&rows, shape.v_dim())].copy_from_slice(&part[of(&mine, shape.v_dim())]);
            }
        }
        Ok(())
    }

    /// Attention of one token over what was resolved: hits and open tokens, then misses, then estimates.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a cache that attention reads, and its outputs"
    )]
    pub(super) fn attend_sparse(
        &self,
        spec: &AttentionSpec,
        page: &PageSpec,
        device: &DevicePool<E>,
        q: &[f32],
        resolved: &Resolved,
        out: &mut [f32],
        lse: &mut [f32],
    ) -> Result<(), Error> {
        let shape = spec.shape;
        let tokens = check(spec, q, out, lse)?;
        if tokens != 1 {
            return Err(Error::argument("q", "1 token", tokens));
        }
        let one = of_one_head(spec, Mask::Full)?;
        for (kv_head, head) in self.heads().iter().enumerate() {
            let (selected, resolution) = (&resolved.selection.heads[kv_head], &resolved.heads[kv_head]);
            let (mut hits, mut misses) = (Gathered::new(), Gathered::new());
            let mut missed = resolution.misses.iter().map(|miss| miss.place as usize).peekable();
            for (place, (&number, &slot)) in selected.pages.iter().zip(&resolution.slots).enumerate() {
                let to = if missed.next_if_eq(&place).is_some() { &mut misses } else { &mut hits };
                let length = usize::from(head.partitions().page_lengths()[number as usize]);
                let Some(run) = head.device_page(slot as usize) else {
                    return Err(Error::argument("resolved", "slots that hold pages", format!("slot {slot}")));
                };
                to.push_run(page, device.run(run)?, length);
            }
            hits.push_open(page, self, kv_head);

            let heads = shape.q_heads_of(kv_head);
            let q = &q[of(&heads, shape.qk_dim())];
            let (out, lse) = (&mut out[of(&heads, shape.v_dim())], &mut lse[heads]);
            hits.attend(&one, page, q, out, lse)?;
            let (mut other, mut other_lse) = (vec![0.0; out.len()], vec![0.0; lse.len()]);
            if !misses.v.is_empty() {
                misses.attend(&one, page, q, &mut other, &mut other_lse)?;
                merge(out, lse, &other, &other_lse)?;
            }
            if !selected.estimated.is_empty() {
                for (row, q) in q.chunks_exact(shape.qk_dim()).enumerate() {
                    let mut state = Raw::<f64>::empty(shape.v_dim());
                    for &partition in &selected.estimated {
                        let Some(estimate) = head.index().estimate(partition as usize) else { continue };
                        let tokens = estimate.tokens as f64;
                        let score = spec.score.apply_f64(dot(q, estimate.centroid));
                        // `tokens` keys of this score, whose values have this mean.
                        state.push(
                            score + tokens.ln(),
                            estimate.value_sum.iter().map(|&v| f64::from(v) / tokens),
                        );
                    }
                    let state = state.normalise();
                    other_lse[row] = state.lse as f32;
                    let to = &mut other[row * shape.v_dim()..][..shape.v_dim()];
                    to.iter_mut().zip(&state.out).for_each(|(to, &x)| *to = x as f32);
                }
                merge(out, lse, &other, &other_lse)?;
            }
        }
        Ok(())
    }
}

/// Elements of a range of vectors.
fn of(vectors: &Range<usize>, dim: usize) -> Range<usize> {
    vectors.start * dim..vectors.end * dim
}

/// Merges states of the same rows over other keys.
fn merge(out: &mut [f32], lse: &mut [f32], other: &[f32], other_lse: &[f32]) -> Result<(), Error> {
    let v_dim = out.len() / lse.len();
    let rows = out.chunks_exact_mut(v_dim).zip(other.chunks_exact(v_dim));
    for ((lse, &other_lse), (out, other)) in lse.iter_mut().zip(other_lse).zip(rows) {
        merge_normalised(out, lse, other, other_lse)?;
    }
    Ok(())
}

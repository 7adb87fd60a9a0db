//! Projected keys and values in 16 bits, in the ragged pages of `kv-compress`.

use attention::{AttentionSpec, Element, HeadShape, HeadsView, cpu};
use kv_compress::cache::{LayerCache, PageLayout, SequenceId, layout::DEFAULT_PAGE_SIZE};
use kv_compress::{LayerRanks, reference};
use ndarray::{Array2, s};

use super::store::{Store, columns};
use crate::Error;

/// One layer of one sequence, stored as `T`, a 16-bit type.
pub(super) struct Paged<T> {
    spec: AttentionSpec,
    cache: LayerCache<T>,
    sequence: SequenceId,
}

impl<T: Element> Paged<T> {
    pub(super) fn new(spec: &AttentionSpec, ranks: &LayerRanks, capacity: usize) -> Result<Self, Error> {
        let layout = PageLayout::new(ranks, DEFAULT_PAGE_SIZE)?;
        let mut cache = LayerCache::new(layout, capacity.div_ceil(DEFAULT_PAGE_SIZE))?;
        let sequence = cache.create()?;
        Ok(Paged { spec: *spec, cache, sequence })
    }
}

impl<T: Element> Store for Paged<T> {
    fn tokens(&self) -> usize {
        self.cache.tokens(self.sequence).expect("the layer's own sequence")
    }

    fn append(&mut self, keys: &[f32], values: &[f32]) -> Result<(), Error> {
        Ok(self.cache.append(self.sequence, keys, values)?)
    }

    fn forward(&mut self, q: &[f32], keys: &[f32], values: &[f32]) -> Result<Array2<f32>, Error> {
        self.append(keys, values)?;
        let AttentionSpec { shape, score, mask } = self.spec;
        let (ranks, group) = (self.cache.layout().ranks(), shape.group());
        let (q_starts, out_starts) =
            (reference::query_starts(ranks, group), reference::output_starts(ranks, group));
        let (q_row, out_row) = (q_starts[shape.q_heads()], out_starts[shape.q_heads()]);
        let (new, held) = (q.len() / q_row, self.tokens());
        let mut all = Array2::zeros((new, out_row));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (kv_head, head) in ranks.heads().iter().enumerate() {
            self.cache.gather(self.sequence, kv_head, &mut keys, &mut values)?;
            let first = kv_head * group;
            let spec = AttentionSpec { shape: HeadShape::new(group, 1, head.k, head.v)?, score, mask };
            let q = columns(q, q_row, q_starts[first]..q_starts[first + group]);
            let mut out = Array2::zeros((new, group * head.v));
            let mut lse = vec![0.0; new * group];
            cpu::attend(
                &spec,
                HeadsView::nhd(&q, new, group, head.k)?,
                HeadsView::nhd(&keys, held, 1, head.k)?,
                HeadsView::nhd(&values, held, 1, head.v)?,
                out.as_slice_mut().expect("a new array"),
                &mut lse,
            )?;
            all.slice_mut(s![.., out_starts[first]..out_starts[first + group]]).assign(&out);
        }
        Ok(all)
    }

    /// Pages in use, rows that hold no token yet included.
    fn bytes(&self) -> usize {
        self.cache.usage().bytes
    }

    fn clear(&mut self) {
        self.cache.truncate(self.sequence, 0).expect("the layer's own sequence");
    }

    fn scramble(&mut self, rng: &mut fastrand::Rng) {
        let (mut sum, mut count) = (0.0, 0usize);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in 0..self.cache.layout().ranks().kv_heads() {
            self.cache.gather(self.sequence, head, &mut keys, &mut values).expect("the layer's own sequence");
            sum += keys.iter().chain(&values).map(|x| x.to_f32().powi(2)).sum::<f32>();
            count += keys.len() + values.len();
        }
        // Uniform in ±a has a mean square of a² / 3.
        let amplitude = (3.0 * sum / count.max(1) as f32).sqrt();
        let noise = self.cache.modify(|_| T::from_f32(amplitude * (2.0 * rng.f32() - 1.0)));
        noise.expect("pages that nobody shares");
    }
}

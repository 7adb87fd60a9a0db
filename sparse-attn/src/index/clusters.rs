//! Clusters of keys, of any size (RetroInfer's wave index).
//!
//! Tokens are clustered segment by segment: spherical k-means over the keys minus their mean, by inner product with unit
//! centroids, in a fixed number of passes; the last pass keeps the true means. A cluster's tokens lie together in pages,
//! so the order of tokens changes. Its centroid, size and sum of values can stand for it where it is not read: in the
//! softmax it then weighs `size · exp(q·centroid)` and brings its sum of values, which is exact where all its keys are
//! equal.

use super::{Arrangement, Closing, Estimate, GroupQuery, Index, dot};
use crate::Error;

/// How tokens are clustered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Clustering {
    /// Tokens that are clustered together at most.
    pub segment: usize,
    /// Average tokens of a cluster.
    pub cluster: usize,
    /// Passes of k-means.
    pub iterations: usize,
}

impl Default for Clustering {
    /// Segments of 8192 tokens, clusters of 16, 10 passes: RetroInfer's.
    fn default() -> Self {
        Clustering { segment: 8192, cluster: 16, iterations: 10 }
    }
}

/// The clusters of one KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterIndex {
    clustering: Clustering,
    /// First tokens of a sequence that make a partition of their own.
    sinks: usize,
    qk_dim: usize,
    v_dim: usize,
    /// `[clusters, qk_dim]`.
    centroids: Vec<f32>,
    /// `[clusters, v_dim]`.
    value_sums: Vec<f32>,
    /// `[clusters]`.
    sizes: Vec<u32>,
}

impl ClusterIndex {
    /// No cluster yet.
    pub fn new(clustering: Clustering, sinks: usize, qk_dim: usize, v_dim: usize) -> Self {
        let (centroids, value_sums, sizes) = (Vec::new(), Vec::new(), Vec::new());
        ClusterIndex { clustering, sinks, qk_dim, v_dim, centroids, value_sums, sizes }
    }

    /// Tokens of each cluster.
    pub fn sizes(&self) -> &[u32] {
        &self.sizes
    }

    /// Adds a cluster of these tokens.
    fn push(&mut self, tokens: &Closing<'_>, members: &[u32]) {
        let sum = |values: &[f32], dim: usize| {
            let mut sum = vec![0.0f64; dim];
            for &member in members {
                let vector = &values[member as usize * dim..][..dim];
                sum.iter_mut().zip(vector).for_each(|(sum, &x)| *sum += f64::from(x));
            }
            sum
        };
        let count = members.len() as f64;
        self.centroids.extend(sum(tokens.k, self.qk_dim).iter().map(|x| (x / count) as f32));
        self.value_sums.extend(sum(tokens.v, self.v_dim).iter().map(|&x| x as f32));
        self.sizes.push(members.len() as u32);
    }
}

impl Index for ClusterIndex {
    fn close(&mut self, tokens: &Closing<'_>) -> Result<Arrangement, Error> {
        let (count, dim) = (tokens.k.len() / self.qk_dim, self.qk_dim);
        crate::error::check_len("v", tokens.v.len(), &[count, self.v_dim])?;
        let mut groups: Vec<Vec<u32>> = Vec::new();
        let sinks = self.sinks.saturating_sub(tokens.position).min(count);
        groups.extend((sinks > 0).then(|| (0..sinks as u32).collect()));
        let mut start = sinks;
        while start < count {
            let end = count.min(start + self.clustering.segment);
            let assigned = k_means(&tokens.k[start * dim..end * dim], dim, &self.clustering);
            let clusters = assigned.iter().max().map_or(0, |&last| last as usize + 1);
            let mut segment = vec![Vec::new(); clusters];
            for (token, &cluster) in (start as u32..).zip(&assigned) {
                segment[cluster as usize].push(token);
            }
            groups.extend(segment.into_iter().filter(|members| !members.is_empty()));
            start = end;
        }
        for members in &groups {
            self.push(tokens, members);
        }
        let sizes = groups.iter().map(Vec::len).collect();
        Ok(Arrangement { order: groups.into_iter().flatten().collect(), sizes })
    }

    fn partitions(&self) -> usize {
        self.sizes.len()
    }

    fn score(&self, query: &GroupQuery<'_>, scores: &mut Vec<f32>) -> Result<(), Error> {
        crate::error::check_len("q", query.q.len(), &[query.q.len() / self.qk_dim, self.qk_dim])?;
        scores.clear();
        for q in query.q.chunks_exact(self.qk_dim) {
            scores.extend(self.centroids.chunks_exact(self.qk_dim).map(|centroid| dot(q, centroid) as f32));
        }
        Ok(())
    }

    fn estimate(&self, partition: usize) -> Option<Estimate<'_>> {
        Some(Estimate {
            centroid: self.centroids.chunks_exact(self.qk_dim).nth(partition)?,
            value_sum: self.value_sums.chunks_exact(self.v_dim).nth(partition)?,
            tokens: *self.sizes.get(partition)? as usize,
        })
    }

    fn bytes(&self) -> usize {
        // Vectors in 16 bits, sizes in 32.
        (self.centroids.len() + self.value_sums.len()) * 2 + self.sizes.len() * 4
    }

    fn fork(&self) -> Box<dyn Index> {
        Box::new(self.clone())
    }
}

/// Assigns keys `[tokens, dim]` to about `tokens / cluster` clusters. Deterministic: the first centroids are keys at equal
/// distances, ties go to the lowest cluster, a cluster that loses all its keys keeps its centroid.
pub fn k_means(keys: &[f32], dim: usize, clustering: &Clustering) -> Vec<u32> {
    let tokens = keys.len() / dim;
    let clusters = tokens.div_ceil(clustering.cluster.max(1)).max(1);
    let mut mean = vec![0.0f64; dim];
    for key in keys.chunks_exact(dim) {
        mean.iter_mut().zip(key).for_each(|(mean, &x)| *mean += f64::from(x) / tokens as f64);
    }
    let centred: Vec<f32> =
        keys.iter().enumerate().map(|(i, &x)| (f64::from(x) - mean[i % dim]) as f32).collect();
    let key = |token: usize| &centred[token * dim..][..dim];

    let mut centroids: Vec<f32> = (0..clusters).flat_map(|c| unit(key(c * tokens / clusters))).collect();
    let mut assigned = vec![0u32; tokens];
    for _ in 0..clustering.iterations.max(1) {
        for (token, cluster) in assigned.iter_mut().enumerate() {
            let mut best = f64::NEG_INFINITY;
            for (c, centroid) in centroids.chunks_exact(dim).enumerate() {
                let similarity = dot(key(token), centroid);
                if similarity > best {
                    (best, *cluster) = (similarity, c as u32);
                }
            }
        }
        let mut sums = vec![0.0f32; clusters * dim];
        let mut sizes = vec![0u32; clusters];
        for (token, &cluster) in assigned.iter().enumerate() {
            let sum = &mut sums[cluster as usize * dim..][..dim];
            sum.iter_mut().zip(key(token)).for_each(|(sum, &x)| *sum += x);
            sizes[cluster as usize] += 1;
        }
        for (c, &size) in sizes.iter().enumerate().filter(|&(_, &size)| size > 0) {
            debug_assert!(size > 0);
            centroids[c * dim..][..dim].copy_from_slice(&unit(&sums[c * dim..][..dim]));
        }
    }
    assigned
}

/// The vector at length 1; zero stays zero.
fn unit(vector: &[f32]) -> Vec<f32> {
    let length = dot(vector, vector).sqrt();
    let scale = if length > 0.0 { length.recip() } else { 0.0 };
    vector.iter().map(|&x| (f64::from(x) * scale) as f32).collect()
}

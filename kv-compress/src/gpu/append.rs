//! Appending new tokens to a low-rank cache: RoPE, projection and write in one kernel.

use attention::rope::RopeLayout;
use attention::{DType, HeadShape};
use cuda::kernels::attention::Rotary;
use cuda::kernels::kv_compress as kernels;
use cuda::launch::{Device, Function};
use cuda::memory::{View, ViewMut};
use cuda::params::FdcAppendParams;
use cuda::storage::Storage;

pub use cuda::kernels::attention::AppendTables;

use super::{head_dim, heads, page_shift, to_u32};
use crate::Error;
use crate::cache::PageLayout;

/// How new vectors come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Vectors {
    /// In full, `[tokens, heads, head_dim]`: the append projects them.
    Full,
    /// Reduced, `[tokens, Σ r]` head after head: the projection is merged into the weights. Possible for values always, for
    /// keys (and then queries) only without RoPE.
    Reduced,
}

/// What an append is for.
#[derive(Debug, Clone, PartialEq)]
pub struct AppendConfig {
    /// Heads and sizes, before the reduction. Keys and values have one dimension.
    pub shape: HeadShape,
    /// Where keys and values go, and their ranks.
    pub layout: PageLayout,
    /// Pages in the pool.
    pub pages: usize,
    /// Tokens of every run; those with a negative slot are skipped.
    pub tokens: usize,
    /// Rotation: the layout, the channels that rotate (a multiple of 16), and the positions in the tables.
    pub rotary: Option<(RopeLayout, usize, usize)>,
    /// Whether queries are rotated and projected too. Only with full keys: reduced ones come with reduced queries.
    pub with_queries: bool,
    /// How keys come.
    pub keys: Vectors,
    /// How values come.
    pub values: Vectors,
    /// Elements from token to token of the new queries, keys and values, multiples of 8: the width of a fused projection, or
    /// that of the vectors.
    pub strides: [usize; 3],
}

impl AppendConfig {
    /// An append of packed vectors: full queries and keys that rotate as `rotary` says, and values as `values` says.
    pub fn packed(
        shape: HeadShape,
        layout: PageLayout,
        pages: usize,
        tokens: usize,
        rotary: Option<(RopeLayout, usize, usize)>,
        values: Vectors,
    ) -> Self {
        let mut config = AppendConfig {
            shape,
            layout,
            pages,
            tokens,
            rotary,
            with_queries: true,
            keys: Vectors::Full,
            values,
            strides: [0; 3],
        };
        config.strides = config.widths();
        config
    }

    /// Elements that a token has of new queries, keys and values.
    pub fn widths(&self) -> [usize; 3] {
        let (shape, ranks) = (&self.shape, self.layout.ranks().heads());
        let kv = |vectors, dim: usize, reduced: usize| match vectors {
            Vectors::Full => shape.kv_heads().saturating_mul(dim),
            Vectors::Reduced => reduced,
        };
        [
            if self.with_queries { shape.q_heads().saturating_mul(shape.qk_dim()) } else { 0 },
            kv(self.keys, shape.qk_dim(), ranks.iter().map(|ranks| ranks.k).sum()),
            kv(self.values, shape.v_dim(), ranks.iter().map(|ranks| ranks.v).sum()),
        ]
    }
}

/// Grid and parameters of an append. It needs no workspace.
#[derive(Debug, Clone)]
pub struct AppendPlan {
    config: AppendConfig,
    head_dim: usize,
    rotary: Rotary,
    params: FdcAppendParams,
}

impl AppendPlan {
    /// Plans appends. Needs no device.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shape, rotation, stride or pool that the kernel does not support.
    pub fn new(config: AppendConfig) -> Result<Self, Error> {
        let shape = config.shape;
        let head_dim = head_dim("fdc_append", shape)?;
        let (rotary, rotary_dim, positions) = match config.rotary {
            None => (Rotary::None, 0, 0),
            Some((layout, rotary_dim, positions)) => {
                if rotary_dim == 0 || !rotary_dim.is_multiple_of(16) || rotary_dim > head_dim {
                    let expected = format!("a multiple of 16 up to {head_dim}");
                    return Err(Error::argument("rotary", expected, rotary_dim));
                }
                let rotary = match layout {
                    RopeLayout::HalfSplit => Rotary::HalfSplit,
                    RopeLayout::Interleaved => Rotary::Interleaved,
                };
                (rotary, rotary_dim, positions)
            }
        };
        if config.keys == Vectors::Reduced && (config.rotary.is_some() || config.with_queries) {
            let expected = "full keys: they rotate before they are reduced, as the queries do";
            return Err(Error::argument("keys", expected, "reduced keys"));
        }
        let widths = config.widths();
        for (stride, width) in config.strides.into_iter().zip(widths) {
            if stride < width || !stride.is_multiple_of(8) {
                let expected = format!("multiples of 8, at least {widths:?}");
                return Err(Error::argument("strides", expected, format!("{:?}", config.strides)));
            }
        }
        let tokens = to_u32("tokens", config.tokens)?;
        let group = if config.with_queries { to_u32("q_heads", shape.group())? } else { 0 };
        let q_rows = to_u32("tokens", config.tokens.saturating_mul(group as usize))?;
        let params = FdcAppendParams {
            page_stride: config.layout.page_elements() as i64,
            q_new_stride: config.strides[0] as i64,
            k_new_stride: config.strides[1] as i64,
            v_new_stride: config.strides[2] as i64,
            // Both are below 2^31.
            num_slots: i64::from(to_u32("pages", config.pages)?) * config.layout.page_size() as i64,
            tokens,
            group,
            q_tiles: kernels::append_tiles(q_rows),
            kv_tiles: kernels::append_tiles(tokens),
            rotary_dim: rotary_dim as u32,
            positions: if rotary_dim == 0 { 1 } else { to_u32("positions", positions)? },
            page_shift: page_shift(&config.layout),
            padding: 0,
            heads: heads(shape, config.layout.ranks())?,
        };
        Ok(Self { config, head_dim, rotary, params })
    }

    /// Bytes that a run of all its tokens reads and writes: new vectors, projections, and what is left of the vectors.
    pub fn bytes_moved(&self, dtype: DType) -> u64 {
        let heads = &self.params.heads;
        let (k, v) = (kernels::k_channels(heads), kernels::v_channels(heads));
        let group = self.params.group as usize;
        let read: usize = self.config.widths().iter().sum();
        let per_token = read + group * k + k + v;
        let projected = |vectors, channels: usize| match vectors {
            Vectors::Full => channels * self.head_dim,
            Vectors::Reduced => 0,
        };
        let weights = projected(self.config.keys, k) * if group == 0 { 1 } else { 2 }
            + projected(self.config.values, v);
        ((self.config.tokens * per_token + weights) * dtype.size()) as u64
    }

    /// Floating-point operations of a run of all its tokens: the projections.
    pub fn flops(&self) -> u64 {
        let heads = &self.params.heads;
        let k = kernels::k_channels(heads) * (1 + self.params.group as usize);
        let k = if self.config.keys == Vectors::Full { k } else { 0 };
        let v = if self.config.values == Vectors::Full { kernels::v_channels(heads) } else { 0 };
        (2 * self.config.tokens * self.head_dim * (k + v)) as u64
    }
}

/// A prepared append. `E` is the storage type of vectors, projections and cache.
#[derive(Debug, Clone)]
pub struct Append<F, E> {
    plan: AppendPlan,
    kernel: kernels::FdcAppend<F, E>,
}

/// New queries and where their projections go.
#[derive(Debug)]
pub struct Queries<'a, E> {
    /// New queries `[tokens, q_heads, head_dim]`.
    pub q_new: &'a View<'a, E>,
    /// R_q of each KV head `[head_dim, r_k]`, head after head.
    pub project: &'a View<'a, E>,
    /// Out: `[tokens, Σ group · r_k]`, KV head after KV head `[group, r_k]`; 0 where the token is skipped.
    pub q: ViewMut<'a, E>,
}

/// Arguments of [`Append::run`].
#[derive(Debug)]
pub struct AppendArgs<'a, E> {
    /// Where the plan asks for them.
    pub queries: Option<Queries<'a, E>>,
    /// New keys `[tokens, kv_heads, head_dim]`, or `[tokens, Σ r_k]` where they come reduced.
    pub k_new: &'a View<'a, E>,
    /// New values `[tokens, kv_heads, head_dim]`, or `[tokens, Σ r_v]` where they come reduced.
    pub v_new: &'a View<'a, E>,
    /// R_k of each KV head `[head_dim, r_k]`, head after head, where keys come in full.
    pub project_k: Option<&'a View<'a, E>>,
    /// R_v of each KV head `[head_dim, r_v]`, head after head, where values come in full.
    pub project_v: Option<&'a View<'a, E>>,
    /// [`Rope::cos`](attention::rope::Rope::cos), [`Rope::sin`](attention::rope::Rope::sin) and each token's position, where
    /// the plan rotates.
    pub tables: Option<AppendTables<'a>>,
    /// Slot of each token `[tokens]`: page · page size + place in the page; negative ones are skipped.
    pub slot: &'a View<'a, i64>,
    /// The cache's pages `[pages, page_elements]`.
    pub pages: ViewMut<'a, E>,
    /// Status word: [`FaultCode::BadIndex`](attention::FaultCode::BadIndex) with the token whose slot or position is out of
    /// range; it is skipped.
    pub status: ViewMut<'a, u64>,
}

impl<F: Function, E: Storage> Append<F, E> {
    /// Compiles and loads. May block.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the kernel cannot be loaded.
    pub fn prepare<D: Device<Function = F>>(device: &D, plan: &AppendPlan) -> Result<Self, Error> {
        let kernel = kernels::FdcAppend::prepare(device, plan.head_dim, plan.rotary)?;
        Ok(Self { plan: plan.clone(), kernel })
    }

    /// Enqueues the append and returns.
    ///
    /// # Errors
    /// [`Error::Argument`] where projections are given for vectors that come reduced or missing for full ones,
    /// [`Error::Cuda`] names an argument that does not fit.
    pub fn run(&self, queue: &F::Queue, args: AppendArgs<'_, E>) -> Result<(), Error> {
        let config = &self.plan.config;
        for (argument, vectors, projection) in [
            ("project_k", config.keys, args.project_k.is_some()),
            ("project_v", config.values, args.project_v.is_some()),
        ] {
            let full = vectors == Vectors::Full;
            if full != projection {
                let [expected, found] = [full, projection].map(|is| if is { "given" } else { "missing" });
                return Err(Error::argument(argument, expected, found));
            }
        }
        let args = kernels::FdcAppendArgs {
            params: &self.plan.params,
            queries: args.queries.map(|queries| kernels::FdcQueries {
                q_new: queries.q_new,
                project: queries.project,
                q: queries.q,
            }),
            k_new: args.k_new,
            v_new: args.v_new,
            project_k: args.project_k,
            project_v: args.project_v,
            tables: args.tables,
            slot: args.slot,
            pages: args.pages,
            status: args.status,
            programmatic: false,
        };
        Ok(self.kernel.launch(queue, args)?)
    }
}

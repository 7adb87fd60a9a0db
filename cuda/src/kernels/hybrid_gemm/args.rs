//! What both kernels take, and its checks.

use crate::Error;
use crate::kernels::attention::cache::elements;
use crate::launch::{Arg, Function, LaunchConfig};
use crate::memory::{View, ViewMut};
use crate::params::{
    HYBRID_FORMAT_FLOAT, HYBRID_FORMAT_FP8_BLOCKS, HYBRID_FORMAT_FP8_ROWS, HYBRID_FORMAT_INT8,
    HYBRID_FORMAT_ZERO_POINTS, HYBRID_FP8_BLOCK, HYBRID_SLAB_BYTES, HYBRID_SWIGLU, HYBRID_TILE_ROWS,
    HybridGemmExpert, HybridGemmParams, HybridGemmSchedule, HybridGemmTraffic,
};
use crate::storage::Storage;

const ROWS: usize = HYBRID_TILE_ROWS as usize;
/// Inputs of a chunk of activations.
const CHUNK_INPUTS: usize = 64;
/// Most chunks of activations of a product, over all its columns and panels: a block counts its own in 32 bits.
pub const MOST_CHUNKS: usize = i32::MAX as usize;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// As X.
    Float,
    /// Codes of 8 bits with one f32 scale per output feature.
    Int8,
    /// Codes of 4 bits with one f16 scale per output feature and group of inputs.
    Int4 {
        /// Inputs that share a scale: 32, 64 or 128.
        group: usize,
    },
    /// Codes of 4 bits from 0 with one f16 scale and one zero point per output feature and group of inputs.
    Int4ZeroPoints {
        /// Inputs that share a scale and a zero point: 32, 64 or 128.
        group: usize,
    },
    /// fp8 e4m3 with one f32 scale per output feature.
    Fp8Rows,
    /// fp8 e4m3 with one f32 scale per block of 128 × 128.
    Fp8Blocks,
}

impl WeightFormat {
    /// The value of the kernels' constant `FORMAT`.
    pub(super) fn constant(self) -> i64 {
        match self {
            WeightFormat::Float => i64::from(HYBRID_FORMAT_FLOAT),
            WeightFormat::Int8 => i64::from(HYBRID_FORMAT_INT8),
            WeightFormat::Int4 { group } => group as i64,
            WeightFormat::Int4ZeroPoints { group } => group as i64 + i64::from(HYBRID_FORMAT_ZERO_POINTS),
            WeightFormat::Fp8Rows => i64::from(HYBRID_FORMAT_FP8_ROWS),
            WeightFormat::Fp8Blocks => i64::from(HYBRID_FORMAT_FP8_BLOCKS),
        }
    }

    /// Inputs that a slab covers.
    pub const fn slab_inputs(self) -> usize {
        match self {
            WeightFormat::Float => 64,
            WeightFormat::Int8 | WeightFormat::Fp8Rows | WeightFormat::Fp8Blocks => 128,
            WeightFormat::Int4 { .. } | WeightFormat::Int4ZeroPoints { .. } => 256,
        }
    }

    /// Chunks of activations that a product with weights `[n, k]` multiplies, every column with every panel: at most [`MOST_CHUNKS`].
    pub fn chunks(self, [n, k]: [usize; 2], panels: usize) -> usize {
        let slabs = k.div_ceil(self.slab_inputs());
        elements(&[n.div_ceil(ROWS), slabs, self.slab_inputs() / CHUNK_INPUTS, panels])
    }

    /// Bytes of a slab's scales and zero points, which lie behind the codes of its tile.
    pub const fn scale_bytes(self) -> usize {
        match self {
            WeightFormat::Int4 { group } => self.slab_inputs() / group * ROWS * 2,
            WeightFormat::Int4ZeroPoints { group } => self.slab_inputs() / group * (ROWS * 2 + ROWS / 2),
            _ => 0,
        }
    }

    /// Bytes that a block keeps for the scales of a slab, that of fp8 in blocks included, which comes from beside the matrix.
    pub(super) const fn scale_room(self) -> usize {
        let beside = if matches!(self, WeightFormat::Fp8Blocks) { size_of::<f32>() } else { 0 };
        (self.scale_bytes() + beside).next_multiple_of(128)
    }

    /// Scales that lie beside a matrix `[n, k]`.
    pub const fn scales(self, [n, k]: [usize; 2]) -> usize {
        let block = HYBRID_FP8_BLOCK as usize;
        match self {
            WeightFormat::Int8 | WeightFormat::Fp8Rows => n,
            WeightFormat::Fp8Blocks => n.div_ceil(block).saturating_mul(k.div_ceil(block)),
            _ => 0,
        }
    }
}

/// The experts of a grouped product.
#[derive(Debug, Clone, Copy)]
pub struct HybridGemmExperts<'a> {
    /// Where the weights of each are `[experts]`, within `host` and `hbm`.
    pub table: &'a View<'a, HybridGemmExpert>,
    /// First row of X and O of each, and the end `[experts + 1]`: rising from 0.
    pub offsets: &'a View<'a, u32>,
}

/// Arguments of a product. `X` is the storage type of activations, `O` that of outputs and residual.
#[derive(Debug)]
pub struct HybridGemmArgs<'a, X, O> {
    /// Shapes and layouts.
    pub params: &'a HybridGemmParams,
    /// Blocks of the schedule: as many as it uses, or more.
    pub blocks: u32,
    /// X `[max_tokens, k]`, rows `x_stride` apart.
    pub x: &'a View<'a, X>,
    /// Columns in host memory, the first ones; none where there are none. Refused in memory of the device: what the receipt
    /// counts for the link must cross it.
    pub host: Option<&'a View<'a, u8>>,
    /// Columns in HBM from `hbm_first` on.
    pub hbm: Option<&'a View<'a, u8>>,
    /// Scale of each output feature `[n]`, of int8 and fp8 by rows, or of each block `[ceil(n / 128), ceil(k / 128)]`, of fp8 in
    /// blocks; those of each expert one behind the other for a grouped product.
    pub scales: Option<&'a View<'a, f32>>,
    /// Bias `[n]`.
    pub bias: Option<&'a View<'a, f32>>,
    /// Residual `[max_tokens, out columns]`, rows `residual_stride` apart.
    pub residual: Option<&'a View<'a, O>>,
    /// Out: O `[max_tokens, out columns]`, rows `out_stride` apart.
    pub out: ViewMut<'a, O>,
    /// Partial sums, `partial_len` of `params`.
    pub partials: ViewMut<'a, f32>,
    /// A zero for each column and panel, where `k_splits` is above 1; zero again afterwards.
    pub arrivals: ViewMut<'a, u32>,
    /// The schedule: one.
    pub schedule: &'a View<'a, HybridGemmSchedule>,
    /// The experts, where `params` has some.
    pub experts: Option<HybridGemmExperts<'a>>,
    /// What was moved is added to it.
    pub traffic: Option<ViewMut<'a, HybridGemmTraffic>>,
    /// Status word: what is wrong with the schedule.
    pub status: ViewMut<'a, u64>,
}

/// Length of a matrix of `rows` rows of `columns` elements, `stride` apart.
fn matrix_len(
    kernel: &str,
    argument: &'static str,
    rows: usize,
    columns: usize,
    stride: i64,
) -> Result<usize, Error> {
    let stride = usize::try_from(stride).ok().filter(|stride| *stride >= columns);
    let stride = stride
        .ok_or_else(|| Error::argument(kernel, argument, format_args!("at least {columns}"), "less"))?;
    Ok(match rows {
        0 => 0,
        rows => (rows - 1).saturating_mul(stride).saturating_add(columns),
    })
}

/// Checks everything that the kernel trusts, `panel` being the tokens of its panels, and launches.
pub(super) fn launch<F: Function, X: Storage, O: Storage>(
    function: &F,
    queue: &F::Queue,
    (kernel, format, panel): (&'static str, WeightFormat, usize),
    config: LaunchConfig,
    mut args: HybridGemmArgs<'_, X, O>,
) -> Result<(), Error> {
    let params = args.params;
    let (n, k, tokens) = (params.n as usize, params.k as usize, params.max_tokens as usize);
    let wrong =
        |argument, expected: String, found: u64| Err(Error::argument(kernel, argument, expected, found));
    let slabs = k.div_ceil(format.slab_inputs());
    let k_tiles = slabs.div_ceil((params.tile_slabs as usize).max(1));
    let columns = n.div_ceil(ROWS);
    let (host_columns, hbm_first) = (params.host_columns as usize, params.hbm_first as usize);
    let hbm_end = hbm_first + params.hbm_columns as usize;
    let experts = params.experts as usize;
    if args.experts.is_some() != (experts > 0) {
        return wrong("experts", format!("those of {experts} experts"), u64::from(args.experts.is_some()));
    }
    for (argument, size) in [("n", n), ("k", k), ("tile_slabs", params.tile_slabs as usize)] {
        if size == 0 {
            return wrong(argument, "at least 1".into(), 0);
        }
    }
    let chunks = format.chunks([n, k], tokens.div_ceil(panel));
    if chunks > MOST_CHUNKS {
        return wrong("n", format!("at most {MOST_CHUNKS} chunks of 64 inputs times panels"), chunks as u64);
    }
    let column_bytes = slabs * (HYBRID_SLAB_BYTES as usize + format.scale_bytes());
    // The kernel checks where experts lie and multiplies by this.
    if experts > 0 && params.column_bytes != column_bytes as u64 {
        return wrong("column_bytes", format!("{column_bytes} of each expert's"), params.column_bytes);
    }
    if params.column_bytes < column_bytes as u64 || !params.column_bytes.is_multiple_of(16) {
        return wrong(
            "column_bytes",
            format!("a multiple of 16 from {column_bytes} on"),
            params.column_bytes,
        );
    }
    if host_columns > 0 && params.hbm_columns > 0 && hbm_first != host_columns {
        return wrong(
            "hbm_first",
            format!("{host_columns}, behind the columns in host memory"),
            hbm_first as u64,
        );
    }
    if host_columns > columns || hbm_end > columns {
        return wrong("columns", format!("at most {columns}"), host_columns.max(hbm_end) as u64);
    }
    if params.k_splits == 0 || params.k_splits as usize > k_tiles.min(65535) {
        return wrong("k_splits", format!("1 to {}", k_tiles.min(65535)), u64::from(params.k_splits));
    }
    if params.k_splits > 1 && (hbm_end != columns || experts > 0) {
        return wrong("hbm_columns", format!("{columns} columns in all for splits"), hbm_end as u64);
    }
    if i64::from(params.out_dtype) != O::DTYPE {
        return wrong("out_dtype", O::DTYPE.to_string(), u64::from(params.out_dtype));
    }
    let gated = params.activation == HYBRID_SWIGLU;
    if params.activation > HYBRID_SWIGLU || (gated && !n.is_multiple_of(16)) {
        return wrong("activation", "one that fits n".into(), u64::from(params.activation));
    }
    let row_major = [params.host_row_major, params.hbm_row_major].contains(&1);
    if row_major && format != WeightFormat::Float {
        return wrong("row_major", "packed codes".into(), 1);
    }
    let scales = format.scales([n, k]);
    if args.scales.is_some() != (scales > 0) {
        return wrong("scales", format!("{scales} for each matrix"), u64::from(args.scales.is_some()));
    }

    let out_columns = if gated { n / 2 } else { n };
    let element = size_of::<X>() as u64;
    args.x.check(kernel, "x", matrix_len(kernel, "x_stride", tokens, k, params.x_stride)?, element)?;
    let column_stride = usize::try_from(params.column_bytes).unwrap_or(usize::MAX);
    // An expert's place within its part is checked by the kernel.
    let part = |row_major: u32, first: usize, end: usize, bytes: u64| match row_major {
        _ if experts > 0 => (usize::try_from(bytes).unwrap_or(usize::MAX), 16),
        0 if end == first => (0, 16),
        0 => (elements(&[end - first - 1, column_stride]).saturating_add(column_bytes), 16),
        _ => (elements(&[(end * ROWS).min(n).saturating_sub(first * ROWS), k, size_of::<X>()]), element),
    };
    for (argument, view, (len, alignment)) in [
        ("host", args.host, part(params.host_row_major, 0, host_columns, params.host_bytes)),
        ("hbm", args.hbm, part(params.hbm_row_major, hbm_first, hbm_end, params.hbm_bytes)),
    ] {
        match view {
            Some(view) => view.check(kernel, argument, len, alignment)?,
            None if len == 0 => {}
            None => return Err(Error::argument(kernel, argument, format_args!("{len} bytes"), "none")),
        }
    }
    if let Some(host) = args.host {
        host.check_in_host_memory(kernel, "host")?;
    }
    if experts > 0 && (row_major || args.bias.is_some()) {
        return wrong("experts", "packed weights and no bias".into(), experts as u64);
    }
    for (argument, view, len) in
        [("scales", args.scales, elements(&[experts.max(1), scales])), ("bias", args.bias, n)]
    {
        if let Some(view) = view {
            view.check(kernel, argument, len, 4)?;
        }
    }
    if let Some(group) = &args.experts {
        group.table.check(kernel, "experts", experts, 8)?;
        group.offsets.check(kernel, "offsets", experts + 1, 4)?;
    }
    let element = size_of::<O>() as u64;
    if let Some(residual) = args.residual {
        let len = matrix_len(kernel, "residual_stride", tokens, out_columns, params.residual_stride)?;
        residual.check(kernel, "residual", len, element)?;
    }
    args.out.check(
        kernel,
        "out",
        matrix_len(kernel, "out_stride", tokens, out_columns, params.out_stride)?,
        element,
    )?;
    let mut partials = usize::try_from(params.partial_len).unwrap_or(usize::MAX);
    if params.k_splits > 1 {
        partials = partials.max(elements(&[params.k_splits as usize, columns, tokens, ROWS]));
        args.arrivals.check(kernel, "arrivals", elements(&[columns, tokens.div_ceil(panel)]), 4)?;
    }
    args.partials.check(kernel, "partials", partials, 4)?;
    args.schedule.check(kernel, "schedule", 1, 4)?;
    args.status.check(kernel, "status", 1, 8)?;
    if let Some(traffic) = &args.traffic {
        traffic.check(kernel, "traffic", 1, 8)?;
    }

    let kernel_args = [
        Arg::read("x", args.x),
        Arg::read_optional("host", args.host),
        Arg::read_optional("hbm", args.hbm),
        Arg::read_optional("scales", args.scales),
        Arg::read_optional("bias", args.bias),
        Arg::read_optional("residual", args.residual),
        Arg::write("out", &mut args.out),
        Arg::write("partials", &mut args.partials),
        Arg::write("arrivals", &mut args.arrivals),
        Arg::read("schedule", args.schedule),
        Arg::read_optional("experts", args.experts.map(|experts| experts.table)),
        Arg::read_optional("offsets", args.experts.map(|experts| experts.offsets)),
        Arg::write_optional("traffic", args.traffic.as_mut()),
        Arg::write("status", &mut args.status),
        Arg::value("params", params),
    ];
    // SAFETY: the arguments are the kernel's parameters in order and type. The checks above made every buffer as long as the
    // kernel's index range, which depends on the schedule only within what the kernel checks against `params` and the grid.
    unsafe { function.launch(queue, &config, &kernel_args) }
}

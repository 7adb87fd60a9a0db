//! How a weight is stored.

use crate::{DType, Error};

/// Output features, and inputs, that share a scale of [`Format::Fp8Blocks`].
pub const FP8_BLOCK: usize = 128;

/// Storage format of a weight matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// As the storage type says. Kernels take f16 and bf16; f32 is for the CPU alone.
    Float(DType),
    /// Signed codes of 8 bits, `w = code · scale[row]` with one f32 scale per output feature, applied in the epilogue.
    Int8,
    /// Signed codes of 4 bits, `w = code · scale` with one f16 scale per output feature and group of inputs. The scales
    /// lie behind the codes of their tile.
    Int4 {
        /// Inputs that share a scale: 32, 64 or 128.
        group: usize,
    },
    /// Codes of 4 bits from 0, `w = (code - zero) · scale` with one f16 scale and one zero point of 4 bits per output feature and
    /// group of inputs, as AWQ and GPTQ v2 have them ([`Codes::int4`](crate::Codes::int4) tells what else must be done for GPTQ). Both lie
    /// behind the codes of their tile.
    Int4ZeroPoints {
        /// Inputs that share a scale and a zero point: 32, 64 or 128.
        group: usize,
    },
    /// fp8 e4m3, `w = code · scale[row]` with one f32 scale per output feature, applied in the epilogue.
    Fp8Rows,
    /// fp8 e4m3, `w = code · scale[row / 128, input / 128]` with one f32 scale per block of 128 × 128, as DeepSeek-V3 has them. The
    /// scales `[ceil(n / 128), ceil(k / 128)]` lie beside the matrix, in HBM, whatever holds the codes. Rows that share
    /// a block share its scale, which leaves a checkpoint's gate and up two products ([`Codes::fp8_blocks`](crate::Codes::fp8_blocks)).
    Fp8Blocks,
}

impl Format {
    /// Every format, with every storage type and size of groups.
    pub const ALL: [Format; 12] = [
        Format::Float(DType::F32),
        Format::Float(DType::F16),
        Format::Float(DType::BF16),
        Format::Int8,
        Format::Int4 { group: 32 },
        Format::Int4 { group: 64 },
        Format::Int4 { group: 128 },
        Format::Int4ZeroPoints { group: 32 },
        Format::Int4ZeroPoints { group: 64 },
        Format::Int4ZeroPoints { group: 128 },
        Format::Fp8Rows,
        Format::Fp8Blocks,
    ];

    /// Bits of one element, scales left out.
    pub const fn bits(self) -> usize {
        match self {
            Format::Float(dtype) => 8 * dtype.size(),
            Format::Int8 | Format::Fp8Rows | Format::Fp8Blocks => 8,
            Format::Int4 { .. } | Format::Int4ZeroPoints { .. } => 4,
        }
    }

    /// Whether one f32 scale per output feature belongs to the weights.
    pub const fn has_channel_scale(self) -> bool {
        matches!(self, Format::Int8 | Format::Fp8Rows)
    }

    /// f32 scales that lie beside a matrix `[n, k]`: `[n]` of int8 and fp8 by rows, `[ceil(n / 128), ceil(k / 128)]` of fp8 in blocks,
    /// none in other formats.
    pub const fn scales(self, n: usize, k: usize) -> usize {
        match self {
            Format::Int8 | Format::Fp8Rows => n,
            Format::Fp8Blocks => n.div_ceil(FP8_BLOCK) * k.div_ceil(FP8_BLOCK),
            _ => 0,
        }
    }

    pub(crate) fn check(self) -> Result<(), Error> {
        match self {
            Format::Int4 { group } | Format::Int4ZeroPoints { group } if ![32, 64, 128].contains(&group) => {
                Err(Error::argument("format", "groups of 32, 64 or 128", format!("groups of {group}")))
            }
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Format::Float(dtype) => dtype.fmt(f),
            Format::Int8 => f.write_str("int8"),
            Format::Int4 { group } => write!(f, "int4 in groups of {group}"),
            Format::Int4ZeroPoints { group } => write!(f, "int4 with zero points in groups of {group}"),
            Format::Fp8Rows => f.write_str("fp8 with scales of rows"),
            Format::Fp8Blocks => write!(f, "fp8 in blocks of {FP8_BLOCK} × {FP8_BLOCK}"),
        }
    }
}

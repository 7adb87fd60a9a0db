//! How a weight is stored.

use crate::{DType, Error};

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
}

impl Format {
    /// Bits of one element, scales left out.
    pub const fn bits(self) -> usize {
        match self {
            Format::Float(dtype) => 8 * dtype.size(),
            Format::Int8 => 8,
            Format::Int4 { .. } => 4,
        }
    }

    /// Whether one f32 scale per output feature belongs to the weights.
    pub const fn has_channel_scale(self) -> bool {
        matches!(self, Format::Int8)
    }

    pub(crate) fn check(self) -> Result<(), Error> {
        match self {
            Format::Int4 { group } if ![32, 64, 128].contains(&group) => {
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
        }
    }
}

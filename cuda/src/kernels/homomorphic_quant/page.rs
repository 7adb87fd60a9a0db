//! Sizes of packed pages, as `tile/hack_page.cuh` and `tile/hack_stream.cuh` have them.

use super::larger;

/// One half of a segment as it streams through a ring: its fields with the first groups of codes, then the other groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pieces {
    /// Bytes of scales, minima and sums.
    pub fields: usize,
    /// Bytes of codes.
    pub codes: usize,
    /// Bytes of a group of codes.
    pub group: usize,
}

impl Pieces {
    /// Codes `[rows, columns]` in groups of as many row tiles as a byte has planes, or fewer.
    const fn new(fields: usize, bits: usize, rows: usize, columns: usize) -> Self {
        let (planes, tiles) = (8 / bits, rows / 16);
        let row_planes = if planes.is_multiple_of(4) && tiles.is_multiple_of(4) {
            4
        } else if planes.is_multiple_of(2) && tiles.is_multiple_of(2) {
            2
        } else {
            1
        };
        let codes = rows * columns * bits / 8;
        Pieces { fields, codes, group: codes / (tiles / row_planes) }
    }

    /// Bytes of the half.
    pub const fn bytes(&self) -> usize {
        self.fields + self.codes
    }

    /// Bytes of its largest piece: the fields, and 4 KiB of codes or one group.
    pub const fn largest(&self) -> usize {
        let (fit, groups) = (larger(4096 / self.group, 1), self.codes / self.group);
        self.fields + self.group * if fit < groups { fit } else { groups }
    }
}

/// One (page, KV head): a block of `partition` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedSegment {
    /// Scales of values: tokens times channel partitions.
    pub v_groups: usize,
    /// Sums of key codes: tokens times channel partitions.
    pub k_sums: usize,
    /// The keys.
    pub keys: Pieces,
    /// The values.
    pub values: Pieces,
}

impl PackedSegment {
    /// The segment of these constants of the kernels.
    pub const fn new(k_bits: usize, v_bits: usize, partition: usize, qk_dim: usize, v_dim: usize) -> Self {
        const fn sum_bytes(count: usize, bits: usize) -> usize {
            if count * ((1 << bits) - 1) <= 255 { 1 } else { 2 }
        }
        let (k_channels, v_channels) =
            (channel_partition(partition, qk_dim), channel_partition(partition, v_dim));
        let (k_sums, v_groups) = (partition * (qk_dim / k_channels), partition * (v_dim / v_channels));
        let k_fields = 4 * qk_dim + k_sums * sum_bytes(k_channels, k_bits);
        let v_fields = 4 * v_groups + v_dim * sum_bytes(partition, v_bits);
        PackedSegment {
            v_groups,
            k_sums,
            keys: Pieces::new(k_fields, k_bits, partition, qk_dim),
            values: Pieces::new(v_fields, v_bits, v_dim, partition),
        }
    }

    /// Bytes of the segment.
    pub const fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }
}

/// Channels that share a scale: `min(partition, dim)`, reduced by 16 until it divides `dim`.
const fn channel_partition(partition: usize, dim: usize) -> usize {
    let mut channels = if partition < dim { partition } else { dim };
    while !dim.is_multiple_of(channels) {
        channels -= 16;
    }
    channels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        // bits, Π, dim, bytes of a segment and of its largest pieces.
        for (bits, partition, dim, bytes, pieces) in [
            (2, 64, 128, 5376, [2688, 2688]),
            (4, 64, 128, 9728, [4864, 4864]),
            (8, 64, 128, 17920, [512 + 256 + 4096, 512 + 256 + 4096]),
            (2, 64, 96, 384 + 128 + 1536 + 512 + 96 + 1536, [2048, 512 + 96 + 1536]),
            (8, 128, 256, 2 * (1024 + 512 + 32768), [1536 + 4096, 1536 + 4096]),
        ] {
            let segment = PackedSegment::new(bits, bits, partition, dim, dim);
            let name = format!("{bits} bits, Π {partition}, dim {dim}");
            assert_eq!(segment.bytes(), bytes, "{name}");
            assert_eq!([segment.keys.largest(), segment.values.largest()], pieces, "{name}");
        }
    }
}

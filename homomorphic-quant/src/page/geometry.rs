//! Shapes of what a page holds.

use std::ops::Range;

use attention::DType;

use super::PageLayout;
use crate::config::channel_partition;
use crate::{Bits, Config, Error, HeadBits, Layout};

/// Type of cached code sums: the smallest that holds the largest sum. All are unsigned; none needs more than 16 bits
/// (128 codes of 8 bits sum to 32 640).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SumType {
    /// One byte.
    U8,
    /// Two bytes, little-endian.
    U16,
}

impl SumType {
    /// The type for sums of `count` codes.
    pub const fn of(count: usize, bits: Bits) -> Self {
        if count * bits.levels() as usize <= u8::MAX as usize { SumType::U8 } else { SumType::U16 }
    }

    /// Bytes of a sum.
    pub const fn size(self) -> usize {
        match self {
            SumType::U8 => 1,
            SumType::U16 => 2,
        }
    }
}

/// One KV head of a closed block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HeadGeometry {
    /// Π: tokens of a block.
    pub partition: usize,
    /// Channels of a key.
    pub qk_dim: usize,
    /// Channels of a value.
    pub v_dim: usize,
    /// Π_c of keys: channels whose codes are summed together, and quantized together in [`Layout::PerTokenKey`].
    pub k_channels: usize,
    /// Π_c of values: channels that share a scale in [`Layout::PerChannelKey`].
    pub v_channels: usize,
    /// Widths of the codes.
    pub bits: HeadBits,
    /// Along which axes scales are shared.
    pub layout: Layout,
    /// 16-bit type of scales and minima.
    pub dtype: DType,
    /// Whether the segment holds code sums.
    pub cached_sums: bool,
}

impl HeadGeometry {
    /// One head of a layer.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `qk_dim` and `v_dim` are multiples of 16 from 16 to [`MAX_DIM`](Self::MAX_DIM).
    pub fn new(config: &Config, bits: HeadBits, qk_dim: usize, v_dim: usize) -> Result<Self, Error> {
        for (argument, dim) in [("qk_dim", qk_dim), ("v_dim", v_dim)] {
            if dim == 0 || !dim.is_multiple_of(16) || dim > Self::MAX_DIM {
                let expected = format!("a multiple of 16 from 16 to {}", Self::MAX_DIM);
                return Err(Error::argument(argument, expected, dim));
            }
        }
        Ok(HeadGeometry {
            partition: config.partition(),
            qk_dim,
            v_dim,
            k_channels: channel_partition(config.partition(), qk_dim)?,
            v_channels: channel_partition(config.partition(), v_dim)?,
            bits,
            layout: config.layout(),
            dtype: config.dtype(),
            cached_sums: config.cached_sums(),
        })
    }

    /// Most channels of a vector.
    pub const MAX_DIM: usize = 1024;

    /// Channel partitions of a key: `qk_dim / Π_c`.
    pub const fn k_partitions(&self) -> usize {
        self.qk_dim / self.k_channels
    }

    /// Channel partitions of a value: `v_dim / Π_c`.
    pub const fn v_partitions(&self) -> usize {
        self.v_dim / self.v_channels
    }

    /// Scales (and minima) of the keys of a block: `[qk_dim]`, or `[Π, k_partitions]` in [`Layout::PerTokenKey`].
    pub const fn k_groups(&self) -> usize {
        match self.layout {
            Layout::PerChannelKey => self.qk_dim,
            Layout::PerTokenKey => self.partition * self.k_partitions(),
        }
    }

    /// Scales (and minima) of the values of a block: `[Π, v_partitions]`, or `[v_dim]` in [`Layout::PerTokenKey`].
    pub const fn v_groups(&self) -> usize {
        match self.layout {
            Layout::PerChannelKey => self.partition * self.v_partitions(),
            Layout::PerTokenKey => self.v_dim,
        }
    }

    /// Which scale the key element (token of the block, channel) has.
    #[inline]
    pub const fn k_group(&self, token: usize, channel: usize) -> usize {
        match self.layout {
            Layout::PerChannelKey => channel,
            Layout::PerTokenKey => token * self.k_partitions() + channel / self.k_channels,
        }
    }

    /// Which scale the value element (token of the block, channel) has.
    #[inline]
    pub const fn v_group(&self, token: usize, channel: usize) -> usize {
        match self.layout {
            Layout::PerChannelKey => token * self.v_partitions() + channel / self.v_channels,
            Layout::PerTokenKey => channel,
        }
    }

    /// Type of the sums of key codes, `[Π, k_partitions]`: over the Π_c channels of a partition.
    pub const fn k_sum_type(&self) -> SumType {
        SumType::of(self.k_channels, self.bits.k)
    }

    /// Type of the sums of value codes, `[v_dim]`: over the Π tokens.
    pub const fn v_sum_type(&self) -> SumType {
        SumType::of(self.partition, self.bits.v)
    }
}

/// A page of closed-block codes: one segment per KV head, in order, each a multiple of 16 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageGeometry {
    heads: Vec<HeadGeometry>,
    layout: PageLayout,
    /// Where each head's segment starts, and the end. `[kv_heads + 1]`
    offsets: Vec<usize>,
}

impl PageGeometry {
    /// Pages of one layer.
    ///
    /// # Errors
    /// [`Error::Argument`] when `kv_heads` is 0, a dim is refused by [`HeadGeometry::new`], or the layout is not made
    /// for a head.
    pub fn new(
        config: &Config,
        layout: PageLayout,
        layer: usize,
        kv_heads: usize,
        qk_dim: usize,
        v_dim: usize,
    ) -> Result<Self, Error> {
        Self::shard(config, layout, layer, 0..kv_heads, qk_dim, v_dim)
    }

    /// Pages of some KV heads of a layer: `kv_heads` are the model's numbers, which overrides of widths count.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shard(
        config: &Config,
        layout: PageLayout,
        layer: usize,
        kv_heads: Range<usize>,
        qk_dim: usize,
        v_dim: usize,
    ) -> Result<Self, Error> {
        if kv_heads.is_empty() {
            return Err(Error::argument("kv_heads", "at least 1", 0));
        }
        let heads = kv_heads
            .map(|head| HeadGeometry::new(config, config.head_bits(layer, head), qk_dim, v_dim))
            .collect::<Result<Vec<_>, _>>()?;
        let mut offsets = vec![0];
        let mut end = 0;
        for head in &heads {
            layout.check(head)?;
            end += layout.segment_bytes(head);
            offsets.push(end);
        }
        Ok(PageGeometry { heads, layout, offsets })
    }

    /// The layout of the segments.
    pub const fn layout(&self) -> PageLayout {
        self.layout
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.heads.len()
    }

    /// One KV head.
    ///
    /// # Panics
    /// When it is out of range.
    pub fn head(&self, kv_head: usize) -> &HeadGeometry {
        &self.heads[kv_head]
    }

    /// Where a head's segment lies in the page.
    ///
    /// # Panics
    /// When it is out of range.
    pub fn segment(&self, kv_head: usize) -> Range<usize> {
        self.offsets[kv_head]..self.offsets[kv_head + 1]
    }

    /// Bytes of a page.
    pub fn bytes(&self) -> usize {
        *self.offsets.last().expect("starts with 0")
    }
}

//! What is quantized, how finely, and along which axes.

use attention::DType;

use crate::Error;

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bits {
    /// Codes 0..=3.
    Two,
    /// Codes 0..=15.
    Four,
    /// Codes 0..=255.
    Eight,
}

impl Bits {
    /// Every width.
    pub const ALL: [Bits; 3] = [Bits::Two, Bits::Four, Bits::Eight];

    /// The width with this many bits.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `bits` is 2, 4 or 8.
    pub fn new(bits: usize) -> Result<Self, Error> {
        match bits {
            2 => Ok(Bits::Two),
            4 => Ok(Bits::Four),
            8 => Ok(Bits::Eight),
            found => Err(Error::argument("bits", "2, 4 or 8", found)),
        }
    }

    /// Bits of a code: 2, 4 or 8.
    pub const fn count(self) -> usize {
        match self {
            Bits::Two => 2,
            Bits::Four => 4,
            Bits::Eight => 8,
        }
    }

    /// The largest code, `L = 2^b - 1`.
    pub const fn levels(self) -> u32 {
        (1 << self.count()) - 1
    }

    /// Codes in a byte.
    pub const fn codes_per_byte(self) -> usize {
        8 / self.count()
    }
}

impl std::fmt::Display for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-bit", self.count())
    }
}

/// Widths of the codes of one KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HeadBits {
    /// Of keys.
    pub k: Bits,
    /// Of values.
    pub v: Bits,
}

/// How a value between two codes is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To the nearest code, ties to even (the ATC '26 default).
    Nearest,
    /// Up with the probability of the remainder (arXiv v1), by the counter-based generator of
    /// [`quantizer::noise`](crate::quantizer::noise): the same element of the same token always gets the same noise, in
    /// whatever chunks tokens arrive.
    Stochastic {
        /// Names the stream of random numbers.
        seed: u64,
    },
}

/// Along which axes keys and values share scale and minimum.
///
/// Π is the [partition](Config::partition), Π_c the [channel partition](channel_partition).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Keys per channel over Π tokens, values per token over Π_c channels (USENIX ATC '26). The scale on the outer
    /// axis is folded into Q and P before these are quantized.
    PerChannelKey,
    /// Keys per token over Π_c channels, values per channel over Π tokens (arXiv v1). CPU only: it is here to show
    /// what channel outliers in keys do to it. Unlike arXiv v1 it too keeps the keys of the open block in 16 bits,
    /// which only helps it.
    PerTokenKey,
}

/// What happens to the tokens of a block that is not yet full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OpenBlock {
    /// They stay in 16 bits until the block closes (requantization elimination).
    Exact,
    /// They are quantized at once, and dequantized and quantized again with every token that joins them. CPU only: it
    /// is here to measure what [`Exact`](OpenBlock::Exact) saves.
    Requantized,
}

/// Other widths for some layers and heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct BitsOverride {
    /// The layer, or every layer.
    pub layer: Option<usize>,
    /// The KV head, or every KV head.
    pub kv_head: Option<usize>,
    /// Width of keys, if it changes.
    pub k: Option<Bits>,
    /// Width of values, if it changes.
    pub v: Option<Bits>,
}

/// How a model's keys and values are quantized.
///
/// The default is that of the ATC '26 release: Π = 64, 4 sink tokens, bf16, round to nearest,
/// [`Layout::PerChannelKey`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    bits: HeadBits,
    partition: usize,
    sinks: usize,
    dtype: DType,
    rounding: Rounding,
    layout: Layout,
    cached_sums: bool,
    open_block: OpenBlock,
    overrides: Vec<BitsOverride>,
}

impl Config {
    /// Largest number of sink tokens.
    pub const MAX_SINKS: usize = 1024;

    /// The default configuration with codes of these widths.
    pub const fn new(k: Bits, v: Bits) -> Self {
        Config {
            bits: HeadBits { k, v },
            partition: 64,
            sinks: 4,
            dtype: DType::BF16,
            rounding: Rounding::Nearest,
            layout: Layout::PerChannelKey,
            cached_sums: true,
            open_block: OpenBlock::Exact,
            overrides: Vec::new(),
        }
    }

    /// Sets the partition Π: tokens of a block.
    ///
    /// # Errors
    /// [`Error::Argument`] unless it is 32, 64 or 128.
    pub fn with_partition(self, partition: usize) -> Result<Self, Error> {
        if !matches!(partition, 32 | 64 | 128) {
            return Err(Error::argument("partition", "32, 64 or 128 tokens", partition));
        }
        Ok(Config { partition, ..self })
    }

    /// Sets how many tokens at the start of a sequence stay in 16 bits (attention sinks).
    ///
    /// # Errors
    /// [`Error::Argument`] past [`MAX_SINKS`](Self::MAX_SINKS).
    pub fn with_sinks(self, sinks: usize) -> Result<Self, Error> {
        if sinks > Self::MAX_SINKS {
            return Err(Error::argument("sinks", format!("at most {}", Self::MAX_SINKS), sinks));
        }
        Ok(Config { sinks, ..self })
    }

    /// Sets the 16-bit type of sinks, open block, scales and minima.
    ///
    /// # Errors
    /// [`Error::Argument`] unless it is f16 or bf16.
    pub fn with_dtype(self, dtype: DType) -> Result<Self, Error> {
        if dtype == DType::F32 {
            return Err(Error::argument("dtype", "f16 or bf16", dtype));
        }
        Ok(Config { dtype, ..self })
    }

    /// Sets the rounding.
    pub fn with_rounding(self, rounding: Rounding) -> Self {
        Config { rounding, ..self }
    }

    /// Sets the layout.
    pub fn with_layout(self, layout: Layout) -> Self {
        Config { layout, ..self }
    }

    /// Sets whether pages hold the sums of their codes (summation elimination), or readers add them up each time.
    pub fn with_cached_sums(self, cached_sums: bool) -> Self {
        Config { cached_sums, ..self }
    }

    /// Sets what happens to the open block.
    pub fn with_open_block(self, open_block: OpenBlock) -> Self {
        Config { open_block, ..self }
    }

    /// Adds other widths for some layers and heads. Where several apply, the last added wins.
    pub fn with_override(mut self, bits: BitsOverride) -> Self {
        self.overrides.push(bits);
        self
    }

    /// Widths where no override applies.
    pub const fn bits(&self) -> HeadBits {
        self.bits
    }

    /// Π: tokens of a block, and the most channels that share a scale.
    pub const fn partition(&self) -> usize {
        self.partition
    }

    /// Tokens at the start of a sequence that stay in 16 bits.
    pub const fn sinks(&self) -> usize {
        self.sinks
    }

    /// The 16-bit type of sinks, open block, scales and minima.
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// The rounding.
    pub const fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// The layout.
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// Whether pages hold the sums of their codes.
    pub const fn cached_sums(&self) -> bool {
        self.cached_sums
    }

    /// What happens to the open block.
    pub const fn open_block(&self) -> OpenBlock {
        self.open_block
    }

    /// The overrides, in the order in which they were added.
    pub fn overrides(&self) -> &[BitsOverride] {
        &self.overrides
    }

    /// Widths of one KV head of one layer.
    pub fn head_bits(&self, layer: usize, kv_head: usize) -> HeadBits {
        let mut bits = self.bits;
        for other in &self.overrides {
            if other.layer.is_none_or(|l| l == layer) && other.kv_head.is_none_or(|h| h == kv_head) {
                bits.k = other.k.unwrap_or(bits.k);
                bits.v = other.v.unwrap_or(bits.v);
            }
        }
        bits
    }
}

/// Π_c: channels of a vector of `dim` channels that share a scale. `min(Π, dim)`, reduced by 16 until it divides `dim`.
///
/// # Errors
/// [`Error::Argument`] unless `dim` is a multiple of 16 above 0.
pub fn channel_partition(partition: usize, dim: usize) -> Result<usize, Error> {
    if dim == 0 || !dim.is_multiple_of(16) {
        return Err(Error::argument("dim", "a multiple of 16 above 0", dim));
    }
    if partition < 16 || !partition.is_multiple_of(16) {
        return Err(Error::argument("partition", "a multiple of 16 above 0", partition));
    }
    let mut channels = partition.min(dim);
    while !dim.is_multiple_of(channels) {
        channels -= 16;
    }
    Ok(channels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_partitions() {
        for (partition, dim, expected) in [
            (64, 128, 64),
            (64, 64, 64),
            (128, 64, 64),
            (128, 128, 128),
            (128, 256, 128),
            (64, 96, 48),
            (32, 96, 32),
            (128, 96, 96),
            (32, 80, 16),
            (64, 80, 16),
            (128, 80, 80),
            (64, 48, 48),
            (64, 16, 16),
            (64, 112, 16),
            (128, 144, 48),
            (128, 160, 80),
        ] {
            assert_eq!(channel_partition(partition, dim), Ok(expected), "Π {partition}, dim {dim}");
        }
        for (partition, dim) in [(64, 0), (64, 40), (0, 64), (8, 64)] {
            assert!(channel_partition(partition, dim).is_err(), "Π {partition}, dim {dim}");
        }
    }

    #[test]
    fn the_last_override_wins() {
        let config = Config::new(Bits::Two, Bits::Two)
            .with_override(BitsOverride {
                layer: Some(0),
                k: Some(Bits::Eight),
                v: Some(Bits::Eight),
                kv_head: None,
            })
            .with_override(BitsOverride { kv_head: Some(1), k: Some(Bits::Four), ..BitsOverride::default() });
        let bits = |k, v| HeadBits { k, v };
        for (layer, head, expected) in [
            (0, 0, bits(Bits::Eight, Bits::Eight)),
            (0, 1, bits(Bits::Four, Bits::Eight)),
            (1, 0, bits(Bits::Two, Bits::Two)),
            (1, 1, bits(Bits::Four, Bits::Two)),
        ] {
            assert_eq!(config.head_bits(layer, head), expected, "layer {layer}, head {head}");
        }
    }

    #[test]
    fn refused_values_name_the_argument() {
        let config = || Config::new(Bits::Four, Bits::Two);
        for (result, named) in [
            (config().with_partition(48), "partition"),
            (config().with_partition(0), "partition"),
            (config().with_sinks(Config::MAX_SINKS + 1), "sinks"),
            (config().with_dtype(DType::F32), "dtype"),
            (Bits::new(3).map(|bits| Config::new(bits, bits)), "bits"),
        ] {
            match result {
                Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
                other => panic!("{named}: {other:?}"),
            }
        }
        assert_eq!(Bits::ALL.map(|bits| Bits::new(bits.count())), Bits::ALL.map(Ok));
        assert_eq!(Bits::ALL.map(Bits::levels), [3, 15, 255]);
    }
}

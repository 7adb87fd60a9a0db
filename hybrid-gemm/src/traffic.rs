//! Receipts: what a product moved, counted where it is moved.
//!
//! Counts are of what the kernel asks for, tile by tile. Host memory is not cached on the device, so the link carries exactly
//! what is asked of it; HBM carries less, because L2 serves repeated reads (see [`CostModel`](crate::CostModel)).
//! Scales and zero points that lie in tiles count with them, scales of blocks count for HBM, where they lie; vectors of length n
//! (bias, scales of output features) are left out.

use std::iter::Sum;
use std::ops::AddAssign;

/// Bytes and tiles of one product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Weight tiles fetched over the host link.
    pub link_tiles: u64,
    /// Bytes of weights over the host link.
    pub link_bytes: u64,
    /// Weight tiles fetched from HBM.
    pub hbm_tiles: u64,
    /// Bytes of weights from HBM, scales of blocks included, whatever holds their codes.
    pub hbm_weight_bytes: u64,
    /// Bytes of weights that a copy engine wrote to HBM, of the link's: slab by slab, each counted when its copy is done, by the launch
    /// behind it. Slabs that a call without tokens or with a bad schedule leaves unread are copied all the same, and are in it.
    pub staged_bytes: u64,
    /// Bytes of activations X.
    pub activation_bytes: u64,
    /// Bytes of partial sums, written and read.
    pub partial_bytes: u64,
    /// Bytes of O, and of the residual that is added to it.
    pub output_bytes: u64,
    /// Additions and multiplications.
    pub flops: u64,
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.link_tiles += other.link_tiles;
        self.link_bytes += other.link_bytes;
        self.hbm_tiles += other.hbm_tiles;
        self.hbm_weight_bytes += other.hbm_weight_bytes;
        self.staged_bytes += other.staged_bytes;
        self.activation_bytes += other.activation_bytes;
        self.partial_bytes += other.partial_bytes;
        self.output_bytes += other.output_bytes;
        self.flops += other.flops;
    }
}

impl Sum for Traffic {
    fn sum<I: Iterator<Item = Self>>(traffic: I) -> Self {
        traffic.fold(Traffic::default(), |mut sum, traffic| {
            sum += traffic;
            sum
        })
    }
}

impl std::fmt::Display for Traffic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "link {} in {} tiles; HBM: weights {} in {} tiles, activations {}, partial sums {}, output {}",
            Bytes(self.link_bytes),
            self.link_tiles,
            Bytes(self.hbm_weight_bytes),
            self.hbm_tiles,
            Bytes(self.activation_bytes),
            Bytes(self.partial_bytes),
            Bytes(self.output_bytes)
        )?;
        match self.staged_bytes {
            0 => Ok(()),
            staged => write!(f, ", staged {}", Bytes(staged)),
        }
    }
}

/// What the call of a product returns: what it did beside what was predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Receipt {
    /// Counted during the product.
    pub counted: Traffic,
    /// What the plan expected, with its time.
    pub predicted: crate::Prediction,
}

/// Bytes for reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(
    /// How many.
    pub u64,
);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Bytes(bytes) = *self;
        match bytes {
            0..10_000 => write!(f, "{bytes} B"),
            10_000..10_000_000 => write!(f, "{:.1} kB", bytes as f64 / 1e3),
            10_000_000..10_000_000_000 => write!(f, "{:.1} MB", bytes as f64 / 1e6),
            _ => write!(f, "{:.1} GB", bytes as f64 / 1e9),
        }
    }
}

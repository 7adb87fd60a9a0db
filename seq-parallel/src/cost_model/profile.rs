//! Profiles: machines that plans can be made for without measuring them.
//!
//! Link rates are published ones of one direction; rates of kernels are of the order of what is published of FlashAttention and of
//! libraries of matrix products. Who has measured [`Rates`] passes those.

use super::corrected::Rates;
use crate::Error;
use crate::transport::sim::Link;

/// Machines of one kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Profile {
    /// What it is asked for by.
    pub name: &'static str,
    /// What it is.
    pub summary: &'static str,
    /// GPUs of a node, which share the fast links; at least 1. `usize::MAX` where there is one node.
    pub node: usize,
    /// Rates of a GPU and its links.
    pub rates: Rates,
}

impl Profile {
    /// Whether groups of `group` adjacent ranks out of `ranks` lie within nodes each.
    pub fn holds(&self, group: usize, ranks: usize) -> bool {
        ranks <= self.node || self.node.is_multiple_of(group)
    }

    /// Every profile.
    pub const ALL: [Profile; 4] = [Self::HOST, Self::H100, Self::H100_100G, Self::A100];

    /// Cores of one machine, over its memory: orders of magnitude.
    pub const HOST: Profile = Profile {
        name: "host",
        summary: "cores of one machine: 5 GFLOP/s in attention, 20 in products, 5 GB/s and 20 µs between ranks",
        node: usize::MAX,
        rates: Rates {
            attention_flops_per_s: 5e9,
            half_rate_tokens: 8.0,
            matmul_flops_per_s: 20e9,
            intra: Link { alpha_s: 20e-6, bytes_per_s: 5e9 },
            inter: Link { alpha_s: 20e-6, bytes_per_s: 5e9 },
            element_bytes: 4.0,
            kv_bytes: 4.0,
        },
    };

    /// Nodes of eight H100 with an adapter of 400 Gb/s per GPU.
    pub const H100: Profile = Profile {
        name: "h100",
        summary: "nodes of 8 H100: 540 TFLOP/s in attention, 650 in products, 450 GB/s in a node, 50 between nodes",
        node: 8,
        rates: Rates {
            attention_flops_per_s: 540e12,
            half_rate_tokens: 512.0,
            matmul_flops_per_s: 650e12,
            intra: Link::NVLINK,
            inter: Link::NIC_400G,
            element_bytes: 2.0,
            kv_bytes: 2.0,
        },
    };

    /// The same with an adapter of 100 Gb/s per GPU.
    pub const H100_100G: Profile = Profile {
        name: "h100-100g",
        summary: "as h100, with 12.5 GB/s between nodes",
        rates: Rates { inter: Link::NIC_100G, ..Self::H100.rates },
        ..Self::H100
    };

    /// Nodes of eight A100 that share 400 Gb/s: the testbed of PecSched (§6).
    pub const A100: Profile = Profile {
        name: "a100",
        summary: "nodes of 8 A100: 190 TFLOP/s in attention, 250 in products, 300 GB/s in a node, 6.25 between nodes",
        node: 8,
        rates: Rates {
            attention_flops_per_s: 190e12,
            half_rate_tokens: 512.0,
            matmul_flops_per_s: 250e12,
            intra: Link { alpha_s: 3e-6, bytes_per_s: 300e9 },
            inter: Link { alpha_s: 10e-6, bytes_per_s: 6.25e9 },
            element_bytes: 2.0,
            kv_bytes: 2.0,
        },
    };

    /// The profile of a name.
    ///
    /// # Errors
    /// [`Error::Argument`] that lists the names, for another.
    pub fn named(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|profile| profile.name == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|profile| profile.name).collect();
            Error::argument("profile", format!("one of {}", names.join(", ")), format!("{name:?}"))
        })
    }
}

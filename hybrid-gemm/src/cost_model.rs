//! Traffic and time of a path, in closed form: which path to take, and how to set alpha.
//!
//! `T = max(link bytes / B_c, HBM bytes / B_h, flops / F) + launch`, per path, with the bytes below. B_c is what the path gets of the
//! link: direct paths the rate at which blocks read it, staged ones that of a copy engine, which over PCIe is the faster. M tokens,
//! W bytes of weights in host memory, P tokens of a panel, R = ceil(M / P), c blocks of a cluster, T_k K tiles, e the bytes of an
//! element, A_x how often X is read from HBM because L2 cannot hold it.
//!
//! | path | link | HBM |
//! |---|---|---|
//! | output-stationary | W R | M K e_x A_x + M N e_o |
//! | weight-stationary | W | the same + 2 (T_k − 1) · 4 M N, where R > 1 |
//! | multicast | W ceil(R / c) | as output-stationary |
//! | staged | W | the same + 2 W |
//!
//! The last K tile of a weight-stationary column goes straight to the epilogue, so the partial sums are written and read
//! T_k − 1 times.

use crate::epilogue::EpilogueSpec;
use crate::pack::TILE_ROWS;
use crate::path::Launch;
use crate::schedule::TileSchedule;
use crate::weights::Placement;
use crate::{DType, DeviceProfile, Format, Traffic};

/// Bytes of a partial sum: f32.
const PARTIAL_BYTES: u64 = 4;
/// Share of L2 that X may take before it is read from HBM again.
const L2_SHARE: f64 = 0.5;

/// Types of what is multiplied, and what happens behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// Type of X.
    pub x: DType,
    /// Behind the sums.
    pub epilogue: EpilogueSpec,
}

impl Operands {
    /// Additions and multiplications of some columns.
    pub(crate) fn flops(&self, placement: &Placement, columns: std::ops::Range<usize>, tokens: usize) -> u64 {
        let tiling = placement.tiling();
        let row = |column: usize| (column * TILE_ROWS).min(tiling.n()) as u64;
        2 * tokens as u64 * tiling.k() as u64 * (row(columns.end) - row(columns.start))
    }

    /// Bytes of outputs and residual for `rows` rows of W and one token.
    pub(crate) fn output_bytes(&self, rows: usize) -> u64 {
        let factor = 1 + u64::from(self.epilogue.residual);
        factor * (self.epilogue.out_columns(rows) * self.epilogue.out.size()) as u64
    }
}

/// What limits a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The host link.
    Link,
    /// HBM.
    Hbm,
    /// The tensor cores.
    Math,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Bound::Link => "link",
            Bound::Hbm => "HBM",
            Bound::Math => "math",
        })
    }
}

/// What a product is expected to move and take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Bytes that it asks for.
    pub traffic: Traffic,
    /// Bytes that reach HBM behind L2.
    pub hbm_bytes: u64,
    /// Time of the link alone, in seconds.
    pub link_s: f64,
    /// Time of HBM alone, in seconds.
    pub hbm_s: f64,
    /// Time of the math alone, in seconds.
    pub math_s: f64,
    /// The whole, in seconds.
    pub time_s: f64,
    /// What limits it.
    pub bound: Bound,
}

/// The cost model of one matrix on one device.
#[derive(Debug, Clone, Copy)]
pub struct CostModel<'a> {
    /// Where the weights lie.
    pub placement: &'a Placement,
    /// Types and epilogue.
    pub operands: Operands,
    /// Rates.
    pub device: &'a DeviceProfile,
}

impl CostModel<'_> {
    /// What some launches move and how long they take.
    pub fn predict(&self, launches: &[Launch]) -> Prediction {
        let traffic: Traffic = launches.iter().map(|launch| self.traffic(launch)).sum();
        let hbm_bytes = self.hbm_bytes(launches, &traffic);
        let [read, copied] = [traffic.link_bytes - traffic.staged_bytes, traffic.staged_bytes];
        let link_s =
            read as f64 / self.device.link_reads_per_s + copied as f64 / self.device.link_copies_per_s;
        let hbm_s = hbm_bytes as f64 / self.device.hbm_bytes_per_s;
        let math_s: f64 = launches.iter().map(|launch| self.math_s(&launch.schedule)).sum();
        let (slowest, bound) = slowest(link_s, hbm_s, math_s);
        // The product of the last slab follows its copy.
        let slabs = launches.iter().filter(|launch| !launch.staged.is_empty()).count();
        let tail = if slabs > 0 { hbm_s.max(math_s) / slabs as f64 } else { 0.0 };
        let time_s = slowest + tail + self.device.launch_s;
        Prediction { traffic, hbm_bytes, link_s, hbm_s, math_s, time_s, bound }
    }

    /// What a launch, and the copies before it, ask for.
    pub fn traffic(&self, launch: &Launch) -> Traffic {
        let (schedule, placement, tiling) = (&launch.schedule, self.placement, self.placement.tiling());
        let tokens = schedule.tokens as u64;
        let tiles = |columns: &std::ops::Range<usize>| (columns.len() * schedule.k_tiles) as u64;
        let staged_bytes = placement.column_bytes(launch.staged.clone());
        // Slabs are copied before anybody knows how many tokens there are.
        let staged = Traffic {
            link_tiles: tiles(&launch.staged),
            link_bytes: staged_bytes,
            staged_bytes,
            ..Traffic::default()
        };
        if tokens == 0 {
            return staged;
        }
        let [os, ws, hbm] = columns(schedule);
        let columns = os.start..hbm.end;
        let (panels, groups) = (schedule.panels() as u64, schedule.panel_groups() as u64);
        let partials = match schedule.sums_in_registers() {
            true => 0,
            false => {
                2 * (schedule.k_tiles as u64 - 1) * PARTIAL_BYTES * tokens * (ws.len() * TILE_ROWS) as u64
            }
        };
        let rows = tiling.n().min(columns.end * TILE_ROWS) - columns.start * TILE_ROWS;
        // Scales of blocks lie in HBM, and come with every fetch of their tile.
        let fetches = os.len() as u64 * groups + ws.len() as u64 + hbm.len() as u64 * panels;
        Traffic {
            link_tiles: tiles(&os) * groups + tiles(&ws) + staged.link_tiles,
            link_bytes: placement.column_bytes(os) * groups
                + placement.column_bytes(ws.clone())
                + staged_bytes,
            hbm_tiles: tiles(&hbm) * panels,
            hbm_weight_bytes: placement.column_bytes(hbm) * panels + placement.column_scale_bytes() * fetches,
            staged_bytes,
            activation_bytes: columns.len() as u64 * tokens * (tiling.k() * self.operands.x.size()) as u64,
            partial_bytes: partials,
            output_bytes: tokens * self.operands.output_bytes(rows),
            flops: self.operands.flops(placement, columns, schedule.tokens),
        }
    }

    /// Bytes behind L2: weights in HBM once, because the panels of a column are neighbours in time; X as often as L2 loses it.
    fn hbm_bytes(&self, launches: &[Launch], traffic: &Traffic) -> u64 {
        let weights: u64 = launches
            .iter()
            .filter(|launch| launch.schedule.tokens > 0)
            .map(|launch| {
                let [os, _, hbm] = columns(&launch.schedule);
                let scales = (hbm.end - os.start) as u64 * self.placement.column_scale_bytes();
                self.placement.column_bytes(hbm) + scales
            })
            .sum();
        weights + traffic.staged_bytes + traffic.partial_bytes + traffic.output_bytes + self.x_bytes(launches)
    }

    /// Bytes of X from HBM: M K e_x A_x.
    pub(crate) fn x_bytes(&self, launches: &[Launch]) -> u64 {
        let Some(Launch { schedule, .. }) = launches.first() else { return 0 };
        let once = (schedule.tokens * self.placement.tiling().k() * self.operands.x.size()) as u64;
        if once as f64 <= L2_SHARE * self.device.l2_bytes {
            return once;
        }
        // Blocks that run at the same time stream X together; each wave of them reads it anew.
        let waves = |items: usize, blocks: usize| if items == 0 { 0 } else { items.div_ceil(blocks.max(1)) };
        let passes: usize = launches
            .iter()
            .map(|Launch { schedule, .. }| {
                waves(schedule.os_columns * schedule.panels(), schedule.os_blocks)
                    + waves(schedule.ws_columns, schedule.ws_blocks)
                    + waves(schedule.hbm_columns * schedule.panels(), schedule.hbm_blocks)
            })
            .sum();
        // No more than what the blocks ask for.
        (once * passes as u64).min(launches.iter().map(|launch| self.traffic(launch).activation_bytes).sum())
    }

    /// Time of the slowest role's math on its own SMs.
    fn math_s(&self, schedule: &TileSchedule) -> f64 {
        let blocks = [schedule.os_blocks, schedule.ws_blocks, schedule.hbm_blocks];
        columns(schedule)
            .into_iter()
            .zip(blocks)
            .filter(|(columns, _)| !columns.is_empty())
            .map(|(columns, blocks)| {
                let flops = self.operands.flops(self.placement, columns, schedule.tokens) as f64;
                flops / (self.device.flops_per_s * blocks as f64 / self.device.sm_count as f64)
            })
            .fold(0.0, f64::max)
    }

    /// The alpha at which link and HBM finish together, from the predictions of the two pure dataflows.
    pub fn balanced_alpha(&self, output_stationary: &Prediction, weight_stationary: &Prediction) -> f64 {
        let terms = AlphaTerms::between(output_stationary, weight_stationary);
        terms.balance(self.device.link_reads_per_s, self.device.hbm_bytes_per_s)
    }
}

/// The longest of three times, and what it is; the first of equals.
pub(crate) fn slowest(link_s: f64, hbm_s: f64, math_s: f64) -> (f64, Bound) {
    let slowest = link_s.max(hbm_s).max(math_s);
    let bound = match () {
        () if slowest == link_s => Bound::Link,
        () if slowest == hbm_s => Bound::Hbm,
        () => Bound::Math,
    };
    (slowest, bound)
}

/// The columns of the three roles.
fn columns(schedule: &TileSchedule) -> [std::ops::Range<usize>; 3] {
    let os = schedule.first_column..schedule.first_column + schedule.os_columns;
    let ws = os.end..os.end + schedule.ws_columns;
    let hbm = ws.end..ws.end + schedule.hbm_columns;
    [os, ws, hbm]
}

/// Bytes between which alpha decides, each for all host columns on that dataflow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AlphaTerms {
    /// Over the link, all columns output-stationary: W R.
    pub link_output_stationary: f64,
    /// Over the link, all columns weight-stationary: W.
    pub link_weight_stationary: f64,
    /// HBM on either: X, O and weights in HBM.
    pub hbm_always: f64,
    /// HBM on top, all columns weight-stationary: the partial sums, less what X is read less often.
    pub hbm_weight_stationary: f64,
}

impl AlphaTerms {
    /// From the predictions of the two pure dataflows.
    pub fn between(output_stationary: &Prediction, weight_stationary: &Prediction) -> Self {
        AlphaTerms {
            link_output_stationary: output_stationary.traffic.link_bytes as f64,
            link_weight_stationary: weight_stationary.traffic.link_bytes as f64,
            hbm_always: output_stationary.hbm_bytes as f64,
            hbm_weight_stationary: weight_stationary.hbm_bytes as f64 - output_stationary.hbm_bytes as f64,
        }
    }

    /// With a share β of the columns weight-stationary the link carries `W R − β (W R − W)` and HBM `H0 + β H1`. Both finish
    /// together at `β* = (W R / B_c − H0 / B_h) / ((W R − W) / B_c + H1 / B_h)`; gives `1 − β*`, within 0..=1.
    pub fn balance(&self, link_bytes_per_s: f64, hbm_bytes_per_s: f64) -> f64 {
        let saved = (self.link_output_stationary - self.link_weight_stationary) / link_bytes_per_s;
        let added = self.hbm_weight_stationary / hbm_bytes_per_s;
        if saved <= 0.0 {
            return 1.0; // Nothing is read twice, so weight-stationary saves nothing.
        }
        if saved + added <= 0.0 {
            return 0.0; // It saves on both.
        }
        let excess = self.link_output_stationary / link_bytes_per_s - self.hbm_always / hbm_bytes_per_s;
        1.0 - (excess / (saved + added)).clamp(0.0, 1.0)
    }

    /// `max(link, HBM)` at an alpha, in seconds.
    pub fn time_s(&self, alpha: f64, link_bytes_per_s: f64, hbm_bytes_per_s: f64) -> f64 {
        let beta = 1.0 - alpha;
        let saved = self.link_output_stationary - self.link_weight_stationary;
        let link = (self.link_output_stationary - beta * saved) / link_bytes_per_s;
        link.max((self.hbm_always + beta * self.hbm_weight_stationary) / hbm_bytes_per_s)
    }
}

/// Tokens above which the math of a product takes longer than the transfer of its weights by the faster way over the link:
/// e_w F / (2 B_c).
pub fn break_even_tokens(format: Format, device: &DeviceProfile) -> f64 {
    format.bits() as f64 / 8.0 * device.flops_per_s / (2.0 * device.fastest_link())
}

/// The fraction f* of weights in HBM at which link and HBM finish together, where both are free to choose and M is small, so that
/// blocks read both: B_h / (B_h + B_c).
pub fn free_hbm_fraction(device: &DeviceProfile) -> f64 {
    device.hbm_bytes_per_s / (device.hbm_bytes_per_s + device.link_reads_per_s)
}

/// The largest share of a compute-bound matrix that can lie in host memory at no cost: min(1, 2 M B_c / (e_w F)).
pub fn free_host_share(format: Format, device: &DeviceProfile, tokens: usize) -> f64 {
    (tokens as f64 / break_even_tokens(format, device)).min(1.0)
}

/// Link rate that a model of `host_bytes` needs to give a token every `seconds_per_token`; models fit a link while the sum of
/// their rates stays below its own (the paper's placement rule).
pub fn link_demand(host_bytes: u64, seconds_per_token: f64) -> f64 {
    host_bytes as f64 / seconds_per_token
}

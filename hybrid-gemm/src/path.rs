//! The ways a product can take, and the launches that each means.

use std::ops::Range;

use crate::schedule::TileSchedule;
use crate::weights::Placement;
use crate::{DeviceProfile, Operands};

/// How weights in host memory reach the product. Columns in HBM take the HBM role of the same launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Path {
    /// Blocks read host memory in place: the paper's kernel. `alpha` is the share of the link's blocks that are
    /// output-stationary; 1 and 0 are the pure dataflows.
    Direct {
        /// 0 to 1.
        alpha: f64,
    },
    /// Output-stationary, one read for the panels of a cluster of blocks.
    Multicast {
        /// Blocks of a cluster.
        cluster: usize,
    },
    /// A copy engine brings slabs of the weights to a ring in HBM, one ordinary product per slab follows.
    Staged {
        /// Column tiles of a slab.
        slab_columns: usize,
    },
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Path::Direct { alpha: 1.0 } => f.write_str("output-stationary"),
            Path::Direct { alpha: 0.0 } => f.write_str("weight-stationary"),
            Path::Direct { alpha } => write!(f, "hybrid, alpha {alpha:.3}"),
            Path::Multicast { cluster } => write!(f, "multicast to {cluster} blocks"),
            Path::Staged { slab_columns } => write!(f, "staged in slabs of {} features", 64 * slab_columns),
        }
    }
}

/// One launch of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// What its blocks do.
    pub schedule: TileSchedule,
    /// Host columns that must be in the ring in HBM before it starts; it reads them by its HBM role.
    pub staged: Range<usize>,
}

/// What a path is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PathShape<'a> {
    pub(crate) placement: &'a Placement,
    pub(crate) operands: Operands,
    pub(crate) device: &'a DeviceProfile,
    /// Tokens of a panel.
    pub(crate) panel: usize,
    /// SMs that the launch may use, one block each.
    pub(crate) sm_budget: usize,
    /// Most bytes of HBM for the ring of slabs.
    pub(crate) ring_bytes: u64,
}

/// Slots of the ring of slabs: one is read, one is there, one is filled.
pub(crate) const RING_SLABS: usize = 3;
/// Room for blocks of the link, over their share of the math: too few starve the link, too many only wait (the measurements
/// behind the AsymGEMM notes say to err on the large side).
const LINK_MATH_ROOM: f64 = 1.5;

impl PathShape<'_> {
    /// The launches of a path for `tokens` tokens, or why it cannot be taken.
    pub(crate) fn launches(&self, path: Path, tokens: usize) -> Result<Vec<Launch>, String> {
        let (host, hbm) = (self.placement.host_columns(), self.placement.hbm_columns());
        let base = TileSchedule {
            tokens,
            panel: self.panel,
            k_tiles: self.placement.tiling().k_tiles(),
            first_column: 0,
            os_columns: 0,
            ws_columns: 0,
            hbm_columns: 0,
            os_blocks: 0,
            ws_blocks: 0,
            hbm_blocks: self.sm_budget,
            cluster: 1,
            rotation: [0; 3],
        };
        let one = |schedule| Ok(vec![Launch { schedule, staged: 0..0 }]);
        if host == 0 {
            // Every path is the same without host columns; one of them is enough.
            return match path {
                Path::Direct { alpha: 1.0 } => one(TileSchedule { hbm_columns: hbm, ..base }),
                _ => Err("no weights in host memory".into()),
            };
        }
        match path {
            Path::Direct { alpha } => {
                check_share(alpha)?;
                if base.sums_in_registers() && alpha < 1.0 {
                    let panel = self.panel;
                    return Err(format!(
                        "up to {panel} tokens, output-stationary reads each weight once as well"
                    ));
                }
                let needed = 1 + usize::from(alpha > 0.0 && alpha < 1.0);
                let link = self.link_blocks(tokens, needed)?;
                let os_blocks = output_stationary_blocks(alpha, link);
                let os_columns = output_stationary_columns(host, os_blocks, link);
                one(TileSchedule {
                    os_columns,
                    ws_columns: host - os_columns,
                    hbm_columns: hbm,
                    os_blocks,
                    ws_blocks: link - os_blocks,
                    hbm_blocks: self.sm_budget - link,
                    ..base
                })
            }
            Path::Multicast { cluster } => {
                if cluster < 2 || cluster > self.device.max_cluster {
                    return Err(match self.device.max_cluster {
                        0 | 1 => "the device has no thread-block clusters (sm_90 and newer have)".into(),
                        max => format!("clusters have 2 to {max} blocks"),
                    });
                }
                if base.panels() < cluster {
                    return Err(format!(
                        "{} panels of {} tokens: fewer than a cluster",
                        base.panels(),
                        self.panel
                    ));
                }
                let link = self.link_blocks(tokens, cluster)?.next_multiple_of(cluster);
                let most = self.sm_budget - usize::from(hbm > 0);
                let link = if link > most { most / cluster * cluster } else { link };
                one(TileSchedule {
                    os_columns: host,
                    hbm_columns: hbm,
                    os_blocks: link,
                    hbm_blocks: self.sm_budget - link,
                    cluster,
                    ..base
                })
            }
            Path::Staged { slab_columns } => {
                if slab_columns == 0 {
                    return Err("a slab needs a column tile at least".into());
                }
                let ring = RING_SLABS as u64 * self.placement.column_bytes(0..slab_columns.min(host));
                if ring > self.ring_bytes {
                    return Err(format!(
                        "a ring of {RING_SLABS} slabs needs {ring} bytes, {} are given",
                        self.ring_bytes
                    ));
                }
                // Columns in HBM first, while the first slab is on its way.
                let mut launches = Vec::new();
                if hbm > 0 {
                    let schedule = TileSchedule { first_column: host, hbm_columns: hbm, ..base };
                    launches.push(Launch { schedule, staged: 0..0 });
                }
                for first in (0..host).step_by(slab_columns) {
                    let staged = first..(first + slab_columns).min(host);
                    let schedule = TileSchedule { first_column: first, hbm_columns: staged.len(), ..base };
                    launches.push(Launch { schedule, staged });
                }
                Ok(launches)
            }
        }
    }

    fn link_blocks(&self, tokens: usize, needed: usize) -> Result<usize, String> {
        let host = self.placement.host_columns();
        LinkLoad {
            columns: [host, self.placement.hbm_columns()],
            tile_bytes: self.placement.tile_bytes(0, 0),
            host_bytes: self.placement.host_bytes(),
            flops: self.operands.flops(self.placement, 0..host, tokens),
        }
        .blocks(self.device, self.sm_budget, needed)
    }
}

/// What the blocks of a launch do with weights in host memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LinkLoad {
    /// Columns in host memory and in HBM.
    pub(crate) columns: [usize; 2],
    /// Bytes of a tile.
    pub(crate) tile_bytes: u64,
    /// Bytes in host memory.
    pub(crate) host_bytes: u64,
    /// Math of the columns in host memory.
    pub(crate) flops: u64,
}

impl LinkLoad {
    /// Blocks that read the link: enough to keep it busy and to do the math of its columns; all, where nothing lies in HBM.
    pub(crate) fn blocks(
        &self,
        device: &DeviceProfile,
        sm_budget: usize,
        needed: usize,
    ) -> Result<usize, String> {
        let [host, hbm] = self.columns;
        let most = sm_budget - usize::from(hbm > 0 && sm_budget > 0);
        if needed > most {
            let roles = if hbm > 0 { " and 1 for the weights in HBM" } else { "" };
            return Err(format!("needs {needed} SMs for the link{roles}, the budget is {sm_budget}"));
        }
        if hbm == 0 {
            return Ok(most);
        }
        let tile = self.tile_bytes as f64;
        let busy = (device.link_bytes_in_flight() / (TILES_IN_FLIGHT * tile)).ceil() as usize;
        let share = sm_budget as f64 * host as f64 / (host + hbm) as f64;
        let math_s = self.flops as f64 / device.flops_per_s;
        let link_s = self.host_bytes as f64 / device.link_reads_per_s;
        let math = (device.sm_count as f64 * LINK_MATH_ROOM * math_s / link_s).min(share);
        // Alpha moves in sixteenths where the columns' share of blocks allows.
        let steps = if needed > 1 { share.min(16.0) as usize } else { 1 };
        Ok(busy.max(math.ceil() as usize).max(steps).max(needed).min(most))
    }
}

/// Refuses an alpha that is no share; `clamp` below would panic, or take it for another.
pub(crate) fn check_share(alpha: f64) -> Result<(), String> {
    match (0.0..=1.0).contains(&alpha) {
        true => Ok(()),
        false => Err(format!("alpha is 0 to 1, not {alpha}")),
    }
}

/// Output-stationary blocks of `link` blocks: alpha's share, at least one of each dataflow that alpha has, of which `link` has room
/// for two.
pub(crate) fn output_stationary_blocks(alpha: f64, link: usize) -> usize {
    match alpha {
        0.0 => 0,
        1.0 => link,
        alpha => ((alpha * link as f64).round() as usize).clamp(1, link - 1),
    }
}

/// Columns of the output-stationary blocks: equal columns per block. The kernels compute the same for experts.
pub(crate) fn output_stationary_columns(host: usize, os_blocks: usize, link: usize) -> usize {
    match os_blocks {
        0 => 0,
        blocks => (host * blocks + link / 2) / link,
    }
}

/// Tiles of a block's ring that are on their way at a time.
const TILES_IN_FLIGHT: f64 = 2.0;

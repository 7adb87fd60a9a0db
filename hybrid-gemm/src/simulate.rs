//! A discrete simulation of a product: blocks, their rings, the host link and HBM.
//!
//! It walks the schedule that the kernel walks. A block's producer fetches weight tiles in order, up to [`RING`] ahead of the
//! product; link and HBM are shared evenly by whoever uses them at the moment; a product takes its math at one SM's rate, or the
//! time of its activations, partial sums and outputs in HBM if that is longer. What it adds to the closed form of the
//! [`cost_model`](crate::cost_model) is everything that is not perfectly overlapped: latency, the start and the end, roles that
//! finish apart.
//!
//! Traffic is counted as it happens, so it must equal the closed form's and the kernel's.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::cost_model::CostModel;
use crate::pack::TILE_ROWS;
use crate::path::Launch;
use crate::schedule::{Fetch, Finish, Role, Start, TileSchedule};
use crate::{Error, GemmPlan, Path, Traffic};

/// Weight tiles that a block's ring holds.
pub const RING: usize = 3;

/// What a simulated product moved and took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Simulation {
    /// Counted tile by tile.
    pub traffic: Traffic,
    /// Bytes that reached HBM behind L2.
    pub hbm_bytes: f64,
    /// From the start to the last output, in seconds.
    pub time_s: f64,
    /// Seconds in which the link carried something.
    pub link_busy_s: f64,
    /// Seconds in which HBM did.
    pub hbm_busy_s: f64,
    /// Seconds that the blocks of each role worked, the mean of those that have work, as a device's receipt has it: output-stationary,
    /// weight-stationary, HBM.
    pub role_s: [f64; 3],
}

/// Simulates a path of a plan for `tokens` tokens on the plan's device.
///
/// # Errors
/// [`Error::NoPath`] when the plan drops the path.
pub fn simulate(plan: &GemmPlan, path: Path, tokens: usize) -> Result<Simulation, Error> {
    let launches = plan.launches_of(path, tokens).map_err(Error::NoPath)?;
    Ok(simulate_launches(&plan.model(), &launches))
}

/// Simulates launches one after another. A copy engine brings the slabs of later launches while earlier ones run.
pub fn simulate_launches(model: &CostModel<'_>, launches: &[Launch]) -> Simulation {
    let issued: u64 = launches.iter().map(|launch| model.traffic(launch).activation_bytes).sum();
    // L2 serves most reads of X; the rest is spread over all of them.
    let x_share = if issued == 0 { 0.0 } else { model.x_bytes(launches) as f64 / issued as f64 };
    let mut total = Simulation {
        traffic: Traffic::default(),
        hbm_bytes: 0.0,
        time_s: model.device.launch_s,
        link_busy_s: 0.0,
        hbm_busy_s: 0.0,
        role_s: [0.0; 3],
    };
    let mut copied_s = model.device.launch_s;
    for launch in launches {
        let staged = model.placement.column_bytes(launch.staged.clone());
        if staged > 0 {
            let copy_s = staged as f64 / model.device.link_copies_per_s;
            copied_s += copy_s;
            total.link_busy_s += copy_s;
            total.hbm_bytes += staged as f64;
            total.traffic.link_tiles += (launch.staged.len() * launch.schedule.k_tiles) as u64;
            total.traffic.link_bytes += staged;
            total.traffic.staged_bytes += staged;
            total.time_s = total.time_s.max(copied_s);
        }
        let run = Run::new(model, launch.schedule, x_share).finish();
        total.traffic += run.traffic;
        total.hbm_bytes += run.hbm_bytes;
        total.link_busy_s += run.link.busy_s;
        total.hbm_busy_s += run.hbm.busy_s;
        for (role, worked) in total.role_s.iter_mut().zip(run.role_s()) {
            *role += worked;
        }
        total.time_s += run.now;
    }
    total
}

/// A rate that is shared evenly by the transfers under way.
///
/// Progress is kept as the bytes that any one transfer would have got since the start; a transfer that starts at progress p
/// with b bytes ends at p + b, whoever comes and goes meanwhile.
struct Shared {
    bytes_per_s: f64,
    progress: f64,
    at_s: f64,
    busy_s: f64,
    /// Ends, soonest first, with the block and what it waited for.
    transfers: BinaryHeap<Reverse<(Key, usize, Waiting)>>,
}

/// A float that is ordered; none is NaN here.
#[derive(Clone, Copy, PartialEq)]
struct Key(f64);

impl Eq for Key {}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// What a block waits for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Waiting {
    /// A weight tile on its way.
    Tile,
    /// The memory traffic of a product.
    Memory,
    /// The math of a product.
    Math,
    /// A tile's latency.
    Arrival,
}

impl Shared {
    fn new(bytes_per_s: f64) -> Self {
        Shared { bytes_per_s, progress: 0.0, at_s: 0.0, busy_s: 0.0, transfers: BinaryHeap::new() }
    }

    fn advance(&mut self, now: f64) {
        if !self.transfers.is_empty() {
            self.progress += (now - self.at_s) * self.bytes_per_s / self.transfers.len() as f64;
            self.busy_s += now - self.at_s;
        }
        self.at_s = now;
    }

    fn start(&mut self, now: f64, bytes: f64, block: usize, waiting: Waiting) {
        self.advance(now);
        self.transfers.push(Reverse((Key(self.progress + bytes), block, waiting)));
    }

    /// When the next transfer ends, if nothing else starts.
    fn next_end(&self) -> Option<f64> {
        let Reverse((Key(end), ..)) = self.transfers.peek()?;
        let left = (end - self.progress).max(0.0);
        Some(self.at_s + left * self.transfers.len() as f64 / self.bytes_per_s)
    }

    fn end(&mut self, now: f64) -> Option<(usize, Waiting)> {
        self.advance(now);
        let Reverse((Key(end), block, waiting)) = self.transfers.pop()?;
        // Rounding must not leave a transfer that has ended behind.
        self.progress = self.progress.max(end);
        Some((block, waiting))
    }
}

/// A block's place in its walk.
struct Block {
    steps: usize,
    /// The next step whose tile is fetched, and whether one is on its way.
    fetching: usize,
    on_its_way: bool,
    /// Tiles are there for the steps below this.
    arrived: usize,
    /// The step in progress, and what it still waits for.
    step: usize,
    pending: usize,
    /// End of the last step.
    finished_s: f64,
}

struct Run<'a> {
    model: &'a CostModel<'a>,
    schedule: TileSchedule,
    x_share: f64,
    link: Shared,
    hbm: Shared,
    blocks: Vec<Block>,
    /// Ends of math and latencies.
    timers: BinaryHeap<Reverse<(Key, usize, Waiting)>>,
    now: f64,
    traffic: Traffic,
    hbm_bytes: f64,
}

impl<'a> Run<'a> {
    fn new(model: &'a CostModel<'a>, schedule: TileSchedule, x_share: f64) -> Self {
        let block = |block| Block {
            steps: schedule.steps(block),
            fetching: 0,
            on_its_way: false,
            arrived: 0,
            step: 0,
            pending: 0,
            finished_s: 0.0,
        };
        Run {
            model,
            schedule,
            x_share,
            link: Shared::new(model.device.link_reads_per_s),
            hbm: Shared::new(model.device.hbm_bytes_per_s),
            blocks: (0..schedule.blocks()).map(block).collect(),
            timers: BinaryHeap::new(),
            now: 0.0,
            traffic: Traffic::default(),
            hbm_bytes: 0.0,
        }
    }

    /// The mean of when the blocks of each role that have work finished; 0 for a role without.
    fn role_s(&self) -> [f64; 3] {
        let (mut sums, mut blocks) = ([0.0; 3], [0usize; 3]);
        for (index, block) in self.blocks.iter().enumerate().filter(|(_, block)| block.steps > 0) {
            let role = self.schedule.role(index) as usize;
            sums[role] += block.finished_s;
            blocks[role] += 1;
        }
        std::array::from_fn(|role| sums[role] / blocks[role].max(1) as f64)
    }

    fn finish(mut self) -> Self {
        for block in 0..self.blocks.len() {
            self.fetch(block);
        }
        loop {
            let timer = self.timers.peek().map(|Reverse((Key(end), ..))| *end);
            let next = [self.link.next_end(), self.hbm.next_end(), timer];
            let soonest = next.iter().flatten().copied().min_by(f64::total_cmp);
            let Some(now) = soonest else { return self };
            self.now = now.max(self.now);
            let event = match () {
                () if next[2] == soonest => {
                    self.timers.pop().map(|Reverse((_, block, waiting))| (block, waiting))
                }
                () if next[0] == soonest => self.link.end(self.now),
                () => self.hbm.end(self.now),
            };
            if let Some((block, waiting)) = event {
                self.event(block, waiting);
            }
        }
    }

    fn event(&mut self, block: usize, waiting: Waiting) {
        match waiting {
            Waiting::Tile => {
                // The next tile is asked for at once; this one is usable after its latency.
                self.blocks[block].on_its_way = false;
                let latency = match self.schedule.role(block) {
                    Role::Hbm => 0.0,
                    _ => self.model.device.link_latency_s,
                };
                self.timers.push(Reverse((Key(self.now + latency), block, Waiting::Arrival)));
                self.fetch(block);
            }
            Waiting::Arrival => {
                self.blocks[block].arrived += 1;
                self.skip_kept(block);
                self.multiply(block);
            }
            Waiting::Memory | Waiting::Math => {
                self.blocks[block].pending -= 1;
                if self.blocks[block].pending == 0 {
                    self.blocks[block].step += 1;
                    self.blocks[block].finished_s = self.now;
                    self.fetch(block);
                    self.multiply(block);
                }
            }
        }
    }

    /// Tiles that are kept are there as soon as the one before.
    fn skip_kept(&mut self, block: usize) {
        let state = &mut self.blocks[block];
        while state.arrived < state.steps && self.schedule.step(block, state.arrived).fetch == Fetch::Kept {
            state.arrived += 1;
        }
    }

    /// Asks for the next weight tile if the ring has room.
    fn fetch(&mut self, block: usize) {
        while !self.blocks[block].on_its_way {
            let state = &self.blocks[block];
            if state.fetching >= state.steps {
                return;
            }
            let step = self.schedule.step(block, state.fetching);
            if step.fetch == Fetch::Kept {
                self.blocks[block].fetching += 1;
                continue;
            }
            // The ring holds whole tiles, each for as many steps as sweep over it.
            let sweep = match step.role {
                Role::WeightStationary => self.schedule.panels(),
                _ => 1,
            };
            if state.fetching / sweep >= state.step / sweep + RING {
                return;
            }
            self.blocks[block].fetching += 1;
            self.blocks[block].on_its_way = true;
            let bytes = self.model.placement.tile_bytes(step.column, step.k_tile);
            match step.fetch {
                Fetch::Link => {
                    self.traffic.link_tiles += 1;
                    self.traffic.link_bytes += bytes;
                    self.link.start(self.now, bytes as f64, block, Waiting::Tile);
                }
                Fetch::Hbm => {
                    self.traffic.hbm_tiles += 1;
                    self.traffic.hbm_weight_bytes += bytes;
                    // L2 serves the later panels of a column.
                    let share = bytes as f64 / self.schedule.panels() as f64;
                    self.hbm_bytes += share;
                    self.hbm.start(self.now, share, block, Waiting::Tile);
                }
                // With the tile of the first block of the cluster, which runs the same steps.
                Fetch::Peer | Fetch::Kept => {
                    self.timers.push(Reverse((Key(self.now), block, Waiting::Tile)));
                }
            }
        }
    }

    /// Starts the block's next product if its tile is there.
    fn multiply(&mut self, block: usize) {
        let state = &self.blocks[block];
        if state.pending > 0 || state.step >= state.arrived {
            return;
        }
        let (model, tiling) = (self.model, self.model.placement.tiling());
        let step = self.schedule.step(block, state.step);
        let (inputs, rows) = (tiling.inputs(step.k_tile), tiling.rows(step.column));
        let flops = 2 * (step.tokens * inputs * rows) as u64;
        let x = (step.tokens * inputs * model.operands.x.size()) as u64;
        let panel = (step.tokens * TILE_ROWS * size_of::<f32>()) as u64;
        let partials =
            u64::from(step.start == Start::Workspace) + u64::from(step.finish == Finish::Workspace);
        let output = match step.finish {
            Finish::Output => step.tokens as u64 * model.operands.output_bytes(rows),
            _ => 0,
        };
        // Scales of blocks come from HBM with every fetch of their tile; L2 serves the later ones.
        let (scales, fetches) = match (step.fetch, step.role) {
            (Fetch::Kept | Fetch::Peer, _) => (0, 1),
            (_, Role::WeightStationary) => (model.placement.block_scale_bytes(step.k_tile), 1),
            (Fetch::Hbm, _) => (model.placement.block_scale_bytes(step.k_tile), self.schedule.panels()),
            (Fetch::Link, _) => {
                (model.placement.block_scale_bytes(step.k_tile), self.schedule.panel_groups())
            }
        };
        self.traffic.hbm_weight_bytes += scales;
        self.traffic.flops += flops;
        self.traffic.activation_bytes += x;
        self.traffic.partial_bytes += partials * panel;
        self.traffic.output_bytes += output;

        let scales = scales as f64 / fetches as f64;
        let memory = x as f64 * self.x_share + (partials * panel + output) as f64 + scales;
        self.hbm_bytes += memory;
        let math_s = flops as f64 * model.device.sm_count as f64 / model.device.flops_per_s;
        self.blocks[block].pending = 2;
        self.timers.push(Reverse((Key(self.now + math_s), block, Waiting::Math)));
        self.hbm.start(self.now, memory, block, Waiting::Memory);
    }
}

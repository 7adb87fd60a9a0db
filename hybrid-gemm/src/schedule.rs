//! The tile schedule: which block of a launch does what, in which order.
//!
//! One function, [`TileSchedule::step`], is the whole of it: plain integers in, plain integers out. The kernel walks it, the CPU
//! path walks it and the simulation walks it, so that a tile that one of them fetches is fetched by all.
//!
//! The blocks of a launch have roles by their rank; the roles own disjoint columns of O and never speak to each other:
//!
//! | role | ranks | columns | order of a block's steps |
//! |---|---|---|---|
//! | output-stationary (the paper's SymGEMM) | first `os_blocks` | the first `os_columns` | per (column, panel): K rises, sums stay in registers; every panel of tokens fetches the weights anew |
//! | weight-stationary (AsymGEMM) | next `ws_blocks` | the other host columns | per column: K rises, and at each weight tile all panels; the tile crosses the link once, sums go through memory |
//! | HBM | the rest | the columns in HBM | output-stationary, from HBM |
//!
//! The paper's **alpha** is `os_blocks / (os_blocks + ws_blocks)`. Items are dealt round-robin, so consecutive host tiles are
//! read at the same time and no role has a block with more than one item above another.
//!
//! With a cluster of c blocks, one fetch serves c panels: the output-stationary blocks go in groups of c over the same
//! weights, the first of each group fetches and the others receive ([`Fetch::Peer`]).

use crate::Error;

/// What a block does in a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Output-stationary on columns in host memory.
    OutputStationary,
    /// Weight-stationary on columns in host memory.
    WeightStationary,
    /// Output-stationary on columns in HBM.
    Hbm,
}

/// Where the weight tile of a step comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fetch {
    /// Over the host link.
    Link,
    /// From HBM.
    Hbm,
    /// From the first block of the cluster.
    Peer,
    /// It is there already, from the step before.
    Kept,
}

/// Where a step's sums start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Start {
    /// At zero.
    Zero,
    /// In registers, where the step before left them.
    Registers,
    /// In the workspace, where an earlier K tile of the same panel left them.
    Workspace,
}

/// Where a step's sums go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finish {
    /// They stay in registers.
    Registers,
    /// To the workspace.
    Workspace,
    /// Through the epilogue to O.
    Output,
}

/// One product: a weight tile times a panel of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The block's role.
    pub role: Role,
    /// Column tile.
    pub column: usize,
    /// K tile.
    pub k_tile: usize,
    /// First token of the panel.
    pub first_token: usize,
    /// Tokens of the panel; 0 for a peer of a cluster past the last panel, which only receives.
    pub tokens: usize,
    /// Where the weight tile comes from.
    pub fetch: Fetch,
    /// Where the sums start.
    pub start: Start,
    /// Where the sums go.
    pub finish: Finish,
}

/// The scalars of a launch that every block needs: they lie in device memory, so that a captured graph follows a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileSchedule {
    /// Tokens M.
    pub tokens: usize,
    /// Tokens of a panel P: what a block's sums cover at once.
    pub panel: usize,
    /// K tiles of a column.
    pub k_tiles: usize,
    /// First column of the launch; later slabs of a staged product start past 0.
    pub first_column: usize,
    /// Host columns of the output-stationary role, from `first_column`.
    pub os_columns: usize,
    /// Host columns of the weight-stationary role, behind those.
    pub ws_columns: usize,
    /// Columns in HBM, behind those.
    pub hbm_columns: usize,
    /// Blocks of the output-stationary role: a multiple of `cluster`.
    pub os_blocks: usize,
    /// Blocks of the weight-stationary role.
    pub ws_blocks: usize,
    /// Blocks of the HBM role.
    pub hbm_blocks: usize,
    /// Blocks that share a fetch, 1 without clusters.
    pub cluster: usize,
    /// Which block (cluster, for the first) of each role gets the first item. The experts of a grouped product go on where the one
    /// before ended, so that small experts do not all meet on the first blocks.
    pub rotation: [usize; 3],
}

impl TileSchedule {
    /// Checks that every column has somebody to compute it.
    ///
    /// # Errors
    /// [`Error::Argument`] names the scalar that does not fit.
    pub fn check(&self) -> Result<(), Error> {
        for (argument, size) in [("panel", self.panel), ("k_tiles", self.k_tiles), ("cluster", self.cluster)]
        {
            if size == 0 {
                return Err(Error::argument(argument, "at least 1", 0));
            }
        }
        for (argument, columns, blocks) in [
            ("os_blocks", self.os_columns, self.os_blocks),
            ("ws_blocks", self.ws_columns, self.ws_blocks),
            ("hbm_blocks", self.hbm_columns, self.hbm_blocks),
        ] {
            if columns > 0 && blocks == 0 {
                return Err(Error::argument(argument, format!("at least 1 for {columns} columns"), 0));
            }
        }
        if !self.os_blocks.is_multiple_of(self.cluster) {
            return Err(Error::argument(
                "os_blocks",
                format!("a multiple of {}", self.cluster),
                self.os_blocks,
            ));
        }
        Ok(())
    }

    /// Blocks of the launch.
    pub const fn blocks(&self) -> usize {
        self.os_blocks + self.ws_blocks + self.hbm_blocks
    }

    /// Panels R = ceil(M / P).
    pub const fn panels(&self) -> usize {
        self.tokens.div_ceil(self.panel)
    }

    /// Panels that one fetch of the output-stationary role serves come `ceil(R / cluster)` times per column.
    pub const fn panel_groups(&self) -> usize {
        self.panels().div_ceil(self.cluster)
    }

    /// Whether the weight-stationary role keeps its sums in registers: with one panel it is the output-stationary one.
    pub const fn sums_in_registers(&self) -> bool {
        self.panels() <= 1
    }

    /// The role of a block.
    pub const fn role(&self, block: usize) -> Role {
        if block < self.os_blocks {
            Role::OutputStationary
        } else if block < self.os_blocks + self.ws_blocks {
            Role::WeightStationary
        } else {
            Role::Hbm
        }
    }

    /// Items of the three roles, which are dealt to their blocks (clusters, for the first).
    pub const fn items(&self) -> [usize; 3] {
        [self.os_columns * self.panel_groups(), self.ws_columns, self.hbm_columns * self.panels()]
    }

    /// The block's first item, and how many items on its next one is.
    const fn deal(&self, block: usize) -> (usize, usize) {
        let (rank, stride, rotation) = match self.role(block) {
            Role::OutputStationary => (block / self.cluster, self.os_blocks / self.cluster, self.rotation[0]),
            Role::WeightStationary => (block - self.os_blocks, self.ws_blocks, self.rotation[1]),
            Role::Hbm => (block - self.os_blocks - self.ws_blocks, self.hbm_blocks, self.rotation[2]),
        };
        ((rank + stride - rotation % stride) % stride, stride)
    }

    /// Steps of a block.
    pub const fn steps(&self, block: usize) -> usize {
        let [os, ws, hbm] = self.items();
        let (items, steps_per_item) = match self.role(block) {
            Role::OutputStationary => (os, self.k_tiles),
            Role::WeightStationary => (ws, self.k_tiles * self.panels()),
            Role::Hbm => (hbm, self.k_tiles),
        };
        let (rank, stride) = self.deal(block);
        if rank < items { (items - rank).div_ceil(stride) * steps_per_item } else { 0 }
    }

    /// Step `index` of a block, `index` below [`steps`](Self::steps).
    pub const fn step(&self, block: usize, index: usize) -> Step {
        let role = self.role(block);
        let (first, stride) = self.deal(block);
        match role {
            Role::OutputStationary => {
                let (groups, rank) = (self.panel_groups(), block % self.cluster);
                let item = first + index / self.k_tiles * stride;
                let panel = item % groups * self.cluster + rank;
                let fetch = if rank == 0 { Fetch::Link } else { Fetch::Peer };
                self.stationary(role, self.first_column + item / groups, panel, index % self.k_tiles, fetch)
            }
            Role::WeightStationary => {
                let panels = self.panels();
                let steps = self.k_tiles * panels;
                let item = first + index / steps * stride;
                let column = self.first_column + self.os_columns + item;
                let (k_tile, panel) = (index % steps / panels, index % panels);
                let fetch = if panel == 0 { Fetch::Link } else { Fetch::Kept };
                let mut step = self.stationary(role, column, panel, k_tile, fetch);
                if !self.sums_in_registers() {
                    if matches!(step.start, Start::Registers) {
                        step.start = Start::Workspace;
                    }
                    if matches!(step.finish, Finish::Registers) {
                        step.finish = Finish::Workspace;
                    }
                }
                step
            }
            Role::Hbm => {
                let panels = self.panels();
                let item = first + index / self.k_tiles * stride;
                let column = self.first_column + self.os_columns + self.ws_columns + item / panels;
                self.stationary(role, column, item % panels, index % self.k_tiles, Fetch::Hbm)
            }
        }
    }

    /// The steps of a block.
    pub fn walk(&self, block: usize) -> impl Iterator<Item = Step> + use<> {
        let schedule = *self;
        (0..schedule.steps(block)).map(move |index| schedule.step(block, index))
    }

    /// A step whose sums stay in registers between the first and the last K tile.
    const fn stationary(&self, role: Role, column: usize, panel: usize, k_tile: usize, fetch: Fetch) -> Step {
        let first_token = panel * self.panel;
        let left = self.tokens.saturating_sub(first_token);
        Step {
            role,
            column,
            k_tile,
            first_token,
            tokens: if left < self.panel { left } else { self.panel },
            fetch,
            start: if k_tile == 0 { Start::Zero } else { Start::Registers },
            finish: if k_tile + 1 == self.k_tiles { Finish::Output } else { Finish::Registers },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const NOTES: TileSchedule = TileSchedule {
        tokens: 512,
        panel: 256,
        k_tiles: 16,
        first_column: 0,
        os_columns: 64,
        ws_columns: 0,
        hbm_columns: 0,
        os_blocks: 132,
        ws_blocks: 0,
        hbm_blocks: 0,
        cluster: 1,
        rotation: [0; 3],
    };

    fn fetches(schedule: &TileSchedule, wanted: Fetch) -> usize {
        let steps = (0..schedule.blocks()).flat_map(|block| schedule.walk(block));
        steps.filter(|step| step.fetch == wanted).count()
    }

    /// M = 512, N = K = 4096, panels of 256 tokens, tiles of 64 × 256.
    #[test]
    fn fetches_of_a_known_product() {
        for (case, schedule, link, hbm) in [
            ("output-stationary", NOTES, 2048, 0),
            (
                "weight-stationary",
                TileSchedule { os_columns: 0, os_blocks: 0, ws_columns: 64, ws_blocks: 132, ..NOTES },
                1024,
                0,
            ),
            (
                "alpha 1/2",
                TileSchedule { os_columns: 32, os_blocks: 66, ws_columns: 32, ws_blocks: 66, ..NOTES },
                1536,
                0,
            ),
            ("clusters of 2", TileSchedule { cluster: 2, ..NOTES }, 1024, 0),
            (
                "three quarters in HBM, weight-stationary",
                TileSchedule {
                    os_columns: 0,
                    os_blocks: 0,
                    ws_columns: 16,
                    ws_blocks: 33,
                    hbm_columns: 48,
                    hbm_blocks: 99,
                    ..NOTES
                },
                256,
                1536,
            ),
        ] {
            schedule.check().unwrap();
            assert_eq!(
                (fetches(&schedule, Fetch::Link), fetches(&schedule, Fetch::Hbm)),
                (link, hbm),
                "{case}"
            );
        }
    }

    /// Every (column, K tile, token) is multiplied exactly once, sums start once, follow each other by rising K and end once.
    #[test]
    fn every_product_is_done_once_and_in_order() {
        let mut cases = 0;
        for tokens in [0, 1, 16, 17, 64, 100] {
            for (os_columns, ws_columns, hbm_columns) in
                [(5, 0, 0), (0, 5, 0), (0, 0, 5), (3, 4, 6), (1, 1, 1), (0, 7, 2)]
            {
                for (os_blocks, ws_blocks, hbm_blocks) in [(1, 1, 1), (2, 3, 5), (16, 1, 4), (4, 12, 16)] {
                    for cluster in [1, 2, 4] {
                        if os_blocks % cluster != 0 {
                            continue;
                        }
                        for k_tiles in [1, 2, 5] {
                            let schedule = TileSchedule {
                                tokens,
                                panel: 16,
                                k_tiles,
                                first_column: 3,
                                os_columns,
                                ws_columns,
                                hbm_columns,
                                os_blocks,
                                ws_blocks,
                                hbm_blocks,
                                cluster,
                                rotation: [cases % 7, cases % 5, cases % 3],
                            };
                            schedule.check().unwrap();
                            covers(&schedule);
                            cases += 1;
                        }
                    }
                }
            }
        }
        assert!(cases > 500, "{cases} cases");
    }

    fn covers(schedule: &TileSchedule) {
        // K tiles done of each (column, first token), and where its sums are.
        let mut done: HashMap<(usize, usize), (usize, Finish)> = HashMap::new();
        for block in 0..schedule.blocks() {
            let mut held = None;
            let mut registers = None;
            for (index, step) in schedule.walk(block).enumerate() {
                let at = || format!("{schedule:?}, block {block}, step {index}: {step:?}");
                let tile = (step.column, step.k_tile);
                match step.fetch {
                    Fetch::Kept => assert_eq!(held, Some(tile), "{}", at()),
                    _ => held = Some(tile),
                }
                assert_eq!(step.role == Role::Hbm, step.fetch == Fetch::Hbm, "{}", at());
                let place = (step.column, step.first_token);
                let (k_tile, sums) = done.get(&place).copied().unwrap_or((0, Finish::Registers));
                if step.tokens == 0 {
                    assert!(step.fetch == Fetch::Peer || schedule.tokens == 0, "{}", at());
                    continue;
                }
                assert_eq!(step.k_tile, k_tile, "{}", at());
                match step.start {
                    Start::Zero => assert_eq!(k_tile, 0, "{}", at()),
                    Start::Registers => assert_eq!(registers, Some(place), "{}", at()),
                    Start::Workspace => assert_eq!(sums, Finish::Workspace, "{}", at()),
                }
                assert_eq!(step.finish == Finish::Output, k_tile + 1 == schedule.k_tiles, "{}", at());
                registers = (step.finish == Finish::Registers).then_some(place);
                done.insert(place, (k_tile + 1, step.finish));
            }
        }
        let columns = schedule.os_columns + schedule.ws_columns + schedule.hbm_columns;
        for column in 3..3 + columns {
            for panel in 0..schedule.panels() {
                let found = done.remove(&(column, panel * schedule.panel));
                assert_eq!(
                    found,
                    Some((schedule.k_tiles, Finish::Output)),
                    "{schedule:?}: column {column}, panel {panel}"
                );
            }
        }
        assert!(done.is_empty(), "{schedule:?}: too much: {done:?}");
    }

    #[test]
    fn roles_are_balanced() {
        for (columns, blocks) in [(448, 132), (64, 33), (7, 16), (100, 1)] {
            let schedule = TileSchedule { os_columns: columns, os_blocks: blocks, ..NOTES };
            let steps: Vec<_> = (0..blocks).map(|block| schedule.steps(block)).collect();
            let (most, least) = (steps.iter().max().unwrap(), steps.iter().min().unwrap());
            assert!(
                most - least <= schedule.k_tiles,
                "{columns} columns on {blocks} blocks: {least} to {most} steps"
            );
        }
    }

    #[test]
    fn refusals_name_the_scalar() {
        for (named, schedule) in [
            ("panel", TileSchedule { panel: 0, ..NOTES }),
            ("k_tiles", TileSchedule { k_tiles: 0, ..NOTES }),
            ("cluster", TileSchedule { cluster: 0, ..NOTES }),
            ("os_blocks", TileSchedule { os_blocks: 0, ..NOTES }),
            ("ws_blocks", TileSchedule { ws_columns: 1, ..NOTES }),
            ("hbm_blocks", TileSchedule { hbm_columns: 1, ..NOTES }),
            ("os_blocks", TileSchedule { cluster: 5, ..NOTES }),
        ] {
            let error = schedule.check().expect_err(named).to_string();
            assert!(error.contains(named), "{named}: {error}");
        }
    }
}

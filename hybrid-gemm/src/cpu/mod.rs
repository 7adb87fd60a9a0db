//! The product on the CPU: the blocks of a plan's launches, walked as the kernel walks them.
//!
//! Both dataflows, the workspace of partial sums and the staging of slabs are as on the device, and traffic is counted where it
//! happens. Sums are f32.

mod product;

use rayon::prelude::*;

use crate::cost_model::Operands;
use crate::pack::TILE_ROWS;
use crate::path::Launch;
use crate::plan::GemmPlan;
use crate::schedule::{Fetch, Finish, Role, Start, Step};
use crate::weights::{ColumnBytes, Weights};
use crate::{Element, Error, MatrixView, MatrixViewMut, Receipt, Summation, Traffic};

/// Multiplications below which threads cost more than they bring.
const PARALLEL_FLOPS: u64 = 1 << 18;

/// A plan and its weights, which it keeps alive.
#[derive(Debug, Clone)]
pub struct Gemm {
    plan: GemmPlan,
    weights: Weights,
}

/// Operands of [`Gemm::run`].
#[derive(Debug)]
pub struct GemmArgs<'a, X, O> {
    /// X `[tokens, k]`.
    pub x: MatrixView<'a, X>,
    /// Bias `[n]`, where the plan has one.
    pub bias: Option<&'a [f32]>,
    /// Residual `[tokens, out_columns]`, where the plan has one.
    pub residual: Option<MatrixView<'a, O>>,
    /// O `[tokens, out_columns]`.
    pub out: MatrixViewMut<'a, O>,
}

impl Gemm {
    /// Puts a plan and weights together.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights of another shape, format or placement than the plan's.
    pub fn prepare(plan: &GemmPlan, weights: Weights) -> Result<Self, Error> {
        if weights.placement() != plan.placement() {
            let [expected, found] =
                [plan.placement(), weights.placement()].map(|placement| format!("{placement:?}"));
            return Err(Error::argument("weights", expected, found));
        }
        Ok(Gemm { plan: plan.clone(), weights })
    }

    /// The plan.
    pub fn plan(&self) -> &GemmPlan {
        &self.plan
    }

    /// The plan, whose alpha may change between calls.
    pub fn plan_mut(&mut self) -> &mut GemmPlan {
        &mut self.plan
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// O = epilogue(X·Wᵀ). `workspace` has [`GemmPlan::workspace_len`] elements or more; what they hold does not matter.
    ///
    /// # Errors
    /// [`Error::Argument`] names the operand that does not fit the plan.
    pub fn run<X: Element, O: Element>(
        &self,
        mut args: GemmArgs<'_, X, O>,
        workspace: &mut [f32],
    ) -> Result<Receipt, Error> {
        let tokens = args.x.shape()[0];
        self.check(&args, workspace.len())?;
        let (path, predicted) = self.plan.choose(tokens)?;
        let launches = self.plan.launches_of(path, tokens).map_err(Error::NoPath)?;
        let counted = self.run_launches(&launches, &mut args, workspace);
        Ok(Receipt { counted, predicted })
    }

    /// Runs launches whose operands are checked.
    pub(crate) fn run_launches<X: Element, O: Element>(
        &self,
        launches: &[Launch],
        args: &mut GemmArgs<'_, X, O>,
        workspace: &mut [f32],
    ) -> Traffic {
        let [tokens, k] = args.x.shape();
        let mut x = vec![0.0; tokens * k];
        for (token, x) in x.chunks_exact_mut(k).enumerate() {
            X::widen(args.x.row(token), x);
        }
        let mut ring = Vec::new();
        launches.iter().map(|launch| self.run_launch(launch, &x, args, workspace, &mut ring)).sum()
    }

    fn run_launch<X: Element, O: Element>(
        &self,
        launch: &Launch,
        x: &[f32],
        args: &mut GemmArgs<'_, X, O>,
        workspace: &mut [f32],
        ring: &mut Vec<u8>,
    ) -> Traffic {
        let (schedule, placement) = (launch.schedule, self.weights.placement());
        let mut traffic = Traffic::default();
        if !launch.staged.is_empty() {
            let slab = self.weights.columns(launch.staged.clone());
            ring.clear();
            ring.extend_from_slice(slab.bytes);
            traffic.link_tiles += (launch.staged.len() * schedule.k_tiles) as u64;
            traffic.link_bytes += slab.bytes.len() as u64;
            traffic.staged_bytes += ring.len() as u64;
        }
        let staged = ColumnBytes { first: launch.staged.start, bytes: ring };

        // The weight-stationary columns of each block, with their partial sums `[tokens, 64]`.
        let mut partials: Vec<Vec<&mut [f32]>> = (0..schedule.blocks()).map(|_| Vec::new()).collect();
        if !schedule.sums_in_registers() {
            let columns = workspace.chunks_exact_mut(schedule.tokens * TILE_ROWS).take(schedule.ws_columns);
            for (item, sums) in columns.enumerate() {
                let block = (item + schedule.rotation[1]) % schedule.ws_blocks;
                partials[schedule.os_blocks + block].push(sums);
            }
        }
        let flops =
            self.plan.operands().flops(placement, 0..placement.tiling().column_tiles(), schedule.tokens);
        let run = |(block, partials)| {
            let walk = schedule.walk(block);
            let state = Block {
                weights: &self.weights,
                staged: (!launch.staged.is_empty()).then_some(staged),
                operands: self.plan.operands(),
                summation: self.plan.config().summation,
                bias: args.bias,
                x,
                tile: Vec::new(),
                sums: Vec::new(),
                partials,
                column_of_partials: None,
                done: Vec::new(),
                traffic: Traffic::default(),
            };
            walk.fold(state, Block::step)
        };
        let blocks: Vec<_> =
            partials.into_iter().enumerate().filter(|(block, _)| schedule.steps(*block) > 0).collect();
        let blocks: Vec<Block<'_>> = match flops < PARALLEL_FLOPS {
            true => blocks.into_iter().map(run).collect(),
            false => blocks.into_par_iter().map(run).collect(),
        };
        for block in blocks {
            traffic += block.traffic;
            for done in &block.done {
                done.store(self.plan.operands(), args);
            }
        }
        traffic
    }

    pub(crate) fn check<X: Element, O: Element>(
        &self,
        args: &GemmArgs<'_, X, O>,
        workspace: usize,
    ) -> Result<(), Error> {
        let (config, tiling) = (self.plan.config(), self.weights.placement().tiling());
        let tokens = args.x.shape()[0];
        for (argument, expected, found) in [("x", config.x, X::DTYPE), ("out", config.epilogue.out, O::DTYPE)]
        {
            if expected != found {
                return Err(Error::argument(argument, format!("{expected}, as planned"), found));
            }
        }
        if tokens > config.max_tokens {
            return Err(Error::argument("x", format!("at most {} rows", config.max_tokens), tokens));
        }
        let columns = config.epilogue.out_columns(tiling.n());
        let residual = args.residual.map(|residual| residual.shape());
        for (argument, expected, found) in [
            ("x", [tokens, tiling.k()], args.x.shape()),
            ("out", [tokens, columns], args.out.shape()),
            ("residual", [tokens, columns], residual.unwrap_or([tokens, columns])),
        ] {
            if expected != found {
                return Err(Error::argument(argument, format!("{expected:?}"), format!("{found:?}")));
            }
        }
        for (argument, planned, given) in [
            ("bias", config.epilogue.bias, args.bias.is_some()),
            ("residual", config.epilogue.residual, residual.is_some()),
        ] {
            if planned != given {
                let [expected, found] = [planned, given].map(|is| if is { "given" } else { "none" });
                return Err(Error::argument(argument, format!("{expected}, as planned"), found));
            }
        }
        if let Some(bias) = args.bias
            && bias.len() != tiling.n()
        {
            return Err(Error::argument("bias", format!("{} values", tiling.n()), bias.len()));
        }
        let needed = self.plan.workspace_len(tokens);
        if workspace < needed {
            return Err(Error::argument("workspace", format!("at least {needed} values"), workspace));
        }
        Ok(())
    }
}

/// A block on its walk.
struct Block<'a> {
    weights: &'a Weights,
    /// The slab in the ring, where the launch has one.
    staged: Option<ColumnBytes<'a>>,
    operands: Operands,
    summation: Summation,
    bias: Option<&'a [f32]>,
    /// X `[tokens, k]`.
    x: &'a [f32],
    /// The weight tile that was fetched last, `[64, inputs]`.
    tile: Vec<f32>,
    /// The "registers" `[panel, 64]`.
    sums: Vec<f32>,
    /// Partial sums of the weight-stationary columns, in the order of the walk.
    partials: Vec<&'a mut [f32]>,
    /// The column of the walk, and which of `partials` is its own.
    column_of_partials: Option<(usize, usize)>,
    done: Vec<Done>,
    traffic: Traffic,
}

/// Outputs of a column tile for a panel of tokens, without residual and rounding.
struct Done {
    first_token: usize,
    first_column: usize,
    columns: usize,
    /// `[tokens, columns]`
    values: Vec<f32>,
}

impl<'a> Block<'a> {
    fn step(mut self, step: Step) -> Self {
        let placement = self.weights.placement();
        let tiling = placement.tiling();
        let (k, inputs, rows) = (tiling.k(), tiling.inputs(step.k_tile), tiling.rows(step.column));
        self.fetch(&step);
        if step.tokens == 0 {
            return self;
        }
        let len = step.tokens * TILE_ROWS;
        match step.start {
            Start::Zero => {
                self.sums.clear();
                self.sums.resize(len, 0.0);
            }
            Start::Registers => {}
            Start::Workspace => {
                let at = self.partial(&step);
                self.sums.clear();
                self.sums.extend_from_slice(&self.partials[at][step.first_token * TILE_ROWS..][..len]);
                self.traffic.partial_bytes += size_of_val(self.sums.as_slice()) as u64;
            }
        }
        let x = &self.x[step.first_token * k + step.k_tile * tiling.tile_k()..];
        product::accumulate(self.summation, x, k, &self.tile, inputs, &mut self.sums);
        self.traffic.activation_bytes += (step.tokens * inputs * self.operands.x.size()) as u64;
        self.traffic.flops += 2 * (step.tokens * inputs * rows) as u64;
        match step.finish {
            Finish::Registers => {}
            Finish::Workspace => {
                let at = self.partial(&step);
                self.partials[at][step.first_token * TILE_ROWS..][..len].copy_from_slice(&self.sums);
                self.traffic.partial_bytes += size_of_val(self.sums.as_slice()) as u64;
            }
            Finish::Output => self.finish(&step, rows),
        }
        self
    }

    fn fetch(&mut self, step: &Step) {
        let placement = self.weights.placement();
        let bytes = placement.tile_bytes(step.column, step.k_tile);
        let scale_bytes = placement.block_scale_bytes(step.k_tile);
        match step.fetch {
            Fetch::Kept => return,
            // The first block of the cluster has fetched it for all.
            Fetch::Peer => {}
            Fetch::Link => {
                self.traffic.link_tiles += 1;
                self.traffic.link_bytes += bytes;
                self.traffic.hbm_weight_bytes += scale_bytes;
            }
            Fetch::Hbm => {
                self.traffic.hbm_tiles += 1;
                self.traffic.hbm_weight_bytes += bytes + scale_bytes;
            }
        }
        self.tile.resize(TILE_ROWS * placement.tiling().inputs(step.k_tile), 0.0);
        match &self.staged {
            Some(slab) => slab.decode_tile(placement, step.column, step.k_tile, &mut self.tile),
            None => self.weights.decode_tile(step.column, step.k_tile, &mut self.tile),
        }
        self.weights.scale_blocks(step.column, step.k_tile, &mut self.tile);
    }

    /// Which of the block's partial sums belong to the step's column.
    fn partial(&mut self, step: &Step) -> usize {
        debug_assert_eq!(step.role, Role::WeightStationary);
        let at = match self.column_of_partials {
            Some((column, at)) if column == step.column => at,
            Some((_, at)) => at + 1,
            None => 0,
        };
        self.column_of_partials = Some((step.column, at));
        at
    }

    fn finish(&mut self, step: &Step, rows: usize) {
        let (epilogue, first) = (self.operands.epilogue, step.column * TILE_ROWS);
        let columns = epilogue.out_columns(rows);
        let mut values = Vec::with_capacity(step.tokens * columns);
        for sums in self.sums.chunks_exact_mut(TILE_ROWS) {
            let sums = &mut sums[..rows];
            let len = epilogue.apply(sums, first, self.weights.channel_scales(), self.bias);
            values.extend_from_slice(&sums[..len]);
        }
        self.traffic.output_bytes += step.tokens as u64 * self.operands.output_bytes(rows);
        let first_column = epilogue.out_columns(first);
        self.done.push(Done { first_token: step.first_token, first_column, columns, values });
    }
}

impl Done {
    fn store<X: Element, O: Element>(&self, operands: Operands, args: &mut GemmArgs<'_, X, O>) {
        for (token, values) in self.values.chunks_exact(self.columns.max(1)).enumerate() {
            let token = self.first_token + token;
            let out = &mut args.out.row_mut(token)[self.first_column..][..self.columns];
            match args.residual.filter(|_| operands.epilogue.residual) {
                None => out.iter_mut().zip(values).for_each(|(out, value)| *out = O::from_f32(*value)),
                Some(residual) => {
                    let residual = &residual.row(token)[self.first_column..];
                    for ((out, value), residual) in out.iter_mut().zip(values).zip(residual) {
                        *out = O::from_f32(value + residual.to_f32());
                    }
                }
            }
        }
    }
}

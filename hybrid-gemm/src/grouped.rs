//! Products of experts (MoE): rows of X sorted by expert, one matrix per expert, only the active ones fetched.
//!
//! Experts are one list of items per role: a block that has finished with one expert's columns goes on with the next expert's where the
//! deal of items ended ([`TileSchedule::rotation`](crate::schedule::TileSchedule)). Counts per expert are device-side data, so a
//! captured graph follows them.

use crate::cpu::{Gemm, GemmArgs};
use crate::path::Launch;
use crate::plan::GemmPlan;
use crate::traffic::Receipt;
use crate::{Element, Error, MatrixView, MatrixViewMut, Prediction, Traffic, Weights};

/// Experts of one shape, whose weights may lie in different places.
#[derive(Debug, Clone)]
pub struct GroupedGemm {
    experts: Vec<Gemm>,
}

/// Operands of [`GroupedGemm::run`].
#[derive(Debug)]
pub struct GroupedArgs<'a, X, O> {
    /// X `[rows, k]`, the rows of an expert together.
    pub x: MatrixView<'a, X>,
    /// First row of each expert, and the end: `[experts + 1]`, rising from 0. Rows behind the end are padding and stay untouched.
    pub offsets: &'a [u32],
    /// O `[rows, out_columns]`.
    pub out: MatrixViewMut<'a, O>,
}

impl GroupedGemm {
    /// Puts experts together, each with a plan of the same configuration, without bias or residual.
    ///
    /// # Errors
    /// [`Error::Argument`] for no experts, plans of different shapes or configurations, or an epilogue with operands.
    pub fn prepare(experts: Vec<(GemmPlan, Weights)>) -> Result<Self, Error> {
        let Some((first, _)) = experts.first() else {
            return Err(Error::argument("experts", "at least 1", 0));
        };
        let (config, tiling) = (first.config().clone(), *first.placement().tiling());
        if config.epilogue.bias || config.epilogue.residual {
            return Err(Error::argument("epilogue", "no bias and no residual", "one of them"));
        }
        let prepare = |(index, (plan, weights)): (usize, (GemmPlan, Weights))| {
            if *plan.config() != config || *plan.placement().tiling() != tiling {
                let found = format!("expert {index} with another");
                return Err(Error::argument("experts", "one shape and configuration", found));
            }
            Gemm::prepare(&plan, weights)
        };
        Ok(GroupedGemm { experts: experts.into_iter().enumerate().map(prepare).collect::<Result<_, _>>()? })
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts.len()
    }

    /// Workspace of a call, in f32: experts use it one after another.
    pub fn workspace_len(&self, most_rows_of_an_expert: usize) -> usize {
        self.experts
            .iter()
            .map(|expert| expert.plan().workspace_len(most_rows_of_an_expert))
            .max()
            .unwrap_or(0)
    }

    /// The launches of each expert for its number of rows, in order; none for an expert without rows.
    ///
    /// # Errors
    /// [`Error::NoPath`] when an expert has more rows than its plan's budget of SMs can serve.
    pub fn launches(&self, rows: &[usize]) -> Result<Vec<Vec<Launch>>, Error> {
        let mut dealt = [0; 3];
        let mut all = Vec::with_capacity(rows.len());
        for (expert, &rows) in self.experts.iter().zip(rows) {
            let mut launches = match rows {
                0 => Vec::new(),
                rows => expert.plan().launches(rows)?,
            };
            for Launch { schedule, .. } in &mut launches {
                schedule.rotation = dealt;
                for (dealt, items) in dealt.iter_mut().zip(schedule.items()) {
                    *dealt += items;
                }
            }
            all.push(launches);
        }
        Ok(all)
    }

    /// What a call is expected to move and take: experts share link, HBM and SMs, and one launch serves them all.
    ///
    /// # Errors
    /// As [`launches`](Self::launches).
    pub fn predict(&self, rows: &[usize]) -> Result<Prediction, Error> {
        let launches = self.launches(rows)?;
        let device = &self.experts[0].plan().config().device;
        let mut sum = self.experts[0].plan().model().predict(&[]);
        for (expert, launches) in self.experts.iter().zip(&launches) {
            let own = expert.plan().model().predict(launches);
            sum.traffic += own.traffic;
            sum.hbm_bytes += own.hbm_bytes;
            sum.link_s += own.link_s;
            sum.hbm_s += own.hbm_s;
            sum.math_s += own.math_s;
        }
        let (slowest, bound) = crate::cost_model::slowest(sum.link_s, sum.hbm_s, sum.math_s);
        Ok(Prediction { time_s: slowest + device.launch_s, bound, ..sum })
    }

    /// O = epilogue(X·Wᵀ) with each row's expert.
    ///
    /// # Errors
    /// [`Error::Argument`] for offsets that do not rise from 0 to at most the rows of X, and whatever a single product refuses.
    pub fn run<X: Element, O: Element>(
        &self,
        mut args: GroupedArgs<'_, X, O>,
        workspace: &mut [f32],
    ) -> Result<Receipt, Error> {
        let rows = self.rows(args.offsets, args.x.shape()[0])?;
        if args.out.shape()[0] != args.x.shape()[0] {
            return Err(Error::argument("out", format!("{} rows", args.x.shape()[0]), args.out.shape()[0]));
        }
        let predicted = self.predict(&rows)?;
        let launches = self.launches(&rows)?;
        let mut parts = Vec::new();
        // Everything is checked before anything is written.
        for (index, expert) in self.experts.iter().enumerate() {
            let range = args.offsets[index] as usize..args.offsets[index + 1] as usize;
            let own = GemmArgs {
                x: args.x.slice(range.clone()),
                bias: None,
                residual: None,
                out: args.out.slice_mut(range.clone()),
            };
            expert.check(&own, workspace.len())?;
            parts.push(range);
        }
        let mut counted = Traffic::default();
        for ((expert, range), launches) in self.experts.iter().zip(parts).zip(&launches) {
            let mut own = GemmArgs {
                x: args.x.slice(range.clone()),
                bias: None,
                residual: None,
                out: args.out.slice_mut(range),
            };
            counted += expert.run_launches(launches, &mut own, workspace);
        }
        Ok(Receipt { counted, predicted })
    }

    /// Rows of each expert.
    fn rows(&self, offsets: &[u32], rows: usize) -> Result<Vec<usize>, Error> {
        if offsets.len() != self.experts.len() + 1 {
            return Err(Error::argument(
                "offsets",
                format!("{} values", self.experts.len() + 1),
                offsets.len(),
            ));
        }
        if offsets[0] != 0 {
            return Err(Error::argument("offsets", "0 first", offsets[0]));
        }
        if let Some(pair) = offsets.windows(2).find(|pair| pair[0] > pair[1]) {
            return Err(Error::argument(
                "offsets",
                "rising values",
                format!("{} before {}", pair[0], pair[1]),
            ));
        }
        let end = offsets[self.experts.len()] as usize;
        if end > rows {
            return Err(Error::argument("offsets", format!("an end of at most {rows}, the rows of X"), end));
        }
        Ok(offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect())
    }
}

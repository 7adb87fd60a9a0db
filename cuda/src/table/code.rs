//! Instructions that a kernel's machine code must have: without them it would run, by a slow path that nobody asked for.

use super::Instance;

/// What the kernels of this name must have, those with this constant where one is named.
struct Demand {
    kernel: &'static str,
    constant: Option<(&'static str, i64)>,
    instructions: &'static [&'static str],
}

const fn of(kernel: &'static str, instructions: &'static [&'static str]) -> Demand {
    Demand { kernel, constant: None, instructions }
}

const fn with(
    kernel: &'static str,
    constant: (&'static str, i64),
    instructions: &'static [&'static str],
) -> Demand {
    Demand { kernel, constant: Some(constant), instructions }
}

/// `HGMMA`: warpgroup products. `HMMA`: those of a warp. `LDSM`: ldmatrix. `LDGSTS`: cp.async. `UTMALDG`: boxes of tensor maps.
const DEMANDS: &[Demand] = &[
    of("prefill_sm90a", &["HGMMA"]),
    with("prefill_sm90a", ("TMA", 0), &["LDGSTS"]),
    with("prefill_sm90a", ("TMA", 1), &["UTMALDG"]),
    of("prefill", &["HMMA", "LDSM", "LDGSTS"]),
    of("decode", &["HMMA", "LDSM", "LDGSTS"]),
];

/// Instructions of local memory, which no such kernel has: an array that is indexed at run time goes there without a spill.
pub const LOCAL_MEMORY: &[&str] = &["LDL", "STL"];

impl Instance {
    /// Instructions that this kernel's machine code must have, on every architecture that it is compiled for.
    pub fn demanded_instructions(&self) -> Vec<&'static str> {
        let applies = |demand: &&Demand| {
            demand.kernel == self.kernel.name
                && demand.constant.is_none_or(|wanted| self.constants().any(|constant| constant == wanted))
        };
        DEMANDS.iter().filter(applies).flat_map(|demand| demand.instructions).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{kernel, shipped};

    #[test]
    fn demands_are_of_kernels_that_there_are() {
        for Demand { kernel: name, constant, .. } in DEMANDS {
            let kernel = kernel(name).unwrap_or_else(|| panic!("{name} is no kernel"));
            let Some((constant, value)) = constant else { continue };
            let found = kernel.constants.iter().find(|found| found.name == *constant);
            assert!(found.is_some_and(|found| found.allowed.contains(value)), "{name}: {constant}={value}");
        }
    }

    #[test]
    fn demands_follow_constants() {
        for (tma, expected) in [(0, ["HGMMA", "LDGSTS"]), (1, ["HGMMA", "UTMALDG"])] {
            let values = [("QK_DIM", 128), ("V_DIM", 128), ("KV_DTYPE", 2), ("PAGED", 0), ("SOFT_CAP", 0)];
            let constants: Vec<_> = values.into_iter().chain([("CARRY", 0), ("TMA", tma)]).collect();
            let instance = Instance::new("prefill_sm90a", &constants).expect("allowed constants");
            assert_eq!(instance.demanded_instructions(), expected);
        }
        let (plan, _) =
            shipped().find(|(instance, _)| instance.kernel.name == "prefill_plan").expect("a row");
        assert!(plan.demanded_instructions().is_empty());
    }
}

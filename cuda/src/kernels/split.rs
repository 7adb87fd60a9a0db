//! What every launch that splits its work over blocks is held to: a soft cap, and the partial states that blocks leave for the last one.

use crate::Error;
use crate::memory::ViewMut;

use super::attention::cache::elements;

/// Checks the soft cap of a kernel that is compiled with one.
pub(super) fn check_soft_cap(kernel: &str, capped: bool, soft_cap: f32) -> Result<(), Error> {
    if !capped || soft_cap > 0.0 {
        return Ok(());
    }
    Err(Error::argument(kernel, "soft_cap", "a positive number", soft_cap))
}

/// Checks the number of blocks.
pub(super) fn check_blocks(kernel: &str, blocks: u32) -> Result<(), Error> {
    if blocks > 0 { Ok(()) } else { Err(Error::argument(kernel, "blocks", "at least 1", blocks)) }
}

/// Where blocks leave their states.
pub(super) struct Partials<'a, 'b> {
    /// Σ exp(x − m)·v `[slots, columns, dim]`.
    pub(super) acc: &'a ViewMut<'b, f32>,
    /// m and l `[slots, columns, 2]`.
    pub(super) ml: &'a ViewMut<'b, f32>,
    /// Counters `[items]`.
    pub(super) arrivals: &'a ViewMut<'b, u32>,
}

impl Partials<'_, '_> {
    /// Checks that there is room for the states of so many slots, and a counter for each item.
    pub(super) fn check(
        &self,
        kernel: &str,
        [slots, columns, dim]: [usize; 3],
        items: usize,
    ) -> Result<(), Error> {
        self.acc.check(kernel, "part_acc", elements(&[slots, columns, dim]), 16)?;
        self.ml.check(kernel, "part_ml", elements(&[slots, columns, 2]), 4)?;
        self.arrivals.check(kernel, "arrivals", items, 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_split_can_do_is_named() {
        let argument = |result: Result<(), Error>| match result {
            Ok(()) => "",
            Err(Error::Argument { argument, .. }) => argument,
            Err(other) => panic!("{other}"),
        };
        assert_eq!(argument(check_blocks("kernel", 1)), "");
        assert_eq!(argument(check_blocks("kernel", 0)), "blocks");
        for (soft_cap, expected) in
            [(50.0, ""), (0.0, "soft_cap"), (-1.0, "soft_cap"), (f32::NAN, "soft_cap")]
        {
            assert_eq!(argument(check_soft_cap("kernel", true, soft_cap)), expected, "{soft_cap}");
            assert_eq!(argument(check_soft_cap("kernel", false, soft_cap)), "", "{soft_cap}");
        }
        // Two slots of eight columns and 64 channels, three items; each buffer one element short in turn.
        let mut memory = (vec![0u128; 256], vec![0f32; 32], vec![0u32; 3]);
        for short in 0..4 {
            let acc: &mut [f32] = bytemuck::cast_slice_mut(&mut memory.0);
            let len = |full: usize, which: usize| full - usize::from(short == which);
            let partials = Partials {
                acc: &ViewMut::host(&mut acc[..len(1024, 1)]),
                ml: &ViewMut::host(&mut memory.1[..len(32, 2)]),
                arrivals: &ViewMut::host(&mut memory.2[..len(3, 3)]),
            };
            let expected = ["", "part_acc", "part_ml", "arrivals"][short];
            assert_eq!(argument(partials.check("kernel", [2, 8, 64], 3)), expected);
        }
        let empty = Partials {
            acc: &ViewMut::host(&mut []),
            ml: &ViewMut::host(&mut []),
            arrivals: &ViewMut::host(&mut []),
        };
        assert_eq!(argument(empty.check("kernel", [usize::MAX, 8, 64], 0)), "part_acc", "nothing wraps");
    }
}

//! Weights that a stage of Ulysses gathers from its region, where they are split over it (PecSched §5.3, steps 1 and 4).

use ndarray::{ArcArray2, s};
use seq_parallel::transport::Transport;

use crate::Error;
use crate::linear::{Dense, Linear, Weight};

/// The matrices of a stage, whole.
pub(super) struct Gathered<const N: usize> {
    matrices: [Dense; N],
}

impl<const N: usize> Gathered<N> {
    /// Gathers matrices of which every rank of `region` hands out its part of the rows, in f32: the r-th of as many as there are ranks.
    ///
    /// # Errors
    /// [`Error::SeqParallel`] when a rank has failed.
    pub(super) fn new<X: Transport + ?Sized>(
        matrices: &[&dyn Linear; N],
        region: &mut X,
    ) -> Result<Self, Error> {
        let gathered: Vec<Dense> =
            matrices.iter().map(|matrix| gather(*matrix, region)).collect::<Result<_, _>>()?;
        let Ok(matrices) = gathered.try_into() else { unreachable!("one of each") };
        Ok(Gathered { matrices })
    }

    /// The matrices.
    pub(super) fn matrices(&self) -> [&dyn Linear; N] {
        self.matrices.each_ref().map(|matrix| matrix as &dyn Linear)
    }
}

fn gather<X: Transport + ?Sized>(linear: &dyn Linear, region: &mut X) -> Result<Dense, Error> {
    let matrix = linear.matrix();
    let (rows, columns) = matrix.dim();
    let border = |rank: usize| rank * rows / region.ranks();
    let own = matrix.slice(s![border(region.rank())..border(region.rank() + 1), ..]);
    let own: Vec<f32> = own.iter().copied().collect();
    let lens: Vec<usize> =
        (0..region.ranks()).map(|rank| 4 * columns * (border(rank + 1) - border(rank))).collect();
    let all: Vec<f32> =
        bytemuck::pod_collect_to_vec(&region.all_gather_v(bytemuck::cast_slice(&own), &lens)?);
    let matrix = ArcArray2::from_shape_vec((rows, columns), all).expect("every rank's rows");
    let bias = linear.bias().map(<[f32]>::to_vec);
    Ok(Dense::new(Weight { matrix, bias, stored: attention::DType::F32 }))
}

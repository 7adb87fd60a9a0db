//! Row-major matrices with a distance between rows.

use crate::{Element, Error};

/// A matrix `[rows, columns]` that is read.
#[derive(Debug, Clone, Copy)]
pub struct MatrixView<'a, E> {
    values: &'a [E],
    rows: usize,
    columns: usize,
    stride: usize,
}

/// A matrix `[rows, columns]` that is written.
#[derive(Debug)]
pub struct MatrixViewMut<'a, E> {
    values: &'a mut [E],
    rows: usize,
    columns: usize,
    stride: usize,
}

/// Checks that `len` elements hold the matrix.
fn check(len: usize, rows: usize, columns: usize, stride: usize) -> Result<(), Error> {
    if stride < columns {
        return Err(Error::argument("stride", format!("at least {columns}, the columns"), stride));
    }
    // The last row needs no gap behind it.
    let needed = match rows {
        0 => Some(0),
        _ => (rows - 1).checked_mul(stride).and_then(|first| first.checked_add(columns)),
    };
    match needed {
        Some(needed) if needed <= len => Ok(()),
        _ => Err(Error::argument(
            "matrix",
            format!("{rows} rows of {columns} values, {stride} apart"),
            format!("{len} values"),
        )),
    }
}

impl<'a, E: Element> MatrixView<'a, E> {
    /// Rows without gaps.
    ///
    /// # Errors
    /// [`Error::Argument`] when the values are too few.
    pub fn new(values: &'a [E], rows: usize, columns: usize) -> Result<Self, Error> {
        MatrixView::strided(values, rows, columns, columns)
    }

    /// Rows `stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Argument`] when the values are too few, or rows overlap.
    pub fn strided(values: &'a [E], rows: usize, columns: usize, stride: usize) -> Result<Self, Error> {
        check(values.len(), rows, columns, stride)?;
        Ok(MatrixView { values, rows, columns, stride })
    }

    /// `[rows, columns]`
    pub const fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// A row.
    pub fn row(&self, row: usize) -> &'a [E] {
        &self.values[row * self.stride..][..self.columns]
    }

    /// Some of the rows.
    pub(crate) fn slice(&self, rows: std::ops::Range<usize>) -> Self {
        let values = if rows.is_empty() { &[] } else { &self.values[rows.start * self.stride..] };
        MatrixView { values, rows: rows.len(), ..*self }
    }
}

impl<'a, E: Element> MatrixViewMut<'a, E> {
    /// Rows without gaps.
    ///
    /// # Errors
    /// [`Error::Argument`] when the values are too few.
    pub fn new(values: &'a mut [E], rows: usize, columns: usize) -> Result<Self, Error> {
        MatrixViewMut::strided(values, rows, columns, columns)
    }

    /// Rows `stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Argument`] when the values are too few, or rows overlap.
    pub fn strided(values: &'a mut [E], rows: usize, columns: usize, stride: usize) -> Result<Self, Error> {
        check(values.len(), rows, columns, stride)?;
        Ok(MatrixViewMut { values, rows, columns, stride })
    }

    /// `[rows, columns]`
    pub const fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// A row.
    pub fn row_mut(&mut self, row: usize) -> &mut [E] {
        &mut self.values[row * self.stride..][..self.columns]
    }

    /// Some of the rows.
    pub(crate) fn slice_mut(&mut self, rows: std::ops::Range<usize>) -> MatrixViewMut<'_, E> {
        let values = if rows.is_empty() { &mut [] } else { &mut self.values[rows.start * self.stride..] };
        MatrixViewMut { values, rows: rows.len(), columns: self.columns, stride: self.stride }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_do_not_fit() {
        let values = [0.0f32; 10];
        for (case, rows, columns, stride, fits) in [
            ("no rows", 0, 100, 100, true),
            ("exactly", 2, 5, 5, true),
            ("the last row without its gap", 2, 3, 7, true),
            ("too many", 3, 5, 5, false),
            ("one short", 2, 4, 7, false),
            ("overlapping", 2, 5, 4, false),
            ("overflow", usize::MAX, 2, 2, false),
        ] {
            assert_eq!(MatrixView::strided(&values, rows, columns, stride).is_ok(), fits, "{case}");
        }
    }
}

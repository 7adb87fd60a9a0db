//! Tensor maps of a cache, by which `prefill_sm90a` loads K and V.

use crate::Error;
use crate::params::{PrefillMapHeads, PrefillParams};
use crate::tensor_map::{Planes, TensorShape};

use super::prefill::{PrefillKernel, PrefillVariant};

/// What errors call the kernel.
const KERNEL: &str = "prefill_sm90a by tensor maps";
/// Bytes of an element of K or V.
const ELEMENT: u64 = 2;

/// How K and V `[tokens, kv_heads, dim]` lie as tensors of two dimensions, so that a tile of a head's vectors is a box of each; or, in
/// pages, as tensors of three, so that a head's vectors in a page are one.
#[derive(Debug, Clone, Copy)]
pub struct PrefillMaps {
    pub(super) k: TensorShape,
    pub(super) v: TensorShape,
    pub(super) heads: PrefillMapHeads,
}

impl PrefillMaps {
    /// See [`PrefillVariant::tensor_maps`].
    pub(super) fn new(variant: &PrefillVariant, params: &PrefillParams) -> Result<Self, Error> {
        if !matches!(variant.kernel, PrefillKernel::Auto | PrefillKernel::Wgmma) {
            let found = format!("{:?}", variant.kernel);
            return Err(Error::argument(KERNEL, "kernel", "Auto or Wgmma", found));
        }
        for (argument, dim) in [("qk_dim", variant.qk_dim), ("v_dim", variant.v_dim)] {
            if !matches!(dim, 64 | 128) {
                return Err(Error::argument(KERNEL, argument, "64 or 128 channels", dim));
            }
        }
        if variant.kernel == PrefillKernel::Auto && !variant.ships_maps() {
            let found = format!("{} and {} channels, carry {}", variant.qk_dim, variant.v_dim, variant.carry);
            return Err(Error::argument(KERNEL, "kernel", "Wgmma, or sizes of a shipped kernel", found));
        }
        // 0 is what launches refuse.
        let page_tokens = 1u32.checked_shl(params.page_shift).unwrap_or(0);
        let map = |argument, dim, page_stride, token_stride, head_stride| {
            let pages = variant.paged.then_some((params.num_pages, page_stride));
            let tokens = if variant.paged { page_tokens } else { params.num_tokens };
            map_of(argument, dim, (token_stride, head_stride), (tokens, params.kv_heads), pages)
        };
        let PrefillParams { k_page_stride, k_token_stride, k_head_stride, .. } = *params;
        let PrefillParams { v_page_stride, v_token_stride, v_head_stride, .. } = *params;
        let (k, k_step) = map("k", variant.qk_dim, k_page_stride, k_token_stride, k_head_stride)?;
        let (v, v_step) = map("v", variant.v_dim, v_page_stride, v_token_stride, v_head_stride)?;
        let heads =
            PrefillMapHeads { k_columns: k_step.0, k_rows: k_step.1, v_columns: v_step.0, v_rows: v_step.1 };
        Ok(PrefillMaps { k, v, heads })
    }
}

/// The map of K or V at strides in elements, and the columns and rows from one head to the next. A row is a token with its heads
/// side by side, or one vector where the tokens of a head follow another head's. `pages` are how many there are and their stride;
/// tokens are then those of a page.
fn map_of(
    argument: &'static str,
    dim: usize,
    (token_stride, head_stride): (i64, i64),
    (tokens, heads): (u32, u32),
    pages: Option<(u32, i64)>,
) -> Result<(TensorShape, (u32, u32)), Error> {
    let apart = || {
        Error::argument(
            KERNEL,
            argument,
            "heads side by side within a token, or whole tokens apart",
            format_args!("token and head strides of {token_stride} and {head_stride}"),
        )
    };
    let (Ok(token), Ok(head)) = (u64::try_from(token_stride), u64::try_from(head_stride)) else {
        return Err(apart());
    };
    let (vector, tokens, others) = (dim as u64, u64::from(tokens), u64::from(heads.saturating_sub(1)));
    let width = others.saturating_mul(head).saturating_add(vector);
    let (columns, rows, step) = if width <= token {
        (width, tokens, (head, 0))
    } else if vector <= token && head.is_multiple_of(token) {
        (vector, others.saturating_mul(head / token).saturating_add(tokens), (0, head / token))
    } else {
        return Err(apart());
    };
    let planes = match pages {
        Some((count, stride)) => {
            let Ok(stride) = u64::try_from(stride) else {
                return Err(Error::argument(KERNEL, argument, "pages that lie upwards", stride));
            };
            Some(Planes { count: count.into(), bytes: stride.saturating_mul(ELEMENT) })
        }
        None => None,
    };
    let shape = TensorShape {
        columns,
        rows: if tokens == 0 { 0 } else { rows },
        row_bytes: token.saturating_mul(ELEMENT),
        box_columns: 64,
        // Of pages a box has the tokens of one, so that the next one's follow it.
        box_rows: if planes.is_some() { (tokens as u32).min(128) } else { 128 },
        swizzle_128: true,
        planes,
    };
    shape.check(KERNEL, argument, ELEMENT)?;
    // One head alone may be any way from no other.
    let step = if others == 0 { (0, 0) } else { step };
    Ok((shape, (step.0 as u32, step.1 as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every vector's first element is where the strides say, in a row that lies within the map.
    #[test]
    fn maps_are_where_strides_say() {
        // (token stride, head stride), (tokens, heads), columns and rows of the map.
        let cases = [
            ("heads side by side", (8 * 128, 128), (100, 8), (1024, 100)),
            ("padded heads", (8 * 136 + 64, 136), (100, 8), (7 * 136 + 128, 100)),
            ("K beside V", (2 * 512, 128), (70, 4), (512, 70)),
            ("head after head", (128, 300 * 128), (300, 4), (128, 1200)),
            ("a longer cache", (128, 4096 * 128), (300, 4), (128, 3 * 4096 + 300)),
            ("padded tokens", (160, 50 * 160), (50, 3), (128, 150)),
            ("one head", (128, 0), (9, 1), (128, 9)),
            ("one head of many", (1024, 77), (9, 1), (128, 9)),
            ("heads that share their vectors", (128, 0), (9, 4), (128, 9)),
            ("no tokens", (1024, 128), (0, 8), (1024, 0)),
        ];
        for (name, strides, (tokens, heads), extent) in cases {
            let (shape, step) = map_of("k", 128, strides, (tokens, heads), None).expect(name);
            assert_eq!((shape.columns, shape.rows), extent, "{name}");
            for (token, head) in
                (0..u64::from(tokens)).flat_map(|t| (0..u64::from(heads)).map(move |h| (t, h)))
            {
                let (column, row) = (head * u64::from(step.0), head * u64::from(step.1) + token);
                assert!(column + 128 <= shape.columns && row < shape.rows, "{name}: {token}, {head}");
                let element = row * shape.row_bytes / ELEMENT + column;
                assert_eq!(element, token * strides.0 as u64 + head * strides.1 as u64, "{name}");
            }
        }
    }

    /// In pages too, whose boxes are 8 to 128 rows.
    #[test]
    fn maps_of_pages_are_where_strides_say() {
        // (page, token and head stride), (tokens of a page, heads), rows of a box.
        let cases = [
            ("tokens before heads", (16 * 4 * 128, 4 * 128, 128), (16, 4), 16),
            ("heads before tokens", (4 * 64 * 128, 128, 64 * 128), (64, 4), 64),
            ("K beside V", (2 * 8 * 512, 512, 128), (8, 4), 8),
            ("a page for each head", (8 * 128, 128, 0), (8, 3), 8),
            ("padded pages", (16 * 512 + 64, 512, 128), (16, 4), 16),
            ("pages within heads", (32 * 128, 128, 5 * 32 * 128), (32, 2), 32),
            ("pages of several boxes", (256 * 128, 128, 0), (256, 1), 128),
        ];
        for (name, (page_stride, token, head), (tokens, heads), box_rows) in cases {
            let (shape, step) =
                map_of("k", 128, (token, head), (tokens, heads), Some((5, page_stride))).expect(name);
            let planes = shape.planes.expect("pages");
            assert_eq!((shape.box_rows, planes.count), (box_rows, 5), "{name}");
            for (page, row, of_head) in (0..5u64).flat_map(|page| {
                (0..u64::from(tokens)).flat_map(move |t| (0..u64::from(heads)).map(move |h| (page, t, h)))
            }) {
                let (column, at) = (of_head * u64::from(step.0), of_head * u64::from(step.1) + row);
                assert!(column + 128 <= shape.columns && at < shape.rows, "{name}: {row}, {of_head}");
                let element = (page * planes.bytes + at * shape.row_bytes) / ELEMENT + column;
                let strides = [(page, page_stride), (row, token), (of_head, head)];
                let place: u64 = strides.iter().map(|(index, stride)| index * *stride as u64).sum();
                assert_eq!(element, place, "{name}");
            }
        }
        for (name, stride, expected) in [
            ("backwards", -1, "upwards"),
            ("in one place", 0, "above 0"),
            ("unaligned", 8 * 128 + 4, "multiple of 16"),
            ("out of reach", 1 << 40, "below 2⁴⁰"),
        ] {
            match map_of("k", 128, (128, 0), (8, 1), Some((5, stride))) {
                Err(Error::Argument { expected: found, .. }) => {
                    assert!(found.contains(expected), "{name}: {found}")
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_no_map_holds_is_named() {
        let cases = [
            ("heads between tokens", (128, 50 * 128 + 64), (50, 2), "whole tokens apart"),
            ("heads that overlap the next token", (200, 128), (50, 2), "whole tokens apart"),
            ("tokens that overlap", (64, 64), (50, 1), "whole tokens apart"),
            ("tokens in one place", (0, 128), (50, 2), "whole tokens apart"),
            ("backwards", (-128, 128), (50, 2), "whole tokens apart"),
            ("rows too far apart", (1 << 40, 128), (50, 2), "below 2⁴⁰"),
            ("too many rows", (128, 128 << 30), (50, 4), "columns"),
            ("unaligned", (132, 128), (50, 1), "multiple of 16"),
        ];
        for (name, strides, extent, expected) in cases {
            match map_of("v", 128, strides, extent, None) {
                Err(Error::Argument { argument: "v", expected: found, .. }) => {
                    assert!(found.contains(expected), "{name}: {found}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}

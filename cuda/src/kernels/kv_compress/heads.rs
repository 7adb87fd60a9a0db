//! The ranks of a layer and its pages as the kernels take them.

use crate::Error;
use crate::kernels::attention::cache::elements;
use crate::params::{FDC_MAX_HEADS, FDC_RANK_STEP, FdcHeads};

/// Ranks (r_k, r_v) of each KV head as the kernels take them.
///
/// # Errors
/// [`Error::Argument`] for no head or more than [`FDC_MAX_HEADS`], and for a rank that is no multiple of
/// [`FDC_RANK_STEP`] from there to 256.
pub fn fdc_heads(ranks: &[(usize, usize)]) -> Result<FdcHeads, Error> {
    let wrong = |expected: String, found: String| Error::argument("fdc", "ranks", expected, found);
    if ranks.is_empty() || ranks.len() > FDC_MAX_HEADS as usize {
        return Err(wrong(format!("1 to {FDC_MAX_HEADS} KV heads"), ranks.len().to_string()));
    }
    let mut heads = FdcHeads { count: ranks.len() as u32, ..bytemuck::Zeroable::zeroed() };
    for (head, &(k, v)) in ranks.iter().enumerate() {
        let step = FDC_RANK_STEP as usize;
        if [k, v].iter().any(|rank| *rank == 0 || *rank > 256 || !rank.is_multiple_of(step)) {
            let expected = format!("multiples of {step} from {step} to 256");
            return Err(wrong(expected, format!("({k}, {v}) for KV head {head}")));
        }
        // At most 128 · 16 blocks.
        heads.k_before[head + 1] = heads.k_before[head] + (k / step) as u16;
        heads.v_before[head + 1] = heads.v_before[head] + (v / step) as u16;
    }
    Ok(heads)
}

/// Σ r_k over the KV heads.
pub fn k_channels(heads: &FdcHeads) -> usize {
    heads.k_before[heads.count as usize] as usize * FDC_RANK_STEP as usize
}

/// Σ r_v over the KV heads.
pub fn v_channels(heads: &FdcHeads) -> usize {
    heads.v_before[heads.count as usize] as usize * FDC_RANK_STEP as usize
}

/// Blocks of 16 channels that a token has in a page: Σ (r_k + r_v) / 16.
pub fn page_blocks(heads: &FdcHeads) -> usize {
    (k_channels(heads) + v_channels(heads)) / FDC_RANK_STEP as usize
}

/// Checks that sums ascend, by no more than a head of `head_dim` channels has.
pub(super) fn check_heads(kernel: &str, heads: &FdcHeads, head_dim: usize) -> Result<(), Error> {
    let most = head_dim as u32 / FDC_RANK_STEP;
    let count = heads.count as usize;
    let good = (1..=FDC_MAX_HEADS as usize).contains(&count)
        && [&heads.k_before, &heads.v_before].iter().all(|before| {
            let ranks = before[..=count].windows(2).map(|pair| i32::from(pair[1]) - i32::from(pair[0]));
            before[0] == 0 && ranks.into_iter().all(|blocks| blocks >= 1 && blocks as u32 <= most)
        });
    if good {
        return Ok(());
    }
    let expected = format!("sums of ranks of 16 to {head_dim} over 1 to {FDC_MAX_HEADS} KV heads");
    let sums = |before: &[u16; 129]| format!("{:?}", &before[..=count.min(FDC_MAX_HEADS as usize)]);
    let found = format!("{} and {} over {count}", sums(&heads.k_before), sums(&heads.v_before));
    Err(Error::argument(kernel, "heads", expected, found))
}

/// Elements of one page, which strides must not overlap.
pub(super) fn check_page(
    kernel: &str,
    heads: &FdcHeads,
    page_shift: u32,
    page_stride: i64,
    element: usize,
) -> Result<usize, Error> {
    if !(4..=20).contains(&page_shift) {
        let expected = "4 to 20: pages of 16 tokens or more";
        return Err(Error::argument(kernel, "page_shift", expected, page_shift));
    }
    let page = (page_blocks(heads) * FDC_RANK_STEP as usize) << page_shift;
    if page_stride < page as i64 || page_stride % (16 / element as i64) != 0 {
        let expected = format!("a multiple of 16 bytes, at least {page} elements");
        return Err(Error::argument(kernel, "page_stride", expected, page_stride));
    }
    Ok(page)
}

/// Elements of a pool of `count` pages.
pub(super) fn pages_len(count: usize, page_stride: i64, page: usize) -> usize {
    match count {
        0 => 0,
        _ => elements(&[count - 1, page_stride as usize]).saturating_add(page),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_become_sums() {
        let heads = fdc_heads(&[(16, 128), (48, 16), (96, 32)]).expect("valid ranks");
        assert_eq!(heads.k_before[..4], [0, 1, 4, 10]);
        assert_eq!(heads.v_before[..4], [0, 8, 9, 11]);
        assert_eq!((k_channels(&heads), v_channels(&heads), page_blocks(&heads)), (160, 176, 21));
        check_heads("test", &heads, 128).expect("ranks up to 128");
        let error = check_heads("test", &heads, 96).expect_err("a rank above the head").to_string();
        assert!(error.contains("heads") && error.contains("96"), "{error}");
        for (case, wrong) in [
            ("no head", FdcHeads { count: 0, ..heads }),
            ("too many heads", FdcHeads { count: 129, ..heads }),
            ("a head without channels", FdcHeads { count: 4, ..heads }),
        ] {
            assert!(check_heads("test", &wrong, 128).is_err(), "{case}");
        }
    }

    #[test]
    fn wrong_ranks_are_named() {
        for (case, ranks) in [
            ("no heads", vec![]),
            ("too many heads", vec![(16, 16); 129]),
            ("a rank of 0", vec![(16, 16), (0, 16)]),
            ("a rank between steps", vec![(16, 24)]),
            ("a huge rank", vec![(272, 16)]),
        ] {
            let error = fdc_heads(&ranks).expect_err(case).to_string();
            assert!(error.contains("ranks"), "{case}: {error}");
        }
        assert_eq!(fdc_heads(&[(256, 256); 128]).expect("the most").k_before[128], 2048);
    }
}

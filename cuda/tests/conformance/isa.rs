//! Fragment layouts, element by element as the PTX ISA writes them ("Matrix Fragments for mma.m16n8k…"): element `i` of a
//! lane's fragment is `a_i`, `b_i` or `c_i` of that text, lowest register and lowest bits first.

/// Row and column of a matrix element.
pub(crate) type Place = (usize, usize);

/// One operand layout: where element `i` of lane `lane` lies.
pub(crate) type Layout = fn(lane: usize, i: usize) -> Place;

fn group(lane: usize) -> usize {
    lane >> 2
}

fn in_group(lane: usize) -> usize {
    lane % 4
}

/// m16n8k16, f16 and bf16: A, eight elements.
pub(crate) fn a_16816(lane: usize, i: usize) -> Place {
    let row = if i < 2 || (4..6).contains(&i) { group(lane) } else { group(lane) + 8 };
    let col = if i < 4 { in_group(lane) * 2 + (i & 1) } else { in_group(lane) * 2 + (i & 1) + 8 };
    (row, col)
}

/// m16n8k16, f16 and bf16: B, four elements.
pub(crate) fn b_16816(lane: usize, i: usize) -> Place {
    let row = if i < 2 { in_group(lane) * 2 + (i & 1) } else { in_group(lane) * 2 + (i & 1) + 8 };
    (row, group(lane))
}

/// m16n8k8, tf32: A, four elements.
pub(crate) fn a_1688(lane: usize, i: usize) -> Place {
    let row = if i == 0 || i == 2 { group(lane) } else { group(lane) + 8 };
    let col = if i < 2 { in_group(lane) } else { in_group(lane) + 4 };
    (row, col)
}

/// m16n8k8, tf32: B, two elements.
pub(crate) fn b_1688(lane: usize, i: usize) -> Place {
    let row = if i == 0 { in_group(lane) } else { in_group(lane) + 4 };
    (row, group(lane))
}

/// m16n8k32, 8-bit: A, sixteen elements.
pub(crate) fn a_16832(lane: usize, i: usize) -> Place {
    let row = if i < 4 || (8..12).contains(&i) { group(lane) } else { group(lane) + 8 };
    let col = if i < 8 { in_group(lane) * 4 + (i & 3) } else { in_group(lane) * 4 + (i & 3) + 16 };
    (row, col)
}

/// m16n8k32, 8-bit: B, eight elements.
pub(crate) fn b_16832(lane: usize, i: usize) -> Place {
    let row = if i < 4 { in_group(lane) * 4 + (i & 3) } else { in_group(lane) * 4 + (i & 3) + 16 };
    (row, group(lane))
}

/// All of these: C and D, four elements.
pub(crate) fn c_168(lane: usize, i: usize) -> Place {
    let row = if i < 2 { group(lane) } else { group(lane) + 8 };
    (row, in_group(lane) * 2 + (i & 1))
}

/// ldmatrix and stmatrix, one 8x8 matrix of 16-bit elements: four consecutive lanes hold a row, two elements each.
pub(crate) fn row_fragment(lane: usize, i: usize) -> Place {
    (lane / 4, lane % 4 * 2 + i)
}

#[test]
fn every_layout_covers_its_matrix_once() {
    let cases: [(&str, Layout, usize, usize, usize); 8] = [
        ("a_16816", a_16816, 8, 16, 16),
        ("b_16816", b_16816, 4, 16, 8),
        ("a_1688", a_1688, 4, 16, 8),
        ("b_1688", b_1688, 2, 8, 8),
        ("a_16832", a_16832, 16, 16, 32),
        ("b_16832", b_16832, 8, 32, 8),
        ("c_168", c_168, 4, 16, 8),
        ("row_fragment", row_fragment, 2, 8, 8),
    ];
    for (name, layout, elements, rows, columns) in cases {
        let mut seen = vec![0; rows * columns];
        for lane in 0..32 {
            for i in 0..elements {
                let (row, column) = layout(lane, i);
                seen[row * columns + column] += 1;
            }
        }
        assert!(seen.iter().all(|&count| count == 1), "{name}: {seen:?}");
    }
}

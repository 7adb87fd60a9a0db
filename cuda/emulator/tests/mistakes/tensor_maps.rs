//! Tensor maps: boxes, pages, bounds and what is counted of them.

use super::*;

#[test]
fn tensor_maps() {
    let cases = [
        (1, "no bytes expected", Reported(&[IN_FLIGHT, NEVER_WRITTEN])),
        (2, "wrong parity of the free slot", Reported(&["deadlock: no thread can go on"])),
        (3, "bytes outside of the tensor left out", Reported(&["deadlock", IN_FLIGHT])),
        (4, "a box that starts within the swizzle", Reported(&["is not a multiple of 1024"])),
        (5, "overwritten before it has landed", Reported(&[IN_FLIGHT, WRITE_RACE])),
        (6, "missing proxy fence", Reported(&["without fence.proxy.async between"])),
        (7, "handed on before the other lanes are done", Reported(&[READ_RACE, WRITE_RACE, OVERWRITE_RACE])),
        (8, "wrong parity of the full slot", Reported(&[NEVER_WRITTEN, IN_FLIGHT, READ_RACE])),
        (
            9,
            "missing proxy fence before a box",
            Reported(&["tma_load_2d overwrites shared memory that thread"]),
        ),
    ];
    let tiles = 3u32;
    let rows = tiles as usize * 64 - 5;
    let small = |i: usize| ((i * 7 + i / 11) % 17) as f32 - 8.0;
    let input: Vec<bf16> = (0..rows * 64).map(|i| bf16::from_f32(small(i))).collect();
    let shape = TensorShape {
        columns: 64,
        rows: rows as u64,
        row_bytes: 128,
        box_columns: 64,
        box_rows: 64,
        swizzle_128: true,
        planes: None,
    };
    let expected: Vec<f32> = (0..64 * 64)
        .map(|i| (0..3).filter(|&tile| tile < 2 || i < 40 * 64).map(|tile| small(tile * 64 * 64 + i)).sum())
        .collect();
    check("tma_ring", &cases, |queue, bug| {
        let (mut out, mut sink) = (vec![f32::NAN; 64 * 64], vec![u128::MAX; 8]);
        let args = [
            tensor("in", &input, shape),
            write("out", &mut out),
            write("sink", &mut sink),
            Arg::value("tiles", &tiles),
            Arg::value("bug", &bug),
        ];
        launch(&load("tma_ring", &[]), queue, 1, 2 * 8192 + 40, &args)?;
        Ok(out == expected && sink.iter().all(|x| *x == 0))
    });
}

/// Maps of three dimensions: rows by their page, wherever the page lies.
#[test]
fn tensor_maps_of_pages() {
    let cases = [
        (1, "a page by its place in the table", WrongResult),
        (2, "a page that is not there counted as no bytes", Reported(&[IN_FLIGHT, "deadlock"])),
        (3, "the bytes of one page alone", Reported(&[IN_FLIGHT, NEVER_WRITTEN, READ_RACE])),
        (4, "a box behind the end of its page", WrongResult),
        (5, "a page to the place of another", Reported(&[IN_FLIGHT, NEVER_WRITTEN, WRITE_RACE])),
        (6, "two coordinates for three", Reported(&["the tensor map has 3 dimensions"])),
        (7, "a stride of pages that is one row short", WrongResult),
    ];
    // Five pages of 16 rows, each behind 3 rows of nobody.
    const PAGE: usize = 19 * 64;
    let small = |i: usize| ((i * 5 + i / 7) % 13) as f32 - 6.0;
    let input: Vec<bf16> = (0..5 * PAGE).map(|i| bf16::from_f32(small(i))).collect();
    // Behind the pool, and as a negative coordinate.
    let table = [3u32, 0, 4, 5, u32::MAX, 2, 1, 3];
    let expected: Vec<f32> = (0..64 * 64)
        .map(|i| {
            let of = |page: usize| if page < 5 { small(page * PAGE + 3 * 64 + i % (16 * 64)) } else { 0.0 };
            of(table[i / (16 * 64)] as usize) + of(table[4 + i / (16 * 64)] as usize)
        })
        .collect();
    check("tma_pages", &cases, |queue, bug| {
        let mut out = vec![f32::NAN; 64 * 64];
        let shape = TensorShape {
            columns: 64,
            rows: 16,
            row_bytes: 128,
            box_columns: 64,
            box_rows: 16,
            swizzle_128: true,
            planes: Some(Planes { count: 5, bytes: if bug == 7 { 18 * 128 } else { 19 * 128 } }),
        };
        let args = [
            tensor("in", &input[3 * 64..], shape),
            read("table", &table),
            write("out", &mut out),
            Arg::value("bug", &bug),
        ];
        launch(&load("tma_pages", &[]), queue, 1, 2 * 8192 + 16, &args)?;
        if bug == 0 {
            // A page outside of the pool costs no traffic.
            assert_eq!(queue.statistics().traffic["in"].read % (6 * 16 * 128), 0);
        }
        Ok(out == expected)
    });
}

/// A map is bounded by its memory when it is launched with; a box takes of it what lies in the tensor, and the traffic says so.
#[test]
fn tensor_maps_are_bounded() {
    emulator_or_skip!();
    let input = vec![bf16::ONE; 3 * 64 * 64];
    let shape = TensorShape {
        columns: 64,
        rows: 3 * 64 - 5,
        row_bytes: 128,
        box_columns: 64,
        box_rows: 64,
        swizzle_128: true,
        planes: None,
    };
    let run = |queue: &Queue, map: Arg<'_>| {
        let (mut out, mut sink) = (vec![f32::NAN; 64 * 64], vec![u128::MAX; 8]);
        let args = [
            map,
            write("out", &mut out),
            write("sink", &mut sink),
            Arg::value("tiles", &3u32),
            Arg::value("bug", &0u32),
        ];
        launch(&load("tma_ring", &[]), queue, 1, 2 * 8192 + 40, &args)
    };
    let queue = Queue::new(Order::Forward);
    run(&queue, tensor("in", &input, shape)).expect("a correct launch");
    assert_eq!(queue.statistics().traffic["in"].read, (3 * 64 - 5) * 128);
    let refused = [
        ("more rows than memory", tensor("in", &input[64..], TensorShape { rows: 3 * 64, ..shape }), "`in`"),
        (
            "more planes than memory",
            tensor("in", &input, TensorShape { planes: Some(Planes { count: 2, bytes: 64 * 128 }), ..shape }),
            "`in`",
        ),
        ("rows that no map holds", tensor("in", &input, TensorShape { row_bytes: 120, ..shape }), "`in`"),
        ("a buffer instead", read("in", &input), "a value of 128 bytes"),
    ];
    for (name, map, expected) in refused {
        match run(&queue, map) {
            Err(error @ Error::Argument { .. }) => {
                assert!(error.to_string().contains(expected), "{name}: {error}")
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    if !Emulator::SANITIZED {
        // A tensor without rows has no map.
        match run(&queue, tensor("in", &input, TensorShape { rows: 0, ..shape })) {
            Err(Error::Emulated { report, .. }) => assert!(report.contains("no tensor map"), "{report}"),
            other => panic!("no rows: {other:?}"),
        }
    }
}

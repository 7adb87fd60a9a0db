//! The emulator itself: orders and OS threads, counters, arguments.

use crate::common::{launch, load, numbers, read, write};
use cuda::Error;
use cuda::launch::{Access, Arg, Device, Function, LaunchConfig};
use cuda::memory::Space;
use cuda::table::{Arch, ArchClass, Instance, Kernel};
use emulator::{Emulator, Order, Queue, Statistics, Traffic, emulator_or_skip};

/// Sums of `blocks` blocks by the last arriver; the result and what happened.
fn last_arriver(queue: &Queue, blocks: usize) -> (u32, Statistics) {
    let input = numbers(blocks * 64);
    let mut partials = vec![u32::MAX; blocks * 64];
    let (mut counter, mut total) = ([0u32], [0u32]);
    let args = [
        read("in", &input),
        write("partials", &mut partials),
        write("counter", &mut counter),
        write("total", &mut total),
        Arg::value("bug", &0u32),
    ];
    launch(&load("last_arriver_sum", &[]), queue, blocks as u32, 16, &args).expect("a correct kernel");
    (total[0], queue.statistics())
}

#[test]
fn orders_and_os_threads_do_not_change_results() {
    emulator_or_skip!();
    const BLOCKS: usize = 40;
    let expected = numbers(BLOCKS * 64).iter().fold(0u32, |sum, x| sum.wrapping_add(2 * x));
    for order in Order::ALL {
        for os_threads in [1, 2, 4] {
            let queue = Queue::new(order).with_os_threads(os_threads);
            assert_eq!(last_arriver(&queue, BLOCKS).0, expected, "{order:?}, {os_threads} OS threads");
        }
    }
}

#[test]
fn one_os_thread_is_deterministic() {
    emulator_or_skip!();
    let run = |order| last_arriver(&Queue::new(order).with_os_threads(1), 9).1;
    for order in Order::ALL {
        assert_eq!(run(order), run(order), "{order:?}");
    }
}

/// Which thread is the first to find its neighbour's word unwritten, in each order.
#[test]
fn orders_differ() {
    emulator_or_skip!();
    if Emulator::SANITIZED {
        return;
    }
    let input = numbers(128);
    let first = |order| {
        let mut out = vec![0u32; 256];
        let args = [read("in", &input), write("out", &mut out), Arg::value("bug", &1u32)];
        match launch(&load("neighbours", &[]), &Queue::new(order), 1, 1024, &args) {
            Err(Error::Emulated { report, .. }) => {
                report.lines().nth(1).expect("a second line").trim().to_string()
            }
            other => panic!("{other:?}"),
        }
    };
    let found: std::collections::BTreeSet<_> = Order::ALL.into_iter().map(first).collect();
    assert!(found.len() >= 4, "{found:?}");
    assert!(first(Order::Forward).starts_with("by thread 0 (warp 0, lane 0)"));
    assert!(first(Order::Reverse).starts_with("by thread 127 (warp 3, lane 31)"));
}

#[test]
fn statistics_count_what_happens() {
    emulator_or_skip!();
    let queue = Queue::default();
    let (tiles, input) = (5u32, numbers(5 * 64));
    let mut out = vec![0u32; 64];
    let args =
        [read("in", &input), write("out", &mut out), Arg::value("tiles", &tiles), Arg::value("bug", &0u32)];
    launch(&load("cp_async_ring", &[]), &queue, 1, 512, &args).expect("a correct kernel");
    let found = queue.statistics();
    assert_eq!(found.launches, 1);
    assert_eq!(found.barriers, 64 * 2 * 5, "64 threads, two barriers per tile");
    assert_eq!(found.async_copies, 16 * 5, "16 copies per tile");
    assert_eq!((found.collectives, found.mma, found.spins), (0, 0, 0));
    assert!(found.switches >= 64 * 2 * 5 && found.switches < 64 * 2 * 5 + 128, "{} switches", found.switches);
    assert_eq!(found.traffic["in"], Traffic { read: 5 * 256, written: 0 });
    if !Emulator::SANITIZED {
        assert_eq!(found.traffic["out"], Traffic { read: 0, written: 256 });
    }

    // Counters add up over launches and argument names, until they are reset.
    let (a, b, mut d) = (vec![0u16; 256], vec![0u16; 128], vec![0f32; 128]);
    let args = [read("a", &a), read("b", &b), write("d", &mut d), Arg::value("bug", &0u32)];
    if !Emulator::SANITIZED {
        launch(&load("mma_tile", &[]), &queue, 3, 0, &args).expect_err("three blocks write the same tile");
    }
    queue.reset_statistics();
    for _ in 0..2 {
        launch(&load("mma_tile", &[]), &queue, 1, 0, &args).expect("a correct kernel");
    }
    let found = queue.statistics();
    assert_eq!((found.launches, found.mma, found.collectives, found.barriers), (2, 2, 64, 0));
    if !Emulator::SANITIZED {
        assert_eq!(found.traffic["a"].read, 2 * 512);
        assert_eq!(found.traffic["d"].written, 2 * 512);
    }
}

#[test]
fn big_grids_run_in_seconds() {
    emulator_or_skip!();
    const BLOCKS: usize = 10_000;
    let start = std::time::Instant::now();
    let (total, statistics) = last_arriver(&Queue::default(), BLOCKS);
    assert_eq!(total, numbers(BLOCKS * 64).iter().fold(0u32, |sum, x| sum.wrapping_add(2 * x)));
    assert_eq!(statistics.barriers, BLOCKS as u64 * 64 * 2);
    assert!(start.elapsed().as_secs() < 30, "{:?} for {BLOCKS} blocks", start.elapsed());
}

#[test]
fn grids_without_blocks_do_nothing() {
    emulator_or_skip!();
    let queue = Queue::default();
    let mut out = vec![7u32; 128];
    let args = [write("out", &mut out), Arg::value("bug", &0u32)];
    launch(&load("barriers", &[]), &queue, 0, 0, &args).expect("no block is no mistake");
    assert_eq!(queue.statistics(), Statistics::default());
    assert_eq!(out, [7; 128]);
}

#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Wide([u32; 8]);

#[test]
fn values_arrive_with_their_size_and_alignment() {
    emulator_or_skip!();
    let input = numbers(32);
    let wide = Wide([1, 2, 3, 4, 5, 6, 7, 8]);
    let mut out = vec![0u32; 32];
    let args = [
        Arg::value("small", &200u8),
        read("in", &input),
        Arg::value("wide", &wide.0),
        Arg::value("big", &(30_000u64 << 32)),
        write("out", &mut out),
        Arg::value("real", &400_000f32),
    ];
    launch(&load("parameters", &[]), &Queue::default(), 1, 0, &args).expect("a correct kernel");
    for (i, found) in out.iter().enumerate() {
        let table = [1000, 2000, 3000, 4000][input[i] as usize % 4];
        assert_eq!(*found, 200 + input[i] + wide.0[i % 8] + 30_000 + 400_000 + table, "thread {i}");
    }
}

#[test]
fn wrong_arguments_are_named() {
    emulator_or_skip!();
    let (data, wide) = (numbers(32), [0u32; 8]);
    let good = [
        Arg::value("small", &200u8),
        read("in", &data),
        Arg::value("wide", &wide),
        Arg::value("big", &1u64),
        read("out", &data),
        Arg::value("real", &1f32),
    ];
    let device = Arg::Buffer {
        name: "in",
        address: 64,
        bytes: 128,
        space: Space::Device(3),
        stream: None,
        access: Access::Read,
    };
    let cases: [(&str, usize, Arg<'_>, &[&str]); 6] = [
        (
            "short value",
            2,
            Arg::value("wide", &1u64),
            &["`wide`", "a value of 32 bytes", "a value of 8 bytes"],
        ),
        (
            "long value",
            0,
            Arg::value("small", &1u32),
            &["`small`", "a value of 1 bytes", "a value of 4 bytes"],
        ),
        ("value for a buffer", 4, Arg::value("out", &1u64), &["`out`", "a buffer", "a value of 8 bytes"]),
        ("buffer for a value", 3, read("big", &data), &["`big`", "a value of 8 bytes", "a buffer"]),
        ("device memory", 1, device, &["`in`", "host memory", "memory of device 3"]),
        ("swapped", 5, Arg::value("big", &1u64), &["`big`", "a value of 4 bytes", "a value of 8 bytes"]),
    ];
    let kernel = load("parameters", &[]);
    for (name, place, wrong, texts) in cases {
        let mut args = good;
        args[place] = wrong;
        let error = launch(&kernel, &Queue::default(), 1, 0, &args).expect_err(name);
        assert!(matches!(error, Error::Argument { .. }), "{name}: {error:?}");
        assert!(texts.iter().all(|text| error.to_string().contains(text)), "{name}: {error}");
    }
    let error = launch(&kernel, &Queue::default(), 1, 0, &good[..5]).expect_err("too few").to_string();
    assert!(error.contains("6 arguments") && error.contains("5 arguments"), "{error}");

    let config = LaunchConfig::new(1, 64);
    // SAFETY: the launch is refused before anything runs.
    let error = unsafe { kernel.launch(&Queue::default(), &config, &good) }.expect_err("too many threads");
    assert!(error.to_string().contains("32 threads"), "{error}");
    let error = launch(&kernel, &Queue::default(), 1 << 25, 0, &good).expect_err("too many blocks");
    assert!(error.to_string().contains("blocks in the emulator"), "{error}");
}

#[test]
fn only_emulated_rows_load() {
    let emulator = emulator_or_skip!();
    static UNKNOWN: Kernel = Kernel {
        name: "no_such_kernel",
        group: "planted",
        source: "",
        constants: &[],
        arch: ArchClass::Hopper,
        threads: 32,
        rows: &[],
    };
    let instance = Instance { kernel: &UNKNOWN, values: vec![] };
    assert!(matches!(emulator.load(&instance), Err(Error::NotPrepared { .. })));
    let ampere = Emulator::with_arch(Arch::new(8, 0));
    assert!(matches!(ampere.load(&instance), Err(Error::UnsupportedArch { .. })));
    assert_eq!((emulator.arch(), ampere.arch()), (Arch::new(9, 0), Arch::new(8, 0)));
    // Empty for all; set by `EMULATOR_ONLY`.
    let groups = option_env!("EMULATOR_GROUPS").unwrap_or_default();
    let built = |group: &str| groups.is_empty() || groups.split(',').any(|name| name == group);
    for (instance, row) in cuda::table::shipped() {
        let expected = row.emulated && built(instance.kernel.group);
        assert_eq!(emulator.load(&instance).is_ok(), expected, "{}", instance.label());
    }
}

/// `a · b` of four signed bytes each.
fn dot4(a: u32, b: u32) -> i32 {
    a.to_le_bytes().iter().zip(b.to_le_bytes()).map(|(x, y)| i32::from(*x as i8) * i32::from(y as i8)).sum()
}

/// The value of one lane, by all lanes' inputs.
type Expected = fn(&[u32], usize) -> u32;

/// CUDA's builtins, each against its definition.
#[test]
fn builtins_do_what_cuda_says() {
    emulator_or_skip!();
    let bits = |x: &[u32], f: &dyn Fn(u32) -> bool| (0..32).fold(0, |sum, i| sum | u32::from(f(x[i])) << i);
    let cases: [(&str, Expected); 22] = [
        ("shfl_up", |x, i| x[if i % 8 >= 3 { i - 3 } else { i }]),
        ("shfl_down", |x, i| x[if i % 8 < 5 { i + 3 } else { i }]),
        ("shfl_xor", |x, i| x[i ^ 9]),
        ("shfl", |x, i| x[i / 8 * 8 + (i + 5) % 8]),
        ("ballot", |x, _| (0..32).fold(0, |sum, i| sum | (u32::from(x[i] % 3 == 0) << i))),
        ("any and all", |_, _| 1 + 4),
        ("match_any", |x, i| (0..32).fold(0, |sum, j| sum | u32::from(x[i] % 4 == x[j] % 4) << j)),
        ("match_all, equal", |_, _| u32::MAX.wrapping_add(1)),
        ("match_all, different", |_, _| 0),
        ("reduce_add", |x, _| x.iter().fold(0u32, |sum, x| sum.wrapping_add(*x))),
        ("reduce_min", |x, _| x.iter().map(|x| (x << 8) as i32).min().expect("32 lanes") as u32),
        ("reduce_max", |x, _| x.iter().map(|x| x << 8).max().expect("32 lanes")),
        ("reduce_xor", |x, _| x.iter().fold(0, |sum, x| sum ^ x)),
        ("brev", |x, i| x[i].reverse_bits()),
        ("byte_perm", |x, i| {
            let (low, high) = (x[i].to_le_bytes(), (!x[i]).to_le_bytes());
            u32::from_le_bytes([low[0], low[1], high[2], high[1]])
        }),
        ("funnelshift_l", |x, i| (((u64::from(!x[i]) << 32 | u64::from(x[i])) << i) >> 32) as u32),
        ("funnelshift_r", |x, i| ((u64::from(!x[i]) << 32 | u64::from(x[i])) >> i) as u32),
        ("popc, clz, ffs", |x, i| {
            let first = if x[i] == 0 { 0 } else { x[i].trailing_zeros() + 1 };
            x[i].count_ones() + 100 * x[i].leading_zeros() + 10000 * first
        }),
        ("dp4a", |x, i| (dot4(x[i], !x[i] << 3) - 5) as u32),
        ("umulhi", |x, i| ((u64::from(x[i] << 8) * u64::from(x[i] << 9)) >> 32) as u32),
        ("float2int_rn", |x, i| (((x[i] << 8) as i32 as f32) / 1000.0).round_ties_even() as i32 as u32),
        ("reduce in half warps", |x, i| match i < 16 {
            true => x[..16].iter().fold(u32::MAX, |all, x| all & (x | 1)),
            false => x[16..].iter().fold(0, |all, x| all | x),
        }),
    ];
    let x = numbers(32);
    assert_ne!(bits(&x, &|x| x % 3 == 0), 0, "the ballot has something to find");
    for order in Order::ALL {
        let mut out = vec![u32::MAX; 32 * 32];
        let mut words = [u32::MAX, i32::MIN as u32, 3, 3, 1, 1f32.to_bits(), 7, 5];
        let mut copied = vec![u32::MAX; 32];
        let args =
            [read("in", &x), write("out", &mut out), write("word", &mut words), write("copied", &mut copied)];
        launch(&load("vocabulary", &[]), &Queue::new(order), 1, 136, &args).expect("a correct kernel");
        for (row, (name, expected)) in cases.iter().enumerate() {
            for lane in 0..32 {
                assert_eq!(out[row * 32 + lane], expected(&x, lane), "{name}, lane {lane}, {order:?}");
            }
        }
        // inc counts 0 … 9 and wraps to 0, dec the other way; both 32 times from 3.
        let sum = x.iter().fold(0u32, |sum, x| sum.wrapping_add(*x));
        let expected = [
            *x.iter().min().expect("32 lanes"),
            x.iter().map(|x| (x << 8) as i32).max().expect("32 lanes") as u32,
            (3 + 32) % 10,
            (3 - 32i32).rem_euclid(10) as u32,
            x.iter().fold(1, |all, x| all ^ x),
            17f32.to_bits(),
            70,
            5u32.wrapping_sub(sum),
        ];
        assert_eq!(words, expected, "atomics, {order:?}");
        // Row g of A is the bytes of four lanes' registers, row g + 8 the complements; B sums them in every column.
        for lane in 0..32 {
            let row: i32 = (0..4).map(|t| dot4(x[lane / 4 * 4 + t], 0x0101_0101)).sum();
            let d = [row + 1, row + 2, -row - 16 + 3, -row - 16 + 4];
            for (i, d) in d.iter().enumerate() {
                assert_eq!(out[(cases.len() + i) * 32 + lane] as i32, *d, "mma, lane {lane}, register {i}");
            }
        }
        assert!((0..32).all(|i| copied[i] == x[31 - i]), "{copied:?}");
    }
}

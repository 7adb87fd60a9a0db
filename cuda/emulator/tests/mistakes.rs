//! Every planted mistake is found in every order, with a report that names it; its correct twin passes and computes the right
//! thing.

mod tensor_maps;

use crate::common::{constant, launch, launch_as, load, numbers, read, tensor, write};
use cuda::Error;
use cuda::launch::{Arg, Function};
use cuda::tensor_map::{Planes, TensorShape};
use emulator::{Emulator, Order, Queue, emulator_or_skip};
use half::bf16;

/// What a mistake leads to.
enum Outcome {
    /// One of these texts is in the report.
    Reported(&'static [&'static str]),
    /// Nobody objects, but the result is wrong. Mistakes in arithmetic are for the comparison with a reference to find.
    WrongResult,
    /// It is no mistake.
    Right,
}
use Outcome::{Reported, Right, WrongResult};

/// Runs `run(bug)`, which launches and says whether the result is right, for each bug in every order.
fn check(kernel: &str, cases: &[(u32, &str, Outcome)], run: impl Fn(&Queue, u32) -> Result<bool, Error>) {
    emulator_or_skip!();
    let mut failures = Vec::new();
    for order in Order::ALL {
        for os_threads in if order == Order::Forward { 1..=2 } else { 1..=1 } {
            let queue = Queue::new(order).with_os_threads(os_threads);
            match run(&queue, 0) {
                Ok(true) => {}
                other => {
                    failures.push(format!("{kernel}, correct, {order:?}, {os_threads} OS threads: {other:?}"))
                }
            }
            // The other build leaves memory to the sanitizers, which end the process.
            if Emulator::SANITIZED {
                continue;
            }
            for (bug, name, outcome) in cases {
                let found = run(&queue, *bug);
                let as_expected = match (&found, outcome) {
                    (Err(Error::Emulated { report, .. }), Reported(texts)) => {
                        let placed =
                            report.contains(&format!("{kernel}.cu:")) || report.contains("thread ended");
                        placed && texts.iter().any(|text| report.contains(text))
                    }
                    (Ok(right), WrongResult) => !right,
                    (Ok(right), Right) => *right,
                    _ => false,
                };
                if !as_expected {
                    failures
                        .push(format!("{kernel}, {name}, {order:?}, {os_threads} OS threads: {found:#?}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

const NEVER_WRITTEN: &str = "read of bytes that this block never wrote";
const IN_FLIGHT: &str = "asynchronous operation that nobody has waited for";
const READ_RACE: &str = "read after an unordered write";
const WRITE_RACE: &str = "write after an unordered write";
const OVERWRITE_RACE: &str = "write after an unordered read";
const NOT_RELEASED: &str = "which did not release it to this thread";

#[test]
fn shared_memory_between_threads() {
    let cases = [
        (1, "deleted barrier", Reported(&[NEVER_WRITTEN])),
        (2, "missing tail barrier", Reported(&[READ_RACE, OVERWRITE_RACE])),
        (3, "unwritten words", Reported(&[NEVER_WRITTEN])),
    ];
    let input = numbers(128);
    let kernel = || load("neighbours", &[]);
    check("neighbours", &cases, |queue, bug| {
        let mut out = vec![u32::MAX; 256];
        let args = [read("in", &input), write("out", &mut out), Arg::value("bug", &bug)];
        launch(&kernel(), queue, 1, 1024, &args)?;
        Ok((0..256).all(|i| out[i] == input[(i % 128 + 33) % 128] + (i / 128) as u32))
    });
}

#[test]
fn barriers() {
    let cases = [
        (
            1,
            "ended threads",
            Reported(&["a thread ended while others wait for it in __syncthreads", "__syncthreads after"]),
        ),
        (2, "divergent barrier", Reported(&["divergent __syncthreads"])),
        (3, "two barriers that are not the same", Reported(&["divergent __syncthreads"])),
        (4, "two thread counts", Reported(&["barrier 1 expects"])),
        (5, "half a warp", Reported(&["deadlock: no thread can go on"])),
    ];
    check("barriers", &cases, |queue, bug| {
        let mut out = vec![u32::MAX; 128];
        launch(&load("barriers", &[]), queue, 1, 0, &[write("out", &mut out), Arg::value("bug", &bug)])?;
        Ok(out.iter().all(|passed| *passed == 2 + 5))
    });
}

#[test]
fn warp_operations() {
    let cases = [
        (1, "two masks", Reported(&["mask"])),
        (2, "two shuffles", Reported(&["lanes of a warp meet in different operations"])),
        (3, "outside of its mask", Reported(&["lane 0 is not in its own mask fffffffe"])),
        (4, "lane elsewhere", Reported(&["lanes of a warp meet in different operations"])),
        (5, "exchange without __syncwarp", Reported(&[NEVER_WRITTEN])),
        (6, "ldmatrix without __syncwarp", Reported(&[READ_RACE])),
    ];
    let input = numbers(32);
    check("warps", &cases, |queue, bug| {
        let mut out = vec![u32::MAX; 32];
        let args = [read("in", &input), write("out", &mut out), Arg::value("bug", &bug)];
        launch(&load("warps", &[]), queue, 1, 512, &args)?;
        Ok((0..32).all(|i| out[i] == 2 * input[31 - i]))
    });
}

#[test]
fn cp_async() {
    let cases = [
        (1, "missing wait", Reported(&[IN_FLIGHT])),
        (2, "wait off by one", Reported(&[IN_FLIGHT])),
        (3, "missing barrier after the wait", Reported(&[IN_FLIGHT, NEVER_WRITTEN, READ_RACE])),
        (4, "missing tail barrier", Reported(&[IN_FLIGHT, OVERWRITE_RACE])),
        (5, "never waited for", Reported(&["the thread ended with 1 cp.async copies on their way"])),
    ];
    let (tiles, input) = (5u32, numbers(5 * 64));
    check("cp_async_ring", &cases, |queue, bug| {
        let mut out = vec![u32::MAX; 64];
        let args = [
            read("in", &input),
            write("out", &mut out),
            Arg::value("tiles", &tiles),
            Arg::value("bug", &bug),
        ];
        launch(&load("cp_async_ring", &[]), queue, 1, 512, &args)?;
        Ok((0..64).all(|i| out[i] == (0..5).map(|tile| input[tile * 64 + i]).sum::<u32>()))
    });
}

#[test]
fn bounds() {
    let cases = [
        (1, "read past the end", Reported(&["it ends 4 bytes past the end of `in` (128 bytes)"])),
        (2, "write past the end", Reported(&["it ends 4 bytes past the end of `out` (128 bytes)"])),
        (3, "shared write", Reported(&["shared memory: write out of bounds, 4 bytes at offset 128"])),
        (4, "null", Reported(&["global memory: read outside of every buffer"])),
        (5, "wild pointer", Reported(&["global memory: write outside of every buffer"])),
        (6, "read before the start", Reported(&["before `in`"])),
        (7, "cp.async", Reported(&["cp.async: shared memory out of bounds, 16 bytes at offset 128"])),
        (8, "misaligned", Reported(&["misaligned read of 8 bytes"])),
        (9, "shared read", Reported(&["shared memory: access out of bounds, 4 bytes at offset -4"])),
    ];
    // Both in the middle of larger vectors: whatever lies around them is nobody's buffer.
    let input = numbers(96);
    check("bounds", &cases, |queue, bug| {
        let mut out = vec![u32::MAX; 96];
        let args = [read("in", &input[32..64]), write("out", &mut out[32..64]), Arg::value("bug", &bug)];
        launch(&load("bounds", &[]), queue, 1, 128, &args)?;
        Ok(out[32..64] == input[32..64] && out[..32].iter().chain(&out[64..]).all(|x| *x == u32::MAX))
    });
}

#[test]
fn read_only_buffers() {
    emulator_or_skip!();
    if Emulator::SANITIZED {
        return;
    }
    let (input, out) = (numbers(32), numbers(32));
    let args = [read("in", &input), read("out", &out), Arg::value("bug", &0u32)];
    let found = launch(&load("bounds", &[]), &Queue::default(), 1, 128, &args);
    let Err(Error::Emulated { report, .. }) = found else { panic!("{found:?}") };
    assert!(report.contains("write to the read-only buffer `out`, 4 bytes at byte 0 of `out`"), "{report}");
    assert_eq!(out, numbers(32), "the write was not stopped");
}

#[test]
fn atomics() {
    let cases = [
        (1, "counter never set", Reported(&[NEVER_WRITTEN])),
        (2, "missing barrier before", Reported(&[NEVER_WRITTEN, "atomic beside an unordered plain write"])),
        (
            3,
            "missing barrier after",
            Reported(&["plain read beside an unordered atomic", "atomic beside an unordered plain read"]),
        ),
        (4, "plain sum over blocks", Reported(&[READ_RACE, WRITE_RACE, OVERWRITE_RACE])),
    ];
    let input = numbers(1000);
    check("atomics", &cases, |queue, bug| {
        let mut histogram = vec![0u32; 16];
        let args = [
            read("in", &input),
            write("histogram", &mut histogram),
            Arg::value("n", &1000u32),
            Arg::value("bug", &bug),
        ];
        launch(&load("atomics", &[]), queue, 3, 64, &args)?;
        Ok((0..16)
            .all(|bin| histogram[bin] as usize == input.iter().filter(|x| **x as usize % 16 == bin).count()))
    });
}

#[test]
fn last_arriver() {
    let cases = [
        (1, "relaxed atomic with fences", Reported(&[NOT_RELEASED])),
        (2, "missing barrier before the release", Reported(&[NOT_RELEASED])),
        (3, "nothing acquired", Reported(&[NOT_RELEASED])),
        (4, "missing barrier after the acquire", Reported(&[NEVER_WRITTEN, READ_RACE])),
    ];
    const BLOCKS: usize = 7;
    let input = numbers(BLOCKS * 64);
    check("last_arriver_sum", &cases, |queue, bug| {
        let mut partials = vec![u32::MAX; BLOCKS * 64];
        let (mut counter, mut total) = ([0u32], [0u32]);
        let args = [
            read("in", &input),
            write("partials", &mut partials),
            write("counter", &mut counter),
            write("total", &mut total),
            Arg::value("bug", &bug),
        ];
        launch(&load("last_arriver_sum", &[]), queue, BLOCKS as u32, 16, &args)?;
        Ok(total[0] == input.iter().fold(0, |sum: u32, x| sum.wrapping_add(2 * x)) && counter[0] == 0)
    });
}

#[test]
fn between_blocks() {
    let cases = [
        (1, "two blocks write one word", Reported(&[WRITE_RACE])),
        (2, "read of another block's word", Reported(&[NOT_RELEASED])),
        (3, "waits for nobody", Reported(&["only poll"])),
        (4, "release of another lane's write", Reported(&[NOT_RELEASED])),
        (5, "acquire by another lane", Reported(&[NOT_RELEASED])),
    ];
    check("between_blocks", &cases, |queue, bug| {
        let mut out = vec![u32::MAX; 128];
        let mut flag = [0u32];
        let args = [write("out", &mut out), write("flag", &mut flag), Arg::value("bug", &bug)];
        launch(&load("between_blocks", &[]), queue, 2, 0, &args)?;
        // The first 32 words of the block that came last hold the sum of both.
        let sums = out[..32].iter().all(|x| *x == 1) || out[64..96].iter().all(|x| *x == 1);
        Ok(sums && out[32..64].iter().all(|x| *x == 0) && flag[0] == 2)
    });
}

#[test]
fn mbarriers() {
    let cases = [
        (1, "lost arrival", Reported(&["deadlock: no thread can go on"])),
        (2, "missing wait for the copy", Reported(&[IN_FLIGHT, NEVER_WRITTEN])),
        (3, "count too small", Reported(&["unordered", "deadlock", IN_FLIGHT, "more arrivals"])),
        (
            4,
            "missing wait for the reader",
            Reported(&["more arrivals than the 1 of a phase", OVERWRITE_RACE, IN_FLIGHT]),
        ),
        (5, "wrong number of bytes", Reported(&["lacks 0 of 1 arrivals and 16 bytes"])),
        (6, "plain access", Reported(&["plain access to the mbarrier"])),
        (7, "unknown initialisation", Reported(&["no barrier makes that known", "there is no mbarrier"])),
        (
            8,
            "missing mbarrier_init_fence",
            Reported(&["was initialised without fence.mbarrier_init after it"]),
        ),
        (
            9,
            "mbarrier_init_fence of another thread",
            Reported(&["was initialised without fence.mbarrier_init"]),
        ),
        (10, "missing proxy fence", Reported(&["cp.async.bulk overwrites shared memory that thread"])),
        (11, "emptied and fenced", Right),
    ];
    let (tiles, input) = (5u32, numbers(5 * 64));
    check("mbarrier_ring", &cases, |queue, bug| {
        let mut out = vec![u32::MAX; 64];
        let args = [
            read("in", &input),
            write("out", &mut out),
            Arg::value("tiles", &tiles),
            Arg::value("bug", &bug),
        ];
        launch(&load("mbarrier_ring", &[]), queue, 1, 1024, &args)?;
        Ok((0..64).all(|i| out[i] == (0..5).map(|tile| input[tile * 64 + i]).sum::<u32>()))
    });
}

#[test]
fn bulk_stores() {
    let cases = [
        (1, "missing proxy fence", Reported(&["without fence.proxy.async between"])),
        (2, "source overwritten", Reported(&[IN_FLIGHT])),
        (3, "missing wait_read", Reported(&[IN_FLIGHT])),
        (4, "fence by the issuer", Right),
        (5, "destination read", Reported(&[IN_FLIGHT])),
        (
            6,
            "never waited for",
            Reported(&["the thread ended while a bulk store still reads its shared memory"]),
        ),
    ];
    let input = numbers(256);
    check("async_proxy", &cases, |queue, bug| {
        // Elements of 16 bytes, so that both buffers are aligned as bulk copies need it.
        let input: Vec<u128> =
            bytemuck::cast_slice(&input).iter().map(|x: &[u32; 4]| bytemuck::cast(*x)).collect();
        let mut out = vec![u128::MAX; 64];
        let args = [read("in", &input), write("out", &mut out), Arg::value("bug", &bug)];
        launch(&load("async_proxy", &[]), queue, 1, 1024, &args)?;
        Ok(out == input)
    });
}

/// Small integers, exact in bf16, as its bits.
fn bf16_bits(seed: usize, count: usize) -> (Vec<f32>, Vec<u16>) {
    let values: Vec<f32> = (0..count).map(|i| ((i * 7 + seed * 5 + i / 11) % 17) as f32 - 8.0).collect();
    let bits = values.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    (values, bits)
}

/// a [rows, k] · b [columns, k]ᵀ.
fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    a.chunks(k)
        .flat_map(|row| b.chunks(k).map(move |column| row.iter().zip(column).map(|(x, y)| x * y).sum()))
        .collect()
}

#[test]
fn mma_fragments() {
    let cases = [
        (1, "swapped registers of B", WrongResult),
        (2, "swapped registers of A", WrongResult),
        (3, "wrong map of D", WrongResult),
    ];
    let ((a, a_bits), (b, b_bits)) = (bf16_bits(1, 256), bf16_bits(2, 128));
    check("mma_tile", &cases, |queue, bug| {
        let mut d = vec![f32::NAN; 128];
        let args = [read("a", &a_bits), read("b", &b_bits), write("d", &mut d), Arg::value("bug", &bug)];
        launch(&load("mma_tile", &[]), queue, 1, 0, &args)?;
        Ok(d == product(&a, &b, 16))
    });
}

#[test]
fn wgmma() {
    let cases = [
        (1, "missing proxy fence", Reported(&["without fence.proxy.async between"])),
        (2, "missing barrier", Reported(&[NEVER_WRITTEN, READ_RACE])),
        (3, "missing wgmma_fence", Reported(&["wgmma without wgmma_fence before the first product"])),
        (4, "operands overwritten", Reported(&[IN_FLIGHT, READ_RACE])),
        (5, "wait off by one", WrongResult),
        (
            6,
            "wgmma_fence before the first step only",
            Reported(&["or since a wait gave registers of products back"]),
        ),
    ];
    let ((a, a_bits), (b, b_bits)) = (bf16_bits(3, 4096), bf16_bits(4, 4096));
    check("product_128", &cases, |queue, bug| {
        let wide = |bits: &[u16]| -> Vec<u128> {
            bytemuck::cast_slice(bits).iter().map(|x: &[u16; 8]| bytemuck::cast(*x)).collect()
        };
        let (a_wide, b_wide) = (wide(&a_bits), wide(&b_bits));
        let mut d = vec![f32::NAN; 4096];
        let args = [read("a", &a_wide), read("b", &b_wide), write("d", &mut d), Arg::value("bug", &bug)];
        launch(&load("product_128", &[]), queue, 1, 16384, &args)?;
        Ok(d == product(&a, &b, 64))
    });
}

/// A launch that may start early reads what it waits for behind its wait, and any kernel with a wait keeps to that.
#[test]
fn programmatic_launches() {
    let cases = [
        (
            1,
            "read before the wait",
            &["griddepcontrol.wait after an access", "of `in` before griddepcontrol.wait"],
        ),
        (
            2,
            "write before the wait",
            &["griddepcontrol.wait after an access", "of `out` before griddepcontrol.wait"],
        ),
        (3, "no wait", &["of `in` before griddepcontrol.wait"; 2]),
        (4, "another thread's wait", &["of `in` before griddepcontrol.wait"; 2]),
    ];
    let (input, weights) = (numbers(32), numbers(64)[32..].to_vec());
    for programmatic in [false, true] {
        let run = |queue: &Queue, bug: u32| {
            let mut out = vec![u32::MAX; 32];
            let args = [
                read("in", &input),
                constant("weights", &weights),
                write("out", &mut out),
                Arg::value("bug", &bug),
            ];
            launch_as(&load("dependent", &[]), queue, programmatic, &args)?;
            Ok((0..32).all(|i| out[i] == input[i].wrapping_mul(weights[i])))
        };
        // Without the launch's word for it nobody knows that a kernel without a wait has to wait.
        let outcome = |bug, texts| if programmatic || bug < 3 { Reported(texts) } else { Right };
        let cases: Vec<_> =
            cases.iter().map(|&(bug, name, texts)| (bug, name, outcome(bug, texts))).collect();
        check("dependent", &cases, run);
    }
}

/// Templates of the same name in two variants of a kernel are not one.
#[test]
fn variants_are_kept_apart() {
    emulator_or_skip!();
    let input = numbers(32);
    for factor in [10, 20, 10] {
        let mut out = vec![0u32; 32];
        let kernel = load("variants", &[factor]);
        launch(&kernel, &Queue::default(), 1, 0, &[read("in", &input), write("out", &mut out)])
            .expect("a correct kernel");
        let expected: Vec<u32> = input.iter().map(|x| x.wrapping_mul(factor as u32)).collect();
        assert_eq!(out, expected, "{}", kernel.instance().label());
    }
}

/// A write past the end of a vector, for [`the_sanitizers_build_ends_the_process`].
#[test]
#[ignore = "ends the process in the sanitizers' build; another test runs it in a child"]
fn write_past_the_end() {
    emulator_or_skip!();
    let (input, mut out) = (numbers(32), numbers(32));
    let args = [read("in", &input), write("out", &mut out), Arg::value("bug", &2u32)];
    let found = launch(&load("bounds", &[]), &Queue::default(), 1, 128, &args);
    assert!(matches!(found, Err(Error::Emulated { .. })), "{found:?}");
}

#[test]
fn the_sanitizers_build_ends_the_process() {
    emulator_or_skip!();
    let this = std::env::current_exe().expect("a test has a path");
    let child = std::process::Command::new(this)
        .args(["--ignored", "--exact", "mistakes::write_past_the_end"])
        .output()
        .expect("the child runs");
    let text = String::from_utf8_lossy(&child.stderr);
    assert_eq!(child.status.success(), !Emulator::SANITIZED, "{text}");
    if Emulator::SANITIZED {
        assert!(
            text.contains("AddressSanitizer: heap-buffer-overflow") && text.contains("bounds.cu:"),
            "{text}"
        );
    }
}

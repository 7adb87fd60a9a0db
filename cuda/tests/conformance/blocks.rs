//! What blocks do together: messages through acquire and release, and the status word.

use cuda::kernels::conformance::{Handover, MessagePassing, StatusContention};
use emulator::rig::Rig;

emulator::device_test!(messages_arrive_whole, first_report_wins);

/// Words of one block's payload.
const WORDS: u32 = 64;
const MISSED: u32 = u32::MAX;

/// Sum of the payload that block `block` writes.
fn payload_sum(seed: u32, block: u32) -> u32 {
    (0..WORDS).fold(0, |sum, word| sum.wrapping_add(seed.wrapping_add(block * WORDS + word)))
}

fn messages_arrive_whole<R: Rig>(rig: &R) {
    let kernel = MessagePassing::prepare(rig.device()).expect("prepare");
    for handover in Handover::ALL {
        for blocks in [1u32, 2, 3, 40] {
            for repetition in 0..rig.stress_launches().div_ceil(100) as u32 {
                let seed = repetition * 977 + blocks;
                let n = blocks as usize;
                let mut payload = rig.poisoned::<u32>(n * WORDS as usize);
                let mut words32 = rig.zeroed::<u32>(n + 1);
                let mut words64 = rig.zeroed::<u64>(n + 1);
                let mut seen = rig.poisoned::<u32>(n);
                let launched = kernel.launch(
                    rig.queue(),
                    handover,
                    n,
                    seed,
                    &mut rig.view_mut(&mut payload),
                    &mut rig.view_mut(&mut words32),
                    &mut rig.view_mut(&mut words64),
                    &mut rig.view_mut(&mut seen),
                );
                let what = format!("{handover:?}, {blocks} blocks, seed {seed}, {}", rig.name());
                launched.unwrap_or_else(|error| panic!("{what}: {error}"));
                let seen = rig.download(&seen);
                match handover {
                    Handover::Flag32 | Handover::Flag64 => {
                        // Block 0 has nobody before it; the others saw the whole payload or no flag at all.
                        assert_eq!(seen[0], MISSED, "{what}: block 0");
                        for block in 1..blocks {
                            let whole = payload_sum(seed, block - 1);
                            let found = seen[block as usize];
                            assert!(
                                found == whole || found == MISSED,
                                "{what}: block {block} saw {found}, not {whole}"
                            );
                        }
                    }
                    _ => {
                        let all =
                            (0..blocks).fold(0u32, |sum, block| sum.wrapping_add(payload_sum(seed, block)));
                        let last: Vec<u32> = seen.iter().copied().filter(|&found| found != MISSED).collect();
                        assert_eq!(last, [all], "{what}: exactly one block is last and sees everything");
                    }
                }
            }
        }
    }
}

fn first_report_wins<R: Rig>(rig: &R) {
    let kernel = StatusContention::prepare(rig.device()).expect("prepare");
    for (blocks, stride) in [(1usize, 1u32), (1, 1000), (7, 1), (40, 3), (40, 1 << 20)] {
        let what = format!("{blocks} blocks, stride {stride}, {}", rig.name());
        let mut status = rig.zeroed::<u64>(1);
        kernel.launch(rig.queue(), blocks, stride, Some(&mut rig.view_mut(&mut status))).expect("launch");
        let word = rig.download(&status)[0];
        let (code, index) = ((word >> 32) as u32, word as u32);
        assert!(
            index < blocks as u32 * 64 && index.is_multiple_of(stride),
            "{what}: index {index} never reported"
        );
        assert_eq!(code, index % 7 + 1, "{what}: code and index come from one report");

        kernel.launch(rig.queue(), blocks, stride, Some(&mut rig.view_mut(&mut status))).expect("launch");
        assert_eq!(
            rig.download(&status)[0],
            word,
            "{what}: a later launch does not replace the first report"
        );
        kernel.launch(rig.queue(), blocks, stride, None).expect("a null status word is allowed");
    }
}

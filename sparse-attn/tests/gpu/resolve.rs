//! Replacement on the device and on the CPU, driven with the same selections: the same tables after every step.

use attention::FaultCode;
use attention::testing::Rng;
use cuda::status::Fault;
use emulator::rig::Rig;
use sparse_attn::bucketed_lru::{BucketedLru, Miss};
use sparse_attn::gpu::{Resolve, ResolveArgs, ResolveConfig, ResolvePlan};
use sparse_attn::metadata::{Metadata, NONE};
use sparse_attn::{BucketedLru as Lru, Error};

emulator::device_test!(
    every_step_equals_the_reference,
    bad_rows_keep_their_state,
    many_launches_repeat_bitwise,
    prefetches_take_what_there_is_and_age_nothing,
    stale_selections_are_refused,
);

/// Words of a row's counts.
const COUNTS: usize = 8;

/// The device's tables of all rows, and what a step leaves.
struct Device<R: Rig> {
    config: ResolveConfig,
    kernel: Resolve<R::Function>,
    owners: R::Buffer<u32>,
    ages: R::Buffer<u8>,
    counts: R::Buffer<u64>,
    status: R::Buffer<u64>,
}

#[derive(Debug, PartialEq)]
struct Step {
    slot_of: Vec<u32>,
    misses: Vec<Miss>,
    num_misses: Vec<u32>,
}

impl<R: Rig> Device<R> {
    fn new(rig: &R, config: ResolveConfig) -> Self {
        let plan = ResolvePlan::new(config).expect("a valid plan");
        Device {
            config,
            kernel: Resolve::prepare(rig.device(), &plan).expect("prepare"),
            owners: rig.upload(&vec![NONE; config.rows * config.slots]),
            ages: rig.zeroed(config.rows * config.slots),
            counts: rig.zeroed(config.rows * COUNTS),
            status: rig.zeroed(1),
        }
    }

    fn step(&mut self, rig: &R, selected: &[u32], active: Option<&[u32]>, dirty: &[u8]) -> Step {
        self.run(rig, selected, active, None, false, dirty)
    }

    fn run(
        &mut self,
        rig: &R,
        selected: &[u32],
        active: Option<&[u32]>,
        epochs: Option<[&[u32]; 2]>,
        prefetch: bool,
        dirty: &[u8],
    ) -> Step {
        let ResolveConfig { rows, max_selected, .. } = self.config;
        let (selected, dirty) = (rig.upload(selected), rig.upload(dirty));
        let mut active = active.map(|active| rig.upload(active));
        let epochs = epochs.map(|epochs| epochs.map(|epoch| rig.upload(epoch)));
        let mut slot_of = rig.poisoned::<u32>(rows * max_selected);
        let mut misses = rig.poisoned::<u32>(rows * max_selected * 4);
        let mut num_misses = rig.poisoned::<u32>(rows);
        let epochs = epochs.as_ref().map(|epochs| epochs.each_ref().map(|epoch| rig.view(epoch)));
        let args = ResolveArgs {
            selected: &rig.view(&selected),
            rows: active.as_mut().map(|active| rig.view_mut(active)),
            epochs: epochs.as_ref().map(|epochs| epochs.each_ref()),
            prefetch,
            owners: rig.view_mut(&mut self.owners),
            ages: rig.view_mut(&mut self.ages),
            dirty: &rig.view(&dirty),
            slot_of: rig.view_mut(&mut slot_of),
            misses: rig.view_mut(&mut misses),
            num_misses: rig.view_mut(&mut num_misses),
            counts: rig.view_mut(&mut self.counts),
            status: rig.view_mut(&mut self.status),
        };
        self.kernel
            .run(rig.queue(), args)
            .unwrap_or_else(|error| panic!("{:?} on {}: {error}", self.config, rig.name()));
        Step {
            slot_of: rig.download(&slot_of),
            misses: rig.download(&misses).chunks_exact(4).map(plain).collect(),
            num_misses: rig.download(&num_misses),
        }
    }
}

fn plain(miss: &[u32]) -> Miss {
    Miss { place: miss[0], page: miss[1], slot: miss[2], evicted: miss[3] }
}

/// Owners and ages of a row on the CPU.
fn tables(lru: &Lru) -> (Vec<u32>, Vec<u8>) {
    ((0..lru.slots()).map(|slot| lru.metadata().owner(slot)).collect(), lru.ages().to_vec())
}

/// A random selection of up to `most` pages, padded in random places.
fn selection(rng: &mut Rng, pages: usize, most: usize, length: usize) -> Vec<u32> {
    let mut selected = vec![NONE; length];
    for _ in 0..rng.below(most + 1) {
        let (page, place) = (rng.below(pages) as u32, rng.below(length));
        if selected[place] == NONE && !selected.contains(&page) {
            selected[place] = page;
        }
    }
    selected
}

fn every_step_equals_the_reference<R: Rig>(rig: &R) {
    // Edges of warps and of the block, fewer slots than threads and more, few buckets and many.
    for (number, (max_selected, slots, pages, buckets, steps)) in [
        (1, 1, 3, 2, 5),
        (31, 33, 90, 16, 8),
        (32, 64, 80, 64, 12),
        (65, 300, 700, 252, 8),
        (128, 128, 400, 64, 6),
    ]
    .into_iter()
    .enumerate()
    {
        let rows = 3;
        let config = ResolveConfig { rows, max_selected, slots, buckets };
        let mut rng = Rng::new(1 + number as u64);
        let mut device = Device::new(rig, config);
        let mut cpu: Vec<Lru> = (0..rows).map(|_| BucketedLru::new(slots, buckets).unwrap()).collect();
        let mut counts = vec![[0u64; COUNTS]; rows]; // steps, selected, hits, misses, evicted, and others
        for step in 0..steps {
            let name = format!("{config:?}, step {step} on {}", rig.name());
            // Pages in flight come and go; there is always room for the selection.
            for lru in &mut cpu {
                let written: Vec<usize> = lru.dirty().map(|(slot, _)| slot).collect();
                written.into_iter().filter(|_| rng.below(2) == 0).for_each(|slot| lru.written_back(slot));
                if lru.dirty().count() < slots.saturating_sub(max_selected).min(3) {
                    // In both tables the page enters without a step.
                    lru.insert_dirty((pages + step) as u32).unwrap();
                }
            }
            let (owners, ages): (Vec<_>, Vec<_>) = cpu.iter().map(tables).unzip();
            (device.owners, device.ages) = (rig.upload(&owners.concat()), rig.upload(&ages.concat()));
            let mut dirty = vec![0u8; rows * slots];
            for (row, lru) in cpu.iter().enumerate() {
                lru.dirty().for_each(|(slot, _)| dirty[row * slots + slot] = 1);
            }

            let active: Vec<u32> = (0..rows as u32).map(|row| u32::from(row != 1 || step % 3 != 2)).collect();
            let selected: Vec<Vec<u32>> =
                (0..rows).map(|_| selection(&mut rng, pages, max_selected, max_selected)).collect();
            let given = (step % 2 == 0 || active.contains(&0)).then_some(active.as_slice());
            let found = device.step(rig, &selected.concat(), given, &dirty);

            for (row, lru) in cpu.iter_mut().enumerate() {
                let of = row * max_selected..(row + 1) * max_selected;
                if active[row] == 0 {
                    assert!(found.slot_of[of].iter().all(|&slot| slot == NONE), "{name}, row {row}");
                    assert_eq!(found.num_misses[row], 0, "{name}, row {row}");
                    continue;
                }
                let expected = lru.resolve(&selected[row]).unwrap();
                assert_eq!(found.slot_of[of.clone()], expected.slots, "{name}, row {row}");
                assert_eq!(found.num_misses[row] as usize, expected.misses.len(), "{name}, row {row}");
                let misses = &found.misses[of][..expected.misses.len()];
                assert_eq!(misses, expected.misses, "{name}, row {row}");
                let count = &mut counts[row];
                count[0] += 1;
                count[1] += selected[row].iter().filter(|&&page| page != NONE).count() as u64;
                count[2] += expected.hits() as u64;
                count[3] += misses.len() as u64;
                count[4] += misses.iter().filter(|miss| miss.evicted != NONE).count() as u64;
            }
            let (owners, ages): (Vec<_>, Vec<_>) = cpu.iter().map(tables).unzip();
            assert_eq!(rig.download(&device.owners), owners.concat(), "{name}: owners");
            assert_eq!(rig.download(&device.ages), ages.concat(), "{name}: ages");
        }
        assert_eq!(rig.download(&device.counts), counts.concat(), "{config:?} on {}", rig.name());
        assert_eq!(rig.download(&device.status)[0], 0, "{config:?} on {}", rig.name());
    }
}

fn bad_rows_keep_their_state<R: Rig>(rig: &R) {
    let config = ResolveConfig { rows: 3, max_selected: 6, slots: 8, buckets: 16 };
    // Of 8 slots 4 are in flight: 6 new pages do not fit. A page twice never does.
    let in_flight: Vec<u8> = (0..24).map(|slot| u8::from(slot % 8 < 4)).collect();
    for (case, dirty, bad, code) in [
        ("too many", &in_flight[..], [20, 21, 22, 23, 24, 25], FaultCode::BadLength),
        ("twice", &[0; 24], [20, 21, 22, NONE, 21, 23], FaultCode::BadIndex),
    ] {
        let mut device = Device::new(rig, config);
        let first = [0, 1, 2, 3, 4, 5].repeat(3);
        device.step(rig, &first, None, &[0; 24]);
        let before = (rig.download(&device.owners), rig.download(&device.ages));
        let good = [5, 4, 3, 2, 1, 0];
        let step = device.step(rig, &[good, bad, good].concat(), None, dirty);
        let after = (rig.download(&device.owners), rig.download(&device.ages));
        let name = format!("{case} on {}", rig.name());
        assert_eq!((&after.0[8..16], &after.1[8..16]), (&before.0[8..16], &before.1[8..16]), "{name}");
        assert_eq!((&step.slot_of[6..12], step.num_misses[1]), (&[NONE; 6][..], 0), "{name}");
        assert_eq!(step.slot_of[..6], good, "{name}: the others are right");
        assert_eq!(step.slot_of[12..], good, "{name}: the others are right");
        let fault =
            Fault::decode(rig.download(&device.status)[0]).unwrap_or_else(|| panic!("{name}: no fault"));
        assert_eq!((fault.code, fault.index), (code as u32, 1), "{name}");
    }
}

/// The same steps on fresh tables leave the same bits, however the threads ran.
fn many_launches_repeat_bitwise<R: Rig>(rig: &R) {
    let config = ResolveConfig { rows: 2, max_selected: 40, slots: 96, buckets: 8 };
    let run = || {
        let mut rng = Rng::new(9);
        let mut device = Device::new(rig, config);
        let steps: Vec<Step> = (0..5)
            .map(|_| {
                let selected: Vec<u32> = (0..2).flat_map(|_| selection(&mut rng, 200, 40, 40)).collect();
                device.step(rig, &selected, None, &[0; 192])
            })
            .collect();
        (steps, rig.download(&device.owners), rig.download(&device.ages))
    };
    let first = run();
    for launch in 1..(rig.stress_launches() / 10).min(1000) {
        assert!(run() == first, "launch {launch} on {} differs", rig.name());
    }
}

/// Between steps pages are fetched as far as slots may go: the same choices as on the CPU, also where they do not all fit.
fn prefetches_take_what_there_is_and_age_nothing<R: Rig>(rig: &R) {
    let config = ResolveConfig { rows: 1, max_selected: 12, slots: 16, buckets: 8 };
    let mut rng = Rng::new(77);
    let mut device = Device::new(rig, config);
    let mut cpu: Lru = BucketedLru::new(16, 8).unwrap();
    let (mut prefetched, mut short) = (0, 0);
    for step in 0..12 {
        let name = format!("step {step} on {}", rig.name());
        while cpu.dirty().count() < step.min(11) {
            cpu.insert_dirty((100 + step * 16 + cpu.dirty().count()) as u32).unwrap();
        }
        let (owners, ages) = tables(&cpu);
        (device.owners, device.ages) = (rig.upload(&owners), rig.upload(&ages));
        let mut dirty = vec![0u8; 16];
        cpu.dirty().for_each(|(slot, _)| dirty[slot] = 1);
        // In the end twelve pages for five slots.
        let selected = match step {
            0..8 => selection(&mut rng, 60, 12, 12),
            _ => (0..12).map(|i| ((step * 13 + i * 5) % 60) as u32).collect(),
        };
        let found = device.run(rig, &selected, None, None, true, &dirty);
        let expected = cpu.prefetch(&selected);
        assert_eq!(found.slot_of, expected.slots, "{name}");
        assert_eq!(found.misses[..found.num_misses[0] as usize], expected.misses, "{name}");
        assert_eq!((rig.download(&device.owners), rig.download(&device.ages)), tables(&cpu), "{name}");
        prefetched += expected.misses.len() as u64;
        short += usize::from(
            expected.slots.iter().zip(&selected).any(|(&slot, &page)| slot == NONE && page != NONE),
        );
        // A step in between makes some pages older.
        cpu.resolve(&[selected.iter().copied().find(|&page| page != NONE).unwrap_or(1)]).ok();
    }
    assert!(prefetched > 0 && short > 0, "{prefetched} pages, {short} times too few slots");
    let counts = rig.download(&device.counts);
    assert_eq!((counts[..4].to_vec(), counts[5]), (vec![0; 4], prefetched), "on {}", rig.name());
    assert_eq!(rig.download(&device.status)[0], 0, "on {}", rig.name());
}

fn stale_selections_are_refused<R: Rig>(rig: &R) {
    let config = ResolveConfig { rows: 3, max_selected: 2, slots: 4, buckets: 8 };
    let mut device = Device::new(rig, config);
    let found = device.run(rig, &[5, 6, 5, 6, 5, 6], None, Some([&[3, 3, 4], &[3, 4, 4]]), false, &[0; 12]);
    assert_eq!(found.slot_of, [0, 1, NONE, NONE, 0, 1], "on {}", rig.name());
    assert_eq!(found.num_misses, [2, 0, 2], "on {}", rig.name());
    assert_eq!(rig.download(&device.owners)[4..8], [NONE; 4], "on {}", rig.name());
    let fault = Fault::decode(rig.download(&device.status)[0]);
    assert_eq!(fault, Some(Fault { code: FaultCode::Stale as u32, index: 1 }), "on {}", rig.name());
}

#[test]
fn refused_plans_name_the_argument() {
    let good = ResolveConfig { rows: 8, max_selected: 2048, slots: 12288, buckets: 64 };
    assert!(ResolvePlan::new(good).is_ok_and(|plan| plan.bytes_moved() == 8 * (12288 + 2048) * 8));
    for (config, named) in [
        (ResolveConfig { rows: 0, ..good }, "rows"),
        (ResolveConfig { max_selected: 4097, ..good }, "max_selected"),
        (ResolveConfig { slots: 20_000, ..good }, "slots"),
        (ResolveConfig { buckets: 253, ..good }, "buckets"),
        (ResolveConfig { slots: 2047, ..good }, "max_selected"),
    ] {
        match ResolvePlan::new(config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
}

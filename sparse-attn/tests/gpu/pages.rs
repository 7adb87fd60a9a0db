//! Closing and write-back by themselves: what a step never does, and what it refuses.

use attention::testing::Rng;
use attention::{DType, FaultCode, HeadShape};
use cuda::memory::{Space, ViewMut};
use cuda::status::Fault;
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig};
use sparse_attn::bucketed_lru::BucketedLru;
use sparse_attn::gpu::{Close, CloseArgs, Extent, Flush, FlushArgs, PagesConfig, PagesPlan};
use sparse_attn::metadata::{Metadata, NONE};
use sparse_attn::page::PageSpec;
use sparse_attn::{BucketedLru as Lru, Error};

emulator::device_test!(
    decoded_partitions_take_slots_one_by_one,
    rows_that_cannot_close_keep_their_state,
    only_pages_that_arrive_are_clean,
);

fn config(slots: usize, bulk: bool) -> PagesConfig {
    let extent = Extent {
        requests: 2,
        shape: HeadShape::new(1, 1, 64, 64).unwrap(),
        page: PageSpec::new(8, 64, 64, DType::F16).unwrap(),
        max_pages: 40,
        max_selected: 4,
        slots,
        max_open: 6,
        runs: 2 * (slots + 6),
        host_pages: 80,
    };
    PagesConfig {
        extent,
        tokens: 1,
        partition_pages: 2,
        dense_tokens: 20,
        buckets: 8,
        max_closing: 6,
        bulk,
        blocks: 1,
    }
}

/// Tables of both rows.
#[derive(Debug, Clone, PartialEq)]
struct Tables {
    closed: Vec<u32>,
    owners: Vec<u32>,
    ages: Vec<u8>,
    dirty: Vec<u8>,
    slot_table: Vec<u32>,
    open_table: Vec<u32>,
    host_table: Vec<u32>,
}

impl Tables {
    fn new(config: &PagesConfig) -> Self {
        let slots = config.extent.slots as u32;
        Tables {
            closed: vec![0; 2],
            owners: vec![NONE; 2 * slots as usize],
            ages: vec![0; 2 * slots as usize],
            dirty: vec![0; 2 * slots as usize],
            slot_table: (0..2 * slots).collect(),
            open_table: (2 * slots..2 * slots + 12).collect(),
            host_table: (0..80).collect(),
        }
    }
}

/// Closed pages of each row: page, run, slot, evicted.
type Closing = [Vec<[u32; 4]>; 2];

fn close<R: Rig>(
    rig: &R,
    config: PagesConfig,
    before: &Tables,
    kv_len: [u32; 2],
) -> (Tables, Closing, Option<Fault>) {
    let kernel = Close::prepare(rig.device(), &PagesPlan::new(config).unwrap()).unwrap();
    let (kv_len, host_table) = (rig.upload(&kv_len), rig.upload(&before.host_table));
    let mut states = rig.poisoned::<u32>(2);
    let (mut closed, mut owners) = (rig.upload(&before.closed), rig.upload(&before.owners));
    let (mut ages, mut dirty) = (rig.upload(&before.ages), rig.upload(&before.dirty));
    let (mut slot_table, mut open_table) = (rig.upload(&before.slot_table), rig.upload(&before.open_table));
    let (mut partitions, mut epoch) = (rig.zeroed::<u32>(2), rig.zeroed::<u32>(2));
    let (mut closing, mut num_closing) = (rig.poisoned::<u32>(2 * 6 * 4), rig.poisoned::<u32>(2));
    let (mut counts, mut status) = (rig.zeroed::<u64>(16), rig.zeroed::<u64>(1));
    let args = CloseArgs {
        kv_len: &rig.view(&kv_len),
        host_table: &rig.view(&host_table),
        rows: rig.view_mut(&mut states),
        closed: rig.view_mut(&mut closed),
        partitions: rig.view_mut(&mut partitions),
        epoch: rig.view_mut(&mut epoch),
        owners: rig.view_mut(&mut owners),
        ages: rig.view_mut(&mut ages),
        dirty: rig.view_mut(&mut dirty),
        slot_table: rig.view_mut(&mut slot_table),
        open_table: rig.view_mut(&mut open_table),
        closing: rig.view_mut(&mut closing),
        num_closing: rig.view_mut(&mut num_closing),
        counts: rig.view_mut(&mut counts),
        status: rig.view_mut(&mut status),
    };
    kernel.run(rig.queue(), args).unwrap();
    let after = Tables {
        closed: rig.download(&closed),
        owners: rig.download(&owners),
        ages: rig.download(&ages),
        dirty: rig.download(&dirty),
        slot_table: rig.download(&slot_table),
        open_table: rig.download(&open_table),
        host_table: before.host_table.clone(),
    };
    let (list, lens) = (rig.download(&closing), rig.download(&num_closing));
    let lists = [0, 1].map(|row| {
        let of_row = list[row * 24..][..lens[row] as usize * 4].chunks_exact(4);
        of_row.map(|entry| [entry[0], entry[1], entry[2], entry[3]]).collect::<Vec<_>>()
    });
    let (epoch, partitions) = (rig.download(&epoch), rig.download(&partitions));
    for (row, list) in lists.iter().enumerate() {
        let closed = (u32::from(!list.is_empty()), list.len() as u32 / 2);
        assert_eq!((epoch[row], partitions[row]), closed, "row {row} on {}", rig.name());
    }
    (after, lists, Fault::decode(rig.download(&status)[0]))
}

/// Two pages to a partition, slots of every age, some in flight: the CPU inserts one page after the other.
fn decoded_partitions_take_slots_one_by_one<R: Rig>(rig: &R) {
    let config = config(40, false);
    for seed in 0..4 {
        let mut rng = Rng::new(seed);
        let mut cpu: Lru = BucketedLru::new(40, 8).unwrap();
        for step in 0..3 + 3 * seed as u32 {
            let pages: Vec<u32> = (0..4).map(|i| (step * 3 + i) % 30).collect();
            cpu.resolve(&pages).unwrap();
            if rng.below(2) == 0 {
                cpu.insert_dirty(100 + step).unwrap();
            }
        }
        let mut before = Tables::new(&config);
        // Row 1: 36 closed pages, 17 open tokens, of which two pages close and one token stays.
        before.closed = vec![0, 36 * 8];
        for slot in 0..40 {
            before.owners[40 + slot] = cpu.metadata().owner(slot);
            before.ages[40 + slot] = cpu.ages()[slot];
        }
        cpu.dirty().for_each(|(slot, _)| before.dirty[40 + slot] = 1);
        let (after, lists, fault) = close(rig, config, &before, [20, 36 * 8 + 17]);
        let name = format!("seed {seed} on {}", rig.name());
        assert_eq!((fault, &lists[0]), (None, &Vec::new()), "{name}: row 0 is dense");
        let expected: Vec<[u32; 4]> = (0..2)
            .map(|i| {
                let miss = cpu.insert_dirty(36 + i).unwrap();
                [miss.page, before.open_table[6 + i as usize], miss.slot, miss.evicted]
            })
            .collect();
        assert_eq!(lists[1], expected, "{name}");
        let owners: Vec<u32> = (0..40).map(|slot| cpu.metadata().owner(slot)).collect();
        assert_eq!((&after.owners[40..], &after.ages[40..]), (&owners[..], cpu.ages()), "{name}");
        for (i, &[_, run, slot, _]) in expected.iter().enumerate() {
            let slot = 40 + slot as usize;
            assert_eq!((after.slot_table[slot], after.dirty[slot]), (run, 1), "{name}: page {i}");
        }
        // The open token's run is first now, and no run is lost.
        assert_eq!(after.open_table[6], before.open_table[6 + 2], "{name}");
        let all = |tables: &Tables| {
            let mut runs = [&tables.slot_table[..], &tables.open_table].concat();
            runs.sort_unstable();
            runs
        };
        assert_eq!((all(&after), after.closed[1]), (all(&before), 38 * 8), "{name}");
    }
}

fn rows_that_cannot_close_keep_their_state<R: Rig>(rig: &R) {
    type Spoil = fn(&mut Tables, &mut u32);
    let full = |tables: &mut Tables| (8..16).for_each(|slot| tables.owners[slot] = slot as u32);
    let cases: [(&str, bool, Spoil, FaultCode); 7] = [
        (
            "a prompt, where only decoded tokens may close",
            false,
            |tables, len| {
                (tables.closed[1], *len) = (0, 40);
            },
            FaultCode::BadLength,
        ),
        ("all slots in flight", false, |tables, _| tables.dirty[8..].fill(1), FaultCode::BadLength),
        ("more open tokens than the table holds", true, |_, len| *len += 49, FaultCode::BadLength),
        ("fewer tokens than are closed", true, |_, len| *len = 5, FaultCode::BadLength),
        ("no place in host memory", true, |tables, _| tables.host_table[40 + 17] = 80, FaultCode::BadPage),
        ("no run", true, |tables, _| tables.open_table[6] = 99, FaultCode::BadPage),
        (
            "pages past the end",
            true,
            |tables, len| (tables.closed[1], *len) = (40 * 8, 40 * 8 + 16),
            FaultCode::BadLength,
        ),
    ];
    for (name, bulk, spoil, code) in cases {
        let config = config(8, bulk);
        let mut before = Tables::new(&config);
        full(&mut before);
        (before.closed[1], before.owners[8]) = (16 * 8, 8);
        let mut len = 16 * 8 + 16;
        spoil(&mut before, &mut len);
        let (after, lists, fault) = close(rig, config, &before, [0, len]);
        let name = format!("{name} on {}", rig.name());
        assert_eq!(fault, Some(Fault { code: code as u32, index: 1 }), "{name}");
        assert_eq!((after, &lists[1]), (before, &Vec::new()), "{name}");
    }
}

/// A page without a place in host memory keeps its slot.
fn only_pages_that_arrive_are_clean<R: Rig>(rig: &R) {
    let config = config(8, true);
    let kernel = Flush::prepare(rig.device(), &PagesPlan::new(config).unwrap()).unwrap();
    let run = config.extent.page.bytes();
    let mut rng = Rng::new(3);
    let device: Vec<u8> = (0..config.extent.runs * run).map(|_| rng.bits() as u8).collect();
    let mut closing = [[NONE; 4]; 12];
    closing[0] = [3, 7, 2, NONE];
    closing[1] = [4, 9, NONE, NONE]; // in no slot
    closing[6] = [5, 1, 0, NONE]; // no place: the table says so
    closing[7] = [6, 10_000, 1, NONE]; // no run
    closing[8] = [7, 2, 3, NONE];
    let mut host_table: Vec<u32> = (0..80).rev().collect();
    host_table[40 + 5] = 80;
    let (list, lens) = (rig.upload(&closing.concat()), rig.upload(&[2u32, 3]));
    let (table, memory) = (rig.upload(&host_table), rig.upload(&device));
    let (mut host, mut dirty) = (rig.pin(&vec![0xffu8; 80 * run]), rig.upload(&[1u8; 16]));
    let (mut counts, mut status) = (rig.zeroed::<u64>(16), rig.zeroed::<u64>(1));
    let args = FlushArgs {
        closing: [&rig.view(&list), &rig.view(&lens)],
        host_table: &rig.view(&table),
        device: &rig.view(&memory),
        host: rig.view_mut(&mut host),
        dirty: rig.view_mut(&mut dirty),
        counts: rig.view_mut(&mut counts),
        status: rig.view_mut(&mut status),
    };
    kernel.run(rig.queue(), args).unwrap();
    let name = rig.name();
    let mut expected = vec![0xff; 80 * run];
    for (page, from) in [(79 - 3, 7), (79 - 4, 9), (79 - 47, 2)] {
        expected[page * run..][..run].copy_from_slice(&device[from * run..][..run]);
    }
    assert!(rig.download(&host) == expected, "host memory on {name}");
    let mut flags = [1u8; 16];
    (flags[2], flags[8 + 3]) = (0, 0);
    assert_eq!(rig.download(&dirty), flags, "on {name}");
    let counts = rig.download(&counts);
    assert_eq!((counts[6], counts[8 + 6]), (2, 1), "written pages on {name}");
    let fault = Fault::decode(rig.download(&status)[0]);
    assert_eq!(fault, Some(Fault { code: FaultCode::BadPage as u32, index: 1 }), "on {name}");
}

/// What is written back to memory of the device has not left it.
#[test]
fn host_pages_on_the_device_are_refused() {
    emulator::emulator_or_skip!();
    let rig = EmulatorRig::new(Order::Forward);
    let config = config(8, true);
    let kernel = Flush::prepare(rig.device(), &PagesPlan::new(config).unwrap()).unwrap();
    let bytes = config.extent.page.bytes();
    let (list, lens) = (rig.upload(&[NONE; 48]), rig.upload(&[0u32, 0]));
    let (table, memory) = (rig.zeroed::<u32>(80), rig.zeroed::<u8>(config.extent.runs * bytes));
    let (mut dirty, mut counts, mut status) =
        (rig.zeroed::<u8>(16), rig.zeroed::<u64>(16), rig.zeroed::<u64>(1));
    let args = FlushArgs {
        closing: [&rig.view(&list), &rig.view(&lens)],
        host_table: &rig.view(&table),
        device: &rig.view(&memory),
        // SAFETY: refused before anybody follows the address.
        host: unsafe { ViewMut::from_raw(4096, 80 * bytes, Space::Device(0)) },
        dirty: rig.view_mut(&mut dirty),
        counts: rig.view_mut(&mut counts),
        status: rig.view_mut(&mut status),
    };
    let refused = kernel.run(rig.queue(), args).expect_err("refused").to_string();
    assert!(refused.contains("`host`") && refused.contains("pinned memory of the host"), "{refused}");
}

#[test]
fn refused_plans_name_the_argument() {
    let good = config(8, true);
    assert!(PagesPlan::new(good).is_ok());
    for (config, named) in [
        (PagesConfig { partition_pages: 7, ..good }, "max_open"),
        (PagesConfig { max_closing: 1, ..good }, "max_closing"),
        (PagesConfig { buckets: 1, ..good }, "buckets"),
        (PagesConfig { extent: Extent { slots: 20_000, ..good.extent }, ..good }, "slots"),
        (PagesConfig { dense_tokens: usize::MAX, ..good }, "dense_tokens"),
        (PagesConfig { blocks: 0, ..good }, "blocks"),
        (PagesConfig { tokens: 0, ..good }, "tokens"),
    ] {
        match PagesPlan::new(config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
}

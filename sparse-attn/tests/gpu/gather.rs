//! Misses from host memory into their slots, byte by byte.

use attention::testing::{Rng, shuffled_pages};
use attention::{DType, FaultCode};
use cuda::memory::{Space, View};
use cuda::status::Fault;
use emulator::Order;
use emulator::rig::{EmulatorRig, Rig, pinned_or_skip};
use sparse_attn::Error;
use sparse_attn::bucketed_lru::Miss;
use sparse_attn::gpu::{Gather, GatherArgs, GatherConfig, GatherPlan, ResolveConfig};
use sparse_attn::metadata::NONE;
use sparse_attn::page::PageSpec;

emulator::device_test!(
    runs_arrive_byte_by_byte,
    bad_entries_are_reported_and_the_others_arrive,
    host_pages_may_lie_past_two_gigabytes,
);

/// Tables and misses of a case; device runs that no miss names keep what they had.
struct Case {
    config: GatherConfig,
    misses: Vec<Miss>,
    num_misses: Vec<u32>,
    host_table: Vec<u32>,
    slot_table: Vec<u32>,
    host: Vec<u8>,
}

/// What entries past the misses hold: nobody may read them.
const POISON: Miss = Miss { place: NONE, page: NONE, slot: NONE, evicted: NONE };

impl Case {
    fn new(config: GatherConfig, counts: &[u32], seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let ResolveConfig { rows, max_selected, slots, .. } = config.resolve;
        let requests = rows / config.kv_heads;
        let mut misses = vec![POISON; rows * max_selected];
        for (row, &count) in counts.iter().enumerate() {
            let (pages, to) =
                (shuffled_pages(config.max_pages, seed), shuffled_pages(slots, seed + row as u64));
            for (i, miss) in misses[row * max_selected..].iter_mut().take(count as usize).enumerate() {
                *miss = Miss { place: i as u32, page: pages[i], slot: to[i], evicted: NONE };
            }
        }
        let host_table =
            (0..requests * config.max_pages).map(|_| rng.below(config.host_pages) as u32).collect();
        let bytes = config.host_pages * config.kv_heads * config.page.bytes();
        Case {
            config,
            misses,
            num_misses: counts.to_vec(),
            host_table,
            slot_table: shuffled_pages(config.device_pages, seed + 99)[..rows * slots].to_vec(),
            host: (0..bytes).map(|_| rng.bits() as u8).collect(),
        }
    }

    /// Slots whose page has no source or no run.
    fn freed(&self) -> Vec<usize> {
        let GatherConfig { resolve: ResolveConfig { max_selected, slots, .. }, kv_heads, max_pages, .. } =
            self.config;
        let mut freed = Vec::new();
        for (row, &count) in self.num_misses.iter().enumerate().filter(|&(_, &n)| n as usize <= max_selected)
        {
            for miss in &self.misses[row * max_selected..][..count as usize] {
                let (slot, page) = (miss.slot as usize, miss.page as usize);
                if slot >= slots {
                    continue;
                }
                let run = self.slot_table[row * slots + slot] as usize;
                let source = self.host_table[row / kv_heads * max_pages..][..max_pages].get(page);
                let arrives = run < self.config.device_pages
                    && source.is_some_and(|&page| (page as usize) < self.config.host_pages);
                freed.extend((!arrives).then_some(row * slots + slot));
            }
        }
        freed
    }

    /// The device after the copies, of a device full of 0xff.
    fn expected(&self) -> Vec<u8> {
        let run = self.config.page.bytes();
        let ResolveConfig { max_selected, slots, .. } = self.config.resolve;
        let mut device = vec![0xff; self.config.device_pages * run];
        for (row, &count) in self.num_misses.iter().enumerate().filter(|&(_, &n)| n as usize <= max_selected)
        {
            for miss in &self.misses[row * max_selected..][..count as usize] {
                let Some(&to) = self.slot_table[row * slots..][..slots].get(miss.slot as usize) else {
                    continue;
                };
                let Some(to) = device.chunks_exact_mut(run).nth(to as usize) else { continue };
                let (request, head) = (row / self.config.kv_heads, row % self.config.kv_heads);
                let pages = &self.host_table[request * self.config.max_pages..][..self.config.max_pages];
                let page = pages.get(miss.page as usize).map_or(usize::MAX, |&page| page as usize);
                match page < self.config.host_pages {
                    true => {
                        to.copy_from_slice(&self.host[(page * self.config.kv_heads + head) * run..][..run])
                    }
                    false => to.fill(0),
                }
            }
        }
        device
    }

    fn run<R: Rig>(&self, rig: &R) -> (Vec<u8>, Option<Fault>) {
        let host = rig.pin(&self.host);
        self.run_on(rig, &rig.view(&host))
            .unwrap_or_else(|error| panic!("{:?} on {}: {error}", self.config, rig.name()))
    }

    /// The same with host pages elsewhere.
    fn run_on<R: Rig>(&self, rig: &R, host: &View<'_, u8>) -> Result<(Vec<u8>, Option<Fault>), Error> {
        let plan = GatherPlan::new(self.config).expect("a valid plan");
        let kernel = Gather::prepare(rig.device(), &plan).expect("prepare");
        let words: Vec<u32> =
            self.misses.iter().flat_map(|miss| [miss.place, miss.page, miss.slot, miss.evicted]).collect();
        let (misses, num_misses) = (rig.upload(&words), rig.upload(&self.num_misses));
        let (host_table, slot_table) = (rig.upload(&self.host_table), rig.upload(&self.slot_table));
        let mut device = rig.poisoned::<u8>(self.config.device_pages * self.config.page.bytes());
        let slots = self.config.resolve.rows * self.config.resolve.slots;
        let mut owners = rig.zeroed::<u32>(slots);
        let mut status = rig.zeroed::<u64>(1);
        let args = GatherArgs {
            misses: &rig.view(&misses),
            num_misses: &rig.view(&num_misses),
            host_table: &rig.view(&host_table),
            slot_table: &rig.view(&slot_table),
            host,
            device: rig.view_mut(&mut device),
            owners: rig.view_mut(&mut owners),
            status: rig.view_mut(&mut status),
        };
        kernel.run(rig.queue(), args)?;
        // Slots whose page did not arrive are free again, all others as they were.
        let freed = self.freed();
        let expected: Vec<u32> =
            (0..slots).map(|slot| if freed.contains(&slot) { NONE } else { 0 }).collect();
        assert_eq!(rig.download(&owners), expected, "{:?} on {}: owners", self.config, rig.name());
        Ok((rig.download(&device), Fault::decode(rig.download(&status)[0])))
    }
}

fn config(rows: usize, kv_heads: usize, page: (usize, usize), blocks: usize) -> GatherConfig {
    let page = PageSpec::new(page.0, page.1, page.1, DType::BF16).expect("a valid page");
    let resolve = ResolveConfig { rows, max_selected: 20, slots: 24, buckets: 64 };
    GatherConfig {
        resolve,
        kv_heads,
        page,
        max_pages: 30,
        host_pages: 40,
        device_pages: rows * 24 + 3,
        blocks,
    }
}

fn runs_arrive_byte_by_byte<R: Rig>(rig: &R) {
    for (seed, (config, counts)) in (1..).zip([
        // The smallest run, one of a tail of a warp's stride, and pages as models have them.
        (config(2, 2, (8, 8), 1), vec![20, 3]),
        (config(4, 2, (8, 72), 3), vec![0, 1, 20, 7]),
        (config(2, 1, (16, 128), 2), vec![5, 6]),
        (config(2, 2, (64, 128), 4), vec![2, 1]),
        // More rows than a warp has lanes, most of them without a miss.
        (config(70, 2, (8, 16), 2), (0..70).map(|row| u32::from(row % 9 == 4) * (row / 8)).collect()),
        (config(3, 3, (8, 64), 2), vec![0, 0, 0]),
    ]) {
        let case = Case::new(config, &counts, seed);
        let (device, fault) = case.run(rig);
        let wrong = device.iter().zip(&case.expected()).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{config:?}, seed {seed} on {}: first wrong byte", rig.name());
        assert_eq!(fault, None, "{config:?}, seed {seed} on {}", rig.name());
    }
}

fn bad_entries_are_reported_and_the_others_arrive<R: Rig>(rig: &R) {
    type Spoil = fn(&mut Case);
    let cases: [(&str, Spoil, FaultCode); 5] = [
        ("too many misses", |case| case.num_misses[1] = 21, FaultCode::BadLength),
        ("slot out of range", |case| case.misses[20 + 2].slot = 24, FaultCode::BadIndex),
        ("run out of range", |case| case.slot_table[24..48].fill(1000), FaultCode::BadIndex),
        ("page out of range", |case| case.misses[20 + 4].page = 30, FaultCode::BadPage),
        (
            "host page out of range",
            |case| {
                let page = case.misses[20].page as usize;
                case.host_table[30 + page] = 40;
            },
            FaultCode::BadPage,
        ),
    ];
    for (name, spoil, code) in cases {
        let mut case = Case::new(config(3, 1, (8, 64), 2), &[4, 6, 20], 5);
        spoil(&mut case);
        let (device, fault) = case.run(rig);
        assert!(device == case.expected(), "{name} on {}", rig.name());
        let fault = fault.unwrap_or_else(|| panic!("{name} on {}: nothing reported", rig.name()));
        assert_eq!((fault.code, fault.index), (code as u32, 1), "{name} on {}", rig.name());
    }
}

fn host_pages_may_lie_past_two_gigabytes<R: Rig>(rig: &R) {
    let page = PageSpec::new(64, 256, 256, DType::BF16).expect("a valid page");
    let host_pages = (1usize << 31) / (2 * page.bytes()) + 3;
    let resolve = ResolveConfig { rows: 2, max_selected: 1, slots: 1, buckets: 64 };
    let config =
        GatherConfig { resolve, kv_heads: 2, page, max_pages: 1, host_pages, device_pages: 2, blocks: 1 };
    let kernel =
        Gather::prepare(rig.device(), &GatherPlan::new(config).expect("a valid plan")).expect("prepare");
    let mut rng = Rng::new(8);
    let runs: Vec<u8> = (0..2 * page.bytes()).map(|_| rng.bits() as u8).collect();
    let test = "host_pages_may_lie_past_two_gigabytes";
    let Some(mut host) = pinned_or_skip::<_, u8>(rig, host_pages * 2 * page.bytes(), test) else { return };
    rig.write(&mut host, (host_pages - 1) * 2 * page.bytes(), &runs);
    let (misses, num_misses) = (rig.upload(&[0, 0, 0, NONE, 0, 0, 0, NONE]), rig.upload(&[1, 1]));
    let (host_table, slot_table) = (rig.upload(&[host_pages as u32 - 1]), rig.upload(&[1, 0]));
    let mut device = rig.poisoned::<u8>(2 * page.bytes());
    let mut owners = rig.zeroed::<u32>(2);
    let mut status = rig.zeroed::<u64>(1);
    let args = GatherArgs {
        misses: &rig.view(&misses),
        num_misses: &rig.view(&num_misses),
        host_table: &rig.view(&host_table),
        slot_table: &rig.view(&slot_table),
        host: &rig.view(&host),
        device: rig.view_mut(&mut device),
        owners: rig.view_mut(&mut owners),
        status: rig.view_mut(&mut status),
    };
    kernel.run(rig.queue(), args).expect("run");
    let (first, second) = runs.split_at(page.bytes());
    assert!(rig.download(&device) == [second, first].concat(), "on {}", rig.name());
    assert_eq!(rig.download(&status)[0], 0, "on {}", rig.name());
}

/// Pages in memory of the device would be copied as well, and nobody would notice that nothing crosses the link.
#[test]
fn host_pages_on_the_device_are_refused() {
    emulator::emulator_or_skip!();
    let case = Case::new(config(2, 2, (8, 8), 1), &[2, 1], 9);
    // SAFETY: refused before anybody follows the address.
    let on_device = unsafe { View::<u8>::from_raw(4096, case.host.len(), Space::Device(0)) };
    let refused =
        case.run_on(&EmulatorRig::new(Order::Forward), &on_device).expect_err("refused").to_string();
    assert!(refused.contains("`host`") && refused.contains("pinned memory of the host"), "{refused}");
    assert!(refused.contains("found memory of device 0"), "{refused}");
}

#[test]
fn refused_plans_name_the_argument() {
    let good = config(4, 2, (16, 128), 8);
    assert_eq!(GatherPlan::new(good).map(|plan| plan.bytes_moved(10)).ok(), Some(10 * 16 * 128 * 4));
    for (config, named) in [
        (GatherConfig { kv_heads: 3, ..good }, "rows"),
        (GatherConfig { kv_heads: 0, ..good }, "kv_heads"),
        (GatherConfig { blocks: 0, ..good }, "blocks"),
        (GatherConfig { host_pages: 1 << 31, ..good }, "host_pages"),
    ] {
        match GatherPlan::new(config) {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
}

//! The weighted split: every group of tokens in exactly one part, and equal bytes for every block.

use std::collections::{BTreeMap, BTreeSet};

use cuda::kernels::conformance::WeightedParts;
use cuda::kernels::kv_compress::{fdc_heads, max_parts};
use cuda::params::{FDC_SPLIT_BALANCED, FDC_SPLIT_FIXED, FDC_SPLIT_NONE, FdcDecodeParams};
use emulator::rig::Rig;

emulator::device_test!(parts_cover_everything_once, blocks_get_equal_bytes);

/// Tokens of a unit of the plan's sums, and groups in it.
const UNIT: u32 = 64;
const UNIT_GROUPS: u32 = 4;
/// Bytes of 16 tokens of 16 channels.
const WEIGHT_BYTES: u64 = 512;

struct Case {
    name: &'static str,
    ranks: Vec<(usize, usize)>,
    column_blocks: u32,
    kv_lens: Vec<u32>,
    blocks: usize,
}

impl Case {
    fn new(name: &'static str, ranks: &[(usize, usize)], kv_lens: Vec<u32>, blocks: usize) -> Self {
        Case { name, ranks: ranks.to_vec(), column_blocks: 1, kv_lens, blocks }
    }

    fn items(&self) -> u32 {
        self.ranks.len() as u32 * self.column_blocks
    }

    /// Weight of a group of an item.
    fn weight(&self, item: u32) -> u32 {
        let (k, v) = self.ranks[(item / self.column_blocks) as usize];
        ((k + v) / 16) as u32
    }

    /// Groups that the plan counts for a sequence: whole units, and one for an empty sequence.
    fn groups(&self, sequence: usize) -> u32 {
        self.kv_lens[sequence].div_ceil(UNIT).max(1) * UNIT_GROUPS
    }

    fn params(&self, split: u32) -> FdcDecodeParams {
        let mut params = FdcDecodeParams {
            batch: self.kv_lens.len() as u32,
            q_len: 1,
            group: 1,
            column_blocks: self.column_blocks,
            split,
            part_weight: 40,
            max_parts: 1,
            item_weight: 16,
            min_weight: 128,
            heads: fdc_heads(&self.ranks).expect("valid ranks"),
            ..bytemuck::Zeroable::zeroed()
        };
        params.max_parts = max_parts(&params, self.kv_lens.iter().copied().max().unwrap_or(0) as usize);
        params
    }
}

#[derive(Debug, Clone, Copy)]
struct Part {
    block: usize,
    sequence: u32,
    item: u32,
    groups: (u32, u32),
    index: u32,
    count: u32,
    slot: u32,
}

fn parts<R: Rig>(rig: &R, case: &Case, split: u32) -> Vec<Part> {
    let kernel = WeightedParts::prepare(rig.device()).expect("prepare");
    let mut first_unit = vec![0u32];
    for sequence in 0..case.kv_lens.len() {
        first_unit.push(first_unit[sequence] + case.groups(sequence) / UNIT_GROUPS);
    }
    let blocks = match split {
        FDC_SPLIT_NONE => case.kv_lens.len() * case.items() as usize,
        _ => case.blocks,
    };
    let room = 512;
    let first_unit = rig.upload(&first_unit);
    let mut listed = rig.poisoned::<u32>(blocks * room * 8);
    let mut counts = rig.poisoned::<u32>(blocks);
    kernel
        .launch(
            rig.queue(),
            &case.params(split),
            (blocks, room as u32),
            &rig.view(&first_unit),
            &mut rig.view_mut(&mut listed),
            &mut rig.view_mut(&mut counts),
        )
        .unwrap_or_else(|error| panic!("{} on {}: {error}", case.name, rig.name()));
    let (listed, counts) = (rig.download(&listed), rig.download(&counts));
    let mut parts = Vec::new();
    for (block, count) in counts.into_iter().enumerate() {
        assert!(count as usize <= room, "{}: block {block} has {count} parts", case.name);
        for part in listed[block * room * 8..][..count as usize * 8].chunks(8) {
            assert_eq!(part[6], part[7], "{}: the slot of {part:?}", case.name);
            parts.push(Part {
                block,
                sequence: part[0],
                item: part[1],
                groups: (part[2], part[3]),
                index: part[4],
                count: part[5],
                slot: part[6],
            });
        }
    }
    parts
}

/// Ranks of one Llama-like layer, wide and narrow.
const MIXED: [(usize, usize); 8] =
    [(16, 128), (48, 96), (128, 112), (32, 16), (64, 64), (16, 16), (96, 48), (80, 32)];
const ONE_WIDE: [(usize, usize); 8] =
    [(16, 16), (16, 16), (16, 16), (128, 128), (16, 16), (16, 16), (16, 16), (16, 16)];

fn parts_cover_everything_once<R: Rig>(rig: &R) {
    let ragged = vec![0, 1, 15, 16, 17, 63, 64, 65, 0, 0, 900, 2, 3000];
    let mut columns = Case::new("columns in two blocks", &MIXED[..3], ragged.clone(), 13);
    columns.column_blocks = 2;
    let cases = [
        Case::new("one token", &[(16, 16)], vec![1], 4),
        Case::new("ragged", &MIXED, ragged.clone(), 7),
        Case::new("ragged over more blocks than work", &ONE_WIDE, ragged, 500),
        Case::new("only empty sequences", &MIXED, vec![0; 40], 6),
        columns,
    ];
    for case in &cases {
        for split in [FDC_SPLIT_BALANCED, FDC_SPLIT_FIXED, FDC_SPLIT_NONE] {
            let name = format!("{} with split {split} on {}", case.name, rig.name());
            let mut items: BTreeMap<(u32, u32), Vec<Part>> = BTreeMap::new();
            let mut slots = BTreeSet::new();
            for part in parts(rig, case, split) {
                items.entry((part.sequence, part.item)).or_default().push(part);
                assert!(part.count == 1 || slots.insert(part.slot), "{name}: {part:?} shares its slot");
            }
            assert_eq!(items.len(), case.kv_lens.len() * case.items() as usize, "{name}: items");
            for ((sequence, item), mut parts) in items {
                parts.sort_by_key(|part| part.index);
                let mut next = 0;
                for (index, part) in parts.iter().enumerate() {
                    assert_eq!(
                        (part.index, part.count),
                        (index as u32, parts.len() as u32),
                        "{name}: {part:?}"
                    );
                    assert_eq!(part.groups.0, next, "{name}: {part:?}");
                    assert!(part.groups.1 >= next, "{name}: {part:?}");
                    next = part.groups.1;
                    let bytes = u64::from(part.groups.1 - part.groups.0) * u64::from(case.weight(item));
                    assert!(split != FDC_SPLIT_FIXED || bytes <= 40, "{name}: {part:?} has {bytes} weights");
                }
                assert_eq!(next, case.groups(sequence as usize), "{name}: sequence {sequence}, item {item}");
            }
        }
    }
}

/// Largest bytes of a block over the mean of all blocks.
fn imbalance(case: &Case, parts: &[Part]) -> f64 {
    let blocks = parts.iter().map(|part| part.block + 1).max().unwrap_or(1);
    let mut bytes = vec![0u64; blocks];
    for part in parts {
        bytes[part.block] +=
            u64::from(part.groups.1 - part.groups.0) * u64::from(case.weight(part.item)) * WEIGHT_BYTES;
    }
    let (largest, sum) = (bytes.iter().copied().max().unwrap_or(0), bytes.iter().sum::<u64>());
    largest as f64 * blocks as f64 / sum as f64
}

fn blocks_get_equal_bytes<R: Rig>(rig: &R) {
    // Three blocks on each of an H200's SMs.
    let blocks = 3 * 132;
    let mut ragged = vec![4096; 63];
    ragged.push(131_072);
    let cases = [
        Case::new("batch 16 of 32K", &MIXED, vec![32_768; 16], blocks),
        Case::new("one sequence of 128K", &MIXED, vec![131_072], blocks),
        Case::new("one wide head, batch 16 of 32K", &ONE_WIDE, vec![32_768; 16], blocks),
        Case::new("one wide head, one sequence of 128K", &ONE_WIDE, vec![131_072], blocks),
        Case::new("one long among short", &MIXED, ragged, blocks),
    ];
    for case in &cases {
        let name = format!("{} on {}", case.name, rig.name());
        let balanced = imbalance(case, &parts(rig, case, FDC_SPLIT_BALANCED));
        assert!(balanced <= 1.05, "{name}: the largest block has {balanced:.3} of the mean");
        let unbalanced = imbalance(case, &parts(rig, case, FDC_SPLIT_NONE));
        assert!(unbalanced > 1.5, "{name}: without balancing {unbalanced:.3}, so this shows nothing");
    }
}

//! Tables of slots against a plain map, and their size.

use std::collections::HashMap;

use attention::testing::Rng;
use sparse_attn::metadata::{Metadata, NONE, SlotScan, TwoLevel};

fn against_a_map<M: Metadata>(slots: usize, pages: usize, seed: u64) -> M {
    let mut rng = Rng::new(seed);
    let (mut table, mut map) = (M::new(slots), HashMap::new());
    for operation in 0..100_000 {
        let name = format!("seed {seed}, operation {operation}");
        let (page, slot) = (rng.below(pages) as u32, rng.below(slots));
        match rng.below(3) {
            0 if !map.contains_key(&page) && table.owner(slot) == NONE => {
                table.insert(slot, page);
                map.insert(page, slot);
            }
            1 => {
                let owner = table.remove(slot);
                let expected = map.iter().find(|&(_, &at)| at == slot).map_or(NONE, |(&page, _)| page);
                assert_eq!(owner, expected, "{name}");
                map.remove(&owner);
            }
            _ => assert_eq!(table.lookup(page), map.get(&page).copied(), "{name}"),
        }
    }
    let all: Vec<u32> = (0..pages as u32).collect();
    let expected: Vec<u32> = all.iter().map(|page| map.get(page).map_or(NONE, |&slot| slot as u32)).collect();
    assert_eq!(table.lookup_all(&all), expected);
    for slot in 0..slots {
        map.remove(&table.remove(slot));
    }
    assert!(map.is_empty());
    table
}

#[test]
fn tables_are_maps() {
    for (slots, pages, seed) in [(1, 3, 1), (40, 60, 2), (130, 4000, 3)] {
        against_a_map::<SlotScan>(slots, pages, seed);
        let empty = against_a_map::<TwoLevel>(slots, pages, seed);
        assert_eq!(empty.segments(), 0, "{slots} slots: no segment outlives its last entry");
    }
    assert_eq!(SlotScan::new(3).lookup(NONE), None, "a free slot holds no page");
    assert_eq!(TwoLevel::new(3).lookup(NONE), None);
}

/// 128 Ki tokens in pages of 8, 1.56 % of them selected, five times as much kept for reuse.
#[test]
fn size_follows_the_working_set() {
    let pages = 131_072 / 8;
    let slots = (pages as f64 * 0.0156 * 6.0) as usize;
    let flat = 4 * pages;
    let (mut scan, mut two) = (SlotScan::new(slots), TwoLevel::new(slots));
    let mut rng = Rng::new(1);
    for slot in 0..slots {
        let page = loop {
            let page = rng.below(pages) as u32;
            if two.lookup(page).is_none() {
                break page;
            }
        };
        two.insert(slot, page);
        scan.insert(slot, page);
    }
    assert_eq!(scan.bytes(), 4 * slots, "owners alone; ages and flags add 2 bytes a slot");
    assert!(scan.bytes() * 8 < flat, "{} bytes, flat {flat}", scan.bytes());
    assert!(two.table_bytes() * 3 <= flat, "{} bytes, flat {flat}", two.table_bytes());
    (0..slots).for_each(|slot| assert_ne!(two.remove(slot), NONE));
    assert_eq!(two.segments(), 0);
}

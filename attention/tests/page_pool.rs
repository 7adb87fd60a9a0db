//! The page pool against a naive model, over random sequences of operations.

mod common;

use std::collections::HashMap;

use attention::page_pool::{PagePool, PageRef, PagedSequence};
use attention::testing::Rng;
use attention::{BlockTable, Error, HeadShape, KeyValues, PageLayout, PageStore, PagedKv, PagedLengths};
use longkv_attention as attention;
use proptest::prelude::*;

const PAGE_BYTES: usize = 48;

/// What the pool should be: every live page with its owners and bytes.
#[derive(Default)]
struct Model {
    pages: HashMap<PageRef, (u32, Vec<u8>)>,
    peak: usize,
    copies: u64,
}

/// One random step on pool and model.
fn step(pool: &mut PagePool, model: &mut Model, handles: &mut Vec<PageRef>, capacity: usize, rng: &mut Rng) {
    let free = capacity - model.pages.len();
    let any = handles.get(rng.below(handles.len())).copied();
    match (rng.below(7), any) {
        (0, _) => match pool.allocate() {
            Ok(page) => {
                assert!(free > 0, "allocated a page that is not free");
                assert!(model.pages.keys().all(|live| live.index() != page.index()), "allocated twice");
                let bytes = pool.bytes(page).unwrap().to_vec();
                model.pages.insert(page, (1, bytes));
                handles.push(page);
            }
            Err(error) => assert_eq!(error, Error::OutOfPages { requested: 1, free: 0, capacity }),
        },
        (1, _) => {
            let requested = rng.below(4);
            match pool.allocate_many(requested) {
                Ok(pages) => {
                    assert_eq!(pages.len(), requested);
                    for page in pages {
                        let bytes = pool.bytes(page).unwrap().to_vec();
                        assert!(model.pages.insert(page, (1, bytes)).is_none());
                        handles.push(page);
                    }
                }
                Err(error) => assert_eq!(error, Error::OutOfPages { requested, free, capacity }),
            }
        }
        (2, Some(page)) => match model.pages.get_mut(&page) {
            Some((owners, _)) => {
                pool.share(page).unwrap();
                *owners += 1;
            }
            None => assert!(matches!(pool.share(page), Err(Error::StalePage { .. }))),
        },
        (3 | 4, Some(page)) => match model.pages.get_mut(&page) {
            Some((owners, _)) => {
                *owners -= 1;
                let freed = *owners == 0;
                assert_eq!(pool.release(page), Ok(freed));
                if freed {
                    // The handle stays in `handles`: using it must be an error from now on.
                    model.pages.remove(&page);
                }
            }
            None => assert!(matches!(pool.release(page), Err(Error::StalePage { .. }))),
        },
        (5, Some(page)) => match model.pages.get(&page).cloned() {
            Some((1, _)) => assert_eq!(pool.make_unique(page), Ok(page)),
            Some((owners, bytes)) => match pool.make_unique(page) {
                Ok(copy) => {
                    assert_ne!(copy.index(), page.index());
                    model.pages.insert(page, (owners - 1, bytes.clone()));
                    model.pages.insert(copy, (1, bytes));
                    model.copies += 1;
                    handles.push(copy);
                }
                Err(error) => assert_eq!(error, Error::OutOfPages { requested: 1, free: 0, capacity }),
            },
            None => assert!(matches!(pool.make_unique(page), Err(Error::StalePage { .. }))),
        },
        (6, Some(page)) => match model.pages.get_mut(&page) {
            Some((1, bytes)) => {
                bytes.fill_with(|| rng.bits() as u8);
                pool.bytes_mut(page).unwrap().copy_from_slice(bytes);
            }
            Some((owners, _)) => {
                let expected = Error::SharedPage { page: page.index(), owners: *owners };
                assert_eq!(pool.bytes_mut(page), Err(expected));
            }
            None => assert!(matches!(pool.bytes_mut(page), Err(Error::StalePage { .. }))),
        },
        _ => {}
    }
    model.peak = model.peak.max(model.pages.len());
}

proptest! {
    #![proptest_config(common::config(64))]

    #[test]
    fn behaves_as_the_model(capacity in 0usize..9, steps in 1usize..200, seed in any::<u64>()) {
        let mut pool = PagePool::new(capacity, PAGE_BYTES).unwrap();
        let (mut model, mut handles, mut rng) = (Model::default(), Vec::new(), Rng::new(seed));
        for step_number in 0..steps {
            step(&mut pool, &mut model, &mut handles, capacity, &mut rng);
            for (&page, (owners, bytes)) in &model.pages {
                prop_assert_eq!(pool.owners(page), Ok(*owners), "step {}, seed {}", step_number, seed);
                prop_assert_eq!(pool.bytes(page).unwrap(), &bytes[..], "step {}, seed {}", step_number, seed);
            }
            let usage = pool.usage();
            let shared = model.pages.values().filter(|(owners, _)| *owners > 1).count();
            prop_assert_eq!((usage.used, usage.shared), (model.pages.len(), shared));
            prop_assert_eq!((usage.peak, usage.copies), (model.peak, model.copies));
            prop_assert_eq!(usage.free() + usage.used, capacity);
            prop_assert_eq!(usage.used_bytes(), usage.used * PAGE_BYTES);
        }
    }

    /// Sequences that fork, append, truncate and end: each reads back its own tokens, and every page comes home.
    #[test]
    fn forked_sequences_keep_their_own_tokens(
        capacity in 1usize..12, page_size in 1usize..5, steps in 1usize..150, seed in any::<u64>()
    ) {
        let mut pool = PagePool::new(capacity, 16 * page_size).unwrap();
        let mut rng = Rng::new(seed);
        let mut sequences = vec![(PagedSequence::new(page_size).unwrap(), Vec::<u128>::new())];
        for _ in 0..steps {
            let at = rng.below(sequences.len());
            match rng.below(8) {
                0 => {
                    let tokens = sequences[at].1.clone();
                    let fork = sequences[at].0.fork(&mut pool).unwrap();
                    sequences.push((fork, tokens));
                }
                1 => {
                    let (sequence, tokens) = &mut sequences[at];
                    let keep = rng.below(tokens.len() + 2);
                    sequence.truncate(&mut pool, keep).unwrap();
                    tokens.truncate(keep);
                }
                2 if sequences.len() > 1 => sequences.swap_remove(at).0.release(&mut pool).unwrap(),
                _ => {
                    let (sequence, tokens) = &mut sequences[at];
                    match sequence.append(&mut pool) {
                        Ok(slot) => {
                            tokens.push(u128::from(rng.bits()));
                            let bytes = pool.bytes_mut(slot.page).unwrap();
                            bytes[slot.index * 16..][..16].copy_from_slice(&tokens[tokens.len() - 1].to_ne_bytes());
                            prop_assert_eq!(sequence.slot(tokens.len() - 1), Some(slot));
                        }
                        Err(error) => {
                            prop_assert_eq!(error, Error::OutOfPages { requested: 1, free: 0, capacity });
                        }
                    }
                }
            }
            for (sequence, tokens) in &sequences {
                prop_assert_eq!(sequence.tokens(), tokens.len(), "seed {}", seed);
                prop_assert_eq!(sequence.pages().len(), tokens.len().div_ceil(page_size));
                prop_assert_eq!(sequence.slot(tokens.len()), None);
                for (token, value) in tokens.iter().enumerate() {
                    let slot = sequence.slot(token).unwrap();
                    let bytes = &pool.bytes(slot.page).unwrap()[slot.index * 16..][..16];
                    prop_assert_eq!(bytes, &value.to_ne_bytes()[..], "token {}, seed {}", token, seed);
                }
            }
        }
        for (sequence, _) in sequences {
            sequence.release(&mut pool).unwrap();
        }
        prop_assert_eq!(pool.usage().used, 0, "seed {}", seed);
    }
}

#[test]
fn handles_of_another_pool_or_a_past_page_are_stale() {
    let mut pool = PagePool::new(2, 16).unwrap();
    let mut other = PagePool::new(9, 16).unwrap();
    let foreign = other.allocate_many(9).unwrap()[8];
    assert!(matches!(pool.bytes(foreign), Err(Error::StalePage { page: 8, .. })));
    let page = pool.allocate().unwrap();
    // A page of the same number and generation lives in both.
    let twin = PagePool::new(2, 16).unwrap().allocate().unwrap();
    assert_eq!(twin.index(), page.index());
    assert!(matches!(pool.release(twin), Err(Error::StalePage { page: 0, .. })));
    let mut sequence = PagedSequence::new(1).unwrap();
    sequence.append(&mut other).unwrap_err();
    other.release(foreign).unwrap();
    sequence.append(&mut other).unwrap();
    assert!(matches!(sequence.append(&mut pool), Err(Error::StalePage { .. })), "on a page's boundary");
    assert!(matches!(sequence.release(&mut pool), Err(Error::StalePage { .. })));
    assert_eq!(pool.usage().used, 1);
    assert_eq!(pool.release(page), Ok(true));
    let again = pool.allocate().unwrap();
    assert_eq!(again.index(), page.index(), "last freed, first used");
    for stale in [pool.owners(page).err(), pool.release(page).err(), pool.bytes(page).err()] {
        assert_eq!(stale, Some(Error::StalePage { page: page.index(), generation: 0 }));
    }
    assert_eq!(pool.owners(again), Ok(1));
}

#[test]
fn a_fork_that_fails_shares_nothing() {
    let mut pool = PagePool::new(3, 16).unwrap();
    let mut sequence = PagedSequence::new(1).unwrap();
    let slots = [(); 3].map(|()| sequence.append(&mut pool).unwrap());
    pool.release(slots[2].page).unwrap();
    assert!(matches!(sequence.fork(&mut pool), Err(Error::StalePage { .. })));
    assert_eq!(slots[..2].iter().map(|slot| pool.owners(slot.page)).collect::<Vec<_>>(), [Ok(1), Ok(1)]);
}

#[test]
fn refused_pools() {
    for (case, capacity, page_bytes) in [
        ("no bytes", 1, 0),
        ("unaligned", 1, 24),
        ("too many pages", 1 << 33, 16),
        ("bytes that overflow", 1 << 20, 1 << 60),
        ("bytes that no memory has", 1 << 20, 1 << 40),
    ] {
        assert!(matches!(PagePool::new(capacity, page_bytes), Err(Error::Argument { .. })), "{case}");
    }
    assert!(PagedSequence::new(0).is_err());
}

/// Pages are what paged attention reads: the elements of the pool are a page store.
#[test]
fn pool_pages_make_a_paged_cache() {
    let (page_size, dim) = (4, 8);
    // [key or value, page_size, dim] f32.
    let mut pool = PagePool::new(5, 2 * page_size * dim * 4).unwrap();
    let mut sequence = PagedSequence::new(page_size).unwrap();
    pool.allocate().unwrap();
    for token in 0..6 {
        let slot = sequence.append(&mut pool).unwrap();
        let page: &mut [f32] = bytemuck::cast_slice_mut(pool.bytes_mut(slot.page).unwrap());
        page[slot.index * dim..][..dim].fill(token as f32);
        page[(page_size + slot.index) * dim..][..dim].fill(-(token as f32));
    }
    let elements: &[f32] = pool.elements().unwrap();
    let layout = PageLayout { page_stride: 64, token_stride: dim as u64, head_stride: 0 };
    let k = PageStore::new(elements, 5, page_size, 1, dim, layout).unwrap();
    let v = PageStore::new(&elements[page_size * dim..], 5, page_size, 1, dim, layout).unwrap();
    let ids: Vec<u32> = sequence.pages().iter().map(|page| page.index()).collect();
    let table = BlockTable::shared(&ids, 1, 2).unwrap();
    let kv = PagedKv::new(k, v, table, PagedLengths::Tokens(&[6])).unwrap();
    kv.check(&HeadShape::new(1, 1, dim, dim).unwrap()).unwrap();
    let firsts: Vec<(f32, f32)> =
        kv.tokens(0, 0).unwrap().iter().map(|token| (token.key[0], token.value[7])).collect();
    assert_eq!(firsts, [(0.0, -0.0), (1.0, -1.0), (2.0, -2.0), (3.0, -3.0), (4.0, -4.0), (5.0, -5.0)]);
    assert!(pool.elements::<[u8; 7]>().is_err());
}

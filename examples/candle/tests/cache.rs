//! Sequences over a paged cache: growing, forking, ending.

mod common;

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use common::{assert_error, flat};
use longkv_candle::{CacheShape, PagedAppend, PagedCache, PagedSequence};

const SHAPE: CacheShape = CacheShape { layers: 2, pages: 6, page_size: 8, kv_heads: 1, head_dim: 64 };

fn cache() -> Result<PagedCache> {
    PagedCache::new(SHAPE, DType::F32, &Device::Cpu)
}

/// Grows one sequence by `tokens` tokens of this value in every layer, keys and values alike.
fn write(cache: &mut PagedCache, sequence: &mut PagedSequence, tokens: usize, value: f32) -> Result<()> {
    let slots = cache.grow(std::slice::from_mut(sequence), &[tokens])?;
    let new = Tensor::full(value, (tokens, 1, 64), &Device::Cpu)?;
    for layer in 0..SHAPE.layers {
        let append = PagedAppend::prepare(cache.kv(layer)?)?;
        append.append(cache.kv(layer)?, &new, &new, &slots)?;
        append.check()?;
    }
    Ok(())
}

/// The first channel of every token of a sequence, in a layer.
fn read(cache: &PagedCache, sequence: &PagedSequence, layer: usize) -> Result<Vec<f32>> {
    let tokens = (0..sequence.tokens()).map(|token| sequence.slot(token).expect("a token of the sequence"));
    let (k, v) = (cache.k(layer)?, cache.v(layer)?);
    tokens
        .map(|slot| {
            let at =
                |half: &Tensor| half.i((slot.page.index() as usize, slot.index, 0, 0))?.to_scalar::<f32>();
            assert_eq!(at(&k)?, at(&v)?, "keys and values were written alike");
            at(&k)
        })
        .collect()
}

#[test]
fn a_fork_shares_pages_until_one_of_the_two_writes() -> Result<()> {
    let mut cache = cache()?;
    let mut first = cache.sequence()?;
    write(&mut cache, &mut first, 11, 1.0)?;
    let mut second = cache.fork(&first)?;
    assert_eq!((cache.usage().used, cache.usage().shared), (2, 2));

    write(&mut cache, &mut second, 1, 2.0)?;
    write(&mut cache, &mut first, 2, 3.0)?;
    let usage = cache.usage();
    assert_eq!((usage.used, usage.shared, usage.copies), (3, 1, 1), "the full page stays shared");
    let ones = [1.0; 11];
    for layer in 0..SHAPE.layers {
        assert_eq!(read(&cache, &first, layer)?, [&ones[..], &[3.0, 3.0]].concat(), "layer {layer}");
        assert_eq!(read(&cache, &second, layer)?, [&ones[..], &[2.0]].concat(), "layer {layer}");
    }
    cache.release(first)?;
    assert_eq!(read(&cache, &second, 1)?, [&ones[..], &[2.0]].concat());
    cache.release(second)?;
    assert_eq!(cache.usage().used, 0);
    Ok(())
}

#[test]
fn slots_and_tables_agree() -> Result<()> {
    let mut cache = cache()?;
    let mut sequences = [cache.sequence()?, cache.sequence()?, cache.sequence()?];
    let slots: Vec<i64> = cache.grow(&mut sequences, &[9, 0, 3])?.to_vec1()?;
    let (kv_len, block_table) = cache.tables(&sequences, 3)?;
    assert_eq!(kv_len.to_vec1::<u32>()?, [9, 0, 3]);
    let table: Vec<Vec<u32>> = block_table.to_vec2()?;
    let slot = |sequence: usize, token: usize| i64::from(table[sequence][token / 8]) * 8 + token as i64 % 8;
    let expected: Vec<i64> =
        (0..9).map(|token| slot(0, token)).chain((0..3).map(|token| slot(2, token))).collect();
    assert_eq!(slots, expected);
    assert_error(
        "a short table",
        cache.tables(&sequences, 1),
        &["`sequences`", "at most 1 pages each, found 2"],
    );
    Ok(())
}

#[test]
fn a_full_cache_leaves_every_sequence_as_long_as_it_was() -> Result<()> {
    let mut cache = cache()?;
    let mut sequences = [cache.sequence()?, cache.sequence()?];
    cache.grow(&mut sequences, &[5, 17])?;
    let result = cache.grow(&mut sequences, &[10, 30]);
    assert_error("50 tokens more", result, &["paged cache: page pool: 1 pages requested, 0 of 6 free"]);
    assert_eq!(sequences.each_ref().map(PagedSequence::tokens), [5, 17]);
    assert_eq!(cache.usage().used, 4);
    cache.grow(&mut sequences, &[3, 7 + 16])?;
    assert_eq!(cache.usage().used, 6);
    Ok(())
}

#[test]
fn refusals_name_the_argument() -> Result<()> {
    let new = |shape| PagedCache::new(shape, DType::F16, &Device::Cpu);
    for (name, shape, part) in [
        ("no layer", CacheShape { layers: 0, ..SHAPE }, "`layers`: expected at least 1, found 0"),
        ("no page", CacheShape { pages: 0, ..SHAPE }, "`pages`"),
        (
            "page of 12",
            CacheShape { page_size: 12, ..SHAPE },
            "`page_size`: expected a power of two from 8 on, found 12",
        ),
        ("no channel", CacheShape { head_dim: 0, ..SHAPE }, "`head_dim`"),
    ] {
        assert_error(name, new(shape), &["paged cache", part]);
    }
    let mut cache = cache()?;
    assert_error("layer 2", cache.k(2), &["`layer`: expected below 2, found 2"]);
    let mut sequences = [cache.sequence()?];
    assert_error(
        "two counts",
        cache.grow(&mut sequences, &[1, 1]),
        &["`new_tokens`: expected 1 numbers, found 2"],
    );
    Ok(())
}

#[test]
fn zeroed_at_first() -> Result<()> {
    let cache = cache()?;
    let [k, v] = [cache.k(1)?, cache.v(1)?];
    assert_eq!(k.dims(), [6, 8, 1, 64]);
    assert!(flat(&k)?.iter().chain(&flat(&v)?).all(|x| *x == 0.0));
    Ok(())
}

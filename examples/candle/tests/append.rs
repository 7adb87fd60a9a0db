//! Appends against a scatter in plain loops.

mod common;

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use common::{DTYPES, assert_error, flat, random};
use longkv_candle::PagedAppend;

const PAGES: usize = 3;
const PAGE_SIZE: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
/// First and last slot, out of order, one skipped, page boundaries.
const SLOTS: [i64; 6] = [23, 0, -1, 7, 8, 12];

fn cache(dtype: DType) -> Result<Tensor> {
    random(&[2, PAGES, PAGE_SIZE, KV_HEADS, DIM], dtype, 1)
}

fn slots(slots: &[i64]) -> Result<Tensor> {
    Tensor::new(slots, &Device::Cpu)
}

/// What the cache holds at a slot: keys or values `[kv_heads, dim]`.
fn at(kv: &Tensor, half: usize, slot: usize) -> Result<Vec<f32>> {
    flat(&kv.i((half, slot / PAGE_SIZE, slot % PAGE_SIZE))?)
}

/// Every slot that `SLOTS` names holds its new token, every other one what it held before.
fn assert_written(case: &str, kv: &Tensor, before: &Tensor, new: [&Tensor; 2]) -> Result<()> {
    for (half, new) in new.into_iter().enumerate() {
        for slot in 0..PAGES * PAGE_SIZE {
            let expected = match SLOTS.iter().position(|&named| named == slot as i64) {
                Some(token) => flat(&new.get(token)?)?,
                None => at(before, half, slot)?,
            };
            assert_eq!(at(kv, half, slot)?, expected, "{case}: half {half}, slot {slot}");
        }
    }
    Ok(())
}

#[test]
fn writes_named_slots_and_no_others() -> Result<()> {
    for dtype in DTYPES {
        let tokens = SLOTS.len();
        let fused = random(&[tokens, 4 * KV_HEADS, DIM], dtype, 2)?; // q, k and v of one projection
        let packed = |seed| random(&[tokens, KV_HEADS, DIM], dtype, seed);
        let fused_k = fused.narrow(1, 2 * KV_HEADS, KV_HEADS)?;
        let fused_v = fused.narrow(1, 3 * KV_HEADS, KV_HEADS)?;
        assert!(!fused_k.is_contiguous());

        let hnd = |kv: Tensor| kv.transpose(2, 3)?.contiguous()?.transpose(2, 3);
        let middle = |kv: Tensor| Tensor::cat(&[&kv, &kv, &kv], 1)?.narrow(1, PAGES, PAGES);
        for (name, kv, k_new, v_new) in [
            ("packed", cache(dtype)?, packed(3)?, packed(4)?),
            ("fused projection", cache(dtype)?, fused_k.clone(), fused_v.clone()),
            ("pages by head", hnd(cache(dtype)?)?, packed(5)?, fused_v.clone()),
            ("pages of a larger cache", middle(cache(dtype)?)?, fused_k, packed(6)?),
        ] {
            let append = PagedAppend::prepare(&kv)?;
            append.append(&kv, &k_new, &v_new, &slots(&SLOTS)?)?;
            append.check()?;
            assert_written(&format!("{name}, {dtype:?}"), &kv, &cache(dtype)?, [&k_new, &v_new])?;
        }
    }
    Ok(())
}

#[test]
fn pages_around_a_view_stay_as_they_are() -> Result<()> {
    let whole = random(&[2, 3 * PAGES, PAGE_SIZE, KV_HEADS, DIM], DType::F16, 8)?;
    let before = whole.copy()?;
    let kv = whole.narrow(1, PAGES, PAGES)?;
    let new = random(&[SLOTS.len(), KV_HEADS, DIM], DType::F16, 9)?;
    PagedAppend::prepare(&kv)?.append(&kv, &new, &new, &slots(&SLOTS)?)?;
    assert_ne!(flat(&whole)?, flat(&before)?, "the view's own pages are written through");
    for start in [0, 2 * PAGES] {
        let (found, expected) = (whole.narrow(1, start, PAGES)?, before.narrow(1, start, PAGES)?);
        assert_eq!(flat(&found)?, flat(&expected)?, "pages from {start}");
    }
    Ok(())
}

#[test]
fn nothing_and_one_token() -> Result<()> {
    let kv = cache(DType::BF16)?;
    let append = PagedAppend::prepare(&kv)?;
    let new = random(&[2, KV_HEADS, DIM], DType::BF16, 3)?;
    append.append(&kv, &new.narrow(0, 0, 0)?, &new.narrow(0, 0, 0)?, &slots(&[])?)?;
    assert_eq!(flat(&kv)?, flat(&cache(DType::BF16)?)?);
    append.append(&kv, &new.narrow(0, 1, 1)?, &new.narrow(0, 0, 1)?, &slots(&[5])?)?;
    assert_eq!(at(&kv, 0, 5)?, flat(&new.get(1)?)?);
    assert_eq!(at(&kv, 1, 5)?, flat(&new.get(0)?)?);
    append.check()
}

#[test]
fn a_slot_outside_the_cache_is_named_and_the_others_are_written() -> Result<()> {
    let kv = cache(DType::F32)?;
    let append = PagedAppend::prepare(&kv)?;
    let new = random(&[3, KV_HEADS, DIM], DType::F32, 3)?;
    append.append(&kv, &new, &new, &slots(&[4, (PAGES * PAGE_SIZE) as i64, 6])?)?;
    assert_error("past the end", append.check(), &["paged append: token 1: its slot lies outside the cache"]);
    append.check()?; // told once
    assert_eq!([at(&kv, 0, 4)?, at(&kv, 1, 6)?], [flat(&new.get(0)?)?, flat(&new.get(2)?)?]);
    Ok(())
}

#[test]
fn refusals_name_the_argument_and_write_nothing() -> Result<()> {
    let kv = cache(DType::F16)?;
    let append = PagedAppend::prepare(&kv)?;
    let new = random(&[2, KV_HEADS, DIM], DType::F16, 3)?;
    let two = slots(&[0, 1])?;

    let interleaved = random(&[PAGES, 2, PAGE_SIZE, KV_HEADS, DIM], DType::F16, 4)?.transpose(0, 1)?;
    let three = random(&[3, PAGES, PAGE_SIZE, KV_HEADS, DIM], DType::F16, 4)?;
    for (name, kv, parts) in [
        ("interleaved halves", interleaved, &["`kv`", "keys all come before its values"][..]),
        ("three halves", three, &["`kv`", "[2, pages, page_size, kv_heads, head_dim]", "[3, 3, 8, 2, 64]"]),
        ("f64", kv.to_dtype(DType::F64)?, &["unsupported dtype F64", "paged append"]),
    ] {
        assert_error(name, PagedAppend::prepare(&kv), parts);
    }

    let by_head = random(&[KV_HEADS, 2, DIM], DType::F16, 5)?.transpose(0, 1)?;
    let by_channel = random(&[2, DIM, KV_HEADS], DType::F16, 5)?.transpose(1, 2)?;
    let narrow = random(&[2, KV_HEADS, DIM + 4], DType::F16, 5)?.narrow(2, 0, DIM)?;
    let odd = random(&[2 * KV_HEADS * DIM + 16], DType::F16, 5)?.narrow(0, 4, 2 * KV_HEADS * DIM)?;
    let odd = odd.reshape((2, KV_HEADS, DIM))?;
    let own = kv.i((0, 0, 0..2))?;
    let f32s = new.to_dtype(DType::F32)?;
    let other = cache(DType::F16)?.narrow(1, 0, 2)?;
    for (name, kv, k_new, v_new, slots, parts) in [
        (
            "heads apart",
            &kv,
            &by_head,
            &new,
            &two,
            &["`k_new`", "heads are contiguous (call `.contiguous()`)"][..],
        ),
        ("channels apart", &kv, &new, &by_channel, &two, &["`v_new`", "heads are contiguous"]),
        (
            "gaps between heads",
            &kv,
            &narrow,
            &new,
            &two,
            &["`k_new`", "heads are contiguous", "strides [136, 68, 1]"],
        ),
        (
            "odd offset",
            &kv,
            &odd,
            &new,
            &two,
            &["`k_new`", "offset that is a multiple of 8 elements, found 4"],
        ),
        ("one value", &kv, &new, &new.narrow(0, 0, 1)?, &two, &["`v_new`", "[2, 2, 64]", "[1, 2, 64]"]),
        ("one slot", &kv, &new, &new, &slots(&[1])?, &["`slots`", "[2]", "[1]"]),
        (
            "unsigned slots",
            &kv,
            &new,
            &new,
            &two.to_dtype(DType::U32)?,
            &["`slots`", "expected: I64", "got: U32"],
        ),
        ("f32 keys", &kv, &f32s, &new, &two, &["`k_new`", "expected: F16", "got: F32"]),
        ("the cache's own keys", &kv, &own, &new, &two, &["paged append", "aliased"]),
        ("another cache", &other, &new, &new, &two, &["`kv`", "pages as prepared"]),
    ] {
        assert_error(name, append.append(kv, k_new, v_new, slots), parts);
    }
    let one_head = random(&[2, PAGES, PAGE_SIZE, 1, DIM], DType::F16, 6)?;
    let gaps = random(&[2, 1, DIM + 4], DType::F16, 7)?.narrow(2, 0, DIM)?;
    let result = PagedAppend::prepare(&one_head)?.append(&one_head, &gaps, &gaps, &two);
    assert_error("odd stride", result, &["`k_new`", "at least 64, a multiple of 8", "strides [68, 68, 1]"]);
    assert_eq!(flat(&kv)?, flat(&cache(DType::F16)?)?);
    append.check()
}

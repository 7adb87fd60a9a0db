//! Decode attention against candle's own ops.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::{DTYPES, assert_close, assert_error, flat, random, spec, tolerance};
use longkv_candle::{AttentionSpec, Mask, PagedDecode, StepShape, plain};

const PAGE_SIZE: usize = 8;
const MAX_PAGES: usize = 14;

/// How the pages of a test lie in memory.
#[derive(Debug, Clone, Copy)]
enum Lie {
    /// `[pages, page_size, heads, dim]`.
    Nhd,
    /// `[pages, heads, page_size, dim]`.
    Hnd,
    /// K and V side by side in the channels of one tensor.
    FusedChannels,
    /// Pages from the middle of a larger tensor.
    Narrowed,
}

const LIES: [Lie; 4] = [Lie::Nhd, Lie::Hnd, Lie::FusedChannels, Lie::Narrowed];

struct Case {
    name: &'static str,
    heads: (usize, usize),
    dim: usize,
    q_len: usize,
    kv_lens: &'static [u32],
    soft_cap: Option<f32>,
    mask: Mask,
}

const CASES: &[Case] = &[
    Case { name: "lengths around a page", ..Case::of((4, 4), 64, 1, &[0, 1, 7, 8, 9, 100]) },
    Case { name: "GQA 4", ..Case::of((8, 2), 64, 1, &[33, 64]) },
    Case { name: "GQA 5", ..Case::of((10, 2), 128, 1, &[17]) },
    Case { name: "GQA 7", ..Case::of((7, 1), 64, 1, &[112, 3]) },
    Case { name: "GQA 16, one KV head", ..Case::of((16, 1), 64, 1, &[21]) },
    Case { name: "several queries", ..Case::of((6, 2), 64, 4, &[4, 0, 61]) },
    Case { name: "soft-cap", soft_cap: Some(2.0), ..Case::of((4, 2), 64, 1, &[50]) },
    Case {
        name: "window",
        mask: Mask::SlidingWindow { window: 10, sinks: 0 },
        ..Case::of((4, 2), 64, 2, &[50, 7])
    },
];

impl Case {
    const fn of(heads: (usize, usize), dim: usize, q_len: usize, kv_lens: &'static [u32]) -> Self {
        Case { name: "", heads, dim, q_len, kv_lens, soft_cap: None, mask: Mask::Causal }
    }

    fn spec(&self) -> AttentionSpec {
        let spec = AttentionSpec { mask: self.mask, ..spec(self.heads, self.dim) };
        match self.soft_cap {
            Some(cap) => {
                AttentionSpec { score: spec.score.with_soft_cap(cap).expect("a positive cap"), ..spec }
            }
            None => spec,
        }
    }

    fn step(&self) -> StepShape {
        StepShape { batch: self.kv_lens.len(), q_len: self.q_len, max_pages: MAX_PAGES }
    }
}

/// Keys, values, lengths and block table of a case. Slots that no sequence reaches hold NaN, and table entries past a
/// sequence's end name pages that do not exist.
struct Batch {
    k: Tensor,
    v: Tensor,
    kv_len: Tensor,
    block_table: Tensor,
}

fn batch(case: &Case, lie: Lie, dtype: DType, seed: u64) -> Result<Batch> {
    let (kv_heads, dim) = (case.heads.1, case.dim);
    let batch = case.kv_lens.len();
    let pages = batch * MAX_PAGES;
    let mut order: Vec<u32> = (0..pages as u32).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut order);

    let mut table = vec![u32::MAX; pages];
    let mut reached = vec![f32::NAN; pages * PAGE_SIZE];
    for (sequence, &tokens) in case.kv_lens.iter().enumerate() {
        for token in 0..tokens as usize {
            let entry = sequence * MAX_PAGES + token / PAGE_SIZE;
            table[entry] = order[entry];
            reached[order[entry] as usize * PAGE_SIZE + token % PAGE_SIZE] = 0.0;
        }
    }
    let reached = Tensor::from_vec(reached, (pages, PAGE_SIZE, 1, 1), &Device::Cpu)?;
    let shape = [pages, PAGE_SIZE, kv_heads, dim];
    let cache = |seed| random(&shape, DType::F32, seed)?.broadcast_add(&reached)?.to_dtype(dtype);
    let (k, v) = (cache(seed + 1)?, cache(seed + 2)?);
    let (k, v) = match lie {
        Lie::Nhd => (k, v),
        Lie::Hnd => {
            let hnd = |cache: Tensor| cache.transpose(1, 2)?.contiguous()?.transpose(1, 2);
            (hnd(k)?, hnd(v)?)
        }
        Lie::FusedChannels => {
            let fused = Tensor::cat(&[&k, &v], 3)?;
            (fused.narrow(3, 0, dim)?, fused.narrow(3, dim, dim)?)
        }
        Lie::Narrowed => {
            let other = random(&[3, PAGE_SIZE, kv_heads, dim], dtype, seed + 3)?;
            let larger = Tensor::cat(&[&other, &k, &v], 0)?;
            (larger.narrow(0, 3, pages)?, larger.narrow(0, 3 + pages, pages)?)
        }
    };
    let kv_len = Tensor::new(case.kv_lens, &Device::Cpu)?;
    Ok(Batch { k, v, kv_len, block_table: Tensor::from_vec(table, (batch, MAX_PAGES), &Device::Cpu)? })
}

fn queries(case: &Case, dtype: DType, seed: u64) -> Result<Tensor> {
    random(&[case.kv_lens.len(), case.q_len, case.heads.0, case.dim], dtype, seed + 4)
}

#[test]
fn equals_plain_candle() -> Result<()> {
    for (seed, case) in CASES.iter().enumerate() {
        for (dtype, lie) in DTYPES.into_iter().flat_map(|dtype| LIES.map(|lie| (dtype, lie))) {
            let name = format!("{}, {dtype:?}, {lie:?}, seed {seed}", case.name);
            let Batch { k, v, kv_len, block_table } = batch(case, lie, dtype, seed as u64)?;
            let q = queries(case, dtype, seed as u64)?;
            let mut decode = PagedDecode::prepare(case.spec(), case.step(), &k, &v)?;
            let found = decode.step(&kv_len, &block_table)?.attend(&q, &k, &v)?;
            decode.check()?;
            let expected = plain::attend(&case.spec(), (&q, &k, &v), (&kv_len, &block_table))?;
            assert_eq!((found.out.dtype(), found.lse.dtype()), (dtype, DType::F32), "{name}");
            assert_close(&format!("{name}: out"), &found.out, &expected.out, tolerance(dtype))?;
            assert_close(&format!("{name}: lse"), &found.lse, &expected.lse, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn queries_and_tables_may_be_views_at_an_offset() -> Result<()> {
    let case = &CASES[1];
    let Batch { k, v, kv_len, block_table } = batch(case, Lie::Nhd, DType::F16, 7)?;
    let q = queries(case, DType::F16, 7)?;
    let mut decode = PagedDecode::prepare(case.spec(), case.step(), &k, &v)?;
    let whole = decode.step(&kv_len, &block_table)?.attend(&q, &k, &v)?;

    let behind = |tensor: &Tensor| {
        Tensor::cat(&[&tensor.zeros_like()?, tensor], 0)?.narrow(0, tensor.dim(0)?, tensor.dim(0)?)
    };
    let (q, kv_len, block_table) = (behind(&q)?, behind(&kv_len)?, behind(&block_table)?);
    assert!(q.layout().start_offset() > 0 && kv_len.layout().start_offset() > 0);
    let view = decode.step(&kv_len, &block_table)?.attend(&q, &k, &v)?;
    assert_eq!(flat(&whole.out)?, flat(&view.out)?);
    assert_eq!(flat(&whole.lse)?, flat(&view.lse)?);
    Ok(())
}

#[test]
fn one_step_serves_every_layer_and_values_matter() -> Result<()> {
    let case = &CASES[1];
    let first = batch(case, Lie::Nhd, DType::F32, 11)?;
    let second = batch(case, Lie::Nhd, DType::F32, 11)?;
    let v = (second.v * 2.0)?;
    let q = queries(case, DType::F32, 11)?;
    let mut decode = PagedDecode::prepare(case.spec(), case.step(), &first.k, &first.v)?;
    let step = decode.step(&first.kv_len, &first.block_table)?;
    let one = step.attend(&q, &first.k, &first.v)?;
    let two = step.attend(&q, &second.k, &v)?;
    assert_close("doubled values", &two.out, &(one.out * 2.0)?, 1e-6)?;
    assert_eq!(flat(&one.lse)?, flat(&two.lse)?, "the same keys");
    Ok(())
}

#[test]
fn sequences_that_cannot_be_read_are_named_and_the_others_stay_right() -> Result<()> {
    let case = &Case::of((4, 2), 64, 1, &[20, 30, 40]);
    let Batch { k, v, kv_len, block_table } = batch(case, Lie::Nhd, DType::F16, 3)?;
    let q = queries(case, DType::F16, 3)?;
    let mut decode = PagedDecode::prepare(case.spec(), case.step(), &k, &v)?;
    let good = decode.step(&kv_len, &block_table)?.attend(&q, &k, &v)?;
    decode.check()?;

    let too_long = Tensor::new(&[20u32, (MAX_PAGES * PAGE_SIZE) as u32 + 1, 40], &Device::Cpu)?;
    let mut table: Vec<Vec<u32>> = block_table.to_vec2()?;
    table[1][2] = (3 * MAX_PAGES) as u32;
    let bad_page = Tensor::new(table, &Device::Cpu)?;
    for (name, kv_len, block_table, text) in [
        ("length", &too_long, &block_table, "sequence 1: its length exceeds its row of the block table"),
        ("page", &kv_len, &bad_page, "sequence 1: it names a page outside the cache"),
    ] {
        let found = decode.step(kv_len, block_table)?.attend(&q, &k, &v)?;
        assert_error(name, decode.check(), &["paged decode", text]);
        decode.check()?; // told once
        for sequence in [0, 2] {
            assert_eq!(
                flat(&found.out.get(sequence)?)?,
                flat(&good.out.get(sequence)?)?,
                "{name}: sequence {sequence}"
            );
        }
        assert!(flat(&found.out.get(1)?)?.iter().all(|x| *x == 0.0), "{name}: output of the bad sequence");
        assert!(
            flat(&found.lse.get(1)?)?.iter().all(|x| *x == f32::NEG_INFINITY),
            "{name}: its log-sum-exps"
        );
    }
    Ok(())
}

#[test]
fn refusals_name_the_argument() -> Result<()> {
    let case = &CASES[1]; // GQA 4: [2, 1, 8, 64] over 2 KV heads
    let Batch { k, v, kv_len, block_table } = batch(case, Lie::Nhd, DType::F16, 5)?;
    let q = queries(case, DType::F16, 5)?;
    let prepare = |spec, step, k: &Tensor, v: &Tensor| PagedDecode::prepare(spec, step, k, v);
    let (spec, step) = (case.spec(), case.step());

    // Preparing.
    let f64s = k.to_dtype(DType::F64)?;
    let bf16 = v.to_dtype(DType::BF16)?;
    let turned = k.transpose(2, 3)?.contiguous()?.transpose(2, 3)?;
    let odd = Tensor::cat(&[&k, &k.narrow(3, 0, 4)?], 3)?.narrow(3, 0, 64)?;
    let shifted = Tensor::cat(&[&k, &k], 3)?.narrow(3, 4, 64)?;
    let fused = Tensor::cat(&[&k, &k], 3)?;
    let six = k.narrow(1, 0, 6)?;
    for (name, result, parts) in [
        ("f64", prepare(spec, step, &f64s, &f64s), &["unsupported dtype F64", "paged decode"][..]),
        ("dtypes differ", prepare(spec, step, &k, &bf16), &["`v`", "expected: F16", "got: BF16"]),
        ("three dimensions", prepare(spec, step, &k.get(0)?, &v), &["expected: 4, got: 3", "paged decode"]),
        (
            "channels apart",
            prepare(spec, step, &turned, &v),
            &["`k`", "channels are contiguous", ".contiguous()"],
        ),
        ("odd strides", prepare(spec, step, &odd, &v), &["`k`", "strides that are multiples of 8"]),
        (
            "odd offset",
            prepare(spec, step, &shifted, &v),
            &["`k`", "offset that is a multiple of 8 elements, found 4"],
        ),
        (
            "page of six",
            prepare(spec, step, &six, &six),
            &["`k`", "page size that is a power of two from 8 on, found 6"],
        ),
        ("fewer pages of v", prepare(spec, step, &k, &v.narrow(0, 0, 5)?), &["`v`", "pages as those of `k`"]),
        (
            "other channels",
            prepare(spec, step, &k, &fused),
            &["pages of the heads of `spec`, 8q/2kv/d64", "64 and 128"],
        ),
        (
            "no batch",
            prepare(spec, StepShape { batch: 0, ..step }, &k, &v),
            &["`batch`: expected at least 1, found 0"],
        ),
        ("no page", prepare(spec, StepShape { max_pages: 0, ..step }, &k, &v), &["`max_pages`"]),
    ] {
        assert_error(name, result, parts);
    }

    // Planning.
    let mut decode = prepare(spec, step, &k, &v)?;
    let signed = kv_len.to_dtype(DType::I64)?;
    let columns = block_table.t()?.contiguous()?.t()?;
    for (name, kv_len, block_table, parts) in [
        ("signed lengths", &signed, &block_table, &["`kv_len`", "expected: U32", "got: I64"][..]),
        ("signed pages", &kv_len, &block_table.to_dtype(DType::I64)?, &["`block_table`", "expected: U32"]),
        ("one length", &kv_len.narrow(0, 0, 1)?, &block_table, &["`kv_len`", "[2]", "[1]"]),
        (
            "wide table",
            &kv_len,
            &Tensor::cat(&[&block_table, &block_table], 1)?,
            &["`block_table`", "[2, 28]"],
        ),
        ("table by columns", &kv_len, &columns, &["`block_table`", "contiguous", "strides [1, 2]"]),
    ] {
        assert_error(name, decode.step(kv_len, block_table).map(|_| ()), parts);
    }

    // Attending.
    let planned = decode.step(&kv_len, &block_table)?;
    let f32s = q.to_dtype(DType::F32)?;
    let by_heads = q.transpose(1, 2)?;
    let heads_first = Tensor::cat(&[&q, &q], 3)?.narrow(3, 0, 64)?;
    let hnd = k.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    for (name, q, k, v, parts) in [
        ("f32 queries", &f32s, &k, &v, &["`q`", "expected: F16", "got: F32"][..]),
        ("f32 values", &q, &k, &v.to_dtype(DType::F32)?, &["`v`", "got: F32"]),
        (
            "queries by head",
            &by_heads,
            &k,
            &v,
            &["paged decode: argument `q`", "[2, 1, 8, 64]", "[2, 8, 1, 64]"],
        ),
        (
            "queries with gaps",
            &heads_first,
            &k,
            &v,
            &["`q`", "contiguous tensor (call `.contiguous()`)", "strides"],
        ),
        ("queries of one sequence", &q.narrow(0, 0, 1)?, &k, &v, &["`q`", "[2, 1, 8, 64]", "[1, 1, 8, 64]"]),
        ("another layout", &q, &hnd, &v, &["`k`", "pages as prepared"]),
        ("fewer pages", &q, &k, &v.narrow(0, 0, 9)?, &["`v`", "pages as prepared", "pages: 9"]),
    ] {
        assert_error(name, planned.attend(q, k, v), parts);
    }
    planned.attend(&q, &k, &v).map(|_| ())
}

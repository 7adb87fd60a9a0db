//! The canonical layout of a segment: stable, documented, what goes over the wire.
//!
//! One KV head of a closed block of Π tokens, with `D` key channels, `E` value channels, `b` and `c` bits, and `P = D
//! / Π_c` and `R = E / Π_c` channel partitions. Fields follow each other without gaps; every one is a multiple of 16
//! bytes:
//!
//! | field | shape | type | bytes |
//! |---|---|---|---|
//! | `k_codes` | `[Π, D]` | `b`-bit codes | Π·D·b/8 |
//! | `k_scale` | `[D]` (`PerTokenKey`: `[Π, P]`) | f16 or bf16 | 2·D |
//! | `k_min` | as `k_scale` | f16 or bf16 | 2·D |
//! | `k_sums` | `[Π, P]`: sums of the codes of a token's partition | u8 or u16 | Π·P·(1 or 2) |
//! | `v_codes` | `[Π, E]` | `c`-bit codes | Π·E·c/8 |
//! | `v_scale` | `[Π, R]` (`PerTokenKey`: `[E]`) | f16 or bf16 | 2·Π·R |
//! | `v_min` | as `v_scale` | f16 or bf16 | 2·Π·R |
//! | `v_sums` | `[E]`: sums of a channel's codes over the tokens | u8 or u16 | E·(1 or 2) |
//!
//! Code `i` of a byte lies at bits `b·i` and up; codes follow the channels. Sums are u8 where the largest possible
//! sum fits (`count · (2^b - 1) <= 255`), else u16, and are absent without cached sums. Everything is little-endian.
//!
//! With Π = 64, `D = E = 128` and bf16, a 2-bit segment has 5376 bytes and a 4-bit one 9728.

use std::ops::Range;

use attention::DType;
use half::{bf16, f16};

use super::{HeadGeometry, SumType};
use crate::quantizer::Group;
use crate::{Bits, Error, HeadBlock};

/// Where each field lies in a segment, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fields {
    /// Key codes `[Π, D]`.
    pub k_codes: Range<usize>,
    /// Key scales.
    pub k_scale: Range<usize>,
    /// Key minima.
    pub k_min: Range<usize>,
    /// Sums of key codes; empty without cached sums.
    pub k_sums: Range<usize>,
    /// Value codes `[Π, E]`.
    pub v_codes: Range<usize>,
    /// Value scales.
    pub v_scale: Range<usize>,
    /// Value minima.
    pub v_min: Range<usize>,
    /// Sums of value codes; empty without cached sums.
    pub v_sums: Range<usize>,
    /// Bytes of the segment.
    pub bytes: usize,
}

impl Fields {
    /// The fields of a head's segment.
    pub fn new(head: &HeadGeometry) -> Self {
        let mut end = 0;
        let mut field = |bytes: usize| {
            end += bytes;
            end - bytes..end
        };
        let sums = |count: usize, of: SumType| if head.cached_sums { count * of.size() } else { 0 };
        let k_codes = field(head.partition * head.qk_dim / head.bits.k.codes_per_byte());
        let k_scale = field(2 * head.k_groups());
        let k_min = field(2 * head.k_groups());
        let k_sums = field(sums(head.partition * head.k_partitions(), head.k_sum_type()));
        let v_codes = field(head.partition * head.v_dim / head.bits.v.codes_per_byte());
        let v_scale = field(2 * head.v_groups());
        let v_min = field(2 * head.v_groups());
        let v_sums = field(sums(head.v_dim, head.v_sum_type()));
        Fields { k_codes, k_scale, k_min, k_sums, v_codes, v_scale, v_min, v_sums, bytes: end }
    }
}

/// Reads a segment. Sums that are not cached are added up.
pub(super) fn read(head: &HeadGeometry, segment: &[u8]) -> Result<HeadBlock, Error> {
    let fields = Fields::new(head);
    check(&fields, segment.len())?;
    let groups = |scale: &Range<usize>, min: &Range<usize>| {
        let scale = unpack_halves(&segment[scale.clone()], head.dtype);
        let min = unpack_halves(&segment[min.clone()], head.dtype);
        scale.zip(min).map(|(scale, min)| Group { scale, min }).collect()
    };
    let mut block = HeadBlock {
        k_codes: unpack_codes(&segment[fields.k_codes.clone()], head.bits.k),
        k_groups: groups(&fields.k_scale, &fields.k_min),
        k_sums: unpack_sums(&segment[fields.k_sums.clone()], head.k_sum_type()),
        v_codes: unpack_codes(&segment[fields.v_codes.clone()], head.bits.v),
        v_groups: groups(&fields.v_scale, &fields.v_min),
        v_sums: unpack_sums(&segment[fields.v_sums.clone()], head.v_sum_type()),
    };
    if !head.cached_sums {
        block.add_up_sums(head);
    }
    Ok(block)
}

/// Writes a segment, wholly.
pub(super) fn write(head: &HeadGeometry, block: &HeadBlock, segment: &mut [u8]) -> Result<(), Error> {
    let fields = Fields::new(head);
    check(&fields, segment.len())?;
    block.check(head)?;
    pack_codes(&block.k_codes, head.bits.k, &mut segment[fields.k_codes]);
    pack_codes(&block.v_codes, head.bits.v, &mut segment[fields.v_codes]);
    for (groups, scale, min) in
        [(&block.k_groups, fields.k_scale, fields.k_min), (&block.v_groups, fields.v_scale, fields.v_min)]
    {
        pack_halves(groups.iter().map(|group| group.scale), head.dtype, &mut segment[scale]);
        pack_halves(groups.iter().map(|group| group.min), head.dtype, &mut segment[min]);
    }
    pack_sums(&block.k_sums, head.k_sum_type(), &mut segment[fields.k_sums]);
    pack_sums(&block.v_sums, head.v_sum_type(), &mut segment[fields.v_sums]);
    Ok(())
}

fn check(fields: &Fields, found: usize) -> Result<(), Error> {
    if fields.bytes == found {
        return Ok(());
    }
    Err(Error::argument("segment", format!("{} bytes", fields.bytes), found))
}

/// Packs codes, the first in the lowest bits of a byte. `bytes` `[codes.len() · bits / 8]`.
///
/// # Panics
/// When `codes` is longer than `bytes` holds.
pub fn pack_codes(codes: &[u8], bits: Bits, bytes: &mut [u8]) {
    match bits {
        Bits::Two => pack_into::<4>(codes, 2, bytes),
        Bits::Four => pack_into::<2>(codes, 4, bytes),
        Bits::Eight => bytes.copy_from_slice(codes),
    }
}

fn pack_into<const PER_BYTE: usize>(codes: &[u8], width: usize, bytes: &mut [u8]) {
    assert_eq!(codes.len(), bytes.len() * PER_BYTE, "codes fill the bytes");
    for (byte, codes) in bytes.iter_mut().zip(codes.as_chunks::<PER_BYTE>().0) {
        *byte = codes.iter().enumerate().fold(0, |byte, (i, code)| byte | code << (width * i));
    }
}

/// Codes of packed bytes, one per byte.
pub fn unpack_codes(bytes: &[u8], bits: Bits) -> Vec<u8> {
    // A table turns a byte into all its codes at once: attention on the CPU unpacks every block that it reads.
    const TWO: [[u8; 4]; 256] = unpack_table(2);
    const FOUR: [[u8; 2]; 256] = unpack_table(4);
    let mut codes = vec![0; bytes.len() * bits.codes_per_byte()];
    match bits {
        Bits::Two => {
            let chunks = codes.as_chunks_mut::<4>().0;
            chunks.iter_mut().zip(bytes).for_each(|(codes, &byte)| *codes = TWO[byte as usize]);
        }
        Bits::Four => {
            let chunks = codes.as_chunks_mut::<2>().0;
            chunks.iter_mut().zip(bytes).for_each(|(codes, &byte)| *codes = FOUR[byte as usize]);
        }
        Bits::Eight => codes.copy_from_slice(bytes),
    }
    codes
}

/// The codes of every byte.
const fn unpack_table<const PER_BYTE: usize>(width: usize) -> [[u8; PER_BYTE]; 256] {
    let mut table = [[0; PER_BYTE]; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut i = 0;
        while i < PER_BYTE {
            table[byte][i] = (byte >> (width * i)) as u8 & ((1 << width) - 1);
            i += 1;
        }
        byte += 1;
    }
    table
}

/// Rounds values to a 16-bit type, little-endian. Exact for scales, minima and whatever was rounded before.
pub(crate) fn pack_halves(values: impl Iterator<Item = f32>, dtype: DType, bytes: &mut [u8]) {
    for (value, bytes) in values.zip(bytes.as_chunks_mut::<2>().0) {
        *bytes = match dtype {
            DType::F16 => f16::from_f32(value).to_le_bytes(),
            _ => bf16::from_f32(value).to_le_bytes(),
        };
    }
}

/// The f32 values of a 16-bit type, little-endian.
pub(crate) fn unpack_halves(bytes: &[u8], dtype: DType) -> impl Iterator<Item = f32> + '_ {
    bytes.as_chunks::<2>().0.iter().map(move |&bytes| match dtype {
        DType::F16 => f16::from_le_bytes(bytes).to_f32(),
        _ => bf16::from_le_bytes(bytes).to_f32(),
    })
}

fn pack_sums(sums: &[u16], of: SumType, bytes: &mut [u8]) {
    match of {
        SumType::U8 => bytes.iter_mut().zip(sums).for_each(|(byte, &sum)| *byte = sum as u8),
        SumType::U16 => {
            let pairs = bytes.as_chunks_mut::<2>().0;
            pairs.iter_mut().zip(sums).for_each(|(bytes, sum)| *bytes = sum.to_le_bytes());
        }
    }
}

fn unpack_sums(bytes: &[u8], of: SumType) -> Vec<u16> {
    match of {
        SumType::U8 => bytes.iter().map(|&byte| u16::from(byte)).collect(),
        SumType::U16 => bytes.as_chunks::<2>().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect(),
    }
}

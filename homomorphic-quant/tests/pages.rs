//! Sizes of pages to the byte, round trips of codes and blocks.

use attention::DType;
use attention::testing::{Inputs, Rng};
use homomorphic_quant::page::{PageGeometry, PageLayout, SidePage, SumType, canonical, transcode};
use homomorphic_quant::{Bits, BlockPlace, Config, HeadBlock, Layout, Rounding};

fn config(bits: usize, partition: usize) -> Config {
    let bits = Bits::new(bits).unwrap();
    Config::new(bits, bits).with_partition(partition).unwrap()
}

fn pages(config: &Config, kv_heads: usize, qk_dim: usize, v_dim: usize) -> PageGeometry {
    PageGeometry::new(config, PageLayout::Canonical, 0, kv_heads, qk_dim, v_dim).unwrap()
}

/// 8 KV heads of 128 channels: the sizes that the paper's release has, and what follows from them.
#[test]
fn sizes_to_the_byte() {
    for (bits, partition, page, of_bf16, sums_share) in [
        (2, 64, 43_008, 0.1641, 0.0476),
        (4, 64, 77_824, 0.2969, 0.0526),
        (8, 64, 143_360, 0.5469, 0.0286),
        (2, 32, 26_624, 0.2031, 0.0769),
        (2, 128, 77_824, 0.1484, 0.0526),
    ] {
        let name = format!("{bits}-bit, Π {partition}");
        let with = pages(&config(bits, partition), 8, 128, 128).bytes();
        let without = pages(&config(bits, partition).with_cached_sums(false), 8, 128, 128).bytes();
        assert_eq!(with, page, "{name}");
        let dense = 2 * partition * 8 * 128 * 2;
        assert!(
            (with as f64 / dense as f64 - of_bf16).abs() < 5e-5,
            "{name}: {}",
            with as f64 / dense as f64
        );
        let share = (with - without) as f64 / with as f64;
        assert!((share - sums_share).abs() < 5e-5, "{name}: sums take {share}");
    }

    // Qwen3-8B: 36 layers, 4096 tokens, 4 of them sinks; 63 closed blocks and 60 tokens in the open one.
    for (bits, mebibytes, percent) in [(2, 102.02, 17.71), (4, 177.33, 30.79)] {
        let side = |tokens| SidePage { tokens, kv_heads: 8, qk_dim: 128, v_dim: 128 }.bytes();
        let layer = 63 * pages(&config(bits, 64), 8, 128, 128).bytes() + side(60) + side(4);
        let found = (36 * layer) as f64 / f64::from(1 << 20);
        assert!((found - mebibytes).abs() < 0.005, "{bits}-bit: {found} MiB");
        assert!((found / 576.0 * 100.0 - percent).abs() < 0.005, "{bits}-bit: {} %", found / 5.76);
    }
    // 128K tokens of one layer.
    assert_eq!(2048 * pages(&config(2, 64), 8, 128, 128).bytes(), 84 << 20);
}

#[test]
fn sum_types_hold_the_largest_sum() {
    for (bits, count, expected) in [
        (2, 64, SumType::U8),   // 192
        (2, 128, SumType::U16), // 384
        (4, 16, SumType::U8),   // 240
        (4, 64, SumType::U16),
        (8, 128, SumType::U16), // 32 640
    ] {
        assert_eq!(SumType::of(count, Bits::new(bits).unwrap()), expected, "{bits}-bit × {count}");
    }
}

#[test]
fn packed_codes_survive() {
    let mut rng = Rng::new(1);
    for bits in Bits::ALL {
        let codes: Vec<u8> = (0..320).map(|_| rng.below(bits.levels() as usize + 1) as u8).collect();
        let mut bytes = vec![0xAA; codes.len() * bits.count() / 8];
        canonical::pack_codes(&codes, bits, &mut bytes);
        assert_eq!(canonical::unpack_codes(&bytes, bits), codes, "{bits}");
        // Code i of a byte lies at bits b·i.
        let first =
            (0..bits.codes_per_byte()).map(|i| u32::from(codes[i]) << (i * bits.count())).sum::<u32>();
        assert_eq!(u32::from(bytes[0]), first, "{bits}");
        assert!((0..=255u8).all(|byte| {
            let mut back = [0];
            canonical::pack_codes(&canonical::unpack_codes(&[byte], bits), bits, &mut back);
            back == [byte]
        }));
    }
}

/// Every segment of every shape is a multiple of 16 bytes and holds its block exactly, whatever the layout.
#[test]
fn blocks_survive_every_layout() {
    let mut cases = 0;
    for layout in [Layout::PerChannelKey, Layout::PerTokenKey] {
        for (k, v) in [(2, 2), (4, 4), (8, 8), (2, 4), (8, 2), (4, 8)] {
            for (partition, qk_dim, v_dim) in
                [(32, 64, 64), (64, 128, 128), (128, 64, 96), (64, 96, 80), (32, 16, 48), (64, 256, 256)]
            {
                for dtype in [DType::F16, DType::BF16] {
                    let config = Config::new(Bits::new(k).unwrap(), Bits::new(v).unwrap())
                        .with_partition(partition)
                        .unwrap()
                        .with_dtype(dtype)
                        .unwrap()
                        .with_cached_sums(cases % 3 > 0)
                        .with_layout(layout);
                    let name = format!("{layout:?} {k}/{v} bits, Π {partition}, {qk_dim}/{v_dim}, {dtype}");
                    let page = pages(&config, 2, qk_dim, v_dim);
                    let head = page.head(1);
                    let place = BlockPlace { layer: 0, kv_head: 1, token: 4 };
                    let block = HeadBlock::quantize(
                        head,
                        Rounding::Nearest,
                        place,
                        &Inputs::OutlierChannels.values(partition, qk_dim, cases),
                        &Inputs::Normal.values(partition, v_dim, cases),
                    )
                    .unwrap();
                    for &layout in PageLayout::ALL {
                        if layout.check(head).is_err() {
                            assert_ne!(layout, PageLayout::Canonical, "{name}");
                            continue;
                        }
                        let bytes = layout.segment_bytes(head);
                        assert_eq!(bytes % 16, 0, "{name}: {layout:?} segment of {bytes} bytes");
                        let mut segment = vec![0xEE; bytes];
                        layout.write(head, &block, &mut segment).unwrap();
                        assert_eq!(layout.read(head, &segment).unwrap(), block, "{name}: {layout:?}");
                        assert!(layout.read(head, &segment[1..]).is_err());
                        let mut plain = vec![0xEE; PageLayout::Canonical.segment_bytes(head)];
                        transcode(head, (layout, &segment), (PageLayout::Canonical, &mut plain)).unwrap();
                        let mut back = vec![0x55; bytes];
                        transcode(head, (PageLayout::Canonical, &plain), (layout, &mut back)).unwrap();
                        assert_eq!(back, segment, "{name}: {layout:?} through the canonical layout");
                    }
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, 144);
}

#[test]
fn refused_geometries_name_the_argument() {
    for (kv_heads, qk_dim, v_dim, named) in
        [(0, 64, 64, "kv_heads"), (2, 0, 64, "qk_dim"), (2, 64, 72, "v_dim"), (2, 2048, 64, "qk_dim")]
    {
        match PageGeometry::new(&config(2, 64), PageLayout::Canonical, 0, kv_heads, qk_dim, v_dim) {
            Err(homomorphic_quant::Error::Argument { argument, .. }) => assert_eq!(argument, named),
            other => panic!("{named}: {other:?}"),
        }
    }
}

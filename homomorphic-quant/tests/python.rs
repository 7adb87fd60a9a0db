//! A reader in numpy, written from the documentation of pages and wire, finds what the cache holds.

mod common;

use std::process::Command;

use attention::DType;
use common::{Tokens, config, filled, kv};
use homomorphic_quant::Layout;
use homomorphic_quant::page::PageLayout;
use homomorphic_quant::wire::{Header, Model, Sender};

#[test]
fn numpy_reads_pages_and_wire() {
    let numpy = Command::new("python3").args(["-c", "import numpy"]).output();
    if !numpy.is_ok_and(|output| output.status.success()) {
        assert!(
            std::env::var("REQUIRE_NUMPY").as_deref() != Ok("1"),
            "REQUIRE_NUMPY=1, but python3 has no numpy"
        );
        println!("SKIPPED numpy_reads_pages_and_wire: no python3 with numpy");
        return;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/read_wire.py");
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    for (i, (k, v, partition, qk_dim, v_dim, tokens)) in [
        (2, 2, 64, 128, 128, 4 + 128 + 10),
        (4, 8, 32, 64, 96, 100),
        (8, 2, 128, 64, 48, 300),
        (2, 4, 64, 80, 16, 3),
    ]
    .into_iter()
    .enumerate()
    {
        for layout in [Layout::PerChannelKey, Layout::PerTokenKey] {
            let dtype = [DType::F16, DType::BF16][i % 2];
            let config = config(k, v, partition, 4)
                .with_layout(layout)
                .with_dtype(dtype)
                .unwrap()
                .with_cached_sums(i != 1);
            let name =
                format!("{k}/{v} bits Π{partition} {qk_dim}/{v_dim} {tokens} tokens {layout:?} {dtype}");
            let (cache, sequence) = filled(&config, &Tokens::new(kv(2, qk_dim, v_dim), tokens, i as u64));
            let model = Model { layers: 1, kv_heads: 2, qk_dim: qk_dim as u32, v_dim: v_dim as u32 };
            let page_layout = PageLayout::Canonical;
            let header = Header { tag: 9, tokens: tokens as u64, model, config, page_layout };
            let mut sender = Sender::new(Vec::new(), header).unwrap();
            sender.layer(&cache, &sequence).unwrap();
            let (stream, out) = (folder.join("stream"), folder.join("values"));
            std::fs::write(&stream, sender.finish().unwrap()).unwrap();
            let run = Command::new("python3").arg(script).args([&stream, &out]).output().unwrap();
            assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));

            let all = cache.dequantize(&sequence).unwrap();
            let mut expected = Vec::new();
            for head in 0..2 {
                let of_head = |x: &[f32], dim: usize| -> Vec<f32> {
                    x.chunks_exact(2 * dim).flat_map(|token| &token[head * dim..][..dim]).copied().collect()
                };
                expected.extend(of_head(&all.k, qk_dim));
                expected.extend(of_head(&all.v, v_dim));
            }
            let bytes: Vec<u8> = expected.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert!(std::fs::read(&out).unwrap() == bytes, "{name}: numpy read other values");
        }
    }
}

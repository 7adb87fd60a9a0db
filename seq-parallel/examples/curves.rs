//! Draws scaling curves of rings of up to a thousand ranks, on paper: tables on standard output, an SVG where a file is named.
//!
//! `cargo run --release -p seq-parallel --example curves -- curves.svg`

use std::fmt::Write;

use seq_parallel::Error;
use seq_parallel::cost_model::Layer;
use seq_parallel::placement::Placement;
use seq_parallel::simulate::{Machines, Prefill, Timeline, simulate};
use seq_parallel::transport::sim::Link;

const RANKS: [usize; 8] = [8, 16, 32, 64, 128, 256, 512, 1024];
const LINKS: [(&str, Link); 3] =
    [("450 GB/s", Link::NVLINK), ("50 GB/s", Link::NIC_400G), ("12.5 GB/s", Link::NIC_100G)];
const MODELS: [(&str, Layer, usize); 2] =
    [("Llama 8B", Layer::LLAMA_8B_SWIGLU, 32), ("Llama 70B", Layer::LLAMA_70B_SWIGLU, 80)];
const TOKENS: usize = 1 << 20;

/// One curve: a name and a timeline for every count of ranks.
struct Curve {
    name: String,
    points: Vec<Timeline>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut curves = Vec::new();
    for (model, layer, layers) in MODELS {
        for (link_name, link) in LINKS {
            for placement in [Placement::Zigzag, Placement::Contiguous] {
                let points = RANKS.iter().map(|&ranks| point(layer, layers, link, placement, ranks));
                let name = format!("{model}, {link_name}, {placement}");
                curves.push(Curve { name, points: points.collect::<Result<_, _>>()? });
            }
        }
    }
    println!(
        "Prefill of {TOKENS} tokens, by the model in `simulate` (540 TFLOP/s in attention, 650 in products; nothing here was measured)\n"
    );
    print!("{:<38}", "seconds (efficiency) on … ranks");
    RANKS.iter().for_each(|ranks| print!("{ranks:>16}"));
    println!();
    for curve in &curves {
        print!("{:<38}", curve.name);
        curve
            .points
            .iter()
            .for_each(|point| print!("{:>9.2} ({:>3.0}%)", point.total_s, 100.0 * point.efficiency));
        println!();
    }
    if let Some(file) = std::env::args_os().nth(1) {
        std::fs::write(file, svg(&curves))?;
    }
    Ok(())
}

fn point(
    layer: Layer,
    layers: usize,
    link: Link,
    placement: Placement,
    ranks: usize,
) -> Result<Timeline, Error> {
    let prefill = Prefill { tokens: TOKENS, placement, layer, layers, element_bytes: 2.0 };
    let machines =
        Machines { link, attention_flops_per_s: 540e12, matmul_flops_per_s: 650e12, stragglers: vec![] };
    simulate(&prefill, &machines, ranks)
}

/// Efficiency over ranks, logarithmic in ranks.
fn svg(curves: &[Curve]) -> String {
    const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
    let x = |i: usize| 60.0 + 90.0 * i as f64;
    let y = |efficiency: f64| 340.0 - 300.0 * efficiency;
    let mut text = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1060\" height=\"400\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"1060\" height=\"400\" fill=\"#fff\"/>\n<text x=\"60\" y=\"24\">Efficiency of a prefill of 1M tokens over ranks (simulated)</text>\n",
    );
    for tenth in (0..=10).step_by(2) {
        let (at, percent) = (y(f64::from(tenth) / 10.0), 10 * tenth);
        let _ = writeln!(
            text,
            "<path d=\"M60 {at}H690\" stroke=\"#ddd\"/><text x=\"20\" y=\"{}\">{percent} %</text>",
            at + 4.0
        );
    }
    for (i, ranks) in RANKS.iter().enumerate() {
        let _ = writeln!(text, "<text x=\"{}\" y=\"360\" text-anchor=\"middle\">{ranks}</text>", x(i));
    }
    for (i, curve) in curves.iter().enumerate() {
        // Pairs of curves share a colour: zigzag is drawn through, contiguous dashed.
        let colour = COLOURS[i / 2 % COLOURS.len()];
        let dash = if i % 2 == 0 { "" } else { " stroke-dasharray=\"5 4\"" };
        let points: Vec<String> = curve
            .points
            .iter()
            .enumerate()
            .map(|(i, point)| format!("{:.1},{:.1}", x(i), y(point.efficiency)))
            .collect();
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
            points.join(" ")
        );
        let at = 40.0 + 20.0 * i as f64;
        let _ = writeln!(
            text,
            "<path d=\"M720 {at}h30\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/><text x=\"760\" y=\"{}\">{}</text>",
            at + 4.0,
            curve.name
        );
    }
    text.push_str("</svg>\n");
    text
}

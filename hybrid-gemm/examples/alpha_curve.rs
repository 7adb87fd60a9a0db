//! T(alpha) of a Llama-8B gate and up projection on GH200 and its slices, simulated, as an SVG.
//!
//! Each curve is over the share of output-stationary blocks; the ring marks its optimum, the dashed line the closed form's alpha. The
//! figures are of the simulation with published rates, not measurements.
//!
//! `cargo run --release -p hybrid-gemm --example alpha_curve > alpha.svg`

use std::error::Error;
use std::fmt::Write;

use hybrid_gemm::simulate::simulate;
use hybrid_gemm::{
    DType, DeviceProfile, Format, GemmConfig, GemmPlan, Path, PathChoice, Placement, Residency, Tiling,
};

const TOKENS: usize = 1024;
/// Width, height and margin of the drawing.
const SIZE: (f64, f64, f64) = (720.0, 420.0, 56.0);
const COLOURS: [&str; 4] = ["#1b6ca8", "#2e8b57", "#c77c02", "#b03060"];

fn main() -> Result<(), Box<dyn Error>> {
    let tiling = Tiling::new(28672, 4096, Format::Float(DType::BF16))?;
    let placement = Placement::packed(tiling, Residency::Host)?;
    let (width, height, margin) = SIZE;
    let mut curves = Vec::new();
    for device in DeviceProfile::all().into_iter().filter(|device| device.name.starts_with("GH200")) {
        let config =
            GemmConfig { path: PathChoice::Direct, ..GemmConfig::new(TOKENS, DType::BF16, device.clone()) };
        let plan = GemmPlan::new(placement, config)?;
        let time =
            |alpha: f64| simulate(&plan, Path::Direct { alpha }, TOKENS).map(|found| 1e3 * found.time_s);
        let times = (0..=32).map(|i| time(f64::from(i) / 32.0)).collect::<Result<Vec<_>, _>>()?;
        let end =
            |alpha| plan.launches_of(Path::Direct { alpha }, TOKENS).map(|it| plan.model().predict(&it));
        let balanced = plan.model().balanced_alpha(&end(1.0)?, &end(0.0)?);
        curves.push((device.name, times, balanced));
    }
    let longest =
        curves.iter().flat_map(|(_, times, _)| times).fold(0.0, |longest: f64, time| longest.max(*time));
    let x = |alpha: f64| margin + alpha * (width - 2.0 * margin);
    let y = |ms: f64| height - margin - ms / longest * (height - 2.0 * margin);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"{margin}\" y=\"24\">{TOKENS} tokens × [28672, 4096] bf16, all weights in host memory: simulated ms over alpha</text>\n",
    );
    for i in 0..=4 {
        let (alpha, ms) = (f64::from(i) / 4.0, longest * f64::from(i) / 4.0);
        writeln!(
            svg,
            "<line x1=\"{0}\" y1=\"{1}\" x2=\"{2}\" y2=\"{1}\" stroke=\"#ddd\"/>\
             <text x=\"{3}\" y=\"{4}\" text-anchor=\"end\">{ms:.1}</text>\
             <text x=\"{5}\" y=\"{6}\" text-anchor=\"middle\">{alpha}</text>",
            x(0.0),
            y(ms),
            x(1.0),
            x(0.0) - 6.0,
            y(ms) + 4.0,
            x(alpha),
            height - margin + 18.0,
        )?;
    }
    for (row, ((name, times, balanced), colour)) in curves.iter().zip(COLOURS).enumerate() {
        let points: Vec<String> = times
            .iter()
            .enumerate()
            .map(|(i, ms)| format!("{:.1},{:.1}", x(i as f64 / 32.0), y(*ms)))
            .collect();
        let best = (0..times.len()).min_by(|a, b| times[*a].total_cmp(&times[*b])).unwrap_or(0);
        let (alpha, ms) = (best as f64 / 32.0, times[best]);
        writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            points.join(" ")
        )?;
        writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"white\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            x(alpha),
            y(ms),
        )?;
        writeln!(
            svg,
            "<line x1=\"{0:.1}\" y1=\"{1:.1}\" x2=\"{0:.1}\" y2=\"{2:.1}\" stroke=\"{colour}\" stroke-dasharray=\"3 4\"/>",
            x(*balanced),
            y(0.0),
            y(longest),
        )?;
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}: best {ms:.2} ms at {alpha:.2}, closed form {balanced:.2}</text>",
            x(0.4),
            44.0 + 16.0 * row as f64,
        )?;
    }
    svg.push_str("</svg>\n");
    print!("{svg}");
    Ok(())
}

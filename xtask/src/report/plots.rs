//! Which figures are drawn against what.

use std::collections::BTreeMap;

use xtask::results::{Ceiling, Figure};

use super::markdown::{OURS, family as family_of};
use super::svg::{Plot, Scale, Series};

/// What the shape of a bench says about the place of its figure.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    /// `0.9`: the share of the weights in HBM.
    Share(f64),
    /// `alpha=0.5`: the share of SMs on the output-stationary dataflow.
    Alpha(f64),
    /// `4096of16KiB`: KiB of a page.
    PageKiB(f64),
}

impl Place {
    fn of(shape: &str) -> Option<Self> {
        if let Some(alpha) = shape.strip_prefix("alpha=") {
            return alpha.parse().ok().map(Place::Alpha);
        }
        if let Some((_, page)) = shape.strip_suffix("KiB").and_then(|s| s.split_once("of")) {
            return page.parse().ok().map(Place::PageKiB);
        }
        shape.parse().ok().filter(|share| (0.0..=1.0).contains(share)).map(Place::Share)
    }
}

/// The plot of a family of benches: by what their shapes vary, else by bytes.
pub(super) fn family(name: &str, figures: &[&Figure]) -> Plot {
    let measured: Vec<&Figure> =
        figures.iter().copied().filter(|figure| figure.median_us > 0.0 && figure.bytes > 0).collect();
    let places: Option<Vec<Place>> =
        measured.iter().map(|figure| Place::of(family_of(&figure.bench).1)).collect();
    let places = places.unwrap_or_default();
    let same = |wanted: fn(&Place) -> Option<f64>| {
        let values: Vec<f64> = places.iter().filter_map(wanted).collect();
        (!values.is_empty() && values.len() == measured.len()).then_some(values)
    };
    let time = |figure: &Figure| figure.median_us;
    if let Some(x) = same(|place| if let Place::Share(x) = place { Some(*x) } else { None }) {
        by(name, "share of the weights in HBM", Scale::Linear, "us", &measured, &x, time)
    } else if let Some(x) = same(|place| if let Place::Alpha(x) = place { Some(*x) } else { None }) {
        by(name, "alpha", Scale::Linear, "us", &measured, &x, time)
    } else if let Some(x) = same(|place| if let Place::PageKiB(x) = place { Some(*x) } else { None }) {
        let rate = |figure: &Figure| figure.bytes as f64 / figure.median_us / 1e3;
        by(name, "KiB of a page", Scale::Logarithmic, "GB/s", &measured, &x, rate)
    } else {
        let x: Vec<f64> = measured.iter().map(|figure| figure.bytes as f64).collect();
        let mut plot = by(name, "bytes", Scale::Logarithmic, "us", &measured, &x, time);
        let limit = measured
            .iter()
            .filter_map(|f| f.read_gb_s.map(|read| (f.bytes as f64, f.bytes as f64 / read / 1e3)));
        plot.series.extend(series("bytes at read bandwidth", limit.collect(), true));
        plot
    }
}

/// One line for each implementation, ours first.
fn by(
    title: &str,
    x_label: &str,
    x_scale: Scale,
    y_label: &str,
    figures: &[&Figure],
    x: &[f64],
    y: impl Fn(&Figure) -> f64,
) -> Plot {
    let mut lines: BTreeMap<(bool, &str), Vec<(f64, f64)>> = BTreeMap::new();
    for (figure, x) in figures.iter().zip(x) {
        let name = figure.implementation.as_str();
        lines.entry((name != OURS, name)).or_default().push((*x, y(figure)));
    }
    Plot {
        title: title.to_string(),
        x_label: x_label.to_string(),
        x_scale,
        y_label: y_label.to_string(),
        series: lines.into_iter().filter_map(|((_, name), points)| series(name, points, false)).collect(),
    }
}

/// A line from left to right; nothing without points.
fn series(name: &str, mut points: Vec<(f64, f64)>, dashed: bool) -> Option<Series> {
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    (!points.is_empty()).then(|| Series { name: name.to_string(), points, dashed })
}

/// Rate against arithmetic intensity of our kernels, a line for each crate's kernel, under the measured ceilings.
pub(super) fn roofline<'a>(figures: impl Iterator<Item = &'a Figure>) -> Plot {
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    let (mut read, mut rate) = (None, None);
    for figure in figures {
        let measured = figure.median_us > 0.0 && figure.bytes > 0 && figure.flops > 0;
        if figure.implementation == OURS && measured {
            let kernel = figure.bench.match_indices('/').nth(1).map_or(figure.bench.len(), |(at, _)| at);
            let point =
                (figure.flops as f64 / figure.bytes as f64, figure.flops as f64 / figure.median_us / 1e6);
            lines.entry(&figure.bench[..kernel]).or_default().push(point);
            read = read.max(figure.read_gb_s.map(|gb_s| gb_s.to_bits()));
            rate = rate.max(figure.bf16_tflops.map(|tflops| tflops.to_bits()));
        }
    }
    let x = || lines.values().flatten().map(|point| point.0);
    let (low, high) = (x().fold(f64::INFINITY, f64::min), x().fold(0.0, f64::max));
    let mut roof = Vec::new();
    // Bits of positive floats are in the order of their values.
    if let (Some(read), Some(rate)) = (read.map(f64::from_bits), rate.map(f64::from_bits)) {
        let ridge = rate * 1e3 / read;
        let under = |x: f64| (x, (x * read / 1e3).min(rate));
        roof = [low.min(ridge), ridge, high.max(ridge)].map(under).to_vec();
    }
    let mut all: Vec<Series> =
        lines.into_iter().filter_map(|(name, points)| series(name, points, false)).collect();
    all.extend(series("read bandwidth, bf16 mma.sync", roof, true));
    Plot {
        title: "Roofline".to_string(),
        x_label: "flop per byte".to_string(),
        x_scale: Scale::Logarithmic,
        y_label: "TFLOP/s".to_string(),
        series: all,
    }
}

/// Rate against bytes in flight for each way of reading host memory.
pub(super) fn host_link(ceilings: &[Ceiling]) -> Plot {
    let mut lines: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for ceiling in ceilings.iter().filter(|ceiling| ceiling.median > 0.0) {
        if let Some(in_flight) = ceiling.parameters.get("in_flight") {
            let piece =
                ceiling.parameters.get("piece_bytes").map_or(String::new(), |bytes| format!(", {bytes} B"));
            let name =
                format!("{}{piece}", ceiling.name.trim_start_matches("host_read_by_").replace('_', " "));
            lines.entry(name).or_default().push((*in_flight as f64, ceiling.median));
        }
    }
    Plot {
        title: "Reading host memory".to_string(),
        x_label: "bytes in flight".to_string(),
        x_scale: Scale::Logarithmic,
        y_label: "GB/s".to_string(),
        series: lines.into_iter().filter_map(|(name, points)| series(&name, points, false)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(bench: &str, implementation: &str, median_us: f64) -> Figure {
        let (bytes, flops) = (4_000_000, 8_000_000);
        Figure {
            bench: bench.to_string(),
            implementation: implementation.to_string(),
            median_us,
            bytes,
            flops,
            read_gb_s: Some(4000.0),
            bf16_tflops: Some(500.0),
            ..Figure::default()
        }
    }

    #[test]
    fn shapes_say_what_a_family_varies() {
        let cases = [
            (["0", "0.5", "1"], "share of the weights in HBM", [0.0, 0.5, 1.0]),
            (["alpha=0", "alpha=0.25", "alpha=1"], "alpha", [0.0, 0.25, 1.0]),
            (["4096of4KiB", "4096of8KiB", "128of16KiB"], "KiB of a page", [4.0, 8.0, 16.0]),
            (["1x4096", "1", "16x4096"], "bytes", [4e6; 3]),
        ];
        for (shapes, label, x) in cases {
            let figures = shapes.map(|shape| figure(&format!("crate/kernel/bf16/{shape}"), OURS, 2.0));
            let plot = family("crate/kernel/bf16", &figures.iter().collect::<Vec<_>>());
            assert_eq!(plot.x_label, label, "{shapes:?}");
            assert_eq!(
                plot.series[0].points.iter().map(|point| point.0).collect::<Vec<_>>(),
                x,
                "{shapes:?}"
            );
            assert!(plot.draw().is_some(), "{shapes:?}");
        }
        // Gathers are drawn by rate: 4 MB in 2 us.
        let gather = figure("sparse-attn/gather/bf16/4096of4KiB", OURS, 2.0);
        assert_eq!(family("g", &[&gather]).series[0].points, [(4.0, 2000.0)]);
    }

    #[test]
    fn the_roof_bends_where_both_ceilings_meet() {
        let figures = [figure("crate/kernel/bf16/a", OURS, 2.0), figure("crate/kernel/bf16/a", "peer", 1.0)];
        let plot = roofline(figures.iter());
        let names: Vec<&str> = plot.series.iter().map(|series| series.name.as_str()).collect();
        assert_eq!(names, ["crate/kernel", "read bandwidth, bf16 mma.sync"]);
        // 8 MFLOP in 2 us are 4 TFLOP/s at 2 flop per byte; the ridge lies at 500 TFLOP/s over 4 TB/s.
        assert_eq!(plot.series[0].points, [(2.0, 4.0)]);
        assert_eq!(plot.series[1].points, [(2.0, 8.0), (125.0, 500.0), (125.0, 500.0)]);
    }
}

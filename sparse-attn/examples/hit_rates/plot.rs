//! Panels of lines, side by side, as SVG.

use std::fmt::Write as _;

/// A panel: its title and its lines, each a name and points `(slots / selected, hit rate)`.
pub(crate) type Panel<'a> = (String, Vec<(&'a str, Vec<(f64, f64)>)>);

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 260.0;
const MARGIN: f64 = 48.0;
/// Told apart by people who do not see all colours (Okabe and Ito).
const COLOURS: [&str; 5] = ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7"];

/// The picture.
pub(crate) fn draw(panels: &[Panel<'_>]) -> String {
    let (width, height) = (panels.len() as f64 * (WIDTH + MARGIN) + 150.0, HEIGHT + 2.0 * MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (number, (title, lines)) in panels.iter().enumerate() {
        let left = MARGIN + number as f64 * (WIDTH + MARGIN);
        let all = || lines.iter().flat_map(|(_, points)| points);
        let most = all().map(|point| point.0).fold(1.0, f64::max);
        let lowest = all().map(|point| point.1).fold(1.0, f64::min);
        let lowest = (lowest * 10.0).floor() / 10.0;
        let x = |ratio: f64| left + ratio / most * (WIDTH - MARGIN);
        let y = |rate: f64| MARGIN + HEIGHT - (rate - lowest) / (1.0 - lowest).max(1e-9) * HEIGHT;
        let mut text = |x: f64, y: f64, anchor: &str, words: &str| {
            let words = words.replace('&', "&amp;").replace('<', "&lt;");
            let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
        };
        text(left, MARGIN - 16.0, "start", &format!("hit rate: {title}"));
        text(left + WIDTH / 2.0, height - 10.0, "middle", "slots / pages selected");
        for tick in 0..=most as usize {
            text(x(tick as f64), MARGIN + HEIGHT + 18.0, "middle", &tick.to_string());
        }
        let ticks: Vec<f64> =
            (0..=10).map(|tenth| f64::from(tenth) / 10.0).filter(|&tick| tick >= lowest - 1e-9).collect();
        for &tick in &ticks {
            text(left - 6.0, y(tick) + 4.0, "end", &format!("{tick:.1}"));
        }
        for &tick in &ticks {
            let (from, to, y) = (x(0.0), x(most), y(tick));
            let _ = writeln!(
                svg,
                "<line x1=\"{from:.1}\" y1=\"{y:.1}\" x2=\"{to:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>"
            );
        }
        for ((_, points), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
            let path: Vec<String> =
                points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
                path.join(" ")
            );
        }
    }
    if let Some((_, lines)) = panels.first() {
        let x = width - 150.0;
        for (line, ((name, _), colour)) in lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let y = MARGIN + 20.0 * line as f64;
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\" stroke=\"{colour}\" \
                 stroke-width=\"2\"/>\n<text x=\"{:.1}\" y=\"{:.1}\">{name}</text>",
                x + 24.0,
                x + 30.0,
                y + 4.0
            );
        }
    }
    svg + "</svg>\n"
}

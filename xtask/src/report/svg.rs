//! Line plots as SVG.

use std::fmt::Write as _;

/// A plot.
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) x_label: String,
    /// The y axis is always logarithmic.
    pub(super) x_scale: Scale,
    pub(super) y_label: String,
    pub(super) series: Vec<Series>,
}

/// How values are spread over an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    /// From 0 to 1, for shares.
    Linear,
    /// Over whole powers of ten.
    Logarithmic,
}

/// A line of a plot.
pub(super) struct Series {
    pub(super) name: String,
    /// `(x, y)`, positive on a logarithmic axis.
    pub(super) points: Vec<(f64, f64)>,
    /// For limits.
    pub(super) dashed: bool,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Told apart by people who do not see all colours (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

enum Axis {
    /// 0 to 1.
    Share,
    /// Exponents of the powers of ten at its ends.
    Powers { low: i32, high: i32 },
}

impl Axis {
    fn of(scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        if scale == Scale::Linear {
            return Axis::Share;
        }
        let (low, high) = values
            .map(f64::log10)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        let low = low.floor() as i32;
        Axis::Powers { low, high: (high.ceil() as i32).max(low + 1) }
    }

    /// Place of a value, 0 to 1.
    fn place(&self, value: f64) -> f64 {
        match *self {
            Axis::Share => value,
            Axis::Powers { low, high } => (value.log10() - f64::from(low)) / f64::from(high - low),
        }
    }

    fn ticks(&self) -> Vec<f64> {
        match *self {
            Axis::Share => (0..=4).map(|quarter| f64::from(quarter) / 4.0).collect(),
            Axis::Powers { low, high } => (low..=high).map(|power| 10f64.powi(power)).collect(),
        }
    }
}

impl Plot {
    /// The picture, or nothing if no series has a point.
    pub(super) fn draw(&self) -> Option<String> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        points().next()?;
        let x_axis = Axis::of(self.x_scale, points().map(|p| p.0));
        let y_axis = Axis::of(Scale::Logarithmic, points().map(|p| p.1));
        let x = |value: f64| LEFT + x_axis.place(value) * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| HEIGHT - BOTTOM - y_axis.place(value) * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let mut text = |x: f64, y: f64, anchor: &str, words: &str| {
            writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
                escape(words)
            )
            .expect("a String takes everything");
        };
        text(LEFT, TOP - 18.0, "start", &self.title);
        text((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 12.0, "middle", &self.x_label);
        text(8.0, TOP - 4.0, "start", &self.y_label);
        for tick in x_axis.ticks() {
            text(x(tick), HEIGHT - BOTTOM + 18.0, "middle", &number(tick));
        }
        for tick in y_axis.ticks() {
            text(LEFT - 6.0, y(tick) + 4.0, "end", &number(tick));
        }
        let mut legend = TOP + 6.0;
        for series in &self.series {
            text(WIDTH - RIGHT + 34.0, legend + 4.0, "start", &series.name);
            legend += 18.0;
        }
        let mut line = |from: (f64, f64), to: (f64, f64), style: &str| {
            writeln!(
                svg,
                "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>",
                from.0, from.1, to.0, to.1
            )
            .expect("a String takes everything");
        };
        for tick in x_axis.ticks() {
            line((x(tick), TOP), (x(tick), HEIGHT - BOTTOM), "stroke=\"#ddd\"");
        }
        for tick in y_axis.ticks() {
            line((LEFT, y(tick)), (WIDTH - RIGHT, y(tick)), "stroke=\"#ddd\"");
        }
        for (i, series) in self.series.iter().enumerate() {
            let at = TOP + 6.0 + 18.0 * i as f64;
            line((WIDTH - RIGHT + 8.0, at), (WIDTH - RIGHT + 28.0, at), &style(i, series.dashed));
        }
        for (i, series) in self.series.iter().enumerate() {
            let path: Vec<String> =
                series.points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
            writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" {}/>",
                path.join(" "),
                style(i, series.dashed)
            )
            .expect("a String takes everything");
            for point in series.points.iter().filter(|_| !series.dashed) {
                let colour = COLOURS[i % COLOURS.len()];
                writeln!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                    x(point.0),
                    y(point.1)
                )
                .expect("a String takes everything");
            }
        }
        Some(svg + "</svg>\n")
    }
}

fn style(series: usize, dashed: bool) -> String {
    let dashes = if dashed { " stroke-dasharray=\"6 4\"" } else { "" };
    format!("stroke=\"{}\" stroke-width=\"1.5\"{dashes}", COLOURS[series % COLOURS.len()])
}

/// A power of ten in the shortest form.
fn number(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{}G", v / 1e9),
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e3 => format!("{}k", v / 1e3),
        v => format!("{v}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_where_they_belong() {
        let series = |name: &str, points: &[(f64, f64)], dashed| Series {
            name: name.to_string(),
            points: points.to_vec(),
            dashed,
        };
        let plot = Plot {
            title: "a < b".to_string(),
            x_label: "bytes".to_string(),
            x_scale: Scale::Logarithmic,
            y_label: "us".to_string(),
            series: vec![
                series("ours", &[(10.0, 1.0), (1000.0, 100.0)], false),
                series("limit", &[(10.0, 1.0)], true),
            ],
        };
        let svg = plot.draw().expect("a picture");
        // The corners of the plotting area.
        assert!(svg.contains(&format!(
            "points=\"{LEFT:.1},{:.1} {:.1},{TOP:.1}\"",
            HEIGHT - BOTTOM,
            WIDTH - RIGHT
        )));
        assert!(svg.contains("a &lt; b") && svg.contains("stroke-dasharray"));
        assert_eq!(svg.matches("<circle").count(), 2);
        assert_eq!(Plot { series: vec![series("none", &[], false)], ..plot }.draw(), None);
    }

    #[test]
    fn axes_take_whole_decades() {
        let axis = Axis::of(Scale::Logarithmic, [3.0, 250.0].into_iter());
        assert_eq!(
            axis.ticks().into_iter().map(number).collect::<Vec<_>>(),
            ["1", "10", "100", "1k"].map(String::from)
        );
        let one = Axis::of(Scale::Logarithmic, [5.0].into_iter());
        assert!((0.0..=1.0).contains(&one.place(5.0)));
        let share = Axis::of(Scale::Linear, [0.0, 0.9].into_iter());
        assert_eq!((share.place(0.0), share.place(0.9), share.ticks().len()), (0.0, 0.9, 5));
    }
}

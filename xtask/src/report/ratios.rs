//! What figures are judged by: quotients of measured times, with what each must reach and what it aims at.

use std::collections::BTreeMap;

use xtask::results::{Ceiling, Figure};

use super::markdown::OURS;

/// A part of a quotient. Times are in microseconds; a bench is one of ours unless a peer is named.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    /// A plain number: 1 makes the other part stand for itself.
    Number(f64),
    /// The time of a bench.
    Time(&'static str),
    /// The least time of several, which are ways to the same result.
    Least(&'static [&'static str]),
    /// The time of (a bench, a peer).
    Peer(&'static str, &'static str),
    /// What the bytes of a bench that stay off the host link take at the read bandwidth that its process measured.
    Read(&'static str),
    /// What a bench takes more than that.
    BeyondRead(&'static str),
    /// What all bytes of a bench take at the best rate of ceilings of these names.
    At(&'static [&'static str], &'static str),
    /// What the bytes that a bench moves over the host link take at the best rate of `hybrid-gemm/link`.
    Link(&'static str),
    /// Bytes that a bench moves over the host link.
    LinkBytes(&'static str),
    /// 10⁶ operations of a bench: over its time, TFLOP/s.
    Operations(&'static str),
    /// The longest of two.
    Longest(&'static [Value; 2]),
}

use Value::{At, BeyondRead, Least, Link, LinkBytes, Longest, Number, Operations, Peer, Read, Time};

/// What a quotient has to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bound {
    AtLeast(f64),
    AtMost(f64),
    Exactly(f64),
}

use Bound::{AtLeast, AtMost, Exactly};

/// How a quotient is written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Unit {
    Percent,
    Times,
    Microseconds,
    Milliseconds,
    Seconds,
    Tflops,
}

use Unit::{Microseconds, Milliseconds, Percent, Seconds, Tflops, Times};

/// A quotient that is judged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Target {
    pub(super) name: &'static str,
    pub(super) numerator: Value,
    pub(super) denominator: Value,
    pub(super) unit: Unit,
    pub(super) must: Bound,
    pub(super) aim: Bound,
    /// What the bounds come from.
    pub(super) source: &'static str,
}

/// The figures and ceilings of a device, by name.
pub(super) struct Measurements<'a> {
    figures: BTreeMap<(&'a str, &'a str), &'a Figure>,
    ceilings: &'a [Ceiling],
    /// Best rate over the host link, in bytes per microsecond.
    link: Option<f64>,
}

impl<'a> Measurements<'a> {
    pub(super) fn new(figures: impl Iterator<Item = &'a Figure>, ceilings: &'a [Ceiling]) -> Self {
        let timed = figures.filter(|figure| figure.measured() && figure.failed.is_none());
        let figures: BTreeMap<_, _> =
            timed.map(|figure| ((figure.bench.as_str(), figure.implementation.as_str()), figure)).collect();
        let links = figures
            .values()
            .filter(|figure| figure.implementation == OURS && figure.bench.starts_with("hybrid-gemm/link/"));
        let link = links.map(|figure| figure.bytes as f64 / figure.median_us).reduce(f64::max);
        Measurements { figures, ceilings, link }
    }

    /// Best rate over the host link, in GB/s.
    pub(super) fn link_gb_s(&self) -> Option<f64> {
        self.link.map(|rate| rate / 1e3)
    }

    /// What there is no measurement of is the error.
    fn value(&self, value: &Value) -> Result<f64, &'static str> {
        let figure = |bench: &'static str| self.figures.get(&(bench, OURS)).copied().ok_or(bench);
        let link = || self.link.ok_or("hybrid-gemm/link");
        Ok(match *value {
            Number(number) => number,
            Time(bench) => figure(bench)?.median_us,
            Least(benches) => {
                let times = benches.iter().filter_map(|bench| figure(bench).ok());
                times.map(|figure| figure.median_us).reduce(f64::min).ok_or(benches[0])?
            }
            Peer(bench, peer) => self.figures.get(&(bench, peer)).ok_or(peer)?.median_us,
            Read(bench) => {
                let figure = figure(bench)?;
                let rate = figure.read_gb_s.ok_or("read bandwidth")?;
                (figure.bytes - figure.link_bytes.min(figure.bytes)) as f64 / rate / 1e3
            }
            BeyondRead(bench) => self.value(&Time(bench))? - self.value(&Read(bench))?,
            At(names, bench) => {
                let rates = self.ceilings.iter().filter(|ceiling| names.contains(&ceiling.name.as_str()));
                let rate = rates.map(|ceiling| ceiling.median).reduce(f64::max).ok_or(names[0])?;
                figure(bench)?.bytes as f64 / rate / 1e3
            }
            Link(bench) => figure(bench)?.link_bytes as f64 / link()?,
            LinkBytes(bench) => figure(bench)?.link_bytes as f64,
            Operations(bench) => figure(bench)?.flops as f64 / 1e6,
            Longest([a, b]) => self.value(a)?.max(self.value(b)?),
        })
    }

    /// The quotient, or what is missing for it.
    pub(super) fn quotient(&self, target: &Target) -> Result<f64, &'static str> {
        Ok(self.value(&target.numerator)? / self.value(&target.denominator)?)
    }
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            AtLeast(bound) => value >= bound,
            AtMost(bound) => value <= bound,
            Exactly(bound) => value == bound,
        }
    }

    pub(super) fn text(self, unit: Unit) -> String {
        match self {
            AtLeast(bound) => format!("≥ {}", unit.text(bound)),
            AtMost(bound) => format!("≤ {}", unit.text(bound)),
            Exactly(bound) => unit.text(bound),
        }
    }
}

impl Unit {
    pub(super) fn text(self, value: f64) -> String {
        match self {
            Percent => format!("{:.0} %", value * 100.0),
            Times => format!("{value:.2}×"),
            Microseconds => format!("{value:.1} us"),
            Milliseconds => format!("{value:.2} ms"),
            Seconds => format!("{value:.1} s"),
            Tflops => format!("{value:.0} TFLOP/s"),
        }
    }
}

impl Target {
    /// How a quotient is judged.
    pub(super) fn verdict(&self, quotient: f64) -> &'static str {
        match (self.must.holds(quotient), self.aim.holds(quotient)) {
            (true, true) => "aim reached",
            (true, false) => "reached",
            (false, _) => "**missed**",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::targets::{BYTES, HOST_READS, TARGETS, WRITES, least, most, share, target, time};
    use super::*;

    fn figure(bench: &str, implementation: &str, median_us: f64, bytes: u64, link_bytes: u64) -> Figure {
        Figure {
            bench: bench.to_string(),
            implementation: implementation.to_string(),
            median_us,
            bytes,
            link_bytes,
            flops: 1000 * bytes,
            read_gb_s: Some(4000.0),
            ..Figure::default()
        }
    }

    /// 4 GB/s are 4000 bytes per microsecond.
    #[test]
    fn values_are_what_they_say() {
        let figures = [
            figure("a", OURS, 20.0, 40_000_000, 0),
            figure("b", OURS, 10.0, 8_000_000, 4_000_000),
            figure("b", "peer", 25.0, 0, 0),
            figure("hybrid-gemm/link/bf16/copy engine", OURS, 100.0, 5_000_000, 5_000_000),
            figure("hybrid-gemm/link/bf16/loads of 4 SMs", OURS, 100.0, 4_000_000, 4_000_000),
            // It failed after it was measured.
            Figure { failed: Some("a fault".to_string()), ..figure("c", OURS, 1.0, 1, 0) },
        ];
        let ceilings = [1000.0, 2000.0].map(|median| Ceiling {
            name: "write_bandwidth".to_string(),
            median,
            ..Ceiling::default()
        });
        let measured = Measurements::new(figures.iter(), &ceilings);
        let cases = [
            (Number(3.0), Ok(3.0)),
            (Time("a"), Ok(20.0)),
            (Time("c"), Err("c")),
            (Least(&["a", "b", "missing"]), Ok(10.0)),
            (Least(&["missing", "c"]), Err("missing")),
            (Peer("b", "peer"), Ok(25.0)),
            (Peer("a", "peer"), Err("peer")),
            (Read("a"), Ok(10.0)),
            // The half of the bytes that stays off the link.
            (Read("b"), Ok(1.0)),
            (BeyondRead("a"), Ok(10.0)),
            (At(WRITES, "a"), Ok(20.0)),
            (At(HOST_READS, "a"), Err("host_read_by_loads")),
            // 50 GB/s at best.
            (Link("b"), Ok(80.0)),
            (LinkBytes("b"), Ok(4e6)),
            (Operations("b"), Ok(8000.0)),
            (Longest(&[Time("a"), Time("b")]), Ok(20.0)),
        ];
        for (value, expected) in cases {
            assert_eq!(measured.value(&value), expected, "{value:?}");
        }
        assert_eq!(measured.link_gb_s(), Some(50.0));
        assert_eq!(measured.quotient(&target("t", share("a"), Percent, least(0.5, 0.6), BYTES)), Ok(0.5));
    }

    #[test]
    fn bounds_judge_and_are_written() {
        let judged = |bounds, value| target("t", time("a"), Times, bounds, BYTES).verdict(value);
        assert_eq!(judged(least(2.0, 3.0), 1.99), "**missed**");
        assert_eq!(judged(least(2.0, 3.0), 2.0), "reached");
        assert_eq!(judged(least(2.0, 3.0), 3.5), "aim reached");
        assert_eq!(judged(most(1.15, 1.05), 1.16), "**missed**");
        assert_eq!(judged(most(1.15, 1.05), 1.1), "reached");
        assert_eq!(judged(most(1.15, 1.05), f64::NAN), "**missed**");
        assert_eq!(judged((Exactly(1.0), Exactly(1.0)), 1.01), "**missed**");
        assert_eq!(AtLeast(0.85).text(Percent), "≥ 85 %");
        assert_eq!(AtMost(9.0).text(Microseconds), "≤ 9.0 us");
        assert_eq!(Exactly(1.0).text(Times), "1.00×");
    }

    #[test]
    fn aims_are_not_easier_than_what_must_be() {
        for target in TARGETS {
            match (target.must, target.aim) {
                (AtLeast(must), AtLeast(aim)) => assert!(aim >= must, "{}", target.name),
                (AtMost(must), AtMost(aim)) => assert!(aim <= must, "{}", target.name),
                (Exactly(must), Exactly(aim)) => assert_eq!(aim, must, "{}", target.name),
                other => panic!("{}: {other:?}", target.name),
            }
        }
        let mut names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), TARGETS.len(), "each has a name of its own");
    }
}

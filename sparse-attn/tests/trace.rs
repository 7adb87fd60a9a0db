//! The file format of traces.

use sparse_attn::Error;
use sparse_attn::trace::{Drift, Trace};

#[test]
fn traces_survive_the_round_trip() {
    let mut trace = Drift { pages: 50, selected: 5, steps: 9, correlation: 0.5, seed: 1 }.trace();
    trace.push(7, &[]);
    trace.push(7, &[4_294_967_294]);
    let text = trace.to_text();
    assert!(text.starts_with("sparse-attn trace 1\n0: "), "{text}");
    assert_eq!(Trace::from_text(&text).unwrap(), trace);
    assert_eq!((trace.streams(), trace.widest(), trace.stream(7).count()), (vec![0, 7], 5, 2));
    let commented = text.replacen('\n', "\n# a comment\n\n", 1);
    assert_eq!(Trace::from_text(&commented).unwrap(), trace);
}

#[test]
fn what_is_no_trace() {
    for (text, line) in [
        ("", 1),
        ("sparse-attn trace 2\n", 1),
        ("trace\n", 1),
        ("sparse-attn trace 1\n0: 1 2\n0 3\n", 3),
        ("sparse-attn trace 1\nx: 1\n", 2),
        ("sparse-attn trace 1\n0: 1 -2\n", 2),
        ("sparse-attn trace 1\n\n0: 1 2 1\n", 3),
    ] {
        match Trace::from_text(text) {
            Err(Error::Trace { line: found, .. }) => assert_eq!(found, line, "{text:?}"),
            other => panic!("{text:?}: {other:?}"),
        }
    }
}

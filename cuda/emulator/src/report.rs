//! From addresses to lines of source.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// Replaces every `{@hex}` of a report, an offset in this executable, by file and line, as far as `addr2line` knows them.
pub(crate) fn with_lines(report: &str) -> String {
    // Many tests provoke reports, and `addr2line` reads the whole executable's debug information at each call.
    static KNOWN: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let unknown: BTreeSet<&str> = places(report).filter(|place| !known.contains_key(*place)).collect();
    if !unknown.is_empty() {
        known.extend(lines(&unknown));
    }
    let mut text = report.trim_end().to_string();
    for place in places(report) {
        let line = known.get(place).cloned().unwrap_or_else(|| format!("code offset 0x{place}"));
        text = text.replace(&format!("{{@{place}}}"), &line);
    }
    text
}

fn places(report: &str) -> impl Iterator<Item = &str> {
    report.split("{@").skip(1).filter_map(|rest| rest.split_once('}').map(|(place, _)| place))
}

/// Asks `addr2line` for all places at once. What it inlined where is told inside out: `ptx/mma.cuh:40, called from a.cu:7`.
fn lines(places: &BTreeSet<&str>) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let Ok(executable) = std::env::current_exe() else { return found };
    let output = Command::new("addr2line").args(["-a", "-i", "-e"]).arg(executable).args(places).output();
    let Ok(output) = output else { return found };
    let text = String::from_utf8_lossy(&output.stdout);
    let mut frames: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines() {
        if let Some(address) = line.strip_prefix("0x") {
            frames.push((address.trim_start_matches('0').to_string(), Vec::new()));
        } else if let Some((_, list)) = frames.last_mut() {
            list.push(short(line));
        }
    }
    for (place, mut list) in frames {
        list.retain(|frame| !frame.contains('?'));
        // The emulator's own inline functions say nothing, unless there is nothing else.
        let kernel: Vec<_> = list.iter().filter(|frame| !frame.contains("emulator_")).cloned().collect();
        let told = if kernel.is_empty() { list } else { kernel };
        if !told.is_empty() {
            found.insert(place, told.join(", called from "));
        }
    }
    found
}

/// The last two parts of a path with its line: `attention/merge_states.cu:41`.
fn short(frame: &str) -> String {
    let frame = frame.split(" (").next().unwrap_or(frame);
    let parts: Vec<&str> = frame.rsplit('/').take(2).collect();
    parts.into_iter().rev().collect::<Vec<_>>().join("/")
}

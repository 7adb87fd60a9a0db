//! `cargo xtask gpu-status`: what the ledger says of every shipped row as it is now.

use std::collections::BTreeMap;

use xtask::results::RowDigests;

use super::ledger::{Ledger, Status};
use super::rows;
use super::transports::TRANSPORTS;
use crate::Result;

/// A row and what is known of it.
pub(crate) struct RowStatus {
    pub(crate) label: String,
    pub(crate) group: &'static str,
    pub(crate) status: Status,
    /// Where and when it ran, or what failed.
    pub(crate) note: String,
}

/// The status of every shipped row. Compiles only rows that the ledger knows.
pub(crate) fn statuses(ledger: &Ledger) -> Result<Vec<RowStatus>> {
    let current = rows::current(|label| ledger.entries.contains_key(label))?;
    let now: BTreeMap<&str, &RowDigests> =
        current.iter().map(|row| (row.digests.label.as_str(), &row.digests)).collect();
    Ok(rows::shipped()
        .map(|instance| {
            let label = instance.label();
            let known = ledger.entries.get(&label).zip(now.get(label.as_str()));
            let (status, note) = match known {
                None => (Status::NeverRun, String::new()),
                Some((entry, now)) => {
                    let status = entry.status(now);
                    let mut note = format!("{}, {}", entry.device, entry.date);
                    for failure in entry.failures().iter().take(3) {
                        note += &format!("; {failure}");
                    }
                    (status, note)
                }
            };
            RowStatus { label, group: instance.kernel.group, status, note }
        })
        .collect())
}

/// Entries of rows that ship no more.
fn orphans(ledger: &Ledger) -> Vec<&str> {
    let shipped: Vec<String> = rows::shipped().map(|instance| instance.label()).collect();
    ledger.entries.keys().filter(|label| !shipped.contains(label)).map(String::as_str).collect()
}

/// How many rows have each status, as in `40 proven, 2 stale`.
pub(crate) fn summary<'a>(rows: impl Iterator<Item = &'a RowStatus>) -> String {
    let mut counts = BTreeMap::new();
    for row in rows {
        *counts.entry(row.status).or_insert(0) += 1;
    }
    if counts.is_empty() {
        return "no shipped rows".to_string();
    }
    counts.iter().map(|(status, count)| format!("{count} {status}")).collect::<Vec<_>>().join(", ")
}

pub(crate) fn command(arguments: &[String]) -> Result {
    let strict = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--strict"] => true,
        _ => return Err("usage: cargo xtask gpu-status [--strict]".to_string()),
    };
    let ledger = Ledger::load(&Ledger::folder())?;
    let rows = statuses(&ledger)?;
    let width = rows.iter().map(|row| row.label.len()).max().unwrap_or(0);
    for row in &rows {
        println!("{}", format!("{:width$}  {:18}  {}", row.label, row.status, row.note).trim_end());
    }
    for label in orphans(&ledger) {
        println!("{label}: in the ledger, but not a shipped row; delete its file");
    }
    println!("{} rows: {}", rows.len(), summary(rows.iter()));
    let mut proven = rows.iter().all(|row| row.status == Status::Proven);
    for transport in &TRANSPORTS {
        let (text, is_proven) = transport.status(&Ledger::folder())?;
        println!("transport {}: {text}", transport.name);
        proven &= is_proven;
    }
    if strict && !proven {
        return Err("not every row and transport is proven".to_string());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_ledger_nothing_has_run() {
        let rows = statuses(&Ledger::default()).expect("no compiler is needed");
        assert_eq!(rows.len(), rows::shipped().count());
        assert!(rows.iter().all(|row| row.status == Status::NeverRun));
        assert_eq!(summary(rows.iter()), format!("{} never run on a GPU", rows.len()));
    }

    #[test]
    fn counts_are_named() {
        let row = |status| RowStatus { label: String::new(), group: "", status, note: String::new() };
        let rows = [row(Status::NeverRun), row(Status::Proven), row(Status::NeverRun), row(Status::Stale)];
        assert_eq!(summary(rows.iter()), "1 proven, 1 stale, 2 never run on a GPU");
        assert_eq!(summary([].iter()), "no shipped rows");
    }
}

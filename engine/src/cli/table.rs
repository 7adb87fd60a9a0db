//! The demo's table.

use std::fmt::Write;

use crate::{Error, eval};

/// A line of the table.
pub(super) struct Row {
    pub(super) report: eval::Report,
    /// Share of planted values found again; `None` where the model itself finds too few for it to say anything.
    pub(super) retrieval: Option<f64>,
}

/// A difference with its sign, but no "-0.0000", and its standard error.
fn delta((nll, error): (f64, f64)) -> String {
    format!("{:+.4}±{error:.4}", (nll * 1e4).round() / 1e4 + 0.0)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Prints the rows, the first of which is dense, after `windows` windows each.
pub(super) fn table(rows: &[Row], windows: usize) -> Result<String, Error> {
    let Some(dense) = rows.first().map(|row| &row.report) else { return Ok(String::new()) };
    let header = [
        "mode",
        "nll/token",
        "perplexity",
        "Δ nll",
        "KV bytes/token",
        "ratio",
        "retrieval",
        "on device",
        "hits",
        "prefill",
        "decode",
    ];
    let mut cells = vec![header.map(String::from)];
    for Row { report, retrieval } in rows {
        cells.push([
            report.kv.clone(),
            format!("{:.4}", report.nll_per_token),
            format!("{:.4}", report.perplexity),
            delta(report.above(dense)?),
            format!("{:.1}", report.kv_bytes_per_token),
            format!("{:.2}×", dense.kv_bytes_per_token / report.kv_bytes_per_token),
            retrieval.map_or("–".into(), percent),
            percent(report.device_kv_share),
            report.kv_hit_rate.map_or("–".into(), percent),
            format!("{:.0}/s", report.prefill_tokens_per_s),
            format!("{:.0}/s", report.decode_tokens_per_s),
        ]);
    }
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for row in &cells {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right.
            let _ = match column {
                0 => write!(text, "{cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    let _ = write!(
        text,
        "\n\
         {} windows of {} held-out tokens: the first {} of each prefilled, the others decoded one by one and scored, in nats.\n\
         Δ and ratio are to dense, whose cache is stored in f16. After ± is the standard error of Δ over the scored tokens:\n\
         modes whose Δ are closer than that are not told apart here. KV bytes are what the device holds, metadata included.\n\
         Retrieval: planted values found again; – where the model itself, with a dense cache, finds less than half.\n\
         On device: share of the tokens' keys and values at the end of a window, the rest is in host memory; hits: share of the pages\n\
         that a decoded token read which were there already. A sparse mode reads at most its budget of tokens, sinks and recent ones\n\
         included; what it never reads is no error of storage, so its ratio says what the device saves, not what is lost.\n\
         Speeds are tokens per second of the CPU reference, not kernel speed.\n",
        windows, dense.context, dense.prefill,
    );
    Ok(text)
}

//! Progress on stderr: a bar on a terminal, one plain line in a pipe.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far a task is, until it is dropped.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A task that begins.
    pub(super) fn new(task: &str) -> Self {
        if !super::output::speaks() {
            return Progress { bar: None };
        }
        if !std::io::stderr().is_terminal() {
            // A reader who left is no reason to stop.
            let _ = writeln!(std::io::stderr(), "{task} …");
            return Progress { bar: None };
        }
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} ({eta})");
        let bar = ProgressBar::new(0).with_message(task.to_string());
        Progress {
            bar: Some(match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }),
        }
    }

    /// So many steps are done, of so many in all.
    pub(super) fn update(&self, done: usize, all: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

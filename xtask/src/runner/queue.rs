//! The tasks of a part: who runs next, for how long, and who runs again.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use xtask::results::{self, Figure, Item, Outcome, Part, Source};

use crate::parts::{Kind, Run};
use crate::task::{Finished, Task};

/// Who is told how a part goes on.
pub(crate) struct Watch<'a> {
    /// Each task that ended, with what it printed.
    pub(crate) item: &'a (dyn Fn(&Item, &str) + Sync),
    /// The part after each of them.
    pub(crate) part: &'a (dyn Fn(&Part) + Sync),
}

struct State {
    queue: VecDeque<Task>,
    part: Part,
    /// Bench and implementation of every line of this run: each is tried once.
    tried: BTreeSet<(String, String)>,
    /// Attempts so far.
    begun: usize,
}

impl State {
    /// Figures that need no measuring: those that were measured well, and whatever this run has tried.
    fn had(&self) -> Vec<Figure> {
        let tried =
            |figure: &Figure| self.tried.contains(&(figure.bench.clone(), figure.implementation.clone()));
        let good = |figure: &Figure| figure.measured() && figure.failed.is_none();
        self.part.figures.iter().filter(|figure| good(figure) || tried(figure)).cloned().collect()
    }

    /// Takes what a task left; whether it said anything of a case that this run had not tried.
    fn take(&mut self, figures: Vec<Figure>, source: &Source) -> bool {
        let mut new = false;
        for figure in figures {
            new |= self.tried.insert((figure.bench.clone(), figure.implementation.clone()));
            let source = Source { date: results::now(), ..source.clone() };
            Figure::put(&mut self.part.figures, Figure { source: Some(source), ..figure });
        }
        new
    }
}

impl Run {
    /// Runs the tasks until `deadline`, `jobs` at a time, and puts what they leave into `part`.
    pub(super) fn run_all(
        &self,
        kind: &Kind,
        tasks: Vec<Task>,
        deadline: Instant,
        part: Part,
        watch: &Watch<'_>,
    ) -> Part {
        let jobs = kind.jobs.map_or(self.jobs, |most| most.min(self.jobs));
        let workers = jobs.clamp(1, tasks.len().max(1));
        let limit = Duration::from_secs(part.limit_s);
        let state = Mutex::new(State { queue: tasks.into(), part, tried: BTreeSet::new(), begun: 0 });
        let lock = || state.lock().expect("no thread panicked");
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    loop {
                        let (task, index, waiting, had) = {
                            let mut state = lock();
                            let Some(task) = state.queue.pop_front() else { return };
                            state.begun += 1;
                            (task, state.begun, state.queue.len() + 1, state.had())
                        };
                        let left = deadline.saturating_duration_since(Instant::now());
                        let finished = if left < task.expected {
                            Finished::not_started(&task, left)
                        } else {
                            let allowed = left.min(turn(kind, &task, limit, left, waiting));
                            self.run_one(kind, index, &task, allowed, &had)
                        };
                        self.settle(kind, task, finished, &mut lock(), watch);
                    }
                });
            }
        });
        state.into_inner().expect("no thread panicked").part
    }

    /// Books how a task ended, and puts it behind the others where it can go on.
    fn settle(&self, kind: &Kind, mut task: Task, finished: Finished, state: &mut State, watch: &Watch<'_>) {
        let Finished { mut item, figures, ceilings, output, whole } = finished;
        if let Some(refusal) = refusal(kind, &output) {
            state.part.skipped = Some(refusal);
            state.queue.clear();
            (watch.item)(&Item { outcome: Outcome::NotRun, ..item }, &output);
            (watch.part)(&state.part);
            return;
        }
        let new = state.take(figures, &self.source);
        for ceiling in ceilings {
            state.part.ceilings.retain(|old| !old.same(&ceiling));
            state.part.ceilings.push(ceiling);
        }
        // A case that took its process along has cost itself alone if the others have a process of their own.
        let cut = item.outcome == Outcome::NotRun && item.seconds > 0.0;
        let died = item.outcome == Outcome::Failed && !whole && new;
        let again = kind.resumes && (cut || died);
        if let Some(reason) = &task.failed
            && item.outcome == Outcome::Passed
        {
            (item.outcome, item.reason) = (Outcome::Failed, Some(reason.clone()));
        }
        (watch.item)(&item, &output);
        if again {
            if died {
                task.failed = task.failed.or(item.reason.clone());
            }
            state.queue.push_back(task);
        }
        state.part.put(item);
        (watch.part)(&state.part);
    }
}

/// How long a task may run where `waiting` tasks have `left` together: what can go on later takes turns; of others each gets a third of
/// the part, or three times what it is expected to take, so that what hangs is stopped before the part's time is up.
fn turn(kind: &Kind, task: &Task, limit: Duration, left: Duration, waiting: usize) -> Duration {
    if kind.resumes {
        (left / u32::try_from(waiting).unwrap_or(u32::MAX)).max(task.expected)
    } else if kind.serial() {
        left
    } else {
        (limit / 3).max(task.expected * 3)
    }
}

/// Why a whole part cannot run, where the output of one of its tasks says so.
fn refusal(kind: &Kind, output: &str) -> Option<String> {
    let refused = kind.name.starts_with("sanitizer-") && output.contains("Device not supported");
    refused.then(|| "compute-sanitizer: Device not supported".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parts::PARTS;

    #[test]
    fn tasks_take_turns_where_they_can_go_on() {
        let kind = |name| PARTS.iter().find(|kind| kind.name == name).expect("a part");
        let seconds = Duration::from_secs;
        let task = |expected| Task {
            name: String::new(),
            program: "true".into(),
            arguments: Vec::new(),
            limit: seconds(120),
            expected: seconds(expected),
            test: true,
            variables: Vec::new(),
            failed: None,
        };
        // (part, expected, limit of the part, left, tasks waiting, turn)
        let cases = [
            ("benches", 4, 160, 100, 10, 10),
            ("benches", 4, 160, 100, 5, 20),
            ("benches", 4, 160, 30, 1, 30),
            ("peers", 20, 160, 100, 9, 20),
            ("peers", 20, 160, 100, 2, 50),
            ("tests", 2, 120, 100, 50, 40),
            ("tests", 30, 120, 100, 50, 90),
            ("jit", 5, 9, 9, 50, 15),
            ("ceilings", 2, 50, 45, 1, 45),
        ];
        for (name, expected, limit, left, waiting, turn) in cases {
            let found = super::turn(kind(name), &task(expected), seconds(limit), seconds(left), waiting);
            assert_eq!(found, seconds(turn), "{name}, {expected} expected");
        }
    }
}

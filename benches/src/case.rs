//! A case of a GPU bench: checked, captured, timed and written down; one that fails is written down with its reason.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId};
use longkv_cuda::cudarc::driver::CudaStream;
use longkv_cuda::driver::{Graph, Launched, launches};
use serde_json::json;

use crate::figure::{self, FIGURES_VARIABLE, Summary};
use crate::{GpuBench, throughput};

/// Groups of one kernel on the GPU.
pub struct GpuGroup<'a> {
    /// Criterion's group, for its settings.
    pub group: BenchmarkGroup<'a, WallTime>,
    /// `crate/kernel/dtype`.
    pub(crate) name: String,
}

/// What a case moves and computes, and how it is launched.
#[derive(Debug, Clone, Default)]
pub struct Work {
    /// Fewest bytes that the problem moves, wherever they lie.
    bytes: u64,
    flops: u64,
    /// Those of them that cross the link to host memory.
    link_bytes: u64,
    note: Option<String>,
    one_by_one: bool,
}

impl Work {
    /// Bytes and floating-point operations.
    pub fn new(bytes: u64, flops: u64) -> Self {
        Work { bytes, flops, ..Work::default() }
    }

    /// Bytes that cross the link to host memory.
    pub fn over_link(self, link_bytes: u64) -> Self {
        Work { link_bytes, ..self }
    }

    /// What the time covers, where that is not plain.
    pub fn note(self, note: impl Into<String>) -> Self {
        Work { note: Some(note.into()), ..self }
    }

    /// Launches as they come, no CUDA graph: for what differs from one run to the next.
    pub fn one_by_one(self) -> Self {
        Work { one_by_one: true, ..self }
    }
}

/// Launches whose time is not kept: clocks rise and pages are touched.
const WARM_UP: usize = 5;

static FAILED: AtomicUsize = AtomicUsize::new(0);

/// Cases of this process that failed.
pub fn failed() -> usize {
    FAILED.load(Ordering::Relaxed)
}

impl GpuBench {
    /// One case of a group: `body` makes its inputs and calls [`Case::time`].
    ///
    /// What the file named by [`HAD_VARIABLE`](figure::HAD_VARIABLE) has is left out. A case that panics gets a line with the
    /// reason instead of a time, and the next one goes on, unless the GPU's context is lost: that ends the process, and another that
    /// has the line goes on behind it.
    pub fn case(&mut self, group: &mut GpuGroup<'_>, shape: &str, body: impl FnOnce(&mut Case<'_, '_>)) {
        let name = format!("{}/{shape}", group.name);
        if figure::had().contains(&name) {
            return println!("{name}: had before");
        }
        let mut case = Case { bench: self, group, shape };
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(&mut case))) else { return };
        let reason = reason(&*panic);
        println!("FAILED {name}: {reason}");
        figure::append(FIGURES_VARIABLE, &figure::failed(&name, &reason));
        FAILED.fetch_add(1, Ordering::Relaxed);
        // What failed while the case was taken down is its own failure, not the next one's.
        let _ = self.gpu.context().check_err();
        if let Err(error) = self.stream.synchronize() {
            eprintln!("no case can run after {name}: {error}");
            std::process::exit(1);
        }
    }
}

/// A case that runs.
pub struct Case<'a, 'b> {
    /// Where it runs.
    pub bench: &'a GpuBench,
    group: &'a mut GpuGroup<'b>,
    shape: &'a str,
}

impl Case<'_, '_> {
    /// Launches once and lets `check` look at the outputs, then times launches with a cold L2 and writes the figure down. Where it can
    /// be, the launch is captured in a CUDA graph and the graph is timed, as that of the peers is. Gives the outputs back.
    ///
    /// `outputs` is what both `launch` and `check` need: poisoned buffers, a status word.
    ///
    /// # Panics
    /// When a launch fails; after the timing when the check does.
    pub fn time<O>(
        &mut self,
        work: Work,
        outputs: O,
        mut launch: impl FnMut(&mut O, &Arc<CudaStream>),
        check: impl FnOnce(&mut O, &Arc<CudaStream>),
    ) -> O {
        let steps = Steps {
            count: 1,
            launch: |outputs: &mut O, _, stream: &_| launch(outputs, stream),
            reset: |_: &mut O, _: &_| {},
        };
        self.time_steps(work, outputs, steps, check)
    }

    /// The same for a problem whose launches differ: they are timed in turn, each alone, and `check` looks at the outputs of the first.
    ///
    /// # Panics
    /// As [`time`](Self::time).
    pub fn time_steps<O>(
        &mut self,
        work: Work,
        mut outputs: O,
        mut steps: Steps<impl FnMut(&mut O, usize, &Arc<CudaStream>), impl FnMut(&mut O, &Arc<CudaStream>)>,
        check: impl FnOnce(&mut O, &Arc<CudaStream>),
    ) -> O {
        let Case { bench, group, shape } = self;
        let stream = &bench.stream;
        let mut samples = Vec::new();
        let mut kernels: Vec<Launched> = Vec::new();
        let mut graphs: Vec<Graph> = Vec::new();
        let mut note = work.note.clone();
        let mut check = Some(check);
        let mut wrong = None;
        let mut step = 0;
        group.group.throughput(throughput(work.bytes, work.flops));
        group.group.bench_function(BenchmarkId::from_parameter(*shape), |bencher| {
            bencher.iter_custom(|iterations| {
                let first = check.take();
                let mut warm_up = 0;
                if let Some(check) = first {
                    warm_up = WARM_UP;
                    kernels = launches(|| (steps.launch)(&mut outputs, 0, stream)).1;
                    stream.synchronize().expect("the launch ran without a fault");
                    let checked = catch_unwind(AssertUnwindSafe(|| check(&mut outputs, stream)));
                    wrong = checked.err().map(|panic| reason(&*panic));
                    (steps.reset)(&mut outputs, stream);
                    if !work.one_by_one {
                        let captured: Result<_, String> = (0..steps.count)
                            .map(|step| capture(bench, &mut || (steps.launch)(&mut outputs, step, stream)))
                            .collect();
                        match captured {
                            Ok(captured) => graphs = captured,
                            Err(reason) => add(&mut note, &format!("no CUDA graph: {reason}")),
                        }
                    }
                }
                let mut next = || {
                    let time = bench.cold(&mut |stream| match graphs.get(step) {
                        // SAFETY: `steps` and `outputs` own or borrow all buffers of the recorded launches and outlive the replays;
                        // nothing else uses them before `cold` has waited for the replay's end.
                        Some(graph) => unsafe { graph.replay(stream) }.expect("replay"),
                        None => (steps.launch)(&mut outputs, step, stream),
                    });
                    step += 1;
                    if step == steps.count {
                        (steps.reset)(&mut outputs, stream);
                        step = 0;
                    }
                    time
                };
                (0..warm_up).for_each(|_| {
                    next();
                });
                (0..iterations)
                    .map(|_| {
                        let time = next();
                        samples.push(time.as_secs_f64() * 1e6);
                        time
                    })
                    .sum()
            });
        });
        // None if criterion's filter left the case out.
        let Some(summary) = Summary::of(&samples) else { return outputs };
        // Timed all the same: where it is the check that is wrong, the machine need not be had again.
        if let Some(reason) = wrong {
            panic!("wrong result after {:.1} us: {reason}", summary.median);
        }
        let kernels: Vec<_> = kernels
            .iter()
            .map(|k| json!({ "label": k.label, "arch": k.arch.to_string(), "cubin": k.cubin.to_string() }))
            .collect();
        let line = json!({
            "bench": format!("{}/{shape}", group.name),
            "implementation": figure::OURS,
            "median_us": summary.median,
            "p10_us": summary.p10,
            "p90_us": summary.p90,
            "samples": summary.samples,
            "bytes": work.bytes,
            "flops": work.flops,
            "link_bytes": work.link_bytes,
            "read_gb_s": bench.read_gb_s,
            "bf16_tflops": bench.bf16_tflops,
            "kernels": kernels,
            "note": note,
        });
        figure::append(FIGURES_VARIABLE, &line);
        outputs
    }
}

/// Launches of a case that differ: `count` of them, the state after which `reset` makes that before the first again, untimed.
#[derive(Debug)]
pub struct Steps<L, R> {
    /// Launches before the first comes again.
    pub count: usize,
    /// Enqueues a launch by its number.
    pub launch: L,
    /// Enqueues what makes the state that of the beginning.
    pub reset: R,
}

/// The launch as a CUDA graph, or why there is none.
fn capture(bench: &GpuBench, launch: &mut dyn FnMut()) -> Result<Graph, String> {
    let captured = catch_unwind(AssertUnwindSafe(|| {
        Graph::capture::<longkv_cuda::Error>(&bench.gpu, &bench.stream, |_| {
            launch();
            Ok(())
        })
    }));
    match captured {
        Ok(Ok(graph)) => Ok(graph),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(reason(&*panic)),
    }
}

fn add(note: &mut Option<String>, more: &str) {
    *note = Some(note.take().map_or(more.to_string(), |note| format!("{note}; {more}")));
}

/// The first line of what a panic said, shortened.
fn reason(panic: &(dyn Any + Send)) -> String {
    let said = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without words");
    said.lines().next().unwrap_or_default().chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_the_first_line() {
        let said = |body: fn()| reason(&*catch_unwind(body).expect_err("a panic"));
        assert_eq!(said(|| panic!("row {}: NaN\nand more", 3)), "row 3: NaN");
        assert_eq!(said(|| panic!("plain")), "plain");
        assert_eq!(said(|| std::panic::panic_any(7)), "a panic without words");
        assert_eq!(said(|| panic!("{}", "x".repeat(1000))).len(), 300);
    }

    #[test]
    fn notes_add_up() {
        let mut note = Work::new(1, 2).note("with the plan").note;
        add(&mut note, "no CUDA graph: 900");
        assert_eq!(note.as_deref(), Some("with the plan; no CUDA graph: 900"));
        let mut none = None;
        add(&mut none, "alone");
        assert_eq!(none.as_deref(), Some("alone"));
    }
}

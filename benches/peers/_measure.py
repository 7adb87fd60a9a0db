"""How peers are timed: as the kernels of this project are (benches/src/gpu.rs), with the same JSON lines.

Cold L2 before every run (256 MiB are read, so that L2 is full of clean lines), device time by CUDA events, the variants of a
problem in turn within every round, medians with 10th and 90th percentiles. Inputs are random. What LONGKV_FIGURES_HAD names as
measured before is left out.
"""

import json
import os

import torch

FLUSH_BYTES = 256 << 20
WARM_UP = 5
ROUNDS = 25

_flush = None
_had = None


def require_gpu():
    """Ends the program where there is no GPU: a peer that did not run must not look like one that did."""
    if not torch.cuda.is_available():
        raise SystemExit("REQUIRE_GPU: PyTorch sees no CUDA device")
    torch.manual_seed(1)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}")


def cold(run):
    """Device time of one run in microseconds."""
    global _flush
    if _flush is None:
        _flush = torch.randint(-100, 100, (FLUSH_BYTES // 4,), dtype=torch.int32, device="cuda")
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.sum(_flush)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def graphed(run):
    """The run as a CUDA graph, so that what Python and PyTorch spend on the host does not show; itself if it cannot be captured."""
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay, None
    except Exception as error:  # whatever a library raises
        torch.cuda.synchronize()
        return run, f"no CUDA graph: {first_line(error)}"


def first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def relative_error(found, expected):
    """||found - expected|| / ||expected||; NaN never passes."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def had(bench, implementation):
    """Whether an earlier run of the same bundle has a figure of both, or this one has tried."""
    global _had
    if _had is None:
        _had = set()
        path = os.environ.get("LONGKV_FIGURES_HAD")
        if path:
            with open(path) as file:
                for line in file:
                    try:
                        figure = json.loads(line)
                        _had.add((figure["bench"], figure["implementation"]))
                    except (ValueError, KeyError):  # a line that was cut off
                        pass
    return (bench, implementation) in _had


def missing(benches, implementation):
    """Those of some benches that have no figure of an implementation yet."""
    benches = [benches] if isinstance(benches, str) else benches
    return [bench for bench in benches if not had(bench, implementation)]


class WrongResult(Exception):
    """A peer that ran and computed something else."""


def compare(benches, variants, *, nbytes, flops, expected=None, tolerance=2e-2, notes=None):
    """Times variants of one problem and writes a line for each, under the name of every bench of ours that solves it.

    `variants` maps a name to `make`, which builds inputs of its own and returns a function that runs once and returns its
    result. A variant that cannot run here, or whose result is wrong, gets a line with the reason instead of a time. `expected`
    is a result or a function that makes it, called if there is anything to compare; `notes` says by name what a time covers.

    Each is timed, and its line written, as soon as it is ready, so that none costs another its time by compiling long. Those
    that are ready together are timed once more in turn, and that line counts.
    """
    left = {name: missing(benches, name) for name in variants}
    left = {name: benches for name, benches in left.items() if benches}
    if not left:
        return
    if callable(expected):
        expected = expected()
    ready = {}

    def say(name, times):
        times.sort()
        at = lambda part: times[round((len(times) - 1) * part)]
        line = {
            "implementation": name,
            "median_us": at(0.5),
            "p10_us": at(0.1),
            "p90_us": at(0.9),
            "samples": len(times),
            "bytes": nbytes,
            "flops": flops,
        }
        note = "; ".join(filter(None, [(notes or {}).get(name), ready[name][1]]))
        if note:
            line["note"] = note
        write_all(left[name], line)

    for name in left:
        try:
            run = variants[name]()
            result = run()
            torch.cuda.synchronize()
            if expected is not None and result is not None:
                error = relative_error(result.reshape(expected.shape), expected)
                if not error < tolerance:
                    raise WrongResult(f"wrong result: relative error {error:.1e}")
            del result
            ready[name] = graphed(run)
            say(name, [cold(ready[name][0]) for _ in range(WARM_UP + ROUNDS)][WARM_UP:])
        except WrongResult as error:
            ready.pop(name, None)
            write_all(left[name], {"implementation": name, "failed": first_line(error)})
        except Exception as error:  # a peer that fails is reported, not fatal
            ready.pop(name, None)
            write_all(left[name], {"implementation": name, "skipped": first_line(error)})
    if len(ready) < 2:
        return
    samples = {name: [] for name in ready}
    names = list(ready)
    for round_ in range(WARM_UP + ROUNDS):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            time = cold(ready[name][0])
            if round_ >= WARM_UP:
                samples[name].append(time)
    for name, times in samples.items():
        say(name, times)


def write_all(benches, line):
    for bench in benches:
        write({"bench": bench} | line)


def write(line):
    reason = line.get("skipped") or line.get("failed")
    if reason:
        word = "skipped" if "skipped" in line else "FAILED"
        print(f"{line['bench']:48} {line['implementation']:24} {word}: {reason}")
    else:
        print(
            f"{line['bench']:48} {line['implementation']:24} {line['median_us']:10.1f} us "
            f"({line['p10_us']:.1f} to {line['p90_us']:.1f})"
        )
    path = os.environ.get("LONGKV_FIGURES")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

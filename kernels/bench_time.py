"""How a case is timed and judged: rotation of weights, rounds in turns, CUDA graphs, medians, the error that
is allowed."""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_build import Built, Call
from bench_cases import Case, everything, targets, tiny

L2_COPIES_BYTES = (
    256 << 20
)  # weights in rotation: several times the largest L2 cache (H200: 50 MB, RTX 4090: 72 MB)


def device_of(dry: bool) -> torch.device:
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; --dry-run walks the plan on a CPU")
    return torch.device("cuda")


def copies_of(case: Case, dry: bool) -> int:
    return 1 if dry else max(1, min(64, round(L2_COPIES_BYTES / case.moved())))


def _graph(calls: list[Call]) -> Call:
    """All calls, one after the other, in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up outside of the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _timer(calls: list[Call], captured: bool, cuda: bool) -> Callable[[], float]:
    """A function that runs all calls once and returns microseconds per call."""
    if not cuda:

        def clock() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) * 1e6 / len(calls)

        return clock
    for call in calls:
        call()
    replay = _graph(calls) if captured else None

    def events() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if replay is not None:
            replay()
        else:
            for call in calls:
                call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(calls)

    return events


def measure(made: Built, case: Case, device: torch.device, rounds: int) -> dict[str, float]:
    """Median microseconds per call of every contender, interleaved."""
    cuda = device.type == "cuda"
    timers, times = {}, {}
    for name, calls in made.calls.items():
        # Eager peers that synchronize or allocate oddly cannot be captured; they run as they are.
        try:
            timers[name] = _timer(calls, case.small and cuda, cuda)
        except RuntimeError as error:
            if name == "ours":
                raise
            made.left_out[name] = f"not capturable in a CUDA graph: {error}".split("\n")[0][:200]
    for timer in timers.values():
        timer()
    for _ in range(rounds):
        for name, timer in timers.items():
            times.setdefault(name, []).append(timer())
    return {name: statistics.median(values) for name, values in times.items()}


def checked(made: Built, case: Case) -> dict[str, float]:
    """Our error and the error allowed. ValueError where it is larger: a wrong op has no speed."""
    error, allowed = made.check()
    if not error <= allowed:
        raise ValueError(f"{case.name}: error {error:.3g}, allowed {allowed:.3g}; not timed")
    return {"error": error, "allowed": allowed}


def write(path: Path, value: Any) -> None:
    """JSON, atomically: a run that is cut off leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes and flops per second that this machine really gives: a large copy and a large bf16 product."""
    source = torch.empty(1 << 28, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(_repeat(lambda: target.copy_(source)))
    a = torch.randn(8192, 8192, device=device).bfloat16()
    product = statistics.median(_repeat(lambda: a @ a))
    return {"bytes_per_s": 2 * source.nbytes / copy * 1e6, "flops_per_s": 2 * 8192**3 / product * 1e6}


def _repeat(call: Call) -> list[float]:
    timer = _timer([call], False, True)
    return [timer() for _ in range(20)]


def chosen(name: str, dry: bool) -> list[Case]:
    cases = targets() if name == "targets" else everything()
    return tiny(cases) if dry else cases

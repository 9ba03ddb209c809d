"""Measure the kernels on a GPU, next to what they replace.

    python kernels/bench.py check                  every op against a reference at one real size
    python kernels/bench.py run --set targets      times, into the file of --out, a row at a time
    python kernels/bench.py tune --seconds 80      tile sizes for this GPU, into the user's cache (dispatch.user_cache)
    python kernels/bench.py table                  the kernels' part of benchmarks/results/gpu-*.json into kernels/README.md

How: ours and its peers take turns in one process, round by round, so that clocks and temperature are the same for all; the
weights rotate through enough copies that none is in the L2 cache when it is read; calls for 16 rows or fewer run inside a CUDA
graph, as they do when serving; the figure is the median over rounds. An op whose result is wrong is not timed.

--dry-run walks the same code on a CPU with the references, at tiny shapes, and keeps no figures.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lowbit_kernels
import torch
from bench_cases import PEERS, Built, Call, Case, build, everything, targets, tiny
from bench_report import write_report
from lowbit_kernels import dispatch

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"  # where benchmarks/gpu.sh leaves gpu-<name>.json
L2_COPIES_BYTES = 256 << 20  # weights in rotation: several times the largest L2 cache (H200: 50 MB, RTX 4090: 72 MB)
# What a coordinate of a configuration may become while tuning.
AXES: dict[str, list[int]] = {
    "BLOCK_M": [8, 16, 32, 64, 128, 256], "BLOCK_N": [16, 32, 64, 128], "BLOCK_K": [64, 128], "SPLIT_K": [0, 1, 2, 4, 8, 16],
    "SPLIT_N": [0, 1, 2, 4, 8], "UNROLL": [1, 2, 4], "CHUNK_MB": [8, 16, 24, 48, 96], "ROWS": [32, 64, 128],
    "num_warps": [2, 4, 8], "num_stages": [1, 2, 3, 4, 5],
}  # fmt: skip
# Whose configurations a case tunes.
TUNED = {
    "packed_matmul": "packed_matmul", "packed_matmul_dx": "packed_matmul_dx", "binary_matmul": "binary_matmul",
    "grid_step": "grid_gradients", "quantize_pack": "quantize_pack", "hadamard": "hadamard",
}  # fmt: skip
# Starts of the tuner beyond the packaged table, which has the form that is right without a measurement.
STARTS: dict[str, list[dict]] = {
    "grid_gradients": [
        {"form": "fused", "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
        {"form": "fused", "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    ],
}


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


def environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "cpu", "arch": dispatch.architecture() if cuda else 0,
        "torch": torch.__version__, "triton": version, "cuda": torch.version.cuda, "python": platform.python_version(),
        "peers": {name: _version(name) for name in ("bitsandbytes", "gemlite")}, "commit": _commit(), "sources": _sources(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, with "+" where it is changed; in a copy without its history $LOWBIT_COMMIT, or None."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LOWBIT_COMMIT")
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _sources() -> str:
    """A hash of the kernels and their table, which says what was measured where there is no commit."""
    digest = hashlib.sha256()
    for path in sorted(Path(lowbit_kernels.__file__).parent.glob("*.[pj]*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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


def run(options: argparse.Namespace) -> int:
    device, failures = device_of(options.dry_run), 0
    info, path, peers = environment(device), options.out, PEERS - {"torch.compile"} if options.quick else PEERS
    # The targets, once tuned, replace their first rows; everything else of the file stays.
    rows: dict[str, dict] = {}
    if path.is_file() and not options.dry_run:
        rows = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    top = {} if options.dry_run else ceilings(device)
    for case in chosen(options.set, options.dry_run):
        try:
            made = build(case, device, copies_of(case, options.dry_run), peers)
            row: dict[str, Any] = {
                "name": case.name,
                "op": case.op,
                "bits": case.bits,
                "m": case.m,
                "n": case.n,
                "k": case.k,
            }
            row |= {
                "group": case.group,
                "rank": case.rank,
                "flops": case.flops(),
                "bytes": case.moved(),
                **checked(made, case),
            }
            row["microseconds"] = measure(made, case, device, 2 if options.dry_run else options.rounds)
            row["left_out"] = made.left_out
        except Exception as error:  # a compiler may raise anything, and the other cases are still wanted
            failures += 1
            row = {"name": case.name, "op": case.op, "failed": f"{type(error).__name__}: {error}"[:400]}
        # A failed case must not take the next one's memory with it.
        made = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows[case.name] = row
        print(_line(row), flush=True)
        if not options.dry_run:
            write(path, {**info, "ceilings": top, "rows": list(rows.values())})
    return failures


def _line(row: dict) -> str:
    if "failed" in row:
        return f"{row['name']}: FAILED {row['failed']}"
    times = row["microseconds"]
    peers = ", ".join(
        f"{name} {t:.1f} ({t / times['ours']:.2f}x)" for name, t in times.items() if name != "ours"
    )
    return f"{row['name']}: {times['ours']:.1f} us; {peers}; error {row['error']:.1e}"


def check(options: argparse.Namespace) -> int:
    """Every op once against its reference, at a size that compiles what will be used."""
    device, failures = device_of(options.dry_run), 0
    for case in chosen("targets", options.dry_run):
        try:
            row = checked(build(case, device, 1, frozenset()), case)
            print(f"{case.name}: error {row['error']:.1e}, allowed {row['allowed']:.1e}", flush=True)
        except Exception as error:
            failures += 1
            print(f"{case.name}: FAILED {error}", flush=True)
    return failures


def _entry(case: Case, config: dict, arch: int) -> dict:
    """A configuration as an entry of the table: for this architecture and the octave of M around the case."""
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[case.dtype]
    low = case.m // 2 + 1 if case.m > 1 else 1
    return {
        "arch": arch, "bits": case.bits, "dtype": dtype, "m": [low, max(low, case.m)], "n": [case.n, case.n],
        "k": [case.k, case.k], "config": config,
    }  # fmt: skip


def _starts(op: str, case: Case, arch: int) -> list[dict]:
    """The table's choice first, then what it holds for the other regimes of this architecture."""
    out = [dispatch.config(op, case.bits, case.dtype, case.m, case.n, case.k, arch)]
    for entry in dispatch.read_table(dispatch.PACKAGED).get(op, ()):
        if (
            entry.get("arch") in (None, arch)
            and entry.get("bits", case.bits) == case.bits
            and entry["config"] not in out
        ):
            out.append(entry["config"])
    return out + STARTS.get(op, [])


def tune(options: argparse.Namespace) -> int:
    """Coordinate descent over AXES from each start, for the targets' ops; the best go to the user's table as they are found."""
    device, deadline = device_of(options.dry_run), time.monotonic() + options.seconds
    arch, path = (0 if options.dry_run else dispatch.architecture()), dispatch.user_cache()
    table = dispatch.read_table(path) if path.is_file() and not options.dry_run else {}
    failures = 0
    for case in chosen("targets", options.dry_run):
        if case.op not in TUNED or time.monotonic() > deadline:
            continue
        op, made = TUNED[case.op], build(case, device, copies_of(case, options.dry_run), frozenset())
        alone = Built(calls={"ours": made.calls["ours"]})
        best, least, first, tried = None, float("inf"), float("inf"), []

        def trial(config: dict, op: str = op, case: Case = case, made: Built = made, alone: Built = alone) -> float:
            """Microseconds, or infinity where it does not compile, does not fit or is wrong."""
            try:
                with dispatch.override(op, config):
                    checked(made, case)
                    return measure(alone, case, device, 1 if options.dry_run else 7)["ours"]
            except Exception:  # a compiler may raise anything for tile sizes it does not like
                return float("inf")
            finally:
                if device.type == "cuda":  # the trial's graph is gone, its counters may be used again
                    torch.cuda.synchronize()
                    importlib.import_module("lowbit_kernels.triton_common").drop_counters()

        queue = _starts(op, case, arch)
        while queue and time.monotonic() < deadline:
            config = queue.pop(0)
            if config in tried:
                continue
            tried.append(config)
            spent = trial(config)
            first = min(first, spent) if len(tried) == 1 else first
            if spent < 0.98 * least:  # two percent: below that it is noise
                best, least = config, spent
                moves = [
                    {**config, axis: v}
                    for axis in AXES
                    if axis in config
                    for v in _neighbours(AXES[axis], config[axis])
                ]
                queue = moves + queue
        if best is None:
            failures += 1
            print(f"{case.name}: no configuration worked", flush=True)
            continue
        print(f"{case.name}: {first:.1f} -> {least:.1f} us after {len(tried)} trials: {best}", flush=True)
        if not options.dry_run:
            entry = _entry(case, best, arch)
            kept = [e for e in table.get(op, []) if {**e, "config": None} != {**entry, "config": None}]
            table[op] = [*kept, entry]
            write(path, table)
    return failures


def _neighbours(values: list[int], value: int) -> list[int]:
    """The values next to `value` on its axis."""
    lower, higher = [v for v in values if v < value], [v for v in values if v > value]
    return lower[-1:] + higher[:1]


def table(options: argparse.Namespace) -> int:
    text = write_report(options.out, Path(__file__).with_name("README.md"), dry=options.dry_run)
    print(text)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["check", "run", "tune", "table"])
    parser.add_argument("--set", choices=["targets", "all"], default="targets")
    parser.add_argument("--out", type=Path, help="file of the results (run), or folder of the results (table)")
    parser.add_argument("--quick", action="store_true", help="without the peers that compile for long")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=300.0, help="time for tuning")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    options.out = options.out or (RESULTS if options.command == "table" else RESULTS / "kernels.json")
    torch.manual_seed(0)
    failures = {"check": check, "run": run, "tune": tune, "table": table}[options.command](options)
    if failures:
        sys.exit(f"{failures} cases failed")


if __name__ == "__main__":
    main()

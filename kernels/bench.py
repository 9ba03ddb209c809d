"""Measure the kernels on a GPU, next to what they replace.

    python kernels/bench.py check                  every op against a reference at one real size
    python kernels/bench.py run --set targets      times, into the file of --out, a row at a time
    python kernels/bench.py tune --seconds 80      tile sizes for this GPU, into the user's cache
                                                   (dispatch.user_cache)
    python kernels/bench.py profile                device time by kernel, and the time to launch, of each case
    python kernels/bench.py table                  the kernels' part of benchmarks/results/gpu-*.json into
                                                   kernels/README.md

How: ours and its peers take turns in one process, round by round, so that clocks and temperature are the same
for all; the weights rotate through enough copies that none is in the L2 cache when it is read; calls for 16
rows or fewer run inside a CUDA graph, as they do when serving; the figure is the median over rounds. An op
whose result is wrong is not timed.

--dry-run walks the same code on a CPU with the references, at tiny shapes, and keeps no figures.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import lowbit_kernels
import torch
from bench_build import PEERS, build
from bench_profile import profile
from bench_report import write_report
from bench_time import ceilings, checked, chosen, copies_of, device_of, measure, write
from bench_tune import tune
from lowbit_kernels import dispatch

RESULTS = (
    Path(__file__).parent.parent / "benchmarks" / "results"
)  # where benchmarks/gpu.sh leaves gpu-<name>.json


def environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "cpu",
        "arch": dispatch.architecture() if cuda else 0,
        "torch": torch.__version__,
        "triton": version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "peers": {name: _version(name) for name in ("bitsandbytes", "gemlite")},
        "commit": _commit(),
        "sources": _sources(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, with "+" where it is changed; in a copy without its history
    $LOWBIT_COMMIT, or None.
    """
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True, check=True
        )
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


def run(options: argparse.Namespace) -> int:
    device, failures = device_of(options.dry_run), 0
    info, path, peers = (
        environment(device),
        options.out,
        PEERS - {"torch.compile"} if options.quick else PEERS,
    )
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
                "captured": case.small,
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


def table(options: argparse.Namespace) -> int:
    text = write_report(options.out, Path(__file__).with_name("README.md"), dry=options.dry_run)
    print(text)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=["check", "run", "tune", "profile", "table"])
    parser.add_argument("--set", choices=["targets", "all"], default="targets")
    parser.add_argument(
        "--out", type=Path, help="file of the results (run), or folder of the results (table)"
    )
    parser.add_argument("--only", default="", help="tune or profile the cases whose names contain this")
    parser.add_argument("--quick", action="store_true", help="without the peers that compile for long")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=300.0, help="time for tuning")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.command in ("run", "table"):
        options.out = options.out or (RESULTS if options.command == "table" else RESULTS / "kernels.json")
    torch.manual_seed(0)
    failures = {"check": check, "run": run, "tune": tune, "profile": profile, "table": table}[
        options.command
    ](options)
    if failures:
        sys.exit(f"{failures} cases failed")


if __name__ == "__main__":
    main()

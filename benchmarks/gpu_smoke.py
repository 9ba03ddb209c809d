"""Is every kernel right on the GPU at hand? The real-size cases of kernels/bench.py and
tests/kernels/test_gpu.py, in many processes.

    python -m benchmarks.gpu_smoke --rows FILE               a line of JSON per test, as it ends
    python -m benchmarks.gpu_smoke --rows FILE --dry-run     the same on a CPU: tiny cases on the references

Almost all of the time is compiling, which one process does on one core: the work is dealt to as many
processes as there are cores for, and what they compile stays in Triton's cache for the timing that follows.
A test that kills the CUDA context (an illegal address) or its process costs itself alone: the process is
started again and goes on with the test after it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "kernels" / "test_gpu.py"
CONTEXT_LOST = 77  # exit status of a worker whose CUDA context is of no more use
LOST = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
)


class Rows:
    """One worker's rows: lines of a file, flushed. A test that was begun and not ended killed its process."""

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, 0.0
        if path.is_file() and not path.read_bytes().endswith(b"\n"):  # a line that was cut off
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        known = read(path)
        self.done = {row["name"] for row in known if "outcome" in row}
        for name in [row["name"] for row in known if row["name"] not in self.done]:
            self.write(name=name, outcome="failed", seconds=0.0, problem="its process died")
            self.done.add(name)

    def write(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def begin(self, name: str) -> None:
        self.began = time.monotonic()
        self.write(name=name)

    def end(self, name: str, outcome: str, problem: str = "", **values: Any) -> None:
        """Writes the row. Leaves the process where the error took the CUDA context with it."""
        seconds = round(time.monotonic() - self.began, 2)
        self.write(
            name=name,
            outcome=outcome,
            seconds=seconds,
            **({"problem": _short(problem)} if problem else {}),
            **values,
        )
        if outcome == "failed":
            print(f"--- {name}: FAILED\n{problem}", flush=True)
        if any(text in problem for text in LOST):
            os._exit(CONTEXT_LOST)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a line that was cut off is none."""
    out = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


def _short(error: str) -> str:
    """The lines of a traceback that say what happened, without the paths of this machine."""
    said = [line[2:] if line.startswith("E ") else line for line in error.splitlines() if line.strip()]
    marked = [line for line in error.splitlines() if line.startswith("E ")]
    lines = [line[2:].strip() for line in marked] if marked else said[-3:]
    return " | ".join(lines)[:600].replace(str(ROOT), ".").replace(os.path.expanduser("~"), "~")


class Share:
    """A pytest plugin: this worker's share of the tests, and a row for each."""

    def __init__(self, index: int, workers: int, rows: Rows) -> None:
        self.index, self.workers, self.rows, self.problem = index, workers, rows, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        mine = items[self.index :: self.workers]
        items[:] = [item for item in mine if item.name not in self.rows.done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.rows.begin(nodeid.split("::")[-1])

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("::")[-1]
        if report.failed:
            self.problem = str(report.longrepr)
        if report.when == "setup" and report.skipped:
            self.rows.end(name, "skipped")
        elif report.when == "call" or (report.when == "setup" and report.failed):
            self.rows.end(name, report.outcome, self.problem if report.failed else "")


def work(index: int, workers: int, rows: Rows, dry: bool) -> int:
    """This worker's cases and tests. Returns the number that failed."""
    import torch
    from bench import checked, chosen, device_of
    from bench_build import build

    device = device_of(dry)
    torch.manual_seed(0)
    for case in chosen("targets", dry)[index::workers]:
        if case.name in rows.done:
            continue
        rows.begin(case.name)
        try:
            found = checked(build(case, device, 1, peers=frozenset()), case)
            rows.end(case.name, "passed", "", **found)
        except Exception:  # whatever it is, the cases after it are still wanted
            rows.end(case.name, "failed", traceback.format_exc())
    try:
        import pytest
    except ImportError:
        return 0
    options = [
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=short",
        "--rootdir",
        str(ROOT),
    ]
    pytest.main([str(TESTS), *options], plugins=[Share(index, workers, rows)])
    return 0


def supervise(options: argparse.Namespace) -> int:
    """Start the workers, again where one dies; returns how many tests failed or did not end in time."""
    workers = options.workers or (2 if options.dry_run else max(1, min(14, (os.cpu_count() or 2) - 2)))
    deadline = time.monotonic() + options.seconds
    files = [options.rows.with_name(f"{options.rows.stem}-{index}.jsonl") for index in range(workers)]
    for file in files:
        file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_smoke", *(["--dry-run"] if options.dry_run else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(index: int) -> subprocess.Popen[bytes]:
        share = ["--rows", str(files[index]), "--worker", f"{index}/{workers}"]
        return subprocess.Popen([*command, *share], cwd=ROOT, env=environment)

    running = {index: (start(index), 0) for index in range(workers)}
    while running and time.monotonic() < deadline:
        time.sleep(0.2)
        for index, (process, restarts) in list(running.items()):
            if process.poll() is None:
                continue
            del running[index]
            if process.returncode != 0 and restarts < 20:
                running[index] = (start(index), restarts + 1)
        merge(files, options.rows)
    for process, _ in running.values():
        process.kill()
    rows = merge(files, options.rows, final=True)
    count = {
        what: sum(row["outcome"] == what for row in rows)
        for what in ("passed", "failed", "skipped", "cut off")
    }
    print(f"correctness: {', '.join(f'{number} {what}' for what, number in count.items())}", flush=True)
    for row in rows:
        if row["outcome"] in ("failed", "cut off"):
            print(f"  {row['outcome']}: {row['name']}: {row.get('problem', '')[:300]}", flush=True)
    return count["failed"] + count["cut off"] + (0 if count["passed"] else 1)


def merge(files: list[Path], target: Path, final: bool = False) -> list[dict[str, Any]]:
    """The ended rows of all workers in one file; at the end also those that were begun and cut off."""
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        for row in read(file):
            if "outcome" in row:
                rows[row["name"]] = row
            elif final:
                rows.setdefault(row["name"], {**row, "outcome": "cut off", "problem": "no time left"})
    partial = target.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    os.replace(partial, target)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--workers", type=int, default=0, help="0: as many as there are cores for")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker:
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        sys.exit(1 if supervise(options) else 0)
    index, workers = (int(part) for part in options.worker.split("/"))
    sys.exit(work(index, workers, Rows(options.rows), options.dry_run))


if __name__ == "__main__":
    main()

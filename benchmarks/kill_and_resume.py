"""Kill runs at random moments, start two at once, and compare what ships with a run that was left alone.

    python benchmarks/kill_and_resume.py --kills 40 --pairs 4 recipes/quickstart.yaml train.max_steps=20

--kills N: N times, by SIGTERM and SIGKILL in turn: start the run in a new folder and kill it at a moment
drawn over its whole length, from the first import to the report; two times of four another process of the
same command starts a moment before the kill. Then start it again and let it finish.

--pairs N: N times start two processes at once in one folder, in turn with the same recipe and with another
seed, and let both end: each may finish, with the bytes of its recipe's run, or refuse (exit 2).

After each, the tensors of base/, adapter/, merged/ and exported/ must have the sha256 of the run that was
left alone, `verify` must pass, and nothing half written may lie in the folder. Exits with 1 if not.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDERS = ("base", "adapter", "merged", "exported")
REFUSED = "another process is writing to this folder"


class Line:
    """The command that is killed and started again."""

    def __init__(self, recipe: str, overrides: list[str]):
        self.arguments = ["run", recipe, *overrides]

    def start(self, output: Path, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "lowbit_ft", *self.arguments, *more, f"output={output}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish(self, output: Path, *more: str) -> None:
        process = self.start(output, *more)
        errors = process.communicate()[1]
        if process.returncode:
            raise SystemExit(errors)

    def verify(self, folder: Path) -> tuple[int, str]:
        """(exit code of `lowbit-ft verify`, what it said)."""
        command = [sys.executable, "-m", "lowbit_ft", "verify", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr


def shas(output: Path) -> dict[str, str]:
    """Folder/file -> sha256 of every tensor file that the run left."""
    paths = sorted(
        p for f in FOLDERS for p in (output / f).glob("*") if p.suffix in (".safetensors", ".gguf")
    )
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def problems(line: Line, output: Path, wanted: list[dict[str, str]]) -> list[str]:
    """What is wrong with a finished folder; wanted: the sha256 of the runs that it may be."""
    found = []
    if shas(output) not in wanted:
        found.append("DIFFERENT BYTES")
    if left := [p.name for p in output.rglob(".*.lowbit_ft-*")]:
        found.append(f"LEFTOVERS {left}")
    folder = output / ("exported" if (output / "exported").is_dir() else "merged")
    code, said = line.verify(folder)
    if code:
        found.append(f"VERIFY: {said[-300:]}")
    return found


def kill(line: Line, output: Path, how: signal.Signals, moment: float, second: bool) -> str:
    """One kill; with a second process that starts a moment before it. Returns what was seen."""
    first = line.start(output)
    ahead = min(2.0, moment / 2) if second else 0.0  # the second one imports for about so long
    said = ""
    try:
        first.communicate(timeout=moment - ahead)
    except subprocess.TimeoutExpired:
        other = line.start(output) if second else None
        time.sleep(ahead)
        first.send_signal(how)
        first.communicate()
        if other is not None:
            errors = other.communicate()[1]
            said = f", second: exit {other.returncode}"
            if other.returncode not in (0, 2) or (other.returncode == 2 and REFUSED not in errors):
                said += f" UNEXPECTED {errors[-300:]}"
    steps = sorted(f.name for f in (output / "checkpoints").glob("step-*")) if output.exists() else []
    return f"exit {first.returncode}, on disk: {steps[-1] if steps else 'no checkpoint'}{said}"


def pair(line: Line, output: Path, other: str, apart: float) -> str:
    """Two at once. Returns how they ended."""
    first = line.start(output)
    time.sleep(apart)
    second = line.start(output, *([other] if other else []))
    ends = []
    for process in (first, second):
        errors = process.communicate()[1]
        refused = process.returncode == 2 and (
            REFUSED in errors or "holds a run with another recipe" in errors
        )
        ends.append(
            "finished" if process.returncode == 0 else "refused" if refused else f"FAILED {errors[-300:]}"
        )
    return " and ".join(ends)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe")
    p.add_argument("overrides", nargs="*")
    p.add_argument("--kills", type=int, default=8)
    p.add_argument("--pairs", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    rng, line, bad = random.Random(o.seed), Line(o.recipe, o.overrides), 0
    with tempfile.TemporaryDirectory() as folder:
        place, other = Path(folder), "train.seed=1"
        began = time.monotonic()
        line.finish(place / "whole")
        length = time.monotonic() - began
        wanted = [shas(place / "whole")]
        print(f"left alone: {length:.0f} s, {wanted[0]}", flush=True)
        for number in range(o.kills):
            output, how = place / f"kill-{number}", (signal.SIGTERM, signal.SIGKILL)[number % 2]
            moment, second = rng.uniform(0.02, 0.98) * length, number % 4 >= 2
            seen = kill(line, output, how, moment, second)
            line.finish(output)
            found = problems(line, output, wanted)
            bad += bool(found) or "UNEXPECTED" in seen
            print(
                f"{how.name} at {moment:.1f} s, {seen}; then: {'; '.join(found) or 'same bytes'}", flush=True
            )
        if o.pairs > 1:
            line.finish(place / "other", other)
            wanted.append(shas(place / "other"))
        for number in range(o.pairs):
            output, apart = place / f"pair-{number}", rng.uniform(0, 0.5) * length * (number % 3 > 0)
            seen = pair(line, output, other if number % 2 else "", apart)
            found = problems(line, output, wanted if number % 2 else wanted[:1])
            bad += bool(found) or "FAILED" in seen or "finished" not in seen
            what = "two recipes" if number % 2 else "one recipe"
            print(
                f"pair of {what}, {apart:.1f} s apart: {seen}; {'; '.join(found) or 'same bytes'}", flush=True
            )
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()

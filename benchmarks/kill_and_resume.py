"""Kill a run at random moments and resume it; the final adapter must have the bytes of a run that was never
stopped.

    python benchmarks/kill_and_resume.py --times 5 recipes/quickstart.yaml train.max_steps=20

For SIGTERM and for SIGKILL, `--times` times each: start the run in a new folder, kill it at a moment drawn
over the whole length of the uninterrupted run, start it again and let it finish. Prints each moment, what was
on disk then, and whether the adapter has the bytes of the uninterrupted run's.
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


def start(recipe: str, overrides: list[str], output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lowbit_ft", "run", recipe, *overrides, f"output={output}"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def sha(output: Path) -> str:
    return hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def finish(process: subprocess.Popen[bytes]) -> None:
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(errors.decode())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("recipe")
    p.add_argument("overrides", nargs="*")
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    rng = random.Random(o.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        began = time.monotonic()
        finish(start(o.recipe, o.overrides, whole))
        length = time.monotonic() - began
        print(f"uninterrupted: {length:.0f} s, adapter {sha(whole)}", flush=True)
        different = 0
        for kill in (signal.SIGTERM, signal.SIGKILL):
            for number in range(o.times):
                output = Path(folder) / f"{kill.name}-{number}"
                process = start(o.recipe, o.overrides, output)
                moment = rng.uniform(0.05, 0.95) * length
                try:
                    process.communicate(timeout=moment)
                except subprocess.TimeoutExpired:
                    process.send_signal(kill)
                    process.communicate()
                steps = (
                    sorted(f.name for f in (output / "checkpoints").glob("step-*")) if output.exists() else []
                )
                finish(start(o.recipe, o.overrides, output))
                same = sha(output) == sha(whole)
                different += not same
                print(
                    f"{kill.name} at {moment:.1f} s, exit {process.returncode}, on disk: "
                    f"{steps[-1] if steps else 'no checkpoint'}; "
                    f"resumed: {'same bytes' if same else 'DIFFERENT ' + sha(output)}",
                    flush=True,
                )
        raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()

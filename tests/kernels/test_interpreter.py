"""Runs tests/kernels/interpreter in processes where Triton interprets its kernels, and passes on what they
say.

The mode is chosen when kernels are decorated, so it can neither be switched on here nor off again for the
tests that follow.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreter")
ROOT = FOLDER.parents[2]
PROCESSES = 2  # each imports everything once more
FILES = sorted(FOLDER.glob("test_*.py"))
SHARES = [FILES[i::PROCESSES] for i in range(PROCESSES)]


@pytest.mark.slow
@pytest.mark.parametrize("files", SHARES, ids=lambda files: "+".join(path.stem[5:] for path in files))
def test_interpreter(files: list[Path]):
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    # The parent's coverage and worker settings are not the child's.
    for name in [n for n in environment if n.startswith(("PYTEST_", "COV_CORE"))]:
        del environment[name]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-rp",
        *map(str, files),
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    # A file whose tests were all skipped or not collected would return 0 too.
    for file in files:
        assert re.search(rf"^PASSED \S*/{file.name}::", run.stdout, re.MULTILINE), run.stdout[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-2000:]

"""The Triton kernels on the CPU, through Triton's interpreter, in fp32.

TRITON_INTERPRET is read when a kernel is decorated, so it has to be set before the first import of a kernel
and for the whole process: `tests/kernels/test_interpreter.py` runs this folder in a process of its own.
Collected by any other run, the folder is left out here, and counted there.

What the interpreter cannot show: races, asynchronous copies, 16-bit arithmetic, inline assembly. Those are
the AOT gate's (tests/kernels/aot) and the GPU tests' business.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned(poison):
    """Every allocation is NaN until written, so a kernel that reads a pad or leaves an output unwritten
    shows.
    """


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    """The packaged table alone, not one that the user of this machine has tuned."""
    from lowbit_kernels import dispatch

    monkeypatch.setenv("LOWBIT_KERNELS_CACHE", str(tmp_path / "none.json"))
    dispatch.reload()

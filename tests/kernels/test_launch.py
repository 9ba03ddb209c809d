"""launch.py finds the kernel that Triton would find and gives it the same arguments. No GPU: the driver is
replaced by one that records."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_both_paths_launch_the_same():
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("launch_paths.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "sign planes: 1 launches alike" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-3000:]
    )


def test_kinds_tell_apart_what_triton_specializes_on():
    pytest.importorskip("triton")
    import torch
    from lowbit_kernels.launch import _kinds, cdiv

    whole = torch.zeros(64, dtype=torch.int16)
    different = [whole, whole[1:], whole.float(), None, 1, 16, 3, 1 << 31, (1 << 31) + 1, 1 << 63, 1.0, True]
    assert len({_kinds((value,)) for value in different}) == len(different)
    assert _kinds((3,)) == _kinds((5,)) and _kinds((32,)) == _kinds((16,)) == _kinds((0,))
    assert [cdiv(value, 4) for value in (0, 1, 4, 5)] == [0, 1, 1, 2]

"""Servers load what we write and compute the training forward. Only where their environments are named:

    python -m benchmarks.serve --install
    LOWBIT_VLLM=~/.cache/lowbit_ft/vllm LOWBIT_LLAMA_CPP=~/.cache/lowbit_ft/llama-cpp pytest THIS_FILE

Every case of the table is benchmarks/servers.sh, every night; here are one for each way in and one refusal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serve_cases import CASES
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.servers import SERVERS
from lowbit_ft.grid import IntGrid
from tests.processes import ROOT, environment

# Case -> the largest distance of log-probabilities; None: refused. fp16 and bf16 are the kernels' own noise.
SHORT: dict[str, float | None] = {
    "vllm | llama | compressed-tensors | W4 g128 own kernel": 0.2,
    "vllm | llama | compressed-tensors | W3 g128 asym": 1e-4,
    "vllm | llama | gptq | W4 g128 own kernel": 0.05,
    "vllm | llama | gptq | W3 g128 own kernel": None,
    "llama.cpp | llama | gguf | W4 g128": 0.5,
}
VARIABLES = {"vllm": "LOWBIT_VLLM", "llama.cpp": "LOWBIT_LLAMA_CPP"}


@pytest.mark.slow
@pytest.mark.parametrize("server", VARIABLES)
def test_what_it_computes_is_what_was_trained(server: str, tmp_path: Path) -> None:
    place = os.environ.get(VARIABLES[server])
    if not place:
        pytest.skip(f"{VARIABLES[server]} names no environment (python -m benchmarks.serve --install)")
    wanted = {name: far for name, far in SHORT.items() if CASES[name].server == server}
    flag = "--vllm" if server == "vllm" else "--llama-cpp"
    command = [sys.executable, "-m", "benchmarks.serve", flag, place, "--runs", str(tmp_path / "runs")]
    command += ["--out", str(tmp_path / "rows.json"), "--only", *wanted]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows.keys() == wanted.keys()
    for name, far in wanted.items():
        row = rows[name]
        if far is None:
            assert "Unsupported quantization config" in row["refused"]
        else:
            assert "refused" not in row, row["refused"]
            assert row["max"] <= far and row["greedy"][0] >= row["greedy"][1] // 2, row


def test_the_table_agrees_with_what_is_refused_before_training() -> None:
    """What vLLM refused for its grid is what export.server: vllm refuses; what it loaded is not."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "serve.json").read_text())["rows"]
    assert rows and set(rows) <= set(CASES)
    refused = 0
    for name, row in rows.items():
        case = CASES[name]
        server = SERVERS[case.server.removesuffix(" http")]
        keys = dict(key.removeprefix("quant.").split("=", 1) for key in case.keys)
        grid = IntGrid(
            bits=int(keys["bits"]),
            group_size=int(keys["group_size"]),
            symmetric=keys["symmetric"] == "true",
            residual_bits=0,
        )
        reason = server.reject(EXPORTERS[case.format], grid)
        if "refused" not in row:
            assert reason is None, name
        elif "Unsupported quantization config" in row["refused"]:
            assert reason is not None, name
            refused += 1
    assert refused >= 1

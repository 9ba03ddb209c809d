"""`lowbit-ft serve`: a native folder answers over HTTP, offline, in its own process, with what `generate`
says.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_ft.cli.serve import NEEDS, serve
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.writer import write_model
from lowbit_ft.model.checkpoint import Checkpoint
from tests.packed_tools import int_grid, random_weights

ROOT = Path(__file__).resolve().parents[2]


def post(url: str, body: dict[str, object]) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    process.kill()
    raise AssertionError(f"no server: {process.communicate()[0][-3000:]}")


@pytest.mark.slow
def test_a_native_folder_answers_over_http(tmp_path: Path) -> None:
    for name in NEEDS:
        pytest.importorskip(name)
    checkpoint = Checkpoint.open(ROOT / "recipes" / "assets" / "tiny-llama")
    write_model(
        tmp_path / "merged",
        checkpoint,
        random_weights(checkpoint.empty_model(), int_grid()),
        EXPORTERS["native"],
    )
    (tmp_path / "recipe.yaml").touch()  # a run folder serves what it ships
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lowbit_ft",
            "serve",
            str(tmp_path),
            "--device",
            "cpu",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )
    messages = [{"role": "user", "content": "def f(x): return x"}]
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        body = {"model": str(tmp_path / "merged"), "messages": messages, "max_tokens": 6, "temperature": 0}
        said = post(f"http://127.0.0.1:{port}/v1/chat/completions", body)["choices"][0]["message"]["content"]
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert said == tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) and said


def test_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ValueError, match=r"serving needs uvicorn; run pip install 'lowbit-ft\[serve\]'"):
        serve(tmp_path, [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="config.json: missing; give a model folder"):
        serve(tmp_path, [])


@pytest.mark.parametrize(
    ("name", "symmetric", "words"),
    [
        (
            "gguf",
            True,
            r"gguf is not served by transformers; run llama-server -m .*, or serve merged/.*lowbit-ft "
            r"serve RUN/merged",
        ),
        (
            "mlx",
            True,
            r"mlx is not served by transformers; run mlx_lm.server --model .*lowbit-ft serve RUN/merged",
        ),
        ("gptq", True, r"reading gptq needs gptqmodel.* RUN/merged"),
        (
            "compressed-tensors",
            False,
            r"options that its server does not take.*run vllm serve .*lowbit-ft serve RUN/merged",
        ),
        ("compressed-tensors", True, None),
        ("native", False, None),
    ],
)
def test_formats_that_transformers_serve_does_not_load(
    name: str, symmetric: bool, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(ROOT / "recipes" / "assets" / "tiny-llama")
    write_model(
        tmp_path / "m",
        checkpoint,
        random_weights(checkpoint.empty_model(), int_grid(symmetric=symmetric)),
        EXPORTERS[name],
    )
    absent = ("gptqmodel", "optimum")
    monkeypatch.setattr(
        "lowbit_ft.export.base.find_spec", lambda module: None if module in absent else object()
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda module, package=None: object())
    started: list[list[str]] = []
    monkeypatch.setitem(
        sys.modules,
        "transformers.cli.transformers",
        SimpleNamespace(app=lambda options, prog_name: started.append(options)),
    )
    if words is None:
        serve(tmp_path / "m", ["--port", "1"])
        assert started == [["serve", str(tmp_path / "m"), "--port", "1"]]
        return
    with pytest.raises(ValueError, match=words):
        serve(tmp_path / "m", [])
    assert started == []

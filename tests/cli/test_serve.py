"""`lowbit-ft serve`: a native folder answers over HTTP, offline, in its own process, with what `generate`
says.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_ft.cli.serve import NEEDS, serve
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.writer import write_model
from lowbit_ft.model.checkpoint import Checkpoint
from tests.forks import Forked
from tests.packed_tools import int_grid, random_weights

ROOT = Path(__file__).resolve().parents[2]


def post(url: str, body: dict[str, object], timeout: float = 60) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def wait_for(url: str, process: Forked) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    process.kill()
    raise AssertionError(f"no server: {''.join(process.communicate())[-3000:]}")


# `lowbit-ft` as HF_HUB_OFFLINE=1 starts it: the hub's library reads that once, when it is imported.
OFFLINE = "from huggingface_hub import constants; constants.HF_HUB_OFFLINE = True\n"
OFFLINE += "from lowbit_ft.cli.main import main; main()"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Forked, str]]:
    """(process, address) of a server of tmp_path, a run folder that ships merged/."""
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
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", port]
    server = Forked(["-c", OFFLINE, "serve", tmp_path, *options], cwd=tmp_path)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        if server.folder.exists():
            server.communicate(timeout=20)


MESSAGES = [{"role": "user", "content": "def f(x): return x"}]
# A request that would take the tiny model many minutes: no token ends it.
ENDLESS = {"messages": MESSAGES, "generation_config": '{"max_new_tokens": 100000, "min_new_tokens": 100000}'}


def status(url: str, body: dict[str, object]) -> int:
    try:
        post(url, body)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


SHORT = {"messages": MESSAGES, "max_tokens": 2}


def begin(address: str, body: dict[str, object]) -> socket.socket:
    """A client whose request is being answered: the connection. Another one is kept waiting by it."""
    host, _, port = address.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)))
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
    with pytest.raises(TimeoutError):
        post(f"{address}/v1/chat/completions", SHORT, timeout=2)
    return client


@pytest.mark.slow
def test_a_native_folder_answers_over_http(served: tuple[Forked, str], tmp_path: Path) -> None:
    server, address = served
    body = {"model": str(tmp_path / "merged"), "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    said = post(f"{address}/v1/chat/completions", body)["choices"][0]["message"]["content"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert said == tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) and said

    # It is pinned: what loads, unloads or names another model is closed, and the model is listed.
    other = {"model": str(ROOT / "recipes" / "assets" / "tiny-llama")}
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions"):
        assert status(address + path, other) == 404, path
    assert status(f"{address}/v1/chat/completions", body | other) == 400
    with urllib.request.urlopen(f"{address}/v1/models", timeout=20) as answer:
        (listed,) = json.load(answer)["data"]
    assert listed["id"] == str(tmp_path / "merged") and listed["object"] == "model"
    assert status(f"{address}/v1/chat/completions", body | {"model": listed["id"]}) == 200
    assert status(f"{address}/v1/chat/completions", body | {"model": f"{tmp_path}/"}) == 200  # as typed

    server.send_signal(signal.SIGTERM)  # with nothing to answer, one signal is enough
    server.communicate(timeout=20)
    assert server.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_a_request_ends_when_its_client_leaves_and_a_second_signal_ends_the_server(
    served: tuple[Forked, str],
) -> None:
    """One thread generates: a request that went on would keep all others waiting."""
    server, address = served
    for stream in (False, True):
        begin(address, ENDLESS | {"stream": stream}).close()
        said = post(f"{address}/v1/chat/completions", SHORT, timeout=90)
        assert said["usage"]["completion_tokens"] == 2, f"stream: {stream}"
    with begin(address, ENDLESS):
        server.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):  # the first lets the request go on
            server.wait(timeout=1.5)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 128 + signal.SIGTERM


def test_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ValueError, match=r"serving needs uvicorn; run pip install 'lowbit-ft\[serve\]'"):
        serve(tmp_path, [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="config.json: missing; give the folder of a Hugging Face"):
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
    name: str,
    symmetric: bool,
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
        said = capsys.readouterr().out
        assert f"model: {tmp_path / 'm'}; a request" in said
        assert "curl http://localhost:1/v1/chat/completions -H 'Content-Type" in said
        return
    with pytest.raises(ValueError, match=words):
        serve(tmp_path / "m", [])
    assert started == []
    if name == "gptq":  # of a run there is merged/, which is taken, and said
        (tmp_path / "recipe.yaml").touch()
        (tmp_path / "m").rename(tmp_path / "exported")
        weights = random_weights(checkpoint.empty_model(), int_grid())
        write_model(tmp_path / "merged", checkpoint, weights, EXPORTERS["native"])
        serve(tmp_path, ["--port=2"])
        out, err = capsys.readouterr()
        assert started == [["serve", str(tmp_path / "merged"), "--port=2"]]
        assert f"(or {tmp_path}); a request" in out and "localhost:2/" in out
        assert "note: " in err and "reading gptq needs gptqmodel" in err and "Serving " in err

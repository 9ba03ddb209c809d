"""Peers: post-training tools and our starts and methods on the same rows, by one measure, in one resumable
table.

    python -m benchmarks.peers --install                      # an environment for each tool (some GB, once)
    python -m benchmarks.peers --models tiny-llama --grids 2:64:sym --seeds 0 1 2
    python -m benchmarks.peers --only AutoRound "gptq, lr_qat" --table

Each row is a process of its own: the tool gets a checkpoint and token ids (peers_cases.py), leaves weights
with scales and zero points (peer_tools/child.py), and they are checked to lie on the grid that was asked for
and put into the dense model for perplexity and KL (peers_measure.py). Beside them: processor seconds (user
and system, of the process and all it started; `work_cpu_seconds` is the part after imports and loading),
threads, versions, bits per weight.

A row is kept in --out as it comes. One that is there is not made again, unless what it came from has changed:
the options of its contender, the checkpoint, the rows or the windows. --table prints the tables and measures
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.peers_cases import CONTENDERS, GRIDS, HERE, MODELS, TOOLS, Contender, Grid, Tool
from benchmarks.peers_measure import Bench, check_weights
from benchmarks.peers_table import key_of, tables
from lowbit_ft.files.atomic import write_text

VENVS = Path("~/.cache/lowbit_ft/peers").expanduser()


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["tiny-llama"], choices=list(MODELS))
    p.add_argument("--grids", nargs="+", default=None, help="bits:group_size:sym|asym; default: GRIDS")
    p.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=HERE / "results" / "peers.json")
    p.add_argument("--venvs", type=Path, default=VENVS, help="the environments of the tools")
    p.add_argument(
        "--install", action="store_true", help="make the environments that are not there, and stop"
    )
    p.add_argument("--table", action="store_true", help="print the tables of --out, and stop")
    p.add_argument("--model-path", nargs=2, action="append", default=[], metavar=("MODEL", "FOLDER"))
    return p.parse_args()


# ------------------------------------------------------------------------------------------------ processes


def python_of(name: str, venvs: Path) -> Path:
    """The interpreter of a tool's environment. ValueError where it is not installed."""
    if not TOOLS[name].packages:
        return Path(sys.executable)
    found = venvs / name / "bin" / "python"
    if not found.is_file():
        raise ValueError(
            f"{found}: no environment for {name}; run: python -m benchmarks.peers --install --venvs {venvs}"
        )
    return found


def install(name: str, tool: Tool, venvs: Path) -> None:
    """One environment: torch first and alone, so that no other package can pull a different one."""
    if not tool.packages or (venvs / name / "installed").is_file():
        return
    print(f"{name}: {' '.join(tool.packages)} into {venvs / name}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venvs / name)], check=True)
    pip = [str(venvs / name / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    first, *others = tool.packages
    subprocess.run([*pip, first], check=True)
    subprocess.run([*pip, first, *others], check=True)
    write_text(venvs / name / "installed", "\n".join(tool.packages) + "\n")


def environment(name: str, threads: int) -> dict[str, str]:
    """Of a child: its own packages only (ours: this tree), offline, so many threads."""
    out = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not TOOLS[name].packages:
        out["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels")])
    return out


def run_tool(command: list[str], variables: dict[str, str], log: Path) -> dict[str, float]:
    """Processor and wall seconds of a process and all it waited for. RuntimeError with its last lines."""
    began = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError("\n".join(log.read_text(errors="replace").splitlines()[-12:]))
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "wall_seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------ rows


def make_row(
    bench: Bench, contender: Contender, grid: Grid, seed: int, o: argparse.Namespace
) -> dict[str, Any]:
    """Run the tool, check what it left, measure it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench.write_rows(folder / "rows.safetensors")
        spec = asdict(grid) | {
            "model": str(bench.path.resolve()),
            "rows": str(folder / "rows.safetensors"),
            "samples": contender.samples or len(bench.windows.rows),
            "seed": seed,
            "threads": o.threads,
            "options": contender.options,
        }
        write_text(folder / "spec.json", json.dumps(spec))
        script = HERE / "peer_tools" / TOOLS[contender.tool].script
        command = [str(python_of(contender.tool, o.venvs)), str(script)]
        command += [str(folder / "spec.json"), str(folder / "out")]
        took = run_tool(command, environment(contender.tool, o.threads), folder / "log.txt")
        tensors = load_file(folder / "out" / "weights.safetensors")
        facts = json.loads((folder / "out" / "facts.json").read_text(encoding="utf-8"))
    bits = check_weights(tensors, bench.names, grid)
    measured = bench.measure(tensors)
    return {
        "perplexity": measured.perplexity,
        "kl": measured.kl,
        **took,
        **facts,
        "bits_per_weight": bits,
        "layers": len(bench.names),
    }


def asked(o: argparse.Namespace, model: str) -> Iterator[tuple[str, Grid, int]]:
    """(contender, grid, seed) of one model; what no seed changes is made once, with the first."""
    for seed in o.seeds:
        for grid in [Grid.parse(text) for text in o.grids or GRIDS[model]]:
            for name in o.only:
                contender = CONTENDERS[name]
                if contender.fits(grid) and (contender.seeded or seed == o.seeds[0]):
                    yield name, grid, seed


def run_model(name: str, stored: dict[str, Any], o: argparse.Namespace) -> int:
    """The rows of one model that are not there yet. Returns how many failed."""
    bench, failed = None, 0
    for contender, grid, seed in asked(o, name):
        fact = {"model": name, "contender": contender, **asdict(grid), "seed": seed}
        there = {key_of(row): row for row in stored["rows"]}.get(key_of(fact))
        bench = bench or Bench(MODELS[name])
        source = {"tool": asdict(CONTENDERS[contender]), "inputs": bench.inputs}
        if there is not None and all(there[key] == value for key, value in source.items()):
            continue
        if stored["models"].get(name, {}).get("inputs") != bench.inputs:
            base = bench.full_precision()
            facts = {"inputs": bench.inputs, "perplexity": base.perplexity, "tokens": base.tokens}
            stored["models"][name] = facts
        try:
            row = fact | source | make_row(bench, CONTENDERS[contender], grid, seed, o)
        except (RuntimeError, ValueError) as error:
            print(f"{name} {grid} {contender} seed {seed}: failed\n{error}", flush=True)
            failed += 1
            continue
        stored["rows"] = [r for r in stored["rows"] if key_of(r) != key_of(fact)] + [row]
        write_text(o.out, json.dumps(stored, indent=1) + "\n")
        print(
            f"{name} {grid} {contender} seed {seed}: perplexity {row['perplexity']:.3f}, KL {row['kl']:.4f}, "
            f"{row['bits_per_weight']:.3f} bits, {row['work_cpu_seconds']:.0f} of {row['cpu_seconds']:.0f} "
            "processor seconds",
            flush=True,
        )
    return failed


def main() -> None:
    o = options()
    if o.install:
        for name, tool in TOOLS.items():
            install(name, tool, o.venvs)
        return
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {"models": {}, "rows": []}
    if o.table:
        print(tables(stored))
        return
    for model, folder in o.model_path:
        MODELS[model] = MODELS[model].at(Path(folder))
    torch.set_num_threads(o.threads)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    failed = sum(run_model(name, stored, o) for name in o.models)
    print(tables(stored))
    if failed:
        raise SystemExit(f"{failed} rows failed; the same command tries them again")


if __name__ == "__main__":
    main()

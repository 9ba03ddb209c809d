"""The result of benchmarks/gpu.sh: what its stages left, in one JSON and one table.

    --needs    what this machine has and what it lacks, before anything runs; status 1 where nothing can run
    (no flag)  gather what there is so far into gpu-<name>.json, so that a run that is cut off leaves its rows
    --final    the same, the table beside it as gpu-<name>.md and on the screen, and the parts are removed

Knows the standard library only, but for --needs: a machine without lowbit_ft's dependencies still reports
its kernels. The file holds names, versions and the commit, and nothing else about the machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Import name -> distribution; of the training step, which cannot run without, and of what only adds rows.
NEEDED = {
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "yaml": "PyYAML",
    "rich": "rich",
    "psutil": "psutil",
    "huggingface_hub": "huggingface_hub",
    "tokenizers": "tokenizers",
}
OPTIONAL = {
    "bitsandbytes": "bitsandbytes",
    "gemlite": "gemlite",
    "matplotlib": "matplotlib",
    "pytest": "pytest",
}


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Of the checkout, with "+" where it is changed; in a copy of it $LOWBIT_COMMIT or "unknown"."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "kernels", "lowbit_ft", "benchmarks/*.py") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LOWBIT_COMMIT", "unknown")


def environment(dry: bool) -> dict[str, Any]:
    """Name of the GPU, versions, commit, date; exits where there is nothing to measure with."""
    if importlib.util.find_spec("torch") is None:
        sys.exit("torch is missing: nothing can run")
    import torch

    if not dry and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --dry-run walks the plan on a CPU")
    if not dry and importlib.util.find_spec("triton") is None:
        sys.exit("triton is missing: the kernels need it")
    names = {"torch": "torch", "triton": "triton", **NEEDED, **OPTIONAL}
    return {
        "gpu": "cpu (dry run)" if dry else torch.cuda.get_device_name(),
        "capability": None if dry else list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "python": ".".join(map(str, sys.version_info[:3])),
        **{package: version(package) for package in names.values()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def needs(parts: Path, dry: bool) -> None:
    """Prints what there is; leaves it in environment.json, and in cannot_train what training lacks."""
    found = environment(dry)
    (parts / "environment.json").write_text(json.dumps(found), encoding="utf-8")
    missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        (parts / "cannot_train").write_text(f"not installed: {', '.join(missing)}\n", encoding="utf-8")
    print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)


def gather(parts: Path) -> dict[str, Any]:
    """Everything the stages left. Of the machine no more than the head of this file says."""

    def load(name: str) -> Any:
        path = parts / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def lines(name: str) -> list[Any]:
        path = parts / name
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.is_file()
            else []
        )

    result: dict[str, Any] = {"environment": load("environment.json"), "stages": lines("stages.jsonl")}
    result["correctness"] = [row for row in lines("smoke.jsonl") if row["outcome"] != "skipped"]
    result["skipped"] = sum(row["outcome"] == "skipped" for row in lines("smoke.jsonl"))
    result |= {"kernels": load("kernels.json"), "tuning": load("tuning.json")}
    training = load("training.json")
    cannot = parts / "cannot_train"
    result["training"] = training["rows"] if training else []
    if cannot.is_file():
        result["training_not_run"] = cannot.read_text(encoding="utf-8").strip()
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: one table of every target, and the counts before it."""
    about = result["environment"] or {}
    rows = result["correctness"]
    passed, wrong = (
        sum(row["outcome"] == "passed" for row in rows),
        [row for row in rows if row["outcome"] != "passed"],
    )
    out = [f"# {about.get('gpu', 'unknown')}", "", f"{about.get('date')}, commit {about.get('commit')}."]
    out += [
        "",
        ", ".join(
            f"{name} {about[name]}" for name in about if name not in ("gpu", "date", "commit", "capability")
        ),
        "",
    ]
    out += [f"Correctness: {passed} of {len(rows)} passed, {result['skipped']} skipped.", ""]
    out += [f"* {note}" for note in result.get("notes", [])]
    out += [f"* {row['outcome']}: `{row['name']}`: {row.get('problem', '')[:200]}" for row in wrong]
    out += ["", "| stage | seconds | status |", "|---|--:|---|"]
    out += [
        f"| {row['name']} | {row['seconds']} | {'ok' if row['status'] == 0 else row['status']} |"
        for row in result["stages"]
    ]
    if result["kernels"]:
        from bench_report import target_table

        out += ["", target_table({row["name"]: row for row in result["kernels"]["rows"]}, result["tuning"])]
    if result.get("training_not_run"):
        out += ["", f"Training step: not run ({result['training_not_run']})."]
    if result["training"]:
        out += [
            "",
            "| training | tokens/s | step / QLoRA's | peak GB | plan said | target | |",
            "|---|--:|--:|--:|--:|---|---|",
        ]
        out += [_training(row) for row in result["training"] if row["stage"] != "correct"]
    return "\n".join(out) + "\n"


def _training(row: dict[str, Any]) -> str:
    columns = ("tokens_per_s", "ratio", "peak_gb", "predicted_gb")
    cells = ["" if row.get(c) is None else f"{row[c]:.4g}" for c in columns]
    target = "" if not row.get("target") else f"{row['target'][0]} <= {row['target'][1]:g}"
    verdict = "" if row.get("met") is None else "met" if row["met"] else "**missed**"
    if "skipped" in row:
        verdict = f"not measured: {row['skipped']}"
    return f"| {row['name']} | {' | '.join(cells)} | {target} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--needs", action="store_true")
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.needs:
        needs(options.parts, options.dry_run)
        return
    result = gather(options.parts)
    name = re.sub(r"[^a-z0-9]+", "-", (result["environment"] or {}).get("gpu", "unknown").lower()).strip("-")
    file = options.out / f"gpu-{name}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)
    if options.final:
        text = table(result)
        print(text, flush=True)
        file.with_suffix(".md").write_text(text, encoding="utf-8")
        shutil.rmtree(options.parts)
        if options.dry_run:  # it keeps no figures
            file.unlink()
            file.with_suffix(".md").unlink()


if __name__ == "__main__":
    main()

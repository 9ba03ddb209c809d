"""The port of docs/from-qlora.md: its size, and that it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit_ft  # noqa: F401  (teaches transformers to read what the script writes)
from lowbit_ft.adapters.rates import rate_for
from lowbit_ft.export.reader import read_weights
from tests.packed_tools import IDS, tiny_checkpoint
from tests.processes import ROOT, environment

PAGE = (ROOT / "docs" / "from-qlora.md").read_text(encoding="utf-8")
DIFF = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)[0].splitlines()
TINY = ROOT / "recipes" / "assets" / "tiny-llama"
ROWS = ROOT / "recipes" / "assets" / "docstrings" / "train.jsonl"


def script(sign: str) -> str:
    return "\n".join(line[1:] for line in DIFF if line[:1] in ("", " ", sign)) + "\n"


def test_the_port_changes_at_most_eight_lines() -> None:
    removed = sum(line.startswith("-") for line in DIFF)
    added = sum(line.startswith("+") for line in DIFF)
    assert 0 < removed <= 8 and 0 < added <= 8 and len(DIFF) - removed - added > 25
    for sign in "-+":
        compile(script(sign), "the script", "exec")
    assert f"learning_rate={rate_for('lr_qat', 4)[0]:g}".replace("0.002", "2e-3") in script("+")


def test_the_memory_is_what_was_measured() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "packing_memory.json").read_text("utf-8"))
    assert len(kept["rows"]) == 3 and 0.9 < kept["checkpoint_gb"] < 1.1
    for row in kept["rows"]:
        assert f"| {row['way']} | {row['peak_gb']:.2f} | {row['tensors_gb']:.2f} |" in PAGE
    ours, theirs = kept["rows"][:2]
    assert ours["peak_gb"] < 0.6 * kept["checkpoint_gb"] < theirs["peak_gb"]


def test_the_ported_script_runs(tmp_path: Path) -> None:
    model, tokenizer = (
        tiny_checkpoint(tmp_path / "tiny", vocab_size=4096),
        AutoTokenizer.from_pretrained(TINY),
    )
    tokenizer.save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    lines = ROWS.read_text(encoding="utf-8").splitlines()[:16]
    rows.write_text("\n".join(json.dumps({"messages": json.loads(x)["messages"]}) for x in lines) + "\n")
    text = script("+")
    for old, new in (
        ('"meta-llama/Llama-3.1-8B-Instruct"', repr(str(model))),
        ('"train.jsonl"', repr(str(rows))),
        ("max_steps=500", "max_steps=2, report_to=[], save_strategy='no', use_cpu=True"),
        ("max_length=1024", "max_length=48"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.bfloat16)
    weights = read_weights(tmp_path / "out" / "merged")
    assert len(weights) == 7 and all(getattr(w, "residual", None) is None for w in weights.values())
    assert merged(IDS).logits.isfinite().all()

"""LLM-QAT: weights, inputs and the KV cache on grids, trained on text that the model wrote itself.

    python benchmarks/llm_qat.py                                  # resumable: W4A8KV4, groups of 128 and rows
    python benchmarks/llm_qat.py --settings 4-8-4:128 --seeds 0 --steps 3 --samples 40 --valid-windows 8

A setting is weights-inputs-cache:group, as the paper (arXiv 2305.17888) writes 4-8-4, its cache and its
inputs as recipes/llama31-8b-w4a8kv4-llm-qat.yaml has them. Four arms, each a recipe that goes through the
line:

    round-to-nearest   absmax scales, nothing trained        start     the calibrator of the trained ones
    real               lr_qat on windows of the real text    self_generated   on what data.synthesis wrote

Both trained arms have the same number of tokens, of steps, and the same teacher (the full-precision model,
its answers cached). Perplexity and KL to full precision are those of the real validation text, which no run
has seen, with inputs and cache on their grids. Rows are kept in --out as they come (JSON), so a stopped run
goes on; the table is printed from that file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from data_free import ASSETS, Bench

from lowbit_ft import pipeline
from lowbit_ft.files.atomic import write_text
from lowbit_ft.rundir import environment

UNTRAINED = {"round-to-nearest": "absmax", "start": None}  # -> its calibrator; None: that of the trained arms
TRAINED = ("real", "self_generated")
KEY = ("model", "arm", "setting", "start_calibrator", "signal", "seed", "steps", "samples", "learning_rate")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--train", type=Path, default=ASSETS / "text" / "train.jsonl", help="the real text")
    p.add_argument("--valid", type=Path, default=ASSETS / "text" / "valid.jsonl", help="what is measured on")
    p.add_argument("--arms", nargs="+", default=[*UNTRAINED, *TRAINED], choices=[*UNTRAINED, *TRAINED])
    p.add_argument(
        "--settings", nargs="+", default=["4-8-4:128", "4-8-4:-1"], help="weights-inputs-cache:group"
    )
    p.add_argument("--signal", default="logits", choices=["logits", "labels"])
    p.add_argument("--start", default="mse", help="calibrator of the trained arms")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--samples", type=int, default=1200, help="rows that the model writes")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--batch", type=int, default=8, help="windows per step")
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=96)
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "llm_qat.json")
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


def parts_of(setting: str) -> tuple[int, int, int, int]:
    """(weights, inputs, cache) bits and the group of "4-8-4:128". ValueError saying how one is written."""
    bits, _, group = setting.partition(":")
    try:
        weights, inputs, cache = (int(part) for part in bits.split("-"))
        return weights, inputs, cache, int(group)
    except ValueError:
        raise ValueError(f"--settings: got {setting!r}; needs bits of weights-inputs-cache:group") from None


class Line(Bench):
    """One arm through the line; the files of real and written rows are data_free's."""

    def arm(self, arm: str, setting: str, seed: int) -> dict[str, Any]:
        o = self.o
        weights, inputs, cache, group = parts_of(setting)
        trained = arm in TRAINED
        quant = {
            "bits": weights,
            "group_size": group,
            "calibrate": (None if trained else UNTRAINED[arm]) or o.start,
            "calibration": {"samples": 128, "sequence_len": o.window},
            "activations": None if inputs == 16 else {"bits": inputs},
            "kv_cache": None if cache == 16 else {"bits": cache},
        }
        train = {"learning_rate": o.learning_rate, "seed": seed, "signal": {"kind": o.signal}}
        train |= {"teacher": "cached"} if o.signal == "logits" else {}
        if not trained:  # measured before its only step
            train |= {"max_steps": 1, "signal": {"kind": "labels"}, "teacher": None}
        recipe = self.recipe(
            f"{arm}-{setting.replace(':', 'g')}-{seed}",
            {"train": {"path": str(self.source(arm if trained else "real", seed)), "format": "tokens"}},
            quant=quant,
            train=train,
        )
        pipeline.run(recipe)
        table = json.loads((recipe.output / "evaluation.json").read_text())["rows"]
        measured = {row["stage"]: row for row in table}
        seconds = {r["stage"]: r["seconds"] for r in json.loads((recipe.output / "stages.json").read_text())}
        shown = measured["merged" if trained else "quantized"]
        return {
            "full_precision": measured["base"]["perplexity"],
            "perplexity": shown["perplexity"],
            "kl": shown["kl"],
            "tokens": self.tokens(seed),
            "seconds": seconds,
        }

    def tokens(self, seed: int) -> int:
        """Of the rows of every trained arm of this seed."""
        lines = self.source("real", seed).read_text().splitlines()
        return sum(len(json.loads(line)["input_ids"]) for line in lines)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown: arms x settings, perplexity (mean over seeds, its spread) and KL."""
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    print("| arm | " + " | ".join(f"{s}: perplexity (KL)" for s in settings) + " |")
    print("|---|" + "--:|" * len(settings))
    for arm, signal in dict.fromkeys((r["arm"], r["signal"]) for r in rows):
        cells = []
        for setting in settings:
            mine = [r for r in rows if (r["arm"], r["signal"], r["setting"]) == (arm, signal, setting)]
            values = [r["perplexity"] for r in mine]
            spread = f" ±{pstdev(values):.3f}" if len(values) > 1 else ""
            kl = f" ({mean(r['kl'] for r in mine):.4f})" if mine else ""
            cells.append(f"{mean(values):.3f}{spread}{kl}" if mine else "")
        print(f"| {arm}{'' if arm in UNTRAINED else f', {signal}'} | " + " | ".join(cells) + " |")


def main() -> None:
    o = options()
    for setting in o.settings:
        parts_of(setting)
    torch.set_num_threads(o.threads)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.get("rows", [])
    stored.setdefault("environment", environment())
    done = {tuple(row[key] for key in KEY) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        line = Line(o, Path(folder))
        for seed in o.seeds:
            for setting in o.settings:
                for arm in o.arms:
                    if arm in UNTRAINED and seed != o.seeds[0]:
                        continue
                    values = (Path(o.model).name, arm, setting, o.start, o.signal, seed, o.steps, o.samples)
                    values += (o.learning_rate,)
                    if values in done:
                        continue
                    row = dict(zip(KEY, values, strict=True)) | line.arm(arm, setting, seed)
                    rows.append(row)
                    write_text(o.out, json.dumps({**stored, "rows": rows}, indent=1) + "\n")
                    print(
                        f"{setting} {arm} seed {seed}: {row['perplexity']:.3f} KL {row['kl']:.4f}", flush=True
                    )
    print()
    print_table(rows)


if __name__ == "__main__":
    main()

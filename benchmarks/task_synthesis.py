"""Rows of a task that the model wrote itself against random tokens, its other texts, and real rows.

    python benchmarks/task_synthesis.py --work DIR --seeds 0 1

A docstring model is made first: the tiny Llama trained on recipes/assets/docstrings at full precision, all
weights, answers alone (--teacher-steps; kept in --work,
with the rows it writes). Then somebody who has that model and no row wants it
at 3 bits. Every source of rows is trained on from the same rounding, at equal tokens and equal steps, with
the docstring model as the teacher (train.signal: logits, its answers cached) or with the rows' own labels:

    random          tokens drawn evenly, rows as long as the task's
    self_generated  the model's texts, from single tokens
    task, plain     data.synthesis task_labels, answers drawn, nothing dropped or corrected
    task            the same, with the likeliest answers, confidence, overlap, perplexity
    real            rows of docstrings/train.jsonl

Measured: the loss of the answers of docstrings/valid.jsonl, which no run has seen. Rows are kept in --out as
they come (JSON), so a stopped run goes on; the table is printed from that file.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from torch.nn import functional as F

from lowbit_ft import pipeline
from lowbit_ft.data.formats import format_of
from lowbit_ft.data.read import read_rows
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.model.tokenizer import read_tokenizer
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from lowbit_ft.recipe.sections.data import DataSource
from lowbit_ft.rundir import environment
from lowbit_ft.session import start
from lowbit_ft.stages.synthesis import read_state, synthesis_stage

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "recipes" / "assets"
DOCSTRINGS = ASSETS / "docstrings"
SOURCES = ("random", "self_generated", "task, plain", "task", "real")
KEY = ("source", "signal", "bits", "group_size", "seed", "steps", "batch", "rows", "teacher_steps")
TASK: dict[str, Any] = {
    "kind": "task_labels",
    "prompt": "Write the docstring summary of this function.\ndef {verb}{input}",
    "slots": {
        "verb": """_ __ get_ set_ is_ has_ read write close open add_ remove_ parse_ make_ test_ find_ run
            load dump check_ to_ from_ on_ do_ handle_ init reset update format_ copy""".split()
    },
    "until": ["\n\n", '"""', "\ndef ", "\nclass "],
    "input_tokens": 112,
    "answer_tokens": 40,
}
# what the two forms of it change
FORMS: dict[str, dict[str, Any]] = {
    "task, plain": {
        "relabel": False,
        "p_low": 0.0,
        "max_overlap": 1.0,
        "filter": {"min_tokens": 1, "max_repetition": 1.0, "max_run": 9999, "max_unreadable": 1.0},
    },
    "task": {"p_low": 0.25, "perplexity": [1.5, 60.0], "filter": {"min_tokens": 8}},
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=ASSETS / "tiny-llama")
    p.add_argument("--work", type=Path, required=True, help="where the docstring model and its rows are")
    p.add_argument("--teacher-steps", type=int, default=80, help="of 8 rows, at full precision")
    p.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    p.add_argument("--signals", nargs="+", default=["logits"], choices=["logits", "labels"])
    p.add_argument("--grid", default="3:128", help="bits:group_size, symmetric")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--rows", type=int, default=512, help="rows that the model writes of each kind")
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--valid-windows", type=int, default=32, help="of 256 tokens")
    p.add_argument("--batch", type=int, default=4, help="windows of 256 tokens per step")
    p.add_argument("--learning-rate", type=float, default=2e-3)
    p.add_argument("--out", type=Path, default=HERE / "results" / "task_synthesis.json")
    p.add_argument("--threads", type=int, default=1)
    return p.parse_args()


def docstring_model(o: argparse.Namespace) -> Path:
    """The tiny Llama, trained on the real rows: AdamW, 8 rows a step, a rate of 5e-4 that falls to 0."""
    place = o.work / f"docstring-llama-{o.teacher_steps}"
    if (place / "model.safetensors").is_file():
        return place
    torch.manual_seed(0)
    tokenizer = read_tokenizer(o.model)
    model = load_model(Checkpoint.open(str(o.model), dtype="float32"), dtype=torch.float32).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    encode = format_of("chat", "assistant", tokenizer)
    source = DataSource(path=str(DOCSTRINGS / "train.jsonl"), format="chat")
    rows = [encode(row.value) for row in read_rows(source) if row.value is not None]
    rows = [row for row in rows if len(row.input_ids) <= 256]
    random.Random(0).shuffle(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=o.teacher_steps)
    for step in range(o.teacher_steps):
        some = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        longest = max(len(row.input_ids) for row in some)
        ids = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in some])
        taught = torch.tensor([[*row.learned, *[False] * (longest - len(row.learned))] for row in some])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].masked_fill(~taught[:, 1:], -100).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"docstring model: step {step + 1}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (place / name).write_bytes((o.model / name).read_bytes())
    return place


class Bench:
    """The files of the sources, in a folder that goes away, and one run of the line on one of them."""

    def __init__(self, o: argparse.Namespace, folder: Path, model: Path):
        self.o, self.folder, self.model = o, folder, model
        self.tokenizer = read_tokenizer(model)
        self.files: dict[tuple[str, int], tuple[Path, dict[str, Any]]] = {}

    def recipe(self, name: str, data: dict[str, Any], **sections: Any) -> Recipe:
        o = self.o
        made: dict[str, Any] = {
            "name": name,
            "model": {"path": str(self.model), "dtype": "float32", "device": "cpu"},
            "adapter": {"method": "lr_qat"},
            "data": {"sequence_len": 256, **data},
            "train": {"max_steps": o.steps, "micro_batch_size": o.batch, "gradient_accumulation_steps": 1},
            "eval": {
                "data": {"path": str(DOCSTRINGS / "valid.jsonl"), "format": "chat"},
                "windows": o.valid_windows,
                "window": 256,
                "kl": True,  # and with it the full-precision row
            },
            "export": {"format": "native", "verify": False},
            "output": str(sections.pop("output", self.folder / name)),
        }
        for section, values in sections.items():
            made[section] = made.get(section, {}) | values
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(made))
        return load_recipe(file)

    def written(self, name: str, synthesis: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows that the docstring model wrote, and what its folder tells of them."""
        recipe = self.recipe(name, {"synthesis": synthesis}, output=self.o.work / "written" / name)
        with start(recipe) as session:
            synthesis_stage(session)
        files = sorted((recipe.output / "synthesis" / "train").glob("*.jsonl"))
        state = read_state(recipe.output / "synthesis")
        told = {"kept": state.count("train"), "reasons": state.reasons, "fates": state.fates}
        return [json.loads(line) for file in files for line in file.open("rb")], told

    def prepare(self, seed: int) -> None:
        """The files of all sources for a seed, of equally many tokens."""
        o, draw = self.o, random.Random(seed)
        found: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
        for name, form in FORMS.items():
            given = {**TASK, **form, "samples": o.rows, "batch_size": 64, "seed": seed}
            found[name] = self.written(f"rows-{len(found)}-{seed}", given)
        given = {"kind": "self_generated", "samples": o.rows // 4, "batch_size": 64, "seed": seed}
        found["self_generated"] = self.written(f"rows-self-{seed}", given)
        plain = [i for i in range(len(self.tokenizer)) if i not in self.tokenizer.added_tokens_decoder]
        lengths = [len(row["input_ids"]) for row in found["task"][0]]
        rows = [{"input_ids": draw.choices(plain, k=length)} for length in lengths]
        found["random"] = (rows, {"kept": len(rows)})
        encode = format_of("chat", "assistant", self.tokenizer)
        real = DataSource(path=str(DOCSTRINGS / "train.jsonl"), format="chat")
        made = [encode(row.value) for row in read_rows(real) if row.value is not None]
        made = [row for row in made if len(row.input_ids) <= 256]
        draw.shuffle(made)
        rows = [
            {
                "input_ids": row.input_ids,
                "labels": [t if yes else -100 for t, yes in zip(row.input_ids, row.learned, strict=True)],
            }
            for row in made
        ]
        found["real"] = (rows, {"kept": len(rows)})
        room = min(sum(len(row["input_ids"]) for row in rows) for rows, _ in found.values())
        for name, (rows, told) in found.items():
            path, tokens, kept = self.folder / f"{name}-{seed}.jsonl".replace(", ", "-"), 0, []
            for row in rows:
                if tokens + len(row["input_ids"]) > room:
                    break
                tokens += len(row["input_ids"])
                kept.append({key: row[key] for key in ("input_ids", "labels", "learned") if key in row})
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self.files[name, seed] = path, {**told, "used": len(kept), "tokens": tokens}

    def run(self, source: str, signal: str, bits: int, group: int, seed: int) -> dict[str, Any]:
        if (source, seed) not in self.files:
            self.prepare(seed)
        path, told = self.files[source, seed]
        recipe = self.recipe(
            f"{source}-{signal}-{seed}".replace(", ", "-"),
            {"train": {"path": str(path), "format": "tokens"}},
            quant={"bits": bits, "group_size": group, "calibrate": "mse"},
            train={
                "signal": {"kind": signal},
                "teacher": "cached" if signal == "logits" else None,
                "learning_rate": self.o.learning_rate,
                "seed": seed,
            },
        )
        pipeline.run(recipe)
        table = json.loads((recipe.output / "evaluation.json").read_text())["rows"]
        loss, kl = ({row["stage"]: row[key] for row in table} for key in ("loss", "kl"))
        return {
            "base": loss["base"],
            "start": loss["quantized"],
            "trained": loss["merged"],
            "kl": kl["merged"],
            **told,
        }


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| rows | signal | loss of held-out answers | recovered |\n| --- | --- | --: | --: |")
    kinds = sorted({(r["source"], r["signal"]) for r in rows}, key=lambda k: (k[1], SOURCES.index(k[0])))
    for source, signal in kinds:
        mine = [r for r in rows if (r["source"], r["signal"]) == (source, signal)]
        share = mean((r["start"] - r["trained"]) / (r["start"] - r["base"]) for r in mine)
        each = ", ".join(f"{r['trained']:.3f}" for r in mine)
        print(f"| {source} | {signal} | {each} | {share:.0%} |")
    print(f"\nfull precision {rows[0]['base']:.3f}, rounded {rows[0]['start']:.3f}")


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    o.work.mkdir(parents=True, exist_ok=True)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.get("rows", [])
    stored.setdefault("environment", environment())
    done = {tuple(row[key] for key in KEY) for row in rows}
    bits, group = (int(v) for v in o.grid.split(":"))
    model = docstring_model(o)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(o, Path(folder), model)
        for seed in o.seeds:
            for signal in o.signals:
                for source in o.sources:
                    values = (source, signal, bits, group, seed, o.steps, o.batch, o.rows, o.teacher_steps)
                    if values in done:
                        continue
                    rows.append(
                        dict(zip(KEY, values, strict=True)) | bench.run(source, signal, bits, group, seed)
                    )
                    write_text(o.out, json.dumps({**stored, "rows": rows}, indent=1) + "\n")
    print()
    print_table(rows)


if __name__ == "__main__":
    main()

"""Data-free: rows that the model wrote itself against real rows and random tokens, at equal tokens.

    python benchmarks/data_free.py --grids 4:128 2:64 --signals logits labels --seeds 0 1 2

The three sources are files of token ids with the same number of tokens: what data.synthesis wrote
(self_generated, its defaults), windows of the real text, and tokens drawn evenly from the vocabulary in rows
of the lengths of the written ones. Each is everything that a run has: its calibrator (--start) looks at it,
and the adapter is trained on it, at equal steps, with the full-precision model as the teacher (logits, its
answers cached) or with its own next tokens (labels). Perplexity and KL are those of the real validation text,
which no run has seen.

Every run is a recipe and goes through the line. Rows are kept in --out as they come (JSON), so a stopped
run goes on; the table is printed from that file.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
import yaml

from lowbit_ft import pipeline
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.tokenizer import read_tokenizer
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from lowbit_ft.rundir import environment
from lowbit_ft.session import start
from lowbit_ft.stages.synthesis import synthesis_stage

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "recipes" / "assets"
SOURCES = ("real", "self_generated", "random")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(ASSETS / "tiny-llama"))
    p.add_argument("--train", type=Path, default=ASSETS / "text" / "train.jsonl", help="the real text")
    p.add_argument("--valid", type=Path, default=ASSETS / "text" / "valid.jsonl", help="what is measured on")
    p.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    p.add_argument("--grids", nargs="+", default=["4:128", "2:64"], help="bits:group_size, symmetric")
    p.add_argument("--signals", nargs="+", default=["logits"], choices=["logits", "labels"])
    p.add_argument("--start", default="gptq", help="calibrator")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--samples", type=int, default=1200, help="rows that the model writes")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--batch", type=int, default=8, help="windows per step")
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=96)
    p.add_argument("--learning-rate", nargs="+", default=["4:1e-3", "2:4e-3"], help="bits:rate")
    p.add_argument("--out", type=Path, default=HERE / "results" / "data_free.json")
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


class Bench:
    """The files of the three sources, in a folder that goes away, and one run of the line on one of them."""

    def __init__(self, o: argparse.Namespace, folder: Path):
        self.o, self.folder = o, folder
        self.tokenizer = read_tokenizer(o.model)
        self.files: dict[tuple[str, int], Path] = {}

    def recipe(self, name: str, data: dict[str, Any], **sections: Any) -> Recipe:
        o = self.o
        made = {
            "name": name,
            "model": {"path": o.model, "dtype": o.dtype, "device": "cpu"},
            "adapter": {"method": "lr_qat"},
            "data": {"sequence_len": o.window, **data},
            "train": {"max_steps": o.steps, "micro_batch_size": o.batch, "gradient_accumulation_steps": 1},
            "eval": {
                "data": {"path": str(o.valid), "format": "text"},
                "windows": o.valid_windows,
                "window": o.window,
            },
            "export": {"format": "native", "verify": False},
            "output": str(self.folder / name),
        }
        for section, values in sections.items():
            made[section] = made.get(section, {}) | values
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(made))
        return load_recipe(file)

    def written(self, seed: int) -> list[list[int]]:
        """What the model wrote, without what the filter left out."""
        synthesis = {"kind": "self_generated", "samples": self.o.samples, "seed": seed}
        recipe = self.recipe(f"rows-{seed}", {"synthesis": synthesis})
        with start(recipe) as session:
            synthesis_stage(session)
        files = sorted((recipe.output / "synthesis" / "train").glob("*.jsonl"))
        return [json.loads(line)["input_ids"] for file in files for line in file.open("rb")]

    def source(self, name: str, seed: int) -> Path:
        """The file of a source for this seed; all three have the tokens of what the model wrote."""
        if (name, seed) not in self.files:
            rows, draw = self.written(seed), random.Random(seed)
            plain = [i for i in range(len(self.tokenizer)) if i not in self.tokenizer.added_tokens_decoder]
            sources = {
                "self_generated": rows,
                "real": self.real(sum(map(len, rows)), draw),
                "random": [draw.choices(plain, k=len(row)) for row in rows],
            }
            assert len({sum(map(len, ids)) for ids in sources.values()}) == 1, "sources differ in tokens"
            for key, ids in sources.items():
                self.files[key, seed] = self.folder / f"{key}-{seed}.jsonl"
                self.files[key, seed].write_text(
                    "".join(json.dumps({"input_ids": row}) + "\n" for row in ids)
                )
        return self.files[name, seed]

    def real(self, tokens: int, draw: random.Random) -> list[list[int]]:
        """So many tokens of the real text, in windows of a seeded order."""
        texts = [json.loads(line)["text"] for line in self.o.train.read_text(encoding="utf-8").splitlines()]
        end, size = [self.tokenizer.eos_token_id], self.o.window
        ids = [i for text in texts for i in [*self.tokenizer(text, verbose=False)["input_ids"], *end]]
        windows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        draw.shuffle(windows)
        if len(windows) * size < tokens:
            raise SystemExit(f"{self.o.train}: {len(windows) * size} tokens of {tokens}; set --samples lower")
        whole, rest = divmod(tokens, size)
        return [*windows[:whole], *([windows[whole][:rest]] if rest else [])]

    def run(self, source: str, bits: int, group: int, signal: str, seed: int) -> dict[str, Any]:
        o, path = self.o, self.source(source, seed)
        rates = dict(item.split(":") for item in o.learning_rate)
        recipe = self.recipe(
            f"{source}-w{bits}g{group}-{signal}-{seed}",
            {"train": {"path": str(path), "format": "tokens"}},
            quant={
                "bits": bits,
                "group_size": group,
                "calibrate": o.start,
                "calibration": {"samples": 128, "sequence_len": o.window},
            },
            train={
                "signal": {"kind": signal},
                "teacher": "cached" if signal == "logits" else None,
                "learning_rate": float(rates[str(bits)]),
                "seed": seed,
            },
        )
        pipeline.run(recipe)
        table = json.loads((recipe.output / "evaluation.json").read_text())["rows"]
        measured = {row["stage"]: row for row in table}
        seconds = {r["stage"]: r["seconds"] for r in json.loads((recipe.output / "stages.json").read_text())}
        return {
            "full_precision": measured["base"]["perplexity"],
            "start": measured["quantized"]["perplexity"],
            "start_kl": measured["quantized"]["kl"],
            "perplexity": measured["merged"]["perplexity"],
            "kl": measured["merged"]["kl"],
            "learning_rate": recipe.train.learning_rate,
            "seconds": seconds,
        }


KEY = ("model", "source", "bits", "group_size", "start_calibrator", "signal", "seed", "steps", "samples")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown: source and signal x grid, perplexity of the start -> trained, mean over seeds, and the KL."""
    grids = sorted({(-r["bits"], r["group_size"]) for r in rows})
    print("| rows | signal | " + " | ".join(f"W{-b} g{g} start -> trained (KL)" for b, g in grids) + " |")
    print("|---|---|" + "--:|" * len(grids))
    for source, signal in dict.fromkeys((r["source"], r["signal"]) for r in rows):
        cells = []
        for b, g in grids:
            mine = [
                r
                for r in rows
                if (r["source"], r["signal"], r["bits"], r["group_size"]) == (source, signal, -b, g)
            ]
            trained = [r["perplexity"] for r in mine]
            spread = f" ±{pstdev(trained):.3f}" if len(trained) > 1 else ""
            cells.append(
                f"{mean(r['start'] for r in mine):.3f} -> {mean(trained):.3f}{spread} "
                f"({mean(r['kl'] for r in mine):.4f})"
                if mine
                else ""
            )
        print(f"| {source} | {signal} | " + " | ".join(cells) + " |")


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.get("rows", [])
    stored.setdefault("environment", environment())
    done = {tuple(row[key] for key in KEY) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(o, Path(folder))
        for seed in o.seeds:
            for grid in o.grids:
                bits, group = (int(v) for v in grid.split(":"))
                for signal in o.signals:
                    for source in o.sources:
                        values = (Path(o.model).name, source, bits, group, o.start, signal, seed)
                        fact = dict(zip(KEY, (*values, o.steps, o.samples), strict=True))
                        if tuple(fact.values()) in done:
                            continue
                        rows.append(fact | bench.run(source, bits, group, signal, seed))
                        write_text(o.out, json.dumps({**stored, "rows": rows}, indent=1) + "\n")
    print()
    print_table(rows)


if __name__ == "__main__":
    main()

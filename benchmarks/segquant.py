"""SegQuant's table (arXiv 2507.14811) on the small diffusion transformer: how far its velocity is from full
precision, with weights rounded and inputs on static scales. docs/diffusion.md shows it.

    python -m benchmarks.segquant                  # all rows, kept in --out as they come; resumable
    python -m benchmarks.segquant --beside         # also other ranges, and other times looked at, W8A8

    base     one symmetric scale per input         dual   or a scale per sign, where the error is less
    seg      or a scale per segment of the input   asym   or a zero point
    all      any of these, each input the one with the least error of its layers' output
    token    dynamic: a symmetric scale per token          token all   any of these per token

The scales cover what calibration saw (quant.activations.range: minmax). Weights: one scale per row, `mse`, or
groups of 32. error = |v - v_full| /
|v_full| over the validation pictures, at times spread over 0 .. 1.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lowbit_ft.activations import Scheme
from lowbit_ft.activations.calibrate import RANGES, choose
from lowbit_ft.activations.place import hosts, place_activations
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import packed_op_only
from lowbit_ft.model.load import load_model
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.rundir import environment
from lowbit_ft.segments import segments_in
from lowbit_ft.tasks.base import inputs_of
from lowbit_ft.tasks.image_generation import ImageGeneration
from lowbit_ft.tasks.kept import data_of

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "recipes" / "assets"
GRIDS = {"W8 rows": (8, -1), "W4 rows": (4, -1), "W4 g32": (4, 32), "W6 rows": (6, -1)}
BITS = (8, 4)  # of the inputs, but for W6A6
PAIRS = [*product(list(GRIDS)[:3], BITS), ("W6 rows", 6)]
CASES = ("base", "seg", "dual", "seg dual", "asym", "all", "token", "token all")
KEYS = ("weights", "input_bits", "case", "calibrated_at", "range")
RULE = "minmax"
SAMPLES = 64


def candidates(case: str, bits: int, widths: tuple[int, ...]) -> list[Scheme]:
    """What a case may put an input on."""
    dynamic = case.startswith("token")
    plain, every = (
        Scheme(kind="token" if dynamic else "tensor", bits=bits, dynamic=dynamic),
        case.endswith("all"),
    )
    found = [plain]
    found += [replace(plain, kind="dual")] if "dual" in case or every else []
    found += [replace(plain, symmetric=False)] if case == "asym" or every else []
    if widths and ("seg" in case or every):
        found += [replace(one, segments=widths) for one in list(found)]
    return found


class Bed:
    """The pictures, the answers of the full-precision model, and its segments."""

    def __init__(self, folder: Path, rows: Path) -> None:
        self.folder = folder
        config = Checkpoint.open(folder, dtype="float32").config
        labels = tuple(str(config.id2label[i]) for i in range(config.classes))
        self.task, self.pictures = ImageGeneration(labels=labels), config.pictures()
        self.section = SimpleNamespace(sequence_len=1, on_bad_row="error")
        self.train, self.valid = (self.source(rows / f"{name}.parquet") for name in ("train", "valid"))
        self.checkpoint = Checkpoint.open(folder, dtype="float32", purpose=self.task.purpose(0))
        self.segments = segments_in(folder)
        feed: Any = SimpleNamespace(
            r=SimpleNamespace(train=SimpleNamespace(seed=0)), tokenizer=self.pictures, rank=0, world=1
        )
        examples = self.task.examples(self.valid, self.section, self.pictures)
        self.shown = list(self.task.batches(feed, None, examples, 48, shuffle=False).one_epoch())
        self.full = self.said(load_model(self.checkpoint).eval())

    def source(self, path: Path) -> Any:
        keys = ("format", "split", "name", "revision", "limit", "weight")
        return SimpleNamespace(path=str(path), **dict.fromkeys(keys))

    @torch.no_grad()
    def said(self, model: Any) -> Tensor:
        with packed_op_only(model):
            return torch.cat(
                [model(**inputs_of(batch, self.task.answers)).sample.double() for batch in self.shown]
            )

    def error(self, model: Any) -> float:
        return float((self.said(model) - self.full).norm() / self.full.norm())

    def packed(self, bits: int, group: int) -> Any:
        section = QuantSection.model_validate(
            {"bits": bits, "group_size": group, "residual_bits": 0, "calibrate": "mse"}
        )
        return quantize(self.checkpoint, section, dtype=torch.float32)[0]

    def calibration(self, at: float | None) -> list[dict[str, Tensor]]:
        """at: the only time that is looked at; None: all of them."""
        found = self.task.calibration(
            self.train,
            self.section,
            self.pictures,
            rows=None,
            seed=0,
            samples=SAMPLES,
            sequence_len=1,
            size=16,
        )
        if at is None:
            return found
        path, rows = self.task.path, self.task.examples(self.train, self.section, self.pictures)
        draw = torch.Generator().manual_seed(0)
        x = torch.stack([self.pictures.values(data_of(row["image"])) for row in rows[:SAMPLES]])
        t, noise = torch.full((SAMPLES,), at), torch.randn(x.shape, generator=draw)
        whole = {
            "hidden_states": path.noisy(x, noise, t),
            "timestep": path.told(t),
            "class_labels": torch.tensor([row["class_labels"] for row in rows[:SAMPLES]]),
        }
        return [{k: v[i : i + 16] for k, v in whole.items()} for i in range(0, SAMPLES, 16)]

    def measured(self, model: Any, case: str, bits: int, at: float | None, rule: str) -> dict[str, Any]:
        wanted = {}
        for name, _ in hosts(model):
            widths = self.segments[name].widths if name in self.segments else ()
            wanted[name] = candidates(case, bits, widths)
        batches = self.calibration(at)

        def forward(number: int) -> None:
            model(**batches[number])

        made = choose(model, wanted, len(batches), forward, rule)
        schemes = {name: one.scheme for one in made for name in one.layers}
        place_activations(model, schemes)
        error = self.error(model)
        place_activations(model, {})
        kinds = [
            ("dual" if one.kind == "dual" else "sym" if one.symmetric else "asym")
            + (" segments" if one.segments else "")
            for one in schemes.values()
        ]
        return {"error": error, "inputs": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-dit")
    parser.add_argument("--rows", type=Path, default=ASSETS / "small-shapes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "segquant.json")
    parser.add_argument("--beside", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    bed, kept = Bed(given.model, given.rows), _kept(given.out)
    asked: list[tuple[str, int, str, float | None, str]]
    asked = [(grid, bits, case, None, RULE) for (grid, bits), case in product(PAIRS, CASES)]
    if given.beside:
        two = ("base", "all")
        asked += [("W8 rows", 8, case, at, RULE) for case, at in product(two, (0.02, 0.5, 0.98))]
        asked += [("W8 rows", 8, case, None, rule) for case, rule in product(two, RANGES) if rule != RULE]
    save = partial(_save, given.out, kept)
    for grid in GRIDS:
        todo = [one for one in asked if one[0] == grid and not any(_is(row, one) for row in kept)]
        if not todo:
            continue
        model = bed.packed(*GRIDS[grid])
        alone = (grid, None, "weights alone", None, RULE)
        if not any(_is(row, alone) for row in kept):
            save(alone, {"error": bed.error(model), "inputs": {}})
        for one in todo:
            save(one, bed.measured(model, one[2], one[1], one[3], one[4]))
    table(kept)


def _kept(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _is(row: dict[str, Any], key: tuple[Any, ...]) -> bool:
    return tuple(row[name] for name in KEYS) == key


def _save(path: Path, kept: list[dict[str, Any]], key: tuple[Any, ...], found: dict[str, Any]) -> None:
    kept.append(dict(zip(KEYS, key, strict=True)) | found)
    print(json.dumps(kept[-1]), flush=True)
    facts = {"model": "recipes/assets/tiny-dit", "samples": SAMPLES, "environment": environment()}
    write_text(path, json.dumps(facts | {"rows": kept}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> None:
    print("| | " + " | ".join(("weights alone", *CASES)) + " |")
    for grid, bits in PAIRS:
        cells = []
        for case in ("weights alone", *CASES):
            key = (grid, None if case == "weights alone" else bits, case, None, RULE)
            found = [row["error"] for row in rows if _is(row, key)]
            cells.append(f"{100 * found[0]:.2f} %" if found else "")
        print(f"| {grid} A{bits} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

"""Clip factors of inputs that train, measured: perplexity at equal tokens, and what they became.

    python benchmarks/input_clips.py    # W4A4 g128, both models; resumable
    python benchmarks/input_clips.py --models outliers --cases one tuned_learned --seeds 0

Models: the tiny Llama (plain), and the same with planted outliers (outliers.py); kinds token and group.
lr_qat trains in all cases but clips_*:

    one, tuned               clip 1; of CLIPS per input the one with the least error of the output
    learned, tuned_learned   the clips train, and begin there
    clips_*                  nothing but the clips trains; *_zeroth: by zeroth order
    smooth_0, smooth_0.5     kind token on x / s, a factor s per group of inputs, which the scales of the next
                             weight can take in exactly (no choice of the recipe); s trains, and begins at
                             max|x| to the power of 0 or 0.5

Rows are kept in --out as they come."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from gradients import Table
from outliers import plant
from quality import ASSETS, HERE, Setting
from torch import Tensor, nn

from lowbit_ft.activations import Activation, Scheme
from lowbit_ft.activations.calibrate import Choice, choose
from lowbit_ft.activations.place import hosts, place_activations
from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.linear import InputGrid
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.rundir import environment

CLIPS = [1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6]
KEYS = ("model", "kind", "case", "seed", "grid", "calibrate", "steps", "batch", "learning_rate", "clip_rate")
CASES = {
    f"{only}{start}{how}": (only, start, how)
    for only, start, how in (
        ("", "one", ""),
        ("", "tuned", ""),
        ("", "learned", ""),
        ("", "tuned_learned", ""),
        ("clips_", "learned", ""),
        ("clips_", "tuned_learned", ""),
        ("clips_", "learned", "_zeroth"),
        ("clips_", "tuned_learned", "_zeroth"),
        ("", "smooth_0", ""),
        ("", "smooth_0.5", ""),
    )
}


class Smoothed(InputGrid):
    """x^ = s Q(x / s), 4 bits per token, s = exp(log_smooth) per group of `size` inputs. The gradient of s
    goes through the scale of the token too: that is what it changes."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.log_smooth = nn.Parameter(torch.zeros(-(-inputs // size)))
        self.largest: Tensor | None = torch.zeros(inputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.largest is not None:
            self.largest = torch.maximum(self.largest, x.detach().abs().flatten(0, -2).amax(0))
        s = self.log_smooth.exp().repeat_interleave(self.size)[: x.shape[-1]]
        scale = ((x.detach() / s).abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8)
        exact = x / s / scale
        return s * scale * (exact + (exact.detach().round() - exact.detach()))

    def start(self, power: float) -> None:
        assert self.largest is not None
        log = torch.stack([part.amax() for part in self.largest.split(self.size)]).clamp_min(1e-6).log()
        with torch.no_grad():
            self.log_smooth.copy_(power * (log - log.mean()))
        self.largest = None


class Clips(Table):
    """A model, and a run of a case of it."""

    def __init__(self, o: argparse.Namespace) -> None:
        super().__init__(o)
        self.chosen: dict[tuple[str, tuple[float, ...]], list[Choice]] = {}

    def placed(self, start: str, kind: str) -> Any:
        """A packed model on the inputs of a start."""
        setting, batches = Setting.of(self.o.grid, symmetric=True), self.calibration()
        quant = {"bits": setting.bits, "group_size": setting.group, "calibrate": self.o.calibrate}
        model, schemes = self.base(QuantSection.model_validate(quant)), dict[str, Scheme]()

        @torch.no_grad()
        def forward(number: int) -> None:
            model(**batches[number], use_cache=False)

        if start.startswith("smooth"):
            smoothed = [(layer, Smoothed(layer.in_features, setting.group)) for _, layer in hosts(model)]
            for layer, own in smoothed:
                layer.activation = own
            forward(0)
            for _, own in smoothed:
                own.start(float(start.removeprefix("smooth_")))
            return model
        clips = tuple(CLIPS if start.startswith("tuned") else [1.0])
        if (kind, clips) not in self.chosen:
            group = setting.group if kind == "group" else -1
            scheme = Scheme(kind=kind, bits=setting.inputs, group_size=group)
            tried = {name: [replace(scheme, clip=clip) for clip in clips] for name, _ in hosts(model)}
            self.chosen[kind, clips] = choose(model, tried, len(batches), forward, by_input=True)
        for one in self.chosen[kind, clips]:
            scheme = (one.learned() if "learned" in start else one).scheme
            schemes |= dict.fromkeys(one.layers, scheme)
        place_activations(model, schemes)
        return model

    def row(self, case: str, kind: str, seed: int) -> dict[str, Any]:
        only, start, how = CASES[case]
        model = self.placed(start, kind)
        torch.manual_seed(seed)
        attach(model, ADAPTERS["lr_qat"].model_validate({"method": "lr_qat"}))
        for name, parameter in model.named_parameters():
            if only:
                parameter.requires_grad_(name.endswith("log_input_clip"))
            elif name.endswith("log_smooth"):
                parameter.requires_grad_(True)
        began = self.perplexity(model)
        changes: dict[str, Any] = {"gradient": {"kind": "zeroth_order"}} if how else {}
        section = self.section(
            self.o.steps, seed, changes | ({"learning_rate": self.o.clip_rate} if only else {})
        )
        with tempfile.TemporaryDirectory() as folder:
            self.fit(model, section, folder)
        inputs = [layer.activation for _, layer in hosts(model)]
        clips = {round(one.shipped().clips[0], 4) for one in inputs if isinstance(one, Activation)}
        found: dict[str, Any] = {"start": began, "perplexity": self.perplexity(model)}
        if clips:
            found["clips"] = [min(clips), max(clips)]
        if moved := [one.log_smooth.detach().abs().max() for one in inputs if isinstance(one, Smoothed)]:
            found["log_smooth"] = float(max(moved))
        return found


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["outliers", "plain"], choices=["outliers", "plain"])
    p.add_argument("--kinds", nargs="+", default=["token", "group"], choices=["token", "group"])
    p.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--grid", default="4:128:4", help="bits:group:inputs")
    p.add_argument("--calibrate", default="mse", help="of the weights")
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--window", type=int, default=256)
    p.add_argument("--valid-windows", type=int, default=24)
    p.add_argument("--learning-rate", type=float, default=2e-3)
    p.add_argument("--clip-rate", type=float, default=1e-2, help="where clips train alone")
    p.add_argument("--out", type=Path, default=HERE / "results" / "input_clips.json")
    p.set_defaults(train=str(ASSETS / "text" / "train.jsonl"), valid=str(ASSETS / "text" / "valid.jsonl"))
    p.set_defaults(eps=0.05, probes=1, zeroth_learning_rate=None)
    return p.parse_args()


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| model | grid | inputs | case | start | perplexity, by seed | clips |")
    print("|---|---|---|---|--:|--:|---|")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["grid"], row["kind"], row["case"]), []).append(row)
    for key, same in groups.items():
        ends = ", ".join(f"{row['perplexity']:.3f}" for row in same)
        clips = [clip for row in same for clip in row.get("clips", [])]
        said = f"{min(clips):g} to {max(clips):g}" if clips else ""
        print(f"| {' | '.join(key)} | {mean(r['start'] for r in same):.3f} | {ends} | {said} |")


def main() -> None:
    o = options()
    torch.set_num_threads(1)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.setdefault("rows", [])
    stored["environment"] = environment()
    with tempfile.TemporaryDirectory() as folder:
        for model in o.models:
            source = ASSETS / "tiny-llama"
            o.model = str(source if model == "plain" else plant(source, Path(folder) / model))
            measure(o, model, stored)
    print_table(rows)


def measure(o: argparse.Namespace, model: str, stored: dict[str, Any]) -> None:
    """All rows of a model that are not there yet."""
    bench, done = Clips(o), [{k: row.get(k) for k in KEYS} for row in stored["rows"]]
    for kind, case, seed in product(o.kinds, o.cases, o.seeds):
        fact = {"model": model, "kind": kind, "case": case, "seed": seed}
        fact |= {key: getattr(o, key) for key in KEYS if key not in fact}
        if fact in done or (kind == "group" and "smooth" in case):
            continue
        stored["rows"].append(fact | bench.row(case, kind, seed))
        write_text(o.out, json.dumps(stored, indent=1) + "\n")
        row = stored["rows"][-1]
        print(f"{model} {kind} {case} {seed}: {row['start']:.3f} -> {row['perplexity']:.3f}", flush=True)


if __name__ == "__main__":
    main()

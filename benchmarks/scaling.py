"""GLM-130B's scaling study in small: what rounding whole rows costs models of several sizes of one corpus.

    python benchmarks/scaling.py                  # some minutes of one core; rows are kept as they come
    python benchmarks/scaling.py --seeds 0 1 --widths 64 128
    python benchmarks/scaling.py --draw           # docs/glm-scaling.svg, from the rows

Models of bytes in transformers' `glm` layout, which differ in their width only, are trained from nothing on
the same windows of recipes/assets/text/train.jsonl, in the same order, each seen once. The learning rate
falls with a power of the width; of several powers the model that learned most counts. Then every linear is
packed as GLM-130B packs its own (`calibrate: narrow_range`, `group_size: -1`, float16 scales; embeddings
stay) at each of `--bits`, and the loss is measured on held-out files, beside full precision.

Of each packing also: the largest weight of a row in standard deviations of the row (mean over all rows), and
|W^ - W|^2 / |W|^2 over all weights, which tell what the rounding did before a loss was asked.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from lowbit_ft.adapters.attach import packed_layers
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.report.plots import BLUE, GREEN, MUTED, ORANGE, STYLE, svg
from lowbit_ft.rundir import environment

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "recipes" / "assets"
PICTURE = HERE.parent / "docs" / "glm-scaling.svg"
RATE, NARROW = 3.75e-3, 64  # the learning rate of this width
COLORS = {4: BLUE, 3: GREEN, 2: ORANGE}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 384], help="multiples of 32")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--powers", nargs="+", type=float, default=[0.5, 1.0], help="of the width, in the rate")
    p.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--batch", type=int, default=4, help="windows per step")
    p.add_argument("--window", type=int, default=128)
    p.add_argument("--valid-windows", type=int, default=256)
    p.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json")
    p.add_argument("--draw", action="store_true", help="only draw what is in --out")
    p.add_argument("--threads", type=int, default=1)
    return p.parse_args()


def windows(name: str, size: int) -> Tensor:
    """The files of a split one behind the other (a zero byte between two), as bytes in windows [n, size]."""
    lines = (ASSETS / "text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    data = "\0".join(json.loads(line)["text"] for line in lines).encode()
    return torch.tensor(list(data[: len(data) // size * size])).view(-1, size)


def glm(width: int, layers: int, window: int) -> Any:
    """A random model of bytes: heads of 32 channels, each with its own keys, an MLP of three widths."""
    from transformers import GlmConfig, GlmForCausalLM  # slow: only a training run needs it

    config = GlmConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GlmForCausalLM(config)


def train(model: Any, rows: Tensor, rate: float, o: argparse.Namespace) -> None:
    """AdamW over `steps` batches of rows in their order: a warm-up over a tenth, then a cosine to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for step, batch in enumerate(rows[: o.steps * o.batch].split(o.batch), 1):
        factor = min(1.0, step / (0.1 * o.steps)) * 0.5 * (1 + math.cos(math.pi * step / o.steps))
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"width {model.config.hidden_size}: step {step}/{o.steps}  loss {loss.item():.3f}", flush=True
            )


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    """Mean cross-entropy in nats per byte."""
    model.eval()
    return mean(model(input_ids=w, labels=w, use_cache=False).loss.item() for w in rows.split(16))


def rounded(checkpoint: Checkpoint, bits: int, rows: Tensor) -> dict[str, float]:
    """The loss at these bits, and what the rounding did to the weights."""
    rows_of_glm = {"group_size": -1, "scale_dtype": "float16", "calibrate": "narrow_range"}
    quant = QuantSection.model_validate({"bits": bits, "residual_bits": 0} | rows_of_glm)
    model, _ = quantize(checkpoint, quant, dtype=torch.float32)
    moved = whole = count = 0.0
    peaks: list[Tensor] = []
    for path, layer in packed_layers(model):
        dense = checkpoint.read(f"{path}.weight").float()
        moved += float((layer.base.dequantize() - dense).square().sum())
        whole += float(dense.square().sum())
        count += dense.numel()
        peaks.append(dense.abs().amax(1) / dense.std(1))
    assert count == packed_weights(model.config), "a linear was left out"
    return {"loss": loss_of(model, rows), "error": moved / whole, "peak": float(torch.cat(peaks).mean())}


def packed_weights(config: Any) -> int:
    """How many weights `rounded` rounds: those of all linears; the head is the table of bytes."""
    attention, mlp = 4 * config.hidden_size**2, 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp)


def make(width: int, rate: float, seed: int, o: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One model: trained, measured at full precision and at each of the bits."""
    rows, valid = windows("train", o.window), windows("valid", o.window)
    if len(rows) < o.steps * o.batch:
        raise SystemExit(f"--steps: the text has {len(rows)} windows, {o.steps * o.batch} are asked for")
    torch.manual_seed(seed)
    rows = rows[torch.randperm(len(rows))]
    valid = valid[torch.randperm(len(valid), generator=torch.Generator().manual_seed(0))[: o.valid_windows]]
    began = time.process_time()
    model = glm(width, o.layers, o.window)
    train(model, rows, rate, o)
    full = loss_of(model, valid)
    model.save_pretrained(folder)
    checkpoint = Checkpoint.open(str(folder), dtype="float32")
    return {
        "width": width,
        "rate": rate,
        "seed": seed,
        "packed_weights": packed_weights(model.config),
        "bytes": o.steps * o.batch * o.window,
        "loss": full,
        "bits": {str(bits): rounded(checkpoint, bits, valid) for bits in o.bits},
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each width and seed the model with the least loss at full precision."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["loss"]):
        found.setdefault((row["width"], row["seed"]), row)
    return list(found.values())


def draw(rows: list[dict[str, Any]]) -> str:
    """Loss that is added by rounding over the weights that were rounded, a line per width of the codes (its
    mean over seeds, a point per seed), beside the loss at full precision."""
    sizes = sorted({row["packed_weights"] for row in rows})
    bits = sorted({int(b) for row in rows for b in row["bits"]}, reverse=True)

    def means(value: Any) -> list[float]:
        return [mean(value(row) for row in rows if row["packed_weights"] == size) for size in sizes]

    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        for b in bits:

            def added(row: dict[str, Any], b: int = b) -> float:
                return row["bits"][str(b)]["loss"] - row["loss"]

            left.plot(sizes, means(added), color=COLORS.get(b, MUTED), lw=1.8, label=f"{b} bits")
            points = [(row["packed_weights"], added(row)) for row in rows]
            left.plot(*zip(*points, strict=True), "o", ms=4.5, color=COLORS.get(b, MUTED))
        left.set(yscale="log", title="loss added by rounding whole rows", ylabel="nats per byte")
        left.legend(loc="best", ncols=len(bits))
        right.plot(sizes, means(lambda row: row["loss"]), color=MUTED, lw=1.8, marker="o", ms=4.5)
        right.set(title="loss at full precision", ylabel="nats per byte")
        for axis in (left, right):
            axis.set(xscale="log", xlabel="weights that are rounded")
        return svg(figure)


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| width | weights | rate | seed | full precision | bits | loss | added | error | largest weight |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in sorted(rows, key=lambda row: (row["width"], row["rate"], row["seed"])):
        model = f"| {row['width']} | {row['packed_weights']:,} | {row['rate']} | {row['seed']}"
        for bits, found in row["bits"].items():
            added = found["loss"] - row["loss"]
            print(
                f"{model} | {row['loss']:.4f} | {bits} | {found['loss']:.4f} | {added:.4f} | "
                f"{found['error']:.4f} | {found['peak']:.2f} |"
            )


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    stored: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = stored.setdefault("rows", [])
    asked = f"{o.layers} layers, {o.steps} steps of {o.batch} x {o.window}, {o.valid_windows} windows"
    done = {(row["width"], row["rate"], row["seed"], row["asked"]) for row in rows}
    wanted = [
        (width, float(f"{RATE * (NARROW / width) ** power:.3g}"), seed)
        for seed in o.seeds
        for width in o.widths
        for power in o.powers
    ]
    for width, rate, seed in [] if o.draw else dict.fromkeys(wanted):
        if (width, rate, seed, asked) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"asked": asked, **make(width, rate, seed, o, Path(folder) / "model")})
        stored["environment"] = environment()
        write_text(o.out, json.dumps(stored, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    print_table(rows)
    if o.draw:
        write_text(PICTURE, draw(best(rows)))


if __name__ == "__main__":
    main()

"""One measure for every tool: are its weights on the grid that was asked for, and what are they worth in the
dense model.

    weight [N, K] = scale * (code - zero), codes 0 .. 2^bits - 1, scale and zero [N, G]; zero None: 2^(bits-1)

The check is of values, not of what a tool says of itself: all linears of the decoder layers, each with as
many scales as the group size gives, at most 2^bits values in any group, and each value an integer number of
its scale away from its zero. Then the weights are put into the dense model, and perplexity and KL come from
the same windows for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers_cases import WINDOW, Grid, Model
from lowbit_ft.data.batches import Batches
from lowbit_ft.data.windows import Example, Examples
from lowbit_ft.evaluate.perplexity import EvalRow, Reference, evaluate
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_tokenizer

TOLERANCE = 2e-3  # of a grid step: what rounding of scales to 16 bits and products in fp32 may leave


def group_values(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, G, g]; a short last group repeats its last value, which adds no value to it."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    short = -k % size
    if short:
        weight = torch.cat([weight, weight[:, -1:].expand(n, short)], dim=1)
    return weight.reshape(n, -1, size)


def most_values(weight: Tensor, group_size: int) -> int:
    """The largest number of different values that any group of weight [N, K] has."""
    ordered = group_values(weight, group_size).sort(dim=-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def check_layer(name: str, weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> None:
    """ValueError, naming the layer, unless weight [N, K] lies on the grid with scale and zero [N, G]."""
    groups = group_values(weight.double(), grid.group_size)
    if scale.shape != groups.shape[:2]:
        raise ValueError(f"{name}: {tuple(scale.shape)} scales; {grid} has {tuple(groups.shape[:2])}")
    middle = 2 ** (grid.bits - 1)
    if grid.symmetric and zero is not None and bool((zero != middle).any()):
        raise ValueError(f"{name}: zero points other than {middle} on {grid}")
    levels, found = 2**grid.bits, most_values(weight, grid.group_size)
    if found > levels:
        raise ValueError(f"{name}: {found} different values in a group; {grid} has {levels}")
    step = scale.double().unsqueeze(-1)
    at = torch.full_like(step, middle) if zero is None else zero.double().unsqueeze(-1)
    codes = torch.where(step == 0, at, groups / step + at)
    off = float((codes - codes.round()).abs().max())
    if off > TOLERANCE or bool((groups[(step == 0).expand_as(groups)] != 0).any()):
        raise ValueError(f"{name}: a weight is {off:.3g} of a step off {grid}")
    low, high = int(codes.round().min()), int(codes.round().max())
    if low < 0 or high >= levels:
        raise ValueError(f"{name}: codes from {low} to {high}; {grid} has 0 to {levels - 1}")


def bits_per_weight(scale: Tensor, zero: Tensor | None, count: int, bits: int) -> float:
    """With a scale of 16 bits, and a zero point of `bits` bits where it is an integer, else of 16."""
    if zero is None:
        per_group = 16
    else:
        per_group = 16 + (bits if bool((zero == zero.round()).all()) else 16)
    return bits + per_group * scale.numel() / count


def check_weights(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[int, ...]], grid: Grid) -> float:
    """Every layer of names (name -> shape) is there and on the grid. Returns bits per weight, scales
    included.
    """
    found = {key.removesuffix(".weight") for key in tensors if key.endswith(".weight")}
    if found != names.keys():
        wrong = sorted(found ^ names.keys())
        raise ValueError(f"{len(found)} layers for {len(names)}; not in both: {', '.join(wrong[:4])}")
    bits = count = 0.0
    for name, shape in names.items():
        weight, scale, zero = (tensors.get(f"{name}.{part}") for part in ("weight", "scale", "zero"))
        assert weight is not None and scale is not None
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(weight.shape)}; the model has {shape}")
        check_layer(name, weight, scale, zero, grid)
        bits += bits_per_weight(scale, zero, weight.numel(), grid.bits) * weight.numel()
        count += weight.numel()
    return bits / count


@dataclass(frozen=True)
class Windows:
    """Token ids [count, WINDOW] that every tool is given (rows) and measured on (valid)."""

    rows: Tensor
    valid: Tensor


def cut(model: Model, tokenizer: Any) -> Windows:
    """The model's texts as windows; the rows are spread evenly over the training text, in a fixed random
    order.
    """
    train, valid = _windows(model.train(), tokenizer), _windows(model.valid(), tokenizer)
    for what, there, wanted in (("training", train, model.rows), ("evaluation", valid, model.windows)):
        if len(there) < wanted:
            raise ValueError(f"the {what} text has {len(there)} windows; {wanted} are asked for")
    spread = torch.linspace(0, len(train) - 1, model.rows).long()
    order = torch.randperm(model.rows, generator=torch.Generator().manual_seed(0))
    return Windows(train[spread[order]], valid[: model.windows])


def _windows(texts: list[str], tokenizer: Any) -> Tensor:
    """The texts joined by the end-of-text token, cut every WINDOW tokens; what is left at the end is
    dropped.
    """
    joined = (tokenizer.eos_token or "\n").join(texts)
    ids = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW], dtype=torch.int32).view(-1, WINDOW)


class Bench:
    """A checkpoint, its windows, and the measure of any weights in it.

    ValueError when the checkpoint is not there. `inputs` names all of it: what a row of the results was
    measured on.
    """

    def __init__(self, model: Model):
        if not (model.path / "config.json").is_file():
            how = f"; make it: {model.made_by}" if model.made_by else ""
            raise ValueError(f"{model.path}: no checkpoint there{how}")
        self.path = model.path
        self.checkpoint = Checkpoint.open(str(model.path), dtype="float32")
        self.windows = cut(model, load_tokenizer(self.checkpoint))
        self.model = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
        self.linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and any(part.isdecimal() for part in name.split("."))
        }
        self.names = {name: tuple(linear.weight.shape) for name, linear in self.linears.items()}
        valid = [Example(row, row, [WINDOW]) for row in self.windows.valid.tolist()]
        batches = Batches(Examples(valid), 8, 0, seed=0, shuffle=False)
        self.batches = [{k: v for k, v in b.items() if k != "position_ids"} for b in batches.one_epoch()]
        self.reference = Reference(
            self.checkpoint, self.batches, attention="sdpa", device=torch.device("cpu"), dtype=torch.float32
        )
        sha = hashlib.sha256()  # of what the files hold, not of where they lie or since when
        for file in sorted(model.path.glob("*.safetensors")):
            sha.update(file.read_bytes())
        for ids in (self.windows.rows, self.windows.valid):
            sha.update(ids.contiguous().numpy().tobytes())
        self.inputs = sha.hexdigest()[:16]

    def write_rows(self, path: Path) -> None:
        """The calibration and training rows, as every tool is given them."""
        save_file({"ids": self.windows.rows.contiguous()}, path)

    def full_precision(self) -> EvalRow:
        return self.reference.row()

    @torch.no_grad()
    def measure(self, tensors: Mapping[str, Tensor]) -> EvalRow:
        """Perplexity, and KL to full precision, of these weights of all decoder linears."""
        for name, linear in self.linears.items():
            linear.weight.copy_(tensors[f"{name}.weight"])
        return evaluate(self.model, self.batches, "dequantized", self.reference)

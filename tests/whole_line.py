"""The whole line on one tiny model: quantize, attach, a step, merge, both exports, each reloaded.

`line` is what tests/model/test_architectures.py asserts and what benchmarks/support_matrix.py writes into
docs/models.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit_ft.adapters import LRQATConfig
from lowbit_ft.adapters.attach import adapted_layers, attach, begin_step
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported, read_weights
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.merge import merge, moved
from lowbit_ft.model.linear import packed_op_only
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.architectures import CONFIGS, checkpoint_of

# transformers has only its own eager attention for these.
EAGER = frozenset(
    {
        "gemma2",
        "bloom",
        "gpt_oss",
        "mamba",
        "mamba2",
        "gptj",
        "codegen",
        "gpt_neo",
        "mpt",
        "rwkv",
        "openai-gpt",
    }
)
EXACT, ROUNDING = "exact", "exact weights"


@dataclass(frozen=True)
class Result:
    """One row of docs/models.md. packed: share of the matrix weights of the decoder layers that are packed,
    in percent; native and compressed: EXACT, ROUNDING (equal weights, logits within the rounding of the
    reader's sums), or "refused: why"."""

    name: str
    model: str
    layers: int
    packed: float
    native: str
    compressed: str
    fixes: tuple[str, ...] = ()

    def row(self) -> str:
        packed = f"{self.layers} ({self.packed:.0f} %)" if self.layers else "-"
        return f"| {self.name} | {self.model} | {packed} | {self.native} | {self.compressed} |"


def tokens(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (rows, length), generator=generator)


def train(model: Any, steps: int = 1) -> None:
    """attach LR-QAT and take real optimizer steps on random tokens; large ones, so that codes move."""
    attach(model, LRQATConfig(rank=4, alpha=4.0))  # pyright: ignore[reportCallIssue]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in adapted_layers(model):  # B starts at zero, where one step cannot reach A
            layer.adapter.B.normal_(std=0.5, generator=generator)  # pyright: ignore[reportOptionalMemberAccess]
    model.train()
    for step in range(steps):
        begin_step(model, step)
        ids = tokens()
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not still, f"the model's forward goes past these: {still[:3]}"
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def lines(name: str, folder: Path) -> list[Result]:
    """The row of an architecture; where a module is refused, a second row of the rest, with the exclusion
    that the error names.
    """
    first = line(name, folder / "whole")
    return [first, line(name, folder / "rest", exclude=first.fixes)] if first.fixes else [first]


def line(name: str, folder: Path, dtype: str = "float32", exclude: tuple[str, ...] = ()) -> Result:
    """quantize, attach, a step, merge, both exports, each reloaded by transformers and compared. Refusals are
    results; anything else that goes wrong is an error."""
    config = CONFIGS[name]()
    attention = "eager" if name in EAGER else "sdpa"
    checkpoint = checkpoint_of(config, folder / "checkpoint", dtype)
    kind = type(checkpoint.empty_model("eager")).__name__
    try:
        quant = QuantSection(group_size=32, calibrate="absmax", exclude=["lm_head", *exclude])
        model, rows = quantize(checkpoint, quant, attention=attention)
    except ValueError as error:
        why = re.search(r"cannot be packed as asked:\n  \S+: (.*?);", str(error))
        assert why, error
        fixes = tuple(re.findall(r"quant.exclude: \['(.*?)'\]", str(error)))
        return Result(name, kind, 0, 0.0, f"refused: {why[1]}", "refused", fixes)
    train(model)
    assert sum(share for layer, share in moved(model).items() if layer != "scale_change") > 0, (
        "training moved no code"
    )
    ids = tokens(seed=5)
    with torch.no_grad():
        trained = model(ids).logits
    merge(model, checkpoint, folder / "native")
    loaded = load_exported(folder / "native", attention=attention)
    with (
        torch.no_grad(),
        packed_op_only(loaded),
    ):  # an expert may be given few rows, which decoding would round in another way
        again = loaded(ids).logits
    native = EXACT if torch.equal(again, trained) else f"logits off by {(again - trained).abs().max():.1e}"
    merged = read_weights(folder / "native")
    try:
        write_model(folder / "ct", checkpoint, merged, EXPORTERS["compressed-tensors"])
    except ValueError as error:
        why = re.search(r"cannot hold this model:(?:\n  .*?:)? (.*?); ", str(error))
        assert why, error
        compressed = f"refused: {why[1]}"
    else:
        # raises for any difference that is not allowed; which are, does not depend on the machine
        compressed = (
            EXACT if verify(folder / "ct", merged, model=model, input_ids=ids).logit_bound == 0 else ROUNDING
        )
    inside = sum(
        row.parameters
        for row in rows.rows
        if re.search(r"\.\d+\.", row.layer) and "not part of" not in row.reason
    )
    packed = 100 * sum(row.parameters for row in rows.quantized) / inside
    name += ", the rest" if exclude else ""
    return Result(name, kind, len(rows.quantized), packed, native, compressed)

"""What train_bench.py measures, most valuable first, and what was promised of it.

A case is one training set-up: a shape, a base, an adapter, a length. `SPEED` is timed in turns with QLoRA
(NF4, peft) at the same batch, length, rank and checkpointing; `MEMORY` runs alone under the cap of the card;
`LENGTH` grows until memory ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """base: packed (integers or sign planes, by the method), nf4 or dense; head_bits: of embeddings and
    lm_head (None: 16 bit). adapter, train: keys of the recipe's sections. target: (what, at most how much),
    "ratio" to QLoRA's step or "peak_gb"."""

    name: str
    shape: str
    base: str = "packed"
    method: str = "lr_qat"
    bits: int = 4
    residual_bits: int = 1
    group_size: int = 128
    length: int = 2048
    rank: int = 16
    head_bits: int | None = None
    adapter: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    target: tuple[str, float] | None = None

    def tiny(self) -> Case:
        """The same set-up at a size for a CPU."""
        size = 64 if self.length <= 2048 else 128
        return replace(self, shape="tiny", length=size, rank=4, group_size=32 if self.group_size > 0 else -1)


# Under autocast, as people train them: peft keeps A and B in fp32, whose products would otherwise be fp32
# too.
PEFT = {"mixed_precision": "bf16"}
QLORA = Case("QLoRA (NF4, peft)", "8b", base="nf4", method="lora", train=PEFT)
FAST = {"low_rank_gradient": "factorised", "scale_grad_tokens": 0.125}

SPEED = [
    Case("lr_qat W4", "8b", target=("ratio", 1.35)),
    Case(
        "lr_qat W4, factorised, 1/8 of the tokens for scales, codes kept",
        "8b",
        adapter=FAST,
        train={"keep_codes": True},
        target=("ratio", 1.15),
    ),
    Case("LoRA (bf16, peft)", "8b", base="dense", method="lora", train=PEFT),
    Case("lr_qat W4, codes kept", "8b", train={"keep_codes": True}),
    Case("lr_qat W4, compiled layers", "8b", train={"compile": True}),
    Case(
        "lr_qat W4, all of these",
        "8b",
        adapter=FAST,
        train={"keep_codes": True, "compile": True},
        target=("ratio", 1.15),
    ),
    Case("l4q W4", "8b", method="l4q", residual_bits=4),
    Case("dl_qat W4", "8b", method="dl_qat"),
    Case("scale W4", "8b", method="scale"),
    Case("lr_qat W3", "8b", bits=3),
    Case("lr_qat W2", "8b", bits=2),
    Case("l4q W3", "8b", method="l4q", bits=3, residual_bits=4),
    Case("dl_qat W2", "8b", method="dl_qat", bits=2),
    Case("scale W2", "8b", method="scale", bits=2),
    Case("alpha_tuning, 3 planes", "8b", method="alpha_tuning", bits=3),
]

EIGHT = {"optimizer": "adamw8bit"}  # bitsandbytes; train_bench takes adamw where that is missing
MEMORY = [
    Case("8B W4, f = 1, 1 x 2048", "8b", head_bits=4, train=EIGHT, target=("peak_gb", 8.0)),
    Case("8B W4, f = 1, 1 x 2048, 16-bit head and embeddings", "8b", train=EIGHT),
    Case("8B W4, f = 4, 1 x 2048", "8b", residual_bits=4, train=EIGHT, target=("peak_gb", 12.0)),
    Case("14B W4, 1 x 8192", "14b", length=8192, train={**EIGHT, "offload": "cpu"}, target=("peak_gb", 24.0)),
    Case(
        "32B W3, f = 1, 1 x 2048",
        "32b",
        bits=3,
        head_bits=4,
        train={**EIGHT, "offload": "cpu"},
        target=("peak_gb", 24.0),
    ),
    Case(
        "70B W2, 1 x 2048, one step",
        "70b",
        bits=2,
        residual_bits=0,
        rank=8,
        head_bits=4,
        adapter={"train_scale": False},
        train={**EIGHT, "offload": "cpu"},
        target=("peak_gb", 24.0),
    ),
]

LENGTH = Case("8B W4, longest", "8b", head_bits=4, train={**EIGHT, "offload": "cpu", "mlp_chunk": 4096})
LENGTHS = [16384, 32768, 65536, 98304, 131072]
LENGTH_TARGET = 65536

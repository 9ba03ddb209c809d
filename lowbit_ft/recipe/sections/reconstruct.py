"""train.reconstruct: adapters fitted to the dense layers before training, and what that needs: dense weights,
a method whose merge ships what was fitted.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..yaml import Problem
from .base import Count, Positive, Problems, Section


class ReconstructSection(Section):
    """Adapters fitted decoder layer by decoder layer to the dense layer's output, before training
    (train/reconstruct.py). With train.max_steps: 0 the run is a post-training quantizer. The text is that of
    quant.calibration.path, or the training rows.
    """

    steps: Count = Field(default=200, description="of Adam in every decoder layer, one micro-batch each")
    samples: Count = Field(default=128, description="windows of text")
    sequence_len: Count = Field(default=512, description="tokens per window")
    micro_batch_size: Count = Field(default=8, description="windows per step")
    learning_rate: Positive | Literal["auto"] = Field(
        default="auto",
        description="of A and B at the first step, it falls linearly to zero; auto: by method and bits, from "
        "adapters/rates.py",
    )
    scale_learning_rate: Positive | None = Field(
        default=None, description="of scales, magnitudes and offsets; null: learning_rate"
    )
    inputs: Literal["quantized", "dense", "mixed"] = Field(
        default="quantized",
        description="what a layer is given while it is fitted; the target is what the dense model has there. "
        "quantized: what comes out of the packed layers before it, so that their errors are made good too; "
        "dense: the dense model's; mixed: each number from one or the other, by a coin thrown in every step",
    )


def check_reconstruct(r: Any) -> Problems:
    """What stands against fitting this method on this checkpoint."""
    section, adapter = r.train.reconstruct, r.adapter
    if section is None:
        return
    if not adapter.exact_merge:
        yield Problem(
            ("train", "reconstruct"),
            f"got a section, but {adapter.method} is merged by rounding again, which would undo what was "
            "fitted; set adapter.method: lr_qat (or dl_qat, l4q, scale), or reconstruct: null",
        )
    if adapter.ternary:
        yield Problem(
            ("train", "reconstruct"),
            f"got a section, whose optimizer is Adam, and the numbers of adapter {adapter.method} are -1, 0 "
            "and 1; set reconstruct: null, or adapter.method: lr_qat",
        )
    if r.quant.from_checkpoint:
        yield Problem(
            ("train", "reconstruct"),
            f"got a section, but {r.model.path} comes quantized: there are no dense layers to fit to; set "
            "reconstruct: null, or start from the full-precision checkpoint",
        )
    if steps := getattr(adapter, "warmup_steps", 0):
        yield Problem(
            ("adapter", "warmup_steps"),
            f"got {steps} with train.reconstruct, whose scales the end of the warm-up would replace; set "
            "warmup_steps: 0, or train.reconstruct: null",
        )

"""quant.calibration: the text that data-driven calibrators look at, and how they use it."""

from __future__ import annotations

from pydantic import Field

from .base import Count, Positive, Section


class CalibrationSection(Section):
    """Text that data-driven calibrators (gptq, signround) look at."""

    path: str | None = Field(
        default=None, description="text, jsonl, ... or a hub data set; null: the rows of data.train"
    )
    samples: Count = Field(default=128, description="number of windows")
    sequence_len: Count = Field(default=512, description="tokens per window")
    damping: Positive = Field(
        default=0.01, description="gptq: fraction of the mean Hessian diagonal that is added to it"
    )
    steps: Count = Field(default=200, description="signround: steps in every decoder layer")
    batch_tokens: Count = Field(
        default=4096, description="tokens that pass a layer at a time, in whole windows; of signround, a step"
    )
    act_order: bool = Field(
        default=False,
        description="gptq: round the inputs with the largest activations first, on static groups; groups "
        "stay contiguous, so every format holds the result",
    )
    static_groups: bool = Field(
        default=False,
        description="gptq: scales of the weights as they came, not as they are when their group comes up",
    )

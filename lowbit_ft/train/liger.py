"""train.loss: liger: the head's product and the token loss in one of Liger's Triton kernels (extra `liger`,
NVIDIA GPUs).

It makes the gradient of the hidden states in the forward, so the head's product runs once less than in the
chunks of losses.py (two instead of three), and holds about as much. It multiplies with a plain weight: heads
that are packed, adapted, scaled or soft-capped are refused by name, and keep the chunks.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.whole import masters_of

Fused = Callable[[Tensor, Tensor], Tensor]  # hidden [T, H], tokens [T] -> the sum of their losses


def liger_problems(recipe: Any) -> list[str]:
    """What the fused kernels lack in this recipe or on this machine: their package, a GPU, a head that is
    whole and not packed. recipe: the sections that are valid.
    """
    reasons = []
    if importlib.util.find_spec("liger_kernel") is None:
        reasons.append("liger-kernel is not installed (pip install 'lowbit-ft[liger]')")
    if not torch.cuda.is_available() or (hasattr(recipe, "model") and recipe.model.device == "cpu"):
        reasons.append("its kernels run on a GPU only")
    if hasattr(recipe, "quant") and recipe.quant.lm_head is not None:
        bits = recipe.quant.lm_head
        reasons.append(f"it multiplies with a plain weight, and quant.lm_head packs the head in {bits} bits")
    if recipe.train.sharding == "fsdp":
        reasons.append("it was not made to work with train.sharding: fsdp")
    return reasons


def liger_loss(model: Any, logits_of: Callable[[Tensor], Tensor]) -> Fused:
    """The fused loss of a model whose logits are logits_of(hidden [T, H]) -> [T, V].

    Raises ValueError when Liger is not installed, or the head does more than one product.
    """
    key, way_out = "train.loss: got 'liger'", "set train.loss: chunked"
    head = model.get_output_embeddings()
    if masters_of(head) is not None:
        raise ValueError(
            f"{key}, which makes the gradient of the head in its 16-bit dtype, and the head is trained whole "
            f"in fp32 (adapter.modules_to_save); {way_out}"
        )
    if type(head) is not nn.Linear:
        raise ValueError(
            f"{key}, which multiplies with a plain weight, and the head of this model is a "
            f"{type(head).__name__}; {way_out}"
        )
    hidden = (
        torch.sin(torch.arange(4 * head.in_features, device=head.weight.device))
        .view(4, -1)
        .to(head.weight.dtype)
    )
    with torch.no_grad():
        plain, real = head(hidden), logits_of(hidden)
    if not torch.equal(plain, real):
        raise ValueError(
            f"{key}, which knows no scaling and no soft cap of logits, and "
            f"{type(model).__name__} has one; {way_out}"
        )
    try:
        kernels = importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise ValueError(
            f"{key}, which cannot be imported ({error}); pip install 'lowbit-ft[liger]', or {way_out}"
        ) from error
    loss = kernels.LigerFusedLinearCrossEntropyLoss(reduction="sum", ignore_index=-100)
    return lambda hidden, tokens: loss(head.weight, hidden, tokens, head.bias)

"""unrounded: the model as it was before rounding, from what the packed base holds. No second copy in memory.

    W ~ s0 (c - z0) + s0 ((e + 1/2) / 2^f - 1/2)        two packed products: codes, and residual
                                                        with scale s0 / 2^f, zero 2^(f-1), offset s0 / 2^(f+1)

codes and f residual bits are the original weight at bits + f bits, but for what calibration clipped or, with
gptq and its like, moved on purpose: their residual belongs to the compensated weight. Dividing a scale by a
power of two is exact in every dtype scales have, so both products are those of grid/packed.py, bit for bit.
Adapters and dense modules that train play no part: the answer does not change while the model trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .kv_seam import seams
from .linear import PackedLinear
from .whole import untrained

# from here on codes alone are taken for the weight, as in the teacher that is packed to 8 bits
WHOLE_BITS = 8


def rounded_for_good(model: nn.Module) -> list[str]:
    """The names of the packed layers whose rounding cannot be undone: no residual, and fewer than 8 bits."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLinear) and not layer.has_residual and layer.grid.bits < WHOLE_BITS
    ]


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Inside, every packed layer of `model` multiplies with codes + residual, its adapter left out; layers of
    8 bits with their codes; keys and values are as they come, dense modules as they were before training.
    Wants no gradient: use it under torch.no_grad, in eval mode.

    ValueError naming the layers that have no residual and fewer than 8 bits.
    """
    if lost := rounded_for_good(model):
        raise ValueError(
            f"{len(lost)} packed layers keep no residual ({', '.join(lost[:3])}{', ...' * (len(lost) > 3)}), "
            "so the weight before rounding is gone; set quant.residual_bits: 4 (and 8 bits for lm_head and "
            "embeddings, which keep none)"
        )
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    before = [layer.unrounded for layer in layers]
    caches = [(seam, seam.off) for _, seam in seams(model)]
    for layer in layers:
        layer.unrounded = True
    for seam, _ in caches:
        seam.off = True
    try:
        with untrained(model):
            yield
    finally:
        for seam, value in caches:
            seam.off = value
        for layer, value in zip(layers, before, strict=True):
            layer.unrounded = value

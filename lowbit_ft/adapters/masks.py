"""Zeros that stay zeros (quant.sparsity) while a method trains, zeros that come, and a lowest code that stays
unused (quant.calibrate: ternary): who cannot keep them, and why.

What moves codes through `GridArgs` needs to do nothing: the ops hold masked codes at the zero point, forward
and backward (lowbit_kernels/codes.py). What is refused reaches a weight by another way.
"""

from typing import Any

from ..grid import IntGrid


def against_kept(config: Any, grid: IntGrid) -> str | None:
    """Why a method as it is set cannot keep what the codes of a grid keep to; None when it can."""
    return (against_narrow(config) if grid.narrow else None) or (against_mask(config) if grid.mask else None)


def against_mask(config: Any) -> str | None:
    """Why a method as it is set cannot keep the zeros of a mask, with the way out; None when it can."""
    if not config.keeps_zeros:
        return (
            f"{config.method} adds its update beside the base, which moves the zeros that quant.sparsity "
            "locks (merged into a 90 % sparse matrix it leaves none); use lr_qat, dl_qat or l4q, whose "
            "update is masked"
        )
    if config.ships_offset:
        return "a float offset moves the zeros that quant.sparsity locks; set adapter.offset: auto or none"
    if (how := getattr(config, "low_rank_gradient", "exact")) != "exact":
        return (
            f"adapter.low_rank_gradient: {how} is made of all weights, and quant.sparsity locks some at "
            "zero; set low_rank_gradient: exact"
        )
    if steps := getattr(config, "warmup_steps", 0):
        return (
            f"adapter.warmup_steps: {steps} runs a LoRA beside the base, which moves the zeros that "
            "quant.sparsity locks; set warmup_steps: 0"
        )
    return None


def against_schedule(config: Any) -> str | None:
    """Why a method as it is set cannot be pruned while it trains (pruned.py), with the way out."""
    if (reason := against_mask(config)) is not None:
        return reason
    if not config.prunes:
        return (
            f"{config.method} leaves codes as the base has them, and zeros that come while it trains are of "
            "any weight; use full_qat, lr_qat, dl_qat or l4q, or remove quant.sparsity.schedule"
        )
    if config.targets is not None:
        return (
            "adapter.targets leaves layers without an adapter, which would stay dense; remove it, and keep "
            "layers that are not to be pruned out of the base (quant.exclude)"
        )
    return None


def against_narrow(config: Any) -> str | None:
    """Why a method as it is set cannot keep the levels of a narrow grid, with the way out; None: it can."""
    if not config.keeps_zeros:
        return (
            f"{config.method} is rounded anew when it is merged, to all codes of the grid, and "
            "quant.calibrate: ternary leaves the lowest unused; use lr_qat, dl_qat, l4q or full_qat, whose "
            "codes are those of training"
        )
    if (offset := getattr(config, "offset", "none")) not in ("auto", "none"):
        return (
            f"adapter.offset: {offset} moves the level that is 0, and quant.calibrate: ternary is for -s, 0, "
            "s; set offset: none"
        )
    return None

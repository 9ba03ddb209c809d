"""AutoRound (SignRound, arXiv 2309.05516): its own settings, only the calibration rows are ours.

options: those of its configuration (iters, lr, enable_minmax_tuning, ...); none are its defaults, 200
iterations of 8 sequences per decoder layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from child import Layer, Spec, decoder_linears, dense_model, main
from torch import Tensor


def shipped(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec) -> Tensor:
    """What its export would hold, [N, K] fp32: the codes of the tuned weight times the 16-bit scale.

    It leaves the product in bfloat16, up to 1/30 of a step off its own codes at 4 bits, so the codes are
    plain.
    """
    n, k = weight.shape
    step, middle = scale.float().reshape(n, -1, 1), 2 ** (spec.bits - 1)
    at = middle if zero is None else zero.float().reshape(n, -1, 1)
    groups = weight.detach().float().reshape(n, step.shape[1], -1)
    place = torch.where(step == 0, 0.0, groups / step)
    codes = place.round()
    if float((place - codes).abs().max()) > 0.1:
        raise ValueError("the weights that AutoRound left are not multiples of its scales")
    if float((codes + at).min()) < 0 or float((codes + at).max()) > 2**spec.bits - 1:
        raise ValueError("AutoRound left codes outside of its range")
    return (codes * step).reshape(n, k)


def quantize(spec: Spec) -> tuple[Any, Callable[[], Iterable[Layer]]]:
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]  # lives in its own environment
    from transformers import AutoTokenizer

    model, ids = dense_model(spec), spec.ids()
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(spec.model),
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.symmetric,
        dataset=list(ids.split(8)),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map="cpu",
        seed=spec.seed,
        **spec.options,
    )
    done: dict[str, Any] = {}

    def work() -> None:
        done["model"] = rounder.quantize()[0]

    def layers() -> Iterable[Layer]:
        for name, linear in decoder_linears(done["model"]).items():
            zero = (
                linear.zp if isinstance(linear.zp, Tensor) else None
            )  # a symmetric one is the number 2^(b-1)
            yield name, shipped(linear.weight, linear.scale, zero, spec), linear.scale, zero

    return work, layers


if __name__ == "__main__":
    main(["auto-round"], quantize)

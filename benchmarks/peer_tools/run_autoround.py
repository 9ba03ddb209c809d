"""AutoRound (SignRound, arXiv 2309.05516): its own settings, only the calibration rows are ours.

options: those of its configuration (iters, lr, enable_minmax_tuning, ...); none are its defaults, 200 iterations of
8 sequences per decoder layer. The weights are those it tuned and rounded, read from the model after quantize().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from child import Layer, Spec, decoder_linears, dense_model, main


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
            zero = linear.zp if isinstance(linear.zp, Tensor) else None  # a symmetric one is the number 2^(b-1)
            yield name, linear.weight, linear.scale, zero

    return work, layers


if __name__ == "__main__":
    main(["auto-round"], quantize)

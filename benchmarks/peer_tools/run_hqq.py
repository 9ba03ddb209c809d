"""HQQ (Half-Quadratic Quantization): no calibration text, a zero point that is no integer, axis 1.

options: those of its BaseQuantizeConfig. Its zero points are 16-bit floats, so a group costs 16 bits more
than that of an integer zero; `bits_per_weight` of the row says so. It has no symmetric grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from child import Layer, Spec, decoder_linears, dense_model, main


def quantize(spec: Spec) -> tuple[Any, Callable[[], Iterable[Layer]]]:
    from hqq.core.quantize import (  # pyright: ignore[reportMissingImports]  # lives in its own environment
        BaseQuantizeConfig,
        HQQLinear,
    )

    if spec.symmetric:
        raise ValueError("HQQ has no symmetric grid")
    linears = decoder_linears(dense_model(spec))
    made: dict[str, Any] = {}

    def work() -> None:
        for name, linear in linears.items():
            group = linear.in_features if spec.group_size == -1 else spec.group_size
            config = BaseQuantizeConfig(nbits=spec.bits, group_size=group, axis=1, **spec.options)
            made[name] = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)

    def layers() -> Iterable[Layer]:
        for name, layer in made.items():
            rows = layer.meta["shape"][0]
            scale, zero = (layer.meta[key].float().reshape(rows, -1) for key in ("scale", "zero"))
            yield name, layer.dequantize(), scale, zero

    return work, layers


if __name__ == "__main__":
    main(["hqq"], quantize)

"""add_weighted_adapter: one adapter that is the weighted sum of several, where that is exact.

    W^ = W0 + sum_i w_i (W^_i - W0)          W0 the base, W^_i the weight with adapter i, as LoRA's "linear"

Where the codes stay (scale, alpha_tuning) it is a sum of scales, S = s0 (1 + sum_i w_i (exp(l_i) - 1)), and
an adapter of the same method (`Adapter.sum_of`). Where codes are rounded there is none, since round(a + b) is
not round(a) + round(b): refused by the method's name.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from .peft_layer import LowBitLinear


def add_weighted_adapter(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "linear",
) -> None:
    """Put the sum beside the others, under `adapter_name`, not active and frozen. ValueError in the user's
    terms, before anything is added."""
    if combination_type != "linear":
        raise ValueError(
            f"combination_type: got {combination_type!r}; allowed: linear, the sum that is exact here"
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"add_weighted_adapter: got {len(adapters)} adapters and {len(weights)} weights")
    if bad := [w for w in weights if not math.isfinite(w)]:
        raise ValueError(f"weights: got {bad[0]}; allowed: finite numbers")
    if missing := [name for name in adapters if name not in tuner.peft_config]:
        raise ValueError(f"adapter {missing[0]!r} not found; there are {', '.join(tuner.peft_config)}")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"adapter_name: {adapter_name!r} is taken; choose another")
    configs = [tuner.peft_config[name] for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"adapter {name!r} trains whole modules or tokens (modules_to_save, "
                "trainable_token_indices), which have no sum here; train it without, or use set_adapter"
            )
    alike = [(c.adapter, c.target_modules, c.exclude_modules) for c in configs]
    if different := [name for name, one in zip(adapters, alike, strict=True) if one != alike[0]]:
        raise ValueError(
            f"adapters {adapters[0]!r} and {different[0]!r} differ in method, options or target_modules; "
            "only like ones can be added"
        )
    sums = {}
    for name, layer in tuner.model.named_modules():
        if isinstance(layer, LowBitLinear) and adapters[0] in layer.lowbit_adapters:
            found: list[Any] = [layer.lowbit_adapters[one] for one in adapters]
            try:
                sums[name] = found[0].sum_of(found, weights)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if sums[name] is None:
                raise ValueError(
                    f"{configs[0].method} rounds what its adapters add, and round(a + b) is not round(a) + "
                    "round(b): they have no sum; choose one with set_adapter(name)"
                )
    tuner.peft_config[adapter_name] = copy.deepcopy(configs[0])
    tuner.inject_adapter(tuner.model, adapter_name)
    with torch.no_grad():
        for name, tensors in sums.items():
            for key, value in tensors.items():
                tuner.model.get_submodule(name).lowbit_adapters[adapter_name].get_parameter(key).copy_(value)
    tuner.set_requires_grad(adapter_name, requires_grad=False)

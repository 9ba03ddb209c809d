"""GPTQ (arXiv 2210.17323) of llm-compressor: its own settings, only the calibration rows are ours.

options: those of its GPTQModifier (block_size, dampening_frac, actorder, ...). The weights are those it left
in the model, with the scales and zero points beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from child import Layer, Spec, decoder_linears, dense_model, main


def quantize(spec: Spec) -> tuple[Any, Callable[[], Iterable[Layer]]]:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStrategy,
        QuantizationType,
    )
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]  # of the peer's environment
    from llmcompressor.modifiers.quantization import (  # pyright: ignore[reportMissingImports]  # as above
        GPTQModifier,
    )

    model, ids = dense_model(spec), spec.ids()
    weights = QuantizationArgs(
        num_bits=spec.bits,
        type=QuantizationType.INT,
        symmetric=spec.symmetric,
        strategy=QuantizationStrategy.CHANNEL if spec.group_size == -1 else QuantizationStrategy.GROUP,
        group_size=None if spec.group_size == -1 else spec.group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"], **spec.options)
    rows = ids.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})

    def work() -> None:
        oneshot(
            model=model,
            dataset=data,
            recipe=modifier,
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
        )

    def layers() -> Iterable[Layer]:
        for name, linear in decoder_linears(model).items():
            zero = getattr(linear, "weight_zero_point", None)
            # its integers are signed: weight = scale * (code - zero), codes from -2^(b-1)
            moved = None if spec.symmetric or zero is None else zero.float() + 2 ** (spec.bits - 1)
            yield name, linear.weight, linear.weight_scale, moved

    return work, layers


if __name__ == "__main__":
    main(["llmcompressor", "compressed-tensors"], quantize)

"""A kernel for vLLM's own table that computes any integer grid in floating point.

vLLM has no CPU kernel for weights of 2, 3 and 8 bits, nor for 8- and 4-bit inputs before packed weights. Its
parser, loader, scheme choice and fusion of q, k, v and of gate, up do not depend on a kernel, though: with
this one in its table they are tested at every width. What it computes:

    w  = scale (code - zero)              codes are a stream of bits over 32-bit words, lowest bit first
    x^ = scale round(x / scale)           scale = max |x| / (2^(bits-1) - 1) per token or group, as vLLM's
                                          int8 kernels have it; x itself where inputs stay in 16 bits
    y  = x^ w' + bias

It runs in vLLM's environment and imports nothing of this project.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels import linear as table
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import PlatformEnum


class DequantizingKernel(MPLinearKernel):
    """w in the type of the inputs, made once after loading."""

    seen: dict[str, int] = {}

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scale, zero = self._get_weight_params(layer)
        inputs, outputs = self.config.partition_weight_shape
        bits = self.config.weight_type.size_bits
        codes = unpacked(packed.data, bits, inputs)
        groups = scale.shape[1]
        grouped = codes.to(torch.float32).reshape(outputs, groups, -1)
        if zero is not None:
            zeros = unpacked(zero.data.t(), bits, outputs).t()
            grouped = grouped - zeros.to(torch.float32)[..., None]
        else:
            grouped = grouped - 2 ** (bits - 1)
        weight = (grouped * scale.data.to(torch.float32)[..., None]).reshape(outputs, inputs)
        layer.dense = torch.nn.Parameter(weight.to(self.config.act_type), requires_grad=False)
        for name in (self.w_q_name, self.w_zp_name):
            if name and getattr(layer, name, None) is not None:
                delattr(layer, name)
        inputs_on = getattr(layer, "_humming_input_quant_config", None)
        kind = f"W{bits} {'asym' if zero is not None else 'sym'}"
        kind += f" A{inputs_on['num_bits']} {inputs_on['strategy']}" if inputs_on else ""
        self.seen[kind] = self.seen.get(kind, 0) + 1

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        config: dict[str, Any] | None = getattr(layer, "_humming_input_quant_config", None)
        if config is not None:
            x = rounded(x, config["num_bits"], config["group_size"])
        dense = layer.dense
        assert isinstance(dense, torch.Tensor)
        return torch.nn.functional.linear(x, dense, bias)


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """[R, W] int32 to [R, count] unsigned codes: code i in bits i b to (i + 1) b of the row's stream."""
    places = torch.arange(32, dtype=torch.int32)
    stream = ((words.contiguous()[..., None] >> places) & 1).flatten(1)[:, : count * bits]
    weights = 1 << torch.arange(bits, dtype=torch.int32)
    return (stream.unflatten(1, (count, bits)).to(torch.int32) * weights).sum(-1, dtype=torch.int32)


def rounded(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """x [..., K] on the grid of its tokens (group 0) or of their groups; shape and type stay."""
    top = 2 ** (bits - 1) - 1
    grouped = x.to(torch.float32).unflatten(-1, (-1, group or x.shape[-1]))
    scale = grouped.abs().amax(-1, keepdim=True) / top
    codes = torch.round(grouped / scale.where(scale != 0, torch.ones_like(scale))).clamp(-top - 1, top)
    return (codes * scale).flatten(-2).to(x.dtype)


def register() -> None:
    """First in vLLM's list for CPUs."""
    table._POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, DequantizingKernel)

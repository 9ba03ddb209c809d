"""Models of real shapes with random weights, for train_bench.py: no checkpoint is needed and nothing of 16
bit is made on the way.

    packed(shape, grid)   integers, scales and residual drawn on the device, one layer after the other
    nf4(shape)            bitsandbytes' 4-bit linears with double quantization, as QLoRA has them
    dense(shape)          bfloat16 linears

Everything a config.json would say of the public models is here; embeddings, norms and head are random too.
Random integers make activations of an ordinary size (a scale of 0.02 over their standard deviation), so no
step overflows; the losses mean nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from lowbit_ft.grid import Grid, IntGrid, empty_weight
from lowbit_ft.model.linear import PackedEmbedding, PackedLinear

DEVIATION = 0.02  # of a weight


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder. kind: the family whose code runs it."""

    name: str
    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    def config(self) -> PretrainedConfig:
        sizes: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 1 << 20,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "use_cache": False,
        }
        return {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.kind](**sizes)

    def first(self, layers: int) -> Shape:
        """The same model, cut after so many layers."""
        return (
            self
            if layers >= self.layers
            else replace(self, name=f"{self.name}[{layers} layers]", layers=layers)
        )


# The public numbers of Llama 3.1 8B and 70B, and of Qwen2.5 14B and 32B.
SHAPES = {
    "8b": Shape("8B", "llama", 4096, 32, 32, 8, 14336, 128256),
    "14b": Shape("14B", "qwen2", 5120, 48, 40, 8, 13824, 152064),
    "32b": Shape("32B", "qwen2", 5120, 64, 40, 8, 27648, 152064),
    "70b": Shape("70B", "llama", 8192, 80, 64, 8, 28672, 128256),
    "tiny": Shape("tiny", "llama", 128, 2, 4, 2, 256, 1024),  # for --dry-run
}


def packed(
    shape: Shape,
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    head: Grid | None = None,
    attention: str = "sdpa",
) -> Any:
    """A model whose linears are PackedLinears on `grid`; head: the grid of lm_head and embeddings (None: 16
    bit).
    """

    def replaced(linear: nn.Linear) -> nn.Module:
        bias = None if linear.bias is None else torch.zeros(linear.out_features, dtype=dtype, device=device)
        return PackedLinear(_random_weight((linear.out_features, linear.in_features), grid, device), bias)

    model = _built(shape, device, dtype, replaced, attention, keep_head=head is None)
    if head is not None:
        size = (shape.vocabulary, shape.hidden)
        model.set_submodule("model.embed_tokens", PackedEmbedding(_random_weight(size, head, device), dtype))
        model.set_submodule("lm_head", PackedLinear(_random_weight(size, head, device)))
    return model


def nf4(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa"
) -> Any:
    """The base of QLoRA. ImportError without bitsandbytes."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    make: Any = Params4bit

    def replaced(linear: nn.Linear) -> nn.Module:
        with torch.device("meta"):
            out = Linear4bit(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=device).normal_(
            0, DEVIATION
        )
        # Params4bit packs when it is moved to a device, the one it is on included.
        out.weight = make(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=out)
        if linear.bias is not None:
            out.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype))
        return out.to(device)

    model = _built(shape, device, dtype, replaced, attention)
    model.is_loaded_in_4bit = True  # what peft asks before it takes its 4-bit layer
    return model


def dense(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa"
) -> Any:
    return _built(shape, device, dtype, None, attention)


def with_lora(model: Any, rank: int) -> Any:
    """peft's LoRA on every linear but the head, in fp32 as peft makes it on a quantized base; the model stays
    a transformers model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=r".*layers\..*_proj", init_lora_weights=True
    )
    model.requires_grad_(False)
    model = inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return model


def sharing(model: Any) -> Any:
    """A second model over the same tensors, for other adapters on the same base."""
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def _built(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    replaced: Callable[[nn.Linear], nn.Module] | None,
    attention: str,
    keep_head: bool = True,
) -> Any:
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            shape.config(), dtype=dtype, attn_implementation=attention
        )
    assert not shape.tied, "tied shapes are not built here"
    if not keep_head:  # the caller brings its own, and the 16-bit ones must not exist even for a moment
        model.model.embed_tokens, model.lm_head = nn.Identity(), nn.Identity()
    for name, linear in [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    ]:
        if replaced is not None:
            model.set_submodule(name, replaced(linear))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module.register_parameter(
                    name, nn.Parameter(_random_dense(parameter, device), requires_grad=False)
                )
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    model.requires_grad_(False)
    return model


def _random_dense(like: Tensor, device: torch.device) -> Tensor:
    out = torch.empty(like.shape, dtype=like.dtype, device=device)
    return out.fill_(1) if out.dim() == 1 else out.normal_(0, DEVIATION)  # vectors are norms


def _random_weight(shape: tuple[int, int], grid: Grid, device: torch.device) -> Any:
    weight = empty_weight(shape, grid, device)
    top = (1 << grid.bits) - 1
    # Uniform integers have a standard deviation of sqrt((2^b)^2 - 1) / sqrt(12); b planes of +-alpha have
    # alpha sqrt(b).
    step = (
        DEVIATION / (((top + 1) ** 2 - 1) / 12) ** 0.5
        if isinstance(grid, IntGrid)
        else DEVIATION / grid.bits**0.5
    )
    for name, tensor in weight.to_tensors().items():
        if tensor.dtype == torch.int16:  # 16 random bits: every pattern is a code
            tensor.random_(-(1 << 15), 1 << 15)
        elif name == "zero":
            tensor.fill_((top + 1) // 2)
        else:
            tensor.fill_(step)
    return weight

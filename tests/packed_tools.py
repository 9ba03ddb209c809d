"""Tiny checkpoints, packed weights with every code in them, and packed models, for the tests of export, merge
and loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lowbit_kernels as kernels
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowbit_ft.adapters import ADAPTERS, AdapterConfig
from lowbit_ft.adapters.attach import attach
from lowbit_ft.grid import BinaryGrid, BinaryWeight, Grid, IntGrid, PackedWeight, Weight
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.load import load_model

SIZE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
IDS = torch.arange(3, 40)[None]


def tiny_checkpoint(folder: Path, config: Any = None, base_only: bool = False, **changes: Any) -> Path:
    """A random Llama (or `config`), saved in bfloat16 as most checkpoints are."""
    torch.manual_seed(0)
    config = config or transformers.LlamaConfig(**(SIZE | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    (model.base_model if base_only else model).save_pretrained(folder)
    return folder


def bf16_scales(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(*shape, generator=generator) * 0.02 + 0.001).bfloat16()


def random_weight(shape: tuple[int, int], grid: Grid, *, offset: bool = False, seed: int = 0) -> Weight:
    """Every code (and zero point) occurs where there is room for it; scales are values of the grid's
    scale_dtype, of either sign on symmetric grids.
    """
    g = torch.Generator().manual_seed(seed)
    (n, k), groups = shape, kernels.group_count(shape[1], grid.group_size)
    dtype = getattr(torch, grid.scale_dtype)
    if isinstance(grid, BinaryGrid):
        signs = torch.randint(0, 2, (grid.bits, n, k), generator=g, dtype=torch.uint8)
        return BinaryWeight.pack(signs, bf16_scales(grid.bits, groups, n, generator=g), grid)
    codes = (torch.arange(n * k) % grid.levels)[torch.randperm(n * k, generator=g)].view(n, k).to(torch.uint8)
    zero = torch.randint(0, grid.levels, (groups, n), generator=g).to(torch.uint8)
    zero.view(-1)[-1], zero.view(-1)[0] = grid.levels - 1, 0
    scale, f = bf16_scales(groups, n, generator=g).to(dtype), grid.residual_bits
    if grid.symmetric:
        scale.view(-1)[1::2] *= -1
    residual = torch.randint(0, max(1, 1 << f), (n, k), generator=g, dtype=torch.uint8)
    return PackedWeight(
        codes=kernels.pack(codes, grid.bits),
        scale=scale,
        zero=None if grid.symmetric else zero,
        residual=kernels.pack(residual, f) if f else None,
        offset=bf16_scales(groups, n, generator=g).to(dtype) if offset else None,
        shape=shape,
        grid=grid,
    )


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that get packed: every Linear but the head."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and not name.endswith("lm_head")
    }


def random_weights(model: nn.Module, grid: Grid | dict[str, Grid]) -> dict[str, Weight]:
    """A random weight for every linear; grid per name ending, or one for all."""
    out = {}
    for i, (name, linear) in enumerate(linears(model).items()):
        own = grid if not isinstance(grid, dict) else next(g for end, g in grid.items() if name.endswith(end))
        out[name] = random_weight((linear.out_features, linear.in_features), own, seed=i)
    return out


def packed_model(checkpoint: Checkpoint, weights: dict[str, Weight]) -> Any:
    """The checkpoint's model with these weights packed in it: the reference all formats are compared with."""
    return set_packed(load_model(checkpoint), weights).eval()


def set_packed(model: Any, weights: dict[str, Weight]) -> Any:
    """The model, with these weights packed in the place of its linears; biases stay."""
    for name, weight in weights.items():
        model.set_submodule(name, PackedLinear(weight, model.get_submodule(name).bias))
    return model


def adapter_config(method: str, rank: int = 4, **options: Any) -> AdapterConfig:
    """A method's config, with this rank where it has one."""
    low_rank = {"rank": rank} if "rank" in ADAPTERS[method].model_fields else {}
    return ADAPTERS[method](**low_rank, **options)


def nudge(parameter: Tensor, size: float, config: AdapterConfig) -> None:
    """A trained tensor moved at random; numbers of -1, 0 and 1 stay of these (and none of them is 0)."""
    if config.ternary:
        parameter.copy_(torch.randint(0, 2, parameter.shape) * 2 - 1)
    else:
        parameter.add_(torch.randn_like(parameter) * size)


def undrawn(method: str) -> AdapterConfig:
    """A method's defaults, but its gradients are of all tokens: two backwards of one forward are equal."""
    draws = ADAPTERS[method].model_fields.get("scale_grad_tokens")
    return ADAPTERS[method](method=method, **({} if draws is None else {"scale_grad_tokens": 1.0}))


def adapted_llama(
    config: AdapterConfig, grid: Grid, *, seed: int = 1, head: bool = False, **changes: Any
) -> Any:
    """A random Llama of two layers, always the same integers in it, with fresh adapters on it; seed draws A.
    head: its head is packed and trained too.
    """
    size = {
        "vocab_size": 23,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(size | changes)))
    set_packed(model, random_weights(model, grid))
    if head:
        shape = (model.config.vocab_size, model.config.hidden_size)
        model.set_submodule("lm_head", PackedLinear(random_weight(shape, grid)))
    torch.manual_seed(seed)
    attach(model, config)
    return model


def int_grid(**fields: Any) -> IntGrid:
    return IntGrid(**({"group_size": 64, "residual_bits": 0} | fields))

"""A small Llama on packed integers and what users do with it through PEFT: train, switch, look at logits."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_ft.adapters import ADAPTERS, Adapter
from lowbit_ft.grid import BinaryGrid, Grid, IntGrid
from lowbit_ft.grid.calibrate import CALIBRATORS, Stats
from lowbit_ft.integrations.peft import LowBitConfig
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.train.optimizers.t_signsgd import TSignSGD

INTEGER = IntGrid(bits=3, group_size=32)
BINARY = BinaryGrid(bits=3, group_size=32)
LAYERS = 14
QUICK: dict[str, dict[str, Any]] = {
    name: {"rank": 4} if "rank" in c.model_fields else {} for name, c in ADAPTERS.items()
}


def packed_model(
    grid: Grid = INTEGER, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False
) -> LlamaForCausalLM:
    """A fresh copy of a random Llama whose 14 decoder linears are packed; one seed, one set of integers.
    tied: its head is its embedding."""
    return copy.deepcopy(_packed_once(grid, seed, tied)).to(dtype)


@functools.cache
def _packed_once(grid: Grid, seed: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    calibrate = CALIBRATORS["greedy" if isinstance(grid, BinaryGrid) else "mse"]
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                base = calibrate.run(module.weight.detach(), grid, Stats())
                bias = None if module.bias is None else torch.randn_like(module.bias) / 10
                parent, _, child = name.rpartition(".")
                setattr(layer.get_submodule(parent), child, PackedLinear(base, bias))
    return model


def tokens(rows: int = 2, seed: int = 5) -> Tensor:
    return torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=tokens()).logits


def train(model: nn.Module, steps: int = 3, seed: int = 5, lr: float = 0.02) -> list[float]:
    chosen = [p for p in model.parameters() if p.requires_grad]
    ternary = any(isinstance(m, Adapter) and m.config.ternary for m in model.modules())
    optimizer = TSignSGD(chosen, lr=0.3) if ternary else torch.optim.AdamW(chosen, lr=lr)
    losses, ids = [], tokens(seed=seed)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def grid_of(method: str) -> Grid:
    return BINARY if ADAPTERS[method].grid_name == "binary" else INTEGER


def trained(method: str = "lr_qat", name: str = "default", seed: int = 5, **keys: Any) -> Any:
    torch.manual_seed(7)
    model = get_peft_model(
        packed_model(grid_of(method)), LowBitConfig(method=method, **(QUICK[method] | keys)), name
    )
    train(model, seed=seed)
    return model

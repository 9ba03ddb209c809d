"""parts: the attention of every layer, and which of its linears read the hidden states and which one writes
the output, by the names that transformers gives them.

    h -> q, k, v (or one matrix for all three) -> softmax(q k^T) v = context -> out -> h + out(context)

What has other parts (state spaces, latent attention, linear attention) is refused by name: whoever asks wants
to meet two models at these places, and a guess would meet them elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .linear import PackedLinear
from .walk import decoder_layers

BLOCKS = ("self_attn", "attention", "attn", "self_attention")  # of a layer: its attention
READS = {  # a linear of the attention by the last part of its name -> what of q, k, v it makes
    **dict.fromkeys(("q_proj", "query", "q_lin", "query_proj", "pos_query_proj"), "q"),
    **dict.fromkeys(("k_proj", "key", "k_lin", "key_proj", "pos_key_proj"), "k"),
    **dict.fromkeys(("v_proj", "value", "v_lin", "value_proj"), "v"),
    **dict.fromkeys(("Wqkv", "qkv_proj", "query_key_value", "c_attn"), "qkv"),
}


@dataclass(frozen=True)
class LayerParts:
    """A layer, its attention, what makes q, k and v (one matrix may make all: "qkv"), and the matrix behind
    the context."""

    name: str
    layer: nn.Module
    block: nn.Module
    reads: tuple[tuple[str, nn.Module], ...]
    out: nn.Module

    @property
    def fused(self) -> bool:
        """One matrix makes q, k and v."""
        return any(role == "qkv" for role, _ in self.reads)

    def reading(self, roles: str) -> list[nn.Module]:
        """The matrices that make one of these, and a fused one."""
        return [module for role, module in self.reads if role in roles or role == "qkv"]


def layer_parts(model: nn.Module) -> list[LayerParts]:
    """Of every decoder (or encoder) layer, in order. ValueError naming the layer that has not these parts."""
    prefix, layers = decoder_layers(model)
    return [_parts(type(model).__name__, f"{prefix}.{i}", layer) for i, layer in enumerate(layers)]


def _parts(model: str, name: str, layer: nn.Module) -> LayerParts:
    found = [child for key, child in layer.named_children() if key in BLOCKS]
    if len(found) != 1:
        raise ValueError(
            f"{model}: {name} has no attention of its own under one of the names {', '.join(BLOCKS)} "
            f"(it has {', '.join(key for key, _ in layer.named_children())})"
        )
    reads, writes = [], []
    for key, module in found[0].named_modules():
        if not (isinstance(module, nn.Linear | PackedLinear) or type(module).__name__ == "Conv1D"):
            continue
        role = READS.get(key.rpartition(".")[2])
        writes.append((key, module)) if role is None else reads.append((role, module))
    whole = {"qkv"} == {role for role, _ in reads} or {"q", "k", "v"} == {role for role, _ in reads}
    if not whole or len(writes) != 1:
        known = ", ".join(key for key, _ in writes) or "none"
        raise ValueError(
            f"{model}: the attention of {name} is not q, k, v and one matrix behind them (found "
            f"{', '.join(role for role, _ in reads) or 'none'} of q, k, v, and beside them: {known})"
        )
    return LayerParts(name, layer, found[0], tuple(reads), writes[0][1])

"""quant.kv_cache on a model: every attention module of its decoder gets the seam, or the model is refused by
name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lowbit_kernels.hadamard import hadamard_problem
from torch import nn

from ..model.config import head_width
from ..model.kv_seam import PROJECTIONS, Seam, attention_modules, layer_number, seams, set_seam
from .codec import Codec
from .config import AFTER, BEFORE, KVConfig
from .kinds import TokenHead


def place_kv_cache(model: Any, config: KVConfig | None) -> None:
    """From here on keys and values of this model are on the grid of `config`, in training and in every cache;
    None takes it away. ValueError when the model cannot have it."""
    if config is None:
        for _, seam in seams(model):
            seam.keys = seam.values = None
        return
    if problems := reject_model(model, config):
        raise ValueError("quant.kv_cache: " + "; ".join(problems))
    put_seams(model, model.config.get_text_config(), config)


def put_seams(part: nn.Module, text: Any, config: KVConfig) -> None:
    """The seams of all attention modules of a model or of a layer of it. text: configuration of the language
    model."""
    for module in attention_modules(part).values():
        codec = config.codec(head_sizes(module, text)[1])
        r3 = layer_number(module) in config.r3
        keys = codec.of_keys(text.model_type)
        set_seam(module, Seam(keys, codec, config.where == BEFORE, r3, layer=_packed_layer))


def _packed_layer(keys: Codec, values: Codec, like: Any) -> Any:
    from .cache import packed_like  # slow: transformers, which a recipe is read without

    return packed_like(keys, values, like)


def set_r3(model: nn.Module, layers: Iterable[int]) -> None:
    """Rotate the keys of these layers (by number) before they are rounded, and those of no other. ValueError
    where there is no KV grid, or one that rotates by itself, or heads that have no Hadamard matrix."""
    on = set(layers)
    found = kv_config_of(model)
    if found is None:
        raise ValueError("R3 rotates what quant.kv_cache rounds, and there is none: set quant.kv_cache")
    place_kv_cache(model, KVConfig(**{**vars(found), "r3": tuple(sorted(on))}))


def kv_config_of(model: nn.Module) -> KVConfig | None:
    """What `place_kv_cache` has put on the model."""
    found = {name: seam for name, seam in seams(model) if seam.keys is not None}
    if not found:
        return None
    r3 = sorted(layer_number(model.get_submodule(name)) for name, seam in found.items() if seam.r3)
    first = next(iter(found.values()))
    codec: Any = first.keys
    rotate = isinstance(codec, TokenHead) and bool(codec.signs)
    where = BEFORE if first.before_rope else AFTER
    return KVConfig(codec.bits, codec.name, where, codec.symmetric, rotate, tuple(r3))


def reject_model(model: Any, config: KVConfig) -> list[str]:
    """Why this model cannot have it, each with the way out; empty when it can. No forward is run."""
    if reason := config.reject():
        return [f"{reason[0]}: {reason[1]}"]
    kind, text = type(model).__name__, model.config.get_text_config()
    out = "leave quant.kv_cache out (kv_cache: null)"
    if getattr(text, "kv_lora_rank", None):
        return [f"{kind} caches one latent vector for keys and values, not heads; {out}"]
    modules = attention_modules(model)
    own = _unreached(model, modules)
    if not modules or own:
        where = f" ({', '.join(own[:3])})" if own else ""
        return [f"{kind} puts no keys and values into a cache that is known here{where}; {out}"]
    problems = []
    for name, module in modules.items():
        heads, dim = head_sizes(module, text)
        reason = config.codec(dim).reject(heads, dim)
        if reason:
            problems.append(f"{name}: kind {config.kind} {reason}")
        if layer_number(module) in config.r3 and (reason := hadamard_problem(dim)):
            problems.append(f"{name}: R3: {reason}")
        if config.where == BEFORE and not all(hasattr(module, p) for p in PROJECTIONS):
            problems.append(
                f"{name}: {type(module).__name__} has no k_proj and v_proj of its own, whose outputs "
                f"{BEFORE} rounds; set where: {AFTER}"
            )
        if problems:
            break  # the layers are alike
    if unknown := sorted(set(config.r3) - {layer_number(module) for module in modules.values()}):
        problems.append(f"R3: there are no attention layers {unknown}")
    return problems


def _unreached(model: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Classes of the decoder that attend (by their name) and are none of `modules`, nor around or inside
    one."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    known = {id(part) for module in modules.values() for part in module.modules()}
    return sorted(
        {
            type(module).__name__
            for module in decoder.modules()
            if "Attention" in type(module).__name__
            and id(module) not in known
            and not any(id(part) in known for part in module.modules())
        }
    )


def head_sizes(module: nn.Module, config: Any) -> tuple[int, int]:
    """(heads of keys and values, head_dim) of an attention module, as its cache sees them. config: of the
    language model."""
    queries: int = config.num_attention_heads
    heads = queries
    if own := getattr(module, "num_key_value_heads", None):
        heads = own
    elif groups := getattr(module, "num_key_value_groups", None):
        heads = queries // groups
    elif not getattr(config, "new_decoder_architecture", False):  # Falcon repeats its heads before it caches
        heads = 1 if getattr(config, "multi_query", False) else getattr(module, "num_kv_heads", queries)
    dim = getattr(module, "head_dim", None) or head_width(lambda key: getattr(config, key, None))
    assert dim is not None, f"{type(module).__name__}: no width of a head"
    return heads, dim


def cache_line(model: Any, dtype: torch.dtype) -> str | None:
    """What a cache of this model takes, for people; None where keys and values are as they come."""
    config = kv_config_of(model)
    if config is None:
        return None
    return said(config, *bytes_per_token(model, dtype.itemsize), dtype)


def said(config: KVConfig, ours: int, plain: int, dtype: torch.dtype) -> str:
    """That line. ours, plain: as `bytes_per_token`."""
    name = str(dtype).removeprefix("torch.")
    if not config.packed:
        return f"kv cache: {config}: no cache keeps these packed; {plain:,} bytes per token in {name}"
    return f"kv cache: {config}: {ours:,} bytes per token ({plain:,} in {name})"


def bytes_per_token(model: Any, itemsize: int, text: Any = None) -> tuple[int, int]:
    """(bytes of keys and values per token in all layers as our cache stores them, and in a cache of floats of
    `itemsize` bytes). text: configuration of the language model, where `model` is a part of it."""
    ours = plain = 0
    text = model.config.get_text_config() if text is None else text
    for name, seam in seams(model):
        heads, dim = head_sizes(model.get_submodule(name), text)
        dense = 2 * heads * dim * itemsize
        plain += dense
        keys, values = seam.keys, seam.values
        if seam.before_rope or not isinstance(keys, Codec) or not isinstance(values, Codec):
            ours += dense
        else:
            ours += keys.row_bytes(heads, dim) + values.row_bytes(heads, dim)
    return ours, plain

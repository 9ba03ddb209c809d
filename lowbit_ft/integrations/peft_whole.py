"""What trains beside the integers: `modules_to_save` (whole dense modules) and `trainable_token_indices`
(rows of the embedding), as LoraConfig has them and TRL sets them. PEFT's own wrappers do the training; this
file decides what they may be put around.

- Of a packed module no copy could be trained: it is refused, with the way out.
- A head that is tied to the embedding stays tied. Whichever of the pair is named, one matrix is trained and
  both use it; what unties them would be lost at the next save, which writes the pair once.
- Tokens of a matrix that is trained whole are trained with it.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..model.linear import PackedLinear
from ..names import did_you_mean

# What PEFT adds by itself, of which a model has one: heads of classifiers and of question answering.
ADDED_BY_PEFT = frozenset({"classifier", "score", "qa_outputs"})


def settle_whole(model: nn.Module, config: Any, tied: list[str]) -> None:
    """Check `config.modules_to_save` and `trainable_token_indices` against the model, and write them as they
    are used. tied: names of the modules that share the embedding's matrix. ValueError in the user's terms.
    """
    saved, tokens = config.modules_to_save or [], config.trainable_token_indices
    if not saved and not tokens:
        return
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for wanted in saved:
        _dense_ones(wanted, named, "modules_to_save", missing_is_wrong=wanted not in ADDED_BY_PEFT)
    embedding = _name_of_embedding(model, named)
    family = [embedding, *tied] if embedding and tied else []

    if together := [wanted for wanted in saved if any(_is(name, wanted) for name in family)]:
        config.modules_to_save = [embedding, *(name for name in saved if name not in together)]
        config.modules_to_tie = sorted(tied)
    if tokens:
        if not isinstance(tokens, dict):
            tokens = {embedding or "embed_tokens": tokens}
        for wanted in tokens:
            _dense_ones(wanted, named, "trainable_token_indices", missing_is_wrong=True)
        config.trainable_token_indices = _one_row_set(tokens, config.modules_to_save or [], family, named)


def _one_row_set(
    tokens: dict[str, list[int]], saved: list[str], family: list[str], named: Iterable[str]
) -> dict[str, list[int]] | None:
    """The tokens by module: under the embedding's name for whatever is tied to it, and without those of
    modules that are trained whole."""
    rows: dict[str, list[int]] = {}
    for wanted, indices in tokens.items():
        names, name = [n for n in named if _is(n, wanted)], wanted
        if any(n in family for n in names):
            names, name = family[:1], family[0]
        whole = [other for other in saved if any(_is(n, other) for n in names)]
        if whole:
            warnings.warn(
                f"trainable_token_indices: {wanted} is trained whole (modules_to_save: {whole[0]}), and "
                "these tokens with it",
                stacklevel=2,
            )
            continue
        if rows.setdefault(name, indices) != indices:
            raise ValueError(
                f"trainable_token_indices: {', '.join(tokens)} are tied, one matrix, and were given "
                "different tokens; give the same ones, or one of the names"
            )
    return rows or None


def _is(name: str, wanted: str) -> bool:
    """Whether the module of that name is meant: by its name, or by the end of it."""
    return name == wanted or name.endswith("." + wanted)


def _dense_ones(wanted: str, named: dict[str, nn.Module], key: str, missing_is_wrong: bool) -> None:
    """ValueError unless the modules of that name are there and hold no packed layer."""
    found = {name: module for name, module in named.items() if _is(name, wanted)}
    if not found and missing_is_wrong:
        ends = {name.rpartition(".")[2] for name in named}
        raise ValueError(f"{key}: the model has no module {wanted!r}{did_you_mean(wanted, ends)}")
    for name, module in found.items():
        packed = [inner for inner in module.modules() if isinstance(inner, PackedLinear)]
        if packed:
            raise ValueError(
                f"{key}: {name} is packed ({packed[0].grid}): its integers are frozen and train through an "
                f"adapter (target_modules); leave it out of {key}, or quantize with it excluded "
                "(quant.lm_head, quant.embeddings, quant.exclude)"
            )


def _name_of_embedding(model: Any, named: dict[str, nn.Module]) -> str | None:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in named.items() if module is embedding), None)


def whole_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """The state dict's keys of what is trained whole under that name, as PEFT maps a saved file to them."""
    keys: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._get_available_adapters():
            keys |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values()}
    return keys


def resized_keys(model: Any, adapter_name: str) -> set[str]:
    """Keys of the model's own embedding and head, which PEFT saves with an adapter when the vocabulary has
    been resized; without the adapter's name too, as it saves what lies in its wrappers once more.
    """
    keys: set[str] = set()
    for find in ("get_input_embeddings", "get_output_embeddings"):
        matrix = getattr(model, find, lambda: None)()
        for name, module in model.named_modules(remove_duplicate=False):
            if matrix is not None and module is matrix:
                keys |= {f"{name}.{key}" for key in module.state_dict()}
    return keys | {key.replace(f".{adapter_name}.", ".").removesuffix(f".{adapter_name}") for key in keys}

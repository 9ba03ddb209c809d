"""modules_to_save: which dense modules of a model are meant, and why one cannot be trained whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import nn

from ..model.linear import PackedLinear
from ..model.whole import dense_modules
from ..names import did_you_mean, matches


def modules_field() -> Any:
    return Field(
        default=None,
        description="names, globs or regexes of dense modules (lm_head, embed_tokens, norms) that train "
        "whole, in fp32, at train.modules_learning_rate, and ship in model.dtype; null: none",
    )


def modules_of(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The dense modules that the patterns mean, in model order. ValueError with a line for each pattern that
    means none, or one that is packed."""
    wanted, problems = [], []
    for pattern in patterns:
        try:
            wanted += meant(model, pattern)
        except ValueError as error:
            problems.append(f"adapter.modules_to_save: got {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return [name for name in dense_modules(model) if name in wanted]


def meant(model: nn.Module, pattern: str) -> list[str]:
    """The dense modules that a pattern means. ValueError where it means none, or a packed one."""
    dense = dense_modules(model)
    packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    return chosen(pattern, list(dense), packed)


def chosen(pattern: str, dense: Sequence[str], packed: Sequence[str]) -> list[str]:
    """The same of the names of dense modules and of packed layers."""
    found = [name for name in dense if matches(pattern, name)]
    if taken := [name for name in packed if matches(pattern, name)]:
        raise ValueError(
            f"{pattern!r}, and {taken[0]} is packed: its integers train through an adapter (adapter.targets) "
            "and never whole; leave it out, or leave it dense (quant.lm_head: null, quant.embeddings: null, "
            f"quant.exclude: [{taken[0]!r}])"
        )
    if not found:
        ends, all_ends = ([n.rpartition(".")[2] for n in names] for names in (dense, [*dense, *packed]))
        raise ValueError(
            f"{pattern!r}, which is no dense module{did_you_mean(pattern.rpartition('.')[2], all_ends)}; the "
            f"model has {', '.join(list(dict.fromkeys(ends))[:8])}"
        )
    return found

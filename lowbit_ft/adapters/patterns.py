"""rank_pattern and alpha_pattern: another rank or alpha for some layers, with PEFT's meaning.

A key is the end of a layer's name ("q_proj", "layers.0.mlp.up_proj"), a glob, or a regex of that end; of
several that match the first counts. The gain stays alpha / rank of the layer. adapter_config.json has them as
pairs: its keys are sorted, and the order matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import regex
from pydantic import BaseModel, BeforeValidator, Field

from ..names import matches, nearest_layers, regex_matches

Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _from_pairs(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return {str(pattern): found for pattern, found in value}
    return value


Pairs = BeforeValidator(_from_pairs)


class RankPattern(BaseModel):
    """The keys of a method with a rank."""

    rank_pattern: Annotated[dict[str, Rank], Pairs] = Field(
        default={},
        description="another rank for the layers that match: {end of a name, glob or regex: rank}; the first "
        "match counts",
    )

    def ranks(self, rank: int) -> set[int]:
        """All that a layer may have."""
        return {rank, *self.rank_pattern.values()}

    def at(self, layer_name: str) -> dict[str, Any]:
        """What is otherwise in the layer of that name."""
        found = of(self.rank_pattern, layer_name)
        return {} if found is None else {"rank": found}


class AlphaPattern(RankPattern):
    """The keys of a method with a rank and an alpha."""

    alpha_pattern: Annotated[dict[str, Alpha], Pairs] = Field(
        default={}, description="another alpha for the layers that match, as rank_pattern"
    )

    def at(self, layer_name: str) -> dict[str, Any]:
        found = of(self.alpha_pattern, layer_name)
        return super().at(layer_name) | ({} if found is None else {"alpha": found})


PATTERNS = ("rank_pattern", "alpha_pattern")


def of(patterns: Mapping[str, Any], layer_name: str) -> Any:
    """The value of the first pattern that means this layer; None: none does."""
    return next((value for pattern, value in patterns.items() if meant(pattern, layer_name)), None)


def refuse_unmatched(config: BaseModel, trained: Sequence[str], where: str) -> None:
    """ValueError for the first pattern that means no layer that trains: all layers would silently have the
    general rank."""
    for key in PATTERNS:
        for pattern in getattr(config, key, {}):
            if not any(meant(pattern, name) for name in trained):
                raise ValueError(
                    f"{where}{key}: got {pattern!r}, which matches no layer that trains"
                    f"{nearest_layers(pattern, trained)}"
                )


def meant(pattern: str, layer_name: str) -> bool:
    """As `names.matches`, and a regex need not begin where the name does (PEFT's rule)."""
    if matches(pattern, layer_name):
        return True
    try:
        return regex_matches(rf"(.*\.)?({pattern})", layer_name, whole=True)
    except (regex.error, OverflowError, RecursionError):
        return False  # a glob is not a regex

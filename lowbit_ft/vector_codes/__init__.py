"""Codes of vectors: a vector h [..., L] becomes one of a fixed set of points, named by one integer.

Beside grid/, whose contract is about weights: a grid has scales that train and ship, a packed form, adapters
and a merge. A vector code has none of these; it stands inside a model, its rounding is part of the forward,
and what it makes are tokens. So it is a table of its own, and a checkpoint's config.json says which member a
model has (speech/config.py), no recipe.

    base.py     the contract: encode, decode, digits and ids, straight-through gradient, entropy
    binary.py   bsq, lfq: a bit per coordinate        levels.py  fsq: some levels per coordinate

A new code is a subclass of VectorCode and a line in VECTOR_CODES.
"""

from collections.abc import Mapping
from typing import Any

from .base import Entropy, VectorCode
from .binary import BSQ, LFQ
from .levels import FSQ

VECTOR_CODES: dict[str, type[VectorCode]] = {"bsq": BSQ, "lfq": LFQ, "fsq": FSQ}


def vector_code(data: Mapping[str, Any]) -> VectorCode:
    """The inverse of `to_json`. ValueError for an unknown code, key or value."""
    if not isinstance(data, Mapping):
        raise ValueError(f"code: got {data!r}; needs a kind ({', '.join(VECTOR_CODES)}) and its keys")
    values = dict(data)
    name = values.pop("kind", None)
    if not isinstance(name, str) or name not in VECTOR_CODES:
        raise ValueError(f"code: got kind {name!r}; allowed are {', '.join(VECTOR_CODES)}")
    try:
        return VECTOR_CODES[name](**values)
    except TypeError as error:
        raise ValueError(f"code {name}: {error}") from None


__all__ = ["BSQ", "FSQ", "LFQ", "VECTOR_CODES", "Entropy", "VectorCode", "vector_code"]

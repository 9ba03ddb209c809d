"""quant.kv_cache: what the keys and values that attention reads are on.

Acts in every forward, where an attention module would put keys and values into its cache (model/kv_seam.py):
k -> k^, v -> v^, straight-through. A kind is a `Codec`: rows of numbers that share a scale, and the bytes of
such a row. It touches neither weights nor queries, trains nothing and keeps nothing for the backward.

    KINDS      the table: a choice of quant.kv_cache.kind is a file here
    KVConfig   what a recipe asks for, and what travels in a folder's quantization_config
    place      puts it on a model; `reject` says why it cannot be there
    cache.py   the packed layers of transformers' caches
"""

from .block import Block
from .codec import Codec
from .config import KVConfig
from .kinds import KINDS
from .place import (
    bytes_per_token,
    cache_line,
    kv_config_of,
    place_kv_cache,
    put_seams,
    reject_model,
    said,
    set_r3,
)

__all__ = [
    "KINDS",
    "Block",
    "Codec",
    "KVConfig",
    "bytes_per_token",
    "cache_line",
    "kv_config_of",
    "place_kv_cache",
    "put_seams",
    "reject_model",
    "said",
    "set_r3",
]

"""quant.kv_cache: what keys and values are on, and whether a cache keeps them so, in heads of this size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from ...files.tensorfile import CheckpointError
from ...kv_cache import KINDS, KVConfig
from ...model.config import head_width, load_config
from ..layers import local_folder
from ..values import OneOf
from ..yaml import Problem
from .base import Problems, Section


class KVCacheSection(Section):
    """Keys and values as a low-bit cache keeps them, while training, evaluating and generating."""

    bits: Literal[8, 4] = Field(default=8, description="bits of their codes")
    kind: Annotated[str, OneOf(KINDS)] = Field(
        default="token_head",
        description="token_head: a scale per token and head (vLLM: int8_per_token_head, "
        "int4_per_token_head); block: one for 32 numbers (llama.cpp: q8_0, q4_0); token: one for the whole "
        "vector of a token (LLM-QAT; no server)",
    )
    where: Literal["after_rope", "before_rope"] = Field(
        default="after_rope",
        description="after_rope: what is cached, as servers do it; before_rope: the outputs of k_proj and "
        "v_proj, as LLM-QAT trains (kind token; no cache keeps these)",
    )
    symmetric: bool | None = Field(
        default=None,
        description="no zero points; null: as the server of the kind has it (zero points for token_head at "
        "4 bits)",
    )
    rotate: bool | None = Field(
        default=None,
        description="kind token_head: rotate keys and values of every head before they are rounded; null: as "
        "vLLM does it (at 4 bits)",
    )

    def config(self, r3: Iterable[int] = ()) -> KVConfig:
        """Complete. r3: layers whose keys quant.rotation rotates."""
        return KVConfig.of(self.bits, self.kind, self.where, self.symmetric, self.rotate, r3)


def check_kv_cache(r: Any) -> Problems:
    """The options against each other, and against the heads of the model."""
    section = r.quant.kv_cache
    if section is None:
        return
    here = ("quant", "kv_cache")
    config = section.config()
    if refused := config.reject():
        key, why = refused
        yield Problem((*here, key), f"got {getattr(section, key)!r}: {why}")
        return
    folder = local_folder(r.model.path, r.model.revision)
    if folder is None:
        return
    try:
        text = load_config(folder).get_text_config()
    except CheckpointError:  # check_model tells
        return
    if getattr(text, "kv_lora_rank", None):
        yield Problem(
            here,
            f"got a section, but {text.model_type} caches one latent vector for keys and values, not heads; "
            "set kv_cache: null",
        )
        return
    queries = getattr(text, "num_attention_heads", None)
    dim = head_width(lambda key: getattr(text, key, None))
    if dim and (
        reason := config.codec(dim).reject(getattr(text, "num_key_value_heads", None) or queries, dim)
    ):
        yield Problem((*here, "kind"), f"got {section.kind!r}, which {reason}")

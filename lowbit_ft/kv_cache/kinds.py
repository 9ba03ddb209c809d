"""The table of the kinds of quant.kv_cache."""

from .block import Block
from .codec import Codec
from .token import Token
from .token_head import TokenHead

KINDS: dict[str, type[Codec]] = {"token_head": TokenHead, "token": Token, "block": Block}

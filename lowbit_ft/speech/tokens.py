"""Codes as tokens of a language model: their names, and how a model is asked to speak. Written once, here.

    Please speak the following text out loud: the cat ...
    <|start_of_audio|><|audio_17|><|audio_9002|> ... <|end_of_audio|>

The names and the question are those of TaDiCodec's language models (arXiv 2508.16790). Code k is
`<|audio_k|>`; the two that stand around come first, then the codes in their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.jsonfile import read_json
from ..vector_codes import VectorCode, vector_code
from .names import MODEL_TYPE

START, END = "<|start_of_audio|>", "<|end_of_audio|>"
ASKED = "Please speak the following text out loud: "
_TOKEN = re.compile(r"<\|(start_of_audio|end_of_audio|audio_\d+)\|>")
CODEC = "codec"  # of a row: the encoder that made its codes, as speech/files.py names it
AUDIO_CODEC = "audio_codec"  # of a model's config.json: the same of all rows that it was trained on
MOST_TOKENS = 1 << 18  # a row of embedding and head for each


def audio_token(code: int) -> str:
    return f"<|audio_{code}|>"


def audio_tokens(count: int) -> list[str]:
    """All tokens that `count` codes need."""
    return [START, END, *(audio_token(code) for code in range(count))]


def spoken(codes: Iterable[int]) -> str:
    """What a model answers that speaks these codes."""
    return START + "".join(map(audio_token, codes)) + END


def asked(text: str) -> str:
    """What a model is asked that shall speak the text. ValueError for one with a token of audio in it."""
    if (found := _TOKEN.search(text)) is not None:
        raise ValueError(f"the text has {found[0]!r} in it, which the model takes for sound; leave it out")
    return ASKED + text


def row_of(text: str, codes: Sequence[int], plain: bool) -> dict[str, Any]:
    """A row that a language model learns from: of format chat, or (plain) completion."""
    if plain:
        return {"prompt": f"{asked(text)}\n", "completion": spoken(codes)}
    turns = (("user", asked(text)), ("assistant", spoken(codes)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@dataclass(frozen=True)
class AudioTokens:
    """Where a tokenizer has them. codes: the ids of code 0, 1, ..."""

    start: int
    end: int
    codes: tuple[int, ...]


def audio_tokens_of(tokenizer: Any) -> AudioTokens | None:
    """None for a tokenizer without all of them, from code 0 on."""
    known: Mapping[str, int] = tokenizer.get_vocab()
    codes = []
    while (found := known.get(audio_token(len(codes)))) is not None:
        codes.append(found)
    if not codes or START not in known or END not in known:
        return None
    return AudioTokens(known[START], known[END], tuple(codes))


def code_of_codec(folder: Path) -> VectorCode:
    """The vector code that the config.json of a codec names. ValueError where the folder has none."""
    path = folder / "config.json"
    config = read_json(path, dict[str, Any], "give the folder of a speech codec")
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{path}: is of a {config.get('model_type')!r}, and no speech codec ({MODEL_TYPE})")
    return token_code(config.get("code") or {})


def token_code(data: Mapping[str, Any]) -> VectorCode:
    """A vector code of which each point can be a token. ValueError."""
    code = vector_code(data)
    if code.size > MOST_TOKENS:
        raise ValueError(f"{code}: {code.size:,} codes, each a row of a table; allowed are {MOST_TOKENS:,}")
    return code

"""speak: text to the codes of speech, by a language model with audio tokens (speech/tokens.py).

The question, the start token and the codes of a prompt are given. From there on nothing but codes can be
drawn, and the end token once there are enough of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..speech.tokens import AudioTokens, asked
from .generate import encode_prompt

COLDEST = 1e-3  # of temperatures: logits that are divided by less may be no numbers any more


@dataclass(frozen=True)
class Drawing:
    """How codes are drawn; the defaults are the paper's (arXiv 2508.16790). least, most: codes, without those
    that are given; temperature 0: always the likeliest. ValueError for what cannot be."""

    least: int = 12
    most: int = 400
    top_k: int = 50
    top_p: float = 0.98
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= 1 << 14:
            raise ValueError(
                f"--least {self.least}, --most {self.most}: allowed are 1 to {1 << 14} codes, at "
                "least not more than at most"
            )
        if self.top_k < 1:
            raise ValueError(f"--top-k: got {self.top_k}; allowed: 1 (the likeliest) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p: got {self.top_p}; allowed: above 0, to 1 (no bound)")
        if self.temperature and not COLDEST <= self.temperature <= 100:
            raise ValueError(
                f"--temperature: got {self.temperature}; allowed: 0 (the likeliest), or {COLDEST} to 100"
            )


class OnlyCodes:
    """Of logits [B, V]: minus infinity for all but the codes, and, once `least` are there, the end. given:
    tokens before the first code that is drawn."""

    def __init__(self, audio: AudioTokens, given: int, least: int) -> None:
        self.audio, self.given, self.least = audio, given, least

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = [*self.audio.codes]
        if input_ids.shape[1] - self.given >= self.least:
            allowed.append(self.audio.end)
        where = torch.tensor(allowed, device=scores.device)
        return torch.full_like(scores, -torch.inf).index_copy(1, where, scores[:, where])


@torch.no_grad()
def speak(
    model: Any,
    tokenizer: Any,
    audio: AudioTokens,
    text: str,
    how: Drawing,
    *,
    plain: bool = False,
    before: Sequence[int] = (),
) -> list[int]:
    """The codes that the model speaks the text with. before: codes of a prompt, which are given and not in
    the answer. plain: the question as it is, for a model that has learned from plain rows. ValueError for a
    text that does not fit the model's positions."""
    from transformers import GenerationConfig, LogitsProcessorList

    chat = not plain and bool(getattr(tokenizer, "chat_template", None))
    question = encode_prompt(tokenizer, asked(text) if chat else f"{asked(text)}\n", chat)
    given = [*question[0].tolist(), audio.start, *(audio.codes[code] for code in before)]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(given) + how.least >= limit:
        raise ValueError(
            f"--text: with the question and the codes of the prompt it is {len(given)} tokens, and the "
            f"model has {limit} positions: too few for {how.least} codes more; speak it in parts"
        )
    most = how.most if limit is None else min(how.most, limit - len(given))
    where = next(model.parameters()).device
    ids = torch.tensor([given], device=where)
    sample = how.temperature > 0
    drawn = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p} if sample else {}
    theirs = model.generation_config
    # `generate` adds to what it is given all else that the folder says: beams, penalties, what is suppressed
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else [], enabled=sample):
            if sample:
                torch.manual_seed(how.seed)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                do_sample=sample,
                eos_token_id=audio.end,
                pad_token_id=audio.end,
                logits_processor=LogitsProcessorList([OnlyCodes(audio, len(given), how.least)]),
                **drawn,
            )
    finally:
        model.generation_config = theirs
    code_of = {token: code for code, token in enumerate(audio.codes)}
    return [code_of[token] for token in made[0, len(given) :].tolist() if token != audio.end]

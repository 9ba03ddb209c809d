"""What a person sees of an export: the same answers to the same prompts, and the same special tokens. For
verify.

A greedy answer of the packed model is fed to the exported one in a single pass. At every token that one
either chooses the same, or its favourite is ahead by no more than the tolerance of the logits: then the two
are a tie for it, and the comparison goes on behind the tie, where two separate generations would have parted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluate.generate import encode_prompt
from ..model.chat_template import Template
from ..model.config import CONFIG, GENERATION, stop_ids
from .base import Exporter

PROMPTS = (
    "Write a function that adds two numbers.",
    "What is the capital of France?",
    "Tell me a short story about the sea.",
)
LENGTH = 16  # tokens per answer
Logits = Callable[[Tensor], Tensor]  # ids [1, L] -> fp32 [1, L, V]


@dataclass(frozen=True)
class Answer:
    """prompt [1, P] and what a model said, [1, P + T]."""

    prompt: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Answers:
    """tokens of the answers, those the reader chose too, and how far its favourite was ahead at worst, as a
    share of `allowed`.
    """

    prompts: int
    tokens: int
    same: int
    worst: float

    @classmethod
    def compare(cls, logits: Logits, answers: list[Answer], tolerance: float) -> "Answers":
        """tolerance: of logits, as a share of the largest."""
        tokens = same = 0
        worst = 0.0
        for answer in answers:
            first = answer.prompt.shape[1]
            at = logits(answer.ids)[0, first - 1 : -1]  # position i predicts token i + 1
            chosen = at.gather(-1, answer.ids[0, first:, None])[:, 0]
            behind = at.amax(-1) - chosen
            tokens, same = tokens + len(chosen), same + int((behind == 0).sum())
            # Both logits may be off by the tolerance. NaN must fail, and max() would drop it.
            share = (behind / (2 * tolerance * at.abs().max())).max()
            worst = max(worst, float("inf") if bool(share.isnan()) else float(share))
        return cls(len(answers), tokens, same, worst)

    @property
    def ok(self) -> bool:
        return self.worst <= 1.0

    def __str__(self) -> str:
        text = f"{self.same} of {self.tokens} tokens of {self.prompts} greedy answers chosen alike"
        if self.same < self.tokens:
            text += (
                f"; the others {'are ties within the tolerance' if self.ok else 'differ'} "
                f"({self.worst:.2g} of it)"
            )
        return text


def own_tokenizer(exporter: Exporter, folder: str | Path, chat_template: Template | None) -> Any:
    """The model's tokenizer, from the folder that has it; None without one. chat_template: what it was
    trained to write chats with, where that is not its own."""
    tokenizer = Exporter.tokenizer(exporter, Path(folder))
    if tokenizer is not None and chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def prompt_ids(tokenizer: Any) -> list[Tensor]:
    """The prompts as ids [1, P], in the chat template where there is one; none without a tokenizer."""
    if tokenizer is None:
        return []
    return [encode_prompt(tokenizer, prompt, bool(tokenizer.chat_template)) for prompt in PROMPTS]


def answer(logits: Logits, prompt: Tensor, stops: list[int]) -> Answer:
    """Greedy, up to a stop token (which belongs to the answer) or LENGTH tokens."""
    ids = prompt
    for _ in range(LENGTH):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) in stops:
            break
    return Answer(prompt, ids)


def compare_tokens(
    exporter: Exporter, folder: Path, source: str | Path, own: Any, loaded: Any
) -> list[str] | None:
    """What the format's users get in another way than the model had it (own: its tokenizer, of the folder
    `source`; loaded: the model as its reader makes it); None when the model has no tokenizer.
    """
    source = Path(source)
    if own is None:
        return None
    theirs, problems = exporter.tokenizer(folder), []
    if theirs is None:
        return ["the tokenizer is missing"]
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(own, name), getattr(theirs, name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template")
    }
    # A model that names no stop token stops at its tokenizer's.
    stops = set(Exporter.stops(exporter, source)) | ({own.eos_token_id} - {None})
    pairs["stop tokens"] = (
        sorted(stops),
        sorted({*exporter.stops(folder)} | ({theirs.eos_token_id} - {None})),
    )
    if (named := _named_stops(source)) and (found := _stops_at(loaded)) is not None:
        pairs["stop tokens of the loaded model"] = (sorted(named), sorted(found))
    # Text and special tokens apart: whether a SentencePiece tokenizer puts a space behind a special token is
    # a choice of the library (llama.cpp and older Llama tokenizers do, transformers' reader of gguf does
    # not), not of the file.
    for prompt in PROMPTS:
        pairs[f"ids of {prompt!r}"] = tuple(
            t(prompt, add_special_tokens=False)["input_ids"] for t in (own, theirs)
        )
    for token, own_id in own.get_added_vocab().items():
        pairs[f"id of {token!r}"] = (own_id, theirs.convert_tokens_to_ids(token))
    for name, (mine, other) in pairs.items():
        if mine != other:
            problems.append(f"{name}: {_short(other)}, and the model has {_short(mine)}")
    return problems


def _named_stops(source: Path) -> set[int]:
    """The stop tokens that a model read from this folder has; none where its files name none."""
    ids = stop_ids(source / GENERATION)
    return set(stop_ids(source / CONFIG) or [] if ids is None else ids)


def _stops_at(loaded: Any) -> set[int] | None:
    """The tokens at which `generate` of this model ends; None for one that writes no text."""
    if (stops := getattr(loaded, "stops", None)) is not None:  # a reader that is not torch
        return set(stops)
    if (settings := getattr(loaded, "generation_config", None)) is None:
        return None
    ids = settings.eos_token_id
    return set(ids if isinstance(ids, list) else [] if ids is None else [ids])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

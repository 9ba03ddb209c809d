"""task: causal_lm. A language model: every position of a window predicts the token behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch

from ..data.batches import Batches, keeps_segments_apart
from ..data.chosen import calibration_windows, first_windows
from ..data.examples import load_examples
from ..data.windows import Examples
from ..evaluate.perplexity import EvalRow, Reference, evaluate
from ..model.attention import why_not
from ..model.tokenizer import pad_id
from ..model.walk import Batch
from ..train.goal import NEXT_TOKENS, Goal
from .base import Dense, Feed, Measure, Task

LONG = 8192  # tokens of a window from which on a mask of length x length is worth a word (67 MB)


class CausalLM(Task):
    language: ClassVar[bool] = True
    pipeline: ClassVar[str] = "text-generation"
    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft: ClassVar[str | None] = "CAUSAL_LM"

    kind: Literal["causal_lm"] = "causal_lm"

    @property
    def goal(self) -> Goal:
        return NEXT_TOKENS

    def unfit(self, config: Mapping[str, Any]) -> str | None:
        """An encoder sees the token that it is to predict: its loss falls to nothing, and it writes nothing.
        transformers builds one as a language model with no more than a line in the log."""
        from transformers.models.auto import modeling_auto as auto  # slow, and a recipe may name no model

        name = str(config.get("model_type"))  # of a file, whatever it holds
        both = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        decodes = any(config.get(key) for key in ("is_encoder_decoder", "is_decoder", "causal"))
        if decodes or not all(name in names for names in both):
            return None
        return (
            f"its config.json says {name!r} and not is_decoder: an encoder, which sees the tokens that it "
            "would learn to predict; set task: masked_lm or another of docs/tasks.md, or is_decoder: true "
            "there if it was trained as a decoder"
        )

    def examples(
        self, source: Any, section: Any, tokenizer: Any, *, seed: int = 0, rows: int | None = None
    ) -> Examples:
        return load_examples(source, section, tokenizer, seed=seed, rows=rows)

    def batches(
        self, feed: Feed, model: Any, examples: Any, size: int, *, shuffle: bool, taught: bool = False
    ) -> Batches:
        """With an explicit mask where the model does not keep packed segments apart by itself."""
        r = feed.r
        apart = not (reason := why_not(model)) or keeps_segments_apart(model, size)
        length = r.data.sequence_len
        if shuffle and reason and length >= LONG and r.model.attention in ("sdpa", "eager"):
            feed.say(f"note: attention holds masks of {length} x {length}: {reason}")
        return Batches(
            examples,
            size,
            pad_id(feed.tokenizer),
            r.train.seed,
            rank=feed.rank,
            world=feed.world,
            shuffle=shuffle,
            mask_dtype=None if apart else getattr(torch, r.model.dtype),
            taught=taught,
        )

    def calibration(
        self,
        source: Any,
        section: Any,
        tokenizer: Any,
        *,
        rows: int | None,
        seed: int,
        samples: int,
        sequence_len: int,
        size: int,
    ) -> list[Batch]:
        return calibration_windows(
            source,
            section,
            tokenizer,
            rows=rows,
            seed=seed,
            samples=samples,
            sequence_len=sequence_len,
            size=size,
        )

    def measure(self, feed: Feed, source: Any, model: Any, dense: Dense, rows: int | None) -> Measure:
        """The first eval.windows of eval.window tokens."""
        r = feed.r
        section = r.data.model_copy(update={"sequence_len": r.eval.window, "streaming": True})
        chosen = first_windows(source, section, feed.tokenizer, rows, r.eval.windows)
        size = max(1, min(len(chosen), 4096 // r.eval.window))
        found = self.batches(feed.alone, model, chosen, size, shuffle=False)
        return Perplexity(list(found.one_epoch()), r, model, dense)


class Perplexity(Measure):
    """Loss, perplexity, and with eval.kl the divergence from the full-precision model."""

    def __init__(self, data: list[Batch], r: Any, model: Any, dense: Dense) -> None:
        self.data, self.dense, self.kl = data, dense, r.eval.kl
        self.count, self.unit = sum(len(b["labels"]) for b in data), f"windows of {r.eval.window:,} tokens"
        self.segments = not why_not(model) if self.kl else False
        self.against: Reference | None = None

    def reference(self) -> Iterator[EvalRow]:
        if not self.kl:
            return
        self.against = Reference(
            self.dense.checkpoint,
            self.data,
            attention=self.dense.attention,
            device=self.dense.device,
            dtype=self.dense.dtype,
            segments=self.segments,
        )
        yield self.against.row()

    def row(self, model: Any, stage: str) -> EvalRow:
        return evaluate(model, self.data, stage, self.against)

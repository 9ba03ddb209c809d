"""From a decoder's hidden states to logits, some positions at a time: the largest tensor of a model, never
whole.

    hidden states [T, H] -> those of some positions [r, H] -> their logits [r, V]

What a model does there (bias, packed or adapted head, soft-capping, scaling) is done by its own forward,
which is called with the decoder's output already there. A small trial shows whether that gives the model's
logits; where it does not, there is a reason and no head. Users: the training loss, the evaluation, a
teacher's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Logits at a time: 256 rows of a 128k vocabulary, 67 MB in bf16. Fewer rows would read the head more often
# than a GPU can hide behind the products.
LOGITS_AT_A_TIME = 1 << 25
SMALL_VOCABULARY = 512  # below it a chunk would be 65,536 tokens or more: batches have fewer


class Head:
    """What a model does between its decoder's hidden states and its logits.

    base: the decoder; plain: the model's forward; rows: tokens per chunk.
    """

    def __init__(self, base: nn.Module, plain: Callable[..., Any], vocabulary: int) -> None:
        self.base, self.plain = base, plain
        self.rows = max(1, LOGITS_AT_A_TIME // vocabulary)

    def logits(self, hidden: Tensor, kind: Callable[..., Any]) -> Tensor:
        """hidden [T, H] -> [T, V]; kind: the class of the decoder's output."""
        # only their shape matters
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        with _answering(self.base, kind(last_hidden_state=hidden[None])):
            return self.plain(input_ids=ids, use_cache=False).logits[0]

    @torch.no_grad()
    def differs(self, device: torch.device) -> str:
        """Why these are not the logits that the model makes of a few tokens; "" when they are."""
        ids = torch.arange(8, device=device)[None]
        inputs = {"input_ids": ids, "position_ids": ids, "use_cache": False}
        try:
            want = self.plain(**inputs).logits[0]
            output = self.base(**inputs)
            got = torch.cat(
                [self.logits(part, type(output)) for part in output.last_hidden_state[0].split(5)]
            )
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"its logits cannot be made of hidden states ({error})"
        # The same numbers but for the order of sums, and bf16 keeps 8 bits of them.
        close = got.shape == want.shape and bool((got - want).abs().max() <= 2e-2 * want.abs().max())
        return "" if close else "its logits are not a function of its hidden states alone"


class Answering:
    """A model that is asked for the logits of positions of a batch. head: None where its logits are made
    whole, and `reason` says why. whole: it is no language model, and what it is called with is its batch."""

    def __init__(
        self, plain: Callable[..., Any], head: Head | None, reason: str = "", whole: bool = False
    ) -> None:
        self.plain, self.head, self.reason, self.whole = plain, head, reason, whole

    @torch.no_grad()
    def read(self, inputs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """Runs the model (in the mode it is in) on inputs with input_ids [B, L]; returns f(positions [r] of
        the B L) -> their logits [r, V], which runs the head under the caller's modes."""
        if self.head is None:
            logits = self.plain(**inputs, use_cache=False).logits
            whole = logits.reshape(-1, logits.shape[-1])
            return lambda positions: whole.index_select(0, positions)
        head, output = self.head, self.head.base(**inputs, use_cache=False)
        hidden, kind = output.last_hidden_state.reshape(-1, output.last_hidden_state.shape[-1]), type(output)
        return lambda positions: head.logits(hidden.index_select(0, positions), kind)


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; behind it each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside, calling `module` computes nothing and returns `output`."""
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def find_head(model: nn.Module, kind: type[Head] = Head) -> tuple[Any, str]:
    """The head of a model whose decoder is a module of its own, tried on a few tokens, as a `kind`; otherwise
    None and why not."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None, f"{type(model).__name__} is no model of transformers"
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    if vocabulary < SMALL_VOCABULARY:
        return None, "its vocabulary is small"
    reason = f"the decoder of {type(model).__name__} is no module of its own"
    with resting(model):
        for base in {model.base_model: None, model.get_decoder(): None}:  # OPT's forward calls the second
            if base is not model and isinstance(base, nn.Module):
                head = kind(base, model.forward, vocabulary)
                reason = head.differs(model.device)
                if not reason:
                    return head, ""
    return None, f"{type(model).__name__}: {reason}"

"""The model around its decoder layers: it runs with stubs in their place, to see what they are called with
and what is held beside them, and to run norm, head and loss by themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.heads import LOGITS_AT_A_TIME
from ..model.walk import decoder_layers
from ..tasks import Task
from ..train.losses import ChunkedHead, next_token_loss
from .costs import Setting
from .counting import Counter
from .fake import autocast, targets_without_data, tensors_in


class Around:
    """The model around its decoder layers, and what it calls them with."""

    def __init__(self, rest: Any, count: int, task: Task) -> None:
        self.model, self.count, self.task = rest, count, task
        self.stubs = decoder_layers(rest)[1]
        self.per_token = 1  # positions of the layers: a codec has frames beside its text
        self.fresh = False  # layers answer with a tensor of their own, as real ones do
        self.beside: tuple[None, ...] | None = (
            None  # what a layer returns beside hidden states; None: they are not in a tuple
        )

    def forward(
        self,
        windows: int,
        length: int,
        loss: bool,
        last: Callable[[Any], Any],
        see: Callable[[int, Any, Any], None],
    ) -> Any:
        """The model's forward with its layers passing through; `see` is told their arguments, `last` gives
        the last one's answer.
        """

        def stub(hidden: Tensor, *args: Any, number: int, **kwargs: Any) -> Any:
            see(number, (hidden, *args), kwargs)
            out = (
                last(hidden)
                if number == self.count - 1
                else torch.empty_like(hidden)
                if self.fresh
                else hidden
            )
            return self.answer(out)

        language = self.task.language
        # looking for it runs the layers too
        head = self.head(length * windows) if loss and language else None
        for number, layer in enumerate(self.stubs):
            layer.forward = functools.partial(stub, number=number)
        if not language:
            return self.task.rehearsed(self.model if loss else self.model.base_model, windows, length, loss)
        ids = torch.empty((windows, length), dtype=torch.int64)
        inputs = {"input_ids": ids, "position_ids": torch.empty((windows, length), dtype=torch.int64)}
        if not loss:
            base = self.model.base_model
            return (self.model.get_decoder() if base is self.model else base)(**inputs, use_cache=False)
        labels = torch.empty((windows, length), dtype=torch.int64)
        if head is not None:
            return head.loss(head.base(**inputs, use_cache=False), targets_without_data(windows, length))
        return next_token_loss(self.model(**inputs, use_cache=False).logits, labels)

    def answer(self, hidden: Tensor) -> Any:
        """Hidden states as a layer returns them."""
        return hidden if self.beside is None else (hidden, *self.beside)

    @functools.cached_property
    def decoder(self) -> Any:
        """The module whose output the model makes its logits of: as in train/losses.py, the base model, or
        what get_decoder gives.
        """
        for base in (self.model.base_model, self.model.get_decoder()):
            if base is not self.model and self._makes_logits_of(base):
                return base
        raise ValueError("its logits are not made of the output of a module of its own")

    def _makes_logits_of(self, base: Any) -> bool:
        ran: list[int] = []
        for layer in self.stubs:
            layer.forward = lambda hidden, *_, **__: ran.append(1) or self.answer(hidden)
        ids = torch.empty((1, 8), dtype=torch.int64)
        with torch.no_grad():
            output = base(input_ids=ids, use_cache=False)
            ran.clear()
            head = ChunkedHead(base, self.model.forward, 1)
            head.logits(output.last_hidden_state[0], type(output))
        return not ran

    @property
    def chunk(self) -> int:
        """Tokens per chunk of the loss."""
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 0)
        cut = self.task.language and vocabulary >= 512
        return max(1, LOGITS_AT_A_TIME // max(1, vocabulary)) if cut else 1 << 62

    def head(self, tokens: int) -> ChunkedHead | None:
        if tokens <= self.chunk:
            return None
        return ChunkedHead(self.decoder, self.model.forward, self.model.config.get_text_config().vocab_size)

    def record(self, s: Setting, first: nn.Module, rules: Any) -> tuple[dict[int, Any], int, int, int]:
        """What each layer is called with, the bytes of that, of a layer's input, and of what else is held
        while the layers run.
        """
        calls: dict[int, Any] = {}
        hidden = [torch.empty(())]

        def probe(number: int, args: Any, kwargs: Any) -> None:
            if number == 0 and not calls:
                with torch.no_grad():
                    out = first(*args, **kwargs)
                self.beside = (None,) * (len(out) - 1) if isinstance(out, tuple) else None
                calls[0] = None

        self.forward(1, 8, False, lambda h: h, probe)
        calls.clear()
        count, live = Counter(rules), 0

        def see(number: int, args: Any, kwargs: Any) -> None:
            nonlocal live
            if number == self.count - 1:
                hidden[0], live = args[0], count.live
            calls[number] = (args[1:], _masked(kwargs, s))

        self.fresh = True
        with torch.no_grad(), count, autocast(s):
            self.forward(s.windows, s.length, False, lambda h: h, see)
        self.fresh = False
        x = hidden[0]
        kept = {
            id(t.untyped_storage()): t.untyped_storage().nbytes()
            for _, kw in calls.values()
            for t in tensors_in(kw)
        }
        self.shape, self.dtype = tuple(x.shape), x.dtype
        self.per_token = x.shape[1] // s.length if x.dim() == 3 and x.shape[1] % s.length == 0 else 1
        size, context = x.numel() * x.element_size(), sum(kept.values())
        return calls, context, size, max(0, live - context - size)


def _masked(kwargs: dict[str, Any], s: Setting) -> dict[str, Any]:
    """The keyword arguments of a layer without the mask over pairs of tokens that models make of position ids
    they cannot read, where this step has none."""
    found = kwargs.get("attention_mask")
    if not s.masked and s.attention != "eager" and isinstance(found, Tensor) and found.dim() == 4:
        return {**kwargs, "attention_mask": None}
    return kwargs

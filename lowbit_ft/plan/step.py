"""What one training step holds at its peak: each kind of decoder layer, and what lies around them, run on
tensors without data.

A fake tensor has a shape, a dtype and a storage of the right size, but no memory; autograd, checkpointing and
every operator of the model run on it as they do for real, and counting.py counts. So nothing is assumed about
an architecture. One layer of each kind is run forward and backward by itself, and the step is put together:

    forward through layer i     context + sum of what layers before i keep + peak of i
    loss                        context + what all layers keep + peak of norm, head and loss
    backward through layer i    context + what layers up to i keep + gradients there are + peak of i

context: the batch, rotary tables, attention mask. With several micro-batches per step the last one has all
gradients beside it. A long sequence's loss is measured on two and on four chunks of logits and continued in a
straight line, which it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lowbit_kernels.scratch import scratch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ..model.experts import Experts
from ..model.mlp_chunks import cuttable, run_in_chunks
from ..model.walk import decoder_layers
from ..train.losses import LOGITS_AT_A_TIME, ChunkedHead, Targets, next_token_loss
from .counting import Counter, reference_workspace
from .model import Skeleton

# decoder layers from which the first one, whose input wants no gradient, is taken to be like the others
_MANY = 16


@dataclass(frozen=True)
class Setting:
    """What a step's memory depends on beside the model. arch: of the GPU (10 x capability), 0: a CPU."""

    windows: int
    length: int
    dtype: str
    mixed: str
    checkpointing: bool
    accumulate: bool
    masked: bool
    attention: str
    arch: int
    mlp_chunk: int | None = None


@dataclass(frozen=True)
class Cost:
    """Bytes of a stretch of the step. forward: peak, its input included; kept: from forward to backward;
    backward: peak, with what was kept and the incoming gradient; gradients: what it leaves in .grad;
    evaluation: peak of the forward where no gradient is wanted; forward_ops and backward_ops: the part of the
    two peaks that is inside packed ops."""

    forward: int
    kept: int
    backward: int
    gradients: int
    evaluation: int
    forward_ops: int = 0
    backward_ops: int = 0


@dataclass(frozen=True)
class Step:
    """context, the input of a layer, the costs by layer and of the tail (norm, head, loss); frame: what the
    model's own forward holds beside the context while its layers run (embeddings that a variable keeps)."""

    context: int
    hidden: int
    frame: int
    layers: tuple[Cost, ...]
    tail: Cost
    notes: tuple[str, ...] = ()


class _Begin(torch.autograd.Function):
    """A tensor that needs a gradient and lets it go."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:  # pyright: ignore
        return root.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return _.new_empty(()).float(), None, None


class _End(torch.autograd.Function):
    """A scalar whose backward makes the gradient of the tensor, which nobody else holds then."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyright: ignore
        ctx.shape, ctx.dtype = value.shape, value.dtype
        return value.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return grad.new_empty(ctx.shape, dtype=ctx.dtype)


def step_costs(made: Skeleton, s: Setting, tails: dict[Any, Cost] | None = None) -> Step:
    """Run the step of a skeleton on fake tensors. Whatever the model raises there is raised here (the caller
    knows an estimate).

    tails: keeps what does not depend on the length of the sequence, for the next step of a model with the
    same head.
    """
    rules = _rules(s.arch)
    rest, modules = copy.deepcopy(made.model), [copy.deepcopy(block.module) for block in made.blocks]
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        rest, blocks = _fake(rest), [_fake(module) for module in modules]
        kind = {index: number for number, block in enumerate(made.blocks) for index in block.indices}
        shape_of = _Layers(rest, made.layers)
        calls, context, hidden, frame = shape_of.record(s, blocks[kind[0]], rules)
        costs: dict[int, Cost] = {}
        known: dict[str, int] = {}
        for number, (block, module) in reversed(list(enumerate(zip(made.blocks, blocks, strict=True)))):
            if (
                made.layers >= _MANY and block.like in known
            ):  # the first of many: what it does not keep is lost in the sum
                costs[number] = costs[known[block.like]]
                continue
            known[block.like] = number
            args, kwargs = calls[block.indices[0]]
            costs[number] = _layer(module, args, kwargs, s, rules, hidden, first=block.indices[0] == 0)
        tail = _tail(shape_of, s, rules, {} if tails is None else tails)
    ordered = tuple(costs[kind[i]] for i in range(made.layers))
    even = (
        "tokens are taken to spread evenly over the experts"
        if any(isinstance(m, Experts) for b in blocks for m in b.modules())
        else ""
    )
    return Step(context, hidden, frame, ordered, tail, (even,) if even else ())


@functools.cache
def _rules(arch: int) -> Callable[[str, tuple[Any, ...]], int]:
    """What packed ops hold inside: the Triton launchers' rules for a GPU, the reference implementation on a
    CPU.
    """
    return reference_workspace((lambda name, args: scratch(name, args, arch)) if arch else None)


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(level)


def _fake(module: Any) -> Any:
    """All tensors of a module as fake tensors on the CPU, in place; tied ones stay one."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        for name, p in list(owner._parameters.items()):
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(
                        torch.empty(p.shape, dtype=p.dtype, device="cpu"), requires_grad=p.requires_grad
                    )
                owner._parameters[name] = made[id(p)]
        for name, b in list(owner._buffers.items()):
            if b is not None:
                owner._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")
    for owner in module.modules():
        if isinstance(owner, Experts):
            owner.counts = functools.partial(_evenly, owner.num_experts)  # pyright: ignore[reportAttributeAccessIssue]
    return module


def _evenly(experts: int, chosen: Tensor) -> list[int]:
    each, more = divmod(chosen.numel(), experts)
    return [each + (i < more) for i in range(experts)]


def _autocast(s: Setting) -> Any:
    return torch.autocast(
        "cpu", dtype=torch.bfloat16 if s.mixed == "bf16" else torch.float16, enabled=s.mixed != "no"
    )


class _Layers:
    """The model around its decoder layers, and what it calls them with."""

    def __init__(self, rest: Any, count: int) -> None:
        self.model, self.count = rest, count
        self.stubs = decoder_layers(rest)[1]
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

        head = self.head(length * windows) if loss else None  # looking for it runs the layers too
        for number, layer in enumerate(self.stubs):
            layer.forward = functools.partial(stub, number=number)
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
        return max(1, LOGITS_AT_A_TIME // max(1, vocabulary)) if vocabulary >= 512 else 1 << 62

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
        with torch.no_grad(), count, _autocast(s):
            self.forward(s.windows, s.length, False, lambda h: h, see)
        self.fresh = False
        x = hidden[0]
        kept = {
            id(t.untyped_storage()): t.untyped_storage().nbytes()
            for _, kw in calls.values()
            for t in _tensors(kw)
        }
        self.shape, self.dtype = tuple(x.shape), x.dtype
        size, context = x.numel() * x.element_size(), sum(kept.values())
        return calls, context, size, max(0, live - context - size)


def targets_without_data(windows: int, length: int) -> Targets:
    """Every position a target, as fake tensors: the most that a batch can have."""
    targets = Targets.__new__(Targets)
    targets.where = [i for i in range(windows * length) if (i + 1) % length]
    targets.positions, targets.tokens = (torch.empty(len(targets.where), dtype=torch.int64) for _ in range(2))
    targets.labels = torch.empty((windows, length), dtype=torch.int64)
    return targets


def _tensors(values: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _masked(kwargs: dict[str, Any], s: Setting) -> dict[str, Any]:
    """The keyword arguments of a layer without the mask over pairs of tokens that models make of position ids
    they cannot read, where this step has none."""
    found = kwargs.get("attention_mask")
    if not s.masked and s.attention != "eager" and isinstance(found, Tensor) and found.dim() == 4:
        return {**kwargs, "attention_mask": None}
    return kwargs


def _layer(
    module: nn.Module, args: Any, kwargs: Any, s: Setting, rules: Any, hidden: int, first: bool
) -> Cost:
    """One layer forward and backward. The first one's input comes from the embedding and wants no
    gradient.
    """
    module.train()
    if s.mlp_chunk is not None:
        run_in_chunks([part for part in cuttable(module) if "forward" not in vars(part)], s.mlp_chunk)
    root = torch.empty((), requires_grad=True)
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p) if s.accumulate else None
    x_shape, x_dtype = _input(args, kwargs, s, hidden)
    with torch.no_grad(), Counter(rules) as evaluated, _autocast(s):
        module.forward(torch.empty(x_shape, dtype=x_dtype), *args, **kwargs)
    with ExitStack() as stack:
        count = stack.enter_context(Counter(rules))
        stack.enter_context(_autocast(s))
        with count.phase("forward"):
            x = torch.empty(x_shape, dtype=x_dtype) if first else _Begin.apply(root, x_shape, x_dtype)
            call = functools.partial(module.forward, **kwargs)
            out: Any = checkpoint(call, x, *args, use_reentrant=False) if s.checkpointing else call(x, *args)
            out = out[0] if isinstance(out, tuple) else out
        size = out.numel() * out.element_size()
        needs = out.requires_grad
        end = _End.apply(out) if needs else None
        del x, out, call
        kept = count.live
        with torch.autocast("cpu", enabled=False), count.phase("backward"):
            if end is not None:
                end.backward()  # pyright: ignore[reportAttributeAccessIssue]
            del end
        gradients = count.live
    del size
    own = sum(p.numel() * p.element_size() for p in trained) if s.accumulate else 0
    return Cost(
        count.peaks["forward"],
        kept,
        max(kept, count.peaks["backward"]),
        own or gradients,
        evaluated.peak,
        count.inside.get("forward", 0),
        count.inside.get("backward", 0),
    )


def _input(args: Any, kwargs: Any, s: Setting, hidden: int) -> tuple[tuple[int, ...], torch.dtype]:
    dtype = getattr(torch, s.dtype)
    tokens = s.windows * s.length
    width = hidden // (tokens * dtype.itemsize)
    return (s.windows, s.length, width), dtype


def _tail(around: _Layers, s: Setting, rules: Any, known: dict[Any, Cost]) -> Cost:
    """Last norm, head and loss; of a long sequence, by a straight line through two short ones."""
    tokens = s.windows * s.length
    if tokens <= 4 * around.chunk:
        return _tail_of(around, s, rules, s.windows, s.length)
    near, far = 2 * around.chunk, 4 * around.chunk
    key = (s.dtype, s.mixed, s.accumulate, s.arch, s.mlp_chunk)
    for length in (near, far):
        if (key, length) not in known:
            known[key, length] = _tail_of(around, s, rules, 1, length)
    a, b = known[key, near], known[key, far]

    def at(name: str) -> int:
        low, high = getattr(a, name), getattr(b, name)
        return round(low + (high - low) * (tokens - near) / (far - near))

    return Cost(
        at("forward"),
        at("kept"),
        at("backward"),
        at("gradients"),
        at("evaluation"),
        max(a.forward_ops, b.forward_ops),
        max(a.backward_ops, b.backward_ops),
    )


def _tail_of(around: _Layers, s: Setting, rules: Any, windows: int, length: int) -> Cost:
    root = torch.empty((), requires_grad=True)
    trained = [p for p in around.model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p) if s.accumulate else None
    around.model.train()
    if s.mlp_chunk is not None:
        run_in_chunks(
            [part for part in cuttable(around.model.get_decoder()) if "forward" not in vars(part)],
            s.mlp_chunk,
        )
    before, shape = 0, (windows, length, around.shape[-1])

    def last(embedded: Tensor) -> Any:
        nonlocal before
        before = (
            count.live - embedded.numel() * embedded.element_size()
        )  # the context and the frame, which ends before the loss
        stack.enter_context(count.phase("forward"))
        return (
            _Begin.apply(root, shape, around.dtype)
            if torch.is_grad_enabled()
            else torch.empty(shape, dtype=around.dtype)
        )

    with torch.no_grad(), ExitStack() as stack, _autocast(s):
        count = stack.enter_context(Counter(rules))
        around.forward(windows, length, True, last, lambda *_: None)
        evaluation = count.peaks["forward"] - before
    with ExitStack() as stack:
        count = stack.enter_context(Counter(rules))
        with _autocast(s):
            loss = around.forward(windows, length, True, last, lambda *_: None)
        kept = count.live - before
        stack.enter_context(count.phase("backward"))
        loss.backward()
        del loss
        gradients = sum(p.numel() * p.element_size() for p in trained)
    return Cost(
        count.peaks["forward"] - before,
        kept,
        max(kept, count.peaks["backward"] - before),
        gradients,
        evaluation,
        count.inside.get("forward", 0),
        count.inside.get("backward", 0),
    )

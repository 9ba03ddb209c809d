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
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ..model.experts import Experts
from ..model.meta import uncached
from ..model.mlp_chunks import cuttable, run_in_chunks
from ..tasks import Task
from ..tasks.states import states_of
from .around import Around
from .costs import Cost, Setting, Step
from .counting import Counter
from .fake import Begin, End, autocast, fake, quiet, rules_of
from .model import Skeleton

WHOLE = "it is no chain of layers: what a step holds is counted of the whole network at once (layer 0)"
# decoder layers from which the first one, whose input wants no gradient, is taken to be like the others
_MANY = 16


def step_costs(made: Skeleton, s: Setting, tails: dict[Any, Cost] | None = None) -> Step:
    """Run the step of a skeleton on fake tensors. Whatever the model raises there is raised here (the caller
    knows an estimate).

    tails: keeps what does not depend on the length of the sequence, for the next step of a model with the
    same head.
    """
    rules = rules_of(s.arch)
    rest, modules = copy.deepcopy(made.model), [copy.deepcopy(block.module) for block in made.blocks]
    with FakeTensorMode(allow_non_fake_inputs=True), quiet(), uncached():
        rest, blocks = fake(rest), [fake(module) for module in modules]
        if not blocks:
            whole = _whole(rest, made.task, s, rules)
            states = _states(rest, made.task, s) if s.states else 0
            return Step(0, 0, 0, (whole,), Cost(0, 0, 0, 0, 0), (WHOLE,), states)
        kind = {index: number for number, block in enumerate(made.blocks) for index in block.indices}
        shape_of = Around(rest, made.layers, made.task)
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
            first = block.indices[0] == 0 and not made.table_bytes
            x_shape = _input(s, hidden, shape_of.per_token)
            costs[number] = _layer(module, args, kwargs, s, rules, x_shape, first)
        tail = _tail(shape_of, s, rules, {} if tails is None else tails)
    ordered = tuple(costs[kind[i]] for i in range(made.layers))
    even = (
        "tokens are taken to spread evenly over the experts"
        if any(isinstance(m, Experts) for b in blocks for m in b.modules())
        else ""
    )
    states = (made.layers + 1) * hidden // getattr(torch, s.dtype).itemsize if s.states else 0
    return Step(context, hidden, frame, ordered, tail, (even,) if even else (), states)


def _layer(
    module: nn.Module, args: Any, kwargs: Any, s: Setting, rules: Any, x_shape: tuple[int, ...], first: bool
) -> Cost:
    """One layer forward and backward. The first one's input comes from the embedding and wants no
    gradient, unless that trains.
    """
    module.train()
    if s.mlp_chunk is not None:
        run_in_chunks([part for part in cuttable(module) if "forward" not in vars(part)], s.mlp_chunk)
    root = torch.empty((), requires_grad=True)
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p) if s.accumulate else None
    x_dtype = getattr(torch, s.dtype)
    with torch.no_grad(), Counter(rules) as evaluated, autocast(s):
        module.forward(torch.empty(x_shape, dtype=x_dtype), *args, **kwargs)
    with ExitStack() as stack:
        count = stack.enter_context(Counter(rules))
        stack.enter_context(autocast(s))
        with count.phase("forward"):
            x = torch.empty(x_shape, dtype=x_dtype) if first else Begin.apply(root, x_shape, x_dtype)
            call = functools.partial(module.forward, **kwargs)
            out: Any = checkpoint(call, x, *args, use_reentrant=False) if s.checkpointing else call(x, *args)
            out = out[0] if isinstance(out, tuple) else out
        size = out.numel() * out.element_size()
        needs = out.requires_grad
        end = End.apply(out) if needs else None
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


def _whole(model: Any, task: Task, s: Setting, rules: Any) -> Cost:
    """All of a model that is no chain of layers, forward and backward. In the mode of evaluation: in training
    transformers' detectors look for infinite numbers, and there are none at all; they checkpoint nothing
    then, diffusers' transformers do. What dropout keeps is not counted."""
    model.eval()
    if s.checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad(), Counter(rules) as evaluated, autocast(s):
        task.rehearsed(model, s.windows, s.length, False)
    for p in trained:
        p.grad = torch.empty_like(p) if s.accumulate else None
    with ExitStack() as stack:
        count = stack.enter_context(Counter(rules))
        with autocast(s), count.phase("forward"):
            loss = task.rehearsed(model, s.windows, s.length, True)
        kept = count.live
        with count.phase("backward"):
            loss.backward()
        del loss
    return Cost(
        count.peaks["forward"],
        kept,
        max(kept, count.peaks["backward"]),
        sum(p.numel() * p.element_size() for p in trained),
        evaluated.peak,
        count.inside.get("forward", 0),
        count.inside.get("backward", 0),
    )


def _states(model: Any, task: Task, s: Setting) -> int:
    """Numbers in the hidden states of a batch. The model is asked for them from here on."""
    model.config.output_hidden_states = True
    with torch.no_grad(), autocast(s):
        return sum(state.numel() for state in states_of(task.rehearsed(model, s.windows, s.length, False)))


def _input(s: Setting, hidden: int, per_token: int) -> tuple[int, ...]:
    """The shape of what a layer is given. hidden: its bytes."""
    positions = s.length * per_token
    return s.windows, positions, hidden // (s.windows * positions * getattr(torch, s.dtype).itemsize)


def _tail(around: Around, s: Setting, rules: Any, known: dict[Any, Cost]) -> Cost:
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


def _tail_of(around: Around, s: Setting, rules: Any, windows: int, length: int) -> Cost:
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
    before, shape = 0, (windows, length * around.per_token, around.shape[-1])

    def last(embedded: Tensor) -> Any:
        nonlocal before
        before = (
            count.live - embedded.numel() * embedded.element_size()
        )  # the context and the frame, which ends before the loss
        stack.enter_context(count.phase("forward"))
        return (
            Begin.apply(root, shape, around.dtype)
            if torch.is_grad_enabled()
            else torch.empty(shape, dtype=around.dtype)
        )

    with torch.no_grad(), ExitStack() as stack, autocast(s):
        count = stack.enter_context(Counter(rules))
        around.forward(windows, length, True, last, lambda *_: None)
        evaluation = count.peaks["forward"] - before
    with ExitStack() as stack:
        count = stack.enter_context(Counter(rules))
        with autocast(s):
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

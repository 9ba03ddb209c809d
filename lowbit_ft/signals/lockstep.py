"""lockstep: the teacher's layer i runs right before the student's, so that what one layer of it makes is all
of it that is ever in memory.

    teacher, up to its first layer          stubs record what it gives each layer (masks, rotary angles)
    for every layer i of the student's own forward:
        hook before it      the teacher's layer i on the teacher's stream, its taps kept
        inside it           taps compared, or put in the place of the student's (intervention.py)
        hook behind it      outputs compared, taps forgotten
    teacher, behind its last layer          its logits

The teacher may be the student itself before rounding (residual.py): then the same modules run in two roles.
In no role, as in validation, the hooks do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.maps import Seat, take_seat
from ..model.parts import LayerParts, layer_parts
from .base import Answers, Ask, Walked, Whole
from .intervention import CUT_OFF, MODES, Place, ends, place_at

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


class Lockstep:
    """model: the student; wanted: the parts of the loss that are of layers. place: where the teacher
    intervenes now; idle: what learned nothing in the last forward because of it."""

    def __init__(self, model: nn.Module, walked: Walked, options: Any, wanted: tuple[str, ...]) -> None:
        self.model, self.walked, self.options, self.wanted = model, walked, options, wanted
        self.ours = layer_parts(model)
        self.theirs = self.ours if walked.model is model else layer_parts(walked.model)
        refuse_unlike(self.ours, self.theirs, options)
        self.role: str | None = None
        self.place: Place | None = None
        self.idle: list[nn.Parameter] = []
        self._unreached: dict[Place, list[nn.Parameter]] = {}
        self.taps: dict[str, Tensor] = {}  # of the teacher's layer that ran last
        self.found: dict[str, list[Tensor]] = {}  # sums over the tokens, a layer each
        self.calls: Calls = []
        self.hidden = self.counted = torch.empty(0)

    # ---------------------------------------------------------------- a run

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the hooks are there."""
        with ExitStack() as stack:
            for parts in (self.ours,) if self.theirs is self.ours else (self.ours, self.theirs):
                for i, one in enumerate(parts):
                    for handle in self._hooks(i, one):
                        stack.callback(handle.remove)
                    take_seat(one.block, _Seat(self))
                    stack.callback(take_seat, one.block, None)
            self.beside = self._beside()
            yield

    def at(self, step: int, total: int, seed: int) -> None:
        """Step `step` of `total` is about to be computed."""
        self.place = place_at(self.options, step, total, seed)

    def free_from(self, total: int) -> int:
        """The first step in which no teacher intervenes."""
        return ends(self.options, total)

    @contextmanager
    def together(self, ask: Ask, counted: Tensor) -> Iterator[None]:
        """Inside, a forward of the student takes the teacher along. counted [B, L] bool: the tokens that are
        no padding."""
        self.counted, self.found = counted, {name: [] for name in self.wanted}
        self._start(self.walked.inputs(ask))
        self.role = "student"
        try:
            yield
        finally:
            self.role, self.taps = None, {}

    def joined(self, sums: Tensor) -> Tensor:
        """The sums of all parts [parts] of the forward that ran last. sums: of those that are of no layer,
        which stand first. ValueError where a layer gave none."""
        for name, values in self.found.items():
            if len(values) != len(self.ours):
                raise ValueError(
                    f"train.signal.losses: {name} of {len(self.ours)} layers, and {len(values)} layers of "
                    f"{type(self.model).__name__} gave them; set {name}: 0"
                )
        own = [torch.stack(values).sum()[None] / len(values) for values in self.found.values()]
        return self._learned(torch.cat([sums, *own]))

    def _learned(self, sums: Tensor) -> Tensor:
        """The sums of all parts [parts], behind which `idle` says what learns nothing. Under DDP, which wants
        gradients of all that trains, they are zeros there."""
        self.idle = []
        if self.place is None or not sums.requires_grad:
            return sums
        if self.place not in self._unreached:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self._unreached[self.place] = unreached(sums, trained)
        self.idle = self._unreached[self.place]
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if together and self.idle:
            sums = sums + 0.0 * torch.stack([p.reshape(-1)[0].float() for p in self.idle]).sum()
        return sums

    # ---------------------------------------------------------------- the teacher

    def late(self, ask: Ask) -> Answers:
        """What the teacher says behind its last layer, of a language model; asked when it has run."""
        made: list[Answers] = []

        def answer(positions: Tensor) -> Whole | Any:
            if not made:
                made.append(self._answers(ask))
            return made[0](positions)

        return answer

    @torch.no_grad()
    def _answers(self, ask: Ask) -> Answers:
        with self._ended(), self.walked.at_work(self.walked.model):
            read = self.walked.answering.read(self.walked.inputs(ask))

        def answer(positions: Tensor) -> Whole:
            with torch.no_grad(), self.walked.at_work(self.walked.model):
                return Whole(read(positions))

        return answer

    @torch.no_grad()
    def outputs(self, ask: Ask) -> Any:
        """The same of any model: all that its forward returns."""
        with self._ended(), self.walked.at_work(self.walked.model):
            return self.walked.answering.plain(**self.walked.inputs(ask), use_cache=False)

    def _start(self, inputs: dict[str, Any]) -> None:
        """The teacher up to its first layer."""
        self.calls, last = [], len(self.theirs) - 1

        def stub(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.calls:
                self.hidden = hidden
            self.calls.append((args, kwargs))
            if len(self.calls) > last:
                raise _Seen
            return self._like_layer(hidden)

        self._run_stubs([stub] * (last + 1), inputs)
        assert len(self.calls) == last + 1, "every layer runs once"

    def _run_stubs(self, stubs: list[Callable[..., Any]], inputs: dict[str, Any]) -> None:
        with torch.no_grad(), self.walked.at_work(self.walked.model), stubbed(self.theirs, stubs):
            try:
                self.walked.answering.plain(**inputs, use_cache=False)
            except _Seen:
                pass

    def _teach(self, i: int) -> None:
        """The teacher's layer i, whose taps are kept."""
        args, kwargs = self.calls[i]
        self.taps, self.role = {}, "teacher"
        layer = self.theirs[i].layer
        with torch.no_grad(), self.walked.at_work(layer):
            self.hidden = first_of(layer(self.hidden, *args, **kwargs))
        self.role = "student"
        self.calls[i] = ((), {})

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """Inside, a forward of the teacher ends with the hidden states that left its last layer."""
        passing = [lambda hidden, *_, **__: self._like_layer(hidden)] * (len(self.theirs) - 1)
        with stubbed(self.theirs, [*passing, lambda hidden, *_, **__: self._like_layer(self.hidden)]):
            yield

    def _like_layer(self, hidden: Tensor) -> Any:
        return hidden if self.beside is None else (hidden, *self.beside)

    def _beside(self) -> tuple[None, ...] | None:
        """What stands beside the hidden states where the teacher's layers return a tuple; None: a tensor."""
        found: list[Any] = []

        def spy(module: nn.Module, args: Any, out: Any) -> None:
            found.append((None,) * (len(out) - 1) if isinstance(out, tuple) else None)
            raise _Seen

        handle = self.theirs[0].layer.register_forward_hook(spy)
        device = next(self.walked.model.parameters()).device
        try:
            with torch.no_grad(), self.walked.at_work(self.walked.model):
                ids = torch.zeros((1, 4), dtype=torch.int64, device=device)
                self.walked.answering.plain(input_ids=ids, use_cache=False)
        except _Seen:
            pass
        finally:
            handle.remove()
        return found[0]

    # ---------------------------------------------------------------- the hooks of a layer

    def _hooks(self, i: int, one: LayerParts) -> Iterator[Any]:
        def enter(module: nn.Module, args: Any) -> None:
            if self.role == "student":
                self._teach(i)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if self.role == "student":
                self._compare("hidden", first_of(out), self.hidden)
                self.taps = {}

        def attended(module: nn.Module, args: Any, out: Any) -> None:
            if self.role == "teacher":
                self._tap("outputs", first_of(out))
            elif self.role == "student" and "outputs" in self.taps:
                self._compare("outputs", first_of(out), self.taps["outputs"])

        def context(module: nn.Module, args: Any) -> Any:
            return self._spliced("context", args[0], args[1:])

        def output(module: nn.Module, args: Any, out: Tensor) -> Any:
            found = self._spliced("output", out, ())
            return None if found is None else found[0]

        yield one.layer.register_forward_pre_hook(enter)
        yield one.layer.register_forward_hook(leave)
        yield one.block.register_forward_hook(attended)
        yield one.out.register_forward_pre_hook(context)
        yield one.out.register_forward_hook(output)
        for role, module in one.reads:
            yield module.register_forward_pre_hook(self._cut(role))

    def _cut(self, role: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            if self.role != "student" or self.place is None:
                return None
            cut = CUT_OFF[self.place]
            return (args[0].detach(), *args[1:]) if role in cut else None

        return hook

    def _spliced(self, place: Place, own: Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.role == "teacher" and self.place == place:
            self._tap(place, own, wanted=True)
        if self.role == "student" and self.place == place:
            return (self.taps[place].to(own.dtype), *rest)
        return None

    def maps(self, scores: Tensor, visible: Tensor | None, probabilities: Tensor) -> Tensor:
        """The seat of every attention."""
        if self.role == "teacher":
            self._tap("scores", scores)
            self._tap("map", probabilities, wanted=self.place == "map")
        elif self.role == "student":
            if "scores" in self.taps:
                self._compare("scores", scores, self.taps["scores"], visible)
            if self.place == "map":
                return self.taps["map"].to(probabilities.dtype)
        return probabilities

    def _tap(self, name: str, value: Tensor, wanted: bool = False) -> None:
        if wanted or name in self.wanted:
            self.taps[name] = value

    def _compare(self, name: str, ours: Tensor, theirs: Tensor, visible: Tensor | None = None) -> None:
        """The squared error, a mean over the numbers of a token, summed over the tokens."""
        if name not in self.found:
            return
        exact = torch.promote_types(ours.dtype, torch.float32)
        off = (ours.to(exact) - theirs.to(exact)).square()
        if off.dim() == 4:  # scores [B, H, L, L]: of a query, over the keys that it sees
            if visible is None:
                off = off.mean((1, 3))
            else:
                seen = visible.expand(off.shape)
                off = (off.masked_fill(~seen, 0).sum(-1) / seen.sum(-1).clamp_min(1)).mean(1)
        else:
            off = off.mean(-1)
        self.found[name].append(off.masked_fill(~self.counted, 0).sum())


class _Seat(Seat):
    def __init__(self, lockstep: Lockstep) -> None:
        self.lockstep = lockstep

    def maps(self, scores: Tensor, visible: Tensor | None, probabilities: Tensor) -> Tensor:
        return self.lockstep.maps(scores, visible, probabilities)


class _Seen(Exception):
    """Leaves a model's forward once enough is known."""


def first_of(out: Any) -> Tensor:
    """The hidden states of what a layer or its attention returns."""
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def stubbed(parts: list[LayerParts], stubs: list[Callable[..., Any]]) -> Iterator[None]:
    """Inside, these are the forwards of the layers."""
    before = [vars(one.layer).get("forward") for one in parts]
    for one, stub in zip(parts, stubs, strict=True):
        one.layer.forward = stub
    try:
        yield
    finally:
        for one, own in zip(parts, before, strict=True):
            del one.layer.forward
            if own is not None:
                one.layer.forward = own


def refuse_unlike(ours: list[LayerParts], theirs: list[LayerParts], options: Any) -> None:
    """ValueError where layers do not stand one to one, or an intervention cannot be cut off there."""
    if len(ours) != len(theirs):
        raise ValueError(
            f"train.teacher: has {len(theirs)} layers, and the model {len(ours)}: train.signal.kind: layers "
            "compares them one by one; give a teacher of the same depth and width, or set kind: logits"
        )
    for one, other in zip(ours, theirs, strict=True):
        sizes = [(getattr(x.out, "in_features", 0), getattr(x.out, "out_features", 0)) for x in (one, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"train.teacher: the attention of {other.name} is {sizes[1][0]} to {sizes[1][1]}, and the "
                f"model's {sizes[0][0]} to {sizes[0][1]}; give a teacher of the same depth and width, or set "
                "train.signal.kind: logits"
            )
    section = options.intervention
    if section is not None and "map" in MODES[section.mode].places and any(one.fused for one in ours):
        raise ValueError(
            f"train.signal.intervention.mode: got {section.mode!r}, which cuts q and k off from the hidden "
            f"states and leaves v; in {ours[0].name} one matrix makes all three; set mode: output or context"
        )


def unreached(sums: Tensor, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those that no path of the graph behind `sums` ends at."""
    seen, reached, open_ = set(), set(), [sums.grad_fn]
    while open_:
        node: Any = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            reached.add(id(leaf))
        open_ += [following for following, _ in node.next_functions]
    return [parameter for parameter in parameters if id(parameter) not in reached]

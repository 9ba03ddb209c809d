"""Channels: where the channels of a linear come from and go to, in a traced graph.

Views, slices and splits move numbers and do not look at them. So the tensors of a graph are replaced by the
numbers of the channels that stand in them, and the model's own views are run on these:

    output   channel n of N stands everywhere in row n of the linear's output. Where a view first holds some
             of them only, that is a part. Parts that a concatenation puts together again (the two halves of a
             rotary embedding, what of a head is rotated and what is not) are one.
    input    walked back through views, casts and gates to what made it: a concatenation, whose tensors are
             the segments, or a tensor [..., heads, ..., channels], of which each head is one.

Either way the answer is sets of channels, and a set is a `Segment` when it is made of runs of one width at
one distance: GPT-NeoX has q of head 0, k of head 0, v of head 0, q of head 1, ... in one matrix.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..model.fused import Fusion, Segment

# Of ATen, by name without the overload. What moves channels about, and what leaves each where it is.
VIEWS = frozenset(
    "view reshape _unsafe_view transpose permute unsqueeze squeeze flatten unflatten movedim numpy_T t slice "
    "select narrow split split_with_sizes chunk tensor_split unbind expand getitem index".split()
)
KEEPS = frozenset("contiguous clone alias detach detach_ to _to_copy dropout clamp lift_fresh_copy".split())
SCALES = frozenset(("mul", "div"))
ASSERTS = frozenset(("_assert_tensor_metadata", "sym_size", "_assert_scalar"))
# What mixes channels: nothing is followed through these.
MIXES = frozenset(
    "linear addmm mm matmul bmm baddbmm einsum scaled_dot_product_attention conv1d convolution softmax "
    "_softmax embedding".split()
)


@dataclass(frozen=True)
class Segments:
    """Of one linear; empty where the channels are all of a kind. names: of the outputs, what the model makes
    of each (roles.py)."""

    inputs: tuple[Segment, ...] = ()
    outputs: tuple[Segment, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def fusion(self) -> Fusion:
        """The outputs by name."""
        return dict(zip(self.names, self.outputs, strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the inputs, where they stand one behind the other as ranges; else ()."""
        plain = all(segment.count == 1 for segment in self.inputs)
        return tuple(segment.width for segment in self.inputs) if plain else ()


def name_of(node: Node) -> str:
    """The operator's name without namespace and overload; "" for what is no call."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.rpartition("::")[2]


def outputs_of(made: Node, constants: dict[str, Tensor]) -> list[tuple[Segment, list[Node]]]:
    """The parts into which the output `made` [..., N] of a linear is taken, in the order of their first rows,
    and the tensors of the graph that are (of) each; [] where it is used whole, or in no parts that are
    Segments. constants: values of the placeholders that are tensors of the code."""
    shape = made.meta["val"].shape
    n = int(shape[-1])
    ids = torch.arange(n).expand(*(int(size) for size in shape))
    parts: dict[tuple[int, ...], list[Node]] = {}
    waiting: list[tuple[Node, Any]] = [(made, ids)]
    while waiting:
        node, held = waiting.pop()
        for user in node.users:
            if name_of(user) in ASSERTS:
                continue
            if user.op == "output" or not _moves(user, node, constants):
                return []  # used whole
            moved = _run(user, {node: held}, constants)
            if not isinstance(moved, Tensor):  # of split and chunk the getitems follow
                waiting.append((user, moved))
                continue
            found = _distinct(moved, n)
            if len(found) == n:
                waiting.append((user, moved))
            else:
                parts.setdefault(found, []).append(user)
    united = _united(parts)
    owners = {min(channels): nodes for channels, nodes in united}
    found = _segments([channels for channels, _ in united], n)
    return [(segment, owners.get(segment.start, [])) for segment in found]


def _distinct(ids: Tensor, n: int) -> tuple[int, ...]:
    """Which of the numbers below n stand in ids, in order. Thousands of tokens of a picture hold the same:
    what is the same along a dimension is looked at once, and nothing is sorted."""
    for dim, step in enumerate(ids.stride()):
        if step == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    there = torch.zeros(n, dtype=torch.bool)
    there[ids.reshape(-1)] = True
    return tuple(there.nonzero()[:, 0].tolist())


def inputs_of(given: Node, constants: dict[str, Tensor]) -> tuple[Segment, ...]:
    """The segments of which the input `given` [..., K] of a linear was put together; () where it was not."""
    chain: list[Node] = []
    node = given
    while True:
        name, before = name_of(node), [a for a in node.all_input_nodes if "val" in a.meta]
        if name in VIEWS | KEEPS and before and name not in ("index", "expand"):
            chain.append(node)
            node = before[0]
        elif name == "mul" and (same := [a for a in before if _shape(a) == _shape(node)]):
            # A gate, or a norm's factor, over what may be in segments: the first operand that is.
            if len(same) > 1:
                tail = [labels for one in same if (labels := inputs_of(one, constants))]
                return tail[0] if tail and not chain else ()
            node = same[0]
        else:
            break
    shape = _shape(node)
    if shape is None:
        return ()
    labels = _labels(node, shape)
    rows = [_through(chain, one, constants) for one in labels]
    varying = [row for row in rows if bool((row != row[0]).any())]
    if name_of(node) == "cat":
        part = _through(chain, _joined(node, shape), constants)
        outer = [part] if bool((part != part[0]).any()) else []
    else:
        # The coordinate that changes from each channel to the next is that of the channels in a head.
        outer = [row for row in varying if len(row) > 1 and row[0] == row[1]] if len(varying) > 1 else []
    if not outer:
        return ()
    _, labelled = torch.unique(torch.stack(outer, 1), dim=0, return_inverse=True)
    found = [tuple(torch.nonzero(labelled == i)[:, 0].tolist()) for i in range(int(labelled.max()) + 1)]
    return _segments(found, len(labelled))


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def _moves(user: Node, node: Node, constants: dict[str, Tensor]) -> bool:
    """Whether `user` only moves the channels of `node` about, or scales them all alike."""
    name, others = name_of(user), [one for one in user.all_input_nodes if one is not node]
    if name in SCALES:
        return not others
    known = all(_constant(one).name in constants for one in others)
    return name in VIEWS | KEEPS and user.args[0] is node and known


def _constant(node: Node) -> Node:
    """The placeholder of a tensor of the code, which is copied before it is used as an index."""
    while name_of(node) in KEEPS:
        node = node.all_input_nodes[0]
    return node


def _run(node: Node, held: dict[Node, Any], constants: dict[str, Tensor]) -> Any:
    """The operator of a node on numbers in the place of its first argument."""
    name = name_of(node)
    if name in KEEPS | SCALES:
        return held[node.args[0]]  # pyright: ignore[reportArgumentType]
    if name in ("view", "_unsafe_view"):  # what `contiguous` was passed through for is not contiguous here
        return held[node.args[0]].reshape(node.args[1])  # pyright: ignore[reportArgumentType]

    def value(argument: Node) -> Any:
        return held[argument] if argument in held else constants[_constant(argument).name]

    args = torch.fx.map_arg(node.args, value)
    kwargs = torch.fx.map_arg(node.kwargs, value)
    return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def _through(chain: list[Node], values: Tensor, constants: dict[str, Tensor]) -> Tensor:
    """Numbers in the shape of its source through the views of a chain (the last one first); the first row."""
    for step in reversed(chain):
        values = _run(step, {step.all_input_nodes[0]: values}, constants)
    return values.reshape(-1, values.shape[-1])[0]


def _labels(node: Node, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The coordinate of every element along each dimension."""
    for axis, size in enumerate(shape):
        view = [size if i == axis else 1 for i in range(len(shape))]
        yield torch.arange(size).view(view).expand(shape)


def _joined(node: Node, shape: tuple[int, ...]) -> Tensor:
    """Which tensor of a concatenation every element is of."""
    tensors: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    sizes = [(_shape(one) or shape)[axis] for one in tensors]
    view = [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).view(view).expand(shape)


def _side_by_side(node: Node) -> bool:
    """Whether a concatenation puts channels beside channels, and not tokens behind tokens."""
    shape, axis = _shape(node), node.args[1] if len(node.args) > 1 else 0
    return shape is not None and isinstance(axis, int) and axis % len(shape) == len(shape) - 1


def _united(parts: dict[tuple[int, ...], list[Node]]) -> list[tuple[tuple[int, ...], list[Node]]]:
    """The parts with their nodes, those that are concatenated later on as one."""
    found = list(parts)
    owner = list(range(len(found)))
    reached: dict[Node, set[int]] = {}
    for number, nodes in enumerate(parts.values()):
        waiting, seen = list(nodes), set(nodes)
        while waiting:
            node = waiting.pop()
            reached.setdefault(node, set()).add(number)
            for user in node.users:
                if user not in seen and user.op != "output" and name_of(user) not in MIXES:
                    seen.add(user)
                    waiting.append(user)
    for node in reached:
        if name_of(node) == "cat" and _side_by_side(node):
            together = [reached[a] for a in node.all_input_nodes if a in reached]
            if len(together) > 1:
                for number in set[int]().union(*together):
                    old, new = owner[number], owner[min(together[0])]
                    owner = [new if one == old else one for one in owner]
    sets: dict[int, tuple[set[int], list[Node]]] = {}
    for number, (one, nodes) in enumerate(parts.items()):
        channels, together = sets.setdefault(owner[number], (set(), []))
        channels.update(one)
        together += nodes
    return [(tuple(sorted(channels)), nodes) for channels, nodes in sets.values()]


def _segments(found: list[tuple[int, ...]], size: int) -> tuple[Segment, ...]:
    """Sets of channels as Segments that are all channels, each in one; () where they are no such thing. What
    is in no set is one more of them."""
    taken = {channel for one in found for channel in one}
    if len(taken) != sum(map(len, found)):
        return ()
    if left := tuple(channel for channel in range(size) if channel not in taken):
        found = [*found, left]
    made = [_segment(one) for one in found]
    if len(made) < 2 or None in made:
        return ()
    return tuple(sorted((one for one in made if one is not None), key=lambda segment: segment.start))


def _segment(channels: tuple[int, ...]) -> Segment | None:
    """The channels (ascending) as runs of one width at one distance; None where they are none."""
    starts = [c for i, c in enumerate(channels) if i == 0 or channels[i - 1] != c - 1]
    width = len(channels) // len(starts)
    stride = starts[1] - starts[0] if len(starts) > 1 else 0
    made = Segment(starts[0], width, len(starts), stride)
    return made if tuple(made.channels().tolist()) == channels else None

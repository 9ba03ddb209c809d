"""roles: what the parts of a fused matrix are called, by what the model makes of them.

    q, k, v      q and k are multiplied with each other, in this order; v with the softmax of that. An
                 attention that is one operator of the graph takes all three in this order
    gate, up     they are multiplied element by element, gate behind an activation
    0, 1, ...    whatever else, in the order of their first rows

The name of the layer tells less: a `qkv_proj` has q, v, k in CodeGen.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from .channels import KEEPS, MIXES, VIEWS, name_of


def names_of(parts: Sequence[list[Node]]) -> tuple[str, ...]:
    """One name for each part, given as the nodes of the graph that are it."""
    names = _attention(parts) if len(parts) == 3 else _gated(parts) if len(parts) == 2 else None
    return names or tuple(map(str, range(len(parts))))


def _attention(parts: Sequence[list[Node]]) -> tuple[str, ...] | None:
    met: dict[Node, dict[int, int]] = {}  # product -> part -> which of its arguments comes of it
    for part, nodes in enumerate(parts):
        for user, place, _ in _uses(nodes):
            if name_of(user) in MIXES:
                met.setdefault(user, {}).setdefault(part, place)
    for product, places in met.items():
        order = sorted(places, key=lambda part: places[part])
        if len(set(places.values())) != len(order):
            continue
        if len(order) == 2 and any("softmax" in name_of(user) for user, _, _ in _uses([product])):
            order += [3 - sum(order)]
        elif "attention" not in name_of(product):
            continue
        if len(order) == 3:
            return _in_order(order, ("q", "k", "v"))
    return None


def _gated(parts: Sequence[list[Node]]) -> tuple[str, ...] | None:
    met: dict[Node, dict[int, bool]] = {}  # product -> part -> whether it is changed on its way there
    for part, nodes in enumerate(parts):
        for user, _, changed in _uses(nodes):
            if name_of(user) == "mul":
                own = met.setdefault(user, {})
                own[part] = own.get(part, True) and changed
    for changed in met.values():
        if sorted(changed.values()) == [False, True]:
            return _in_order(sorted(changed, key=lambda part: not changed[part]), ("gate", "up"))
    return None


def _in_order(order: Sequence[int], names: tuple[str, ...]) -> tuple[str, ...]:
    """The name of part 0, of part 1, ..., for parts of these names in this order."""
    return tuple(names[order.index(part)] for part in range(len(order)))


def _uses(nodes: list[Node]) -> list[tuple[Node, int, bool]]:
    """(user, number of the argument, whether more than views are between) of everything that is made of a
    part, up to the first products with other tensors."""
    found: list[tuple[Node, int, bool]] = []
    waiting, seen = [(node, False) for node in nodes], {(node, False) for node in nodes}
    while waiting:
        node, changed = waiting.pop()
        for user in node.users:
            if user.op == "output":
                continue
            found.append((user, user.all_input_nodes.index(node), changed))
            after = (user, changed or name_of(user) not in VIEWS | KEEPS)
            if name_of(user) not in MIXES and after not in seen:
                seen.add(after)
                waiting.append(after)
    return found

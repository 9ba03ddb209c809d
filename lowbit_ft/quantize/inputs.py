"""What calibration text tells of the inputs of a layer's linears: a Curvature for all that share one."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from ..grid.calibrate import Curvature
from ..model.conv import rows_key, rows_of
from ..model.walk import LayerWalk
from .memory import HESSIAN_BYTES


def passes(linears: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The linears of a layer in groups whose Hessians fit HESSIAN_BYTES (those of the experts of a large
    mixture do not), in order. What is shared is counted twice: that is known only once text has passed."""
    part: dict[str, nn.Module] = {}
    used = 0
    for name, linear in linears.items():
        size = 4 * linear.get_parameter("weight").shape[1:].numel() ** 2
        if part and used + size > HESSIAN_BYTES:
            yield part
            part, used = {}, 0
        part[name] = linear
        used += size
    if part:
        yield part


def curvatures(
    walk: LayerWalk, index: int, linears: dict[str, nn.Module], tick: Callable[[float], None]
) -> dict[str, Curvature]:
    """The Curvature of every linear of a layer, over all batches; those that no token reached have none, and
    convolutions with groups, whose rows of weights see other inputs each.
    tick(share): called after every batch with the share of them that is through.

    Linears that are given one and the same tensor (q, k and v; gate and up) share one. Where that changes
    from batch to batch, the text goes through once more and each has its own.
    """
    found = _pass(walk, index, linears, tick, share=True)
    return (_pass(walk, index, linears, tick, share=False) or {}) if found is None else found


def _pass(
    walk: LayerWalk,
    index: int,
    linears: dict[str, nn.Module],
    tick: Callable[[float], None],
    share: bool,
) -> dict[str, Curvature] | None:
    """One pass of the text; None: what is shared changes."""
    sums: dict[str, Curvature] = {}
    owner: dict[str, str] = {}  # linear -> the one whose sum it shares
    given: dict[str, Tensor] = {}  # inputs of the forward that is running; held, so that none is freed and
    # mistaken for another
    changes = False
    kinds = {name: rows_key(linear) for name, linear in linears.items()}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal changes
            x = args[0]
            like = (other for other, seen in given.items() if seen is x and kinds[other] == kinds[name])
            same = next(like, name) if share else name
            changes = changes or owner.setdefault(name, same) != same
            given[name] = x
            if same == name and not changes:
                if (rows := rows_of(module, x)) is not None:
                    sums.setdefault(name, Curvature()).add(rows.reshape(-1, rows.shape[-1]))

        return hook

    def after(number: int, out: Tensor) -> None:
        given.clear()
        tick((number + 1) / len(walk.batches))

    handles = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    walk.run(index, keep=after)
    for handle in handles:
        handle.remove()
    if changes:
        return None
    return {n: sums[owner[n]] for n in linears if owner.get(n) in sums and sums[owner[n]].tokens}

"""GridWeight: what the grid ops (codes.py, grid_linear.py, estimates.py) share of their arguments, said once.

An op of torch.library takes a flat list of tensors and numbers. Here they are one thing: a function is
written with a parameter `grid: Grid`, and `flat` makes of it the function of the flat list, which has the
fields of GridWeight, in their order and by their names, in the parameter's place.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class GridWeight(NamedTuple):
    """A frozen base, a low-rank or dense part and the grid that is trained; codes.py has the equation of
    their weight.
    """

    codes: Tensor  # int16 [N, W]: the base
    residual: Tensor | None  # int16 [N, W_f]: what the base lost in rounding
    scale0: Tensor  # [G, N]: the base's grid
    zero0: Tensor | None  # [G, N]; None is 2^(bits-1), as of zero
    a: Tensor | None  # [r, K]; None: no low-rank part
    b: Tensor | None  # [N, r]
    delta: Tensor | None  # fp32 [R, K]: a dense part, in grid steps; it stands alone, without a and b
    rows: Tensor | None  # int64 [R], each once: the rows that delta is of; None: all, R = N
    scale: Tensor  # [G, N]: the trained grid
    zero: Tensor | None  # [G, N]
    offset: Tensor | None  # [G, N]
    mask: Tensor | None  # int16 [N, W_1], a bit each: 1 where a weight is zero whatever trains
    gain: float  # of the low-rank part
    units: str  # one of codes.UNITS
    bits: int
    residual_bits: int
    lowest: int  # the first code that is used; 0: all are

    @property
    def live(self) -> bool:
        """Whether the trained scale re-grids the base (units "live")."""
        return self.units == "live"

    @property
    def low(self) -> bool:
        """Whether there is a low-rank part."""
        return self.a is not None and self.b is not None

    @property
    def moves(self) -> bool:
        """Whether codes are made anew: else they are the base's."""
        return self.live or self.low or self.delta is not None

    @property
    def moved(self) -> int:
        """How many rows there are whose values before rounding `codes.grid_values` knows: R with a dense
        part, else N.
        """
        return self.codes.shape[0] if self.delta is None else self.delta.shape[0]

    def place(self, part: slice) -> "slice | Tensor":
        """Where the moved rows `part` (of `moved`) lie in the weight."""
        return part if self.rows is None else self.rows[part]


def flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the fields of GridWeight as parameters in the place of its `grid`."""
    hints, own = get_type_hints(function), inspect.signature(function)
    before = list(own.parameters).index("grid")
    after = before + len(GridWeight._fields)
    parameters = [p.replace(annotation=hints.get(name, p.empty)) for name, p in own.parameters.items()]
    parameters[before : before + 1] = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in get_type_hints(GridWeight).items()
    ]
    signature = inspect.Signature(parameters, return_annotation=hints.get("return", own.empty))

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if named:
            bound = signature.bind(*args, **named)
            bound.apply_defaults()
            args = bound.args
        return function(*args[:before], GridWeight(*args[before:after]), *args[after:])

    vars(call)["__signature__"] = signature
    return call

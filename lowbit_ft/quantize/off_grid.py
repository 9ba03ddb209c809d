"""What is said where `calibrate: recover` finds weights that lie on no grid: which, how many of their groups,
and what would hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..grid import Grid, IntGrid
from ..grid.calibrate import Missed, OffGridError

LOOKED = 4  # matrices, from the first that is off: enough to tell a plain checkpoint from one odd layer


def off_grid(
    first: OffGridError, names: Sequence[str], before: int, grid: Grid, groups_of: Callable[[str], int]
) -> ValueError:
    """The error of the matrix names[0], with what the next ones say. before: groups of the matrices that were
    packed before it; groups_of(name) looks at one and counts its groups, and may raise OffGridError itself.
    """
    assert isinstance(grid, IntGrid)
    found, whole = {names[0]: first.missed}, Missed(groups=before)
    whole.add(first.missed)
    for name in names[1:LOOKED]:
        try:
            whole.groups += groups_of(name)
        except OffGridError as error:
            found[name] = error.missed
            whole.add(error.missed)
    here = grid.scale_dtype
    some = ", ".join(f"{name} ({m.off[here] / m.groups:.1%})" for name, m in found.items())
    wider = [name for name, off in whole.off.items() if not off]
    way = (
        f"with scales of {wider[0]} all of them are: set quant.scale_dtype: {wider[0]}"
        if wider
        else "name the grid that they were trained on (quant.bits, group_size, symmetric, scale_dtype), "
        "leave layers out (quant.exclude), or set quant.calibrate: auto, which rounds anew"
    )
    return ValueError(
        f"quant.calibrate: recover: {whole.off[here]:,} of {whole.groups:,} groups looked at "
        f"({whole.off[here] / whole.groups:.1%}) are not on the grid {grid} with {here} scales: {some}; {way}"
    )

"""adopt: the model of a checkpoint that is quantized already. Its own codes, scales and zero points, repacked one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..grid import IntGrid
from ..matrices import Matrix

if TYPE_CHECKING:
    from ..load import Checkpoint
    from ..recipe import QuantSection


@torch.no_grad()
def adopt(
    checkpoint: Checkpoint, quant: QuantSection, model: Any, targets: dict[str, Matrix], device: torch.device, dtype: torch.dtype,
    progress: Callable[[str], None] | None = None,
) -> list[tuple[Any, ...]]:  # fmt: skip
    """Put a PackedLinear in the place of every target layer of `model` (on meta) and fill the rest in `dtype`. Returns the rows of
    the table of `quantize`, as arguments of QuantRow.

    ValueError naming the layers when `quant` chooses others than are packed, or a packed one is not a linear of the model.
    """
    from ..linear import PackedLinear
    from ..load import materialize
    from ..memory import release_freed

    incoming = checkpoint.incoming
    assert incoming is not None
    source = f"{checkpoint.source} ({incoming})"
    keys = {name: checkpoint.packed_key(matrix.parameter) for name, matrix in targets.items()}
    if dense := [name for name, key in keys.items() if key is None]:
        raise ValueError(f"{source}: {_some(dense)} are not packed there, but quant.targets and exclude choose them; leave both out")
    if left := sorted(set(incoming.layers) - set(keys.values())):
        raise ValueError(
            f"{source}: the packed layers {_some(left)} are no linear of {type(model).__name__} that quant chooses (experts that "
            "transformers fuses, or left out by quant.targets and exclude); they would have to become dense, which is not done"
        )
    if turned := [name for name, matrix in targets.items() if not matrix.plain or matrix.embedding]:
        raise ValueError(f"{source}: {_some(turned)} are packed there, but are no plain linears (a Conv1D, an embedding): not taken over")
    rows = []
    for name in targets:
        grid, has_bias = quant.grid_for(name), model.get_submodule(name).bias is not None
        assert isinstance(grid, IntGrid)
        stray = f"{keys[name]}.bias"
        if not has_bias and stray in checkpoint.names() and bool(checkpoint.read(stray).any()):
            raise ValueError(f"{checkpoint.file(stray)}: {stray} is not zero, but this {type(model).__name__} has no bias there")
        base = checkpoint.packed_weight(f"{name}.weight", grid, device)
        bias = checkpoint.weight_for(f"{name}.bias", device=device, dtype=dtype) if has_bias else None
        model.set_submodule(name, PackedLinear(base, bias))
        note = f"as it is in the {incoming} checkpoint"
        rows.append((name, "quantized", note, grid.bits, grid.group_size, None, base.shape[0] * base.shape[1], base.nbytes))
        release_freed()
        if progress is not None:
            progress(name)
    materialize(model, checkpoint, "", device, dtype)
    return rows


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

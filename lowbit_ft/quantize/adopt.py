"""adopt: may the model of a checkpoint that is quantized already be made of its own integers, layer by
layer?
"""

from __future__ import annotations

from typing import Any

from ..model.checkpoint import Checkpoint
from ..model.matrices import Matrix


def check_adopted(checkpoint: Checkpoint, model: Any, targets: dict[str, Matrix]) -> None:
    """ValueError naming the layers when `targets` are others than are packed, or a packed one is not a linear
    of `model` (on meta) without what a packed layer has no place for."""
    incoming = checkpoint.incoming
    assert incoming is not None
    source = f"{checkpoint.source} ({incoming})"
    keys = {name: checkpoint.packed_key(matrix.parameter) for name, matrix in targets.items()}
    # a dense embedding is packed here, where quant.embeddings says so
    keys = {name: key for name, key in keys.items() if key is not None or not targets[name].embedding}
    if dense := [name for name, key in keys.items() if key is None]:
        raise ValueError(
            f"{source}: {_some(dense)} are not packed there, but quant.targets, exclude and convolutions "
            "choose them; leave all three out"
        )
    if left := sorted(set(incoming.layers) - set(keys.values())):
        raise ValueError(
            f"{source}: the packed layers {_some(left)} are no linear of {type(model).__name__} that quant "
            "chooses (experts that "
            "transformers fuses, or left out by quant.targets and exclude); they would have to become "
            "dense, which is not done"
        )
    if turned := [name for name in keys if not (matrix := targets[name]).plain or matrix.embedding]:
        raise ValueError(
            f"{source}: {_some(turned)} are packed there, but are no plain linears (a Conv1D, an "
            "embedding): not taken over"
        )
    for name in keys:
        stray = f"{keys[name]}.bias"
        if (
            model.get_submodule(name).bias is None
            and stray in checkpoint.names()
            and bool(checkpoint.read(stray).any())
        ):
            raise ValueError(
                f"{checkpoint.file(stray)}: {stray} is not zero, but this "
                f"{type(model).__name__} has no bias there"
            )


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

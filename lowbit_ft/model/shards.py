"""A tensor, or this process's part of it: what code must know that meets models whose layers FSDP2 has spread
(train/sharding.py).
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered from all processes (collective), or itself when it is not sharded. Not for int16:
    gloo has none.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(full: Tensor, model: Tensor) -> Tensor:
    """The inverse of `whole`: full, cut as `model` is and on its device. No communication."""
    full = full.to(model.device)
    if not isinstance(model, DTensor):
        return full
    return distribute_tensor(full, model.device_mesh, model.placements, src_data_rank=None)

"""upload: a tensor on its way to the device, without the host waiting for it."""

from typing import Any

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From pinned memory, because a copy to a GPU from any other makes the host
    wait until it is done.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_each(value: Any, device: torch.device) -> Any:
    """The same for a tensor, or for those in lists and dicts (the boxes of the images of a batch)."""
    if isinstance(value, list):
        return [upload_each(one, device) for one in value]
    if isinstance(value, dict):
        return {name: upload_each(one, device) for name, one in value.items()}
    return upload(value, device)

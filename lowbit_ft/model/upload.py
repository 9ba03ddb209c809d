"""upload: a tensor on its way to the device, without the host waiting for it."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From pinned memory, because a copy to a GPU from any other makes the host
    wait until it is done.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

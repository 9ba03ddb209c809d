"""The processes of a distributed run (torchrun): which one am I, and letting the main one go first.

One process is the ordinary case and none of this then does anything. torchrun sets RANK, WORLD_SIZE and
LOCAL_RANK.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState


def rank() -> int:
    """Index of this process, 0 when it is the only one."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> bool:
    """Start the process group when there are several; True on the main process, the only one that writes."""
    if world() > 1:
        # The others wait while the main process quantizes, which takes longer than NCCL's ten minutes on a
        # large model.
        PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=24))
    return rank() == 0


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block while the others wait, then they run it (and find its files)."""
    if world() == 1:
        yield
        return
    if rank() != 0:
        torch.distributed.barrier()
    yield
    if rank() == 0:
        torch.distributed.barrier()

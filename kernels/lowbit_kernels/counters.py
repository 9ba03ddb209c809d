"""Memory on a GPU that outlives the call that needs it first, and the counters of split sums that live there.

A kernel that adds its parts in one launch (triton_common.add_in_order) counts arrivals in a slot of its own
and leaves it at zero again; so one pool of zeros per device serves every stream and every captured graph.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def persistent(make: Callable[[], Any], device: torch.device) -> Any:
    """What outlives the call that needs it first: made on a thread and a stream of its own, and finished. So
    it lands in no memory pool that a CUDA graph or torch.compile is filling on this thread, and whoever reads
    it on another stream finds it written."""
    if device.type != "cuda":
        return make()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured: call the op once with these sizes before the capture"
        )

    def run() -> Any:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            made = make()
            torch.cuda.current_stream().synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


# Counters for `add_in_order`: 4 MB of zeros per device. Every kernel leaves its counters at zero again.
_COUNTERS = 1 << 20


class _Counters:
    """One pool of zeros, given out front to back: a slice per stream, and one per kernel captured in a
    graph.
    """

    def __init__(self, device: torch.device):
        self.pool: Tensor = persistent(
            lambda: torch.zeros(_COUNTERS, dtype=torch.int32, device=device), device
        )
        self.used = 0
        self.by_stream: dict[int, Tensor] = {}

    def take(self, count: int) -> Tensor | None:
        if self.used + count > _COUNTERS:
            return None
        self.used += count
        return self.pool[self.used - count : self.used]

    def of_stream(self, stream: int, count: int) -> Tensor:
        have = self.by_stream.get(stream)
        if have is None or have.numel() < count:
            have = self.take(max(4096, 1 << (count - 1).bit_length()))
            if have is None:
                return torch.zeros(count, dtype=torch.int32, device=self.pool.device)
            self.by_stream[stream] = have
        return have


# Workspace that outlives a call, one per device in use; `counters` is its only reader and writer.
_POOLS: dict[torch.device, _Counters] = {}


def drop_counters() -> None:
    """Forget every pool. For a process that captures graphs without end (the tuner), when none of them will
    run again.
    """
    _POOLS.clear()


def counters(count: int, device: torch.device) -> Tensor:
    """`count` int32 zeros that no kernel running at the same time uses. Each user must leave zeros behind.

    Kernels of one stream run one after the other and share a slice. A CUDA graph may be replayed on any
    stream, so what it captured keeps its slice for ever; when the pool is used up, or was not there before
    the capture began, the graph gets its own zeros, at the price of a memset.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        own = _POOLS[device].take(count) if device in _POOLS else None
        return torch.zeros(count, dtype=torch.int32, device=device) if own is None else own
    if device not in _POOLS:
        _POOLS[device] = _Counters(device)
    return _POOLS[device].of_stream(torch.cuda.current_stream(device).cuda_stream, count)

"""Where the inputs of the layers wait between forward and backward, when gradient checkpointing keeps nothing
else: train.offload.

    cpu     in CPU memory; for a model on a GPU in pinned buffers that every step uses again, copied on a
            stream of their own, and fetched one layer ahead of the backward
    disk    in a file of the run folder that has no name: the system takes the space back whenever the process
            ends, killed or not

What comes back is what went, bit for bit. torch's save_on_cpu makes a new pinned buffer for every tensor and
has the backward wait for each copy. At 65,536 tokens of width 4096 the inputs of 32 layers are 17 GB; here
two of them (1 GB) are on the GPU.

    forward    layer 0   layer 1   ...           compute stream
                  put 0     put 1                copy stream: waits for the compute stream, which does not
                            wait for it
    backward   layer n     layer n - 1  ...      waits for its own input, which was asked for one layer ago
               get n - 1   get n - 2
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Store(Protocol):
    """Holds the bytes of tensors. `ahead`: whether asking early is worth it, that is, whether `get` returns
    before it is done.
    """

    ahead: bool

    def put(self, x: Tensor) -> Any: ...
    def get(self, slot: Any, shape: torch.Size, dtype: torch.dtype) -> Any: ...
    def wait(self, got: Any) -> Tensor: ...
    def release(self, slot: Any) -> None: ...
    def close(self) -> None: ...


class Offload:
    """Saved-tensor hooks over a store; `wrap` puts a checkpointing function under them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._newest: weakref.ref[_Away] | None = None

    def wrap(self, recompute: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpointing function whose saved inputs are in the store. What the layer itself saves is not
        touched: inside it the hooks of the recomputation are the innermost, and they keep nothing."""

        def offloaded(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self.pack, self.unpack):
                return recompute(*args, **kwargs)

        return offloaded

    def pack(self, x: Tensor) -> Tensor | _Away:
        if not x.numel():
            return x
        away = _Away(self.store, x, self._newest)
        self._newest = weakref.ref(away)
        return away

    def unpack(self, packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        x = packed.take()
        before = packed.before() if packed.before is not None else None
        if (
            self.store.ahead and before is not None
        ):  # the backward comes to what was packed just before this one next
            before.ask()
        return x


class _Away:
    """A tensor in the store, from `pack` until autograd lets go of it; then its slot is free."""

    def __init__(self, store: Store, x: Tensor, before: weakref.ref[_Away] | None) -> None:
        self.store, self.shape, self.dtype, self.before = store, x.shape, x.dtype, before
        self.slot, self.got = store.put(x), None

    def ask(self) -> None:
        if self.got is None:
            self.got = self.store.get(self.slot, self.shape, self.dtype)

    def take(self) -> Tensor:
        self.ask()
        got, self.got = self.got, None  # asked for again (a graph that is kept), it is fetched again
        return self.store.wait(got)

    def __del__(self) -> None:
        if "slot" in vars(self):  # else put() failed
            self.store.release(self.slot)


def open_store(where: str, device: torch.device, folder: Path) -> Store:
    """The store of train.offload `where` ("cpu" or "disk") for a model on `device`; `folder`: where a file
    may be.
    """
    if where == "disk":
        return FileStore(folder, device)
    return PinnedStore(device) if device.type == "cuda" else MemoryStore()


class MemoryStore:
    """CPU memory for a model that is on the CPU: what a GPU would do, without the gain."""

    ahead = False

    def put(self, x: Tensor) -> Tensor:
        return x.clone()

    def get(self, slot: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return slot

    def wait(self, got: Tensor) -> Tensor:
        return got

    def release(self, slot: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


class PinnedStore:
    """Pinned CPU memory, copied to and from on one stream: copies of a buffer are in the order in which they
    were asked for, so a buffer that is free again may be written to while its last reader has not run yet. A
    layer must not write into its input; autograd refuses that without offload, and here the copy might see
    it.
    """

    ahead = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by bytes

    def put(self, x: Tensor) -> Tensor:
        free = self.free[x.nbytes]
        buffer = free.pop() if free else torch.empty(x.nbytes, dtype=torch.uint8, pin_memory=True)
        raw = _bytes(x.contiguous())
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # what makes x comes first
        with torch.cuda.stream(self.stream):
            buffer.copy_(raw, non_blocking=True)
        raw.record_stream(self.stream)  # the memory of x is not given away before the copy has read it
        return buffer

    def get(self, slot: Tensor, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self.stream):
            x = torch.empty(shape, dtype=dtype, device=self.device)  # memory of the copy stream
            _bytes(x).copy_(slot, non_blocking=True)
            return x, self.stream.record_event()

    def wait(self, got: tuple[Tensor, Any]) -> Tensor:
        x, arrived = got
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        x.record_stream(current)  # the copy stream does not reuse it before the backward has read it
        return x

    def release(self, slot: Tensor) -> None:
        self.free[slot.nbytes].append(slot)

    def close(self) -> None:
        self.free.clear()


class FileStore:
    """One file without a name in `folder`; slots of equal size are used again."""

    ahead = False

    def __init__(self, folder: Path, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)
        self.size = 0
        self.free: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # by bytes: (start, bytes)

    def put(self, x: Tensor) -> tuple[int, int]:
        raw = memoryview(_bytes(x.detach().to("cpu").contiguous()).numpy())  # pyright: ignore[reportArgumentType]
        free = self.free[len(raw)]
        start, size = slot = free.pop() if free else (self.size, len(raw))
        self.size = max(self.size, start + size)
        try:
            done = 0
            while done < size:  # a write may stop at 2 GB
                done += os.pwrite(self.file.fileno(), raw[done:], start + done)
        except OSError as error:
            self.free[size].append(slot)
            raise ValueError(
                f"train.offload: disk could not write {size} bytes in {self.folder} ({error.strerror}); "
                "free space there, put `output` on "
                "a larger disk, or set train.offload: cpu"
            ) from error
        return slot

    def get(self, slot: tuple[int, int], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        start, size = slot
        x = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        raw, done = _bytes(x).numpy().data, 0
        while done < size:
            read = os.preadv(self.file.fileno(), [raw[done:]], start + done)
            assert read > 0, "the file is shorter than what was written"
            done += read
        return x.to(self.device)

    def wait(self, got: Tensor) -> Tensor:
        return got

    def release(self, slot: tuple[int, int]) -> None:
        self.free[slot[1]].append(slot)

    def close(self) -> None:
        self.file.close()


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor as uint8 [nbytes], the same memory."""
    return x.detach().reshape(-1).view(torch.uint8)

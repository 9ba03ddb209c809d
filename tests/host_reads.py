"""HostReads: every time that Python asks a tensor for a number or a shape that depends on numbers.

On a GPU each of them makes the host wait for the device. Two views, because neither sees all: calls on
tensors from Python (tolist, cpu), and the operators of PyTorch below them (item, bool, float,
nonzero, a mask as an index), those inside our ops and those of the backward included.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gemms import reference_of

TESTS = Path(__file__).parent
# Python's way to a number. item and the conversions show below as _local_scalar_dense, where they are
# counted; numpy refuses a tensor on a GPU, so it cannot hide a wait.
_CALLS = {torch.Tensor.tolist: "tolist", torch.Tensor.cpu: "cpu"}
# On a GPU these end in a copy to the host, for a value or for the size of the result.
_OPS = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "bincount",
    "repeat_interleave.Tensor",
)


class HostReads:
    """Context manager; `seen`: (what, where in our code or transformers') of each read so far."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self._modes = (_Functions(self), _Ops(self))

    def note(self, what: str) -> None:
        frames = [
            f
            for f in traceback.extract_stack()
            if not Path(f.filename).is_relative_to(TESTS) and "/torch/" not in f.filename
        ]
        self.seen.append(
            (what, f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].name}" if frames else "")
        )

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, owner: HostReads) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CALLS:
            self.owner.note(_CALLS[func])
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __init__(self, owner: HostReads) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (inside := reference_of(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        name = str(func).removeprefix("aten.")
        if name.startswith("index") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in _indices(args)
        ):
            self.owner.note("mask as an index")  # its nonzero is below what a mode sees
        if any(name == op or name.startswith(f"{op}.") for op in _OPS):
            self.owner.note(name)
        return func(*args, **kwargs)


def _indices(args: Any) -> list[Any]:
    """The tensors of x[...]."""
    return [
        i
        for a in args[1:2]
        if isinstance(a, (list, tuple))
        for i in a
        if i is None or isinstance(i, torch.Tensor)
    ]

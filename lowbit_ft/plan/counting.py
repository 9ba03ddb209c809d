"""Counting bytes: how much memory the tensors of a computation hold, op by op, without asking an allocator.

    with Counter() as count:             every storage that an operator makes inside is counted until it dies
        with count.phase("backward"):    peaks by phase, where a caller wants them apart
            loss.backward()
    count.peak, count.peaks["backward"], count.live

What existed before is not counted. Three kinds of tensors can be counted: real ones on a CPU; fake ones
(FakeTensorMode), for which a step of an 8B model costs a second and no memory; meta ones. The packed ops
(namespace `lowbit`) are opaque to PyTorch's dispatcher: on real tensors their reference implementation runs
here, inside the count; for fake ones `workspace` says what the op holds at its peak beyond its arguments
(reference_workspace: found by running that same reference on meta tensors).

Memory that operators of PyTorch take and give back inside themselves (a BLAS packing buffer) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Workspace = Callable[[str, tuple[Any, ...]], int]


class Counter(TorchDispatchMode):
    """Bytes of storages made inside that are alive (`live`), their maximum (`peak`), and the maximum in each
    phase (`peaks`).

    workspace(op name, arguments) -> bytes beyond the arguments at the op's peak, for packed ops on tensors
    without data; None: run their reference implementation and count inside it.
    """

    def __init__(self, workspace: Workspace | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.peaks: dict[str, int] = {}
        self.inside: dict[
            str, int
        ] = {}  # of the peaks by phase, what is inside a packed op and not its result
        self._phase = ""
        self._workspace = workspace
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside count for `name` (phases may come again; the innermost one counts)."""
        before, self._phase = self._phase, name
        self._note(self.live)
        try:
            yield
        finally:
            self._phase = before

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor that was made outside."""
        self._track(tensor.untyped_storage())
        self._note(self.live)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lowbit":
            name = func._schema.name.partition("::")[2]
            if self._workspace is None:
                with self:
                    out = reference(name)(*args, **kwargs)
            else:
                workspace = self._workspace(name, args)
                out = func(*args, **kwargs)
                made = sum(t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, Tensor))
                self._note(self.live + workspace, workspace - made)
        else:
            out = func(*args, **kwargs)
        given: set[int] | None = None
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) in self._sizes:
                    continue
                if given is None:
                    given = {
                        id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
                    }
                if id(storage) not in given:  # else a view of something older than the count
                    self._track(storage)
        self._note(self.live)
        return out

    def _track(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._sizes:
            return

        def gone(_: Any) -> None:
            del self._sizes[key]
            self.live -= size

        self._sizes[key] = (weakref.ref(storage, gone), size)
        self.live += size

    def _note(self, now: int, inside: int = 0) -> None:
        self.peak = max(self.peak, now)
        if self._phase and now > self.peaks.get(self._phase, -1):
            self.peaks[self._phase] = now
            self.inside[self._phase] = inside


def reference(name: str) -> Callable[..., Any]:
    """The plain PyTorch implementation of a packed op: what runs on a CPU."""
    return OPDEFS[f"lowbit::{name}"]._init_fn  # what @custom_op was given; it has no public name


def reference_workspace(leaf: Workspace | None = None) -> Workspace:
    """A rule for packed ops: their reference implementation is run on meta tensors and counted, once per
    shapes.

    leaf: what to ask first (the rules of another implementation); a negative answer means that it has none.
    """
    known: dict[tuple[Any, ...], int] = {}

    def workspace(name: str, args: tuple[Any, ...]) -> int:
        key = (name, *((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in args))
        if key not in known:
            own = -1 if leaf is None else leaf(name, args)
            known[key] = own if own >= 0 else _on_meta(name, args, workspace)
        return known[key]

    return workspace


def _on_meta(name: str, args: tuple[Any, ...], workspace: Workspace) -> int:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.no_grad():
        meta = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), args)
        plain = reference(name)
        with Counter(workspace) as count:
            out = getattr(plain, "__wrapped__", plain)(
                *meta
            )  # without the autocast guard, which does not know meta
        del out
    return count.peak

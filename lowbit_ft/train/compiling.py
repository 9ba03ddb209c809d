"""train.compile: torch.compile of the decoder layers, one by one.

Layer by layer, because what lies between them is not for a compiler: recomputation, offload and the gathering
of shards are hooks around a layer's forward. All layers run the same code, so they share what is compiled:
one graph where the input wants a gradient and one where it does not (the first layer), however many layers
there are. A second length of batch compiles once more, with lengths as variables. Our ops are torch.library
ops with fakes, so one thing alone stays outside of the graphs: attention over the segments of a packed
window, whose lengths are Python's (model/attention.py). A layer that would break elsewhere (experts whose
tokens are counted on the host) is refused rather than run in pieces.

What trains stays what ships: codes come from an opaque op, and the scales' rounding and exp are opaque too
(lowbit_kernels/rounding.py). Losses may differ from the plain run in their last bits, because norms and
activations are fused.

Only training forwards are compiled; evaluation runs the plain code. Names of modules and parameters do not
change.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..adapters.base import Adapter
from ..model.linear import PackedLinear
from ..model.walk import decoder_layers

# Graphs of one layer's code: with and without a gradient of the input, with and without a mask, lengths fixed
# and then variable, and as many again for each other kind of layer (sliding windows, wider MLPs). torch's own
# limit of 8 would end a run in its middle.
GRAPHS = 64


def missing_compiler(on_gpu: bool) -> str | None:
    """What torch.compile needs on this machine and does not find; None when all is there."""
    if on_gpu and find_spec("triton") is None:
        return "the package triton, which is not installed"
    wanted = (
        [os.environ.get("CC", ""), "gcc", "clang", "cc"]
        if on_gpu
        else [os.environ.get("CXX", ""), "g++", "clang++"]
    )
    if any(name and shutil.which(name) for name in wanted):
        return None
    return f"a {'C' if on_gpu else 'C++'} compiler, and neither {wanted[1]} nor {wanted[2]} is on the PATH"


def compile_layers(model: nn.Module, backend: str = "inductor") -> Callable[[], None]:
    """Compile the training forward of every decoder layer, in place; returns what undoes it. After
    recomputation is switched on.

    ValueError where the model has no list of decoder layers, or (at the first forward) a layer cannot be
    compiled whole.
    """
    undo: list[Callable[[], None]] = []
    made: dict[Any, Any] = {}  # one compiled function per kind of layer
    for layer in decoder_layers(model)[1]:
        plain = _inner_forward(layer)
        if plain not in made:
            made[plain] = torch.compile(plain, backend=backend)
        run = _checked(layer, made[plain])
        if getattr(layer, "gradient_checkpointing", False):
            # transformers hands what is to be recomputed to this function; its hooks stay outside of what is
            # compiled.
            recompute: Any = layer._gradient_checkpointing_func
            undo.append(_replaced(layer, "_gradient_checkpointing_func", _recomputing(recompute, run)))
        else:
            undo.append(_replaced(layer, "forward", _training_only(layer, layer.forward, run)))

    def undo_all() -> None:
        for one in undo:
            one()

    return undo_all


def _inner_forward(layer: nn.Module) -> Callable[..., Any]:
    """The forward of the layer's class below what transformers wraps around it for recomputation (FSDP's
    subclass has that twice).
    """
    forward: Any = type(layer).forward
    while (
        getattr(forward, "__name__", "") == "forward"
        and getattr(getattr(forward, "__code__", None), "co_name", "") == "forward_with_checkpointing"
    ):
        forward = forward.__wrapped__
    return forward


def _checked(layer: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled forward of one layer. Codes that are kept for the step are looked at before it: compiled
    code cannot.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # slow: torch's compiler

    hosts = [m for m in layer.modules() if isinstance(m, PackedLinear)]
    adapted = [(m, m.adapter) for m in hosts if isinstance(m.adapter, Adapter)]
    for _, adapter in adapted:
        if adapter.kept is not None:
            adapter.kept.checked_outside = True

    def run(*args: Any, **kwargs: Any) -> Any:
        for host, adapter in adapted:
            adapter.refresh_codes(host.base)
        try:
            with torch._dynamo.config.patch(recompile_limit=GRAPHS), torch._dynamo.error_on_graph_break(True):
                return compiled(layer, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            what = next(
                (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
            )
            raise ValueError(
                f"train.compile: {type(layer).__name__} cannot be compiled whole ({what}); set "
                "train.compile: false"
            ) from error

    return run


def _training_only(
    layer: nn.Module, plain: Callable[..., Any], run: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (run if layer.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _recomputing(recompute: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    def forward(partly: Any, *args: Any, **kwargs: Any) -> Any:
        return recompute(partial(run, **partly.keywords), *args, **kwargs)

    return forward


def _replaced(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of this one module; returns what puts back what was there."""
    there, before = name in vars(module), vars(module).get(name)
    setattr(module, name, value)

    def put_back() -> None:
        delattr(module, name)
        if there:
            setattr(module, name, before)

    return put_back

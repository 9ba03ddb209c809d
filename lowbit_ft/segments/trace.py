"""trace: torch.export of a model without weights, and the segments of its linears.

A few tokens pass through the skeleton, in seconds and without memory whatever its size. Its tensors are fake
ones of a CPU, not of the meta device: there a list that the code has as an index (Falcon's) would lose its
numbers.
Decoder layers that are alike are traced once: of the others only the first is asked (walk.kind_of). Linears
are known in the graph by the module that their operators belong to, so one that is written as a bare product
(Falcon's), or keeps its weight turned (GPT-2's), is one like any other. Experts of a mixture are not traced
one by one and have no segments.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from ..model.config import CONFIG, load_config
from ..model.matrices import find_matrices
from ..model.meta import meta_model
from ..model.purpose import example_of, purpose_of
from ..model.walk import decoder_layers, kind_of
from .channels import Segments, inputs_of, outputs_of
from .roles import names_of

TOKENS = 6


def segments_of(config: Any, source: Path = Path(CONFIG)) -> dict[str, Segments]:
    """`find_segments` of the model of a transformers configuration. source: its file, for messages."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the dense model's; which layers are packed does not matter here
    return find_segments(meta_model(config, torch.float32, "eager", source, purpose_of(config)))


def segments_in(folder: Path) -> dict[str, Segments]:
    """`segments_of` the config.json of a folder."""
    path = folder / CONFIG
    return _segments_in(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _segments_in(path: Path, stamp: int) -> dict[str, Segments]:
    return segments_of(load_config(path.parent), path)


def find_segments(model: nn.Module) -> dict[str, Segments]:
    """The segments of every linear of a dense model (on any device, which is left as it is) that has some, by
    name in model order. ValueError where it cannot be traced."""
    model = copy.deepcopy(model).to("meta").eval()
    names = [
        name for name, matrix in find_matrices(model).items() if not matrix.embedding and not matrix.conv
    ]
    alike = _trace_once(model)
    try:
        with _quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            fake = model.to_empty(device="cpu")
            traced = torch.export.export(fake, (), _example(fake), strict=False)
        constants, found = _constants(traced), dict[str, Segments]()
        for name, (given, made) in _linears(traced.graph.nodes, set(names)).items():
            parts = outputs_of(made, constants)
            outputs, called = tuple(part for part, _ in parts), names_of([nodes for _, nodes in parts])
            segments = Segments(inputs_of(given, constants), outputs, called)
            if segments != Segments():
                found[name] = segments
    # The model's own code runs, and the compiler's: either may raise anything.
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}: {first[:160]}), so "
            "which channels belong together is not known"
        ) from error
    for other, first in alike.items():
        found |= {
            f"{other}.{name.removeprefix(first + '.')}": segments
            for name, segments in list(found.items())
            if name.startswith(f"{first}.")
        }
    return {name: found[name] for name in names if name in found}


def _example(model: Any) -> dict[str, Any]:
    """What is sent through: a few tokens, or what a model for something else is called with."""
    purpose = purpose_of(model.config)
    if purpose is None:
        return {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long), "use_cache": False}
    return example_of(model.config.to_dict(), purpose)


def _trace_once(model: Any) -> dict[str, str]:
    """Let every decoder layer that is like one before it hand its input on; its name -> that one's."""
    if (streams := getattr(model, "streams", ())) and not model.walks:
        return _streams_once(model, streams)
    try:
        prefix, layers = decoder_layers(model)
    except ValueError:
        return {}
    first: dict[str, int] = {}
    alike: dict[str, str] = {}
    gave: list[bool] = []  # whether layers return tuples (OpenAI GPT: lists), as the first one does
    for index, layer in enumerate(layers):
        kind = repr(kind_of(layer))
        if kind not in first:
            first[kind] = index
            if index == 0:
                layer.register_forward_hook(lambda _, __, out: gave.append(isinstance(out, tuple | list)))
            continue
        alike[f"{prefix}.{index}"] = f"{prefix}.{first[kind]}"
        layer.forward = lambda hidden, *_, **__: (hidden,) if gave[0] else hidden
    return alike


def _streams_once(model: Any, streams: Sequence[str]) -> dict[str, str]:
    """The same where layers are called by name and hand several streams on, the inputs of these names."""
    first: dict[str, str] = {}
    alike: dict[str, str] = {}
    for prefix, layers in model.named_children():
        for index, layer in enumerate(layers if isinstance(layers, nn.ModuleList) else ()):
            kind, name = repr(kind_of(layer)), f"{prefix}.{index}"
            if first.setdefault(kind, name) != name:
                alike[name] = first[kind]
                layer.forward = lambda **given: tuple(given[stream] for stream in streams)
    return alike


def _linears(nodes: Any, names: set[str]) -> dict[str, tuple[Node, Node]]:
    """By name: what goes into a linear, and what comes out of it."""
    own: dict[str, list[Node]] = {}
    for node in nodes:
        if node.op == "call_function" and (stack := node.meta.get("nn_module_stack")):
            name = list(stack.values())[-1][0].partition("@")[0]
            if name in names:
                own.setdefault(name, []).append(node)
    found: dict[str, tuple[Node, Node]] = {}
    for name, inside in own.items():
        given = [
            argument
            for node in inside
            for argument in node.all_input_nodes
            if argument not in inside and argument.op == "call_function"
        ]
        made = [node for node in inside if any(user not in inside for user in node.users)]
        if given and made:
            found[name] = given[0], made[-1]
    return found


def _constants(traced: Any) -> dict[str, Tensor]:
    """The tensors that the code itself has (a list as an index), by placeholder."""
    lifted = traced.graph_signature.inputs_to_lifted_tensor_constants
    return {name: traced.constants[key] for name, key in lifted.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """The compiler shows the whole graph when it fails; what it raises says enough."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)

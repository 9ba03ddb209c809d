"""The ONNX graph of a model: its skeleton without weights, traced by torch.onnx.

The skeleton is the module tree that the checkpoint opens to, whatever its class: packed layers are stand-ins
(onnx_layers.py), every other parameter is a zero that takes no memory, and nothing is computed. Inputs are
what its forward takes of INPUTS; a model that keeps keys and values in plain caches also takes
past_key_values.N.key and .value and gives present.N.key and .value, by the names that Optimum and
onnxruntime-genai look for. With a past of length 0 that graph reads a whole sequence. Models with other
caches (sliding windows, states) are traced without one: who generates with those gives the whole sequence
each time.

Weights must be unknown while the graph is simplified (a folder of constants would compute with the zeros), so
they are taken out of it before, and put back as places in the file of tensors. So are the scales and zero
points of static inputs, which are to stay numbers of their own: they are put back as they are.
"""

# The writer is an optional package.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.checkpoint import Checkpoint
from ..model.images import made_size
from ..model.kv_seam import ARGUMENTS
from ..model.matrices import fusions_of, is_experts, stand_in
from ..model.meta import uncached
from ..model.purpose import SAYS, example_of, purpose_of
from .base import Exporter, LayerSpec
from .layout import Layout
from .onnx_layers import OPSET, OnnxEmbedding, OnnxLinear, hollow, input_constants, onnx_in_place_of

# Inputs of a forward -> the names of their dimensions; text models take the first ones, then images, and
# diffusion transformers the last, of batches of any size.
NOISY: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("hidden_states", "timestep", "class_labels", "encoder_hidden_states", "pooled_projections"),
    ("batch_size",),
)
INPUTS = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "token_type_ids": ("batch_size", "sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "pixel_values": ("batch_size", "num_channels", "height", "width"),
    **NOISY,
}
KEYS = ("batch_size", "", "past_sequence_length", "")  # of one past_key_values.N.key
SIZES = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 5}  # of the traced example
_PREFIX = "model."  # what _Traced puts before the names of the model's tensors


@dataclass(frozen=True)
class Graph:
    """model: an onnx_ir.Model. weights: its initializers that are tensors of the file, by name. dense: those
    that the checkpoint gives: their shapes, and the dtype in which they were trained (fp32 in the file)."""

    model: Any
    weights: Mapping[str, Any]
    dense: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def trace(layout: Layout, checkpoint: Checkpoint, exporter: Exporter) -> Graph:
    """ValueError naming the model's class where torch.export cannot trace it."""
    model, trained = skeleton(layout, checkpoint, exporter)
    dense = {
        name: (tuple(tensor.shape), trained.get(name, torch.float32))
        for name, tensor in (*model.named_parameters(), *_stored_buffers(model, checkpoint))
    }
    first: dict[int, str] = {}
    tied = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    kind = type(model).__name__
    try:
        traced = _Traced(model)
        # A detector's anchors are those of one size of image, which its processor makes; and transformers'
        # code takes the length of its batch for a constant, so the graph looks at one picture at a time.
        size = made_size(checkpoint.folder) if traced.says is not None else None
        inputs, names = _example(model, size)
        outputs = traced.names(inputs)
        made = _export(traced, inputs, names, outputs)
    except Exception as error:  # torch.export raises anything
        raise ValueError(
            f"onnx: {kind} cannot be traced ({_cause(error)}); set export.format: compressed-tensors "
            "or native"
        ) from error
    packed = {slot.key for slot in layout.slots if slot.layer is not None}
    inputs_on = {
        f"{layer}.{local}"
        for layer, spec in layout.layers.items()
        for local in input_constants(spec.activation)
    }
    weights, numbers = {}, {}
    for name, value in list(made.graph.initializers.items()):
        own = name.removeprefix(_PREFIX)
        own = tied.get(own, own)
        if own in packed or own in dense or own in inputs_on:
            del made.graph.initializers[name]
            if own in inputs_on:
                numbers[own] = value.const_value
            else:
                weights[own] = value
            value.name, value.const_value = own, None
            made.graph.initializers[own] = value
    _simplify(made)
    _name_dimensions(made, names)
    for name, value in made.graph.initializers.items():
        if name in numbers:
            value.const_value = numbers[name]
    weights = {name: value for name, value in weights.items() if name in made.graph.initializers}
    if missing := sorted(packed - weights.keys()):
        raise ValueError(
            f"onnx: {missing[0]} is in no path from the inputs to the outputs of {kind}; exclude the layer, "
            "or set export.format: native"
        )
    return Graph(made, weights, {name: facts for name, facts in dense.items() if name in weights})


def skeleton(
    layout: Layout, checkpoint: Checkpoint, exporter: Exporter
) -> tuple[Any, dict[str, torch.dtype]]:
    """(the model in fp32 without weights, its packed layers replaced; the dtype of each dense parameter)."""
    layers: Mapping[str, LayerSpec] = layout.layers
    model = checkpoint.empty_model("sdpa" if _has_sdpa(checkpoint) else "eager")
    if experts := [name for name, module in model.named_modules() if is_experts(module)]:
        raise ValueError(
            f"onnx cannot hold this model: {experts[0]} is a mixture of experts, and a graph has no way from "
            "a token to its experts; set export.format: compressed-tensors or native"
        )
    stand_in(model, layers, fusions_of(layout.matrices.values()))
    for name, spec in layers.items():
        made = onnx_in_place_of(model.get_submodule(name), spec, exporter.specs(spec))
        model.set_submodule(name, made)
    trained = {name: parameter.dtype for name, parameter in model.named_parameters()}
    seen: dict[int, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = seen.setdefault(
                id(parameter),
                nn.Parameter(hollow(tuple(parameter.shape), torch.float32), requires_grad=False),
            )
            module._parameters[name] = kept
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[name] = buffer.float()
    return model, trained


def _has_sdpa(checkpoint: Checkpoint) -> bool:
    """Whether the model has it, and every model inside of it (the backbones of detectors have not)."""
    model = checkpoint.empty_model("eager")
    return all(getattr(m, "_supports_sdpa", True) for m in model.modules()) and hasattr(
        model, "_supports_sdpa"
    )


def _stored_buffers(model: nn.Module, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Buffers whose values are in the files (running means)."""
    for prefix, module in model.named_modules():
        if isinstance(module, OnnxLinear | OnnxEmbedding):
            continue
        for short, buffer in module.named_buffers(prefix, recurse=False):
            kept = short.rpartition(".")[2] not in module._non_persistent_buffers_set
            if kept and buffer.is_floating_point() and checkpoint.has_weight_for(short):
                yield short, buffer


class _Traced(nn.Module):
    """{name: input} -> the outputs, one behind the other."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        purpose = purpose_of(model.config)
        # a detector has what it says behind every layer, too
        self.says = SAYS.get(purpose.auto) if purpose is not None else None
        self.cached = _cache_argument(model)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._outputs(inputs).values())

    def _outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: tensor for name, tensor in inputs.items() if name in INPUTS}
        if self.cached is None:
            made = self.model(**given, **({"use_cache": False} if self.model.can_generate() else {}))
            said = self.says or made.keys()
            return {name: made[name] for name in said if isinstance(made[name], Tensor)}
        cache = _empty_cache(self.model)
        for layer in range(len(cache.layers)):
            past = (inputs[f"past_key_values.{layer}.{part}"] for part in ("key", "value"))
            cache.update(*past, layer)
        logits = self.model(**given, **{self.cached: cache}, use_cache=True).logits
        return {"logits": logits} | {
            f"present.{number}.{part}": tensor
            for number, layer in enumerate(cache.layers)
            for part, tensor in (("key", layer.keys), ("value", layer.values))
        }

    def names(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """Of the outputs, without computing them."""
        from torch._subclasses.fake_tensor import FakeTensorMode  # heavy

        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), uncached():
            return list(self._outputs(dict(inputs)))


def _cache_argument(model: Any) -> str | None:
    """How the forward calls a cache that is plain in all layers; None: traced without one."""
    taken = inspect.signature(model.forward).parameters
    found = next((name for name in ARGUMENTS if name in taken), None)
    if found is None or not model.can_generate():
        return None
    from transformers.cache_utils import DynamicLayer  # heavy

    layers = _empty_cache(model).layers
    return found if layers and all(type(layer) is DynamicLayer for layer in layers) else None


def _empty_cache(model: Any) -> Any:
    from transformers import DynamicCache  # heavy

    return DynamicCache(config=model.config)


def _example(
    model: Any, image: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """(inputs of a traced forward, the names of their dimensions). image: the height and width of the only
    images that it takes; None: as config.json says."""
    taken = inspect.signature(model.forward).parameters
    cached = _cache_argument(model)
    past = SIZES["past_sequence_length"] if cached else 0
    sizes = SIZES | {"total_sequence_length": SIZES["sequence_length"] + past}
    if model.main_input_name in NOISY:
        one = example_of(model.config.to_dict(), purpose_of(model.config))
        dims = {name: NOISY[name] + ("",) * (value.dim() - 1) for name, value in one.items()}
        return {k: v.repeat_interleave(sizes["batch_size"], 0) for k, v in one.items()}, dims
    wanted = [name for name in INPUTS if name in taken and name not in NOISY]
    if model.main_input_name == "pixel_values":
        wanted = ["pixel_values"]
    if model.can_generate() and "token_type_ids" in wanted:
        wanted.remove("token_type_ids")  # GPT-2's, which nobody gives
    if not model.can_generate() and "position_ids" in wanted:
        wanted.remove("position_ids")  # encoders count from 0 themselves
    names, inputs = {}, {}
    for name in wanted:
        dims = INPUTS[name]
        if not cached:
            dims = tuple("sequence_length" if dim == "total_sequence_length" else dim for dim in dims)
        if name == "pixel_values":
            size, count = image or getattr(model.config, "image_size", None), sizes["batch_size"]
            # A convolutional network takes images of every size.
            names[name] = (
                ("batch_size", "", "height", "width") if size is None else ("batch_size", "", "", "")
            )
            if image is not None:
                names[name], count = ("", "", "", ""), 1
            height, width = (224, 256) if size is None else (size, size) if isinstance(size, int) else size
            channels = getattr(model.config, "num_channels", 3)
            inputs[name] = torch.zeros(count, channels, height, width)
            continue
        made = torch.zeros([sizes[dim] for dim in dims], dtype=torch.long)
        inputs[name], names[name] = made + (name == "attention_mask"), dims
        if name == "position_ids":
            inputs[name] = made + past + torch.arange(made.shape[1])
    if cached:
        for layer, (keys, values) in enumerate(_cache_shapes(model, inputs, cached)):
            for part, (_, heads, _, dim) in (("key", keys), ("value", values)):
                name = f"past_key_values.{layer}.{part}"
                inputs[name], names[name] = torch.zeros(sizes["batch_size"], heads, past, dim), KEYS
    return inputs, names


def _cache_shapes(model: Any, inputs: Mapping[str, Tensor], cached: str) -> list[tuple[Any, Any]]:
    """[B, heads, L, D] of the keys and of the values of every layer, as the model's forward makes them."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # heavy

    cache = _empty_cache(model)
    given = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model(**given, **{cached: cache}, use_cache=True)
    return [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]


def _export(
    traced: nn.Module, inputs: dict[str, Tensor], names: Mapping[str, tuple[str, ...]], outputs: list[str]
) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        name: {number: dynamic for number, dim in enumerate(dims) if dim} for name, dims in names.items()
    }
    with torch.no_grad(), _quiet():
        program = torch.export.export(traced, (inputs,), dynamic_shapes=(shapes,), strict=False)
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
    assert made is not None
    return made.model


def _simplify(model: Any) -> None:
    """Fold what is constant without the weights; ONNX Runtime fuses the rest when it opens the file."""
    import onnxscript.optimizer  # optional
    from onnx_ir.passes.common import IdentityEliminationPass  # optional

    with _quiet():
        onnxscript.optimizer.optimize(model, num_iterations=1, onnx_shape_inference=False)
        IdentityEliminationPass()(model)
    for node in model.graph:  # where in our code a node comes from is nobody's business
        node.metadata_props.clear()
        node.doc_string = None


def _name_dimensions(model: Any, names: Mapping[str, tuple[str, ...]]) -> None:
    """Names of ours for the dimensions of inputs and outputs; nothing is said of those between."""
    import onnx_ir  # optional

    known: dict[str, str] = {}
    for value in model.graph.inputs:
        dims = names[value.name]
        for old, new in zip(value.shape, dims, strict=True):
            if new:
                known[str(old)] = new
        value.shape = onnx_ir.Shape([new if new else old for old, new in zip(value.shape, dims, strict=True)])
    for value in model.graph.outputs:
        total = "present" in value.name
        value.shape = onnx_ir.Shape(
            [
                dim
                if isinstance(dim, int)
                else known.get(str(dim), "total_sequence_length" if total else str(dim))
                for dim in value.shape
            ]
        )
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in ends:
                value.shape = value.type = None


def _cause(error: BaseException) -> str:
    """The first error of a chain, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's remarks on packages that are not here and on ways of its own."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

"""transformers: `AutoModelForCausalLM.from_pretrained(native folder)` gives a model of PackedLinears, packed
from disk to forward.

Importing this module registers `quant_method: lowbit_ft`; `import lowbit_ft` does so (see __init__.py).
Without it transformers stops at a missing file whose name says so (export/native.py).

A folder may be read into another class than it was written for: AutoModelForSequenceClassification puts a
new head on, AutoModel takes the head off. What is new by design, which is what the class that wrote the
folder does not have, is initialised as transformers does it, and said; what only that class has is left out,
and said.

Before any weight is read the files' headers are compared with the model: a missing tensor, one of the wrong
shape or dtype, or a truncated file is an error that names the layer and the file. (transformers itself would
warn, and fill in random numbers.) The layers accept `dtype=` of any kind: packed tensors and scales keep
their own, and the forward follows its input. `device_map` is transformers' own; packed tensors are buffers,
so a map that offloads needs `offload_buffers=True` to move them too. `generate`, `pipeline` and (through
`lowbit-ft serve`) `transformers serve` need nothing of their own.
"""

import copy
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..activations.place import place, scheme_of
from ..adapters.attach import adapted_layers, packed_layers
from ..export.base import LayerSpec, check_values
from ..export.native import METHOD, STOP_KEY, VERSION, Native, layers_from_config
from ..files.tensorfile import DTYPES, parse_header
from ..grid import empty_weight
from ..kv_cache import KVConfig, kv_config_of, place_kv_cache
from ..model.fused import Fusion, check_parts, part_rows
from ..model.kinds import matrix_shape, packed_in_place_of
from ..model.linear import leave_out_of_ddp
from ..model.matrices import Matrix, find_matrices, fusions_of, stand_in
from ..model.statistics import hold_statistics
from ..rotations import OnlineHadamard

Spec = TypeVar("Spec")  # of a layer, or nothing


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a native folder: the layers of each grid, by name (see export/native.py)."""

    def __init__(
        self,
        grids: Any = None,
        skipped: Any = (),
        version: Any = VERSION,
        activations: Any = None,
        hadamard: Any = (),
        kv_cache: Any = None,
        fused: Any = None,
        **kwargs: Any,
    ):
        if unknown := sorted(set(kwargs) - {"quant_method"}):
            raise ValueError(f"quantization_config of {METHOD}: unknown keys {', '.join(unknown)}")
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  (typed as an enum of transformers' own)
        self.version, self.grids, self.skipped = version, grids, list(skipped)
        if activations is not None:
            self.activations = activations
        if fused is not None:
            self.fused = fused
        if kv_cache is not None:
            self.kv_cache = KVConfig.from_json(kv_cache).to_json()
        layers = layers_from_config(self.to_dict())  # refuses a damaged one here, before a model is built
        if not isinstance(hadamard, list | tuple) or not set(hadamard) <= set(layers):
            raise ValueError(f"quantization_config.hadamard: got {hadamard!r}; needs names of packed layers")
        if hadamard:
            self.hadamard = list(hadamard)

    @classmethod
    def of(cls, model: nn.Module) -> "PackedConfig":
        """The configuration of a model's packed layers."""
        parts = part_rows(model)
        layers = {
            name: replace(LayerSpec.of(layer.base), activation=scheme_of(layer), rows=parts.get(name))
            for name, layer in packed_layers(model)
        }
        skipped = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        config, kv_cache = Native().model_config(layers, skipped), kv_config_of(model)
        turned = [name for name, layer in packed_layers(model) if layer.input_transform is not None]
        return cls(**config, hadamard=turned, kv_cache=None if kv_cache is None else kv_cache.to_json())

    @property
    def layers(self) -> dict[str, LayerSpec]:
        return layers_from_config(self.to_dict())


class PackedQuantizer(HfQuantizer):
    """Replaces the listed Linears before loading, and checks what was loaded."""

    requires_calibration = True  # reads packed checkpoints; making them is `lowbit-ft quantize`

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any):
        if not kwargs.get("pre_quantized", True):
            raise ValueError(
                f"{METHOD} reads packed folders, and this checkpoint is dense: to pack it while it loads "
                "give quantization_config=lowbit_ft.LowBitQuantConfig(bits=4), or pack it first "
                "(lowbit-ft quantize MODEL) and load the folder that it writes"
            )
        super().__init__(quantization_config, **kwargs)

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that transformers (5.18 on) says of the model's config, before it looks for files."""
        if hasattr(config, STOP_KEY):
            delattr(config, STOP_KEY)  # it stops readers without us (export/native.py)
        return config

    update_tp_plan = update_attn_implementation  # what transformers before 5.20 calls at that place

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers, new = named_in(model, self.quantization_config.layers), frozenset[str]()
        if (writer := other_writer(model)) is not None:
            layers, new = in_another_class(model, writer, layers)
        put_empty(model, layers)
        turned = named_in(model, dict.fromkeys(getattr(self.quantization_config, "hadamard", ())))
        for name in turned.keys() & layers.keys():
            model.get_submodule(name).input_transform = OnlineHadamard()
        files = kwargs.get("checkpoint_files")
        if files:
            check_headers(model, layers, [Path(file) for file in files], new)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in packed_layers(model):
            if any(tensor.is_meta for tensor in layer.buffers()):
                continue  # offloaded to disk by a device map
            try:
                check_values(layer.base)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None
        if (kv_cache := getattr(self.quantization_config, "kv_cache", None)) is not None:
            place_kv_cache(model, KVConfig.from_json(kv_cache))
        hold_statistics(model)
        leave_out_of_ddp(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Runs at the start of save_pretrained: the layers' grids may have changed since loading (a merge
        drops residuals).
        """
        if names := [name for name, _ in adapted_layers(model)]:
            raise ValueError(
                f"{len(names)} layers have adapters ({names[0]}, ...), which save_pretrained cannot keep: "
                "merge them first "
                "(lowbit_ft.merge writes the merged folder)"
            )
        self.quantization_config = model.config.quantization_config = PackedConfig.of(model)
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train over the packed layers (`lowbit_ft.adapters.attach`, PEFT)."""
        return True


def put_empty(model: Any, layers: dict[str, LayerSpec]) -> None:
    """Put packed layers without values (on meta) in the place of these. ValueError for one that the model has
    not, or has in another shape."""
    stand_in(model, layers, fusions_for(model, layers))
    for name, spec in layers.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"quantization_config names the layer {name!r}, which this {type(model).__name__} has not"
            ) from None
        found = matrix_shape(linear) or type(linear).__name__
        if found != spec.shape:
            raise ValueError(f"quantization_config: layer {name} is {spec.shape}; this model's is {found}")
        base, bias = empty_weight(spec.shape, spec.grid, "meta", spec.offset), getattr(linear, "bias", None)
        bias = None if bias is None else torch.empty_like(bias, device="meta")
        packed = packed_in_place_of(linear, base, bias, linear.weight.dtype)  # pyright: ignore[reportArgumentType]
        place(packed, spec.activation)
        model.set_submodule(name, packed)


def named_in(model: Any, layers: dict[str, Spec]) -> dict[str, Spec]:
    """The layers under the names they have in this model. A folder written with the head on is also read
    without it (AutoModel), and the other way round: the decoder's prefix is then one more, or one less, in
    the names."""
    prefix, known = f"{model.base_model_prefix}.", find_matrices(model)

    def here(name: str, spec: Spec) -> str:
        whole = whole_of(name, spec)
        found = next((n for n in (whole, whole.removeprefix(prefix), prefix + whole) if n in known), whole)
        return found + name.removeprefix(whole)

    return {here(name, spec): spec for name, spec in layers.items()}


def whole_of(name: str, spec: Any) -> str:
    """The linear of the dense model that a layer is, or is a part of."""
    return name if getattr(spec, "rows", None) is None else name.rpartition(".")[0]


def fusions_for(model: Any, layers: dict[str, LayerSpec]) -> dict[str, Fusion]:
    """The matrices of this model that are in parts. ValueError where it has no such, or other rows."""
    apart = fusions_of(Matrix(name, "", spec.shape, rows=spec.rows) for name, spec in layers.items())
    known = find_matrices(model)
    for name, fusion in apart.items():
        matrix = known.get(name)
        if matrix is None or matrix.expert is not None or matrix.embedding or matrix.conv:
            raise ValueError(
                f"quantization_config.fused: {name} is no linear of this {type(model).__name__}, so it has "
                "no parts"
            )
        check_parts(fusion.values(), matrix.shape[0], f"quantization_config.fused: {name}")
    return apart


def other_writer(model: Any) -> frozenset[str] | None:
    """The tensors of the class that wrote the folder (config.architectures), without its prefix. None when
    it is the model's own class, or none that transformers knows.
    """
    for name in model.config.architectures or ():
        kind = getattr(transformers, name, None)
        if kind is type(model):
            return None
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            with torch.device("meta"):
                tensors = kind(copy.deepcopy(model.config)).state_dict()
            return frozenset(key.removeprefix(f"{kind.base_model_prefix}.") for key in tensors)
    return None


def in_another_class(
    model: Any, writer: frozenset[str], layers: dict[str, LayerSpec]
) -> tuple[dict[str, LayerSpec], frozenset[str]]:
    """(the packed layers that this model has, its tensors that the writer had not), with a word on either."""
    prefix, known = f"{model.base_model_prefix}.", find_matrices(model)
    # What gives the logits of a language model is never new by design: drawn at random it is a broken one.
    logits = model.get_output_embeddings()
    kept = {name for name, module in model.named_modules() if module is logits}
    new = frozenset(
        key
        for key in model.state_dict().keys() - set(model.all_tied_weights_keys)
        if key.removeprefix(prefix) not in writer and key.rpartition(".")[0] not in kept
    )
    wholes = {name: whole_of(name, spec) for name, spec in layers.items()}
    gone = [n for n, w in wholes.items() if w not in known and f"{w.removeprefix(prefix)}.weight" in writer]
    kind = f"this folder was written by {', '.join(model.config.architectures)}, and {type(model).__name__}"
    if new:
        warnings.warn(
            f"{kind} has {', '.join(sorted(new))} besides: new, initialised at random; train them "
            "(modules_to_save) before they are used",
            stacklevel=2,
        )
    if gone:
        warnings.warn(f"{kind} has no {', '.join(gone)}: left out", stacklevel=2)
    return {name: spec for name, spec in layers.items() if name not in gone}, new


def mark_packed(model: Any) -> None:
    """Tell transformers that a model of PackedLinears, however it was made, is quantized by us: its
    save_pretrained then writes a native folder."""
    model.hf_quantizer = PackedQuantizer(PackedConfig.of(model), pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    hold_statistics(model)
    leave_out_of_ddp(model)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    # Not at the top: this module is imported in the middle of transformers' own import.
    from transformers import PreTrainedModel

    for module in (
        model.modules()
    ):  # as from_pretrained does: some models then call a layer whose weight they read otherwise
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def check_headers(
    model: Any, layers: dict[str, LayerSpec], files: list[Path], new: frozenset[str] = frozenset()
) -> None:
    """Compare the files' headers with the model that is about to be filled. new: tensors that need not be in
    them. ValueError listing every difference.

    Names go through transformers' own renaming, as they will when it loads.
    """
    from transformers import conversion_mapping, core_model_loading

    state = model.state_dict(keep_vars=True)
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
    renames = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
    prefix, by_pattern = model.base_model_prefix, {p: c for c in converters for p in c.source_patterns}
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    fused: set[str] = (
        set()
    )  # made of several tensors of the files, or parts of one: their shapes are transformers' business
    for path in files:
        for key, entry in parse_header(path)[1].items():
            name, pattern = core_model_loading.rename_source_key(key, renames, converters, prefix, state)
            if name not in state:
                name, pattern = core_model_loading.rename_source_key(key, [], [], prefix, state)
            if pattern is None:
                found[name] = (path, entry)
            else:
                first, *others = by_pattern[pattern].target_patterns
                fused |= {name, *(name.replace(first, other) for other in others)}
    optional = fused | set(model.all_tied_weights_keys)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    problems = []
    for name, tensor in state.items():
        layer, _, local = name.rpartition(".")
        what = f"layer {layer} ({layers[layer]})" if layer in layers else "the model"
        if name in found:
            path, entry = found[name]
            dtype = DTYPES[entry["dtype"]]
            if tuple(entry["shape"]) != tuple(tensor.shape):
                problems.append(
                    f"{path}: {name} has shape {entry['shape']}; {what} needs {list(tensor.shape)}"
                )
            elif layer in layers and local != "bias" and dtype != tensor.dtype:
                problems.append(f"{path}: {name} has dtype {dtype}; {what} needs {tensor.dtype}")
        elif name not in optional | new and not any(pattern.search(name) for pattern in ignored):
            problems.append(f"{files[0].parent}: no file has {name}, which {what} needs")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError("these files do not hold this model:\n  " + "\n  ".join(problems[:20]) + more)


# Not the register_* functions of transformers as decorators: they refuse a second time, and a module may be
# imported again (importlib.reload, a notebook); the two dicts are what those functions fill.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedConfig
AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer

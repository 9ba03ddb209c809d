"""Reading back what writer.py wrote: `read_weights` (layers of a native folder, no model is built) and
`load_exported` (a model).

`read_weights` is how `base/` and `merged/` of a run are used again, one layer at a time straight from the
files. A folder of ours is compared with its manifest first. What is in a file is data from a
stranger all the same: headers are checked before anything is read, every tensor
against the layer's spec, and values for what no writer of ours makes.
"""

import hashlib
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.errors import reading
from ..files.manifest import MANIFEST
from ..files.tensorfile import CheckpointError, read_tensor
from ..grid import Weight
from ..model.config import (
    CONFIG,
    GENERATION,
    answered,
    check_counts,
    load_config,
    read_config,
    stop_ids,
    stored_dtype,
)
from ..model.hub import refuse_irregular, tensor_entries
from ..model.mapped import to_device
from ..model.meta import model_class
from ..model.purpose import purpose_of
from ..model.shipped import Trained
from . import EXPORTERS
from .base import Weights
from .folder import check_if_ours, read_manifest, tensor_bytes
from .native import Native, layers_from_config


def read_weights(folder: str | Path, device: str | torch.device = "cpu") -> Weights:
    """The packed layers of a native folder; each access reads that layer's tensors. Headers are checked here
    and now.

    ValueError naming the folder and layer for anything that does not fit, or that is not what its manifest
    says.
    """
    root = Path(folder)
    check_if_ours(root)
    config = read_config(root).get("quantization_config")
    exporter = Native()
    try:
        specs = layers_from_config(config)
    except ValueError as error:
        raise ValueError(f"{root / 'config.json'}: {error}") from None
    entries, problems = tensor_entries(root)
    if not problems:
        check_counts(root / CONFIG, read_config(root), entries)
    if problems:
        raise CheckpointError("\n".join(problems))
    for name, spec in specs.items():
        for local, (shape, dtype) in exporter.specs(spec).items():
            entry = entries.get(f"{name}.{local}")
            if entry is None:
                raise ValueError(f"{root}: layer {name} ({spec}) has no tensor {name}.{local} in the files")
            if entry.shape != shape or entry.dtype != dtype:
                raise ValueError(
                    f"{entry.file}: {name}.{local} is {entry.dtype} {entry.shape}; {spec} of shape "
                    f"{spec.shape} needs {dtype} {shape}"
                )

    def make(name: str) -> Weight:
        spec = specs[name]
        tensors = {local: read_tensor(entries[f"{name}.{local}"], device) for local in exporter.specs(spec)}
        try:
            return exporter.unpack(tensors, spec)
        except ValueError as error:
            raise ValueError(f"{root}: layer {name}: {error}") from None

    return Weights(specs, make)


def read_trained(folder: str | Path) -> dict[str, Trained]:
    """The dense tensors of a native folder that were trained (its manifest says which), by the names of the
    model's parameters; each is read, and compared with the manifest, when it is asked for. Empty for a folder
    without such, or without a manifest. ValueError naming one that is not what the manifest says."""
    root = Path(folder)
    if not (root / MANIFEST).is_file():
        return {}
    facts, entries = read_manifest(root).get("trained") or {}, tensor_entries(root)[0]

    def value(name: str, key: str, digest: str) -> Tensor:
        tensor = read_tensor(entries[key], "cpu")
        if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != digest:
            raise ValueError(f"{root}: {key} is not the {name} that was trained; run the line again")
        return tensor

    found = {}
    for name, fact in facts.items():
        key = str(fact.get("stored_as") if isinstance(fact, dict) else None)
        if (entry := entries.get(key)) is None:
            raise ValueError(f"{root}: {name} was trained, says its manifest, and the files have no {key}")
        found[name] = Trained(entry.shape, entry.dtype, partial(value, name, key, str(fact.get("sha256"))))
    return found


def load_exported(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu", attention: str | None = None
) -> Any:
    """The model in a folder of any of our formats (or a plain one), by transformers' from_pretrained, in eval
    mode.

    dtype None: the one of config.json. Native folders stay packed and can be trained on; compressed-tensors
    ones become dense. What is packed is not copied on a CPU: it stays in the pages of the files
    (model/mapped.py). ValueError when a folder of ours is not what its manifest says.
    """
    check_if_ours(folder)
    whole = read_config(folder)
    config, options, as_served, drops = whole.get("quantization_config"), {}, None, False
    kind = dtype or stored_dtype(Path(folder) / CONFIG, whole)
    method = config.get("quant_method") if isinstance(config, dict) else None
    for exporter in [e for e in EXPORTERS.values() if e.quant_method == method][:1]:
        if reason := exporter.missing(exporter.reads_with):
            raise ValueError(f"{folder}: reading {exporter.name} {reason}")
        if (model := exporter.open(Path(folder), kind)) is not None:
            return model.eval()
        options = exporter.load_options(whole["quantization_config"], Path(folder))
        as_served, drops = exporter.as_served, exporter.drops_generation
    refuse_irregular(Path(folder))
    stop_ids(Path(folder) / GENERATION)  # which transformers believes
    config_file = Path(folder) / CONFIG
    with (
        warnings.catch_warnings(),
        answered(config_file, "the model cannot be loaded"),
        reading(folder),
    ):
        # It tells that our options win over the folder's, which is why they are given.
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        made = load_config(folder)
        purpose = purpose_of(made)
        model = (model_class(made) if purpose is None else purpose.auto_class()).from_pretrained(
            str(folder),
            dtype=kind if method else dtype or "auto",
            device_map=None if device == "cpu" or method == Native.quant_method else device,
            attn_implementation=attention,  # None: the best one the model has
            local_files_only=True,
            trust_remote_code=False,
            **{"config": made, **options},  # a GGUF file brings its own
        )
        if drops and model.can_generate():
            model.generation_config = _generation(Path(folder), made)
    if as_served is not None:
        as_served(model, whole["quantization_config"])
    if method == Native.quant_method and device != "cpu":
        model = to_device(model, device, folder)
    return model.eval()


def _generation(folder: Path, config: Any) -> Any:
    """The folder's generation_config.json, or what transformers makes of its configuration without one: the
    stop tokens, for a reader that leaves them aside."""
    from transformers import GenerationConfig  # slow: seconds, and folders are checked without

    if not (folder / GENERATION).is_file():
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_pretrained(str(folder), local_files_only=True)


def outside_torch(folder: str | Path) -> str | None:
    """The format of a folder whose reader makes no torch model of it; None of any other."""
    method = (read_config(folder).get("quantization_config") or {}).get("quant_method")
    found = (e.name for e in EXPORTERS.values() if e.quant_method == method and not e.measurable)
    return next(found, None)

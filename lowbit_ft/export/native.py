"""native: the tensors as they are in memory (P16 planes), every grid, with residual, mask and float offset.

    <layer>.codes int16 [N, W]   .scale [G, N]   .zero uint8 [G, N]?   .residual int16 [N, W_f]?   .offset [G,
                                 N]?             .mask int16 [N, W_1]?
    <layer>.planes int16 [q, N, W]   .scale [q, G, N]                                              (binary
                                     grid)

Packing is the identity. This is the format of a run's `base/` (with the residual, so it can be trained again)
and `merged/`; after `import lowbit_ft`, `AutoModelForCausalLM.from_pretrained` reads it and the model stays
packed. config.json lists the layers of each grid by name: nothing is matched by pattern, so nothing is
quantized or skipped by accident. What a layer's input is on stands there too, under `activations`; static
scales are in it, as numbers. What keys and values are on is under `kv_cache`; which layers are parts of a
fused matrix, and which of its rows, under `fused` (model/fused.py).

Without us transformers would warn about an unknown quant_method, start from random weights and exit with 0.
So config.json names a file of weights that is not there and whose name is the message (`STOP`, under the key
`transformers_weights`): transformers stops at it. Our reader (integrations/transformers.py) puts the key
aside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..activations import Scheme, read_scheme
from ..grid import WEIGHTS, Grid, PackedWeight, Weight, grid_from_json
from ..model.fused import Segment, check_parts
from ..model.matrices import Matrix, fusions_of
from ..model.names import Part
from ..segments import is_name, is_segment
from .base import Exporter, LayerSpec, ReadBack, TensorSpecs, check_tensors, check_values

METHOD = "lowbit_ft"
VERSION = 1
STOP_KEY = "transformers_weights"
STOP = f"import lowbit_ft before this folder is read (its reader, version {VERSION}).safetensors"


class Native(Exporter):
    name = "native"
    quant_method = METHOD
    no_online = None
    carries_kv_cache = True
    read_first = (
        "**`import lowbit_ft` first** (`pip install lowbit-ft`): it teaches transformers this format.\n"
        "> Without it transformers stops at a missing file whose name says so; an older one warns, and\n"
        "> starts from random weights."
    )

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        return None

    def reject_matrix(self, matrix: Matrix, grid: Grid, parts: Sequence[Part] | None) -> str | None:
        return None

    def reject_activation(self, scheme: Scheme, grid: Grid, in_features: int | None = None) -> str | None:
        return None

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        return WEIGHTS[layer.grid.kind].specs(layer.shape, layer.grid, layer.offset)  # pyright: ignore[reportArgumentType]

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        return weight.to_tensors()

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        check_tensors(tensors, self.specs(layer), str(layer))
        weight = WEIGHTS[layer.grid.kind].from_tensors(tensors, layer.shape, layer.grid)  # pyright: ignore[reportArgumentType]
        check_values(weight)
        return weight

    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        groups: dict[tuple[Grid, bool], dict[str, list[int]]] = {}
        for name, spec in layers.items():
            groups.setdefault((spec.grid, spec.offset), {})[name] = list(spec.shape)
        grids = [
            {**grid.to_json(), "offset": offset, "layers": names} for (grid, offset), names in groups.items()
        ]
        config = {"quant_method": METHOD, "version": VERSION, "grids": grids, "skipped": list(skipped)}
        return config | activation_entry(layers) | _fused_entry(layers)

    def folder_config(self) -> dict[str, Any]:
        return {STOP_KEY: STOP}

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        weight = self.unpack(tensors, layer)  # the format's own reader is this one
        if isinstance(weight, PackedWeight):
            return ReadBack(weight.unpack_codes(), weight.scale, weight.zero, weight.offset)
        return ReadBack(weight.unpack_codes(), weight.scale)

    def dense(self, model: Any, layer: str, matrix: Matrix | None, dtype: torch.dtype) -> Tensor | None:
        return model.get_submodule(layer).base.dequantize(dtype)

    def serve(self, folder: str) -> str:
        return f"lowbit-ft serve {folder}"

    def use(self, folder: str) -> str:
        code = super().use(folder).replace("from transformers", "import lowbit_ft\nfrom transformers", 1)
        return f"The layers stay packed in memory.\n\n{code}"


def layers_from_config(config: Any) -> dict[str, LayerSpec]:
    """The inverse of `model_config`. ValueError naming the entry that is wrong."""
    if not isinstance(config, dict):
        raise ValueError(f"quantization_config: got {type(config).__name__}; needs an object")
    if config.get("quant_method") != METHOD:
        raise ValueError(
            f"quantization_config.quant_method: got {config.get('quant_method')!r}; this reads {METHOD!r}"
        )
    if config.get("version") != VERSION or isinstance(config["version"], bool):
        raise ValueError(
            f"quantization_config.version: got {config.get('version')!r}; this lowbit_ft "
            f"reads version {VERSION}; "
            "install the version that wrote the folder"
        )
    grids = config.get("grids")
    if not isinstance(grids, list):
        raise ValueError(f"quantization_config.grids: got {type(grids).__name__}; needs a list")
    layers: dict[str, LayerSpec] = {}
    for i, entry in enumerate(grids):
        where = f"quantization_config.grids[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("layers"), dict):
            raise ValueError(
                f"{where}: needs an object with a grid's fields and `layers`: {{name: [out, in]}}"
            )
        fields = {key: value for key, value in entry.items() if key not in ("layers", "offset")}
        offset = entry.get("offset", False)
        if not isinstance(offset, bool):
            raise ValueError(f"{where}.offset: got {offset!r}; allowed are true, false")
        try:
            grid = grid_from_json(fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from None
        for name, shape in entry["layers"].items():
            whole = (
                isinstance(shape, list)
                and len(shape) == 2
                and all(type(v) is int and 0 < v < 1 << 31 for v in shape)
            )
            if not whole:
                raise ValueError(
                    f"{where}.layers: {name}: got shape {shape!r}; needs [out, in], both positive"
                )
            if name in layers:
                raise ValueError(f"{where}.layers: {name} is listed twice")
            layers[name] = LayerSpec((shape[0], shape[1]), grid, offset)
    if not layers:
        raise ValueError("quantization_config.grids: lists no layer")
    return _with_activations(_with_rows(layers, config.get("fused", [])), config.get("activations", []))


def activation_entry(layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """The key `activations` of quantization_config: every scheme with the names of its layers; no key where
    no input is quantized.
    """
    names: dict[Scheme, list[str]] = {}
    for name, spec in layers.items():
        if spec.activation is not None:
            names.setdefault(spec.activation, []).append(name)
    entries = [{**scheme.to_json(), "layers": found} for scheme, found in names.items()]
    return {"activations": entries} if entries else {}


def _fused_entry(layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """The key `fused` of quantization_config: the rows of every part with the names of the matrices that are
    in such parts; no key where none is."""
    apart = fusions_of(Matrix(name, "", spec.shape, rows=spec.rows) for name, spec in layers.items())
    alike: list[tuple[dict[str, Any], list[str]]] = []
    for name, fusion in apart.items():
        parts = {part: rows.to_json() for part, rows in fusion.items()}
        found = next((names for other, names in alike if other == parts), None)
        if found is None:
            alike.append((parts, [name]))
        else:
            found.append(name)
    return {"fused": [{"parts": parts, "layers": names} for parts, names in alike]} if alike else {}


def _with_rows(layers: dict[str, LayerSpec], entries: Any) -> dict[str, LayerSpec]:
    """The inverse of `_fused_entry`. ValueError naming the entry that is wrong."""
    key, found = "quantization_config.fused", dict(layers)
    if not isinstance(entries, list):
        raise ValueError(f"{key}: got {type(entries).__name__}; needs a list")
    for i, entry in enumerate(entries):
        parts, names = (entry.get(k) if isinstance(entry, dict) else None for k in ("parts", "layers"))
        if not isinstance(parts, dict) or not parts or not isinstance(names, list):
            raise ValueError(f"{key}[{i}]: needs an object with `parts` and `layers`")
        rows = {}
        for part, row in parts.items():
            if not is_name(part):
                raise ValueError(f"{key}[{i}].parts: got {part!r}; allowed: q, k, v, gate, up, or a number")
            if not is_segment(row):
                raise ValueError(f"{key}[{i}].parts.{part}: got {row!r}; needs [start, width, count, stride]")
            rows[part] = Segment(*row)
        for name in names:
            own = {f"{name}.{part}": segment for part, segment in rows.items()}
            if lost := [one for one in own if one not in layers]:
                raise ValueError(f"{key}[{i}]: {lost[0]!r} is no layer of grids")
            for one, segment in own.items():
                if found[one].rows is not None:
                    raise ValueError(f"{key}[{i}]: {one} is listed twice")
                if (n := layers[one].shape[0]) != segment.size:
                    raise ValueError(f"{key}[{i}]: {one} has {n} rows; rows {segment} are {segment.size}")
                found[one] = replace(layers[one], rows=segment)
            check_parts(rows.values(), sum(s.size for s in rows.values()), f"{key}[{i}]: {name}")
    return found


def _with_activations(layers: dict[str, LayerSpec], entries: Any) -> dict[str, LayerSpec]:
    """The inverse of `activation_entry`. ValueError naming the entry that is wrong."""
    key = "quantization_config.activations"
    if not isinstance(entries, list):
        raise ValueError(f"{key}: got {type(entries).__name__}; needs a list")
    found = dict(layers)
    for i, entry in enumerate(entries):
        names = entry.get("layers") if isinstance(entry, dict) else None
        if not isinstance(names, list):
            raise ValueError(f"{key}[{i}]: needs an object with a scheme's fields and `layers`: [name, ...]")
        try:
            scheme = read_scheme({field: value for field, value in entry.items() if field != "layers"})
        except ValueError as error:
            raise ValueError(f"{key}[{i}].{error}") from None
        for name in names:
            if not isinstance(name, str) or name not in layers:
                raise ValueError(f"{key}[{i}].layers: {name!r} is no layer of grids")
            if found[name].activation is not None:
                raise ValueError(f"{key}[{i}].layers: {name} is listed twice")
            if scheme.segments and sum(scheme.segments) != layers[name].shape[1]:
                raise ValueError(
                    f"{key}[{i}].segments: got {list(scheme.segments)}, which are "
                    f"{sum(scheme.segments)} channels; {name} has {layers[name].shape[1]} inputs"
                )
            found[name] = replace(layers[name], activation=scheme)
    return found

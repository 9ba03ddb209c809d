"""The tensors of an exported folder as they lie in its files, for verify."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .gguf_file import GgufTensors
from .onnx import DATA, FILE
from .onnx_layers import INPUT


def tensor_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob(DATA)])


class StoredTensors:
    """Layer -> the tensors of each of its parts by local name, through the safetensors library. inputs: layer
    -> what its static input is on, where the files hold that as numbers; None: what is in the folder's
    configuration is what its reader computes with."""

    inputs: Mapping[str, Mapping[str, Tensor]] | None = None

    def __init__(self, folder: Path, prefixes: Mapping[str, str]):
        self.prefixes = prefixes
        self.keys: dict[str, list[tuple[str, Path]]] = {}
        for path in tensor_files(folder):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    prefix, _, local = key.rpartition(".")
                    self.keys.setdefault(prefix, []).append((local, path))

    def __getitem__(self, layer: str) -> list[dict[str, Tensor]]:
        return [self._part(prefix) for prefix in self.prefixes[layer].split("+")]

    def _part(self, prefix: str) -> dict[str, Tensor]:
        tensors = {}
        for local, path in self.keys.get(prefix, []):
            with safe_open(path, framework="pt") as file:
                tensors[local] = file.get_tensor(f"{prefix}.{local}")
        return {local: tensor for local, tensor in tensors.items() if local != "bias"}


class OnnxTensors(StoredTensors):
    """The same, with the inputs of the graph."""

    def __init__(self, folder: Path, prefixes: Mapping[str, str]):
        super().__init__(folder, prefixes)
        self.inputs = _graph_inputs(folder / FILE)


def _graph_inputs(file: Path) -> dict[str, dict[str, Tensor]]:
    """Layer -> its initializers input_scale and input_zero that some node takes, through the onnx library."""
    import onnx  # optional
    from onnx import numpy_helper  # optional

    graph = onnx.load(str(file), load_external_data=False).graph
    taken = {name for node in graph.node for name in node.input}
    found: dict[str, dict[str, Tensor]] = {}
    for tensor in graph.initializer:
        layer, _, local = tensor.name.rpartition(".")
        if local.startswith(INPUT) and tensor.name in taken and not tensor.external_data:
            found.setdefault(layer, {})[local] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    return found


STORED = {
    "safetensors": StoredTensors,
    "gguf": GgufTensors,
    "onnx": OnnxTensors,
}  # by Exporter.container: layer -> its tensors

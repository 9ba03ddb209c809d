"""The tensors of an exported folder as they lie in its files, for verify."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .gguf_file import GgufTensors
from .onnx import DATA


def tensor_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob(DATA)])


class StoredTensors:
    """Layer -> the tensors of each of its parts by local name, through the safetensors library."""

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


STORED = {
    "safetensors": StoredTensors,
    "gguf": GgufTensors,
    "onnx": StoredTensors,
}  # by Exporter.container: layer -> its tensors

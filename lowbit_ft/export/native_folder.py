"""A native folder as a checkpoint: what `merge_and_unload().save_pretrained()` or `lowbit-ft quantize` wrote
can be written in any other format, without the checkpoint that it was made of.

The packed tensors of a layer (of all parts of a fused matrix) stand in the tensor directory as one
`<layer>.weight`, as those of other formats do (incoming/), so names, ties and everything that stays dense
work as for a run. Nobody reads that weight: the integers come from `read_weights`.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..files.tensorfile import CheckpointError, TensorEntry
from ..grid import IntGrid
from ..kv_cache import KVConfig
from ..model.checkpoint import Checkpoint
from ..model.config import load_config, read_config, stored_dtype
from ..model.hub import locate, refuse_irregular
from ..model.linear import PackedLinear
from ..model.matrices import Matrix
from ..model.purpose import purpose_of
from ..rotations import OnlineHadamard
from .base import LayerSpec, Weights
from .folder import check_if_ours, read_manifest
from .native import METHOD
from .reader import read_weights


def is_native(folder: str | Path) -> bool:
    """Whether that is a folder of packed layers in our own format."""
    try:
        entry = read_config(folder).get("quantization_config")
    except ValueError:
        return False
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


class NativeFolder(Checkpoint):
    """The checkpoint behind a native folder; `weights` are its packed layers as they ship, without what only
    training reads. ValueError for a folder that is not one, or not what its manifest says."""

    def __init__(self, folder: str | Path):
        root, _ = locate(str(folder), None)
        refuse_irregular(root)
        check_if_ours(root)
        if not is_native(root):
            raise ValueError(
                f"{folder}: not packed by lowbit_ft (no quantization_config of {METHOD} in its config.json); "
                "give the folder of a run, an adapter, or what merge_and_unload().save_pretrained() wrote"
            )
        whole, values = read_weights(root), read_config(root)
        entry = values["quantization_config"]
        config = load_config(root)
        del config.quantization_config
        super().__init__(
            str(folder), root, None, config, stored_dtype(root / "config.json", values), purpose_of(config)
        )
        for name, spec in whole.specs.items():
            held = {key: e for key, e in self.entries.items() if key.rpartition(".")[0] == name}
            packed = {key: e for key, e in held.items() if not key.endswith(".bias")}
            for key in packed:
                del self.entries[key]
            first = next(iter(packed.values()))
            size, (n, k) = sum(e.nbytes for e in packed.values()), spec.shape
            dense = f"{Matrix(name, '', spec.shape, rows=spec.rows).whole}.weight"
            if spec.rows is not None and (before := self.entries.get(dense)) is not None:
                n, size = n + before.shape[0], size + before.nbytes  # of its other parts
            self.entries[dense] = TensorEntry(first.file, torch.float32, (n, k), 0, size)
        self.weights = shipped(whole)
        self.online_layers = tuple(entry.get("hadamard", ()))
        kv_cache = entry.get("kv_cache")
        self.kv_cache = None if kv_cache is None else KVConfig.from_json(kv_cache)
        if any(".experts." in name for name in whole):
            raise CheckpointError(
                f"{folder}: its experts are packed one by one, and what they were called in the checkpoint "
                "is not in the folder; export from a run (lowbit-ft run, lowbit-ft export RUN)"
            )

    @property
    def base(self) -> str:
        """The model that it was made of, where the folder says so; else the folder."""
        try:
            return str(read_manifest(self.folder)["source"]["path"])
        except (ValueError, KeyError, TypeError):
            return str(self.folder)

    def online(self, model: nn.Module) -> None:
        for name in self.online_layers:
            if isinstance(layer := model.get_submodule(name), PackedLinear):
                layer.input_transform = OnlineHadamard()


def shipped(weights: Weights) -> Weights:
    """The same layers without residual and mask."""
    specs = {name: _shipped(spec) for name, spec in weights.specs.items()}
    return Weights(specs, lambda name: weights[name].without_residual())


def _shipped(spec: LayerSpec) -> LayerSpec:
    return replace(spec, grid=spec.grid.deployed) if isinstance(spec.grid, IntGrid) else spec

"""The gguf container: one file, its tensors in one row, written and read one at a time.

`GgufFile` is what writer.py calls for a format whose container is "gguf"; `GgufTensors` gives verify the
packed layers back, with their rows in the model's order. The gguf package makes the header and the metadata
and pads the tensors.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.errors import FileError
from ..model.checkpoint import Checkpoint
from ..model.config import read_config
from .base import Exporter, Weights
from .folder import layer_digests, tensor_bytes
from .gguf import block_type
from .gguf_model import FILE, Names, describe, rope_divisors
from .gguf_tokenizer import write_tokenizer
from .layout import Layout, Slot

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class GgufFile:
    """The plan of one file. `nbytes` is what it needs on the disk; `write` makes it and returns the digests
    of every layer.
    """

    def __init__(self, layout: Layout, checkpoint: Checkpoint, exporter: Exporter, max_shard_bytes: int):
        self.config = checkpoint.config.to_dict()
        self.names = Names(self.config)
        self.layout, self.checkpoint, self.exporter = layout, checkpoint, exporter
        # Tied tensors are stored once, as in the checkpoint; those the model does not use (old rotary
        # buffers) stay behind.
        self.dense = {slot: layout.parameters.get(slot.source) for slot in layout.slots if slot.layer is None}
        self.dense = {slot: name for slot, name in self.dense.items() if name is not None}
        for name in [*(f"{layer}.weight" for layer in layout.layers), *self.dense.values()]:
            self.names(str(name))  # refuses what has none, before anything is written
        for slot in self.dense:
            if slot.dtype not in _TYPES:
                raise ValueError(
                    f"{slot.source}: gguf does not hold {slot.dtype}; set export.format: "
                    "compressed-tensors or native"
                )

    @property
    def nbytes(self) -> int:
        tokenizer = sum(path.stat().st_size for path in self.checkpoint.folder.glob("tokenizer*.json"))
        return 2 * tokenizer + sum(
            slot.nbytes * (2 if len(slot.shape) == 1 else 1) + 32 for slot in self.layout.slots
        )

    def write(self, stage: Path, weights: Weights) -> dict[str, dict[str, str]]:
        import gguf

        writer = gguf.GGUFWriter(stage / FILE, self.names.kind.name)
        describe(writer, self.config, f"{Path(self.checkpoint.source).name} lowbit_ft")
        kinds = [block_type(spec.grid, spec.shape[1]).name for spec in self.layout.layers.values()]
        writer.add_file_type(_file_type(max(set(kinds), key=kinds.count)))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_tokenizer(
            writer, self.checkpoint.folder, self.config["vocab_size"], self.checkpoint.chat_template
        )
        packed: dict[str, Slot] = {slot.layer: slot for slot in self.layout.slots if slot.layer is not None}
        for layer, spec in self.layout.layers.items():
            self._announce(
                writer, f"{layer}.weight", packed[layer].shape, block_type(spec.grid, spec.shape[1]).name
            )
        for slot, name in self.dense.items():
            self._announce(
                writer, str(name), slot.shape, "F32" if len(slot.shape) == 1 else _TYPES[slot.dtype]
            )
        divisors = rope_divisors(self.config)
        if divisors is not None:
            writer.add_tensor_info(
                "rope_freqs.weight", divisors.shape, divisors.numpy().dtype, divisors.nbytes
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digests, written = {}, []
        for layer, weight in weights.items():
            blocks = self.exporter.pack(weight)["weight"]
            order = self.names.rows(f"{layer}.weight", len(blocks))
            written.append(_append(writer, blocks if order is None else blocks[order]))
            digests[layer] = layer_digests(weight)
        for slot, name in self.dense.items():
            written.append(_append(writer, self.names.dense(str(name), self.checkpoint.read(slot.source))))
        if divisors is not None:
            written.append(_append(writer, divisors))
        writer.close()
        _read_back(stage / FILE, written)
        return digests

    def _announce(self, writer: Any, parameter: str, shape: tuple[int, ...], kind: str) -> None:
        """Tell the writer of a tensor that comes later. shape: in bytes for block types, as the package wants
        it.
        """
        import gguf
        import numpy as np

        blocks = kind not in _TYPES.values()
        nbytes = torch.Size(shape).numel() * (1 if blocks else 4 if kind == "F32" else 2)
        dtype = np.dtype(np.uint8 if blocks else np.float32)
        writer.add_tensor_info(
            self.names(parameter), shape, dtype, nbytes, raw_dtype=gguf.GGMLQuantizationType[kind]
        )


class GgufTensors(Mapping[str, list[dict[str, Tensor]]]):
    """Layer -> [{"weight": its blocks}], read by the gguf package."""

    inputs = None

    def __init__(self, folder: Path, prefixes: Mapping[str, str]):
        from gguf import GGUFReader
        from transformers import AutoConfig

        config = {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
        self.names = Names(AutoConfig.for_model(**config).to_dict())
        self.prefixes = prefixes
        self.tensors = {tensor.name: tensor for tensor in GGUFReader(folder / FILE).tensors}

    def __getitem__(self, layer: str) -> list[dict[str, Tensor]]:
        found = self.tensors.get(self.names(f"{layer}.weight"))
        if found is None:
            return [{}]
        blocks = torch.from_numpy(found.data.copy())
        order = self.names.rows(f"{layer}.weight", len(blocks))
        return [{"weight": blocks if order is None else blocks[order.argsort()]}]

    def __iter__(self):
        return iter(self.prefixes)

    def __len__(self) -> int:
        return len(self.prefixes)


def _append(writer: Any, tensor: Tensor) -> str:
    """Write the next tensor; returns the sha256 of its bytes."""
    tensor = tensor.contiguous()
    # numpy has no bfloat16: its bytes are written
    writer.write_tensor_data((tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy())
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _read_back(path: Path, written: list[str]) -> None:
    """FileError naming the tensor when the file does not hold what was written, in this order."""
    from gguf import GGUFReader

    for tensor, digest in zip(GGUFReader(path).tensors, written, strict=True):
        if hashlib.sha256(tensor.data.tobytes()).hexdigest() != digest:
            raise FileError(
                f"{path}: {tensor.name} is not what was written a moment ago: another program writes to this "
                "file, or the disk fails; nothing was replaced. Run the line again"
            )


def _file_type(kind: str) -> int:
    from gguf import LlamaFileType

    return LlamaFileType["MOSTLY_" + {"Q3_K": "Q3_K_S"}.get(kind, kind)]

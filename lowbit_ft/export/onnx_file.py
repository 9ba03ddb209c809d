"""The onnx container: model.onnx, a graph, and model.onnx_data, its tensors.

The file of tensors is written as one of safetensors is, one layer in memory at a time and read back, because
it is one: an ONNX tensor is a place in some file, so the graph points behind the header. What reads
safetensors reads this one too.
"""

# The writer is an optional package.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..model.checkpoint import Checkpoint
from .base import Exporter, Weights
from .layout import Layout, Slot
from .onnx import DATA, FILE
from .onnx_graph import trace
from .shards import data_offsets, write_shards

PIECE = 1 << 26  # bytes of a dense matrix that are read at a time


class OnnxFiles:
    """The plan of both files. `nbytes` is what they need on the disk; `write` makes them and returns the
    digests of every layer."""

    def __init__(self, layout: Layout, checkpoint: Checkpoint, exporter: Exporter, max_shard_bytes: int):
        self.checkpoint, self.exporter = checkpoint, exporter
        self.graph = trace(layout, checkpoint, exporter)
        packed = [slot for slot in layout.slots if slot.layer is not None]
        dense = [
            Slot(name, shape, torch.float32, None, name) for name, (shape, _) in self.graph.dense.items()
        ]
        self.slots = sorted([*packed, *dense], key=lambda slot: (-slot.dtype.itemsize, slot.key))

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes + 200 for slot in self.slots) + (1 << 22)

    def write(self, stage: Path, weights: Weights) -> dict[str, dict[str, str]]:
        digests = write_shards(
            stage, {DATA: self.slots}, self._dense, weights, self.exporter, {"format": "pt"}
        )
        self._write_graph(stage)
        return digests

    def _dense(self, slot: Slot) -> Iterator[Tensor]:
        """A tensor that stays dense, in the dtype it was trained in, as fp32."""
        name, dtype = slot.source, self.graph.dense[slot.source][1]
        layer = name.removesuffix(".weight")
        blocks = self.checkpoint.row_blocks(layer, PIECE) if layer in self.checkpoint.matrices else [None]
        for rows in blocks:
            yield self.checkpoint.weight_for(name, dtype=dtype, rows=rows).float()

    def _write_graph(self, stage: Path) -> None:
        import onnx_ir  # optional

        places = data_offsets(self.slots, {"format": "pt"})
        for slot in self.slots:
            value = self.graph.weights[slot.key]
            kind = onnx_ir.DataType.UINT8 if slot.dtype == torch.uint8 else onnx_ir.DataType.FLOAT
            value.const_value = onnx_ir.ExternalTensor(
                DATA,
                places[slot.key],
                slot.nbytes,
                kind,
                shape=onnx_ir.Shape(slot.shape),
                name=slot.key,
            )
            value.type, value.shape = onnx_ir.TensorType(kind), onnx_ir.Shape(slot.shape)
        model = self.graph.model
        model.producer_name, model.producer_version = "lowbit_ft", None
        (stage / FILE).write_bytes(onnx_ir.serde.serialize_model(model).SerializeToString())

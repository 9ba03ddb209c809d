"""An ONNX folder behind torch's interface, so that verify and evaluate can ask it for logits."""

# The reader is an optional package.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .outside_model import OutsideModel


class OnnxModel(OutsideModel):
    """`model.onnx` on the CPU, whole sequences: keys and values of the past are empty."""

    def __init__(self, file: Path, stops: Sequence[int]):
        super().__init__(stops)
        import onnxruntime  # optional

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}

    def logits(self, ids: Tensor) -> Tensor:
        return self.run(ids)["logits"]

    def run(self, ids: Tensor) -> dict[str, Tensor]:
        """ids [B, L] -> every output by name, for a text of L tokens in each row."""
        ids = ids.cpu()
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        }
        for name, shape in self.inputs.items():
            if name.startswith("past_key_values."):
                given[name] = torch.zeros(len(ids), shape[1], 0, shape[3])
        feed = {name: given[name].numpy() for name in self.inputs}
        names = [value.name for value in self.session.get_outputs()]
        return {
            name: torch.from_numpy(array)
            for name, array in zip(names, self.session.run(names, feed), strict=True)
        }

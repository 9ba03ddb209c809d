"""An ONNX folder behind torch's interface, so that verify and evaluate can ask it for logits."""

# The reader is an optional package.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
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

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """.logits of a batch that is padded as `attention_mask` [B, L] says; without one as any other
        OutsideModel."""
        if attention_mask is None:
            return super().forward(input_ids, position_ids)
        beside = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return SimpleNamespace(logits=self.run(input_ids, **beside)["logits"])

    def run(self, ids: Tensor, **beside: Tensor | None) -> dict[str, Tensor]:
        """ids [B, L] -> every output by name, for a text of L tokens in each row, or what `beside` says of
        them."""
        ids = ids.cpu()
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        }
        given |= {name: value.cpu() for name, value in beside.items() if value is not None}
        for name, shape in self.inputs.items():
            if name.startswith("past_key_values."):
                given[name] = torch.zeros(len(ids), shape[1], 0, shape[3])
        feed = {name: given[name].numpy() for name in self.inputs}
        names = [value.name for value in self.session.get_outputs()]
        return {
            name: torch.from_numpy(array)
            for name, array in zip(names, self.session.run(names, feed), strict=True)
        }

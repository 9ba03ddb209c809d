"""An ONNX folder behind torch's interface, so that verify and evaluate can ask it for logits."""

# The reader is an optional package.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        return self.run(self._text(ids, {}))["logits"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **beside: Any,
    ) -> SimpleNamespace:
        """Every output by name, of images (by the names of their inputs), or of a batch of texts that is
        padded as `attention_mask` [B, L] says. With position_ids and no mask as any other OutsideModel, text
        by text."""
        if input_ids is None:
            return SimpleNamespace(**self._by_rows({n: v for n, v in beside.items() if n in self.inputs}))
        if position_ids is not None and beside.get("attention_mask") is None:
            return super().forward(input_ids, position_ids)
        named = ("attention_mask", "token_type_ids")
        return SimpleNamespace(**self.run(self._text(input_ids, {name: beside.get(name) for name in named})))

    def _by_rows(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """run(), one row at a time where the graph was made for one."""
        alone = any(self.inputs[name][0] == 1 for name in given)
        rows = len(next(iter(given.values())))
        parts = [{name: value[i : i + 1] for name, value in given.items()} for i in range(rows)]
        made = [self.run(part) for part in (parts if alone else [given])]
        return {name: torch.cat([part[name] for part in made]) for name in made[0]}

    def _text(self, ids: Tensor, beside: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """ids [B, L] of a text of L tokens in each row, or what `beside` says of them -> the inputs."""
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        }
        return given | {name: value for name, value in beside.items() if value is not None}

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name, those that the graph does not take too -> every output by name."""
        given = {name: value.cpu() for name, value in given.items()}
        for name, shape in self.inputs.items():
            if name.startswith("past_key_values."):
                given[name] = torch.zeros(len(given["input_ids"]), shape[1], 0, shape[3])
        feed = {name: given[name].numpy() for name in self.inputs}
        names = [value.name for value in self.session.get_outputs()]
        return {
            name: torch.from_numpy(array)
            for name, array in zip(names, self.session.run(names, feed), strict=True)
        }

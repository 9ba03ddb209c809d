"""format: alpaca. Rows {"instruction", "input", "output"} in the prompt of Stanford Alpaca; the output is
learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Format, Tokens, string

# The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, README), which tuned models expect.
_ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


class Alpaca(Format):
    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        instruction, output = string(row, "instruction", filled=True), string(row, "output", filled=True)
        context = string(row, "input") if row.get("input") is not None else ""
        paired = ", paired with an input that provides further context" if context else ""
        block = f"### Input:\n{context}\n\n" if context else ""
        return self.prompted(_ALPACA.format(paired=paired, instruction=instruction, input=block), output)

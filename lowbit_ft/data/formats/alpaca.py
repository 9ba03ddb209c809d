"""format: alpaca. Rows {"instruction", "input", "output"} in the prompt of Stanford Alpaca; the output is
learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import BadRow
from .base import Format, Tokens, string

# The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, README), which tuned models expect.
_SYSTEM = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request."
)
_PROMPT = "### Instruction:\n{instruction}\n\n{input}### Response:\n"


class Alpaca(Format):
    told_by = (("instruction", "output"),)
    columns = {
        "instruction": "what is asked",
        "input": "what it is asked of",
        "output": "learned, with the EOS token",
        "system": "stands where Alpaca's first sentence stands",
        "history": "earlier `[instruction, output]` pairs; their outputs are learned too, unless "
        "`train_on: completion`",
    }

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        instruction, output = string(row, "instruction", filled=True), string(row, "output", filled=True)
        context = string(row, "input") if row.get("input") is not None else ""
        paired = ", paired with an input that provides further context" if context else ""
        system = (string(row, "system") if row.get("system") is not None else "").strip()
        opening = (system or _SYSTEM.format(paired=paired)) + "\n\n"
        block = f"### Input:\n{context}\n\n" if context else ""
        prompt = _PROMPT.format(instruction=instruction, input=block)
        history = _history(row)
        if not history:
            return self.prompted(opening + prompt, output)
        turns = [(_PROMPT.format(instruction=asked, input=""), answer) for asked, answer in history]
        ids, learned = list[int](), list[bool]()
        for i, (asked, answer) in enumerate([*turns, (prompt, output)]):
            # Each prompt and answer is tokenized alone, as a server continues a chat.
            turn = self.prompted((opening if i == 0 else "\n\n") + asked, answer, first=i == 0)
            ids += turn.input_ids
            only_last = self.train_on == "completion" and i < len(turns)
            learned += [False] * len(turn.learned) if only_last else turn.learned
        return Tokens(ids, learned)


def _history(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The earlier [instruction, output] pairs of an Alpaca row."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise BadRow("'history' must be a list of [instruction, output] pairs")
    for i, pair in enumerate(pairs):
        for part in pair:
            if not isinstance(part, str) or not part.strip():
                raise BadRow(f"history[{i}] must be two strings that are not empty")
    return [(asked, answer) for asked, answer in pairs]

"""format: completion. Rows {"prompt", "completion"}; the completion is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...speech.tokens import CODEC
from .base import CODEC_TOLD, Format, Tokens, string


class Completion(Format):
    told_by = (("prompt", "completion"),)
    columns = {
        "prompt": "not learned, unless `train_on: all`",
        "completion": "learned, with the EOS token",
        CODEC: CODEC_TOLD,
    }

    def __call__(self, row: Mapping[str, Any]) -> Tokens:
        return self.prompted(string(row, "prompt"), string(row, "completion", filled=True))

"""transformers: from_pretrained and `transformers serve`, with the format's own library (native: this one).

Tried with compressed-tensors 0.20: its symmetric scales of inputs are absmax / 127.5 where training has
absmax / 127, and where weights have zero points it computes no inputs at all (compressed_tensors.py).
"""

from ..base import Exporter
from .base import Server


class Transformers(Server):
    name = "transformers"
    formats = ("compressed-tensors", "native", "int-quantized", "gguf", "gptq", "gptq_v2", "awq", "torchao")

    def reject_activations(self, exporter: Exporter) -> str | None:
        if exporter.name == "native":
            return None
        return (
            "transformers rounds inputs by another rule than training (absmax / 127.5), or not at all; set "
            "export.format: native, or export.server: vllm"
        )

"""Exporters: the formats a packed model can be written in. One file per format; EXPORTERS is the list.

To add one: a subclass of Exporter (pack, its inverse unpack, reject with a way out, the config entry) in its own file and one
line in EXPORTERS; the recipe check, the writer and the round-trip tests then know it.
"""

from .base import Exporter, LayerSpec, Weights
from .compressed_tensors import CompressedTensors
from .gguf import Gguf
from .native import Native

EXPORTERS: dict[str, Exporter] = {
    "native": Native(),
    "compressed-tensors": CompressedTensors(),
    "gguf": Gguf(),
}

__all__ = ["EXPORTERS", "Exporter", "LayerSpec", "Weights"]

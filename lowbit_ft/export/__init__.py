"""Exporters: the formats a packed model can be written in. One file per format; EXPORTERS is the list.

To add one: a subclass of Exporter (pack, its inverse unpack, reject with a way out, the config entry) in its
own file and one line in EXPORTERS; the recipe check, the writer and the round-trip tests then know it.
"""

from .awq import Awq
from .base import Exporter, LayerSpec, Weights
from .compressed_tensors import CompressedTensors
from .gguf import Gguf
from .gptq import Gptq, GptqV2
from .int_quantized import IntQuantized
from .mlx import Mlx
from .native import Native
from .onnx import Onnx
from .torchao import Torchao

EXPORTERS: dict[str, Exporter] = {
    "native": Native(),
    "compressed-tensors": CompressedTensors(),
    "int-quantized": IntQuantized(),
    "gguf": Gguf(),
    "gptq": Gptq(),
    "gptq_v2": GptqV2(),
    "awq": Awq(),
    "mlx": Mlx(),
    "torchao": Torchao(),
    "onnx": Onnx(),
}

__all__ = ["EXPORTERS", "Exporter", "LayerSpec", "Weights"]

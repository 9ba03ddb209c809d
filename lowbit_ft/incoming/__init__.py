"""Coming in: checkpoints that are quantized already (GPTQ, AWQ, compressed-tensors) as the packed base, code
for code.

READERS is the list: `quant_method` of config.json -> reader. `collapse` is the door: the tensors of a packed
layer (qweight, scales, ...) stand in the tensor directory as one `<layer>.weight`, so names, shapes, ties and
exports work as for a dense checkpoint, and `Incoming.weight` makes that layer's PackedWeight. Codes, scales
and zero points are taken as they are: a file whose values our grids cannot hold bit for bit is refused, never
rounded. No dense model exists at any time.

To add a format: one subclass of Reader in its own file and one line in READERS.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..files.tensorfile import TensorEntry
from ..names import did_you_mean
from .awq import AWQ
from .base import Incoming, PackedLayer, Reader, natural_scale_dtype
from .compressed_tensors import CompressedTensorsReader
from .gptq import GPTQ

READERS: dict[str, Reader] = {"gptq": GPTQ(), "awq": AWQ(), "compressed-tensors": CompressedTensorsReader()}

_EXPERT = re.compile(r"\.experts\.\d+\.")


def collapse(
    config: Any, entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], Incoming | None]:
    """(tensor directory with one `<layer>.weight` per packed layer, what was packed).

    config: `quantization_config` of config.json, None for a dense checkpoint (then nothing changes).
    ValueError naming the key, or the layer, that our grids cannot take over.
    """
    if config is None:
        return dict(entries), None
    settings = config if isinstance(config, dict) else {}
    reader = READERS.get(str(settings.get("quant_method")))
    if reader is None:
        raise ValueError(
            f"already quantized by {settings.get('quant_method', config)!r}; allowed: {', '.join(READERS)}"
            f"{did_you_mean(settings.get('quant_method', ''), READERS)} (they are tuned as they are), "
            "or the full-precision checkpoint it was made from"
        )
    reader.check(settings)
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        layer, _, local = name.rpartition(".")
        if local in reader.parts:
            found.setdefault(layer, {})[local] = entry
    out = dict(entries)
    layers: dict[str, PackedLayer] = {}
    for name, parts in found.items():
        if _EXPERT.search(name):
            raise ValueError(
                f"the experts of this mixture are packed one by one ({name}, ...), and transformers fuses "
                "them: they cannot be taken over; "
                "give the full-precision checkpoint"
            )
        layers[name] = layer = reader.layer(settings, name, parts)
        for local in parts:
            del out[f"{name}.{local}"]
        if f"{name}.weight" in out:
            raise ValueError(f"{name}: has a dense weight and a packed one; the file is damaged")
        first = parts[reader.parts[0]]
        # Dequantized values need more digits than the scales have; fp32 holds every product of a code and a
        # scale.
        out[f"{name}.weight"] = TensorEntry(
            first.file, torch.float32, layer.shape, 0, sum(e.nbytes for e in parts.values())
        )
    if not layers:
        raise ValueError(
            f"quantization_config says {reader.method}, but no tensor is called *.{reader.parts[0]}; the "
            "folder is damaged"
        )
    return out, Incoming(reader, settings, natural_scale_dtype(reader, layers))


__all__ = ["READERS", "Incoming", "PackedLayer", "Reader", "collapse"]

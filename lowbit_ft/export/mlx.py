"""mlx: the affine layout of Apple's MLX, for mlx-lm and LM Studio on a Mac. Symmetric grids of 2, 3, 4, 6
and 8 bits, lossless.

    weight  uint32 [N, K b / 32]   unsigned codes, a bit stream along K, lowest bit first (3 and 6 bit
            straddle words)
    scales  [N, G]                 in the dtype of our scales
    biases  [N, G]                 -scale * 2^(b-1): W = scale * code + bias

The bias of a symmetric grid is a power of two times the scale, so it is exact in any dtype. That of an
asymmetric one, scale * zero, is not: refused. MLX has kernels for groups of 32, 64 and 128. Checked on mlx
0.32: `mx.dequantize` gives our codes.

The reader is mlx-lm, not transformers; `MlxModel` lets verify and evaluate ask it for logits. It multiplies
in the dtype of the activations, so logits agree within a tolerance: 1e-2 of the largest where the model is
fp32.
"""

# The reader is an optional package.
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lowbit_kernels as kernels
import torch
from torch import Tensor, nn

from ..grid import BinaryGrid, Grid, IntGrid, PackedWeight, Weight
from ..grid.bitstream import pack_stream, unpack_stream
from ..model.matrices import Matrix
from .base import Exporter, LayerSpec, ReadBack, TensorSpecs, check_tensors, check_values, with_versions
from .compressed_tensors import reject_cast
from .gptq import OTHERS, reject_groups
from .outside_model import OutsideModel

GROUPS = (32, 64, 128)


class Mlx(Exporter):
    name = "mlx"
    language_only = "its readers build language models alone"
    quant_method = "mlx"
    measurable = False
    transformers_serve = False
    needs = "mlx-lm"
    chat_flag = "--chat-template-args"
    config_key = "quantization"  # mlx-lm's own, beside the one by which we know the folder
    checkpoint_names = True
    dense_experts = False
    measurable = False
    reads_with = ("mlx", "mlx_lm")
    extra = "mlx"
    tolerance = 1e-2

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        if isinstance(grid, BinaryGrid):
            return "mlx has no sign planes; set export.format: native"
        if not grid.symmetric:
            return (
                "mlx keeps scale * zero as one number, which changes asymmetric weights; set "
                "quant.symmetric: true, or " + OTHERS[4:]
            )
        if offset:
            return (
                "mlx holds no float offset of ours per group; set export.format: native, or train an "
                "integer offset"
            )
        if grid.group_size not in GROUPS:
            group = "the whole row" if grid.group_size == -1 else str(grid.group_size)
            return f"mlx has groups of 32, 64 and 128, not {group}; set quant.group_size, or {OTHERS}"
        return None

    def reject_dtype(self, grid: Grid, dtype: str) -> str | None:
        return reject_cast(grid, dtype)

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        return reject_groups(self.name, grid, in_features)

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        assert isinstance(layer.grid, IntGrid)
        (n, k), grid = layer.shape, layer.grid
        scale = ((n, k // grid.group_size), getattr(torch, grid.scale_dtype))
        return {"weight": ((n, k * grid.bits // 32), torch.uint32), "scales": scale, "biases": scale}

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight) and weight.residual is None and weight.offset is None
        scale = weight.scale.t().contiguous()
        return {
            "weight": pack_stream(weight.unpack_codes(), weight.grid.bits).view(torch.uint32),
            "scales": scale,
            "biases": scale * -(weight.grid.levels // 2),
        }

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        check_tensors(tensors, self.specs(layer), str(layer))
        grid = layer.grid
        assert isinstance(grid, IntGrid)
        if not torch.equal(tensors["biases"], tensors["scales"] * -(grid.levels // 2)):
            raise ValueError(f"{layer}: biases are not -{grid.levels // 2} scales; not a file of ours")
        codes = unpack_stream(tensors["weight"].view(torch.int32), grid.bits, layer.shape[1])
        scale = tensors["scales"].t().contiguous()
        weight = PackedWeight(codes=kernels.pack(codes, grid.bits), scale=scale, shape=layer.shape, grid=grid)
        check_values(weight)
        return weight

    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """The most frequent grid, and by name the layers on another one. What has no scales in the files
        stays dense.
        """
        grids = [spec.grid for spec in layers.values()]
        usual = max(set(grids), key=grids.count)
        others = {
            name: {"group_size": spec.grid.group_size, "bits": spec.grid.bits}
            for name, spec in layers.items()
            if (spec.grid.group_size, spec.grid.bits) != (usual.group_size, usual.bits)
        }
        return {"group_size": usual.group_size, "bits": usual.bits, "mode": "affine", **others}

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        """Codes as MLX decodes them, with scales of 1 and no bias."""
        import mlx.core as mx
        import numpy as np

        grid = layer.grid
        assert isinstance(grid, IntGrid)
        words = mx.array(tensors["weight"].view(torch.int32).numpy().view(np.uint32))
        ones = mx.ones(tuple(tensors["scales"].shape))
        with mx.stream(mx.cpu):
            codes = np.array(
                mx.dequantize(words, ones, mx.zeros_like(ones), group_size=grid.group_size, bits=grid.bits)
            )
        return ReadBack(torch.from_numpy(codes).to(torch.uint8), tensors["scales"].t())

    def dense(self, model: Any, layer: str, matrix: Matrix | None, dtype: torch.dtype) -> Tensor | None:
        return None  # it multiplies from the packed codes

    def open(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The model as mlx-lm loads it, behind torch's interface."""
        from mlx_lm.utils import load_model

        return MlxModel(load_model(folder)[0], dtype, self.stops(folder))

    def reader(self) -> str:
        return with_versions("mlx-lm", "mlx")

    def serve(self, folder: str) -> str:
        return f"mlx_lm.server --model {folder}"

    def use(self, folder: str) -> str:
        return f"""```python
from mlx_lm import generate, load

model, tokenizer = load("{folder}")  # pip install {self.needs}
```"""


class MlxModel(OutsideModel):
    """An mlx-lm model."""

    def __init__(self, model: Any, dtype: torch.dtype, stops: Sequence[int]):
        super().__init__(stops)
        import mlx.core as mx
        from mlx.utils import tree_map

        kind = getattr(mx, str(dtype).removeprefix("torch."))
        # What the checkpoint stores in 16 bit is computed in the dtype of training, as everywhere; packed
        # codes stay.
        model.update(
            tree_map(
                lambda a: a.astype(kind) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()
            )
        )
        self.model = [model]  # in a list: not a torch module

    def logits(self, ids: Tensor) -> Tensor:
        import mlx.core as mx
        import numpy as np

        return torch.from_numpy(np.array(self.model[0](mx.array(ids.numpy())).astype(mx.float32)))

"""onnx: model.onnx for ONNX Runtime, its tensors beside it in model.onnx_data. Integer grids, lossless.

    W4            com.microsoft MatMulNBits of 4 bits
    W3            the same: a 3-bit code is a 4-bit code too, and 3 bits have no kernel
    W2            MatMulNBits of 2 bits
    W8            DequantizeLinear in blocks, then MatMul
    W6            the same: 6-bit codes in bytes
    W8 row, inputs on one symmetric scale        MatMulInteger: the sums of training, in int32
    embeddings    GatherBlockQuantized of as many bits

What ONNX Runtime 1.32 computes on a CPU, tried for every width, blocks of 16 to 512, with and without zero
points: all of it to 1e-6 at accuracy_level 1. Level 4 rounds the inputs to 8 bits (5e-3 of the largest
output), which training did not see, so it is never written; and a DequantizeLinear with one scale per row in
front of a MatMul is made such a MatMulNBits when a session opens, so rows are written in blocks. 1024 x 1024
on one core, microseconds at 64 tokens and at one: fp32 709 and -, 4 bits 690 and 47, 2 bits 10,080 and 5,108
(it unpacks the weight at every call), 8 bits as MatMulNBits 10,520 and 6,040, as blocks 1,608 and 957,
MatMulInteger 330: hence the table.

    codes  uint8 [N, blocks, block bits / 8]   lowest bits first; 8 bits [N, K]
    scale  fp32  [N, blocks]
    zero   uint8 [N, ceil(blocks bits / 8)]    with zero points, and always where codes are bytes

A block is a group; a whole row (or a group beyond it) is blocks of up to 256 that repeat its scale. The graph
computes in fp32, whatever the model was trained in: 16-bit values are fp32 values too.
"""

# The reader is an optional package.
# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import lowbit_kernels as kernels
import torch
from torch import Tensor, nn

from ..activations import Scheme
from ..grid import BinaryGrid, Grid, IntGrid, PackedWeight, Weight
from ..model.matrices import Matrix
from ..model.names import Part
from .base import Exporter, LayerSpec, ReadBack, TensorSpecs, check_tensors, check_values, with_versions
from .onnx_session import OnnxModel

FILE, DATA = "model.onnx", "model.onnx_data"
BLOCK = 256  # the widest that all widths have


def stored_bits(grid: Grid) -> int:
    return {3: 4, 6: 8}.get(grid.bits, grid.bits)


def block_of(grid: Grid, in_features: int) -> int:
    """Codes per block: a power of two from 16 on."""
    assert isinstance(grid, IntGrid)
    size = in_features if grid.group_size == -1 else min(grid.group_size, in_features)
    return max(16, min(BLOCK, 1 << (size - 1).bit_length()))


def shift_of(grid: Grid) -> int:
    """What is added to the codes of a narrower symmetric grid, so that 0 is where the stored width has it."""
    assert isinstance(grid, IntGrid)
    return (1 << stored_bits(grid)) // 2 - grid.levels // 2 if grid.symmetric else 0


def has_zero(grid: Grid) -> bool:
    """Whether zero points are stored: DequantizeLinear's own zero is 0, not 128."""
    assert isinstance(grid, IntGrid)
    return not grid.symmetric or stored_bits(grid) == 8


class Onnx(Exporter):
    name = "onnx"
    quant_method = "onnx"
    measurable = False
    transformers_serve = False
    container = "onnx"
    needs = "onnxruntime"
    writes_with = ("onnx", "onnxscript")
    unplanned = (
        "torch.onnx's trace of the graph: it holds no weights, but its time and what it holds of the graph "
        "grow with the layers"
    )
    reads_with = ("onnx", "onnxruntime")
    extra = "onnx"
    no_online = "has no operator for it"
    computes_in = torch.float32
    tolerance = 2e-4

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        if isinstance(grid, BinaryGrid):
            return "onnx has no sign planes; set export.format: native"
        if offset:
            return (
                "onnx has integer zero points and no float offset per group; set export.format: native, or "
                "train an integer offset"
            )
        return None

    def reject_checkpoint(self, config: Mapping[str, Any], folder: Path | None) -> list[str]:
        # Tried with transformers 5.23 and torch 2.13: its code reads a number out of a tensor.
        if config.get("model_type") != "d_fine":
            return []
        return ["a graph of D-FINE cannot be traced by torch.export; set export.format: native"]

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        return None

    def reject_activation(self, scheme: Scheme, grid: Grid, in_features: int | None = None) -> str | None:
        return None

    def reject_kv_cache(self) -> str | None:
        return (
            "ONNX Runtime keeps keys and values as they are, which training did not see; set "
            "quant.kv_cache: null, or export.format: native"
        )

    def reject_matrix(self, matrix: Matrix, grid: Grid, parts: Sequence[Part] | None) -> str | None:
        """The graph is ours, so it does not matter how the files keep a matrix."""
        if matrix.expert is not None:
            return (
                "an onnx graph has no way from a token to its experts; set export.format: "
                "compressed-tensors or native"
            )
        if matrix.embedding and matrix.shape[1] % block_of(grid, matrix.shape[1]):
            return (
                f"onnx looks up rows of whole blocks, and {block_of(grid, matrix.shape[1])} does not divide "
                f"{matrix.shape[1]}; set a group size that does, leave the embedding dense, or set "
                "export.format: native"
            )
        return None

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        (n, k), bits = layer.shape, stored_bits(layer.grid)
        block = block_of(layer.grid, k)
        blocks = -(-k // block)
        codes = (n, k) if bits == 8 else (n, blocks, block * bits // 8)
        found: TensorSpecs = {"codes": (codes, torch.uint8), "scale": ((n, blocks), torch.float32)}
        if has_zero(layer.grid):
            found["zero"] = ((n, -(-blocks * bits // 8)), torch.uint8)
        return found

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight) and weight.residual is None and weight.offset is None
        (n, k), grid, bits = weight.shape, weight.grid, stored_bits(weight.grid)
        block = block_of(grid, k)
        of, blocks = _group_of(grid, k), -(-k // block)
        codes = weight.unpack_codes() + shift_of(grid)
        if bits != 8:
            codes = _filled(codes, blocks * block).view(n, blocks, block)
        tensors = {
            "codes": _packed(codes, bits),
            "scale": weight.scale.float().t()[:, of].contiguous(),
        }
        if has_zero(grid):
            zero = (
                torch.full((n, blocks), 1 << (bits - 1), dtype=torch.uint8)
                if weight.zero is None
                else weight.zero.t()[:, of]
            )
            tensors["zero"] = _packed(_filled(zero, -(-blocks // (8 // bits)) * (8 // bits)), bits)
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        check_tensors(tensors, self.specs(layer), str(layer))
        grid, (n, k), bits = layer.grid, layer.shape, stored_bits(layer.grid)
        assert isinstance(grid, IntGrid)
        of, blocks = _group_of(grid, k), -(-k // block_of(grid, k))
        codes = _codes(tensors["codes"], bits).reshape(n, -1)[:, :k].to(torch.int16) - shift_of(grid)
        if int(codes.min()) < 0 or int(codes.max()) >= grid.levels:
            raise ValueError(f"{layer}: has codes beyond {grid.bits} bits; not a file of ours")
        first = [of.index(group) for group in range(kernels.group_count(k, grid.group_size))]
        zero = _codes(tensors["zero"], bits)[:, :blocks] if has_zero(grid) else None
        if grid.symmetric and zero is not None:
            if not bool((zero == 1 << (bits - 1)).all()):
                raise ValueError(f"{layer}: has zero points other than {1 << (bits - 1)}; not a file of ours")
            zero = None
        weight = PackedWeight(
            codes=kernels.pack(codes.to(torch.uint8), grid.bits),
            scale=tensors["scale"][:, first].t().to(getattr(torch, grid.scale_dtype)).contiguous(),
            zero=None if zero is None else zero[:, first].t().contiguous(),
            shape=layer.shape,
            grid=grid,
        )
        if not all(torch.equal(tensor, tensors[name]) for name, tensor in self.pack(weight).items()):
            raise ValueError(
                f"{layer}: blocks of one group differ, or scales are not {grid.scale_dtype}; not a file of "
                "ours"
            )
        check_values(weight)
        return weight

    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "onnx_file": FILE}

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        """Codes and zero points as ONNX Runtime unpacks them, with scales of 1."""
        (n, k), grid = layer.shape, layer.grid
        assert isinstance(grid, IntGrid)
        bits, block = stored_bits(grid), block_of(grid, k)
        of, blocks = _group_of(grid, k), -(-k // block)
        first = [of.index(group) for group in range(kernels.group_count(k, grid.group_size))]
        codes = _filled(tensors["codes"].reshape(n, -1), blocks * block * bits // 8)
        values = _looked_up(codes, bits)[:, :k] - shift_of(grid)
        zero = None if grid.symmetric else _looked_up(tensors["zero"], bits)[:, first].t()
        return ReadBack(values, tensors["scale"][:, first].t(), zero)

    def dense(self, model: Any, layer: str, matrix: Matrix | None, dtype: torch.dtype) -> Tensor | None:
        return None  # it multiplies from the packed codes

    def open(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The model as ONNX Runtime loads it, behind torch's interface."""
        return OnnxModel(folder / FILE, self.stops(folder))

    def reader(self) -> str:
        return with_versions("onnxruntime")

    def serve(self, folder: str) -> str:
        return f"lowbit-ft generate {folder}"

    def use(self, folder: str) -> str:
        return f"""```python
import onnxruntime  # pip install {self.needs}

session = onnxruntime.InferenceSession("{folder}/{FILE}")
print([(tensor.name, tensor.shape) for tensor in session.get_inputs()])
```"""


def _group_of(grid: IntGrid, in_features: int) -> list[int]:
    """Block -> its group."""
    block = block_of(grid, in_features)
    size = in_features if grid.group_size == -1 else grid.group_size
    return [at // size for at in range(0, in_features, block)]


def _filled(values: Tensor, width: int) -> Tensor:
    """[N, k] -> [N, width], with zeros."""
    return nn.functional.pad(values, (0, width - values.shape[-1]))


def _packed(values: Tensor, bits: int) -> Tensor:
    """uint8 [..., m] -> [..., m bits / 8]."""
    if bits == 8:
        return values.contiguous()
    parts = values.unflatten(-1, (-1, 8 // bits))
    made = parts[..., 0].clone()
    for i in range(1, 8 // bits):
        made |= parts[..., i] << (bits * i)
    return made


def _codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_packed`."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> shifts & ((1 << bits) - 1)).flatten(-2)


def _looked_up(packed: Tensor, bits: int) -> Tensor:
    """uint8 [N, bytes] -> uint8 [N, 8 bytes / bits] by GatherBlockQuantized, 16 numbers after 16."""
    width = 2 * bits  # bytes of 16 numbers
    rows = _filled(packed, -(-packed.shape[1] // width) * width).reshape(-1, width).contiguous()
    feed = {
        "codes": rows.numpy(),
        "rows": torch.arange(len(rows)).numpy(),
        "scale": torch.ones(len(rows), 1).numpy(),
    }
    values = torch.from_numpy(_lookup(bits).run(None, feed)[0])
    values += 1 << (bits - 1)  # its zero point where none is given
    return values.to(torch.uint8).reshape(len(packed), -1)[:, : packed.shape[1] * 8 // bits]


@lru_cache(maxsize=3)
def _lookup(bits: int) -> Any:
    """A session of one GatherBlockQuantized on rows of one block of 16."""
    import onnxruntime  # optional
    from onnx import TensorProto, helper  # optional

    kinds = TensorProto
    shapes = {
        "codes": (kinds.UINT8, ("n", 2 * bits)),
        "rows": (kinds.INT64, ("n",)),
        "scale": (kinds.FLOAT, ("n", 1)),
    }
    how: dict[str, Any] = {"bits": bits, "block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    node = helper.make_node("GatherBlockQuantized", list(shapes), ["y"], domain="com.microsoft", **how)
    inputs = [helper.make_tensor_value_info(name, *facts) for name, facts in shapes.items()]
    output = helper.make_tensor_value_info("y", kinds.FLOAT, ("n", 16))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "lookup", inputs, [output])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

"""gguf: the one file llama.cpp, Ollama and LM Studio read. Symmetric integer grids, lossless, one block type
per layer.

    W8                       Q8_0   32 codes and a float16 scale in 34 bytes
    W6                       Q8_0   the same: a 6-bit code is an 8-bit code too
    W6, g256 or whole row    Q6_K   256 codes and a float16 scale in 210 bytes
    W4, W3, W2               Q4_0   32 codes and a float16 scale in 18 bytes: a 2- or 3-bit code is a 4-bit
                             code too
    W3, g256 or whole row    Q3_K   256 codes and a float16 scale in 110 bytes
    W2, g256 or whole row    Q2_K   256 codes and a float16 scale in 84 bytes

A scale of our group is repeated in each of its blocks. K-quants have a second level of integer scales, one
per 16 codes, which is 1 throughout here; Q2_K subtracts a minimum, which is 2 scales here, so that d q - 2 d
is the symmetric value. Every product is exact in fp32, so llama.cpp starts from the very weights that were
trained (it then rounds activations to 8 bits, its own choice). An asymmetric grid does not fit: Q4_1 keeps
-scale * zero as one float16 number, which is exact for two groups in five only.

Never made here: a quantization of the dequantized model (what `llama-quantize` does), which would round the
trained weights anew. Block layouts: ggml-common.h of llama.cpp; the tests decode them with the gguf package.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lowbit_kernels as kernels
import torch
from torch import Tensor

from ..grid import BinaryGrid, Grid, IntGrid, PackedWeight, Weight
from .base import Exporter, LayerSpec, ReadBack, TensorSpecs, check_tensors, check_values, with_versions
from .gguf_model import FILE, reader_config, reject
from .gguf_tokenizer import STOPS
from .gguf_tokenizer import reject as reject_tokenizer


@dataclass(frozen=True)
class BlockType:
    """size: codes per block. nbytes: bytes per block. zero: the code that stands for 0."""

    name: str
    size: int
    nbytes: int
    zero: int


Q8_0, Q4_0 = BlockType("Q8_0", 32, 34, 128), BlockType("Q4_0", 32, 18, 8)
Q3_K, Q2_K = BlockType("Q3_K", 256, 110, 4), BlockType("Q2_K", 256, 84, 2)
Q6_K = BlockType("Q6_K", 256, 210, 32)
_K_SCALES = {
    "Q3_K": (0x11,) * 8 + (0xAA,) * 4,
    "Q2_K": (0x21,) * 16,
    "Q6_K": (1,) * 16,
}  # the second level: 1 everywhere (and a minimum of 2)


def block_type(grid: Grid, in_features: int) -> BlockType:
    """The smallest type that holds a grid this format accepts."""
    assert isinstance(grid, IntGrid)
    whole = in_features % 256 == 0 and (grid.group_size == -1 or grid.group_size % 256 == 0)
    small = Q8_0 if grid.bits > 4 else Q4_0
    return {2: Q2_K, 3: Q3_K, 6: Q6_K}.get(grid.bits, small) if whole else small


class Gguf(Exporter):
    name = "gguf"
    language_only = "its readers build language models alone"
    quant_method = "gguf"
    kv_server = "llama.cpp"
    chat_flag = "--chat-template-kwargs"
    needs = "gguf"
    transformers_serve = False
    drops_generation = True
    container = "gguf"
    dense_experts = False
    writes_with = ("gguf",)
    reads_with = ("gguf",)
    extra = "gguf"

    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        if isinstance(grid, BinaryGrid):
            return "gguf has no sign planes; set export.format: native"
        if not grid.symmetric:
            return (
                "gguf keeps scale * zero as one float16 number, which changes asymmetric weights; "
                "set quant.symmetric: true, or export.format: compressed-tensors or native"
            )
        if offset:
            return (
                "gguf holds no float offset per group; set export.format: native, or train an integer offset"
            )
        if grid.scale_dtype == "float32":
            return (
                "gguf has float16 scales, which changes float32 ones; use scale_dtype bfloat16, or "
                "export.format: native"
            )
        return None

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        if in_features % 32:
            return (
                f"gguf needs a multiple of 32 inputs, and this layer has {in_features}; exclude it, or "
                "set export.format: native"
            )
        return None

    def reject_checkpoint(self, config: Mapping[str, Any], folder: Path | None) -> list[str]:
        rows = config.get("vocab_size")
        return reject(config) or (reject_tokenizer(folder, rows) if folder is not None else [])

    def specs(self, layer: LayerSpec) -> TensorSpecs:
        kind = block_type(layer.grid, layer.shape[1])
        return {"weight": ((layer.shape[0], layer.shape[1] // kind.size * kind.nbytes), torch.uint8)}

    def pack(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight) and weight.residual is None and weight.offset is None
        (n, k), kind = weight.shape, block_type(weight.grid, weight.shape[1])
        codes = (
            weight.unpack_codes().add_(kind.zero - weight.grid.levels // 2).view(n, k // kind.size, kind.size)
        )
        scale = float16_scale(weight)[:, _group_of(weight.grid, k, kind)].contiguous()  # [N, blocks]
        d = scale.view(n, -1, 1).view(torch.uint8)
        return {"weight": torch.cat(_fields(kind, codes, d), dim=-1).view(n, -1)}

    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        check_tensors(tensors, self.specs(layer), str(layer))
        assert isinstance(layer.grid, IntGrid)
        (n, k), grid, kind = layer.shape, layer.grid, block_type(layer.grid, layer.shape[1])
        blocks = tensors["weight"].view(n, k // kind.size, kind.nbytes)
        values = _values(kind, blocks).view(n, k).to(torch.int16) - (kind.zero - grid.levels // 2)
        if int(values.min()) < 0 or int(values.max()) >= grid.levels:
            raise ValueError(f"{layer}: has codes beyond {grid.bits} bits; not a file of ours")
        codes = kernels.pack(values.to(torch.uint8), grid.bits)
        of = _group_of(grid, k, kind)
        first = torch.tensor([of.index(group) for group in range(kernels.group_count(k, grid.group_size))])
        d = _scale_bytes(kind, blocks).contiguous().view(torch.float16).view(n, -1)
        scale = d[:, first].t().to(getattr(torch, grid.scale_dtype)).contiguous()
        whole = torch.cat(
            _fields(
                kind,
                _values(kind, blocks),
                scale.half().t()[:, of].contiguous().view(n, -1, 1).view(torch.uint8),
            ),
            -1,
        )
        if not torch.equal(whole, blocks):
            raise ValueError(
                f"{layer}: blocks of one group differ in scale, or scales are not {grid.scale_dtype}; not "
                "a file of ours"
            )
        weight = PackedWeight(codes=codes, scale=scale, shape=(n, k), grid=grid)
        check_values(weight)
        return weight

    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        types = sorted({block_type(spec.grid, spec.shape[1]).name for spec in layers.values()})
        return {"quant_method": "gguf", "gguf_file": FILE, "types": types}

    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        """Codes: what the gguf package decodes from the same blocks with every scale replaced by 1."""
        from gguf import GGMLQuantizationType, dequantize

        (n, k), kind = layer.shape, block_type(layer.grid, layer.shape[1])
        blocks = tensors["weight"].clone().view(n, k // kind.size, kind.nbytes)
        d = _scale_bytes(kind, blocks).contiguous().view(torch.float16).view(n, -1)
        one = torch.ones((), dtype=torch.float16).view(1).view(torch.uint8)
        for at in _scale_places(kind):
            blocks[..., at : at + 2] = one
        q = torch.from_numpy(dequantize(blocks.view(n, -1).numpy(), GGMLQuantizationType[kind.name])).view(
            n, k
        )
        of = _group_of(layer.grid, k, kind)
        first = [of.index(group) for group in range(kernels.group_count(k, layer.grid.group_size))]
        assert isinstance(layer.grid, IntGrid)
        return ReadBack((q + layer.grid.levels // 2).to(torch.uint8), d[:, first].t())

    def load_options(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The file is the checkpoint; what transformers' reader takes from its metadata is completed from
        config.json.
        """
        return {"gguf_file": FILE, "config": reader_config(folder)}

    def tokenizer(self, folder: Path) -> Any:
        """The one inside the file, not the one beside it."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / FILE).symlink_to((folder / FILE).absolute())
            return AutoTokenizer.from_pretrained(alone, gguf_file=FILE, local_files_only=True)

    def stops(self, folder: Path) -> list[int]:
        from gguf import GGUFReader

        fields = GGUFReader(folder / FILE).fields
        found = [fields.get(f"tokenizer.ggml.{stop}_token_id") for stop in STOPS]
        return sorted({int(field.contents()) for field in found if field is not None})

    def reader(self) -> str:
        return with_versions("transformers", "gguf")

    def serve(self, folder: str) -> str:
        return f"llama-server -m {folder}/{FILE}"

    def use(self, folder: str) -> str:
        code = super().use(folder).replace(f'("{folder}")', f'("{folder}", gguf_file="{FILE}")', 1)
        return f"""`{FILE}` is all that llama.cpp, Ollama and LM Studio need; \
tokenizer and chat template are in it.

{code}"""


def float16_scale(weight: PackedWeight) -> Tensor:
    """[N, G] float16. ValueError when that changes a scale: bfloat16 has a wider range (exact from 2^-17 to
    65504).
    """
    half = weight.scale.half()
    if not torch.equal(half.float(), weight.scale.float()):
        wrong = half.float() != weight.scale.float()
        some = float(weight.scale[wrong][0])
        raise ValueError(
            f"{int(wrong.sum())} of {wrong.numel()} scales have no float16 value (such as {some:.3g}); "
            "set export.format: compressed-tensors or native"
        )
    return half.t().contiguous()


def _group_of(grid: Grid, in_features: int, kind: BlockType) -> list[int]:
    """Block -> its group."""
    size = in_features if grid.group_size == -1 else grid.group_size
    return [block * kind.size // size for block in range(in_features // kind.size)]


def _fields(kind: BlockType, q: Tensor, d: Tensor) -> list[Tensor]:
    """The parts of every block in file order, uint8 [N, blocks, *]. q: codes [N, blocks, size]; d: the
    scale's two bytes.
    """
    if kind is Q8_0:
        return [d, q ^ 0x80]  # two's complement of q - 128
    if kind is Q4_0:
        return [d, q[..., :16] | q[..., 16:] << 4]
    if kind is Q6_K:
        fours = q.view(*q.shape[:2], 2, 4, 32)  # two halves of 128, each four times 32
        low, top = fours & 15, fours >> 4
        nibbles = low[..., :2, :] | low[..., 2:, :] << 4
        twos = top[..., 0, :] | top[..., 1, :] << 2 | top[..., 2, :] << 4 | top[..., 3, :] << 6
        ones = torch.tensor(_K_SCALES[kind.name], dtype=torch.uint8).expand(*q.shape[:2], -1)
        return [nibbles.flatten(2), twos.flatten(2), ones, d]
    low = (q & 3).view(*q.shape[:2], 2, 4, 32)  # two halves of 128, each four times 32
    two = low[..., 0, :] | low[..., 1, :] << 2 | low[..., 2, :] << 4 | low[..., 3, :] << 6
    second = torch.tensor(_K_SCALES[kind.name], dtype=torch.uint8).expand(*q.shape[:2], -1)
    if kind is Q2_K:
        return [second, two.flatten(2), d, d]
    third = (q >> 2).view(*q.shape[:2], 8, 32)
    high = third[..., 0, :].clone()
    for i in range(1, 8):
        high |= third[..., i, :] << i
    return [high, two.flatten(2), second, d]


def _values(kind: BlockType, blocks: Tensor) -> Tensor:
    """Codes uint8 [N, blocks, size]: the inverse of `_fields`."""
    if kind is Q8_0:
        return blocks[..., 2:] ^ 0x80
    if kind is Q4_0:
        return torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], dim=-1)
    if kind is Q6_K:
        nibbles = blocks[..., :128].unflatten(-1, (2, 2, 32))
        low = torch.cat([nibbles & 15, nibbles >> 4], dim=-2)
        twos = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
        return (low | (twos >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1) & 3) << 4).flatten(2)
    at = 16 if kind is Q2_K else 32
    two = blocks[..., at : at + 64].unflatten(-1, (2, 1, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    q = (two >> shifts & 3).flatten(2)
    if kind is Q3_K:
        eighths = torch.arange(8, dtype=torch.uint8).view(8, 1)
        q |= (blocks[..., None, :32] >> eighths & 1).flatten(2) << 2
    return q


def _scale_places(kind: BlockType) -> tuple[int, ...]:
    """Where the float16 numbers of a block begin."""
    return {"Q8_0": (0,), "Q4_0": (0,), "Q3_K": (108,), "Q2_K": (80, 82), "Q6_K": (208,)}[kind.name]


def _scale_bytes(kind: BlockType, blocks: Tensor) -> Tensor:
    at = _scale_places(kind)[0]
    return blocks[..., at : at + 2]

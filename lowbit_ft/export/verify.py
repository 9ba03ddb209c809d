"""verify: reload an exported folder through the reader its users have, and compare everything exactly.

    files     every sha256 of the manifest
    codes     integers, scales and zero points of each layer, unpacked by the format's own library
    weights   the dense weight each layer has in the loaded model, against scale * (code - zero) in the same dtype
    logits    of the loaded model, against the packed model's on the same tokens

Weights are compared bit for bit, whatever their size. Logits must be equal bit for bit on a CPU where the packed matmul does a
layer in one piece (up to layout.CHUNK_ELEMENTS weights): both sides then make the same call. Where it works in chunks of rows, or
on a GPU with kernels of its own, sums may be added in another order; logits may then differ by LOGIT_TOLERANCE of the largest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lowbit_kernels.layout import CHUNK_ELEMENTS
from safetensors import safe_open
from torch import Tensor, nn

from ..grid import PackedWeight, Weight
from ..linear import PackedLinear, packed_op_only
from . import EXPORTERS
from .base import LayerSpec, Weights
from .reader import load_exported, read_config
from .writer import check_files

# Only where the two sides do not make the same call. fp32 rounding over a few dozen layers stays below 1e-4 of the largest logit, bf16
# below 3e-2; a wrong code or scale in one layer gives more than that, and the exact comparison of weights has found it before.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LayerCheck:
    """Differences of one layer, counted. All zero: the same."""

    layer: str
    codes: int
    scales: int  # zero points and offsets too
    weights: int

    @property
    def failed(self) -> bool:
        return bool(self.codes or self.scales or self.weights)


@dataclass(frozen=True)
class VerifyReport:
    """rows: one per layer. logit_difference: the largest |difference|, None when no packed model was given to compare with."""

    folder: str
    reader: str
    dtype: str
    elements: int
    rows: list[LayerCheck] = field(repr=False)
    logit_difference: float | None
    logit_bound: float

    @property
    def failed(self) -> list[LayerCheck]:
        return [row for row in self.rows if row.failed]

    @property
    def ok(self) -> bool:
        # `not (a <= b)`: a NaN difference fails
        return not self.failed and (
            self.logit_difference is None or self.logit_difference <= self.logit_bound
        )

    def __str__(self) -> str:
        lines = [f"verify {self.folder}: read by {self.reader} in {self.dtype}"]
        if self.failed:
            lines.append(f"  {len(self.failed)} of {len(self.rows)} layers differ:")
            lines += [
                f"    {row.layer}: {row.codes:,} codes, {row.scales:,} scales and zero points, {row.weights:,} weights"
                for row in self.failed[:20]
            ]
            lines += ["    ..."] * (len(self.failed) > 20)
        else:
            lines.append(
                f"  {len(self.rows)} layers, {self.elements:,} weights: codes, scales and weights equal bit for bit"
            )
        if self.logit_difference is None:
            lines.append("  logits: not compared (no packed model given)")
        else:
            bound = "must be equal" if self.logit_bound == 0 else f"allowed {self.logit_bound:.3g}"
            lines.append(f"  logits: largest difference {self.logit_difference:.3g} ({bound})")
        return "\n".join(lines)


@torch.no_grad()
def verify(
    folder: str | Path,
    reference: Mapping[str, Weight],
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    input_ids: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> VerifyReport:
    """Check a folder of `write_model` against the weights it was written from. Needs memory for the model as its reader holds it.

    reference: layer name -> the weight that ships (`merged_weights(model)`). model: the packed model (with its adapters, or
    merged), on any device and in `dtype`, or a function that loads it (then it is gone again before the folder is read, which for a
    dense format is the larger of the two); without it logits are not compared. input_ids [B, L]; default 32 tokens of the
    vocabulary. dtype None: that of the folder's config.json. Raises ValueError, listing layers, for any difference.
    """
    folder, weights = Path(folder), Weights.of(reference)
    manifest = check_files(folder)
    exporter = EXPORTERS.get(manifest.get("format", ""))
    if exporter is None:
        raise ValueError(
            f"{folder}: written as {manifest.get('format')!r}; known formats: {', '.join(EXPORTERS)}"
        )
    if problems := sorted(set(weights) ^ set(manifest["layers"])):
        raise ValueError(f"{folder}: holds other layers than the reference: {', '.join(problems[:5])}")
    config = read_config(folder)
    kind: torch.dtype = dtype or getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    expected, where = None, {torch.device(device).type}
    if model is not None:
        packed: Any = model if isinstance(model, nn.Module) else model()
        where.add(next(packed.parameters()).device.type)
        expected = _logits(packed, _tokens(packed) if input_ids is None else input_ids)
        del packed
    loaded = load_exported(folder, dtype=kind, device=device)
    ids = _tokens(loaded) if input_ids is None else input_ids
    logits = _logits(loaded, ids)  # before looking at weights: some readers unpack at the first forward
    stored = _StoredTensors(
        folder, {name: str(entry.get("stored_as")) for name, entry in manifest["layers"].items()}
    )
    rows = []
    for name, weight in weights.items():
        read = exporter.read_back(stored[name], LayerSpec.of(weight))
        codes = _differences(read.codes, weight.unpack_codes())
        scales = _differences(read.scale.float(), weight.scale.float())
        for key in ("zero", "offset"):
            scales += _differences(
                getattr(read, key), getattr(weight, key, None) if isinstance(weight, PackedWeight) else None
            )
        layer = loaded.get_submodule(name)
        dense = layer.base.dequantize(kind) if isinstance(layer, PackedLinear) else layer.weight
        rows.append(LayerCheck(name, codes, scales, _differences(dense, weight.dequantize(kind))))
    difference, bound = None, 0.0
    if expected is not None:
        difference = float((logits - expected).abs().max())
        if where != {"cpu"} or any(spec.elements > CHUNK_ELEMENTS for spec in weights.specs.values()):
            bound = LOGIT_TOLERANCE[kind] * float(expected.abs().max())
    elements = sum(spec.elements for spec in weights.specs.values())
    reader = f"transformers {version('transformers')}"
    if exporter.quant_method == "compressed-tensors":
        reader += f" with compressed-tensors {version('compressed-tensors')}"
    report = VerifyReport(
        str(folder), reader, str(kind).removeprefix("torch."), elements, rows, difference, bound
    )
    if not report.ok:
        raise ValueError(str(report))
    return report


def _tokens(model: Any) -> Tensor:
    """The first 32 tokens of the vocabulary, [1, 32]."""
    return torch.arange(min(32, model.get_input_embeddings().weight.shape[0]))[None]


def _logits(model: Any, ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    try:
        with packed_op_only(model):
            return model(ids.to(next(model.parameters()).device)).logits.float().cpu()
    finally:
        model.train(training)


def _differences(a: Tensor | None, b: Tensor | None) -> int:
    """How many numbers differ; all of them when only one side is there or the shapes are not the same."""
    if a is None or b is None:
        return sum(t.numel() for t in (a, b) if t is not None)
    if a.shape != b.shape:
        return max(a.numel(), b.numel(), 1)
    return int((a.cpu() != b.cpu()).sum())


class _StoredTensors:
    """Layer -> its tensors by local name, through the safetensors library."""

    def __init__(self, folder: Path, prefixes: Mapping[str, str]):
        self.prefixes = prefixes
        self.keys: dict[str, list[tuple[str, Path]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    prefix, _, local = key.rpartition(".")
                    self.keys.setdefault(prefix, []).append((local, path))

    def __getitem__(self, layer: str) -> dict[str, Tensor]:
        prefix, tensors = self.prefixes[layer], {}
        for local, path in self.keys.get(prefix, []):
            with safe_open(path, framework="pt") as file:
                tensors[local] = file.get_tensor(f"{prefix}.{local}")
        return {local: tensor for local, tensor in tensors.items() if local != "bias"}

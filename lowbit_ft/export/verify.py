"""verify: reload an exported folder through the reader its users have, and compare everything exactly.

    files     every sha256 of the manifest
    codes     integers, scales and zero points of each layer, unpacked by the format's own library; and those
              of its static input, where the files hold them
    weights   the dense weight each layer has in the loaded model, against scale * (code - zero) in the same
              dtype; and the dense tensors that were trained
    logits    of the loaded model, against the packed model's on the same tokens
    answers   the packed model's greedy answers to three prompts in the chat template: the reader must choose
              the same tokens
    tokens    special tokens, stop tokens (those of the files and of the loaded model), chat template and the
              prompts' ids, as the format's users get them

Weights are compared bit for bit, whatever their size. Logits must be equal bit for bit on a CPU where the
packed matmul does a layer in one piece (up to layout.CHUNK_ELEMENTS weights): both sides then make the same
call. Where it works in chunks of rows, or on a GPU with kernels of its own, or where a reader makes a layer
with a bias dense (whose sums then begin with the bias), sums may be added in another order; logits may then
differ by LOGIT_TOLERANCE of the largest. Formats whose reader multiplies in another order everywhere name a
tolerance of their own, and never have a dense weight to compare; twice what NUDGES do to the packed model
is allowed there too.

Answers are not generated twice: the reader reads prompt and answer in one pass, and where it would have
chosen another token, the two must be as close as the tolerance of the logits. That is greedy decoding, and it
does not stop at the first tie.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lowbit_kernels.layout import CHUNK_ELEMENTS
from safetensors import safe_open
from torch import Tensor, nn

from ..grid import PackedWeight, Weight
from ..model.chat_template import Template
from ..model.config import load_config, read_config
from ..model.images import made_size
from ..model.matrices import Matrix, find_matrices
from ..model.purpose import TRAINING_ONLY, Purpose, example_of, purpose_of
from ..model.shipped import Trained
from . import EXPORTERS
from .answers import Answers, compare_tokens, own_tokenizer, prompt_ids
from .base import Exporter, LayerSpec, ReadBack, Weights
from .folder import check_files
from .onnx_layers import input_constants
from .planes import as_integers
from .reader import load_exported
from .stored import STORED, tensor_files
from .verify_logits import compare_logits, expected_of, logits_of

OFFSET_ROUNDING = 2.0**-23  # of a vector that was stored as 1 + w in fp32


@dataclass(frozen=True)
class LayerCheck:
    """Differences of one layer, counted. All zero: the same."""

    layer: str
    codes: int
    scales: int  # zero points and offsets too, and those of the input
    weights: int | None  # None: the reader has no dense weight

    @property
    def failed(self) -> bool:
        return bool(self.codes or self.scales or self.weights)


@dataclass(frozen=True)
class VerifyReport:
    """rows: one per layer. logit_difference: the largest |difference|, None when no packed model was given to
    compare with. tokens: what differs in special tokens, stop tokens and template, one sentence each; None
    when there is no tokenizer."""

    folder: str
    reader: str
    dtype: str
    elements: int
    rows: list[LayerCheck] = field(repr=False)
    logit_difference: float | None
    logit_bound: float
    answers: Answers | None = None
    dense: int = 0  # of the rows, tensors that were trained beside the packed layers: the last ones
    tokens: list[str] | None = None

    @property
    def failed(self) -> list[LayerCheck]:
        return [row for row in self.rows if row.failed]

    @property
    def ok(self) -> bool:
        # `not (a <= b)`: a NaN difference fails
        return (
            not self.failed
            and (self.logit_difference is None or self.logit_difference <= self.logit_bound)
            and (self.answers is None or self.answers.ok)
            and not self.tokens
        )

    def __str__(self) -> str:
        lines = [f"verify {self.folder}: read by {self.reader} in {self.dtype}"]
        if self.failed:
            lines.append(f"  {len(self.failed)} of {len(self.rows)} layers differ:")
            lines += [
                f"    {row.layer}: {row.codes:,} codes, {row.scales:,} scales and zero points"
                + ("" if row.weights is None else f", {row.weights:,} weights")
                for row in self.failed[:20]
            ]
            lines += ["    ..."] * (len(self.failed) > 20)
        else:
            same = (
                "codes and scales"
                if any(row.weights is None for row in self.rows)
                else "codes, scales and weights"
            )
            layers = len(self.rows) - self.dense
            count = "1 dense tensor that was" if self.dense == 1 else f"{self.dense} dense tensors that were"
            beside = f", and {count} trained" if self.dense else ""
            lines.append(f"  {layers} layers, {self.elements:,} weights: {same} equal bit for bit{beside}")
        if self.logit_difference is None:
            lines.append("  logits: not compared (no packed model given)")
        else:
            bound = "must be equal" if self.logit_bound == 0 else f"allowed {self.logit_bound:.3g}"
            lines.append(f"  logits: largest difference {self.logit_difference:.3g} ({bound})")
        if self.answers is not None:
            lines.append(f"  answers: {self.answers}")
        if self.tokens is None:
            lines.append("  tokens: not compared (the folder has no tokenizer)")
        else:
            lines.append(
                "  tokens: "
                + (
                    "; ".join(self.tokens)
                    or "special tokens, stop tokens and chat template are the model's own"
                )
            )
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
    source: str | Path | None = None,
    dense: Mapping[str, Trained] | None = None,
    chat_template: Template | None = None,
    attention: str | None = None,
) -> VerifyReport:
    """Check a folder of `write_model` against the weights it was written from. Needs memory for the model as
    its reader holds it.

    reference: layer name -> the weight that ships (`merged_weights(model)`). model: the packed model (with
    its adapters, or merged), on any device and in `dtype`, or a function that loads it (then it is gone again
    before the folder is read, which for a dense format is the larger of the two); without it logits and
    answers are not compared. input_ids [B, L]; default 32 tokens of the vocabulary. dtype None: that of the
    folder's config.json. source: the folder of the model's own tokenizer; None: the files beside the weights.
    dense: by parameter, what was trained beside the layers. chat_template: what the tokenizer writes chats
    with, where that is not its own. attention: how the model that is read attends; None: the best that it
    has. Raises ValueError, listing what differs.
    """
    folder = Path(folder)
    manifest = check_files(folder)
    exporter = EXPORTERS.get(manifest.get("format", ""))
    if exporter is None:
        raise ValueError(
            f"{folder}: written as {manifest.get('format')!r}; known formats: {', '.join(EXPORTERS)}"
        )
    weights = as_integers(Weights.of(reference), exporter)
    if problems := sorted(set(weights) ^ set(manifest["layers"])):
        raise ValueError(f"{folder}: holds other layers than the reference: {', '.join(problems[:5])}")
    config = read_config(folder)
    stored_as = config.get("dtype") or config.get("torch_dtype") or "float32"
    kind: torch.dtype = exporter.computes_in or dtype or getattr(torch, stored_as)
    if reason := exporter.missing(exporter.reads_with):
        raise ValueError(f"{folder}: reading {exporter.name} {reason}")
    own = own_tokenizer(exporter, source or folder, chat_template)
    purpose = purpose_of(load_config(folder))
    given = {"input_ids": input_ids} if input_ids is not None else _example(folder, config, purpose)
    # a model for something else than writing text has no greedy answers
    prompts = prompt_ids(own) if purpose is None else []
    expected = None if model is None else expected_of(model, exporter, folder, prompts, given)
    loaded = load_exported(folder, dtype=kind, device=device, attention=attention)
    # before looking at weights: some readers unpack at the first forward
    logits = logits_of(loaded, given)
    stored = STORED[exporter.container](
        folder, {name: str(entry.get("stored_as")) for name, entry in manifest["layers"].items()}
    )
    matrices = find_matrices(loaded)  # those that their reader made dense
    rows = _check_layers(exporter, stored, weights, loaded, matrices, kind)
    rows += (beside := _check_dense(dense or {}, loaded, folder, manifest, kind))
    difference, bound, answers = None, 0.0, None
    if expected is not None:
        on_cpu = {torch.device(device).type, expected.device} == {"cpu"}
        same = on_cpu and _same_call(loaded, weights, matrices)
        difference, bound, answers = compare_logits(expected, loaded, logits, exporter, weights, kind, same)
    elements = sum(spec.elements for spec in weights.specs.values())
    report = VerifyReport(
        str(folder),
        exporter.reader(),
        str(kind).removeprefix("torch."),
        elements,
        rows,
        difference,
        bound,
        answers,
        len(beside),
        compare_tokens(exporter, folder, source or folder, own, loaded),
    )
    if not report.ok:
        raise ValueError(str(report))
    return report


def _example(folder: Path, config: Mapping[str, Any], purpose: Purpose | None) -> dict[str, Tensor]:
    """What the models are asked with: of images, of the size that the folder's image processor makes."""
    return example_of(config, purpose, made_size(folder))


def _check_layers(
    exporter: Exporter,
    stored: Any,
    weights: Weights,
    loaded: Any,
    matrices: Mapping[str, Matrix],
    kind: torch.dtype,
) -> list[LayerCheck]:
    """All layers, one at a time. stored: of STORED. matrices: those that the reader made dense."""
    rows = []
    for name, weight in weights.items():
        read = _read_back(exporter, stored[name], LayerSpec.of(weight))
        in_model = exporter.dense(loaded, name, matrices.get(name), kind)
        row = _check_layer(name, weight, read, in_model, kind)
        if stored.inputs is not None:
            wanted = input_constants(weights.specs[name].activation)
            off = _differing(stored.inputs.get(name, {}), wanted)
            row = replace(row, scales=row.scales + off)
        rows.append(row)
    return rows


def _check_layer(
    name: str, weight: Weight, read: ReadBack, dense: Tensor | None, kind: torch.dtype
) -> LayerCheck:
    """One layer as its format's library reads it, and the dense weight it has in the loaded model, if any."""
    scales = _differences(read.scale.float(), weight.scale.float())
    for key in ("zero", "offset"):
        scales += _differences(
            getattr(read, key), getattr(weight, key, None) if isinstance(weight, PackedWeight) else None
        )
    codes = _differences(read.codes, weight.unpack_codes())
    return LayerCheck(
        name, codes, scales, None if dense is None else _differences(dense, weight.dequantize(kind))
    )


def _dense_there(loaded: Any, name: str, folder: Path, manifest: Mapping[str, Any]) -> Tensor | None:
    """A dense tensor in the loaded model; in the files, where the reader's model is none of torch's."""
    found = dict(loaded.named_parameters(remove_duplicate=False)).get(name)
    if found is not None:
        return found.detach().cpu()
    keys = (manifest.get("trained", {}).get(name, {}).get("stored_as"), name)  # onnx: by parameter
    for path in tensor_files(folder):
        with safe_open(path, framework="pt") as file:
            if key := next((key for key in keys if key in file.keys()), None):  # noqa: SIM118
                return file.get_tensor(key)
    return None


def _check_dense(
    dense: Mapping[str, Trained], loaded: Any, folder: Path, manifest: Mapping[str, Any], kind: torch.dtype
) -> list[LayerCheck]:
    """The dense tensors that were trained, as they are there. Vectors that a format keeps wider and moved (a
    norm's offset in gguf) come back to within fp32's last bit of 1."""
    rows = []
    for name, trained in dense.items():
        found, wanted = _dense_there(loaded, name, folder, manifest), trained.value().cpu().to(kind)
        if found is None and any(part in TRAINING_ONLY for part in name.split(".")):
            continue  # a graph holds what it computes with
        apart = wanted.numel()
        if found is not None and found.shape == wanted.shape:
            away = (found.to(kind).float() - wanted.float()).abs()
            apart = int((away > (OFFSET_ROUNDING if wanted.dim() == 1 else 0)).sum())
        rows.append(LayerCheck(name, 0, 0, apart))
    return rows


def _same_call(loaded: Any, weights: Weights, matrices: Mapping[str, Matrix]) -> bool:
    """Whether, on a CPU, both sides make the same matmul: no layer is worked on in chunks of rows, and none
    that the reader made dense begins its sums with a bias."""
    if any(spec.elements > CHUNK_ELEMENTS for spec in weights.specs.values()):
        return False
    return not any(
        getattr(loaded.get_submodule(name), "bias", None) is not None
        for name, m in matrices.items()
        if name in weights and m.plain
    )


def _differences(a: Tensor | None, b: Tensor | None) -> int:
    """How many numbers differ; all of them when only one side is there or the shapes are not the same."""
    if a is None or b is None:
        return sum(t.numel() for t in (a, b) if t is not None)
    if a.shape != b.shape:
        return max(a.numel(), b.numel(), 1)
    return int((a.cpu() != b.cpu()).sum())


def _differing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    """How many numbers differ of tensors by name."""
    return sum(_differences(found.get(name), wanted.get(name)) for name in {*found, *wanted})


def _read_back(exporter: Exporter, parts: list[dict[str, Tensor]], spec: LayerSpec) -> ReadBack:
    """Each part of a layer through its format's library, one below the other."""
    found = [exporter.read_back(tensors, spec) for tensors in parts]
    if len(found) == 1:
        return found[0]

    def stack(key: str, dim: int) -> Tensor | None:
        values = [getattr(read, key) for read in found]
        return None if any(value is None for value in values) else torch.cat(values, dim)

    codes, scale = stack("codes", -2), stack("scale", -1)
    assert codes is not None and scale is not None
    return ReadBack(codes, scale, stack("zero", -1), stack("offset", -1))

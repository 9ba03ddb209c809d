"""Which layers quantize packs, and the table that says what became of each.

Every linear layer of the model gets a row: quantized, or skipped and why. Nothing is skipped in silence.
"""

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from ..model.checkpoint import Checkpoint
from ..model.conv import is_conv
from ..model.experts import is_experts
from ..model.matrices import Matrix, find_matrices, in_parts, unpackable
from ..model.purpose import predictors
from ..model.roles import is_head
from ..model.walk import text_tower
from ..recipe.sections.overrides import fusions
from ..recipe.sections.quant import QuantSection
from ..segments import segments_in


@dataclass(frozen=True)
class QuantRow:
    """One layer of the table. error: ||W - W^||^2 / ||W||^2. packed_bytes counts codes, residual, scales,
    zero points and mask; zeros: the weights that are locked at zero, None without a mask.
    """

    layer: str
    action: str
    reason: str
    bits: int | None = None
    group_size: int | None = None
    error: float | None = None
    parameters: int = 0
    packed_bytes: int = 0
    zeros: int | None = None


@dataclass(frozen=True)
class QuantTable:
    rows: list[QuantRow]

    @property
    def quantized(self) -> list[QuantRow]:
        return [row for row in self.rows if row.action == "quantized"]

    @property
    def zeros(self) -> float | None:
        """The share of the weights of the masked layers that is locked at zero; None: no layer has a mask."""
        masked = [row for row in self.quantized if row.zeros is not None]
        return (
            sum(row.zeros or 0 for row in masked) / sum(row.parameters for row in masked) if masked else None
        )

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        done, skipped = self.quantized, [row for row in self.rows if row.action != "quantized"]
        weights, held = sum(r.parameters for r in done), sum(r.packed_bytes for r in done)
        lines = [
            f"quantized {len(done)} layers: {weights:,} weights, {held * 8 / max(1, weights):.2f} bits "
            "each while it trains (codes, residual, scales)"
        ]
        if self.zeros is not None:
            count = sum(row.zeros or 0 for row in done)
            lines.append(f"zero, and locked: {count:,} weights, {self.zeros:.1%} of the layers with a mask")
        by_reason: dict[str, list[str]] = {}
        for row in skipped:
            by_reason.setdefault(row.reason, []).append(row.layer)
        lines += [f"left alone ({reason}): {some(names)}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _kind(name: str) -> str:
    """A name with its numbers left out, which is a glob for all modules of that kind."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def plan_layers(
    model: nn.Module, quant: QuantSection, folder: Path
) -> tuple[dict[str, Matrix], list[QuantRow]]:
    """The matrices to quantize by the name of their linear (of a fused one that overrides take apart, its
    parts), and a row for everything that looks like a weight matrix and is left alone. folder: where its
    config.json is. ValueError naming every module that should be packed and cannot be."""
    found = find_matrices(model)
    # a convolution that nobody asks for is one of the rest
    matrices = {name: matrix for name, matrix in found.items() if quant.convolutions or not matrix.conv}
    text = text_tower(model)
    targets, skipped, refused = _choose(model, matrices, quant, text)
    targets = in_parts(targets, fusions(quant.overrides, targets, lambda: segments_in(folder)))
    more, unpacked = _look_at_the_rest(model, matrices, quant, text)
    skipped += more
    refused |= unpacked
    lines = [
        f"{kind}: {why}; to leave it in full precision: quant.exclude: ['{kind}*']"
        for kind, why in refused.items()
    ]
    lines += _unfit(model, targets, quant)
    if lines:
        raise ValueError(f"{type(model).__name__} cannot be packed as asked:\n  " + "\n  ".join(lines))
    if not targets:
        convs = _kind_of(found, conv=True)
        beside = f"; its convolutions are {some(convs)} (quant.convolutions: true)" if convs else ""
        raise ValueError(
            f"{type(model).__name__}: no layer to quantize with quant.targets: {quant.targets} and "
            f"exclude: {quant.exclude}; "
            f"its linears are {some(_kind_of(matrices, conv=False), 8) or 'none'}{beside}"
        )
    return targets, skipped


def packs_linears(model: nn.Module, quant: QuantSection) -> bool:
    """Whether a model has linears that are packed; one that has none is a network of convolutions."""
    linears = {name: matrix for name, matrix in find_matrices(model).items() if not matrix.conv}
    return bool(_choose(model, linears, quant, text_tower(model))[0])


def _kind_of(matrices: dict[str, Matrix], conv: bool) -> list[str]:
    """The names of the linears, or of the convolutions."""
    return [name for name, matrix in matrices.items() if not matrix.embedding and matrix.conv == conv]


def _choose(
    model: nn.Module, matrices: dict[str, Matrix], quant: QuantSection, text: str
) -> tuple[dict[str, Matrix], list[QuantRow], dict[str, str]]:
    """Of the matrices that can be packed: those that are, rows for the others, and kind of module -> why it
    is refused (experts of a layer that would be packed in part).
    """
    targets: dict[str, Matrix] = {}
    skipped: list[QuantRow] = []
    refused: dict[str, str] = {}
    heads = tuple(f"{name}." for name in predictors(model))
    stacks: dict[str, dict[str, str | None]] = {}  # experts module -> its linears and why they are left alone
    for name, matrix in matrices.items():
        reason = quant.skip_reason(name, matrix.embedding, matrix.conv)
        if (
            reason is None
            and quant.targets == "all-linear"
            and not name.startswith(text)
            and not is_head(name)
        ):
            reason = "not part of the language model"
        if reason is None and quant.targets == "all-linear" and f"{name}.".startswith(heads):
            reason = "part of the head"
        if matrix.expert is not None:
            stacks.setdefault(name.rsplit(".", 2)[0], {})[name] = reason
        if reason is None:
            targets[name] = matrix
        else:
            skipped.append(_skip(name, reason, matrix.shape[0] * matrix.shape[1]))
    for stack, linears in stacks.items():
        left = [name for name, reason in linears.items() if reason is not None]
        if left and len(left) < len(linears):
            refused[_kind(stack)] = (
                f"{len(left)} of its {len(linears)} expert matrices would stay in full precision "
                f"({left[0]}: {linears[left[0]]}); "
                "the experts of a layer are packed together or not at all"
            )
    return targets, skipped, refused


def _look_at_the_rest(
    model: nn.Module, matrices: dict[str, Matrix], quant: QuantSection, text: str
) -> tuple[list[QuantRow], dict[str, str]]:
    """Rows for the modules that are none of the matrices and still hold some, and kind of module -> why it is
    refused (one that should be packed and cannot be)."""
    skipped: list[QuantRow] = []
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if name in matrices or is_experts(module):
            continue
        problem, matrix_like = unpackable(module), [p for p in own.values() if p.dim() >= 2]
        reason = quant.skip_reason(name, convolution=is_conv(module)) or (
            None if name.startswith(text) else "not part of the language model"
        )
        if is_conv(module) and not quant.convolutions:
            problem = reason = None
        if isinstance(module, nn.Embedding):
            skipped.append(_skip(name, "embedding", module.weight.numel()))
        elif problem is not None and reason is None:
            refused[_kind(name)] = problem
        elif isinstance(module, nn.Linear):
            skipped.append(_skip(name, reason or "", module.weight.numel()))
        elif matrix_like:
            dtype = str(matrix_like[0].dtype).removeprefix("torch.")
            reason = reason or f"{type(module).__name__}: no linear layer, stays in {dtype}"
            skipped += [_skip(f"{name}.{key}", reason, p.numel()) for key, p in own.items() if p.dim() >= 2]
    return skipped, refused


def _unfit(model: nn.Module, targets: dict[str, Matrix], quant: QuantSection) -> list[str]:
    """Why this model, or a key of quant for it, cannot be: a line each."""
    lines = []
    for name, module in model.named_modules():
        if hasattr(module, "layers_are_rescaled"):  # RWKV divides its weights in place for inference
            lines.append(
                f"{name}: {type(module).__name__} changes its weights between training and inference; this "
                "model cannot be packed"
            )
    for key, found in (
        ("lm_head", any(map(is_head, targets))),
        ("embeddings", any(m.embedding for m in targets.values())),
    ):
        if getattr(quant, key) is not None and not found:
            lines.append(
                f"quant.{key}: {getattr(quant, key)}: this model has none that can be packed; set "
                f"quant.{key}: null"
            )
    return lines


def _skip(name: str, reason: str, parameters: int) -> QuantRow:
    return QuantRow(name, "skipped", reason, parameters=parameters)


def check_shapes(checkpoint: Checkpoint, targets: dict[str, Matrix]) -> None:
    """ValueError for every layer whose tensor in the files has not the shape that config.json gives the
    layer.
    """
    problems = []
    for name, matrix in targets.items():
        if matrix.rows is not None:
            matrix = checkpoint.matrices[matrix.whole]
        keys = checkpoint.keys_for(matrix.parameter)
        if len(keys) != 1 or matrix.expert is not None:
            continue  # put together from several tensors, or a stack: Checkpoint.matrix looks at those
        found, wanted = checkpoint.shape(keys[0]), matrix.shape[::-1] if matrix.transposed else matrix.shape
        found = (found[0], prod(found[1:])) if matrix.conv else found
        if found != wanted:
            problems.append(
                f"{checkpoint.file(keys[0])}: {keys[0]} of {name} has shape {list(found)}; config.json "
                f"makes it {list(wanted)}"
            )
    if problems:
        raise ValueError(
            "\n".join(
                [*problems, "the files and config.json do not belong together: get this checkpoint again"]
            )
        )

"""quantize: a checkpoint becomes a model whose linears are packed integers, without the dense model ever being in memory.

Range calibrators (absmax, minmax, mse) and binary ones need one weight at a time: it is read, calibrated, packed, dropped.
gptq walks the decoder layers (walk.py): a layer is read, the inputs of its linears are summed into Hessians, its linears are
packed in place, and the text goes on through the packed layer, so later layers see the errors of earlier ones.

A checkpoint that is quantized already (incoming/) is not calibrated: its codes are repacked as they are (incoming/adopt.py).

Every linear layer of the model gets a row in the table: quantized, or skipped and why. Nothing is skipped in silence.
"""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .experts import is_experts
from .grid import Grid, Weight
from .grid.calibrate import CALIBRATORS, Stats
from .incoming.adopt import adopt
from .integrations.transformers import mark_packed
from .linear import PackedEmbedding, PackedLinear
from .load import Checkpoint, materialize
from .matrices import Matrix, find_matrices, stand_in, unpackable
from .memory import release_freed
from .recipe import QuantSection
from .recipe_sections import is_head
from .walk import Batch, LayerWalk, text_tower


@dataclass(frozen=True)
class QuantRow:
    """One layer of the table. error: ||W - W^||^2 / ||W||^2. packed_bytes counts codes, residual, scales and zeros."""

    layer: str
    action: str
    reason: str
    bits: int | None = None
    group_size: int | None = None
    error: float | None = None
    parameters: int = 0
    packed_bytes: int = 0


@dataclass(frozen=True)
class QuantTable:
    rows: list[QuantRow]

    @property
    def quantized(self) -> list[QuantRow]:
        return [row for row in self.rows if row.action == "quantized"]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        done, skipped = self.quantized, [row for row in self.rows if row.action != "quantized"]
        weights, held = sum(r.parameters for r in done), sum(r.packed_bytes for r in done)
        lines = [f"quantized {len(done)} layers: {weights:,} weights, {held * 8 / max(1, weights):.2f} bits each with residual and scales"]
        by_reason: dict[str, list[str]] = {}
        for row in skipped:
            by_reason.setdefault(row.reason, []).append(row.layer)
        lines += [f"left alone ({reason}): {_some(names)}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _kind(name: str) -> str:
    """A name with its numbers left out, which is a glob for all modules of that kind."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def plan_layers(model: nn.Module, quant: QuantSection) -> tuple[dict[str, Matrix], list[QuantRow]]:
    """The matrices to quantize by the name of their linear, and a row for everything that looks like a weight matrix and is left
    alone. ValueError naming every module that should be packed and cannot be."""
    matrices = find_matrices(model)
    targets: dict[str, Matrix] = {}
    skipped: list[QuantRow] = []
    refused: dict[str, str] = {}  # kind of module (its name without numbers) -> why
    stacks: dict[str, dict[str, str | None]] = {}  # experts module -> its linears and why they are left alone
    text = text_tower(model)

    def skip(name: str, reason: str, parameters: int) -> None:
        skipped.append(QuantRow(name, "skipped", reason, parameters=parameters))

    for name, matrix in matrices.items():
        reason = quant.skip_reason(name, embedding=matrix.embedding)
        if reason is None and quant.targets == "all-linear" and not name.startswith(text) and not is_head(name):
            reason = "not part of the language model"
        if matrix.expert is not None:
            stacks.setdefault(name.rsplit(".", 2)[0], {})[name] = reason
        if reason is None:
            targets[name] = matrix
        else:
            skip(name, reason, matrix.shape[0] * matrix.shape[1])
    for stack, linears in stacks.items():
        left = [name for name, reason in linears.items() if reason is not None]
        if left and len(left) < len(linears):
            refused[_kind(stack)] = (
                f"{len(left)} of its {len(linears)} expert matrices would stay in full precision ({left[0]}: {linears[left[0]]}); "
                "the experts of a layer are packed together or not at all"
            )
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if name in matrices or is_experts(module):
            continue
        problem, matrix_like = unpackable(module), [p for p in own.values() if p.dim() >= 2]
        reason = quant.skip_reason(name) or (None if name.startswith(text) else "not part of the language model")
        if isinstance(module, nn.Embedding):
            skip(name, "embedding", module.weight.numel())
        elif problem is not None and reason is None:
            refused[_kind(name)] = problem
        elif isinstance(module, nn.Linear):
            skip(name, reason or "", module.weight.numel())
        elif matrix_like:
            dtype = str(matrix_like[0].dtype).removeprefix("torch.")
            reason = reason or f"{type(module).__name__}: no linear layer, stays in {dtype}"
            skipped += [
                QuantRow(f"{name}.{key}", "skipped", reason, parameters=p.numel()) for key, p in own.items() if p.dim() >= 2
            ]
    lines = [f"{kind}: {why}; to leave it in full precision: quant.exclude: ['{kind}*']" for kind, why in refused.items()]
    for name, module in model.named_modules():
        if hasattr(module, "layers_are_rescaled"):  # RWKV divides its weights in place for inference
            lines.append(f"{name}: {type(module).__name__} changes its weights between training and inference; this model cannot be packed")
    for key, found in (("lm_head", any(map(is_head, targets))), ("embeddings", any(m.embedding for m in targets.values()))):
        if getattr(quant, key) is not None and not found:
            lines.append(f"quant.{key}: {getattr(quant, key)}: this model has none that can be packed; set quant.{key}: null")
    if lines:
        raise ValueError(f"{type(model).__name__} cannot be packed as asked:\n  " + "\n  ".join(lines))
    if not targets:
        raise ValueError(
            f"{type(model).__name__}: no layer to quantize with quant.targets: {quant.targets} and exclude: {quant.exclude}; "
            f"its linears are {_some([name for name, m in matrices.items() if not m.embedding], 8) or 'none'}"
        )
    return targets, skipped


def quantize(
    checkpoint: Checkpoint,
    quant: QuantSection,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    calibration: Callable[[], list[Batch]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Any, QuantTable]:
    """The model with PackedLinears, in eval mode on `device`, everything unquantized in `dtype`; and the table.

    calibration() gives the token batches of gptq; it is called only when the calibrator needs text.
    """
    device, dtype = torch.device(device), dtype or checkpoint.dtype
    model = checkpoint.empty_model(attention)
    targets, rows = plan_layers(model, quant)
    stand_in(model, targets)
    if checkpoint.incoming is None:
        check_shapes(checkpoint, targets)
    else:
        rows += [QuantRow(*row) for row in adopt(checkpoint, quant, model, targets, device, dtype, progress)]
        return _finished(model, rows)
    if quant.from_checkpoint:
        raise ValueError(f"calibrate: from_checkpoint, but {checkpoint.source} is not quantized; choose one of {', '.join(CALIBRATORS)}")
    calibrator = CALIBRATORS[quant.calibrate]
    stats = Stats(p=quant.mse_p, damping=quant.calibration.damping)
    tell = progress or (lambda name: None)

    def pack(name: str, hessian: Tensor | None = None) -> None:
        grid = quant.grid_for(name)
        layer = model.get_submodule(name)
        # fp32 whatever the checkpoint's dtype: scales are searched on the weights as they are stored.
        weight = checkpoint.matrix(name, device=device, dtype=torch.float32)
        run, note = calibrator, ""
        if calibrator.needs_text and hessian is None:
            run, note = CALIBRATORS["mse"], "outside the decoder layers: calibrated by mse"
            if targets[name].expert is not None:
                note = "no calibration token reached this expert: calibrated by mse"
        base = run.run(weight, grid, Stats(hessian=hessian, p=stats.p, damping=stats.damping))
        bias = getattr(layer, "bias", None)
        if bias is not None:
            bias = checkpoint.weight_for(f"{name}.bias", device=device, dtype=dtype)
        if isinstance(layer, nn.Embedding):
            packed = PackedEmbedding.in_place_of(layer, base, dtype)
        else:
            packed = PackedLinear(base, bias)
        model.set_submodule(name, packed)
        if is_head(name) or isinstance(packed, PackedEmbedding):
            model.config.tie_word_embeddings = False  # a packed matrix is nobody's parameter
        rows.append(_row(name, weight, base, grid, note))
        del weight
        release_freed()
        tell(name)

    with torch.no_grad():
        if calibrator.needs_text:
            if calibration is None:
                raise ValueError(f"calibrate: {quant.calibrate} needs calibration text (quant.calibration)")
            walk = LayerWalk(model, checkpoint, calibration(), device, dtype)
            for index, layer_name, layer in walk:
                inside = {n: model.get_submodule(n) for n in targets if n.startswith(layer_name + ".")}
                experts = {name for name in inside if targets[name].expert is not None}
                hessians = _hessians(walk, index, inside, experts)
                for name in inside:
                    pack(name, hessians.pop(name, None))
                layer.eval()
                walk.advance(index)
        for name in targets:
            if not isinstance(model.get_submodule(name), PackedLinear):
                pack(name)
        materialize(model, checkpoint, "", device, dtype)
    return _finished(model, rows)


def _finished(model: Any, rows: list[QuantRow]) -> tuple[Any, QuantTable]:
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order.get(row.layer, len(order)))
    mark_packed(model)  # so that the model's own save_pretrained writes a folder that loads
    return model.eval(), QuantTable(rows)


def check_shapes(checkpoint: Checkpoint, targets: dict[str, Matrix]) -> None:
    """ValueError for every layer whose tensor in the files has not the shape that config.json gives the layer."""
    problems = []
    for name, matrix in targets.items():
        keys = checkpoint.keys_for(matrix.parameter)
        if len(keys) != 1 or matrix.expert is not None:
            continue  # put together from several tensors, or a stack: Checkpoint.matrix looks at those
        found, wanted = checkpoint.shape(keys[0]), matrix.shape[::-1] if matrix.transposed else matrix.shape
        if found != wanted:
            problems.append(f"{checkpoint.file(keys[0])}: {keys[0]} of {name} has shape {list(found)}; config.json makes it {list(wanted)}")
    if problems:
        raise ValueError("\n".join([*problems, "the files and config.json do not belong together: get this checkpoint again"]))


def _hessians(walk: LayerWalk, index: int, linears: dict[str, nn.Module], experts: Collection[str] = ()) -> dict[str, Tensor]:
    """sum x x^T / tokens over all batches, fp32 [K, K], for every linear of a layer. Linears that are given one and the same
    tensor (q, k and v; gate and up) share one sum. Of `experts`, those that no token reached have none."""
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(linears, 0)
    owner: dict[str, str] = {}  # linear -> the one whose sum it shares
    given: dict[str, Tensor] = {}  # inputs of the forward that is running; held, so that none is freed and mistaken for another
    handles = []
    for name, linear in linears.items():

        def hook(module: nn.Module, args: tuple[Tensor, ...], _name: str = name) -> None:
            same = next((other for other, x in given.items() if x is args[0]), _name)
            if owner.setdefault(_name, same) != same:
                raise ValueError(f"gptq: {_name} is given its input in changing ways; use calibrate: mse for this model")
            given[_name] = args[0]
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            tokens[_name] += x.shape[0]
            if same == _name:
                sums[_name] = sums[_name].addmm_(x.t(), x) if _name in sums else x.t() @ x

        handles.append(linear.register_forward_pre_hook(hook))
    walk.run(index, keep=lambda number, out: given.clear())
    for handle in handles:
        handle.remove()
    if idle := [name for name in linears if not tokens[name] and name not in experts]:
        raise ValueError(f"gptq: no calibration token reached {_some(idle)}; use calibrate: mse, or other calibration text")
    for name, total in sums.items():
        total.div_(tokens[name])
    return {name: sums[owner[name]] for name in linears if tokens[name]}


def _row(name: str, weight: Tensor, base: Weight, grid: Grid, note: str) -> QuantRow:
    error = (base.dequantize() - weight).square().sum() / weight.square().sum().clamp_min(1e-30)
    return QuantRow(
        name, "quantized", note, grid.bits, grid.group_size, float(error), weight.numel(), base.nbytes
    )  # fmt: skip

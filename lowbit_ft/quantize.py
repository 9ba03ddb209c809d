"""quantize: a checkpoint becomes a model whose linears are packed integers, without the dense model ever being in memory.

Range calibrators (absmax, minmax, mse) and binary ones need one weight at a time: it is read, calibrated, packed, dropped.
gptq walks the decoder layers (walk.py): a layer is read, the inputs of its linears are summed into Hessians, its linears are
packed in place, and the text goes on through the packed layer, so later layers see the errors of earlier ones.

A checkpoint that is quantized already (incoming/) is not calibrated: its codes are repacked as they are (incoming/adopt.py).

Every linear layer of the model gets a row in the table: quantized, or skipped and why. Nothing is skipped in silence.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .grid import Grid, Weight
from .grid.calibrate import CALIBRATORS, Stats
from .incoming.adopt import adopt
from .integrations.transformers import mark_packed
from .linear import PackedLinear
from .load import Checkpoint, materialize
from .memory import release_freed
from .recipe import QuantSection
from .walk import Batch, LayerWalk


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


def plan_layers(model: nn.Module, quant: QuantSection) -> tuple[dict[str, nn.Linear], list[QuantRow]]:
    """The linears to quantize by name, and a row for everything that looks like a weight matrix and is left alone."""
    targets: dict[str, nn.Linear] = {}
    skipped: list[QuantRow] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Linear):
            reason = quant.skip_reason(name)
            if reason is None:
                targets[name] = module
                continue
            skipped.append(QuantRow(name, "skipped", reason, parameters=module.weight.numel()))
        elif isinstance(module, nn.Embedding):
            skipped.append(QuantRow(name, "skipped", "embedding", parameters=module.weight.numel()))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2:
                    what = "fused experts" if parameter.dim() == 3 else kind
                    reason = f"{what}: only nn.Linear is packed, stays in {str(parameter.dtype).removeprefix('torch.')}"
                    skipped.append(QuantRow(f"{name}.{key}", "skipped", reason, parameters=parameter.numel()))
    if not targets:
        raise ValueError(
            f"{type(model).__name__}: no layer to quantize with quant.targets: {quant.targets} and exclude: {quant.exclude}; "
            f"its linears are {_some([n for n, m in model.named_modules() if isinstance(m, nn.Linear)], 8) or 'none'}"
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
    check_shapes(checkpoint, targets)
    if checkpoint.incoming is not None:
        rows += [QuantRow(*row) for row in adopt(checkpoint, quant, model, list(targets), device, dtype, progress)]
        return _finished(model, rows)
    if quant.from_checkpoint:
        raise ValueError(f"calibrate: from_checkpoint, but {checkpoint.source} is not quantized; choose one of {', '.join(CALIBRATORS)}")
    calibrator = CALIBRATORS[quant.calibrate]
    stats = Stats(p=quant.mse_p, damping=quant.calibration.damping)
    tell = progress or (lambda name: None)

    def pack(name: str, hessian: Tensor | None = None) -> None:
        grid = quant.grid_for(name)
        linear = targets[name]
        # fp32 whatever the checkpoint's dtype: scales are searched on the weights as they are stored.
        weight = checkpoint.weight_for(f"{name}.weight", device=device, dtype=torch.float32)
        run, note = calibrator, ""
        if calibrator.needs_text and hessian is None:
            run, note = CALIBRATORS["mse"], "outside the decoder layers: calibrated by mse"
        base = run.run(weight, grid, Stats(hessian=hessian, p=stats.p, damping=stats.damping))
        bias = None if linear.bias is None else checkpoint.weight_for(f"{name}.bias", device=device, dtype=dtype)
        model.set_submodule(name, PackedLinear(base, bias))
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
                inside = {n: m for n, m in targets.items() if n.startswith(layer_name + ".")}
                hessians = _hessians(walk, index, inside)
                for name in inside:
                    pack(name, hessians.pop(name))
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


def check_shapes(checkpoint: Checkpoint, targets: dict[str, nn.Linear]) -> None:
    """ValueError for every layer whose tensor in the files has not the shape that config.json gives the layer."""
    problems = []
    for name, linear in targets.items():
        for key in checkpoint.keys_for(f"{name}.weight"):
            found, wanted = checkpoint.shape(key), tuple(linear.weight.shape)
            if len(checkpoint.keys_for(f"{name}.weight")) == 1 and found != wanted:
                problems.append(f"{checkpoint.file(key)}: {key} has shape {list(found)}; config.json makes it {list(wanted)}")
    if problems:
        raise ValueError("\n".join([*problems, "the files and config.json do not belong together: get this checkpoint again"]))


def _hessians(walk: LayerWalk, index: int, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """sum x x^T / tokens over all batches, fp32 [K, K], for every linear of a layer. Linears that are given one and the same
    tensor (q, k and v; gate and up) share one sum."""
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
    idle = [name for name in linears if not tokens[name]]
    if idle:
        raise ValueError(f"gptq: no calibration token reached {_some(idle)}; use calibrate: mse, or other calibration text")
    for name, total in sums.items():
        total.div_(tokens[name])
    return {name: sums[owner[name]] for name in linears}


def _row(name: str, weight: Tensor, base: Weight, grid: Grid, note: str) -> QuantRow:
    error = (base.dequantize() - weight).square().sum() / weight.square().sum().clamp_min(1e-30)
    return QuantRow(
        name, "quantized", note, grid.bits, grid.group_size, float(error), weight.numel(), base.nbytes
    )  # fmt: skip

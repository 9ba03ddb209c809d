"""calibrate: static scales, clip factors and kinds, chosen on calibration rows by the error of the output.

Text passes once through the packed model, its inputs left as they come. Of every input that layers share (q,
k and v; gate and up) the range over all tokens is kept, and ROWS of its rows. On these rows each candidate is
judged by what it does to the products that the input goes into, relative (the rows of a convolution are the
patches of its input: model/conv.py):

    sum over the layers of ||(x^ - x) W^T||^2  /  sum over the layers of ||x W^T||^2

The least error wins; but one that a server computes more cheaply wins where its error is within NEAR of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.linear import PackedLinear
from . import ACTIVATIONS, activation_of
from .base import Scheme, positive, ranges
from .place import activations_off, hosts

ROWS = 256  # of an input, from all batches, on the CPU
NEAR = 1.05
PERCENT = 0.999  # of the values lie inside of what range: percentile covers, on either side
KEEP = 0.9  # of the moving average stays when a batch is added
STEPS = 20  # of the range that range: mse tries, down to a twentieth


@dataclass(frozen=True)
class Choice:
    """What the inputs of these layers are on, its relative output error (None: nothing was measured), and
    what else was tried."""

    layers: list[str]
    scheme: Scheme
    error: float | None = None
    tried: dict[str, float] = field(default_factory=dict)

    def learned(self) -> Choice:
        """The same with a static scale or a clip that trains, one for all its layers."""
        return replace(self, scheme=replace(self.scheme, learn=self.layers[0]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"scheme": self.scheme.to_json(), "why": self.why}

    @property
    def why(self) -> str:
        if len(self.tried) < 2:
            return "as the recipe says"
        least = min(self.tried, key=self.tried.__getitem__)
        if self.tried[least] == self.error:
            return f"the least output error of {len(self.tried)}"
        return f"within {NEAR - 1:.0%} of the least output error, which {least} has, and cheaper to serve"


# Of all tokens: the moving averages over batches of the least and the largest value, and these values.
Ends = tuple[float, float, float, float]


@dataclass
class _Seen:
    """One input: whose it is, its ranges as a whole and by segment (channels of each), some of its rows,
    whose last dimensions are `shape`."""

    layers: list[str]
    segments: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    whole: Ends | None = None
    parts: list[Ends] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, most: int) -> None:
        x = x.reshape(-1, *self.shape)
        if not len(x):
            return
        self.whole = _moved(self.whole, x)
        pieces = x.split(self.segments, dim=-1) if self.segments else ()
        before = self.parts or [None] * len(pieces)
        self.parts = [_moved(seen, piece) for seen, piece in zip(before, pieces, strict=True)]
        self.rows.append(x[:: max(1, -(-len(x) // most))].detach().cpu())


def _moved(seen: Ends | None, x: Tensor) -> Ends:
    """A range (None: there is none yet) with the values of one more batch."""
    low, high = (float(value) for value in x.float().aminmax())
    if seen is None:
        return low, high, low, high
    moved = KEEP * seen[0] + (1 - KEEP) * low, KEEP * seen[1] + (1 - KEEP) * high
    return *moved, min(seen[2], low), max(seen[3], high)


def needs_rows(candidates: Mapping[str, Sequence[Scheme]]) -> bool:
    """Whether there is something to choose, or a scale to find."""
    return any(len(found) > 1 or not found[0].calibrated for found in candidates.values())


@torch.no_grad()
def choose(
    model: nn.Module,
    candidates: Mapping[str, Sequence[Scheme]],
    batches: int = 0,
    forward: Callable[[int], object] | None = None,
    rule: str = "moving_average",
    scale_dtype: torch.dtype = torch.bfloat16,
    by_input: bool = False,
) -> list[Choice]:
    """The scheme of every layer that has candidates. forward(i) passes batch i through the model; it is asked
    for only where rows decide, or where a choice has to be of one input (by_input), because who is given one
    tensor is seen there. rule: of static ranges, one of RANGES. ValueError naming the layers that no
    token reached although their scale is static.
    """
    layers = {name: layer for name, layer in hosts(model) if name in candidates}
    assert layers.keys() == candidates.keys(), "candidates for what is no packed layer"
    if not by_input and not needs_rows(candidates):
        alike: dict[Scheme, list[str]] = {}
        for name, (scheme,) in candidates.items():
            alike.setdefault(scheme, []).append(name)
        return [Choice(names, scheme) for scheme, names in alike.items()]
    assert forward is not None, "rows decide, and there are none"
    seen = _observe(model, layers, candidates, batches, forward)
    missed = layers.keys() - {name for one in seen for name in one.layers}
    lost = [name for name in layers if name in missed and not candidates[name][0].calibrated]
    if lost:
        raise ValueError(
            f"quant.activations: no calibration token reached {len(lost)} layers ({lost[0]}, ...), so they "
            "have no static scale; set quant.activations.dynamic: true, or raise quant.calibration.samples"
        )
    made = [_chosen(one, layers, candidates[one.layers[0]], rule, scale_dtype) for one in seen]
    return made + [Choice([name], candidates[name][0]) for name in layers if name in missed]


def _observe(
    model: nn.Module,
    layers: Mapping[str, PackedLinear],
    candidates: Mapping[str, Sequence[Scheme]],
    batches: int,
    forward: Callable[[int], object],
) -> list[_Seen]:
    """What passes through the layers, once for all that are given one tensor and have the same candidates."""
    owner: dict[str, str] = {}
    found: dict[str, _Seen] = {}
    given: dict[str, Tensor] = {}  # held while a batch runs, so that none is mistaken for one that was freed
    most = max(1, ROWS // max(1, batches))
    alike = {name: (candidates[name], layer.row_key) for name, layer in layers.items()}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, PackedLinear)
            x = args[0]
            if name not in owner:
                same = (n for n, t in given.items() if t is x and alike[n] == alike[name])
                owner[name] = next(same, name)
                segments = next((one.segments for one in candidates[name] if one.segments), ())
                found.setdefault(owner[name], _Seen([], segments, module.row_shape)).layers.append(name)
            given[name] = x
            if owner[name] == name:
                found[name].add(module.rows(x), most)

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        with activations_off(model):
            for number in range(batches):
                forward(number)
                given.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [one for one in found.values() if one.whole is not None]


def _chosen(
    seen: _Seen,
    layers: Mapping[str, PackedLinear],
    candidates: Sequence[Scheme],
    rule: str,
    scale_dtype: torch.dtype,
) -> Choice:
    first = layers[seen.layers[0]]
    rows = torch.cat(seen.rows).to(first.base.scale.device).float()
    tried: dict[str, float] = {}
    made: list[tuple[float, Scheme]] = []
    own = [(layers[name], layers[name].base) for name in seen.layers]

    def squares(x: Tensor) -> float:
        return sum(float(layer.product(x, base.linear).double().square().sum()) for layer, base in own)

    size = squares(rows)
    for scheme in candidates:
        if not scheme.calibrated:
            scheme = _found(scheme, rows, seen, rule, scale_dtype)
        off = activation_of(scheme).quantize(rows) - rows
        error = squares(off) / max(size, 1e-30)
        made.append((error, scheme))
        tried[str(scheme)] = error
    bound = NEAR * min(error for error, _ in made)
    # sorted is stable: of equally cheap ones the first of the recipe
    error, scheme = min(
        (one for one in made if one[0] <= bound),
        key=lambda one: (ACTIVATIONS[one[1].kind].cost(one[1]), one[0]),
    )
    return Choice(seen.layers, scheme, error, tried)


def _found(scheme: Scheme, rows: Tensor, seen: _Seen, rule: str, dtype: torch.dtype) -> Scheme:
    """A static scheme with its scale, or with that of every segment."""
    assert seen.whole is not None
    if not scheme.segments:
        return RANGES[rule](scheme, rows, seen.whole, dtype)
    pieces = enumerate(zip(rows.split(scheme.segments, dim=-1), seen.parts, strict=True))
    parts = [RANGES[rule](scheme.part(i), piece, own, dtype) for i, (piece, own) in pieces]
    scale, zero = ([value for part in parts for value in getattr(part, key)] for key in ("scale", "zero"))
    return replace(scheme, scale=tuple(scale), zero=tuple(zero))


def _moving_average(scheme: Scheme, rows: Tensor, seen: Ends, dtype: torch.dtype) -> Scheme:
    return _static(scheme, *seen[:2], dtype)


def _minmax(scheme: Scheme, rows: Tensor, seen: Ends, dtype: torch.dtype) -> Scheme:
    return _static(scheme, *seen[2:], dtype)


def _percentile(scheme: Scheme, rows: Tensor, seen: Ends, dtype: torch.dtype) -> Scheme:
    flat = rows.flatten()
    flat = flat[:: max(1, -(-flat.numel() // (1 << 24)))]  # as many as quantile takes
    low, high = torch.quantile(flat, torch.tensor([1 - PERCENT, PERCENT], device=rows.device)).tolist()
    return _static(scheme, low, high, dtype)


def _mse(scheme: Scheme, rows: Tensor, seen: Ends, dtype: torch.dtype) -> Scheme:
    low, high = float(rows.min()), float(rows.max())
    cuts = [_static(scheme, low * i / STEPS, high * i / STEPS, dtype) for i in range(1, STEPS + 1)]
    return min(cuts, key=lambda cut: float((activation_of(cut).quantize(rows) - rows).square().sum()))


def _lsq(scheme: Scheme, rows: Tensor, seen: Ends, dtype: torch.dtype) -> Scheme:
    """2 mean |x| / sqrt(Q), LSQ's start (arXiv 1902.08153, section 2.1), Q the largest code: most values on
    few codes, the rest clipped, for who trains it (`learn`). Of dual each sign has its own mean."""
    assert scheme.symmetric, "refused by the recipe"
    parts = (-rows[rows < 0], rows[rows > 0]) if scheme.kind == "dual" else (rows.abs().flatten(),)
    tops = (-scheme.lowest, scheme.highest) if scheme.kind == "dual" else (scheme.highest,)
    means = [float(part.double().mean()) if part.numel() else 0.0 for part in parts]
    scale = positive(torch.tensor([2 * m / top**0.5 for m, top in zip(means, tops, strict=True)]))
    return replace(scheme, scale=tuple(scale.to(dtype).float().tolist()), zero=())


def _static(scheme: Scheme, low: float, high: float, dtype: torch.dtype) -> Scheme:
    """The scale (and zero) that cover [low, high], in the dtype in which scales ship."""
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    if scheme.kind == "dual":
        sizes = ends / torch.tensor([scheme.lowest, scheme.highest])
        scale, zero = torch.where(sizes > 0, sizes, torch.ones_like(sizes)), None
    else:
        scale, zero = ranges(ends[:1], ends[1:], scheme)
    kept = tuple(scale.to(dtype).float().tolist())
    zeros = () if zero is None else tuple(int(value) for value in zero)
    return replace(scheme, scale=kept, zero=zeros)


# What a static scale covers. rows fp32 [R, K]; dtype: in which scales ship.
RANGES: dict[str, Callable[[Scheme, Tensor, Ends, torch.dtype], Scheme]] = {
    "moving_average": _moving_average,
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
    "lsq": _lsq,
}

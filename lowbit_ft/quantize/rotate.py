"""plan_rotation: what quant.rotation and quant.smooth become for one checkpoint, before anything is packed.

Where nothing has to be measured the recipe says it all. Otherwise the dense model is walked once, layer by
layer, with r1 folded in and nothing else (model/walk.py), and of every layer is known

    adaptive   the relative errors of weight and activation of each site, off and on. RoSTE makes two passes,
               one with all sites off and one with all on; before anything is rounded both are the same
               function, so what a site's linear is given in the second is what it is given in the first,
               turned, and one pass tells both
    smooth     max|x| of every channel behind a norm, and some rows of x

Weights are rounded on their grid with its full range, activations by the quantizer of the recipe. Tokens of
padding are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..grid import Grid
from ..grid.calibrate import CALIBRATORS, Stats
from ..model.checkpoint import Checkpoint
from ..model.walk import Batch, LayerWalk
from ..recipe.sections.quant import QuantSection
from ..recipe.sections.rotation import CRITERIA
from ..rotations import ROTATIONS, SITES, Asked, FoldedCheckpoint, Rotation, Site, SiteErrors
from ..rotations.sites import Layer, Norm

ALPHAS = (0.25, 0.5, 0.75, 0.0)  # of smooth: auto, and none at all
SAMPLE = 256  # rows of x per norm on which smooth: auto compares outputs
Quantizer = Callable[[str], Activation | None]  # linear -> what its input is put on


@torch.no_grad()
def plan_rotation(
    checkpoint: Checkpoint,
    quant: QuantSection,
    *,
    calibration: Callable[[], list[Batch]],
    pad_id: int,
    activation: Quantizer,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
) -> Rotation:
    """ValueError where the model cannot be turned as asked."""
    section = quant.rotation
    kind, wanted = ROTATIONS[section.kind], section.sites
    asked: dict[Site, bool] = {"r2": wanted.r2, "r4": wanted.r4}
    start = Rotation(seed=section.seed, r1=section.turns and wanted.r1)
    stream = FoldedCheckpoint(checkpoint, start)
    count = len(stream.structure.layers)
    every = {site: (kind.turns and on,) * count for site, on in asked.items()}
    whole = FoldedCheckpoint(checkpoint, Rotation(start.seed, start.r1, **every))  # or it says what cannot be
    if problems := stream.structure.problems(False, False, False, quant.smooth is not None):
        raise ValueError("\n".join(problems))
    found = _Found()
    if kind.needs_rows or quant.smooth is not None:
        sites = _Sites(stream, whole, quant, activation)
        found = sites.walked(calibration(), pad_id, device, dtype, attention)
    r1, sites_on = kind.choose(Asked(count, wanted.r1, asked, found.errors))
    return Rotation(
        start.seed,
        r1,
        **sites_on,
        smooth=found.factors,
        alphas=found.alphas,
        errors=tuple(found.errors),
        criterion=section.criterion if kind.needs_rows else "",
    )


class _Found:
    def __init__(self) -> None:
        self.errors: list[SiteErrors] = []
        self.factors: dict[str, Tensor] = {}
        self.alphas: dict[str, float] = {}


class _Sites:
    """stream: the checkpoint with r1; whole: with every site that is asked for."""

    def __init__(
        self, stream: FoldedCheckpoint, whole: FoldedCheckpoint, quant: QuantSection, activation: Quantizer
    ):
        self.stream, self.whole, self.quant, self.activation = stream, whole, quant, activation
        self.weights, self.inputs = CRITERIA[quant.rotation.criterion]
        self.layer_of: dict[str, str] = {}  # parameter -> a packed linear that it is, or is a part of
        for name, matrix in stream.matrices.items():
            if quant.skip_reason(name, embedding=matrix.embedding) is None:
                self.layer_of.setdefault(matrix.parameter, name)
        self.adapts = ROTATIONS[quant.rotation.kind].needs_rows

    def walked(
        self, batches: list[Batch], pad_id: int, device: torch.device, dtype: torch.dtype, attention: str
    ) -> _Found:
        found, self.device = _Found(), device
        model = self.stream.empty_model(attention)
        walk = LayerWalk(model, self.stream, batches, device, dtype, logits=False)
        masks = [_mask(batch, pad_id) for batch in walk.batches]
        for index, _, _ in walk:
            layer = self.stream.structure.layers[index]
            taps = self._taps(model, layer)
            for number in range(len(walk.batches)):
                for tap in taps:
                    tap.mask = masks[number]
                walk.hidden[number] = walk.call(index, number, walk.hidden[number]).cpu()
            for tap in taps:
                tap.handle.remove()
            if self.adapts:
                found.errors += self._errors(index, layer, taps)
            for tap in taps:
                if isinstance(tap, _Channels):
                    self._smooth(tap, found)
            walk.drop(index)
        return found

    def _taps(self, model: nn.Module, layer: Layer) -> list[_Errors | _Channels]:
        taps: list[_Errors | _Channels] = []
        for name in self._turned(layer) if self.adapts else ():
            fold, quantizer = self.whole.fold_of(name), self.activation(name)
            assert fold is not None and fold.right is not None
            if quantizer is not None:
                taps.append(_Errors(name, model.get_submodule(name), quantizer, fold.right))
        if self.quant.smooth is not None:
            taps += [_Channels(norm, model.get_submodule(norm.name)) for norm in layer.norms if norm.readers]
        return taps

    def _turned(self, layer: Layer) -> Iterable[str]:
        """The packed linears whose inputs a site turns."""
        for site in SITES:
            for name in self._linears(layer, site)[-1:] if site == "r2" else self._linears(layer, site):
                if name in self.whole.matrices and self.whole.matrices[name].parameter in self.layer_of:
                    yield name

    def _linears(self, layer: Layer, site: Site) -> tuple[str, ...]:
        """The linears of a site, those whose input is turned last."""
        if not getattr(self.quant.rotation.sites, site):
            return ()
        if site == "r4":
            return layer.down
        return () if layer.values is None or layer.outputs is None else (layer.values, layer.outputs)

    def _errors(self, index: int, layer: Layer, taps: list[Any]) -> list[SiteErrors]:
        rows = []
        for site in SITES:
            linears = self._linears(layer, site)
            packed = [name for name in linears if self.stream.matrices[name].parameter in self.layer_of]
            if not packed:
                continue
            weight_off, weight_on = (self._weight_error(read, packed) for read in (self.stream, self.whole))
            seen = [tap for tap in taps if isinstance(tap, _Errors) and tap.name in linears and tap.power]
            power = sum(tap.power for tap in seen)
            off = sum(tap.off for tap in seen) / power if seen else None
            on = sum(tap.on for tap in seen) / power if seen else None
            use_weights = self.weights or off is None
            sums = [
                (w if use_weights else 0.0) + (x if self.inputs and x is not None else 0.0)
                for w, x in ((weight_off, off), (weight_on, on))
            ]
            rows.append(
                SiteErrors(
                    layer=index,
                    site=site,
                    weight_off=weight_off,
                    weight_on=weight_on,
                    activation_off=off,
                    activation_on=on,
                    on=sums[1] < sums[0],
                )
            )
        return rows

    def _weight_error(self, read: FoldedCheckpoint, names: list[str]) -> float:
        error = power = 0.0
        for name in names:
            weight = read.matrix(name, device=self.device, dtype=torch.float32)
            rounded = full_range(weight, self.quant.grid_for(name))
            error += float((rounded - weight).square().sum(dtype=torch.float64))
            power += float(weight.square().sum(dtype=torch.float64))
        return error / max(power, 1e-30)

    def _smooth(self, tap: _Channels, found: _Found) -> None:
        """Factors for a norm, if something packed reads it."""
        readers = [name for name in tap.norm.readers if self.stream.structure.weight(name) in self.layer_of]
        if not readers or tap.largest is None:
            return
        weights = {name: self._reader(name) for name in tap.norm.readers}
        across = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
        x, choice = torch.cat(tap.rows), self.quant.smooth
        assert choice is not None
        if choice == "auto":
            losses = {None: self._loss(x, readers, weights, None)}
            for alpha in ALPHAS:
                factors = smoothing(tap.largest, across, alpha)
                losses[alpha] = self._loss(x, readers, weights, factors)
            choice = min(losses, key=lambda alpha: losses[alpha])
        if choice is not None:
            found.factors[tap.norm.name] = smoothing(tap.largest, across, choice).cpu()
            found.alphas[tap.norm.name] = choice

    def _reader(self, name: str) -> Tensor:
        """The weight of a reader [T, H], experts one below the other."""
        parameter = self.stream.structure.weight(name)
        assert parameter is not None
        value = self.stream.weight_for(parameter, device=self.device, dtype=torch.float32)
        value = value.transpose(-1, -2) if parameter in self.stream.structure.turned else value
        return value.reshape(-1, value.shape[-1])

    def _loss(
        self, x: Tensor, readers: list[str], weights: dict[str, Tensor], factors: Tensor | None
    ) -> float:
        """Squared error of what the packed readers make of x, relative to it."""
        error = power = 0.0
        for name in readers:
            parameter = self.stream.structure.weight(name)
            assert parameter is not None
            linear, want = self.layer_of[parameter], x @ weights[name].t()
            s = torch.ones_like(x[0]) if factors is None else factors.to(x)
            quantizer, seen = self.activation(linear), x / s
            seen = seen if quantizer is None else quantizer(seen)
            made = seen @ full_range(weights[name] * s, self.quant.grid_for(linear)).t()
            error += float((made - want).square().sum(dtype=torch.float64))
            power += float(want.square().sum(dtype=torch.float64))
        return error / max(power, 1e-30)


class _Errors:
    """Squared errors of the quantized input of a linear, as it comes and turned."""

    def __init__(self, name: str, module: nn.Module, quantizer: Activation, turn: Any):
        self.name, self.quantizer, self.turn = name, quantizer, turn
        self.off = self.on = self.power = 0.0
        self.mask: Tensor | None = None
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = _tokens(args[0], self.mask)
        turned = self.turn(x).float()
        self.off += float((self.quantizer(x) - x).square().sum(dtype=torch.float64))
        self.on += float((self.quantizer(turned) - turned).square().sum(dtype=torch.float64))
        self.power += float(x.square().sum(dtype=torch.float64))


class _Channels:
    """max|x| of every channel behind a norm [H], and SAMPLE rows of x."""

    def __init__(self, norm: Norm, module: nn.Module):
        self.norm, self.rows, self.kept = norm, [], 0
        self.largest: Tensor | None = None
        self.mask: Tensor | None = None
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        x = _tokens(out, self.mask)
        top = x.abs().amax(0)
        self.largest = top if self.largest is None else torch.maximum(self.largest, top)
        if self.kept < SAMPLE:
            step = max(1, len(x) * 4 // SAMPLE)  # spread over a batch, over several batches
            self.rows.append(x[::step][: SAMPLE - self.kept])
            self.kept += len(self.rows[-1])


def full_range(weight: Tensor, grid: Grid) -> Tensor:
    """W^ [N, K] by the simplest calibrator of the grid: its whole range."""
    run = next(c for c in CALIBRATORS.values() if c.reject(grid) is None and not c.needs_text)  # pyright: ignore[reportArgumentType]
    return run.run(weight, grid, Stats()).dequantize()


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """max|x|^alpha / max|W|^(1 - alpha) per channel, float64 [H], three digits of it; 1 where either is 0."""
    factors = inputs.double().pow(alpha) / weights.double().pow(1 - alpha)
    factors = torch.where((inputs > 0) & (weights > 0), factors, 1.0)
    return torch.tensor([float(f"{value:.3g}") for value in factors.tolist()], dtype=torch.float64)


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [.., K] -> fp32 [T, K], without padding."""
    flat = x.reshape(-1, x.shape[-1]).float()
    return flat[mask] if mask is not None and len(mask) == len(flat) else flat


def _mask(batch: Batch, pad_id: int) -> Tensor:
    """[B L], true up to the last token of each row that is no padding."""
    real = (batch["input_ids"] != pad_id).long()
    return real.flip(-1).cummax(-1).values.flip(-1).reshape(-1).bool()

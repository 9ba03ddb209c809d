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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..grid import Grid
from ..grid.calibrate import CALIBRATORS, Stats
from ..model.checkpoint import Checkpoint
from ..model.kv_seam import Seam, attention_modules, set_seam
from ..model.load import load_model
from ..model.walk import Batch, LayerWalk
from ..recipe.sections.overrides import fusions
from ..recipe.sections.quant import QuantSection
from ..recipe.sections.rotation import CRITERIA
from ..rotations import (
    ROTATIONS,
    SITES,
    Asked,
    FoldedCheckpoint,
    ModulatedStructure,
    Rotation,
    Site,
    SiteErrors,
    Turn,
)
from ..rotations.sites import Layer, Norm, Structure
from ..segments import segments_in
from .smooth import Reader, Seen, Smoother, look

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
    asked: dict[Site, bool] = {"r2": wanted.r2, "r3": wanted.r3, "r4": wanted.r4}
    start = Rotation(seed=section.seed, r1=section.turns and wanted.r1)
    stream = FoldedCheckpoint(checkpoint, start)
    count = len(stream.structure.layers)
    every = (True,) * count
    whole = FoldedCheckpoint(  # which says what cannot be turned
        checkpoint,
        Rotation(
            seed=start.seed,
            r1=start.r1,
            r2=every if kind.turns and wanted.r2 else (),
            r4=every if kind.turns and wanted.r4 else (),
        ),
    )
    if problems := stream.structure.problems(False, False, False, quant.smooth is not None):
        raise ValueError("\n".join(problems))
    found = _Found()
    if kind.needs_rows or quant.smooth is not None:
        sites = _Sites(stream, whole, quant, activation)
        if isinstance(stream.structure, ModulatedStructure):
            found = sites.looked(calibration(), device, dtype, attention)
        else:
            found = sites.walked(calibration(), pad_id, device, dtype, attention)
    r1, chosen = kind.choose(Asked(count, wanted.r1, asked, found.errors))
    return Rotation(
        seed=start.seed,
        r1=r1,
        r2=chosen["r2"],
        r3=chosen["r3"],
        r4=chosen["r4"],
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
            if quant.skip_reason(name, matrix.embedding, matrix.conv) is None:
                self.layer_of.setdefault(matrix.parameter, name)
        self.adapts = ROTATIONS[quant.rotation.kind].needs_rows
        packed = [n for n, m in stream.matrices.items() if m.rows is None and m.parameter in self.layer_of]
        self.apart = fusions(quant.overrides, packed, lambda: segments_in(stream.folder))

    def walked(
        self, batches: list[Batch], pad_id: int, device: torch.device, dtype: torch.dtype, attention: str
    ) -> _Found:
        found, self.device = _Found(), device
        model = self.stream.empty_model(attention)
        walk = LayerWalk(model, self.stream, batches, device, dtype, logits=False)
        masks = [_mask(batch, pad_id) for batch in walk.batches]
        for index, _, _ in walk:
            layer = self.stream.structure.layers[index]
            taps = self._taps(model, index, layer)
            for number in range(len(walk.batches)):
                for tap in taps:
                    tap.mask = masks[number]
                walk.hidden[number] = walk.call(index, number, walk.hidden[number]).cpu()
            for tap in taps:
                tap.remove()
            if self.adapts:
                found.errors += self._errors(index, layer, taps)
            for tap in taps:
                if isinstance(tap, _Channels):
                    self._smooth(tap, found)
            walk.drop(index)
        return found

    def _taps(self, model: nn.Module, index: int, layer: Layer) -> list[_Tap]:
        taps: list[_Tap] = []
        if self.adapts and self.quant.rotation.sites.r3 and layer.values is not None:
            assert self.quant.kv_cache is not None, "refused by the recipe"
            structure = self.stream.structure
            assert isinstance(structure, Structure) and structure.head_dim is not None
            size = structure.head_dim
            prefix = f"{structure.family.layers}.{index}"
            attends = attention_modules(model.get_submodule(prefix)).values()
            taps += [_Keys(module, self.quant.kv_cache.config().codec(size)) for module in attends]
        for name in self._turned(layer) if self.adapts else ():
            fold, quantizer = self.whole.fold_of(name), self.activation(name)
            assert fold is not None and fold.right is not None
            if quantizer is not None:
                taps.append(_Inputs(name, model.get_submodule(name), quantizer, fold.right))
        if self.quant.smooth is not None:
            taps += [_Channels(norm, model.get_submodule(norm.name)) for norm in layer.norms if norm.readers]
        return taps

    def _turned(self, layer: Layer) -> list[str]:
        """The packed linears whose inputs a site turns."""
        names = (*self._linears(layer, "r2")[-1:], *self._linears(layer, "r4"))
        return [name for name in names if self._is_packed(name)]

    def _is_packed(self, name: str) -> bool:
        return name in self.stream.matrices and self.stream.matrices[name].parameter in self.layer_of

    def _linears(self, layer: Layer, site: Site) -> tuple[str, ...]:
        """The linears of a site, those whose input is turned last."""
        if not getattr(self.quant.rotation.sites, site) or site == "r3":
            return ()
        if site == "r4":
            return layer.down
        return () if layer.values is None or layer.outputs is None else (layer.values, layer.outputs)

    def _errors(self, index: int, layer: Layer, taps: list[_Tap]) -> list[SiteErrors]:
        """Of the sites that this layer has."""
        rows = []
        for site in SITES:
            packed = [name for name in self._linears(layer, site) if self._is_packed(name)]
            seen = [tap for tap in taps if isinstance(tap, _Measured) and tap.power and tap.of(site, packed)]
            if not packed and not seen:
                continue
            power = sum(tap.power for tap in seen)
            inputs = (sum(t.off for t in seen) / power, sum(t.on for t in seen) / power) if seen else None
            weights = None
            if packed:
                weights = self._weight_error(self.stream, packed), self._weight_error(self.whole, packed)
            # What has only one of the two errors is judged by that one.
            used = [weights] * (self.weights or inputs is None) + [inputs] * (self.inputs or weights is None)
            off, on = (sum(error[i] for error in used if error is not None) for i in (0, 1))
            (weight_off, weight_on), (input_off, input_on) = weights or (None, None), inputs or (None, None)
            rows.append(
                SiteErrors(
                    layer=index,
                    site=site,
                    weight_off=weight_off,
                    weight_on=weight_on,
                    activation_off=input_off,
                    activation_on=input_on,
                    on=on < off,
                )
            )
        return rows

    def _weight_error(self, read: FoldedCheckpoint, names: list[str]) -> float:
        error = power = 0.0
        for name in names:
            weight = read.matrix(name, device=self.device, dtype=torch.float32)
            rounded = self._rounded(name, weight)
            error += float((rounded - weight).square().sum(dtype=torch.float64))
            power += float(weight.square().sum(dtype=torch.float64))
        return error / max(power, 1e-30)

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        """The weight of a packed linear on its grid, or on those of its parts."""
        if name not in self.apart:
            return full_range(weight, self.quant.grid_for(name))
        out = torch.empty_like(weight)
        for part, rows in self.apart[name].items():
            grid = self.quant.grid_for(f"{name}.{part}", name)
            out[rows.channels().to(out.device)] = full_range(rows.of(weight), grid)
        return out

    def _smooth(self, tap: _Channels, found: _Found) -> None:
        """Factors for a norm, if something packed reads it."""
        x, structure = torch.cat(tap.seen.rows) if tap.seen.rows else None, self.stream.structure
        if x is None or tap.seen.largest is None:
            return
        readers = [
            Reader(self._reader(name), x, self.layer_of.get(structure.weight(name) or ""))
            for name in tap.norm.readers
        ]
        self._take(found, tap.norm.name, self._smoother().chosen(tap.seen.largest, readers))

    def _smoother(self, capped: bool = False) -> Smoother:
        assert self.quant.smooth is not None
        return Smoother(self.quant.smooth, self.activation, self._rounded, capped)

    def _take(self, found: _Found, name: str, chosen: tuple[Tensor, float] | None) -> None:
        if chosen is not None:
            found.factors[name], found.alphas[name] = chosen

    def looked(
        self, batches: list[Batch], device: torch.device, dtype: torch.dtype, attention: str
    ) -> _Found:
        """The factors of a model whose norms are modulated, which is run whole."""
        found, self.device = _Found(), device
        structure = self.stream.structure
        assert isinstance(structure, ModulatedStructure)
        model = load_model(self.stream, attention, device, dtype).eval()
        seen = look(model, structure.scaled, batches, device)
        del model
        for site in structure.scaled:
            if self.layer_of.keys().isdisjoint(f"{name}.weight" for name, _ in site.readers):
                continue
            readers, largest = [], None
            for name, first in site.readers:
                own = seen[name if site.scale is None else site.readers[0][0]]
                assert own.largest is not None
                top = own.largest[first : first + site.width]
                largest = top if largest is None else torch.maximum(largest, top)
                linear = self.layer_of.get(f"{name}.weight")
                readers.append(Reader(self._reader(name), torch.cat(own.rows), linear, first))
            assert largest is not None
            self._take(found, site.name, self._smoother(site.scale is not None).chosen(largest, readers))
        return found

    def _reader(self, name: str) -> Tensor:
        """The weight of a reader [T, H], experts one below the other."""
        parameter = self.stream.structure.weight(name)
        assert parameter is not None
        value = self.stream.weight_for(parameter, device=self.device, dtype=torch.float32)
        value = value.transpose(-1, -2) if parameter in self.stream.structure.turned else value
        return value.reshape(-1, value.shape[-1])


class _Tap:
    """Looks at what passes through a layer. mask: the tokens of the batch at work that count."""

    mask: Tensor | None = None
    handle: Any = None

    def remove(self) -> None:
        self.handle.remove()


class _Measured(_Tap):
    """Sums of squares: of an activation, and of its rounding error as it comes and turned."""

    off = on = power = 0.0

    def of(self, site: Site, linears: list[str]) -> bool:
        """Whether this is the activation of that site."""
        raise AssertionError

    def add(self, x: Tensor, off: Tensor, turned: Tensor, on: Tensor) -> None:
        """x and what it is rounded to, x turned and what that is rounded to."""
        self.off += float((off - x).square().sum(dtype=torch.float64))
        self.on += float((on - turned).square().sum(dtype=torch.float64))
        self.power += float(x.square().sum(dtype=torch.float64))


class _Inputs(_Measured):
    """The quantized input of a linear."""

    def __init__(self, name: str, module: nn.Module, quantizer: Activation, turn: Turn):
        self.name, self.quantizer, self.turn = name, quantizer, turn
        self.handle = module.register_forward_pre_hook(self)

    def of(self, site: Site, linears: list[str]) -> bool:
        return self.name in linears

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = _tokens(args[0], self.mask)
        turned = self.turn(x).float()
        self.add(x, self.quantizer(x), turned, self.quantizer(turned))


class _Keys(_Measured):
    """Keys behind their rotary embedding. It stands in the seam of an attention module as its grid, and lets
    keys and values pass as they are."""

    def __init__(self, module: nn.Module, codec: Any):
        self.codec = codec
        self.seam = Seam(keys=self, values=_Pass())  # pyright: ignore[reportArgumentType]
        set_seam(module, self.seam)

    def remove(self) -> None:
        self.seam.keys = self.seam.values = None

    def of(self, site: Site, linears: list[str]) -> bool:
        return site == "r3"

    def fake(self, x: Tensor) -> Tensor:
        """x [B, heads, L, D]."""
        tokens = x.float().transpose(1, 2).flatten(0, 1)
        tokens = tokens if self.mask is None else tokens[self.mask]
        keys = tokens.transpose(0, 1)[None]
        self.add(keys, self.codec.fake(keys), keys, self.codec.turned().fake(keys))
        return x


class _Pass:
    def fake(self, x: Tensor) -> Tensor:
        return x


class _Channels(_Tap):
    """What comes out of a norm."""

    def __init__(self, norm: Norm, module: nn.Module):
        self.norm, self.seen = norm, Seen()
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen.add(_tokens(out, self.mask))


def full_range(weight: Tensor, grid: Grid) -> Tensor:
    """W^ [N, K] by the simplest calibrator of the grid: its whole range."""
    run = next(c for c in CALIBRATORS.values() if c.reject(grid) is None and not c.needs_text)  # pyright: ignore[reportArgumentType]
    return run.run(weight, grid, Stats()).dequantize()


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [.., K] -> fp32 [T, K], without padding."""
    flat = x.reshape(-1, x.shape[-1]).float()
    return flat[mask] if mask is not None and len(mask) == len(flat) else flat


def _mask(batch: Batch, pad_id: int) -> Tensor:
    """[B L], true up to the last token of each row that is no padding."""
    real = (batch["input_ids"] != pad_id).long()
    return real.flip(-1).cummax(-1).values.flip(-1).reshape(-1).bool()

"""quantize: a checkpoint becomes packed integers, without the dense model ever being in memory.

`Packing` makes the packed layers one after the other and keeps none of them: what writes them to base/ as
they come needs the memory of one layer, whatever the size of the model. `quantize` keeps them: the model with
PackedLinears.

Range calibrators (absmax, minmax, mse), recover and binary ones need one weight at a time, of a large one a
block of rows: it is read, calibrated, packed, dropped. gptq walks the decoder layers (model/walk.py): a layer
is read, the inputs of its linears are summed into Hessians, its linears are packed in place, and the text
goes on through the packed layer, so later layers see the errors of earlier ones. signround walks too, and
rounds all linears of a layer together, by the error of the layer's output (blocks.py). A checkpoint that is
quantized already (incoming/) is not calibrated: its codes are repacked as they are. Zeros of quant.sparsity
are chosen before a matrix is rounded (prune.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from lowbit_kernels.layout import group_count, row_chunks
from rich.console import Console
from torch import Tensor

from ..export import LayerSpec
from ..grid import GRIDS, Grid, IntGrid, PackedWeight, Weight, stack_rows
from ..grid.calibrate import CALIBRATORS, Calibrator, Curvature, OffGridError, Stats
from ..integrations.transformers import mark_packed
from ..kv_cache import place_kv_cache
from ..model.checkpoint import Checkpoint
from ..model.kinds import packed_in_place_of
from ..model.linear import PackedEmbedding
from ..model.load import materialize
from ..model.matrices import fusions_of, stand_in
from ..model.roles import is_head
from ..model.walk import Batch, LayerWalk, decoder_layers
from ..recipe.sections.quant import QuantSection
from ..train.memory import release_freed
from . import prune
from .adopt import check_adopted
from .blocks import DenseBlock, DenseStream
from .inputs import curvatures, passes
from .memory import BLOCK_BYTES
from .off_grid import off_grid
from .progress import Progress
from .table import QuantRow, QuantTable, check_shapes, plan_layers


class Packing:
    """The packed layers of a checkpoint, made one at a time in the order of `specs`. To be iterated once:
    (name, weight) pairs.

    specs: layer -> (shape [N, K], grid), known beforehand. keep: the weights also go into `model`, the others
    then being read too (`finished`). calibration() gives the token batches of gptq; it is called only when
    the calibrator needs text; with quant.calibrate: auto it decides which calibrator that is. console: where
    the progress is shown (None: nowhere). ValueError where the recipe's choice cannot be packed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quant: QuantSection,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        attention: str = "sdpa",
        calibration: Callable[[], list[Batch]] | None = None,
        console: Console | None = None,
        keep: bool = False,
    ):
        quant = quant.resolved(rows=calibration is not None)
        self.checkpoint, self.quant, self.keep = checkpoint, quant, keep
        self.device, self.dtype = torch.device(device), dtype or checkpoint.dtype
        self.calibration, self.progress = calibration, Progress(console, 0)
        self.model = checkpoint.empty_model(attention)
        self.targets, self.rows = plan_layers(self.model, quant, checkpoint.folder)
        apart = fusions_of(self.targets.values())
        checkpoint.take_apart(apart)
        stand_in(self.model, self.targets, apart)
        checkpoint.online(self.model)
        names = list(self.targets)
        if checkpoint.incoming is not None:
            check_adopted(checkpoint, self.model, self.targets)
            self.calibrator = CALIBRATORS[GRIDS[quant.grid].start]  # of an embedding, which is dense there
        elif quant.from_checkpoint:
            raise ValueError(
                f"calibrate: from_checkpoint, but {checkpoint.source} is not quantized; choose one of "
                f"{', '.join(CALIBRATORS)}"
            )
        else:
            check_shapes(checkpoint, self.targets)
            self.calibrator = CALIBRATORS[quant.calibrate]
            if quant.reads_text:
                if calibration is None:
                    raise ValueError(
                        f"calibrate: {quant.calibrate} needs calibration text (quant.calibration)"
                        if self.calibrator.needs_text
                        else f"sparsity.kind: {quant.sparsity.kind} needs text (quant.calibration)"
                    )
                prefix, layers = decoder_layers(self.model)
                inside = [n for i in range(len(layers)) for n in names if n.startswith(f"{prefix}.{i}.")]
                names = inside + [name for name in names if name not in set(inside)]
        self.specs: dict[str, tuple[tuple[int, int], Grid]] = {
            n: (self.targets[n].shape, quant.grid_for(*self.targets[n].names)) for n in names
        }
        self._made: Iterator[tuple[str, Weight]] | None = None
        self.progress = Progress(console, sum(n * k for (n, k), _ in self.specs.values()))

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Weight]]:
        left = dict.fromkeys(self.specs)
        with self.progress:
            if self.checkpoint.incoming is None and self.quant.reads_text:
                for name, base in self._walked():
                    del left[name]
                    yield name, base
            for number, name in enumerate(left, len(self.specs) - len(left) + 1):
                self.progress.at(f"matrix {number} of {len(self.specs)}: {name}")
                yield name, self._one(name)
        if self.quant.locks and not any(row.zeros for row in self.rows):
            raise ValueError(
                f"quant.sparsity.kind: {self.quant.sparsity.kind}, but no weight of {self.checkpoint.source} "
                "is zero; set kind: magnitude (or wanda, sparsegpt), or none"
            )

    def _one(self, name: str) -> Weight:
        try:
            dense = self.checkpoint.incoming is None or self.targets[name].embedding
            base = self._pack(name) if dense else self._adopt(name)
        except OffGridError as error:
            names = list(self.specs)
            at, grid = names.index(name), self.specs[name][1]
            before = sum(map(self._groups, names[:at]))
            raise off_grid(error, names[at:], before, grid, self._looked) from None
        if self.keep:
            self._put(name, base)
        return base

    def _looked(self, name: str) -> int:
        self._pack(name)
        return self._groups(name)

    def _groups(self, name: str) -> int:
        (n, k), grid = self.specs[name]
        return n * group_count(k, grid.group_size)

    @property
    def layer_specs(self) -> dict[str, LayerSpec]:
        """What a folder of these layers says of each, in the order of `specs`."""
        return {n: LayerSpec(*spec, rows=self.targets[n].rows) for n, spec in self.specs.items()}

    def take(self, name: str) -> Weight:
        """The next weight, which must be that of `name`: layers are asked for in the order of `specs`."""
        self._made = self._made or iter(self)
        made, base = next(self._made)
        assert made == name, f"asked for {name}, the next one is {made}"
        return base

    @property
    def table(self) -> QuantTable:
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        return QuantTable(sorted(self.rows, key=lambda row: order.get(row.layer, len(order))))

    def finished(self) -> Any:
        """The model with everything in it, in eval mode (keep=True, all layers made)."""
        assert self.keep
        materialize(self.model, self.checkpoint, "", self.device, self.dtype)
        if self.quant.kv_cache is not None:
            place_kv_cache(self.model, self.quant.kv_cache.config())
        mark_packed(self.model)  # so that the model's own save_pretrained writes a folder that loads
        return self.model.eval()

    def _walked(self) -> Iterator[tuple[str, Weight]]:
        """The linears of the decoder layers, by a calibrator that looks at text."""
        assert self.calibration is not None
        walk = LayerWalk(
            self.model, self.checkpoint, self.calibration(), self.device, self.dtype, logits=False
        )
        if not self.keep:
            walk.forget_rest()
        of = f"of {len(walk.layers)}"
        stream = DenseStream(walk) if self.calibrator.block is not None else None
        for index, layer_name, layer in walk:
            here = f"layer {index + 1} {of}"
            inside = {n: self.model.get_submodule(n) for n in self.targets if n.startswith(layer_name + ".")}
            made: dict[str, Weight] = {}
            if stream is not None:
                unit = stream.advance(index)  # a layer that stays dense is passed too
                if inside:
                    self.progress.at(f"{here}: {len(inside)} matrices together")
                    made = self._pack_block(stream, index, f"{layer_name}.", list(inside), unit)
                    yield from made.items()
            for part in passes(inside) if stream is None else ():
                self.progress.at(f"{here}: inputs of {len(part)} matrices")
                found = curvatures(walk, index, part, self.progress.tick)
                for name in part:
                    self.progress.at(f"{here}: {name.removeprefix(layer_name + '.')}")
                    made[name] = self._pack(name, found.pop(name, None), inside=True)
                    yield name, made[name]
            for name, base in made.items():
                self._put(name, base)
            del made
            self.progress.at(f"{here}: text through the packed layer")
            layer.eval()
            walk.advance(index)
            if not self.keep:
                walk.drop(index)

    def _pack(self, name: str, curvature: Curvature | None = None, inside: bool = False) -> Weight:
        """Read, calibrate, pack: in blocks of rows, which know nothing of each other, unless there is the
        curvature of their inputs. inside: text was looked for.
        """
        grid, run, note = self.specs[name][1], self.calibrator, ""
        if run.needs_text and curvature is None:
            run, why = CALIBRATORS[grid.start], "outside the decoder layers"
            if inside:
                kind = "layer" if self.targets[name].expert is None else "expert"
                why = f"no calibration token reached this {kind}"
                why = "a convolution with groups" if self._grouped(name) else why
            note = f"{why}: calibrated by {grid.start}"
        elif run.reject(grid) is not None:  # a head or an embedding of other bits than the layers
            run, note = CALIBRATORS[grid.start], f"{grid.bits} bits: calibrated by {grid.start}"
        locks = isinstance(grid, IntGrid) and grid.mask
        if locks and (zeros := prune.sparsity_of(self.quant, curvature)) is not self.quant.sparsity.at_once:
            note = f"{note}{', ' if note else 'no calibration text here: '}pruned by {prune.WITHOUT_TEXT}"
        stats = self._stats(curvature)
        parts, error, size = [], 0.0, 0.0
        at_once = None if curvature is not None or (locks and zeros.prunes) else BLOCK_BYTES
        for rows in self.checkpoint.row_blocks(name, at_once):
            # As stored, whatever the model's dtype: scales are searched on these weights, in fp32, some rows
            # at a time.
            weight = self._stored(name, rows)
            parts.append(self._rounded(name, weight, run, grid, stats))
            off, whole = _squares(weight, parts[-1])
            error, size = error + off, size + whole
            del weight
        base = stack_rows(parts)
        error = error / max(size, 1e-30)
        self._said(name, base, note, error)
        return base

    def _grouped(self, name: str) -> bool:
        return getattr(self.model.get_submodule(name), "groups", 1) > 1

    def _pack_block(
        self, stream: DenseStream, index: int, prefix: str, names: list[str], unit: float
    ) -> dict[str, Weight]:
        """All linears of a decoder layer at once, by their effect on its output. unit: see DenseBlock."""
        assert self.calibrator.block is not None
        grids = {name: grid for name in names if isinstance(grid := self.specs[name][1], IntGrid)}
        weights = {name: self._stored(name).float() for name in names}
        stats, zeros = self._stats(), {}
        for name in names if self.quant.locks else ():
            zeros[name], weights[name], _ = self._zeros(name, weights[name], self.calibrator, stats)
        block = DenseBlock(
            stream,
            index,
            prefix,
            weights,
            grids,
            unit,
            lambda step: self.progress.tick(step / stats.steps),
            zeros,
        )
        made, (before, after) = self.calibrator.block(block, stats)
        made = {n: prune.locked(base, zeros[n]) if n in zeros else base for n, base in made.items()}
        for name, base in made.items():
            off, whole = _squares(weights[name], base)
            self._said(name, base, f"its layer's loss {before:.5f} -> {after:.5f}", off / max(whole, 1e-30))
        return made

    def _rounded(self, name: str, weight: Tensor, run: Calibrator, grid: Grid, stats: Stats) -> Weight:
        """A matrix, or some of its rows, by this calibrator, its zeros locked where the grid has a mask."""
        if not isinstance(grid, IntGrid) or not grid.mask:
            return run.run(weight, grid, stats)
        zeros, left, stats = self._zeros(name, weight, run, stats)
        return prune.locked(run.run(left, grid, stats), zeros)

    def _zeros(
        self, name: str, weight: Tensor, run: Calibrator, stats: Stats
    ) -> tuple[Tensor, Tensor, Stats]:
        try:
            return prune.start(weight, self.quant, run, stats)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _stats(self, curvature: Curvature | None = None) -> Stats:
        text = self.quant.calibration
        return Stats(
            curvature=curvature,
            p=self.quant.mse_p,
            damping=text.damping,
            act_order=text.act_order,
            static_groups=text.static_groups,
            steps=text.steps,
        )

    def _stored(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The matrix [N, K] of a layer, or some of its rows, in the dtype of the files."""
        dtype = self.checkpoint.stored_matrix_dtype(name)
        return self.checkpoint.matrix(name, device=self.device, dtype=dtype, rows=rows)

    def _adopt(self, name: str) -> Weight:
        grid = self.specs[name][1]
        assert isinstance(grid, IntGrid)
        base = self.checkpoint.packed_weight(f"{name}.weight", replace(grid, mask=False), self.device)
        base = prune.adopted(base) if grid.mask else base
        self._said(name, base, f"as it is in the {self.checkpoint.incoming} checkpoint", None)
        return base

    def _said(self, name: str, base: Weight, note: str, error: float | None) -> None:
        bits, group, numbers = base.grid.bits, base.grid.group_size, base.shape[0] * base.shape[1]
        zeros = base.locked if isinstance(base, PackedWeight) else None
        count = None if zeros is None else int(zeros.sum())
        self.rows.append(QuantRow(name, "quantized", note, bits, group, error, numbers, base.nbytes, count))
        release_freed()
        self.progress.done(numbers)

    def _put(self, name: str, base: Weight) -> None:
        """The weight takes the place of its layer in the model."""
        layer = self.model.get_submodule(name)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            bias = self.checkpoint.weight_for(f"{name}.bias", device=self.device, dtype=self.dtype)
        packed = packed_in_place_of(layer, base, bias, self.dtype)
        self.model.set_submodule(name, packed)
        if name in self.checkpoint.online_layers:
            self.checkpoint.online(self.model)
        if is_head(name) or isinstance(packed, PackedEmbedding):
            self.model.config.tie_word_embeddings = False  # a packed matrix is nobody's parameter


def quantize(
    checkpoint: Checkpoint,
    quant: QuantSection,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    calibration: Callable[[], list[Batch]] | None = None,
    console: Console | None = None,
) -> tuple[Any, QuantTable]:
    """The model with PackedLinears, in eval mode on `device`, everything unquantized in `dtype`; and the
    table. Arguments as `Packing`."""
    packing = Packing(
        checkpoint,
        quant,
        device=device,
        dtype=dtype,
        attention=attention,
        calibration=calibration,
        console=console,
        keep=True,
    )
    for _ in packing:
        pass
    return packing.finished(), packing.table


def _squares(weight: Tensor, base: Weight) -> tuple[float, float]:
    """||W - W^||^2 and ||W||^2, some rows at a time: no dense copy."""
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for rows in row_chunks(*weight.shape):
        dense = weight[rows].float()
        sums[1] += dense.square().sum()
        sums[0] += base.rows(rows.start, rows.stop).dequantize().sub_(dense).square_().sum()
    off, whole = sums.tolist()
    return off, whole

"""quantize: a checkpoint becomes packed integers, without the dense model ever being in memory.

`Packing` makes the packed layers one after the other and keeps none of them: what writes them to base/ as
they come needs the memory of one layer, whatever the size of the model. `quantize` keeps them: the model with
PackedLinears.

Range calibrators (absmax, minmax, mse) and binary ones need one weight at a time, of a large one a block of
rows: it is read, calibrated, packed, dropped. gptq walks the decoder layers (model/walk.py): a layer is read,
the inputs of its linears are summed into Hessians, its linears are packed in place, and the text goes on
through the packed layer, so later layers see the errors of earlier ones. signround walks too, and rounds all
linears of a layer together, by the error of the layer's output (blocks.py). A checkpoint that is quantized
already (incoming/) is not calibrated: its codes are repacked as they are.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from lowbit_kernels.layout import row_chunks
from torch import Tensor, nn

from ..grid import Grid, IntGrid, Weight, stack_rows
from ..grid.calibrate import CALIBRATORS, Stats
from ..integrations.transformers import mark_packed
from ..model.checkpoint import Checkpoint
from ..model.linear import PackedEmbedding, PackedLinear
from ..model.load import materialize
from ..model.matrices import stand_in
from ..model.roles import is_head
from ..model.walk import Batch, LayerWalk, decoder_layers
from ..recipe.sections.quant import QuantSection
from ..train.memory import release_freed
from .adopt import check_adopted
from .blocks import DenseBlock, DenseStream
from .memory import BLOCK_BYTES, HESSIAN_BYTES
from .table import QuantRow, QuantTable, check_shapes, plan_layers, some


class Packing:
    """The packed layers of a checkpoint, made one at a time in the order of `specs`. To be iterated once:
    (name, weight) pairs.

    specs: layer -> (shape [N, K], grid), known beforehand. keep: the weights also go into `model`, the others
    then being read too (`finished`). calibration() gives the token batches of gptq; it is called only when
    the calibrator needs text. ValueError where the recipe's choice cannot be packed.
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
        progress: Callable[[str], None] | None = None,
        keep: bool = False,
    ):
        self.checkpoint, self.quant, self.keep = checkpoint, quant, keep
        self.device, self.dtype = torch.device(device), dtype or checkpoint.dtype
        self.calibration, self.tell = calibration, progress or (lambda name: None)
        self.model = checkpoint.empty_model(attention)
        self.targets, self.rows = plan_layers(self.model, quant)
        stand_in(self.model, self.targets)
        names = list(self.targets)
        if checkpoint.incoming is not None:
            check_adopted(checkpoint, self.model, self.targets)
        elif quant.from_checkpoint:
            raise ValueError(
                f"calibrate: from_checkpoint, but {checkpoint.source} is not quantized; choose one of "
                f"{', '.join(CALIBRATORS)}"
            )
        else:
            check_shapes(checkpoint, self.targets)
            self.calibrator = CALIBRATORS[quant.calibrate]
            if self.calibrator.needs_text:
                if calibration is None:
                    raise ValueError(
                        f"calibrate: {quant.calibrate} needs calibration text (quant.calibration)"
                    )
                prefix, layers = decoder_layers(self.model)
                inside = [n for i in range(len(layers)) for n in names if n.startswith(f"{prefix}.{i}.")]
                names = inside + [name for name in names if name not in set(inside)]
        self.specs: dict[str, tuple[tuple[int, int], Grid]] = {
            n: (self.targets[n].shape, quant.grid_for(n)) for n in names
        }
        self._made: Iterator[tuple[str, Weight]] | None = None

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Weight]]:
        left = dict.fromkeys(self.specs)
        if self.checkpoint.incoming is None and self.calibrator.needs_text:
            for name, base in self._walked():
                del left[name]
                yield name, base
        for name in left:
            yield name, self._one(name)

    def _one(self, name: str) -> Weight:
        base = self._pack(name) if self.checkpoint.incoming is None else self._adopt(name)
        if self.keep:
            self._put(name, base)
        return base

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
        stream = DenseStream(walk) if self.calibrator.block is not None else None
        for index, layer_name, layer in walk:
            inside = {n: self.model.get_submodule(n) for n in self.targets if n.startswith(layer_name + ".")}
            experts = {name for name in inside if self.targets[name].expert is not None}
            made: dict[str, Weight] = {}
            if stream is not None and inside:
                made = self._pack_block(stream, index, f"{layer_name}.", list(inside))
                yield from made.items()
            for part in _passes(inside) if stream is None else ():
                hessians = _hessians(walk, index, part, experts)
                for name in part:
                    made[name] = self._pack(name, hessians.pop(name, None))
                    yield name, made[name]
            for name, base in made.items():
                self._put(name, base)
            del made
            layer.eval()
            walk.advance(index)
            if not self.keep:
                walk.drop(index)

    def _pack(self, name: str, hessian: Tensor | None = None) -> Weight:
        """Read, calibrate, pack: in blocks of rows, which know nothing of each other, unless a Hessian is
        factored for them.
        """
        grid, matrix, run, note = self.quant.grid_for(name), self.targets[name], self.calibrator, ""
        if run.needs_text and hessian is None:
            run, note = CALIBRATORS[grid.start], f"outside the decoder layers: calibrated by {grid.start}"
            if matrix.expert is not None:
                note = f"no calibration token reached this expert: calibrated by {grid.start}"
        stats = self._stats(hessian)
        parts, error, size = [], 0.0, 0.0
        for rows in self.checkpoint.row_blocks(name, BLOCK_BYTES if hessian is None else None):
            # As stored, whatever the model's dtype: scales are searched on these weights, in fp32, some rows
            # at a time.
            weight = self._stored(name, rows)
            parts.append(run.run(weight, grid, stats))
            off, whole = _squares(weight, parts[-1])
            error, size = error + off, size + whole
            del weight
        base = stack_rows(parts)
        error = error / max(size, 1e-30)
        self._said(name, base, note, error)
        return base

    def _pack_block(
        self, stream: DenseStream, index: int, prefix: str, names: list[str]
    ) -> dict[str, Weight]:
        """All linears of a decoder layer at once, by their effect on its output."""
        assert self.calibrator.block is not None
        grids = {name: grid for name in names if isinstance(grid := self.quant.grid_for(name), IntGrid)}
        unit = stream.advance(index)
        weights = {name: self._stored(name).float() for name in names}
        block = DenseBlock(stream, index, prefix, weights, grids, unit)
        made, (before, after) = self.calibrator.block(block, self._stats())
        for name, base in made.items():
            off, whole = _squares(weights[name], base)
            self._said(name, base, f"its layer's loss {before:.5f} -> {after:.5f}", off / max(whole, 1e-30))
        return made

    def _stats(self, hessian: Tensor | None = None) -> Stats:
        quant = self.quant
        return Stats(
            hessian=hessian, p=quant.mse_p, damping=quant.calibration.damping, steps=quant.calibration.steps
        )

    def _stored(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The matrix [N, K] of a layer, or some of its rows, in the dtype of the files."""
        dtype = self.checkpoint.stored_matrix_dtype(name)
        return self.checkpoint.matrix(name, device=self.device, dtype=dtype, rows=rows)

    def _adopt(self, name: str) -> Weight:
        grid = self.quant.grid_for(name)
        assert isinstance(grid, IntGrid)
        base = self.checkpoint.packed_weight(f"{name}.weight", grid, self.device)
        self._said(name, base, f"as it is in the {self.checkpoint.incoming} checkpoint", None)
        return base

    def _said(self, name: str, base: Weight, note: str, error: float | None) -> None:
        bits, group, numbers = base.grid.bits, base.grid.group_size, base.shape[0] * base.shape[1]
        self.rows.append(QuantRow(name, "quantized", note, bits, group, error, numbers, base.nbytes))
        release_freed()
        self.tell(name)

    def _put(self, name: str, base: Weight) -> None:
        """The weight takes the place of its layer in the model."""
        layer = self.model.get_submodule(name)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            bias = self.checkpoint.weight_for(f"{name}.bias", device=self.device, dtype=self.dtype)
        if isinstance(layer, nn.Embedding):
            packed = PackedEmbedding.in_place_of(layer, base, self.dtype)
        else:
            packed = PackedLinear(base, bias)
        self.model.set_submodule(name, packed)
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
    progress: Callable[[str], None] | None = None,
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
        progress=progress,
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


def _passes(linears: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """The linears of a layer in groups whose Hessians fit HESSIAN_BYTES (those of the experts of a large
    mixture do not), in order. What is shared is counted twice: that is known only once text has passed."""
    part: dict[str, nn.Module] = {}
    used = 0
    for name, linear in linears.items():
        size = 4 * int(linear.in_features) ** 2  # pyright: ignore[reportArgumentType]
        if part and used + size > HESSIAN_BYTES:
            yield part
            part, used = {}, 0
        part[name] = linear
        used += size
    if part:
        yield part


def _hessians(
    walk: LayerWalk, index: int, linears: dict[str, nn.Module], experts: Collection[str] = ()
) -> dict[str, Tensor]:
    """sum x x^T / tokens over all batches, fp32 [K, K], for every linear of a layer. Linears that are given
    one and the same tensor (q, k and v; gate and up) share one sum. Of `experts`, those that no token reached
    have none."""
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(linears, 0)
    owner: dict[str, str] = {}  # linear -> the one whose sum it shares
    given: dict[
        str, Tensor
    ] = {}  # inputs of the forward that is running; held, so that none is freed and mistaken for another
    handles = []
    for name, linear in linears.items():

        def hook(module: nn.Module, args: tuple[Tensor, ...], _name: str = name) -> None:
            same = next((other for other, x in given.items() if x is args[0]), _name)
            if owner.setdefault(_name, same) != same:
                raise ValueError(
                    f"gptq: {_name} is given its input in changing ways; use calibrate: mse for this model"
                )
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
        raise ValueError(
            f"gptq: no calibration token reached {some(idle)}; use calibrate: mse, or other calibration text"
        )
    for name, total in sums.items():
        total.div_(tokens[name])
    return {name: sums[owner[name]] for name in linears if tokens[name]}

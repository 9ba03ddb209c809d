"""What quantize and the walks of evaluation hold beside the packed result, in bytes, from the recipe and the
headers alone.

    CPU      hidden states of the text between two layers: samples x length x width in the model's dtype, with
             the masks and rotary angles that the model gives its layers (model/walk.py); the dense model's
             beside the packed one's where a layer is fitted to it (signround, train.reconstruct)
    device   one dense decoder layer, and what packing its largest matrix needs

None of it grows with the number of layers. The packed layers themselves go to base/ one by one (quantize.py).
"""

import re
from dataclasses import dataclass
from math import prod

from ..grid.calibrate import CALIBRATORS
from ..grid.calibrate.gptq import ROWS
from ..model.config import head_width
from ..recipe.layers import Shapes
from ..recipe.recipe import Recipe

# per number of a matrix that is pruned (sparsity/): it is read whole; its scores, a copy for the one that is
# looked for, what is moved, and the zeros
PRUNE_BYTES = 16
BLOCK_BYTES = 256_000_000  # of a weight in its stored dtype, read and packed at a time
HESSIAN_BYTES = (
    5_000_000_000  # of Hessians summed in one pass of the text through a layer; one alone may be larger
)
# per element of a Hessian, beside it, while it is factored (grid/calibrate/curvature.py): nothing, it becomes
# its own factor; act-order sorts it into a copy. Where fp32 fails, which text has not made it do, 20 more.
SORT_BYTES = 4
# per number of a matrix whose outputs are turned (rotations/folds.py): it is read whole, in fp32, and copied
# on either side
FOLD_BYTES = 16
# at most: fp32 work of the range calibrators on some rows, and what malloc keeps of it
# (benchmarks/load_memory.py)
CHUNK_BYTES = 300_000_000
WALK_BYTES = 2 << 30  # of hidden states, masks and rotary angles, at most, while a teacher is asked

_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class QuantizeMemory:
    """Bytes. calibration, teacher, reference and reconstruction: CPU memory of the walks of a calibrator, a
    teacher (train.teacher), of evaluation (eval.kl) and of train.reconstruct, one after the other. The rest
    is on the device: outside, what the model has beside its layers (embedding and head), and one dense layer,
    for all walks; hessians and work while packing."""

    calibration: int
    teacher: int
    reference: int
    reconstruction: int
    outside: int
    layer: int
    hessians: int
    work: int

    @property
    def cpu(self) -> int:
        """The most that waits in CPU memory, beside a few MB of staging."""
        return max(self.calibration, self.teacher, self.reference, self.reconstruction)

    @property
    def device(self) -> int:
        """The most that packing needs on the device. No packed layer is there: each goes to base/."""
        return max(self.layer + self.hessians + self.work, self.outside + self.layer)

    @property
    def reference_device(self) -> int:
        """What evaluation's walk needs on the device, beside the model that is measured."""
        return self.outside + self.layer if self.reference else 0


def quantize_memory(recipe: Recipe, shapes: Shapes) -> QuantizeMemory:
    """The bytes for this recipe on the checkpoint with these headers. Pure; an upper bound, exact for plain
    decoders in `calibration`.
    """
    size = 4 if recipe.model.dtype == "float32" else 2
    text, walks, packs = recipe.quant.calibration, recipe.quant.reads_rows, recipe.quant.reads_text
    compares = recipe.eval.perplexity and recipe.eval.kl
    section, walking = recipe.train.reconstruct, CALIBRATORS[recipe.quant.calibrate] if packs else None
    by_block = recipe.quant.by_block
    asks = recipe.train.teacher is not None  # a live one is compared with full precision, a kept one is it
    any_walk = walks or compares or asks or section is not None
    layers: dict[str, int] = {}  # decoder layer -> its bytes when dense; "": everything else
    for name, shape in shapes.tensors.items():
        key = found[1] if (found := _LAYER.match(name)) else ""
        layers[key] = layers.get(key, 0) + prod(shape) * size
    outside = layers.pop("", 0)
    packed = shapes.packed(recipe.quant)
    largest = max((layer.out_features * layer.in_features for layer in packed), default=0)
    rows = max((min(layer.out_features, ROWS) * layer.in_features for layer in packed), default=0)
    squares: dict[str, list[int]] = {}  # decoder layer -> bytes of the Hessian of each of its linears
    for layer in packed:
        squares.setdefault(found[1] if (found := _LAYER.match(layer.name)) else "", []).append(
            4 * layer.in_features**2
        )
    hessian = max((max(sizes) for sizes in squares.values()), default=0)
    if by_block:
        hessian, squares = 0, {}
    whole: dict[str, int] = {}  # decoder layer -> weights of its linears
    for layer in packed if by_block else ():
        key = found[1] if (found := _LAYER.match(layer.name)) else ""
        whole[key] = whole.get(key, 0) + layer.out_features * layer.in_features
    return QuantizeMemory(
        calibration=waiting_bytes(text.samples, text.sequence_len, shapes, size, 2 if by_block else 1)
        if walks
        else 0,
        reference=waiting_bytes(recipe.eval.windows or 0, recipe.eval.window, shapes, size)
        if compares
        else 0,
        teacher=WALK_BYTES if recipe.train.teacher == "cached" else 0,
        # x, what the dense layer makes of it, and the packed model's own
        reconstruction=waiting_bytes(
            section.samples, section.sequence_len, shapes, size, 2 if section.inputs == "dense" else 3
        )
        if section is not None
        else 0,
        outside=outside if any_walk else 0,
        layer=max(layers.values(), default=0) if any_walk else 0,
        hessians=min(max(map(sum, squares.values()), default=0), max(HESSIAN_BYTES, hessian)) if packs else 0,
        # gptq: the weight as stored with codes and residual, and three fp32 copies of the rows at work.
        # Others: a block of rows, as much again for its codes and residual while they are put together.
        # signround: what it holds of all linears of a layer
        work=(
            walking.block_bytes * max(whole.values(), default=0)
            if walking is not None and by_block
            else (SORT_BYTES * hessian // 4 if text.act_order else 0) + 4 * largest + 12 * rows
            if packs
            else 2 * min(2 * largest, BLOCK_BYTES) + min(CHUNK_BYTES, 64 * largest)
        )
        + (FOLD_BYTES * largest if recipe.quant.folds else 0)
        + (PRUNE_BYTES * largest if recipe.quant.sparsity.at_once.prunes else 0),
    )


def waiting_bytes(samples: int, length: int, shapes: Shapes, size: int, streams: int = 1) -> int:
    """Hidden states (of so many models), masks (a byte per pair of tokens), rotary cosines and sines, and
    positions (8 bytes) of `samples` windows.
    """
    hidden = shapes.number("hidden_size", "n_embd", "d_model") or 0
    head = head_width(shapes.number) or hidden
    return samples * length * (streams * hidden * size + length + 2 * head * size + 8)

"""direct: a checkpoint is packed by the keys of `quant` alone, without a recipe around them.

Two doors use it: `from_pretrained(..., quantization_config=LowBitQuantConfig(...))` (while_loading.py) and
`lowbit-ft quantize MODEL --bits 4` (`pack_folder`). Both give the integers of `lowbit-ft quantize` of a
recipe with the same keys, bit for bit: the walk is the same `Packing`, the rows go through the same choice
(rows.py), with the defaults of a recipe for what is not asked (data.packing, train.seed).

What has to look at the model at work before or after packing (a rotation, quantized inputs, a quantized
cache) is a stage of a run, and refused here by name.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from ..data.chosen import calibration_windows
from ..export import EXPORTERS, Weights
from ..export.writer import write_model
from ..grid.calibrate import CALIBRATORS
from ..model.checkpoint import Checkpoint
from ..model.load import load_tokenizer
from ..model.walk import Batch
from ..names import did_you_mean
from ..recipe.errors import to_problems
from ..recipe.layers import read_shapes
from ..recipe.sections.data import DataSection, check_data
from ..recipe.sections.quant import QuantSection, check_grid
from ..recipe.sections.sparsity import check_sparsity
from ..recipe.sections.train import TrainSection
from .quantize import Packing
from .rows import as_source, refuse_rows, window_batch
from .table import QuantTable

# Keys of quant that are the work of other stages of a run.
OF_A_RUN = ("rotation", "smooth", "activations", "kv_cache")
CALIBRATION = tuple(key for key in QuantSection().calibration.__class__.model_fields if key != "path")


@dataclass(frozen=True)
class Direct:
    """What is packed and by which rows. quant: resolved and checked; rows: a path, a hub id, or rows (see
    rows.as_source); None where its calibrator looks at none."""

    quant: QuantSection
    rows: Any = None

    @classmethod
    def of(cls, options: dict[str, Any], rows: Any = None) -> "Direct":
        """Of keys of `quant`, those of `quant.calibration` beside them (samples, sequence_len, ...).
        ValueError with one line for each that is wrong."""
        given = {key: value for key, value in options.items() if key not in CALIBRATION}
        inner = {key: options[key] for key in CALIBRATION if key in options}
        if inner and isinstance(text := given.get("calibration") or {}, dict):
            given["calibration"] = {**text, **inner}
        allowed = [key for key in QuantSection.model_fields if key not in (*OF_A_RUN, "calibration")]
        allowed += CALIBRATION
        lines = [
            f"quant.{key}: chosen by looking at the model at work, which is a stage of a run: pack with a "
            "recipe (lowbit-ft quantize recipe.yaml) and load the base/ folder it writes"
            for key in OF_A_RUN
            if given.get(key) is not None
        ]
        lines += [
            f"quant.{key}: unknown key{did_you_mean(key, allowed)}; allowed: {', '.join(allowed)}"
            for key in given
            if key not in QuantSection.model_fields
        ]
        known = {key: value for key, value in given.items() if key in QuantSection.model_fields}
        try:
            quant = QuantSection.model_validate(known)
            rows = quant.calibration.path if rows is None else rows
            quant = quant.resolved(rows=rows is not None)
        except ValidationError as error:
            problems = to_problems("quant", QuantSection, error.errors(include_url=False), known)
            raise ValueError("\n".join([*lines, *map(str, problems)])) from None
        sections = SimpleNamespace(quant=quant)
        lines += [str(problem) for check in (check_grid, check_sparsity) for problem in check(sections)]
        if quant.sparsity.schedule is not None:
            lines.append(
                "quant.sparsity.schedule: zeros that come while a recipe's run trains; remove it, and "
                "they are all chosen now"
            )
        lines += _about_rows(quant, rows)
        if isinstance(rows, str | Path):
            text = quant.calibration.model_copy(update={"path": str(rows)})
            found = check_data(SimpleNamespace(quant=quant.model_copy(update={"calibration": text})))
            lines += [str(problem) for problem in found]
        elif rows is not None:
            refuse_rows(rows)
        if lines:
            raise ValueError("\n".join(lines))
        return cls(quant, rows)

    def packing(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        attention: str = "sdpa",
        console: Console | None = None,
    ) -> Packing:
        """The packed layers of the checkpoint, made one after the other."""
        if checkpoint.incoming is not None:
            raise ValueError(
                f"{checkpoint.source} is quantized already ({checkpoint.incoming}); load it without a "
                "quantization_config, or give it as model.path of a recipe, which takes its codes as they are"
            )
        return Packing(
            checkpoint,
            self.quant,
            device=device,
            dtype=dtype,
            attention=attention,
            calibration=None if self.rows is None else partial(self.windows, checkpoint),
            console=console,
        )

    def windows(self, checkpoint: Checkpoint) -> list[Batch]:
        """The token windows that the calibrator looks at."""
        text = self.quant.calibration
        with as_source(self.rows) as source:
            return calibration_windows(
                source,
                DataSection(),
                load_tokenizer(checkpoint),
                rows=read_shapes(checkpoint.folder).rows,
                seed=TrainSection.model_fields["seed"].default,
                samples=text.samples,
                sequence_len=text.sequence_len,
                size=window_batch(text),
            )


def _about_rows(quant: QuantSection, rows: Any) -> list[str]:
    """Rows that are missing, or that nothing looks at."""
    if quant.calibrate not in CALIBRATORS or quant.reads_text == (rows is not None):
        return []
    if quant.reads_text and not CALIBRATORS[quant.calibrate].needs_text:
        return [
            f"quant.sparsity.kind: {quant.sparsity.kind} looks at rows, and none are given: give some "
            "(calibration=... in Python, --data FILE on the command line), or take kind: magnitude"
        ]
    if quant.reads_text:
        return [
            f"quant.calibrate: {quant.calibrate} looks at rows, and none are given: give some "
            "(calibration=... in Python, --data FILE on the command line), or take calibrate: mse, which "
            "looks at none"
        ]
    text = ", ".join(name for name, member in CALIBRATORS.items() if member.needs_text)
    return [
        f"quant.calibrate: {quant.calibrate} looks at no rows, and some are given: leave them out, or take "
        f"one of {text}"
    ]


def pack_folder(
    model: str,
    direct: Direct,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    attention: str = "sdpa",
    console: Console | None = None,
) -> QuantTable:
    """Write the packed model of a folder or hub id as a native folder, layer by layer: neither the checkpoint
    nor the packed model is ever whole in memory. Returns what became of each layer."""
    checkpoint = Checkpoint.open(model, revision, dtype)
    packing = direct.packing(checkpoint, device, checkpoint.dtype, attention, console)
    write_model(folder, checkpoint, Weights(packing.layer_specs, packing.take), EXPORTERS["native"])
    return packing.table

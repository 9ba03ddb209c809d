"""One validator for the combinations: which checks run, in which order, and what is worth a note.

The checks stand beside the fields of their sections (sections/). A check runs when the sections it names here
are valid in themselves, so one wrong key does not hide what is wrong elsewhere; in its own section it does
not hide a file that is not there (`check_files`). Everything is found before anything is loaded: config.json,
safetensors headers and file names are all that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..adapters.lora_start import read_lora
from ..export import EXPORTERS
from ..export.compressed_tensors import fused_conflict
from ..grid.calibrate import CALIBRATORS
from ..names import PatternError
from .layers import local_folder, shapes_here
from .paths import PATHS
from .sections.activations import check_activation_layers, check_activations
from .sections.adapter import check_adapter_layers, check_method
from .sections.base import Problems
from .sections.chat import check_chat, check_template
from .sections.data import check_data, check_lengths, check_mixture, check_synthesis
from .sections.eval import check_tasks, check_tasks_reader
from .sections.export import check_export
from .sections.gradient import check_gradient
from .sections.kv_cache import check_kv_cache
from .sections.model import check_device, check_model, check_tokens
from .sections.modules import check_modules, module_notes
from .sections.output import check_output
from .sections.preference import check_preference
from .sections.quant import check_grid, check_groups, check_layers
from .sections.reconstruct import check_reconstruct
from .sections.rotation import check_rotation
from .sections.segments import check_segments, segment_notes
from .sections.server import check_server
from .sections.signal import check_signal
from .sections.sparsity import check_schedule, check_sparsity
from .sections.start import check_start
from .sections.task import check_formats, check_task
from .sections.tokens import check_add_tokens
from .sections.train import check_offload, check_train
from .yaml import Problem

Check = tuple[tuple[str, ...], Callable[[Any], Problems]]  # the sections that it needs, and itself
CHECKS: tuple[Check, ...] = (
    (("task", "data"), check_formats),
    (("model", "task", "quant", "adapter", "data", "train", "eval", "export"), check_task),
    (("model",), check_model),
    (("model",), check_tokens),
    (("model",), check_add_tokens),
    (("model",), check_device),
    (("quant",), check_grid),
    (("quant",), check_activations),
    (("model", "quant"), check_kv_cache),
    (("quant", "adapter"), check_method),
    (("quant", "export"), check_export),
    (("quant", "export"), check_server),
    (("model", "quant", "adapter"), check_adapter_layers),
    (("model", "quant", "adapter"), check_segments),
    (("model", "quant", "adapter"), check_modules),
    (("model", "quant"), check_layers),
    (("model", "quant", "adapter", "export"), check_activation_layers),
    (("model", "quant", "export"), check_groups),
    (("model", "quant"), check_rotation),
    (("quant",), check_sparsity),
    (("quant", "adapter", "train"), check_schedule),
    (("model", "data"), check_lengths),
    (("model", "data"), check_template),
    (("model", "task", "data"), check_chat),
    (("model", "data", "train", "output"), check_offload),
    ((), check_data),
    (("data",), check_synthesis),
    (("data",), check_mixture),
    (("train", "data"), check_train),
    (("model", "quant", "adapter", "train"), check_reconstruct),
    (("model", "train"), check_signal),
    (("model", "quant", "adapter", "train", "output"), check_start),
    (("adapter", "data", "train"), check_preference),
    (("adapter", "train"), check_gradient),
    (("eval",), check_tasks),
    (("eval", "export"), check_tasks_reader),
    (("output",), check_output),
)


def check(values: dict[str, Any]) -> list[Problem]:
    """Run every check whose sections are in `values` ({section name: section}); returns the problems
    found.
    """
    return _run(values, CHECKS)


def check_files(rest: dict[str, Any]) -> list[Problem]:
    """Of sections with a wrong key, by what is left without it: the files and folders that are not there.
    Nothing else is said of them, because a default now stands where something else was meant."""
    alone = [(needs, run) for needs, run in CHECKS if len(needs) < 2]
    return [problem for problem in _run(rest, alone) if problem.path[-1] in PATHS] if rest else []


def _run(values: dict[str, Any], checks: Sequence[Check]) -> list[Problem]:
    sections = SimpleNamespace(**values)
    problems: list[Problem] = []
    for needs, run in checks:
        if all(name in values for name in needs):
            try:
                problems += run(sections)
            except PatternError as error:
                problems.append(Problem(needs[-1:], str(error)))
    return problems


def notes(recipe: Any) -> list[str]:
    """What is not wrong but worth knowing before a run: an inexact merge, a start that others beat."""
    found = []
    if not recipe.adapter.exact_merge:
        found.append(
            f"{recipe.adapter.method} does not merge exactly: the merged weights are rounded again, and "
            "the loss of that is measured"
        )
    if recipe.quant.from_checkpoint and recipe.adapter.delta_unit is not None and recipe.adapter.exact_merge:
        found.append(
            f"{recipe.model.path} comes quantized, without residual bits: a code moves once the low-rank "
            "product passes half a step; "
            "where few do (the report counts them), raise train.learning_rate"
        )
    residual = getattr(recipe.quant, "residual_bits", 0) if recipe.quant.keeps_residual else 0
    if residual and not recipe.adapter.reads_residual and recipe.train.teacher != "residual":
        found.append(
            f"{recipe.adapter.method} counts from the codes: quant.residual_bits {residual} is memory that "
            "nothing reads; set residual_bits: 0"
        )
    calibrator = CALIBRATORS.get(recipe.quant.calibrate)
    usual = recipe.quant.start(rows=True)
    shapes = shapes_here(recipe.model.path, recipe.model.revision)
    walks = recipe.task.walks({} if shapes is None else shapes.config)
    looks = walks and CALIBRATORS[usual].needs_text
    if recipe.quant.bits < 4 and calibrator is not None and looks:
        if not (calibrator.needs_text or calibrator.exact or calibrator.narrow):
            found.append(
                f"quant.calibrate: {recipe.quant.calibrate} at {recipe.quant.bits} bits is a far worse start "
                f"than {usual}, which looks at data.train (README.md has both in its table); leave calibrate "
                f"out, or set {usual}; signround is better still and takes longer"
            )
    if residual and recipe.adapter.reads_residual and calibrator is not None and calibrator.exact:
        found.append(
            f"quant.calibrate: {recipe.quant.calibrate} rounds nothing: what quant.residual_bits {residual} "
            "would keep is the file's own rounding; set residual_bits: 0 (l4q needs 2)"
        )
    if (source := getattr(recipe.adapter, "init_from", None)) is not None:
        base, ours = read_lora(source).base, recipe.model.path
        if Path(base).name.lower() != Path(ours).name.lower():
            found.append(
                f"the LoRA {source} was trained on {base or 'an unnamed base'}, this run starts from "
                f"{ours}: the same weights?"
            )
    if local_folder(recipe.model.path, recipe.model.revision) is None:
        found.append(
            f"{recipe.model.path} is a hub id: layer names and widths are checked once it is fetched"
        )
    found += [*segment_notes(recipe), *module_notes(recipe)]
    other_text = recipe.eval.data or recipe.data.valid
    if recipe.data.synthesis is not None and recipe.eval.perplexity and not other_text:
        found.append(
            "the table is measured on text that the model wrote itself (data.synthesis): perplexities are "
            "low there; set eval.data for those of other text"
        )
    elif recipe.eval.perplexity and not other_text:
        found.append(
            "the table is measured on the training rows, which flatters what was trained on them; set "
            "data.valid or eval.data"
        )
    exporter = EXPORTERS[recipe.export.format]
    shapes = shapes_here(recipe.model.path, recipe.model.revision)
    if exporter.fused_by_servers and shapes is not None:
        quant = recipe.quant
        names = [layer.name for layer in shapes.linears]
        conflict = fused_conflict(
            {n: quant.grid_for(n) if quant.skip_reason(n) is None else None for n in names}
        )
        found += [conflict] if conflict else []
    return found

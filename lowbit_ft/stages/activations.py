"""activations: what the inputs of the packed layers are on is settled once, when base/ is made, and written
into its config.json, from where training, the merge and every later stage have it.
"""

from pathlib import Path
from typing import Any

import torch

from ..activations.calibrate import Choice, choose, needs_rows
from ..activations.place import hosts
from ..export import LayerSpec
from ..export.folder import replace_config
from ..export.native import activation_entry
from ..model.attention import segment_inputs
from ..model.config import read_config
from ..model.fused import known_as, part_rows
from ..model.roles import is_head
from ..model.walk import Batch
from ..recipe.sections.activations import ActivationsSection, carried
from ..recipe.sections.quant import grids
from ..segments import segments_in
from ..session import Session
from ..train.losses import LABELS
from .data import calibration_batches, calibration_key
from .models import load_packed


def activations_key(session: Session) -> list[Any]:
    """What decides about the inputs: the section, and where rows decide the text, the format that has to
    carry the choice, and the grids that it will ship beside it, which the adapter has a say in."""
    recipe, section = session.recipe, session.recipe.quant.activations
    assert section is not None
    if not section.reads_text:
        return [section.model_dump(mode="json"), None]
    adapter = recipe.adapter
    shipped = [
        (adapter.shipped(grid) if grid.kind == adapter.grid_name else grid).to_json()
        for _, grid in grids(recipe)
    ]
    text = [calibration_key(session), recipe.export.format, adapter.targets, shipped]
    return [section.model_dump(mode="json"), text]


def settle_activations(session: Session, folder: Path, place: str | None) -> None:
    """Choose, with the packed model that is in base/ (on the device `place`; None: the session's), and write
    the choice into the folder's config.json and into activations.json, which says why. Nothing where the
    recipe leaves the inputs alone.
    """
    section = session.recipe.quant.activations
    if section is None:
        return
    model = load_packed(folder, session, place if section.reads_text else "cpu")
    made = choose_activations(session, model, section)
    made = [one.learned() for one in made] if section.learn else made
    schemes = {name: one.scheme for one in made for name in one.layers}
    specs = {  # of which only the activations are written
        name: LayerSpec(layer.base.shape, layer.base.grid, activation=schemes.get(name))
        for name, layer in hosts(model)
    }
    config = read_config(folder)
    config["quantization_config"] |= activation_entry(specs)
    replace_config(folder, config)
    session.run.write_json("activations.json", {"rows": [one.to_json() for one in made]})
    session.say(table(made))


def choose_activations(session: Session, model: Any, section: ActivationsSection) -> list[Choice]:
    """The scheme of every input, on calibration rows where these decide."""
    recipe = session.recipe
    format, adapter = recipe.export.format, recipe.adapter
    segments = segments_in(session.checkpoint.folder) if section.segments == "auto" else {}
    candidates, parts = {}, part_rows(model)
    for name, layer in hosts(model):
        names = known_as(name, parts)
        whole = names[-1]  # the parts of a fused matrix have one input
        if section.applies(whole):
            grid = adapter.shipped(layer.grid) if adapter.trains(*names) else layer.grid
            widths = segments[whole].widths if whole in segments else ()
            candidates[name] = carried(section, whole, grid, layer.in_features, format, widths)
    if not section.learn and not needs_rows(candidates):
        return choose(model, candidates)
    batches, device = calibration_batches(session), next(iter(model.buffers())).device
    # The logits are nobody's input, unless the head is asked for by name.
    body = model if any(is_head(name) for name in candidates) else model.base_model

    def forward(number: int) -> None:
        batch: Batch = batches[number]
        inputs = batch | segment_inputs(model, batch.get("position_ids"))
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        body(**moved, use_cache=False)

    scale_dtype = getattr(torch, recipe.quant.scale_dtype)
    with recipe.task.goal.attention(model, LABELS):
        return choose(model, candidates, len(batches), forward, section.range, scale_dtype, section.learn)


def table(choices: list[Choice]) -> str:
    """A line per scheme: where it is, how many layers, its mean output error, why."""
    groups: dict[tuple[str, str], list[Choice]] = {}
    for one in choices:
        groups.setdefault((str(one.scheme), one.why), []).append(one)
    lines = []
    for (scheme, why), found in groups.items():
        names = [name for one in found for name in one.layers]
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        errors = [one.error for one in found if one.error is not None]
        mean = f", output error {sum(errors) / len(errors):.2e}" if errors else ""
        lines.append(f"activations: {scheme} in {len(names)} layers ({', '.join(kinds)}){mean}: {why}")
    return "\n".join(lines)

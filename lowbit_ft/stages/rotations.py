"""rotations: what quant.rotation and quant.smooth become for this checkpoint, chosen once before base/ is
packed and kept in it.
"""

from __future__ import annotations

import json
from dataclasses import replace

from ..activations import Activation, activation_of
from ..quantize.rotate import plan_rotation
from ..rotations import FILE, SITES, FoldedCheckpoint, Rotation
from ..segments import segments_in
from ..session import Session
from .data import calibration_batches


def turn(session: Session) -> FoldedCheckpoint:
    """The checkpoint as it will be packed; says what was chosen. ValueError where it cannot be turned so."""
    recipe = session.recipe
    section = recipe.quant.activations
    found = segments_in(session.checkpoint.folder) if getattr(section, "segments", "none") == "auto" else {}

    def quantizer(layer: str) -> Activation | None:
        """What the input of a layer will be on: the first of its schemes, its scale made of the input."""
        if section is None or not section.applies(layer):
            return None
        widths = found[layer].widths if layer in found else ()
        return activation_of(replace(section.schemes(layer, widths)[0], dynamic=True))

    rotation = plan_rotation(
        session.checkpoint,
        recipe.quant,
        calibration=lambda: calibration_batches(session),
        pad_id=session.pad_id,
        activation=quantizer,
        device=session.device,
        dtype=session.dtype,
        attention=recipe.model.attention,
    )
    folded = FoldedCheckpoint(session.checkpoint, rotation)
    for line in told(rotation, folded.untied, section is not None):
        session.say(line)
    return folded


def told(rotation: Rotation, untied: bool, activations: bool) -> list[str]:
    """What was chosen, in lines. activations: whether the inputs of layers are quantized."""
    lines = []
    turned = ["r1"] * rotation.r1
    for site in SITES:
        layers = getattr(rotation, site)
        if any(layers):
            turned.append(f"{site} in {sum(layers)} of {len(layers)} layers")
    if turned or rotation.errors:
        lines.append(f"rotation: {', '.join(turned) or 'nothing'} (seed {rotation.seed})")
    if rotation.errors and not activations:
        lines.append("rotation: inputs stay in 16 bits (quant.activations), so weights alone decided")
    if untied:
        lines.append(
            "rotation: the head was tied to the embedding and is a tensor of its own now: a norm's gain went "
            "into one of the two"
        )
    if rotation.alphas:
        used = sorted(set(rotation.alphas.values()))
        lines.append(
            f"smooth: {len(rotation.alphas)} sites, alpha {', '.join(f'{alpha:g}' for alpha in used)}"
        )
    return lines


def turned_keys(session: Session) -> list[int]:
    """The layers whose keys r3 turns where the KV cache rounds them."""
    folded = session.folded
    if not isinstance(folded, FoldedCheckpoint):
        return []
    layers = folded.structure.layers
    return [i for i, on in enumerate(folded.rotation.r3) if on and layers[i].values is not None]


def rotation_file(session: Session) -> dict[str, str]:
    """rotation.json, where there is a rotation: a folder of the model says in which basis its weights are."""
    folded = session.folded
    if not isinstance(folded, FoldedCheckpoint):
        return {}
    return {FILE: json.dumps(folded.rotation.to_json(), indent=1) + "\n"}

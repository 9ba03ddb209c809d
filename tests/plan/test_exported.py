"""The bytes of exported/ that plan tells are those of the tensors that its format writes."""

from __future__ import annotations

from pathlib import Path

from lowbit_ft.plan.plan import no_card, plan
from lowbit_ft.recipe.recipe import load_recipe

ASSETS = Path(__file__).resolve().parents[2] / "recipes"
WEIGHTS, DENSE, LAYERS = 3_145_728, 1_050_880, 28  # of tiny-llama: packed ones, and all other numbers
GROUPS = WEIGHTS // 128


def exported(format: str, *changes: str) -> int:
    asked = ["data.sequence_len=64", "model.dtype=bfloat16", f"export.format={format}", *changes]
    made = plan(
        load_recipe(ASSETS / "quickstart.yaml", asked, check=False), ASSETS / "assets/tiny-llama", no_card()
    )
    assert made is not None
    return made.needs.disk["exported/"]


def test_an_export_is_as_large_as_its_format_makes_it() -> None:
    """The files of these two were 5,881,616 (model.onnx_data) and 3,783,384 bytes, headers among them."""
    assert exported("onnx") == WEIGHTS // 2 + 4 * GROUPS + 4 * DENSE, "fp32, whatever the model's dtype"
    # scales of fp32 too, and the shape of each layer
    packed = WEIGHTS // 2 + 4 * GROUPS + 16 * LAYERS
    assert exported("compressed-tensors") == packed + 2 * DENSE


def test_grids_that_ship_as_another_one() -> None:
    """One sign plane is two bits of integers; l4q trains the zero point of a symmetric grid along."""
    plane = (
        "quant={grid: binary, bits: 1, group_size: 128, calibrate: greedy}",
        "adapter={method: alpha_tuning}",
    )
    assert exported("compressed-tensors", *plane) == WEIGHTS // 4 + 4 * GROUPS + 16 * LAYERS + 2 * DENSE
    own = ("adapter={method: l4q, rank: 4, offset: integer}",)
    zeros = exported("onnx", *own) - exported("onnx")
    assert zeros >= GROUPS // 2, "a zero point of 4 bits for each group"

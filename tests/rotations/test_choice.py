"""What is chosen on calibration rows: the errors are those of the recipe's grids, ties are off, a planted
outlier is found, and what is chosen loses less.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.outliers import plant
from lowbit_ft.activations import Activation, Scheme, activation_of
from lowbit_ft.activations.place import hosts, place_activations
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_model
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.quantize.rotate import full_range, plan_rotation
from lowbit_ft.quantize.smooth import smoothing
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.rotations import ROTATIONS, Asked, FoldedCheckpoint, Rotation, RotationFile, SiteErrors, Turn
from tests.packed_tools import tiny_checkpoint

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
IDS = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(2))
A4 = Scheme(kind="token", bits=4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), **SMALL), dtype="float32")


@pytest.fixture(scope="module")
def uneven(plain: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(plant(plain.folder, tmp_path_factory.mktemp("uneven")), dtype="float32")


def section(**changes: Any) -> QuantSection:
    return QuantSection.model_validate({"bits": 4, "group_size": 32, "calibrate": "absmax"} | changes)


def four_bits(layer: str) -> Activation:
    return activation_of(A4)


def planned(
    checkpoint: Checkpoint, quant: QuantSection, quantizer: Any = four_bits, pad: int = 0
) -> Rotation:
    padded = torch.nn.functional.pad(IDS, (0, 4), value=0)  # token 0 does not occur in the text
    return plan_rotation(
        checkpoint,
        quant,
        calibration=lambda: [{"input_ids": padded[:1]}, {"input_ids": padded[1:]}],
        pad_id=pad,
        activation=quantizer,
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="eager",
    )


@torch.no_grad()
def seen(checkpoint: Checkpoint, name: str, output: bool = False) -> Tensor:
    """What a module of the dense model is given (or gives), [T, K]."""
    model: Any = load_model(checkpoint, "eager")
    found: list[Tensor] = []
    module = model.get_submodule(name)
    module.register_forward_hook(lambda m, args, out: found.append(out if output else args[0]))
    model(input_ids=IDS, use_cache=False)
    return found[0].reshape(-1, found[0].shape[-1])


def relative(rounded: Tensor, value: Tensor) -> float:
    return float((rounded - value).square().sum() / value.square().sum())


def test_a_planted_checkpoint_is_the_same_function_with_outliers(
    plain: Checkpoint, uneven: Checkpoint
) -> None:
    a, b = (load_model(c, "eager")(input_ids=IDS).logits for c in (plain, uneven))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    x = seen(uneven, "model.layers.0.mlp.down_proj").abs().amax(0)
    assert float(x.max() / x.median()) > 10


def test_errors_are_those_of_the_grids_of_the_recipe(uneven: Checkpoint) -> None:
    quant = section(rotation={"kind": "adaptive", "sites": {"r1": True, "r2": True, "r4": True}})
    rotation = planned(uneven, quant)
    assert rotation.r1 and len(rotation.errors) == 4
    stream = FoldedCheckpoint(uneven, Rotation(r1=True))
    name, grid = "model.layers.1.mlp.down_proj", quant.grid_for("")
    (row,) = (row for row in rotation.errors if row.layer == 1 and row.site == "r4")
    x, turn = seen(stream, name), Turn(96)
    for value, off, on in (
        (stream.matrix(name), row.weight_off, row.weight_on),
        (x, row.activation_off, row.activation_on),
    ):
        for v, found in ((value, off), (turn(value).float(), on)):
            rounded = four_bits("")(v) if value is x else full_range(v, grid)
            assert found == pytest.approx(relative(rounded, v), rel=1e-3)
    assert rotation.r4 == (True, True), "an outlier is spread"
    assert all(row.on for row in rotation.errors if row.site == "r4")


def test_without_quantized_inputs_weights_decide_alone(plain: Checkpoint) -> None:
    quant = section(rotation={"kind": "adaptive", "sites": {"r4": True}})
    rotation = planned(plain, quant, lambda layer: None)
    for row in rotation.errors:
        assert row.activation_off is row.activation_on is None
        assert row.weight_off is not None and row.weight_on is not None
        assert row.on == (row.weight_on < row.weight_off)
    again = Rotation.of(RotationFile.model_validate(rotation.to_json()))
    assert again == rotation


def test_keys_are_chosen_by_what_the_cache_does_to_them(plain: Checkpoint) -> None:
    quant = section(
        rotation={"kind": "adaptive", "sites": {"r1": False, "r2": False, "r3": True}},
        kv_cache={"bits": 8, "kind": "token_head"},
    )
    rotation = planned(plain, quant)
    assert [(row.site, row.weight_off) for row in rotation.errors] == [("r3", None)] * 2
    for row in rotation.errors:
        assert row.activation_off is not None and row.activation_on is not None
        assert 0 < row.activation_off < 1e-3 and 0 < row.activation_on < 1e-3
        assert row.on == (row.activation_on < row.activation_off) == rotation.r3[row.layer]


def test_ties_are_off_and_sites_that_are_not_asked_for_stay_off() -> None:
    def row(layer: int, on: bool) -> SiteErrors:
        error = {"weight_off": 1.0, "weight_on": 1.0, "activation_off": None, "activation_on": None}
        return SiteErrors(layer=layer, site="r4", on=on, **error)

    rows = [row(0, False), row(1, True)]
    sites: Any = {"r2": True, "r3": False, "r4": True}
    r1, chosen = ROTATIONS["adaptive"].choose(Asked(3, True, sites, rows))
    assert r1 and chosen == {"r2": (False,) * 3, "r3": (False,) * 3, "r4": (False, True, False)}
    _, chosen = ROTATIONS["adaptive"].choose(Asked(3, True, {**sites, "r4": False}, rows))
    assert chosen["r4"] == (False,) * 3
    r1, chosen = ROTATIONS["hadamard"].choose(Asked(2, False, sites))
    assert not r1 and chosen == {"r2": (True,) * 2, "r3": (False,) * 2, "r4": (True,) * 2}
    assert ROTATIONS["none"].choose(Asked(1, True, sites)) == (False, dict.fromkeys(sites, (False,)))


def test_smoothing_is_what_its_equation_says_and_padding_plays_no_part(uneven: Checkpoint) -> None:
    rotation = planned(uneven, section(smooth=0.5))
    norm = "model.layers.1.post_attention_layernorm"
    x = seen(uneven, norm, output=True).abs().amax(0)
    weights = [uneven.matrix(f"model.layers.1.mlp.{name}_proj") for name in ("gate", "up")]
    want = smoothing(x, torch.stack([w.abs().amax(0) for w in weights]).amax(0), 0.5)
    torch.testing.assert_close(rotation.smooth[norm], want, rtol=2e-2, atol=0)
    torch.testing.assert_close(
        want, (x / torch.cat(weights).abs().amax(0)).double().sqrt(), rtol=1e-2, atol=0
    )
    assert not rotation.r1 and not any(rotation.r2) and len(rotation.smooth) == 4


@torch.no_grad()
def test_what_is_chosen_loses_less(plain: Checkpoint, uneven: Checkpoint) -> None:
    """Inputs in 4 bits, weights in 8: the error of the logits falls with smoothing, and more with rotations
    (0.634, 0.603, 0.287 here)."""
    want = load_model(uneven, "eager")(input_ids=IDS).logits

    def lost(**changes: Any) -> float:
        quant = section(bits=8, **changes)
        checkpoint = FoldedCheckpoint(uneven, planned(uneven, quant)) if quant.folds else uneven
        model, _ = quantize(checkpoint, quant, attention="eager")
        place_activations(model, {name: A4 for name, _ in hosts(model)})
        got = model(input_ids=IDS, use_cache=False).logits
        return relative(got, want)

    none, smooth = lost(), lost(smooth="auto")
    adaptive = lost(rotation={"kind": "adaptive", "sites": {"r4": True}})
    assert adaptive < smooth < none and adaptive < 0.5 * none

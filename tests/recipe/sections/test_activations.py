"""quant.activations: which layers, which candidates, and what is refused with the way out."""

from typing import Any

import pytest

from lowbit_ft.activations import ACTIVATIONS, Scheme
from lowbit_ft.grid import IntGrid
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.sections.activations import ActivationsSection, carried
from tests.recipe.recipe_text import GOOD, bad_recipes, refused_with, write

SECTION = ("  bits: 4\n", "  bits: 4\n  activations: {}\n")


def row(what: str, section: str, words: str, *overrides: str) -> tuple[str, Any, Any, str]:
    return what, ("  bits: 4\n", f"  bits: 4\n  activations: {section}\n"), overrides, words


BAD = [
    row("bits", "{bits: 5}", "r.yaml:8: quant.activations.bits: got 5; allowed: 3, 4, 6, 8"),
    row("kind", "{kind: tokne}", "token, tensor, group, dual, auto; did you mean 'token'?"),
    row("a number", "8", "quant.activations: got 8; allowed: a mapping with the keys bits, kind"),
    row("unknown key", "{bit: 8}", "quant.activations.bit: unknown key; did you mean 'bits'?"),
    row("clip", "{clip: 1.5}", "quant.activations.clip"),
    row("no clip", "{clip: []}", "an empty list"),
    row(
        "static token",
        "{dynamic: false}",
        "got 'token' with dynamic: false; static kinds: tensor, dual",
    ),
    row("dual zero", "{kind: dual, symmetric: false}", "kind: got 'dual' with symmetric: false"),
    row("static clip", "{kind: tensor, dynamic: false, clip: 0.9}", "clip: got 0.9 with dynamic: false"),
    row("range", "{range: mse}", "range: got 'mse' with dynamic: true"),
    row(
        "range name",
        "{kind: tensor, dynamic: false, range: max}",
        "moving_average, minmax, percentile, mse, lsq",
    ),
    row("lsq alone", "{kind: tensor, dynamic: false, range: lsq}", "got 'lsq' without learn"),
    row(
        "lsq zero",
        "{kind: tensor, dynamic: false, learn: true, range: lsq, symmetric: false}",
        "got 'lsq' with symmetric: false; it knows no zero point",
    ),
    row(
        "lsq of auto",
        "{kind: auto, dynamic: false, learn: true, range: lsq}",
        "got 'lsq' with kind: auto, which tries zero points, and lsq knows none",
        "export.format=native",
    ),
    row("segments", "{segments: heads}", "activations.segments: got 'heads'; allowed: auto, none"),
    row("group segments", "{kind: group, segments: auto}", "got 'auto' with kind: group, whose groups have"),
    row("static", "{kind: tensor, dynamic: false}", "raise on static inputs; set dynamic: true, or export"),
    row("clipped", "{clip: 0.9}", "do not clip the range of an input; set clip: 1.0, or export"),
    row("asymmetric", "{symmetric: false}", "raise on inputs with a zero point; set symmetric: true"),
    row(
        "learned segments",
        "{kind: tensor, dynamic: false, learn: true, segments: auto}",
        "activations.learn: got true with segments: auto; the static scales of segments stay what",
    ),
    row(
        "learned clip", "{learn: true}", "do not clip the range of an input; set learn: false, clip: 1.0, or"
    ),
    row(
        "learned clips of auto", "{kind: auto, learn: true}", "set learn: false, clip: 1.0, or export.format"
    ),
    row(
        "learned clip of W8A8",
        "{learn: true}",
        "clip: 1.0 and learn: false",
        "export.format=int-quantized",
        "quant.bits=8",
        "quant.group_size=-1",
    ),
    row(
        "learns nothing",
        "{kind: tensor, dynamic: false, learn: true}",
        "learn: got true, but no layer has both an adapter and a quantized input",
        "export.format=native",
        "adapter.targets=[lm_head]",
        "quant.lm_head=8",
    ),
    row("targets", "{targets: [q_prj]}", "targets: got 'q_prj', which matches no packed layer; did you mean"),
    row(
        "override",
        "{overrides: [{match: '*.no', bits: 4}]}",
        "0.match: got '*.no', which matches no",
    ),
    row("empty override", "{overrides: [{match: '*.q_proj'}]}", "an override that changes nothing"),
    row("override kind", "{overrides: [{match: '*.q_proj', kind: dual}]}", "not kind dual"),
    row("regex", "{targets: ['re:(']}", "not a name, glob or regex"),
    row("weights only", "{}", "gguf holds weights only", "export.format=gguf"),
    row("mlx", "{}", "set quant.activations: null, or export.format", "export.format=mlx"),
    row(
        "no inputs",
        "null",
        "take quantized inputs only",
        "export.format=int-quantized",
        "quant.bits=8",
        "quant.group_size=-1",
    ),
    row(
        "no server of 3 bits", "{bits: 3}", "take inputs of 8 or 4 bits, not 3; set activations.bits: 8 or 4"
    ),
    row(
        "a format for 8 bits",
        "{bits: 4}",
        "inputs of 8 bits per token",
        "export.format=int-quantized",
        "quant.bits=8",
        "quant.group_size=-1",
    ),
]


@bad_recipes(BAD)
def test_refused(change: tuple[str, str], overrides: tuple[str, ...], words: str) -> None:
    refused_with(change, overrides, words)


@pytest.mark.parametrize(
    ("section", "overrides"),
    [
        ("{}", ()),
        ("{bits: 4, kind: group, group_size: 32, grad_mask: 2.0}", ()),
        ("{kind: auto, clip: [1.0, 0.9], overrides: [{match: '*.down_proj', kind: token}]}", ()),
        ("{kind: tensor, dynamic: false, range: percentile}", ("export.format=native",)),
        ("{bits: 4, learn: true, clip: [1.0, 0.9], segments: auto}", ("export.format=native",)),
        ("{symmetric: false}", ("export.format=int-quantized", "quant.bits=8", "quant.group_size=-1")),
    ],
)
def test_accepted_and_written_back(section: str, overrides: tuple[str, ...]) -> None:
    text = GOOD.replace("  bits: 4\n", f"  bits: 4\n  activations: {section}\n")
    recipe = load_recipe(write(text), overrides)
    assert load_recipe(write(recipe.to_yaml(), "again.yaml")) == recipe
    assert load_recipe(write(GOOD)).quant.activations is None


def test_candidates() -> None:
    section = ActivationsSection.model_validate(
        {
            "bits": 4,
            "clip": [1.0, 0.9],
            "grad_mask": 2,
            "overrides": [
                {"match": "*.down_proj", "bits": 8},
                {"match": "m.0.*", "kind": "group", "group_size": 32, "symmetric": False},
            ],
        }
    )
    token = {"kind": "token", "bits": 4, "mask": 2.0}
    assert section.schemes("m.1.q_proj") == [Scheme(**token), Scheme(**token, clip=0.9)]
    assert [s.bits for s in section.schemes("m.1.down_proj")] == [8, 8]
    first = section.schemes("m.0.down_proj")[0]
    assert first == Scheme(kind="group", bits=8, symmetric=False, group_size=32, mask=2.0)
    assert section.applies("m.1.q_proj") and not section.applies("lm_head")
    named = ActivationsSection.model_validate({"targets": ["down_proj", "lm_head"]})
    assert named.applies("m.1.down_proj") and named.applies("lm_head") and not named.applies("m.1.q_proj")


def test_auto_tries_what_the_format_carries() -> None:
    auto, grid = ActivationsSection.model_validate({"kind": "auto"}), IntGrid()
    assert {scheme.kind for scheme in auto.schemes("x")} == set(ACTIVATIONS) - {"tensor"}
    assert [str(s) for s in carried(auto, "x", grid, 128, "compressed-tensors")] == [
        "A8 token",
        "A8 group g128",
    ]
    assert [str(s) for s in carried(auto, "x", grid, 96, "compressed-tensors")] == ["A8 token"]
    static = ActivationsSection.model_validate({"kind": "auto", "dynamic": False})
    assert [(s.kind, s.symmetric) for s in static.schemes("x")] == [
        ("tensor", True),
        ("tensor", False),
        ("dual", True),
    ]
    assert auto.reads_text and static.reads_text and not ActivationsSection().reads_text

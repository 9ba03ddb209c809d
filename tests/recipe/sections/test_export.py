"""The export section: what a format cannot hold is said before anything is loaded."""

import shutil
from pathlib import Path

import pytest

from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.layers import read_shapes
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.recipe.recipe_text import GOOD, ROOT, TINY, bad_recipes, problems_with, refused_with

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "export format",
        ("output:", "export: {format: ggfu}\noutput:"),
        (),
        "r.yaml:20: export.format: got 'ggfu'; allowed: native, compressed-tensors",
    ),
    (
        "export of planes",
        ("lr_qat\n  rank: 8", "alpha_tuning"),
        ("quant.grid=binary", "export.format=compressed-tensors"),
        "export.format=compressed-tensors'",
    ),
    (
        "export of float offsets",
        ("lr_qat", "l4q\n  offset: float"),
        ("export.format=compressed-tensors",),
        "holds no float offset per group; l4q with this adapter.offset ships one",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


@pytest.mark.parametrize(
    "name, overrides, expected",
    [
        ("gpt2", [], "export.format: .* a Conv1D keeps its weight turned"),
        ("gpt_oss", [], "export.format: .*experts.0.* one tensor per expert"),
        ("mixtral", ["quant.symmetric=false"], "export.format: .* without their zero points"),
        ("llama", ["quant.embeddings=8"], "export.format: .* embeddings in full precision only"),
        (
            "mixtral",
            ["quant.overrides=[{match: '*.experts.*.down_proj', bits: 8}]"],
            "export.format: .* where all layers have one grid",
        ),
        ("mixtral", [], None),
        ("llama", ["quant.lm_head=8"], None),
    ],
)
def test_kinds_of_layers_meet_the_format_before_anything_is_loaded(
    name: str, overrides: list[str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit_ft.plan.plan import plan
    from tests.architectures import CONFIGS, checkpoint_of

    monkeypatch.chdir(ROOT)
    checkpoint = checkpoint_of(CONFIGS[name](), tmp_path / "model")
    changes = [
        f"model.path={tmp_path / 'model'}",
        "model.attention=eager",
        "quant.group_size=32",
        "eval.window=64",
        "data.sequence_len=64",
        "eval.generate=[]",
    ]
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "chat_template.jinja").write_text("x")
    recipe = ROOT / "recipes" / "quickstart.yaml"
    if expected is not None:
        with pytest.raises(RecipeError, match=expected):
            load_recipe(recipe, [*changes, *overrides, f"output={tmp_path / 'run'}"])
        changes.append("export.format=native")
    made = load_recipe(recipe, [*changes, *overrides, f"output={tmp_path / 'run'}"])
    counted = plan(made)
    assert counted is not None
    model, rows = quantize(checkpoint, made.quant, attention="eager")
    packed = sum(row.packed_bytes for row in rows.quantized)
    assert sum(row.base_bytes + row.residual_bytes for row in counted.rows) == packed
    parts = counted.parts
    rest = sum(p.numel() for p in model.parameters()) * 4
    others = [
        parts[name]
        for name in ("codes", "residual", "scales and zeros", "embeddings", "head", "norms and other")
    ]
    assert sum(others) - packed == pytest.approx(rest, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["gptq", "awq", "torchao"])
def test_a_packed_head_meets_the_format_tied_or_not(name: str, tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from tests.packed_tools import SIZE, tiny_checkpoint

    tiny_checkpoint(tmp_path / "model", LlamaConfig(**SIZE | {"vocab_size": 4096}, tie_word_embeddings=tied))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / file, tmp_path / "model" / file)
    text = (
        GOOD.replace(str(TINY), str(tmp_path / "model"))
        .replace("sequence_len: 256", "sequence_len: 64")
        .replace("group_size: 128", "group_size: 32")
    )
    assert ("lm_head.weight" in read_shapes(tmp_path / "model").tensors) != tied
    changes = (f"export={{format: {name}, verify: false}}", "adapter.method=lr_qat", "eval={window: 64}")
    assert [p for p in problems_with(text, changes) if "head" in p] == []
    problems = problems_with(text, (*changes, "quant.lm_head=8"))
    assert all("lm_head: " in p for p in problems) and "readers keep the head dense" in problems[-1]
    assert (
        f"quant.lm_head: got 8, and export.format is {name}: lm_head: {name} readers keep the head dense; "
        "quant.lm_head: null" in problems[-1]
    )


def test_a_tied_head_and_an_embedding_have_their_real_widths(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from tests.packed_tools import SIZE, tiny_checkpoint

    config = LlamaConfig(
        **(SIZE | dict(hidden_size=40, num_attention_heads=2, num_key_value_heads=2, head_dim=32)),
        tie_word_embeddings=True,
    )
    tiny_checkpoint(tmp_path / "model", config)
    text = GOOD.replace(str(TINY), str(tmp_path / "model")).replace("group_size: 128", "group_size: 32")
    changes = (
        "export={format: gguf, verify: false}",
        "quant.targets=['*.o_proj']",
        "quant.exclude=[]",
        "quant.lm_head=8",
    )
    assert any(
        "cannot hold lm_head" in p and "multiple of 32 inputs" in p or "40 inputs of lm_head" in p
        for p in problems_with(text, changes)
    )

"""What fits, what to change, what is refused: every figure that plan prints is the plan of that recipe."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lowbit_ft.cli import plan as cli_plan
from lowbit_ft.cli import refusal as cli_refusal
from lowbit_ft.cli.main import main
from lowbit_ft.model.config import read_config
from lowbit_ft.plan import fixes as plan_fixes
from lowbit_ft.plan.fixes import (
    Planner,
    candidates,
    changed,
    combination,
    fit,
    fixes,
    largest_batch,
    largest_length,
)
from lowbit_ft.plan.plan import Card, find_card, no_card, plan
from lowbit_ft.recipe.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
QUICK, SHAPES = RECIPES / "quickstart.yaml", ROOT / "tests" / "configs"
TINY = RECIPES / "assets" / "tiny-llama"
CONFIG = {  # recipe -> whose shapes
    "opt": "opt_1b3",
    "llama31": "llama31_8b",
    "llama2-13b": "llama2_13b",
    "smollm2": "smollm2_135m",
    "qwen25-14b": "qwen25_14b",
    "qwen25-32b": "qwen25_32b",
    "glm-130b": "glm_130b",
    "rtdetr": "rtdetr_r50vd",
    "dit-xl": "dit_xl_2_256",
    "sd3-medium": "sd3_medium",
    "speech-codec-500m": "../../recipes/assets/speech-codec-500m",
}
SHORT = ["eval.perplexity=false", "train.micro_batch_size=4", "data.sequence_len=256"]


def processes(path: Path) -> int:
    """Of how many processes the head of a recipe speaks."""
    found = re.search(r"--processes (\d+)", path.read_text(encoding="utf-8").partition("\nname:")[0])
    return int(found[1]) if found else 1


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    code = left.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The quickstart's, on a GPU that is not there."""
    monkeypatch.chdir(ROOT)
    return load_recipe(
        QUICK, [*SHORT, "train.gradient_accumulation_steps=2", "model.device=auto"], check=False
    )


def _card(gb: float) -> Card:
    return Card(int(gb * 1e9), "a small card", 89)


def _planner(recipe: Recipe, share: float) -> tuple[Planner, float]:
    """A card that holds this share of what the recipe needs beyond the CUDA context."""
    whole = plan(recipe, TINY, _card(1))
    assert whole is not None
    size = whole.card.context + share * (whole.total - whole.card.context)
    return Planner(recipe, TINY, _card(size / 1e9)), whole.total


def _typed(fix: plan_fixes.Fix) -> list[str]:
    """A fix as a user types it behind the recipe."""
    return [text for text in cli_refusal.override(fix).split("  ") if not text.startswith("--")]


def test_every_fix_saves_what_it_says(recipe: Recipe) -> None:
    planner, total = _planner(recipe, 0.5)
    now = planner()
    assert now is not None and not now.fits and now.total == total
    found = fixes(planner, now)
    keys = {key for fix in found for key in fix.changes}
    assert {
        "train.micro_batch_size",
        "train.gradient_checkpointing",
        "train.optimizer",
        "quant.residual_bits",
        "data.sequence_len",
    } <= keys
    order = [fix.quality for fix in found if "processes" not in fix.changes]
    assert order == sorted(order), "what costs only time comes first"
    for fix in found:
        typed = load_recipe(
            QUICK,
            [*SHORT, "train.gradient_accumulation_steps=2", "model.device=auto", *_typed(fix)],
            check=False,
        )
        made = plan(typed, TINY, planner.card, fix.changes.get("processes", 1))
        assert made is not None and fix.most > 0, fix
        for stage, saved in fix.saves.items():
            assert now.stages[stage] - made.stages[stage] == saved, (str(fix), stage)


@pytest.mark.parametrize(("bits", "narrower"), [(8, [6, 4, 3, 2]), (6, [4, 3, 2]), (4, [3, 2]), (2, [])])
def test_every_narrower_width_is_tried(recipe: Recipe, bits: int, narrower: list[int]) -> None:
    """Of 8 bits 6 and 4 come before the widths that cost more."""
    wide = recipe.model_copy(update={"quant": recipe.quant.model_copy(update={"bits": bits})})
    found = [changes["quant.bits"] for changes, _, _ in candidates(wide, True) if "quant.bits" in changes]
    assert found == narrower


def test_the_combination_fits_and_one_fix_less_does_not(recipe: Recipe) -> None:
    planner, _ = _planner(recipe, 0.2)
    now = planner()
    assert now is not None
    found = combination(planner, now, fixes(planner, now))
    assert found is not None and found[1].fits and len(found[0]) > 1
    for left in found[0]:
        keys = {key: value for fix in found[0] if fix is not left for key, value in fix.changes.items()}
        less = planner(keys)
        assert less is not None and not less.fits, str(left)


def test_nothing_helps_on_a_card_that_is_too_small(recipe: Recipe) -> None:
    planner = Planner(recipe, TINY, _card(0.4))
    with pytest.raises(ValueError, match="fits a small card"):
        fit(planner)


def test_the_largest_batch_and_length_are_the_largest(recipe: Recipe) -> None:
    planner, _ = _planner(recipe, 1.7)
    batch, length = largest_batch(planner), largest_length(planner)
    assert batch is not None and length is not None and batch > 4 and length > 256 and length % 128 == 0
    for key, value, step in (("train.micro_batch_size", batch, 1), ("data.sequence_len", length, 128)):
        fitting, over = (
            planner({key: value}),
            planner({key: max(value + step, int(value * 1.03) // step * step)}),
        )
        assert fitting is not None and fitting.stages["training"] <= planner.card.nbytes
        assert over is not None and over.stages["training"] > planner.card.nbytes
    assert largest_batch(Planner(recipe, TINY, _card(0.5))) is None
    assert largest_length(planner, positions=256) == 256, "no longer than the model has positions"


def test_fit_takes_the_most_residual_bits_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8B: 24 GB hold 4 bits; with less memory there are fewer, and the written recipe loads and fits."""
    monkeypatch.chdir(ROOT)
    big = load_recipe(RECIPES / "llama31-8b-w4-lr-qat.yaml", ["eval.kl=false"], check=False)
    bits = []
    for gb in (24.0, 11.0, 9.5):
        out = tmp_path / f"{gb}.yaml"
        made = cli_plan.write_fit(big, out, folder=SHAPES / "llama31_8b", memory_gb=gb)
        written = load_recipe(out, check=False)
        again = plan(written, SHAPES / "llama31_8b", find_card(written, gb))
        assert again is not None and again.fits and again.total == made.total
        assert written.quant.bits == 4 and written.data.sequence_len == 2048
        bits.append(written.quant.residual_bits)
        more = {2: 4, 1: 2, 0: 1}.get(bits[-1])
        if more is not None:
            worse = plan(
                changed(written, {"quant.residual_bits": more}) or written, SHAPES / "llama31_8b", again.card
            )
            assert worse is not None and not worse.fits
    assert bits[0] == 4 and bits == sorted(bits, reverse=True) and bits[-1] < 4
    assert not any((tmp_path / "x").parent.glob("*.tmp"))


def test_a_recipe_that_cannot_fit_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowbit_ft import pipeline

    monkeypatch.chdir(ROOT)
    started = []
    monkeypatch.setattr(pipeline, "run", lambda recipe: started.append("run"))
    monkeypatch.setattr(pipeline, "train", lambda recipe: started.append("train"))
    small = Card(840_000_000, "0.8 GB of RAM", 0)
    monkeypatch.setattr(cli_refusal, "find_card", lambda recipe, memory=None, in_use=False: small)
    for command in ("run", "train"):
        assert call(command, str(QUICK), f"output={tmp_path / 'run'}") == 2
        text = capsys.readouterr().err
        assert "quickstart needs 0." in text or "quickstart needs 1." in text
        assert (
            "0.8 GB of RAM has 0.84 GB" in text
            and "train.gradient_checkpointing: true saves" in text
            and "--anyway" in text
        )
        assert not started and not (tmp_path / "run").exists()
    for command in ("run", "train"):
        assert call(command, str(QUICK), "--anyway", f"output={tmp_path / 'run'}") == 0
    assert started == ["run", "train"]


def test_planning_never_stands_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(QUICK)
    assert cli_refusal.refusal(recipe) is None, "the quickstart runs on this machine"
    tiny = Card(1000, "nothing", 0)
    monkeypatch.setattr(cli_refusal, "find_card", lambda *_, **__: tiny)
    assert "nothing has 0.00 GB" in (cli_refusal.refusal(recipe) or "")
    made = plan(recipe, card=tiny)
    assert made is not None
    rough = replace(made, notes=["an estimate"])
    monkeypatch.setattr(cli_refusal, "plan", lambda *_: rough)
    assert cli_refusal.refusal(recipe) is not None, "what is certain is too much already"
    middle = Card(rough.certain + 1, "something", 0)
    monkeypatch.setattr(cli_refusal, "find_card", lambda *_, **__: middle)
    assert rough.certain < middle.nbytes < rough.total and cli_refusal.refusal(recipe) is None, (
        "an estimate refuses nobody"
    )

    def broken(*_: object) -> None:
        raise RuntimeError("plan has a mistake")

    monkeypatch.setattr(cli_refusal, "plan", broken)
    assert cli_refusal.refusal(recipe) is None
    assert cli_refusal.refusal(load_recipe(RECIPES / "llama31-8b-w4-lr-qat.yaml", check=False)) is None, (
        "nothing is known of its model"
    )


FOR_A_CARD = sorted(RECIPES.glob("*-*gb*.yaml"))
# Of a model that another command makes first: plan has no config.json before.
LATER = {RECIPES / f"{name}.yaml" for name in ("prune-once-for-all-2-task", "quickstart-ternary")}


@pytest.mark.parametrize(
    "path", sorted(set(RECIPES.glob("*.yaml")) - set(FOR_A_CARD) - LATER), ids=lambda path: path.stem
)
def test_plan_on_every_recipe(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    shape = next((folder for name, folder in CONFIG.items() if path.stem.startswith(name)), None)
    more = [] if shape is None else ["--config", str(SHAPES / shape)]
    more += ["--processes", str(processes(path))]
    assert call("plan", str(path), "--no-search", *more) == 0
    out = capsys.readouterr().out
    assert "fits:" in out and "NOT fit" not in out and "an estimate" not in out
    table = [line for line in out.splitlines() if line[:1] in tuple("┏┃┡│└")]
    assert len(table) > 3 and max(map(len, table)) <= 100, "tables keep to the width of the terminal"
    recipe = load_recipe(path, check=False)
    saved = recipe.train.gradient.backward
    assert ("and no backward" in out) != saved
    # of what is no chain of layers they are a part of its one
    config = {} if shape is None else read_config(SHAPES / shape)
    assert ("saved layer inputs" in out) == saved or not recipe.task.walks(config)
    for word in (
        "codes",
        "adapters",
        "optimizer states",
        "one layer",
        "loss",
        "disk:",
        "RAM:",
    ):
        assert word in out, word


def test_plan_says_what_is_missing_and_takes_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    big = str(RECIPES / "llama31-8b-w4-lr-qat.yaml")
    assert call("plan", big) == 2
    assert "not on this disk" in (out := capsys.readouterr().out) and "--config FOLDER" in out
    assert call("plan", big, "--fit", str(tmp_path / "x.yaml")) == 2
    assert "--config FOLDER" in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()
    assert call("plan", big, "--config", str(tmp_path)) == 2
    assert "config.json" in capsys.readouterr().err
    # a folder with a config.json and no weights: run refuses it, plan does not need them
    alone = tmp_path / "model"
    alone.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, alone / name)
    assert call("run", str(QUICK), f"model.path={alone}", f"output={tmp_path / 'run'}") == 2
    assert "no model.safetensors" in capsys.readouterr().err
    assert (
        call(
            "plan",
            str(QUICK),
            f"model.path={alone}",
            f"output={tmp_path / 'run'}",
            "--no-search",
            "--tokens-per-second",
            "1000",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "fits:" in out and "150 steps of 2,048 tokens" in out and "about 5 min at 1,000 tokens/s" in out


def test_what_is_not_planned_is_said(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    traced = changed(recipe, {"export.format": "onnx"})
    for one, said in ((recipe, False), (traced, True)):
        assert one is not None
        cli_plan.show_plan(one, folder=TINY, memory_gb=24, search=False)
        assert ("not in it: torch.onnx's trace" in capsys.readouterr().out) is said


def test_a_small_card_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    big = str(RECIPES / "llama31-8b-w4-lr-qat.yaml")
    assert call("plan", big, "--no-search", "--memory", "11", "--config", str(SHAPES / "llama31_8b")) == 0
    out = capsys.readouterr().out
    assert (
        "does NOT fit" in out
        and "quant.residual_bits: 1" in out
        and "2.62 GB" in out
        and "this fits (" in out
    )
    line = next(line for line in out.splitlines() if line.startswith("this fits"))
    changes = [word for word in line.split(":  ", 1)[1].split("  ") if "=" in word]
    again = plan(
        load_recipe(big, changes, check=False),
        SHAPES / "llama31_8b",
        replace(no_card(), nbytes=11_000_000_000),
    )
    assert again is not None and again.fits


def test_a_config_that_is_no_model_is_an_error_for_people(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "llama31-8b-w4-lr-qat.yaml", check=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    with pytest.raises(ValueError, match=r"config\.json: cannot be used"):
        plan(recipe, tmp_path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_name_what_plan_says(path: Path) -> None:
    """The comment at the head of those for a GPU, without the CUDA context."""
    said = re.findall(
        r"([\d.]+) GB",
        (re.search(r"not counted\)(:[^.]*(?:\.\d[^.]*)*)\.\n", path.read_text(encoding="utf-8")) or [""])[0],
    )
    if load_recipe(path, check=False).model.device == "cpu":
        assert not said
        return
    shape = next(folder for name, folder in CONFIG.items() if path.stem.startswith(name))
    for number, changes in zip(said, ([], ["train.gradient_checkpointing=true"]), strict=False):
        made = plan(load_recipe(path, changes, check=False), SHAPES / shape, no_card(), processes(path))
        assert made is not None and f"{(made.stages['training'] - made.parts['context']) / 1e9:.1f}" == number
    assert said


@pytest.mark.parametrize("path", FOR_A_CARD, ids=lambda path: path.stem)
def test_a_recipe_for_a_card_fits_it(path: Path) -> None:
    gb = int(re.findall(r"-(\d+)gb", path.stem)[0])
    shape = next(folder for name, folder in CONFIG.items() if path.stem.startswith(name))
    recipe = load_recipe(path, check=False)
    made = plan(recipe, SHAPES / shape, find_card(recipe, gb))
    assert made is not None and made.fits, made and made.stages
    assert f"one {gb} GB GPU" in path.read_text(encoding="utf-8").partition("\n")[0]


def test_the_page_about_memory_has_todays_predictions() -> None:
    from benchmarks import plan_targets

    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert plan_targets.render(text) == text, "run: python -m benchmarks.plan_targets --write"
    kept = json.loads((ROOT / "benchmarks" / "results" / "plan_error.json").read_text(encoding="utf-8"))
    assert len({row["shape"] for row in kept["rows"]}) == 5 and all(
        abs(row["error_percent"]) <= kept["limit_percent"] for row in kept["rows"]
    )

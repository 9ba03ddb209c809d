"""`lowbit-ft init` writes a recipe that loads."""

import shutil
from pathlib import Path

import pytest

from lowbit_ft.cli import init_fit
from lowbit_ft.cli.init import write_recipe
from lowbit_ft.cli.main import main
from lowbit_ft.plan.fixes import Planner, candidates, changed
from lowbit_ft.plan.plan import Plan, find_card, plan
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from tests.recipe.recipe_text import (
    CHAT,
    TINY,
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_init_writes_a_recipe_that_loads():
    write_recipe(str(TINY), Path("new.yaml"))
    recipe = load_recipe("new.yaml", [f"data.train.path={CHAT}"])
    assert recipe.quant.group_size == 128 and recipe.data.sequence_len == 1024
    assert recipe.data.train.format == "chat" and recipe.model.path == str(TINY)
    before = Path("new.yaml").read_bytes()
    with pytest.raises(ValueError, match="exists; nothing was written"):
        write_recipe(str(TINY), Path("new.yaml"))
    assert Path("new.yaml").read_bytes() == before
    write_recipe("some-org/3-B", Path("new.yaml"), force=True)
    assert load_recipe("new.yaml", [f"data.train.path={CHAT}"]).model.path == "some-org/3-B"
    with pytest.raises(ValueError, match="no such folder"):
        write_recipe("./nothing", Path("other.yaml"))
    Path("run").mkdir()  # of a run: "not on this disk" was said of it
    with pytest.raises(ValueError, match="'run', which has no config.json; give a checkpoint folder"):
        write_recipe("run", Path("other.yaml"))
    assert sorted(p.name for p in Path().iterdir()) == ["new.yaml", "run"]


@pytest.mark.parametrize(
    ("asset", "task"),
    [
        ("tiny-rtdetr", "object_detection"),
        ("tiny-dit", "image_generation"),
        ("tiny-bert", "masked_lm"),
        ("speech-codec", "speech_tokens"),
    ],
)
def test_init_of_what_writes_no_text_names_its_task(asset: str, task: str) -> None:
    with pytest.raises(ValueError, match=f"set task: {task}"):
        write_recipe(str(TINY.parent / asset), Path("new.yaml"))
    assert not Path("new.yaml").exists()
    write_recipe(str(TINY), Path("plain.yaml"))
    with pytest.raises(ValueError, match=f"set task: {task}"):
        load_recipe("plain.yaml", [f"model.path={TINY.parent / asset}", f"data.train.path={CHAT}"])


def test_init_of_an_odd_path_stays_yaml(tmp_path):
    folder = tmp_path / "my: model #1"
    shutil.copytree(TINY, folder)
    write_recipe(str(folder), Path("odd.yaml"))
    assert load_recipe("odd.yaml", [f"data.train.path={CHAT}"]).model.path == str(folder)


def test_init_for_a_card_writes_what_plan_says_fits() -> None:
    write_recipe(str(TINY), Path("card.yaml"), memory_gb=2)
    text = Path("card.yaml").read_text("utf-8")
    recipe = load_recipe("card.yaml", [f"data.train.path={CHAT}"])
    assert recipe.model.dtype == "bfloat16" and recipe.train.gradient_checkpointing
    made = plan(recipe, card=find_card(recipe, 2))
    assert made is not None and made.fits
    assert f"# Fitted to 2 GB by `lowbit-ft plan`: {made.total / 1e9:.2f} GB at the peak" in text
    assert "  keep_codes: true                   # 2 GB: there is room" in text and recipe.train.keep_codes


def test_every_fix_has_its_place_in_the_recipe_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(str(TINY), Path("plain.yaml"))
    plain = load_recipe(
        "plain.yaml", ["model.device=auto", "train.gradient_checkpointing=false"], check=False
    )
    found = [c for c in candidates(plain, on_gpu=True) if "processes" not in c[0]]
    keys = {key for changes, _, _ in found for key in changes}
    assert {"train.offload", "quant.lm_head", "data.sequence_len", "eval.kl"} <= keys
    for changes, cost, _ in found:
        text = Path("plain.yaml").read_text("utf-8")
        for key, value in changes.items():
            text = init_fit.set_key(text, key, value, cost)
            assert cost in text
        Path("set.yaml").write_text(text, "utf-8")
        recipe = load_recipe("set.yaml", check=False)
        for key, value in changes.items():
            section, _, name = key.partition(".")
            assert getattr(getattr(recipe, section), name) == value, key

    def small(planner: Planner) -> tuple[Recipe, Plan]:
        chosen, now = changed(planner.recipe, {"quant.residual_bits": 1, "eval.kl": False}), planner()
        assert chosen is not None and now is not None
        return chosen, now

    monkeypatch.setattr(init_fit, "fit", small)
    write_recipe(str(TINY), Path("small.yaml"), memory_gb=1.5)
    text = Path("small.yaml").read_text("utf-8")
    assert "  residual_bits: 1                   # 1.5 GB: of the rounding error" in text
    assert "  kl: false                          # 1.5 GB: no KL to the full-precision model" in text


def test_init_for_a_card_needs_the_model_s_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no network here")

    monkeypatch.setattr(
        "huggingface_hub.get_hf_file_metadata", offline
    )  # once, before a download's six times
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("tried again"))
    with pytest.raises(ValueError, match="no network here.*--config FOLDER"):
        write_recipe("some-org/3-B", Path("hub.yaml"), memory_gb=8)
    monkeypatch.setattr(init_fit, "fit", lambda planner: (planner.recipe, planner()))
    write_recipe("some-org/3-B", Path("hub.yaml"), memory_gb=8, config=TINY)
    assert load_recipe("hub.yaml", check=False).model.path == "some-org/3-B"

    def nothing(*_: object) -> None:
        raise ValueError("no fix found")

    monkeypatch.setattr(init_fit, "fit", nothing)
    with pytest.raises(ValueError, match="no fix found"):
        write_recipe(str(TINY), Path("none.yaml"), memory_gb=0.7)
    with pytest.raises(ValueError, match="--memory GB; give both"):
        write_recipe(str(TINY), Path("none.yaml"), config=TINY)
    assert not Path("none.yaml").exists()


def test_memory_without_end_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["init", str(TINY), "--memory", "inf"])
    assert left.value.code == 2 and "--memory" in capsys.readouterr().err

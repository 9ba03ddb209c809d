"""The command line: exit codes, where messages go, and that each command calls its stage."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lowbit_ft
from lowbit_ft.cli import main as cli
from lowbit_ft.cli.plan import show_plan
from lowbit_ft.export import EXPORTERS
from lowbit_ft.plan.plan import plan
from lowbit_ft.plan.stages import optimizer_bytes
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.rundir import RunDir
from tests.recipe.recipe_text import GOOD

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "recipes" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the shipped recipes name their assets from here
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def calls(monkeypatch):
    """A pipeline that only notes what it was asked for."""
    made = []
    fake = types.ModuleType("lowbit_ft.pipeline")
    for name in ("run", "quantize", "train", "merge", "export", "push", "verify", "evaluate", "report"):
        setattr(fake, name, lambda *args, _name=name: made.append((_name, *args)))
    monkeypatch.setattr("lowbit_ft.cli.serve.serve", lambda *args: made.append(("serve", *args)))
    fake.generate = lambda *args: made.append(("generate", *args)) or "an answer"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lowbit_ft.pipeline", fake)
    monkeypatch.setattr(lowbit_ft, "pipeline", fake, raising=False)
    return made


def call(*arguments: str) -> int:
    """Exit code of one command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return int(caught.value.code or 0)


@pytest.mark.parametrize("command", ["run", "quantize", "train"])
def test_stage_commands_get_the_checked_recipe(calls, command, tmp_path):
    assert call(command, QUICK, "train.max_steps=3", f"output={tmp_path / 'run'}") == 0
    ((name, recipe),) = calls
    assert name == command and recipe.train.max_steps == 3 and recipe.name == "quickstart"


def test_folder_commands(calls, tmp_path):
    folder = str(tmp_path)
    for command in ("merge", "verify", "eval", "report"):
        assert call(command, folder) == 0
    assert call("export", folder) == 0 and call("export", folder, "--format", "native") == 0
    assert call("export", folder, "-f", "mlx", "-o", "out", "--base", "base") == 0
    assert call("push", folder, "org/name") == 0 and call("push", folder, "org/name", "--public") == 0
    assert calls == [
        ("merge", tmp_path),
        ("verify", tmp_path),
        ("evaluate", tmp_path, [], [], None),
        ("report", tmp_path),
        ("export", tmp_path, None, None, None),
        ("export", tmp_path, "native", None, None),
        ("export", tmp_path, "mlx", Path("out"), Path("base")),
        ("push", tmp_path, "org/name", False),
        ("push", tmp_path, "org/name", True),
    ]


def test_generate_prints_the_answer(calls, tmp_path, capsys):
    assert call("generate", str(tmp_path), "hello", "-n", "7") == 0
    assert calls == [("generate", tmp_path, "hello", 7, "auto")] and capsys.readouterr().out == "an answer\n"


def test_eval_takes_tasks_and_stages(calls, tmp_path):
    assert (
        call("eval", str(tmp_path), "-t", "arc_easy", "--task", "mine.yaml", "-s", "base", "--limit", "9")
        == 0
    )
    assert calls == [("evaluate", tmp_path, ["arc_easy", "mine.yaml"], ["base"], 9)]
    assert call("eval", str(tmp_path), "--limit", "0") == 2 and len(calls) == 1


def test_serve_hands_on_the_options_of_transformers(calls, tmp_path):
    assert call("serve", str(tmp_path), "--port", "8123", "--enable-cors") == 0
    assert calls == [("serve", tmp_path, ["--port", "8123", "--enable-cors"])]


def test_user_errors_are_one_message_on_stderr(calls, tmp_path, capsys):
    assert call("run", QUICK, "train.stpes=3", "quant.bits=5", "quant.group_size=512") == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert "override 'train.stpes=3': train.stpes: unknown key" in err and "quant.bits: got 5" in err
    assert "allowed: max_steps" not in err, "one name is near, thirty are not listed"
    assert "quant.group_size: got 512; allowed: 32, 64, 128, 256, -1; the nearest is 256" in err
    assert call("run", "no-such.yaml") == 2
    assert "error: no recipe at no-such.yaml" in capsys.readouterr().err
    assert call("merge", str(tmp_path / "nothing")) == 2 and "no folder at" in capsys.readouterr().err
    assert call("merge", QUICK) == 2 and "a file; give a folder" in capsys.readouterr().err
    assert (
        call("export") == 2 and call("nonsense") == 2 and call("generate", str(tmp_path), "x", "-n", "0") == 2
    )
    assert calls == []


def test_an_error_begins_with_its_first_problem(calls, tmp_path, capsys):
    good, bad = Path(QUICK).read_text(), tmp_path / "bad.yaml"
    line = good[: good.index("  bits: 4")].count("\n") + 1

    bad.write_text(good.replace("  bits: 4", "  bits: 5"))
    assert call("run", str(bad)) == 2
    err = capsys.readouterr().err
    assert err == f"error: {bad}:{line}: quant.bits: got 5; allowed: 2, 3, 4, 6, 8; the nearest is 4\n"

    bad.write_text(good.replace("  bits: 4", "  bits: 5").replace("name: quickstart", "name: a/b"))
    assert call("run", str(bad)) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {bad}:11: name: got 'a/b'; allowed: ")
    assert others == [f"       {bad}:{line}: quant.bits: got 5; allowed: 2, 3, 4, 6, 8; the nearest is 4"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(bad)
    assert str(caught.value).startswith(f"{bad}:11: name: ") and calls == []


def test_debug_shows_the_traceback(calls):
    with pytest.raises(ValueError, match="unknown key"):
        cli.main(["--debug", "run", QUICK, "train.stpes=3"])
    with pytest.raises(FileNotFoundError):
        cli.main(["run", "no-such.yaml", "--debug"])


def test_a_bug_is_not_called_a_user_error(calls, monkeypatch):
    def broken(recipe):
        raise AssertionError("ours")

    monkeypatch.setattr(sys.modules["lowbit_ft.pipeline"], "run", broken)
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["run", QUICK])


def test_ctrl_c_exits_130_and_says_what_is_kept(calls, monkeypatch, capsys):
    def stop(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["lowbit_ft.pipeline"], "run", stop)
    assert call("run", QUICK) == 130
    assert "stopped; what was finished is kept, and the same command goes on" in capsys.readouterr().err


def test_plan_shows_layers_and_memory(capsys):
    assert call("plan", QUICK, "quant.exclude=[lm_head, o_proj]") == 0
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in out and "256 x 768" in out and "W4 g128 sym" in out
    assert "skipped: excluded by 'o_proj'" in out and "total" in out
    assert call("plan", QUICK, "model.path=some-org/some-model") == 2
    out, err = capsys.readouterr()
    assert "not on this disk" in out and "give --config FOLDER" in err


def test_plan_reads_the_rows_and_compares_the_run_that_is_there(calls, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lowbit_ft.cli.plan.show_plan", lambda *args, **options: "a plan")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    keys = ["plan", QUICK, f"output={out}", f"data.train.path={rows}", "train.max_steps=3", "--no-search"]

    rows.write_text(f"{good}\n" * 3)
    assert call(*keys) == 0
    out_, err = capsys.readouterr()
    assert f"3 in {rows}, seen at least 8.0 times" in out_ and "continued" not in err
    rows.write_text(f"{good}\n{good[:-2]}\n")
    assert call(*keys) == 2
    assert f"error: data.train: {rows}:2: invalid JSON" in capsys.readouterr().err
    rows.write_text(json.dumps({"prompt": "a", "response": "b"}))
    assert call(*keys) == 2
    assert "format: completion, which needs 'completion' too" in capsys.readouterr().err

    # A start that failed finished nothing; then a stage did; then a run of another recipe trained.
    rows.write_text(f"{good}\n")
    run = RunDir.start(load_recipe(QUICK, keys[2:5]))
    run.close()
    assert call(*keys) == 0 and "holds" not in capsys.readouterr().err
    run.write_json("stages.json", [{"stage": "quantize", "seconds": 1.0, "peak_memory_gb": 0.1}])
    assert call(*keys) == 0 and "continued (quantize finished there)" in capsys.readouterr().err
    (out / "adapter").mkdir()
    for command in ("plan", "run"):
        assert call(command, *keys[1:5], "quant.group_size=64") == 2
        err = capsys.readouterr().err
        assert "holds a run with another recipe; these keys differ: quant.group_size" in err
        assert "continued" not in err and calls == []


def test_plan_counts_exactly():
    made = plan(load_recipe(QUICK))
    assert made is not None
    weights = 4 * (3 * 256 * 768 + 2 * 256 * 256 + 2 * 128 * 256)
    groups = weights // 128
    p = made.parts
    assert made.base == p["codes"] + p["scales and zeros"] == weights // 2 + 2 * groups
    assert p["residual"] == weights // 2
    low_rank = 16 * 4 * (3 * (256 + 768) + 2 * (256 + 256) + 2 * (128 + 256))
    assert made.trainable == low_rank + groups
    rotary = 2 * 4 * 32
    assert (
        p["embeddings"] == 4 * 4096 * 256 and p["head"] == 0 and p["norms and other"] == 4 * 9 * 256 + rotary
    )
    assert p["optimizer states"] == 8 * made.trainable + 4 * 3 * 28
    small = plan(load_recipe(QUICK, ["train.gradient_checkpointing=true", "train.optimizer=adamw8bit"]))
    assert small is not None and small.stages["training"] < made.stages["training"]
    assert (
        optimizer_bytes("adamw8bit") * made.trainable < small.parts["optimizer states"] < 3 * made.trainable
    )


def test_plan_of_planes():
    overrides = ["quant.grid=binary", "quant.calibrate=greedy", "quant.bits=3", "export.format=native"]
    first, every = (
        plan(load_recipe(QUICK, [*overrides, f"adapter={{method: alpha_tuning, planes: {planes}}}"]))
        for planes in ("first", "all")
    )
    assert first is not None and every is not None and every.trainable == 3 * first.trainable
    assert first.parts["residual"] == 0


def test_optimizer_bytes():
    expected = {"adamw": 8, "paged_adamw8bit": 2, "lion": 4, "lion8bit": 1, "ademamix": 12}
    assert {name: optimizer_bytes(name) for name in expected} == expected


def test_schema_is_json(capsys):
    assert call("schema") == 0
    assert "adapter" in json.loads(capsys.readouterr().out)["properties"]


def test_init(tmp_path, capsys):
    target = tmp_path / "deep" / "new.yaml"
    model = str(ROOT / "recipes" / "assets" / "tiny-llama")
    assert call("init", model, "-o", str(target)) == 0 and target.is_file()
    assert call("init", model, "-o", str(target)) == 2
    assert "exists; nothing was written" in capsys.readouterr().err
    assert call("init", model, "-o", str(target), "--force") == 0


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lowbit_ft", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "quantize" in done.stdout, done.stderr


def test_plan_does_not_print_keys_that_are_unset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(GOOD)
    monkeypatch.delenv("COLUMNS")  # in a pipe the tables are not cut at 80 columns
    show_plan(load_recipe(recipe))
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith(" adapter")]
    assert line.startswith(" adapter  lr_qat, rank 8") and "None" not in line and "pattern" not in line
    (row,) = [line for line in lines if "mlp.down_proj" in line]
    assert "256 x 768" in row and "W4 g128 sym" in row and row.rstrip().endswith("│")


def test_help_names_every_format(capsys):
    assert sorted(cli.FORMATS.replace(" or ", ", ").split(", ")) == sorted(EXPORTERS)
    assert call("plan", "--help") == 0 and "<=x<=" not in capsys.readouterr().out
    assert call("plan", QUICK, "--memory", "nan") == 2 and "got nan; allowed: 0.1" in capsys.readouterr().err

"""lm-eval on every stage: offline from local files, the trained numbers equal to the shipped ones, and what
is refused beforehand.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_ft import pipeline
from lowbit_ft.evaluate.perplexity import evaluate
from lowbit_ft.evaluate.tasks import (
    INSTALL,
    TaskRow,
    load_tasks,
    merged_rows,
    run_tasks,
    table,
    task_problems,
)
from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.writer import write_model
from lowbit_ft.model import linear
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.load import load_tokenizer
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.packed_tools import int_grid, packed_model, random_weights

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lowbit-ft[eval]'")

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "recipes" / "assets"
SHIPPED_TASKS = [
    str(ASSETS / "tasks" / "docstring_choice.yaml"),
    str(ASSETS / "tasks" / "source_perplexity.yaml"),
]
CHOICE = """task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PERPLEXITY = """task: perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"somebody wants the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    """Two small tasks: their YAML files, each with its rows beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "question": f"def f{i}(x):\n    return",
            "choices": [" x", " banana", " None", " import"],
            "label": 0,
        }
        for i in range(6)
    ]
    texts = [
        {"text": line["text"][:300]}
        for line in map(json.loads, (ASSETS / "text" / "valid.jsonl").read_text().splitlines()[:3])
    ]
    for name, yaml, content in (("choice", CHOICE, rows), ("text", PERPLEXITY, texts)):
        (folder / f"{name}.yaml").write_text(yaml)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return [str(folder / "choice.yaml"), str(folder / "text.yaml")]


def recipe(output: Path, tasks: list[str], *overrides: str) -> Any:
    quick = [
        "train.max_steps=6",
        "train.micro_batch_size=2",
        "train.learning_rate=0.02",
        "train.eval_every=null",
        "train.keep_best=false",
        "data.train.limit=60",
        "data.valid.limit=4",
        "data.sequence_len=128",
        "eval.windows=2",
        "eval.window=64",
        "eval.generate=[]",
    ]
    return load_recipe(
        "recipes/quickstart.yaml", [*quick, f"eval.tasks={json.dumps(tasks)}", f"output={output}", *overrides]
    )


def values(run: Path) -> dict[str, dict[tuple[str, str], float]]:
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in json.loads((run / "tasks.json").read_text())["rows"]:
        found.setdefault(row["stage"], {})[row["task"], row["metric"]] = row["value"]
    return found


def test_a_run_measures_its_tasks_on_every_stage(
    tmp_path: Path, tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    folder = pipeline.run(recipe(out, tasks, "eval.task_limit=4"))
    found = values(out)
    assert list(found) == ["base", "quantized", "trained", "exported"]
    assert all(set(row) == {("choice", "acc"), ("perplexity", "byte_perplexity")} for row in found.values())
    assert found["trained"] == found["exported"], "what was trained is what ships"
    perplexities = [row["perplexity", "byte_perplexity"] for row in found.values()]
    assert len(set(perplexities)) == 3 and all(1 < p < 20 for p in perplexities)
    rows = json.loads((out / "tasks.json").read_text())["rows"]
    assert {row["samples"] for row in rows if row["task"] == "choice"} == {4}
    assert all((row["stderr"] is not None) == (row["metric"] == "acc") for row in rows)
    for shipped in (folder, out / "merged"):
        card = (shipped / "README.md").read_text()
        assert (
            "| lm-eval task | metric | base | quantized | trained | exported |" in card
            and "| trained |" in card
        )
    assert "byte_perplexity" in (out / "report.html").read_text()
    assert "tasks" in [row["stage"] for row in json.loads((out / "stages.json").read_text())]
    assert f"{perplexities[2]:>14.6g}{perplexities[2]:>14.6g}" in capsys.readouterr().out

    pipeline.evaluate(out, tasks[1:], ["merged"])  # one task, one stage, all its rows; the others stay
    again = values(out)
    assert list(again) == ["base", "quantized", "trained", "merged", "exported"]
    assert again["merged"] == {
        ("perplexity", "byte_perplexity"): again["trained"]["perplexity", "byte_perplexity"]
    }
    assert {stage: row for stage, row in again.items() if stage != "merged"} == found
    pipeline.evaluate(folder, tasks, limit=4)  # the folder alone, as a stranger has it
    printed = capsys.readouterr().out
    assert "exported" in printed and f"{found['exported']['perplexity', 'byte_perplexity']:.6g}" in printed
    with pytest.raises(ValueError, match="stage: got 'best'; allowed are base, quantized"):
        pipeline.evaluate(out, tasks, ["best"])
    with pytest.raises(ValueError, match="give --task"):
        pipeline.evaluate(folder)
    with pytest.raises(ValueError, match="config.json: missing"):
        pipeline.evaluate(tmp_path, tasks)
    (out / "exported").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="has no exported/ yet"):
        pipeline.evaluate(out, tasks, ["exported"])


def test_stages_without_tasks(tmp_path: Path) -> None:
    out = tmp_path / "run"
    pipeline.quantize(recipe(out, []))
    with pytest.raises(ValueError, match="no task to measure"):
        pipeline.evaluate(out, stages=["base"])


def test_the_tasks_of_the_repository_are_whole() -> None:
    assert task_problems(SHIPPED_TASKS) == []
    loaded = load_tasks(SHIPPED_TASKS)["tasks"]
    assert {name: len(list(task.test_docs())) for name, task in loaded.items()} == {
        "docstring_choice": 48,
        "source_perplexity": 45,
    }
    labels = [row["label"] for row in loaded["docstring_choice"].test_docs()]
    assert all(labels.count(i) > 5 for i in range(4)), "always answering one letter must not look clever"


@pytest.fixture(scope="module")
def packed() -> Any:
    checkpoint = Checkpoint.open(ASSETS / "tiny-llama")
    return packed_model(checkpoint, random_weights(checkpoint.empty_model(), int_grid())), load_tokenizer(
        checkpoint
    )


def test_measuring_never_takes_the_decode_path(
    packed: Any, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question of two tokens and a window of eight would go through the int4 kernel in a packed model, and
    not in a dense one.
    """
    model, tokenizer = packed
    Path(tasks[0]).with_name("choice.jsonl").write_text(
        json.dumps({"question": "x", "choices": [" y", " z"], "label": 0}) + "\n"
    )
    window = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}

    def refuse(*_: Any) -> None:
        raise AssertionError("the int4 kernel was used")

    monkeypatch.setattr(linear, "int4_linear", refuse)
    with torch.no_grad(), pytest.raises(AssertionError, match="int4"):
        model(window["input_ids"])
    assert run_tasks(model, tokenizer, load_tasks(tasks[:1]), "trained")[0].metric == "acc"
    assert evaluate(model, [window], "trained").tokens == 2
    assert all(layer.fast_decode for _, layer in linear_layers(model))


def linear_layers(model: Any) -> list[tuple[str, linear.PackedLinear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, linear.PackedLinear)]


def test_packed_and_dense_give_the_same_numbers(packed: Any, tasks: list[str], tmp_path: Path) -> None:
    """In bfloat16: the packed model, and its compressed-tensors export, which its reader makes dense."""
    model, tokenizer = packed
    checkpoint = Checkpoint.open(ASSETS / "tiny-llama")
    write_model(
        tmp_path / "out",
        checkpoint,
        random_weights(checkpoint.empty_model(), int_grid()),
        EXPORTERS["compressed-tensors"],
    )
    loaded = load_tasks(tasks)
    mine = run_tasks(model, tokenizer, loaded, "trained")
    dense = run_tasks(load_exported(tmp_path / "out", dtype=torch.bfloat16), tokenizer, loaded, "trained")
    assert mine == dense and len(mine) == 2


def test_a_group_is_one_row(packed: Any, tasks: list[str]) -> None:
    """Groups are for names that lm-eval knows; here it is told two of ours."""
    from lm_eval.tasks import TaskManager

    folder = Path(tasks[0]).parent
    for name in ("first", "second"):
        own = CHOICE.replace("choice.jsonl", str(folder / "choice.jsonl")).replace(
            "task: choice", f"task: {name}"
        )
        (folder / f"{name}.yaml").write_text(own + "num_fewshot: 0\n")
    aggregate = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]"
    (folder / "pair.yaml").write_text(f"group: pair\ntask: [first, second]\n{aggregate}\n")
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(["pair"])
    rows = run_tasks(*packed, loaded, "base", limit=3)
    assert [(row.task, row.metric) for row in rows] == [("pair", "acc")] and rows[0].stderr is not None
    assert "of a group, give the tasks" in task_problems([str(folder / "pair.yaml")])[0][1]


def test_rows_measured_again_replace_the_old_ones() -> None:
    def row(stage: str, task: str, value: float) -> TaskRow:
        return TaskRow(stage, task, "acc", value, None, True, 4)

    before = [row("base", "a", 0.1), row("trained", "a", 0.2), row("base", "b", 0.3)]
    after = merged_rows(before, [row("base", "a", 0.9)])
    assert [(r.stage, r.task, r.value) for r in after] == [
        ("base", "b", 0.3),
        ("base", "a", 0.9),
        ("trained", "a", 0.2),
    ]
    lines = table(before).splitlines()
    assert (
        lines[0].split() == ["base", "trained"]
        and lines[1].split() == ["a", "acc", "0.1", "0.2"]
        and lines[2].split() == ["b", "acc", "0.3"]
    )


def test_rows_over_another_number_of_samples_are_another_line() -> None:
    """`lowbit-ft eval --limit 2` on one stage must not stand beside a full measurement of another as if they
    compared.
    """
    rows = [
        TaskRow("base", "a", "acc", 0.1, None, True, 48),
        TaskRow("trained", "a", "acc", 0.5, None, True, 2),
    ]
    rows.append(TaskRow("base", "b", "acc", 0.3, None, True, 48))
    text = [line.split() for line in table(rows).splitlines()]
    assert text[1:] == [
        ["a", "acc", "(48", "rows)", "0.1"],
        ["a", "acc", "(2", "rows)", "0.5"],
        ["b", "acc", "0.3"],
    ]


# -------------------------------------------------------------------------- refused when the recipe is loaded


def refused(tmp_path: Path, tasks: list[str]) -> str:
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path / "run", tasks)
    assert not (tmp_path / "run").exists()
    return str(error.value)


def test_files_that_are_no_tasks(tmp_path: Path, tasks: list[str]) -> None:
    folder = Path(tasks[0]).parent
    (folder / "broken.yaml").write_text("task: [")
    (folder / "other.yaml").write_text("name: quickstart")
    (folder / "twin.yaml").write_text(CHOICE)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (folder / "text.jsonl").unlink()
    (folder / "round.yaml").write_text("task: round\nx: &a [*a]\n")
    (folder / "number.yaml").write_text(
        CHOICE.replace("choice.jsonl", "3").replace("task: choice", "task: number")
    )
    files = ("broken", "other", "twin", "bytes", "missing", "round", "number")
    names = [*tasks, *(str(folder / f"{name}.yaml") for name in files)]
    text = refused(tmp_path, names)
    for i, message in {
        1: "its data file 'text.jsonl' is neither here nor beside",
        2: "cannot be read as a task",
        3: "needs `task: name`",
        4: "a second task named 'choice' (eval.tasks.0 is the first); remove one",
        5: "cannot be read as a task",
        7: "recursion",
        8: "its data_files hold 3; needs names of files",
        6: "there is no such file; give a task file (YAML) or a name of lm-eval",
    }.items():
        assert any(
            f"eval.tasks.{i}: got {names[i]!r}" in line and message in line for line in text.splitlines()
        ), (i, text)
    assert "eval.tasks.0: got" not in text
    with pytest.raises(ValueError, match="cannot be read as a task"):
        load_tasks([names[2]])


def test_a_task_beside_the_recipe_is_found(
    tmp_path: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "recipes" / "quickstart.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    made = load_recipe(
        tmp_path / "mine.yaml", ["eval.tasks=[tasks/choice.yaml]", f"output={tmp_path / 'run'}"]
    )
    assert made.eval.tasks == [str(tmp_path / "tasks" / "choice.yaml")]


@pytest.mark.slow
def test_a_name_lm_eval_does_not_know(tmp_path: Path) -> None:
    text = refused(tmp_path, ["hellaswagg", "arc_easy"])
    assert "eval.tasks.0: got 'hellaswagg', which lm-eval" in text and "did you mean 'hellaswag'" in text
    assert "eval.tasks.1: got" not in text


def test_an_mlx_export_is_refused_before_anything_is_measured(tmp_path: Path, tasks: list[str]) -> None:
    with pytest.raises(
        RecipeError,
        match="eval.tasks: lm-eval cannot measure an export.format mlx; set export.format: native, which "
        "measures merged/",
    ):
        recipe(tmp_path / "run", tasks, "export.format=mlx", "export.verify=false")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"quantization_config": {"quant_method": "mlx"}}')
    with pytest.raises(ValueError, match="cannot measure an mlx folder; measure merged/"):
        pipeline.evaluate(tmp_path / "m", tasks)


def test_without_lm_eval(tmp_path: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, package=None: None if name == "lm_eval" else object()
    )
    assert f"eval.tasks.0: got {tasks[0]!r}, but {INSTALL}" in refused(tmp_path, tasks)
    with pytest.raises(ValueError, match=r"run pip install 'lowbit-ft\[eval\]'"):
        load_tasks(tasks)


def test_a_run_without_tasks_needs_no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it is an error
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert load_tasks([]) == {}


def test_data_that_cannot_be_read(tasks: list[str]) -> None:
    Path(tasks[0]).with_name("choice.jsonl").write_text('{"question": ')
    with pytest.raises(ValueError, match=r"task '.*choice.yaml' cannot be loaded"):
        load_tasks(tasks)

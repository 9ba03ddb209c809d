"""Task files of strangers: whatever stands in them, no code runs, and what would is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowbit_ft.evaluate.task_files import CODE_KEYS, read_task
from lowbit_ft.evaluate.tasks import load_tasks, task_problems

TASK = """task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with rows and with evil.py, which leaves a mark when it is imported."""
    row = {"question": "x", "choices": [" y", " z"], "label": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    mark = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef pwn(*a, **k): return 'x'\n")
    return tmp_path


def refused(folder: Path, text: str) -> str:
    """The problem of a task file of this text, which neither looking at it nor loading it may run."""
    file = folder / "task.yaml"
    file.write_text(text)
    ((number, problem),) = task_problems([str(file)])
    with pytest.raises(ValueError):
        load_tasks([str(file)])
    assert number == 0 and not (folder / "ran").exists()
    return problem


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("process_docs: !function evil.pwn", "task.yaml:11: !function evil.pwn is Python code"),
        ("metric_list: [{metric: !function evil.pwn}]", "task.yaml:11: !function evil.pwn"),
        ("x: !!python/object/apply:evil.pwn []", "task.yaml:11: !!python/object/apply:evil.pwn"),
        ("x: !!python/name:evil.pwn", "task.yaml:11: !!python/name:evil.pwn"),
        ("!function evil.pwn : 1", "task.yaml:11: !function evil.pwn"),
        ("generation_kwargs:\n  custom_generate: .", "task.yaml:12: custom_generate runs code"),
        ("dataset_kwargs: {trust_remote_code: true}", "task.yaml:11: trust_remote_code runs code"),
        ("x: &a [*a]", "task.yaml:11: a value that contains itself (recursion)"),
    ],
)
def test_code_is_refused_with_its_line(folder: Path, line: str, words: str) -> None:
    assert words in refused(folder, TASK + line + "\n")


@pytest.mark.parametrize("key", CODE_KEYS)
def test_keys_that_name_code_are_refused_unless_they_are_off(folder: Path, key: str) -> None:
    assert f"task.yaml:11: {key} runs code" in refused(folder, f"{TASK}{key}: evil.pwn\n")
    (folder / "task.yaml").write_text(f"{TASK}{key}: false\n")
    assert task_problems([str(folder / "task.yaml")]) == []


def test_a_metric_that_would_be_fetched_is_refused(folder: Path) -> None:
    """evaluate.load of a folder runs the module in it."""
    module = folder / "evil"
    module.mkdir()
    (module / "evil.py").write_text((folder / "evil.py").read_text())
    problem = refused(folder, f"{TASK}metric_list: [{{metric: {str(module)!r}}}]\n")
    assert "which lm-eval would fetch as code; allowed are its own metrics: " in problem and "acc" in problem


def test_what_a_file_includes_is_read_the_same_way(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "base.yaml").write_text(TASK.replace("rows.jsonl", "own.jsonl"))
    (folder / "deep" / "own.jsonl").write_text((folder / "rows.jsonl").read_text())
    (folder / "mine.yaml").write_text('include: deep/base.yaml\ntask: other\ndoc_to_text: "Q {{question}}"\n')
    task = load_tasks([str(folder / "mine.yaml")])["tasks"]["other"]
    assert task.doc_to_text({"question": "abc"}) == "Q abc" and len(list(task.test_docs())) == 1
    with (folder / "deep" / "base.yaml").open("a") as file:
        file.write("process_docs: !function ../evil.pwn\n")
    assert "base.yaml:11: !function ../evil.pwn" in refused(folder, "include: deep/base.yaml\n")
    assert "includes itself" in refused(folder, "include: task.yaml\ntask: a\n")
    assert "none.yaml: missing" in refused(folder, "include: none.yaml\ntask: a\n")


def test_a_template_reaches_no_python(folder: Path) -> None:
    """Loading a task renders its templates for its first row."""
    mark = folder / "ran"
    evil = f"{{{{ cycler.__init__.__globals__.os.open({str(mark)!r}, 66) }}}}"
    (folder / "task.yaml").write_text(TASK.replace('"{{question}}"', f'"{evil}"'))
    with pytest.raises(ValueError, match="SecurityError: access to attribute '__init__'"):
        load_tasks([str(folder / "task.yaml")])
    assert not mark.exists()


def test_a_plain_task_is_read_as_it_is(folder: Path) -> None:
    (folder / "task.yaml").write_text(TASK)
    content = read_task(folder / "task.yaml")
    assert content["dataset_kwargs"]["data_files"]["test"] == str(folder / "rows.jsonl")
    assert content["doc_to_text"] == "{{question}}" and "include" not in content

"""The model card: what others named is shown as they wrote it and is never markup."""

from __future__ import annotations

import ast
import html
import re
import shlex
from pathlib import Path

import pytest

from lowbit_ft.evaluate.tasks import TaskRow
from lowbit_ft.export.card import CardFacts, model_card, serve_line
from lowbit_ft.grid import IntGrid
from lowbit_ft.kv_cache import KVConfig
from lowbit_ft.tasks import TASKS
from tests.packed_tools import int_grid

NAMES = [
    "<img src=x onerror=alert(1)>",
    "a`<script>alert(1)</script>`b",
    "![x](http:x)",
    "a\n\n<b>\n# head",
    "a|b --- c",
    "&lt;b&gt; *c* _d_ [e](f)",
]


def card(base: str, task: str = "mine", recipe: str = "name: x") -> str:
    facts = CardFacts("x", base, "lr_qat", True, int_grid(), recipe)
    return model_card(facts, "native", [], [TaskRow("base", task, "acc", 0.5, None, True, 4)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_and_a_task_named_with_markup_are_only_names(
    name: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = name.replace("/", "")  # a folder's name has none
    if there:
        Path(base).mkdir()
    text = card(base, name)
    assert not re.search(r"<[a-z/]|!\[|\*c\*|^# head", text, re.M)
    assert "base_model" not in text and text.count("\n---\n") == card("plain").count("\n---\n")
    assert f"\n{base} fine-tuned" in html.unescape(text)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "0.5" in line]
    assert len(rows) == 1 and rows[0].count("|") == 4 and f"| {name} | acc" in html.unescape(text)


def test_ordinary_names_are_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "tiny-llama").mkdir()
    text = card(str(tmp_path / "tiny-llama"), "mmlu_pro")
    assert "\n`tiny-llama` fine-tuned with lowbit_ft: method `lr_qat`" in text and "base_model" not in text
    assert "| mmlu_pro | acc | 0.5 |" in text
    text = card("meta-llama/Llama-3.1-8B")
    assert "\nbase_model: meta-llama/Llama-3.1-8B\n" in text and "\n`meta-llama/Llama-3.1-8B` fine" in text


@pytest.mark.parametrize("folder", ["runs/plain", "my runs/a", "it's", 'say "x"', "a$HOME`ls`", "b!d\\n"])
def test_a_line_for_a_shell_survives_the_name_of_its_folder(folder: str) -> None:
    """As one word to a server, as a text to Python, whatever asks."""
    grid = int_grid()
    for facts, name in (
        (CardFacts("x", "b", "lr_qat", True, grid, None), "native"),
        (CardFacts("x", "b", "lr_qat", True, grid, None, command="lowbit-ft draw {folder} p.png"), "native"),
    ):
        line = serve_line(facts, name, Path(folder)).removeprefix("serve it: ")
        assert folder in shlex.split(line)
    for kind in ("object-detection", "text-classification", "question-answering"):
        facts = CardFacts("x", "b", "lr_qat", True, grid, None, pipeline=kind)
        for name, said in (("native", folder), ("onnx", f"{folder}/model.onnx")):
            line = serve_line(facts, name, Path(folder)).removeprefix("serve it: ")
            python, option, code = shlex.split(line)
            assert (python, option) == ("python", "-c")
            found = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
            assert said in found, line
            assert folder != "runs/plain" or line.startswith('python -c "') and line.endswith('"')


def test_nothing_in_a_recipe_closes_its_fence() -> None:
    text = card("plain", recipe="name: x\nprompt: |\n  ```\n  <b>\n  `````")
    fence = "\n" + "`" * 6
    assert text.count(fence) == 2 and text.endswith(f"  `````{fence}\n")
    assert card("plain").endswith("\n```yaml\nname: x\n```\n")


def test_the_lines_for_gguf_take_the_stop_tokens_of_the_folder() -> None:
    line = 'model.generation_config = GenerationConfig.from_pretrained("PATH")'
    for there in (True, False):  # a checkpoint may have no generation_config.json
        facts = CardFacts("x", "base", "lr_qat", True, int_grid(), None, generation=there)
        text = model_card(facts, "gguf", [])
        assert (line in text) == there and text.count("GenerationConfig") == 2 * there
        assert line not in model_card(facts, "compressed-tensors", [])


def test_on_a_cpu_our_own_server_comes_first_and_vllms_limits_are_said() -> None:
    def said(format: str, bits: int) -> str:
        facts = CardFacts("x", "base", "lr_qat", True, int_grid(bits=bits), None)
        return serve_line(facts, format, Path("RUN/exported"), Path("RUN"))

    ours = "serve it: lowbit-ft serve RUN\n"
    assert said("compressed-tensors", 4) == ours + "  or: vllm serve RUN/exported"
    assert said("gguf", 3) == ours + "  or: llama-server -m RUN/exported/model.gguf"
    six = said("compressed-tensors", 6).splitlines()  # of which vllm has none, on a GPU neither
    assert six[0] == "serve it: lowbit-ft serve RUN/exported" and "no kernel for 6 bits" in six[1]
    narrow = said("compressed-tensors", 3)
    assert narrow.startswith(
        ours + "  on a GPU: vllm serve RUN/exported\n  on a CPU: vllm has a kernel for 4"
    )


@pytest.mark.parametrize(
    ("format", "grid"),
    [
        ("compressed-tensors", int_grid(bits=6)),
        ("gptq", int_grid(bits=3)),
        ("gptq_v2", int_grid(symmetric=False)),
    ],
)
def test_a_card_of_a_grid_that_the_formats_server_refuses_names_ours(format: str, grid: IntGrid) -> None:
    """With no flag of the other one: ours has none of these."""
    cache = KVConfig.of(8, "token_head")
    facts = CardFacts("x", "base", "lr_qat", True, grid, None, cache, {"enable_thinking": False})
    text = model_card(facts, format, [])
    (block,) = [part for part in text.split("```") if part.strip().startswith("lowbit-ft")]
    assert block.strip() == "lowbit-ft serve PATH"
    assert "\nServer: vllm " in text and f"this grid is {grid}." in text
    assert "the flag says so" not in text and "has no flag for" in text
    line = serve_line(facts, format, Path("OUT")).splitlines()
    assert line[0] == "serve it: lowbit-ft serve OUT" and line[1].startswith("  server: vllm ")


@pytest.mark.parametrize("name", TASKS)
def test_a_card_makes_inputs_with_what_the_folder_has(name: str) -> None:
    """No tokenizer for images; and no command of ours for a folder that torch does not compute."""
    task = TASKS[name]
    facts = CardFacts(
        "x", "b", "lr_qat", True, int_grid(), None,
        pipeline=task.pipeline, auto=task.auto, command=task.command,
    )  # fmt: skip
    text, images = model_card(facts, "native", []), task.reads == "images"
    assert ("AutoTokenizer" in text) != images
    assert ("AutoImageProcessor" in text) == (images and task.command is None)
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    ast.parse(code)
    line = serve_line(facts, "onnx", Path("OUT"))
    assert ("InferenceSession('OUT/model.onnx')" in line) == (task.pipeline != "text-generation")

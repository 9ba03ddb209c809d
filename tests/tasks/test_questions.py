"""Questions and their answers: pieces of long texts, SQuAD's measures, and the whole line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from lowbit_ft import pipeline as line
from lowbit_ft.data.errors import DataError
from lowbit_ft.export.onnx_session import OnnxModel
from lowbit_ft.export.reader import load_exported
from lowbit_ft.files.tensorfile import CheckpointError
from lowbit_ft.integrations.adapter_files import read_adapter
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.purpose import answer_of
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.question_answering import QuestionAnswering
from lowbit_ft.tasks.spans import best_span, exact, f1, normal, of_spans
from tests import encoders

TINY = Path(__file__).resolve().parents[2] / "recipes" / "assets" / "tiny-llama"


def the_task(**keys: Any) -> QuestionAnswering:
    found = TASKS["question_answering"].model_validate({"kind": "question_answering", "stride": 2} | keys)
    assert isinstance(found, QuestionAnswering)
    return found


def read(path: Path, found: list[dict[str, Any]], length: int = 16, **keys: Any) -> Any:
    file = encoders.write(path / "rows.jsonl", found)
    source = SimpleNamespace(path=file, format=None, split="train", name=None, revision=None, limit=None)
    section = SimpleNamespace(sequence_len=length, on_bad_row="error")
    return the_task(**keys).examples(source, section, encoders.tokenizer())


def row(context: str, answer: str | None, at: int | None = None, question: str = "is a") -> dict[str, Any]:
    begin = context.index(answer) if answer and at is None else at
    answers = (
        {"text": [], "answer_start": []} if answer is None else {"text": [answer], "answer_start": [begin]}
    )
    return {"question": question, "context": context, "answers": answers}


# ------------------------------------------------------------------------------------------ the measures


def test_squads_measures_by_hand() -> None:
    assert normal("The  Cat's, a  hat!") == "cats hat" and normal("An a THE") == ""
    assert exact("the sea.", "Sea") == 1 and exact("sea ice", "sea") == 0
    assert f1("the cold sea", "sea") == pytest.approx(2 * 1 * 0.5 / 1.5)  # precision 1/2, recall 1
    assert f1("sea sea", "sea") == pytest.approx(2 / 3) and f1("ink", "sea") == 0
    assert f1("", "the") == 1 and f1("sea", "") == 0
    plain = of_spans([["sea", "the cold sea"], ["ink"]], ["cold sea", "sky"])
    assert plain == {"exact_match": 0.5, "f1": 0.5}
    some = of_spans([["sea ice"], [], [], ["the"]], ["sea", "", "sky", ""])  # "the" is no answer
    assert some["f1"] == pytest.approx((2 / 3 + 1 + 0 + 1) / 4) and some["exact_match"] == 0.5
    assert some["f1_answerable"] == pytest.approx(2 / 3) and some["unanswerable"] == pytest.approx(2 / 3)


def test_the_best_span_is_in_order_short_and_inside() -> None:
    inf = float("-inf")
    start, end = torch.tensor([inf, 1.0, 5.0, 0.0]), torch.tensor([inf, 9.0, 0.0, 2.0])
    assert best_span(start, end, 20, 30) == (10.0, 1, 1)  # 5 + 9 is not in order
    assert best_span(start, torch.tensor([inf, 0.0, 0.0, 9.0]), 20, 1) == (9.0, 3, 3)
    assert best_span(start, end, 1, 30) is None  # the likeliest start alone is behind the likeliest end
    assert best_span(torch.full((3,), inf), torch.zeros(3), 20, 30) is None


def test_a_row_is_answered_by_the_best_of_its_pieces() -> None:
    true = [(7, ["sea"]), (7, ["sea"]), (8, [])]
    said = [(3.0, "sky", 1.0), (4.0, "sea", 9.0), (2.0, "ink", 2.5)]
    assert the_task().score(true, said)["f1"] == 0.5
    found = the_task(unanswerable=True)
    assert found.score(true, said)["f1"] == 1  # none of row 7 is its smallest, 1.0; of row 8 it is ahead
    assert the_task(unanswerable=True, null_threshold=1.0).score(true, said)["unanswerable"] == 0


# ------------------------------------------------------------------------------------------ rows


def test_a_long_text_is_cut_into_pieces_that_overlap(tmp_path: Path) -> None:
    words = "the sea of ice was with ink and sky on the rose".split()
    pieces = read(tmp_path, [row(" ".join(words), "ink and sky"), row("the sea", "sea")], length=10)
    context = [[encoders.WORDS[i] for i in piece["input_ids"]] for piece in pieces]
    assert context[0] == ["[CLS]", "is", "a", "[SEP]", *words[:5], "[SEP]"]
    assert context[1] == ["[CLS]", "is", "a", "[SEP]", *words[3:8], "[SEP]"]
    assert [piece["row"] for piece in pieces] == [0, 0, 0, 0, 1]
    spans = [(piece["start_positions"], piece["end_positions"]) for piece in pieces]
    # ink and sky are words 6 to 8: in the second piece they are not whole
    assert spans == [(0, 0), (0, 0), (4, 6), (0, 0), (5, 5)]
    last = pieces[2]
    first, behind = last["offsets"][4][0], last["offsets"][6][1]
    assert last["context"][first:behind] == "ink and sky" and last["offsets"][3] is None
    assert "2 of 2 rows used: 5 pieces" in str(pieces.report)
    assert "answers: in another piece 3, in its piece 2" in str(pieces.report)
    kept = the_task().first(pieces, 1)
    assert len(kept) == 4 and {piece["row"] for piece in kept} == {0}


def test_an_answer_is_all_tokens_that_have_a_part_of_it(tmp_path: Path) -> None:
    """Four bytes of one character are four tokens with its place; and there need be no token of a space."""
    file = encoders.write(tmp_path / "bytes.jsonl", [row("a \N{SNOWMAN} sea", "\N{SNOWMAN}")])
    source = SimpleNamespace(path=file, format=None, split="train", name=None, revision=None, limit=None)
    section = SimpleNamespace(sequence_len=32, on_bad_row="error")
    (piece,) = the_task().examples(source, section, AutoTokenizer.from_pretrained(TINY))
    of_it = [i for i, place in enumerate(piece["offsets"]) if place == [2, 3]]
    assert len(of_it) > 1 and (piece["start_positions"], piece["end_positions"]) == (of_it[0], of_it[-1])
    (piece,) = read(tmp_path, [row("  the sea  ice", "  the sea ")])
    assert (piece["start_positions"], piece["end_positions"]) == (4, 5)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (row("the  sea", " ", 3), "the answer ' ' is not at 3 of 'context'"),
        (row("the sea", "sea", 3), "the answer 'sea' is not at 3 of 'context', where ' se' is"),
        (row("the sea", None), "it has no answer; set task.unanswerable: true"),
        (row("the sea", "sea", -1), "'answer_start' must be a list of places in 'context', counted"),
        ({**row("the sea", "sea"), "answers": ["sea"]}, "two lists of one length; got a list"),
        (row("the sea", "sea", question="is " * 12), "leaves 1 of 16 tokens .* lower task.stride"),
    ],
)
def test_a_malformed_row_is_named(found: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{said}"):
        read(tmp_path, [row("the sea", "sea"), found])


def test_rows_without_an_answer(tmp_path: Path) -> None:
    pieces = read(tmp_path, [row("the sea", None)], unanswerable=True)
    assert (pieces[0]["start_positions"], pieces[0]["end_positions"], pieces[0]["right"]) == (0, 0, [])
    assert "answers: none 1" in str(pieces.report)


def test_a_decoder_that_transformers_would_draw_anew_is_refused() -> None:
    """It calls the body of LlamaForQuestionAnswering `transformer`, and finds nothing of a Llama."""
    checkpoint = Checkpoint.open(TINY, dtype="float32", purpose=the_task().purpose(0))
    with pytest.raises(CheckpointError, match=r"looks for 'transformer.*start from random numbers"):
        checkpoint.refuse_strangers()


# ------------------------------------------------------------------------------------------ the line


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, head and all; long texts in pieces."""
    folder = tmp_path_factory.mktemp("questions")
    train = encoders.write(folder / "train.jsonl", encoders.asked(96))
    valid = encoders.write(folder / "valid.jsonl", encoders.asked(24, seed=1))
    file = folder / "recipe.yaml"
    recipe = encoders.recipe(
        folder,
        encoders.encoder(folder / "model", num_hidden_layers=1),
        {"kind": "question_answering", "stride": 2},
        train,
        model={"dtype": "bfloat16"},
        data={"train": {"path": train}, "valid": {"path": valid}, "sequence_len": 14},
        train={"max_steps": 30, "micro_batch_size": 16, "learning_rate": 1e-2},
        export={"format": "compressed-tensors"},
    )
    file.write_text(yaml.safe_dump(recipe))
    line.run(load_recipe(file))
    return folder / "run"


def test_it_learns_and_what_is_trained_is_what_ships(ran: Path) -> None:
    found = json.loads((ran / "evaluation.json").read_text())
    rows = {row["stage"]: row for row in found["rows"]}
    assert list(rows) == ["base", "quantized", "trained", "merged", "exported"]
    assert rows["trained"]["scores"]["f1"] > 0.6 > rows["quantized"]["scores"]["f1"]
    for stage in ("merged", "exported"):
        assert (rows[stage]["loss"], rows[stage]["scores"]) == (
            rows["trained"]["loss"],
            rows["trained"]["scores"],
        )
    assert found["windows"] == rows["trained"]["tokens"] > 24, "pieces of 24 rows"
    card = (ran / "exported" / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card and "y.start_logits.argmax()" in card
    assert "| stage | loss | exact_match | f1 |" in card


def test_a_head_in_16_bits_is_trained_in_32(ran: Path) -> None:
    """The masters are fp32 and lie in the adapter; what ships, and every forward used, is they rounded."""
    state = read_adapter(ran / "adapter")[1]
    master = state["base_model.model.qa_outputs.weight"]
    assert master.dtype == torch.float32 and not torch.equal(master, master.bfloat16().float())
    merged = AutoModelForQuestionAnswering.from_pretrained(ran / "merged").eval()
    head = merged.qa_outputs.weight.detach()
    assert head.dtype == torch.bfloat16 and torch.equal(head, master.bfloat16())
    base = load_exported(ran / "base")
    assert not torch.equal(base.qa_outputs.weight, head)


def test_both_outputs_of_an_onnx_graph_are_its_answer(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make, ids, logits = onnx.helper, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    nodes = [
        make.make_node("Cast", ["input_ids"], ["start_logits"], to=logits),
        make.make_node("Neg", ["start_logits"], ["end_logits"]),
    ]
    inputs, *outputs = (
        make.make_tensor_value_info(name, kind, ("batch_size", "sequence_length"))
        for name, kind in (("input_ids", ids), ("start_logits", logits), ("end_logits", logits))
    )
    graph = make.make_graph(nodes, "questions", [inputs], outputs)
    opset = [make.make_opsetid("", 21)]
    onnx.save(make.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    asked = torch.tensor([[2, 5, 3], [2, 3, 0]])
    found = answer_of(OnnxModel(tmp_path / "model.onnx", [])(asked, attention_mask=(asked != 0).long()))
    assert torch.equal(found, torch.stack([asked, -asked], -1).float())

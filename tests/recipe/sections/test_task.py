"""A task and what it goes with: columns and formats, and keys that only a language model reads."""

import json
from pathlib import Path

from lowbit_ft.plan.plan import plan
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.tasks.causal_lm import CausalLM
from tests import encoders, images
from tests.recipe.recipe_text import GOOD, bad_recipes, refused, refused_with, write

CLASSES = ("quant:\n", "task: sequence_classification\nquant:\n")
FORMAT = "data.train.format=null"
LENGTH = "data.sequence_len=16"

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "a word",
        ("", ""),
        ("task=sequence_clasification",),
        "task: got 'sequence_clasification'; allowed: kind: ",
    ),
    (
        "a key",
        ("", ""),
        ("task={kind: sequence_classification, lables: [a, b]}",),
        "task.lables: unknown key; did you mean 'labels'?",
    ),
    (
        "a format",
        CLASSES,
        (),
        "r.yaml:16: data.train.format: got 'chat' with task: sequence_classification, whose keys name the",
    ),
    ("no format", ("    format: chat\n", ""), (), "data.train.format: missing; add `format: ...` (chat,"),
    (
        "masked, no format",
        CLASSES,
        ("task=masked_lm", FORMAT),
        "data.train.format: missing; add `format: ...`",
    ),
    (
        "questions to a decoder",
        CLASSES,
        (FORMAT, "task=question_answering"),
        "the files of this llama have nothing of that name",
    ),
    (
        "rotation",
        CLASSES,
        (FORMAT, "quant.rotation={kind: hadamard}"),
        "folds are known of decoders; set none",
    ),
    (
        "a cache",
        CLASSES,
        (FORMAT, "quant.kv_cache={kind: token_head, bits: 8}"),
        "an encoder has none; set null",
    ),
    (
        "kept answers",
        CLASSES,
        (FORMAT, "train.signal={kind: mix}", "train.teacher=cached"),
        "train.teacher: got 'cached' with task: sequence_classification: it keeps what was said of the",
    ),
    (
        "some answers",
        CLASSES,
        (FORMAT, "train.signal={kind: mix, top_k: 2}", "train.teacher=residual"),
        "train.signal.top_k: got 2 with task: sequence_classification: a teacher's answers are",
    ),
    (
        "a teacher of two sets of logits",
        CLASSES,
        (FORMAT, "task=question_answering", "train.signal={kind: mix}", "train.teacher=residual"),
        "its model has no answer that a teacher's could be compared with; set labels",
    ),
    (
        "layers of what is no chain of them",
        CLASSES,
        (FORMAT, "task=image_generation", "train.signal={kind: layers}", "train.teacher=residual"),
        "its layers are none of tokens; set labels, logits or mix",
    ),
    (
        "attention of what has hidden states alone",
        CLASSES,
        (FORMAT, "task=image_classification", "train.signal={kind: layers}", "train.teacher=residual"),
        "train.signal.losses: got ['scores', 'outputs'] with task: image_classification: only its hidden",
    ),
    (
        "pairs",
        CLASSES,
        (FORMAT, "train.signal={kind: dpo}"),
        "it is for language models; set labels, mix or layers",
    ),
    ("a loss", CLASSES, (FORMAT, "train.loss=liger"), "train.loss: got 'liger' with task: sequence"),
    ("synthesis", CLASSES, ("data.train=null", "data.synthesis={kind: self_generated}"), "cannot be written"),
    ("streaming", CLASSES, (FORMAT, "data.streaming=true"), "its rows are held in memory; set false"),
    ("prompts", CLASSES, (FORMAT, "eval.generate=[hello]"), "it writes no text; remove them"),
    (
        "gguf",
        CLASSES,
        (FORMAT, "export.format=gguf"),
        "export.format: got 'gguf' with task: sequence_classification: its readers build language models",
    ),
    (
        "another architecture",
        CLASSES,
        (FORMAT, "task=masked_lm"),
        "transformers has no AutoModelForMaskedLM of model_type 'llama'",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


def test_a_packed_modernbert_is_for_our_own_format(tmp_path: Path) -> None:
    model = encoders.encoder(tmp_path / "model", "modernbert")
    rows = encoders.write(tmp_path / "rows.jsonl", encoders.rows(4))
    changes = (f"model.path={model}", f"data.train={{path: {rows}}}", "quant.group_size=32", LENGTH)
    problems = refused(GOOD.replace(*CLASSES), changes)
    assert any("cannot load a packed modernbert" in problem for problem in problems), problems
    recipe = load_recipe(write(GOOD.replace(*CLASSES)), (*changes, "export.format=native"))
    assert recipe.eval.windows is None, "all rows"


def test_a_mistake_in_the_task_is_told_alone(tmp_path: Path) -> None:
    """The model is not judged as one that writes text meanwhile; a folder that is not there still is told."""
    model = images.vit(tmp_path / "vit")
    task = "task={kind: image_classification, lables: [a, b]}"
    (problem,) = refused(GOOD, (f"model.path={model}", "quant.group_size=32", LENGTH, task))
    assert "task.lables: unknown key; did you mean 'labels'?" in problem, problem
    both = refused(GOOD, (f"model.path={tmp_path / 'other'}", task))
    assert any("there is no such folder" in line for line in both) and len(both) == 2, both


def test_the_plan_knows_the_head_and_the_rows(tmp_path: Path) -> None:
    """A label more is a row of the classifier more; four times the tokens take more than twice the memory."""
    model = encoders.encoder(tmp_path / "model", "bert")
    rows = encoders.write(tmp_path / "rows.jsonl", encoders.rows(4))
    changes = (f"model.path={model}", f"data.train={{path: {rows}}}", "quant.group_size=32")
    text = write(GOOD.replace(*CLASSES))
    three = "task={kind: sequence_classification, labels: [a, b, c]}"
    small, large = (
        plan(load_recipe(text, (*changes, *more))) for more in ((LENGTH,), ("data.sequence_len=64", three))
    )
    assert small is not None and large is not None and not small.notes and not large.notes
    assert large.trainable == small.trainable + 33
    works = [made.parts["one layer"] + made.parts["saved layer inputs"] for made in (small, large)]
    assert works[1] > 2 * works[0]


def test_the_plan_runs_questions_and_images_without_data(tmp_path: Path) -> None:
    """Traced, not estimated; a window of images is its patches."""
    models = {"question_answering": encoders.encoder(tmp_path / "bert"), "image_classification": None}
    models["image_classification"] = images.vit(tmp_path / "vit")
    rows = encoders.write(tmp_path / "rows.jsonl", encoders.rows(4))
    for task, model in models.items():
        changes = (
            f"model.path={model}",
            f"data.train={{path: {rows}}}",
            "quant.group_size=32",
            f"task={task}",
        )
        length = "data.sequence_len=17" if task == "image_classification" else LENGTH
        found = plan(load_recipe(write(GOOD.replace(*CLASSES)), (*changes, length)))
        assert found is not None and not found.notes and found.trainable > 0, found
    long = refused(GOOD.replace(*CLASSES), (*changes, "data.sequence_len=18"))
    assert any("at most the 17 positions" in problem for problem in long), long


def test_an_encoder_is_no_language_model_unless_it_was_trained_as_one(tmp_path: Path) -> None:
    """transformers builds BertLMHeadModel, whose attention sees the token that comes next."""
    folder = Path(__file__).resolve().parents[3] / "recipes" / "assets" / "tiny-bert"
    problems = refused(GOOD, (f"model.path={folder}", "quant.group_size=-1"))
    assert any("with task: causal_lm: its config.json says 'bert' and not" in text for text in problems)
    config = json.loads((folder / "config.json").read_text())
    assert CausalLM().unfit(config | {"is_decoder": True}) is None
    for name in ("llama", "bart", "gpt_neox", "t5", None, ["bert"]):
        assert CausalLM().unfit({"model_type": name, "is_encoder_decoder": name == "bart"}) is None

"""Rows of pairs and signals of pairs: each needs the other, and what neither goes with."""

from lowbit_ft.recipe.recipe import load_recipe
from tests.recipe.recipe_text import GOOD, ROOT, bad_recipes, refused_with, write

PAIRS = ROOT / "recipes" / "assets" / "preferences" / "train.jsonl"
DPO = ("max_steps: 10", "max_steps: 10\n  signal: {kind: dpo}")
ROWS = "data.train.format=preference"

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "rows of text",
        DPO,
        (),
        "data.train.format: got 'chat': train.signal.kind: dpo learns from pairs; set format: preference",
    ),
    (
        "validation of text",
        DPO,
        (ROWS, f"data.valid={{path: {PAIRS}, format: text}}"),
        "data.valid.format: got 'text': train.signal.kind: dpo learns from pairs; set format: preference",
    ),
    (
        "labels of pairs",
        ("max_steps: 10", "max_steps: 10"),
        (ROWS,),
        "data.train.format: got 'preference': has two answers a row, and train.signal.kind: labels does not "
        "compare them; set signal.kind (with pairs: dpo, orpo), or format: chosen",
    ),
    (
        "a teacher of pairs",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: logits}\n  teacher: cached"),
        (ROWS,),
        "data.train.format: got 'preference': has two answers a row, and train.signal.kind: logits does not",
    ),
    ("prompts", DPO, (ROWS, "data.train_on=all"), "data.train_on: got 'all' with train.signal.kind: dpo"),
    (
        "synthesis",
        DPO,
        ("data.train=null", "data.synthesis={kind: self_generated}"),
        "train.signal.kind: got 'dpo', which learns from pairs of answers, and there is no data.train; add",
    ),
    (
        "fitted",
        DPO,
        (ROWS, "train.reconstruct={}"),
        "train.reconstruct: given with train.signal.kind: dpo, whose reference is the base without adapters",
    ),
    (
        "warm-up",
        DPO,
        (ROWS, "adapter.method=l4q", "adapter.warmup_steps=2"),
        "adapter.warmup_steps: got 2 with train.signal.kind: dpo: a warm-up trains unrounded weights",
    ),
    (
        "streamed",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: dpo, reference: cached}"),
        (ROWS, "data.streaming=true"),
        "train.signal.reference: got 'cached', but the windows of a streamed data set are not known",
    ),
    (
        "sharded",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: dpo, reference: cached}"),
        (ROWS, "train.sharding=fsdp"),
        "train.signal.reference: got 'cached', but it is asked before the base is spread",
    ),
    (
        "teacher",
        DPO,
        (ROWS, "train.teacher=residual"),
        "train.teacher: got 'residual', but train.signal.kind",
    ),
    (
        "smoothing",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: dpo, label_smoothing: 0.1}"),
        (ROWS,),
        "train.signal: got label_smoothing 0.1, which loss_type: sigmoid does not read; remove it, or set "
        "loss_type: robust",
    ),
    (
        "a loss",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: dpo, loss_type: sigmoyd}"),
        (ROWS,),
        "train.signal.loss_type: got 'sigmoyd'; allowed: sigmoid, hinge, ipo, robust; did you mean",
    ),
    (
        "a key of another",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: orpo, reference: cached}"),
        (ROWS,),
        "train.signal: got reference 'cached', which kind: orpo does not read; remove it, or set kind: dpo",
    ),
    (
        "positions",
        DPO,
        (ROWS, "data.sequence_len=4096"),
        "data.sequence_len: got 2048; allowed: at most the",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


def test_half_of_a_window_is_what_a_model_must_hold() -> None:
    text = GOOD.replace(*DPO)
    recipe = load_recipe(write(text), (ROWS, "data.sequence_len=2048"))
    assert recipe.train.signal.kind == "dpo"  # the model has 1024 positions

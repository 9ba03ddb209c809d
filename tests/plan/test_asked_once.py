"""What plan says of a teacher that is asked before training."""

from pathlib import Path

from lowbit_ft.plan.plan import Card, plan
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
BIG = ROOT / "recipes" / "llama31-8b-w4-lr-qat.yaml"
SHAPES = ROOT / "tests" / "configs"


def test_a_teacher_that_is_asked_once_is_on_the_disk_and_not_on_the_card() -> None:
    """4096 tokens of a vocabulary of 128,256 per step and process: 64 ids of 4 bytes and 66 halves each."""
    shape = SHAPES / "llama31_8b"
    card = Card(24_000_000_000, "a card", 89)
    steps = ["train.max_steps=100", "train.epochs=null", "train.micro_batch_size=1"]
    plain = plan(load_recipe(BIG, steps, check=False), shape, card)
    cached = [*steps, "train.signal.kind=logits", "train.teacher=cached"]
    asked = plan(load_recipe(BIG, cached, check=False), shape, card)
    assert plain is not None and asked is not None
    recipe = asked.recipe
    tokens = 100 * recipe.train.gradient_accumulation_steps * recipe.data.sequence_len
    assert asked.needs.disk == plain.needs.disk | {"teacher/": tokens * (64 * 6 + 2)}
    assert asked.stages["training"] == plain.stages["training"]
    # one dense layer and the embedding and head beside what is trained, and a batch through them
    assert plain.stages["evaluation at the end"] * 0.9 < asked.stages["asking the teacher"] < card.nbytes
    assert any("asked once; 386 bytes on the disk per position" in note for note in asked.notes)
    assert any("at most 25 % of the time of training" in note for note in asked.notes)
    two = plan(load_recipe(BIG, cached, check=False), shape, card, processes=2)
    assert two is not None and two.needs.disk["teacher/"] == 2 * asked.needs.disk["teacher/"]

"""The quickstart recipe made short, for tests of the whole line and of its stages."""

from pathlib import Path

from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent

QUICK = [
    "train.max_steps=3",
    "train.micro_batch_size=2",
    "train.eval_every=2",
    "train.save_every=1",
    "data.train.limit=80",
    "data.valid.limit=12",
    "data.sequence_len=128",
    "eval.windows=4",
    "eval.window=128",
    "eval.max_new_tokens=4",
    "eval.generate=[Say hello.]",
]


def recipe(output: Path, *overrides: str):
    return load_recipe("recipes/quickstart.yaml", [*QUICK, f"output={output}", *overrides])

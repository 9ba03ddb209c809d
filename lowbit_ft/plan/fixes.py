"""What fits on a card, and what to change when a recipe does not: every figure is the plan of the changed
recipe.

Fixes are tried in the order of what they cost: first those that only cost time, then those that cost quality.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..export import EXPORTERS
from ..grid import GRIDS, IntGrid
from ..model.matrices import Matrix
from ..recipe.recipe import Recipe, check_recipe
from .plan import Card, Plan, plan

Changes = dict[str, Any]
TABLE = Matrix("embedding", "embedding.weight", (1, 1), embedding=True)
MOST_WINDOWS = 64  # per forward; nobody asks for more
_LONGEST = 1 << 20  # tokens; further than any model here reads
_VERIFIED = 24  # combinations that are really planned before the search gives up


@dataclass(frozen=True)
class Fix:
    """changes: recipe keys with their new values (or `processes`); cost: in words; saves: bytes by stage, for
    the stages that do not fit, by its own plan; quality: it costs quality, not only time."""

    changes: Changes
    cost: str
    saves: dict[str, int]
    quality: bool = False

    @property
    def most(self) -> int:
        return max(self.saves.values())

    def __str__(self) -> str:
        return ", ".join(f"{key}: {yaml_value(value)}" for key, value in self.changes.items())


def yaml_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Planner:
    """Plans of one recipe and its variants on one card."""

    recipe: Recipe
    folder: Path | None
    card: Card
    processes: int = 1
    packed_rows: bool = True

    def __call__(self, changes: Changes | None = None) -> Plan | None:
        """The plan with these changes; None when they make no valid recipe, or no plan."""
        changes = dict(changes or {})
        count = changes.pop("processes", self.processes)
        try:
            made = changed(self.recipe, changes)
            return plan(made, self.folder, self.card, count, self.packed_rows) if made is not None else None
        except ValueError:
            return None


def changed(recipe: Recipe, changes: Changes) -> Recipe | None:
    """The recipe with dotted keys set, validated; None where a key does not exist or a value is refused."""
    sections: dict[str, Changes] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name not in type(getattr(recipe, section)).model_fields:
            return None
        sections.setdefault(section, {})[name] = value
    update = {}
    for section, values in sections.items():
        old = getattr(recipe, section)
        try:
            update[section] = type(old).model_validate(old.model_dump() | values)
        except ValidationError:
            return None
    return recipe.model_copy(update=update)


# ---------------------------------------------------------------- what fits


def largest(planner: Planner, key: str, step: int, most: int) -> int | None:
    """The largest value of an integer key (a multiple of `step`, at most `most`) with which training fits,
    whatever the stages after it need; None when even `step` does not."""
    start = getattr(getattr(planner.recipe, key.partition(".")[0]), key.partition(".")[2])
    budget = planner.card.nbytes

    def size(value: int) -> int:
        made = planner({key: value})
        return (
            max(sum(made.parts.values()), made.stages.get("evaluation while training", 0))
            if made is not None
            else 1 << 62
        )

    low, high = 0, 0
    low_size, high_size = 0, 0
    value = max(step, start // step * step)
    while True:  # double until it does not fit, or halve until it does
        now = size(value)
        if now <= budget:
            low, low_size = value, now
            if value >= most or high:
                break
            value = min(most, 2 * value)
        else:
            high, high_size = value, now
            if value <= step or low:
                break
            value = max(step, value // 2 // step * step)
    if not low:
        return None
    if not high:
        return low
    while high - low > step and (high - low) / low > 0.02:
        share = (budget - low_size) / max(1, high_size - low_size)
        guess = low + round((high - low) * min(0.9, max(0.1, share)) / step) * step
        guess = min(high - step, max(low + step, guess))
        now = size(guess)
        if now <= budget:
            low, low_size = guess, now
        else:
            high, high_size = guess, now
    return low


def largest_batch(planner: Planner) -> int | None:
    """Windows per forward that fit at the recipe's length."""
    return largest(
        planner, "train.micro_batch_size", 1, max(MOST_WINDOWS, planner.recipe.train.micro_batch_size)
    )


def largest_length(planner: Planner, positions: int | None = None) -> int | None:
    """Tokens per window that fit at the recipe's batch; no more than the model has positions."""
    step = 128 if planner.recipe.data.sequence_len >= 128 else 8
    return largest(
        planner,
        "data.sequence_len",
        step,
        min(_LONGEST, max(positions or _LONGEST, planner.recipe.data.sequence_len)),
    )


# ---------------------------------------------------------------- what to change


def candidates(recipe: Recipe, on_gpu: bool, processes: int = 1) -> Iterator[tuple[Changes, str, bool]]:
    """(changes, what they cost, whether that is quality), cheapest first; each of them saves memory in some
    recipe.
    """
    train, quant = recipe.train, recipe.quant
    batch, length = train.micro_batch_size, recipe.data.sequence_len
    divisors = [d for d in range(batch - 1, 0, -1) if batch % d == 0]
    for smaller in dict.fromkeys([*divisors[:1], *divisors[-1:]]):
        yield (
            {
                "train.micro_batch_size": smaller,
                "train.gradient_accumulation_steps": train.gradient_accumulation_steps * batch // smaller,
            },
            "the same steps in more, smaller forwards",
            False,
        )
    if not train.gradient_checkpointing:
        yield {"train.gradient_checkpointing": True}, "about 30 % slower", False
    if on_gpu and train.optimizer in ("adamw", "adamw32bit", "adam", "adam32bit"):
        yield {"train.optimizer": "adamw8bit"}, "optimizer states rounded to 8 bits", False
    if on_gpu and not train.optimizer.startswith("paged") and train.optimizer != "lamb":
        yield {"train.optimizer": "paged_adamw8bit"}, "8-bit states that may wait in CPU memory", False
    if recipe.model.attention != "flex_attention" and recipe.data.packing and on_gpu:
        yield {"model.attention": "flex_attention"}, "no mask of length x length; compiles once", False
    if on_gpu and train.offload == "no":
        needs = {} if train.gradient_checkpointing else {"train.gradient_checkpointing": True}
        yield needs | {"train.offload": "cpu"}, "layer inputs go over the bus and back", False
    if train.gradient_checkpointing and train.mlp_chunk is None and batch * length > 8192:
        yield {"train.mlp_chunk": 4096}, "MLP and norms some tokens at a time; no product more", False
    if train.keep_codes:
        yield {"train.keep_codes": False}, "codes are made again for every pass", False
    if recipe.eval.kl:
        yield {"eval.kl": False}, "no KL to the full-precision model in the table", False
    for bits in (b for b in (2, 1, 0) if quant.keeps_residual and b < quant.residual_bits):
        yield {"quant.residual_bits": bits}, "small updates round more coarsely; ships at the same size", True
    if GRIDS[quant.grid].packs_tables:
        tables = EXPORTERS[recipe.export.format].reject_matrix(TABLE, IntGrid(bits=8), None) is None
        for bits in (8, 4):
            if tables and (quant.embeddings is None or quant.embeddings > bits):
                yield {"quant.embeddings": bits}, f"token embedding rounded to {bits} bits", True
            if quant.lm_head is None or quant.lm_head > bits:
                yield {"quant.lm_head": bits}, f"output head rounded to {bits} bits", True
    if recipe.data.sequence_len >= 256:
        yield {"data.sequence_len": length // 2}, "windows of half the length", True
    if length >= 1024:
        yield {"data.sequence_len": length // 4}, "windows of a quarter of the length", True
    if not quant.from_checkpoint:
        for bits in (b for b in (6, 4, 3, 2) if b < quant.bits and b in GRIDS[quant.grid].widths):
            yield {"quant.bits": bits}, f"the shipped model has {bits} bits", True
    for count in (2, 4, 8):
        if count > processes:
            yield (
                {"train.sharding": "fsdp", "processes": count},
                f"needs {count} GPUs (accelerate launch, torchrun)",
                False,
            )


def fixes(planner: Planner, now: Plan) -> list[Fix]:
    """The fixes that save something, in the order of their cost; each planned. Those that the recipe's other
    keys forbid are left out.
    """
    before = _problems(planner.recipe)
    found: list[Fix] = []
    for changes, cost, quality in candidates(planner.recipe, planner.card.arch > 0, planner.processes):
        made = planner(changes)
        if made is None:
            continue
        saves = {s: size - made.stages.get(s, 0) for s, size in now.stages.items() if size > now.card.nbytes}
        if not saves or max(saves.values()) < 0.002 * now.card.nbytes or made.total > now.total:
            continue
        recipe = changed(planner.recipe, {k: v for k, v in changes.items() if k != "processes"})
        if recipe is None or _problems(recipe) - before:
            continue
        found.append(Fix(changes, cost, saves, quality))
    return found


def _problems(recipe: Recipe) -> set[str]:
    return {str(problem) for problem in check_recipe(recipe)}


def combination(planner: Planner, now: Plan, known: list[Fix]) -> tuple[list[Fix], Plan] | None:
    """The fewest fixes that together fit, cheapest first among equally many; None when none was found."""
    wanted = {
        stage: size - planner.card.nbytes for stage, size in now.stages.items() if size > planner.card.nbytes
    }
    tried = 0
    for count in range(1, min(6, len(known)) + 1):
        # What fixes save adds up only roughly: the hopeless ones are skipped, the rest is planned.
        for chosen in itertools.combinations(known, count):
            keys = [key for fix in chosen for key in fix.changes]
            apart = len(keys) == len(set(keys) - {"train.gradient_checkpointing"}) + min(
                1, keys.count("train.gradient_checkpointing")
            )
            if not apart or any(
                sum(fix.saves[stage] for fix in chosen) < 0.7 * over for stage, over in wanted.items()
            ):
                continue
            tried += 1
            made = planner({key: value for fix in chosen for key, value in fix.changes.items()})
            if made is not None and made.fits:
                return list(chosen), made
            if tried >= _VERIFIED:
                return None
    return None


# ---------------------------------------------------------------- a recipe that fits


def fit(planner: Planner, tell: Callable[[str], None] = lambda _: None) -> tuple[Recipe, Plan]:
    """A recipe chosen by the card: the most residual bits with which it fits, with as few as possible of the
    fixes that only cost time; then fixes that cost quality; then train.keep_codes where there is room.
    ValueError when nothing fits."""
    recipe, quant = planner.recipe, planner.recipe.quant
    bits = (
        [b for b in (4, 2, 1, 0) if b <= max(4, quant.residual_bits)]
        if quant.keeps_residual and not quant.from_checkpoint
        else [None]
    )
    before = _problems(recipe)
    for b in bits:
        start: Changes = {} if b is None else {"quant.residual_bits": b}
        made = _smallest_change(planner, start, quality=False, before=before)
        if made is not None:
            tell(f"residual_bits {b}" if b is not None else "no residual on this grid")
            return _with_kept_codes(planner, *made)
    start = (
        {}
        if bits[-1] is None
        else next(
            ({"quant.residual_bits": b} for b in reversed(bits) if planner({"quant.residual_bits": b})), {}
        )
    )
    made = _smallest_change(planner, start, quality=True, before=before)
    if made is None:
        raise ValueError(
            f"no fix found with which {recipe.name} fits {planner.card.name}: take a smaller model, fewer "
            "quant.bits, a shorter "
            "data.sequence_len, or several GPUs with train.sharding: fsdp"
        )
    return _with_kept_codes(planner, *made)


def _smallest_change(
    planner: Planner, start: Changes, quality: bool, before: set[str]
) -> tuple[Changes, Plan] | None:
    """`start` and the fewest further fixes; None when they do not do, or the recipe's other keys forbid
    `start`.
    """
    recipe = changed(planner.recipe, start)
    now = planner(start)
    if recipe is None or now is None or _problems(recipe) - before:
        return None
    if now.fits:
        return start, now
    inner = Planner(recipe, planner.folder, planner.card, planner.processes, planner.packed_rows)
    known = [
        f
        for f in fixes(inner, now)
        if "processes" not in f.changes and (quality or not f.quality) and "quant.bits" not in f.changes
    ]
    found = combination(inner, now, known)
    if found is None:
        return None
    chosen, made = found
    return start | {key: value for fix in chosen for key, value in fix.changes.items()}, made


def _with_kept_codes(planner: Planner, changes: Changes, made: Plan) -> tuple[Recipe, Plan]:
    """Codes kept over the passes of a step cost nothing but memory: taken where there is room."""
    more = planner(changes | {"train.keep_codes": True})
    if more is not None and more.fits:
        changes, made = changes | {"train.keep_codes": True}, more
    recipe = changed(planner.recipe, changes)
    assert recipe is not None
    return recipe, made

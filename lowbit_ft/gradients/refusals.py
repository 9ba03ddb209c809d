"""What several kinds of gradient, and the pull beside them, do not go with; each said once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..adapters.dense import held_short

Problem = tuple[tuple[str, ...], str]  # the key of the recipe, and what is wrong with it and the way out


def no_warmup(recipe: Any, what: str) -> Iterator[Problem]:
    """A warm-up trains a model that rounds nothing and uses no scales: what `what` measures there is not of
    the model that ships."""
    if steps := getattr(getattr(recipe, "adapter", None), "warmup_steps", 0):
        yield (
            ("adapter", "warmup_steps"),
            f"got {steps} beside {what}: a warm-up rounds nothing and uses no scales; set it to 0, or remove "
            f"{what}",
        )


def fp32_masters(recipe: Any, what: str) -> Iterator[Problem]:
    """What moves D by parts of a step, and puts it back."""
    if (master := held_short(getattr(recipe, "adapter", None))) is not None:
        yield (
            ("adapter", "master"),
            f"got {master!r} beside {what}, which moves weights by less than it holds; set master: "
            f"fp32, or remove {what}",
        )


def something_rounded(recipe: Any, key: tuple[str, ...], what: str) -> Iterator[Problem]:
    """What moves a code has to be among what trains."""
    adapter = getattr(recipe, "adapter", None)
    if adapter is not None and not adapter.code_parameters:
        yield (
            key,
            f"got {what}, but {adapter.method} trains nothing that is rounded to codes; use lr_qat, dl_qat, "
            f"l4q, full_qat or ef_qat, or remove {what}",
        )

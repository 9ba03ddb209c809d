"""A run that has no place on its device is refused before anything is read, with what would save memory."""

from __future__ import annotations

from ..plan.fixes import Fix, Planner, combination, fixes, yaml_value
from ..plan.plan import Plan, find_card, plan, plan_folder
from ..recipe.recipe import Recipe


def refusal(recipe: Recipe) -> str | None:
    """Why a run of this recipe cannot fit the device that it would take here and now; None when it can, or
    plan cannot tell.

    Only the training step counts: quantizing and the last evaluation are estimates that err high, and base/
    may be there already. On a CPU several processes share the pages of one base, which plan counts once for
    each. Whatever goes wrong in planning never stands in the way of a run.
    """
    try:
        folder = plan_folder(recipe)
        card = find_card(recipe, in_use=True)
        made = plan(recipe, folder, card) if folder is not None else None
        if (
            made is None
            or made.stages.get("training", 0) <= card.nbytes
            or (made.notes and made.certain <= card.nbytes)
        ):
            return None
        if card.arch == 0 and made.processes > 1:
            return None
        planner = Planner(recipe, folder, card, made.processes)
        known = fixes(planner, made)
        found = combination(planner, made, known)
    except Exception:
        return None
    lines = [
        f"{recipe.name} needs {made.total / 1e9:.2f} GB at its peak ({made.stage}), and {card.name} has "
        f"{card.nbytes / 1e9:.2f} GB.",
        *(f"  {line}" for line in _fix_lines(made, known)),
    ]
    if found is not None:
        lines.append(f"  fits ({found[1].total / 1e9:.2f} GB): {'  '.join(override(f) for f in found[0])}")
    lines.append(
        "`lowbit-ft plan` on the recipe shows where the memory goes; --fit writes a recipe that fits; "
        "--anyway starts this one all the same."
    )
    return "\n".join(lines)


def saved(made: Plan, fix: Fix) -> str:
    """What a fix saves, by stage where the stages differ."""
    parts: dict[str, list[str]] = {}
    for stage, size in fix.saves.items():
        if size > 5e6:
            parts.setdefault(f"{size / 1e9:.2f} GB", []).append(stage)
    if len(parts) == 1 and len(next(iter(parts.values()))) == len(fix.saves):
        return next(iter(parts))
    return "\n".join(f"{size} ({', '.join(stages)})" for size, stages in parts.items())


def _fix_lines(made: Plan, known: list[Fix]) -> list[str]:
    return [f"{fix} saves {saved(made, fix)}: {fix.cost}".replace("\n", ", ") for fix in known]


def override(fix: Fix) -> str:
    """A fix as it is typed behind the recipe."""
    return "  ".join(
        f"--processes {value}" if key == "processes" else f"{key}={yaml_value(value)}"
        for key, value in fix.changes.items()
    )

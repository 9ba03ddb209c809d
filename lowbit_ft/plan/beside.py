"""What trains beside the packed layers in a plan:
adapter.modules_to_save, and the rows of model.add_tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.modules import chosen
from ..files.tensorfile import CheckpointError
from ..model.config import load_config
from ..model.rows import row_tables, train_rows
from ..model.tokenizer import read_tokenizer
from ..model.whole import dense_modules, masters_of
from ..recipe.recipe import Recipe


def trained_whole(recipe: Recipe, dense: Any, targets: dict[str, Any]) -> list[str]:
    """The dense modules of adapter.modules_to_save, by name. targets: the matrices that are packed."""
    packed = {matrix.parameter.rpartition(".")[0] for matrix in targets.values()}
    left, gone = [n for n in dense_modules(dense) if n not in packed], sorted(packed)
    patterns = recipe.adapter.modules_to_save or []
    wanted = {name for pattern in patterns for name in chosen(pattern, left, gone)}
    return [name for name in left if name in wanted]


def grown_rows(recipe: Recipe, folder: Path) -> int | None:
    """Rows of the tables with the new tokens; None where there are none. Of a folder without a tokenizer, as
    many more as there are tokens."""
    if (wanted := recipe.model.add_tokens) is None:
        return None
    rows = load_config(folder).get_text_config().vocab_size
    try:
        first = len(read_tokenizer(folder))
    except CheckpointError:
        first = rows
    return max(rows, first + len(wanted.every))


def ends_of(model: Any) -> tuple[Any, Any]:
    """(what its inputs are embedded by, its output head); None for what it has not."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # transformers knows none of a convolutional network
        embedding = None
    return embedding, model.get_output_embeddings()


def train_new_rows(recipe: Recipe, rest: Any, folder: Path) -> None:
    """The new rows of the model around its layers: the last ones (which makes no difference to a plan)."""
    if (wanted := recipe.model.add_tokens) is None:
        return
    ends = [end for end in ends_of(rest) if end is not None]
    names = [n for n, module in rest.named_modules() if any(module is end for end in ends)]
    count = len(wanted.every)
    tables = {n: rest.get_submodule(n) for n in names if masters_of(rest.get_submodule(n)) is None}
    last = {n: range(m.weight.shape[0] - count, m.weight.shape[0]) for n, m in tables.items()}
    train_rows(rest, last, wanted.levels)


def table_bytes(model: Any) -> int:
    """Of the token embedding's gradient before it is fp32, where the embedding trains; 0 where it does not.
    Of new rows alone it is as many as they are."""
    table = ends_of(model)[0]
    if getattr(table, "weight", None) is None:
        return 0  # of images: what cuts them into patches holds its table inside
    if masters_of(table) is not None:
        return sum(p.nbytes for p in table._parameters.values() if p is not None)
    size = table.weight.element_size()
    return sum(rows.rows.numel() * size for _, module, rows in row_tables(model) if module is table)

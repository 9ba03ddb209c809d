"""New rows of a table (model.add_tokens): they train, the rows that were there stay as they are.

    W[ids] = round(rows)      rows [n, H] fp32, written into the frozen table W [V, H] before it is used

So the forward is the module's own on what ships, bit for bit, and the backward makes a gradient of n rows and
none of the table:

    embedding   d rows = sum over tokens t with token_t = ids_i of d y_t
    head        d x = d y W,   d rows = (d y)[:, ids]^T x

A head that is tied to the embedding is one table with one set of rows, which learns from both. What the rows
began with lies beside them, for whoever asks for the base alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .linear import embedding_factor

SLOT = "trained_rows"  # their name in the module
PEFT_KEY = "token_adapter.trainable_tokens_delta"  # of PEFT's trainable_token_indices


class NewRows(nn.Module):
    """The fp32 masters of the rows `ids` of a table. off: the table is what it was."""

    ids: Tensor
    before: Tensor
    off: bool = False

    def __init__(self, table: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        where = torch.tensor(list(ids), dtype=torch.int64, device=table.device)
        self.register_buffer("ids", where, persistent=False)
        self.register_buffer("before", table.detach()[where].clone(), persistent=False)
        self.rows = nn.Parameter(self.before.to(torch.float32, copy=True))

    def write(self, table: Tensor) -> Tensor:
        """The table [V, H] with these rows as they ship, in place: nothing is ever recorded of it."""
        with torch.no_grad():
            table.data[self.ids] = (self.before if self.off else self.rows).to(table.dtype)
        return table

    def _apply(self, fn: Any, recurse: bool = True) -> NewRows:
        """`.to(dtype)` leaves the masters fp32."""
        return super()._apply(lambda t: fn(t).to(t.dtype) if t is self.rows else fn(t), recurse)


class _Looked(torch.autograd.Function):
    """look(tokens) [..., H], with the gradient of the rows that were looked up."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, rows: Tensor, tokens: Tensor, ids: Tensor, look: Callable[[Tensor], Tensor], factor: float
    ) -> Tensor:
        ctx.save_for_backward(tokens, ids)
        ctx.factor = factor
        return look(tokens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, ids = ctx.saved_tensors
        # a product and not a scatter: the same sums in the same order, so that a resumed run is bit-equal
        hits = (ids[:, None] == tokens.reshape(1, -1)).float()
        return hits @ dy.reshape(-1, dy.shape[-1]).float() * ctx.factor, None, None, None, None


class _Product(torch.autograd.Function):
    """x W^T [..., V], with the gradients of x and of the rows `ids` of W."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, rows: Tensor, ids: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, ids, weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, ids, weight = ctx.saved_tensors
        own = dy[..., ids].reshape(-1, len(ids)).float()
        rows = own.t() @ x.reshape(-1, x.shape[-1]).float()
        return (dy.to(weight.dtype) @ weight).to(x.dtype), rows, None, None


def rows_of(module: nn.Module) -> NewRows | None:
    """The rows that train of a module's table."""
    found = module._modules.get(SLOT)
    return found if isinstance(found, NewRows) else None


def table_of(module: nn.Module) -> Tensor:
    """The weight [V, H] of an embedding or a head."""
    table = module._parameters["weight"]
    assert table is not None
    return table


def row_tables(model: nn.Module) -> Iterator[tuple[str, nn.Module, NewRows]]:
    """(name, module, rows) of every table of which rows train; of a tied pair the first."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if (rows := rows_of(module)) is not None and id(rows) not in seen:
            seen.add(id(rows))
            yield name, module, rows


def train_rows(model: nn.Module, tables: Mapping[str, Sequence[int]]) -> None:
    """Let these rows of the tables of these modules train; modules that share a table share its rows.
    ValueError for a module that is neither an embedding nor a plain linear layer without a bias."""
    shared: dict[int, NewRows] = {}
    wanted = {id(table_of(model.get_submodule(name))): ids for name, ids in tables.items()}
    for name, module in list(model.named_modules()):
        table = module._parameters.get("weight")
        if table is None or id(table) not in wanted:
            continue
        if reason := untrainable(module):
            raise ValueError(f"model.add_tokens: {name} {reason}")
        if id(table) not in shared:
            shared[id(table)] = NewRows(table, wanted[id(table)])
        module.__class__ = _training(type(module))
        setattr(module, SLOT, shared[id(table)])


def untrainable(module: nn.Module) -> str | None:
    """Why new rows of a module's table could not train; None: they can."""
    if isinstance(module, nn.Embedding):
        return None
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, and new rows train in a plain embedding or linear layer"
    return "has a bias, which would have to grow too" if module.bias is not None else None


@functools.cache
def _training(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module that writes its new rows before it computes, and learns them."""

    def looked(self: Any, tokens: Tensor) -> Tensor:
        own: NewRows = self._modules[SLOT]
        own.write(self._parameters["weight"])
        if own.off or not torch.is_grad_enabled():
            return kind.forward(self, tokens)
        look, factor = functools.partial(kind.forward, self), embedding_factor(self)
        made = _Looked.apply(own.rows, tokens, own.ids, look, 1.0 if factor is None else factor)
        assert isinstance(made, Tensor)
        return made

    def multiplied(self: Any, x: Tensor) -> Tensor:
        own: NewRows = self._modules[SLOT]
        weight = own.write(self._parameters["weight"])
        if own.off or not torch.is_grad_enabled():
            return kind.forward(self, x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        made = _Product.apply(x, own.rows, own.ids, weight)
        assert isinstance(made, Tensor)
        return made

    forward = looked if issubclass(kind, nn.Embedding) else multiplied
    made: type[nn.Module] = type(kind.__name__, (kind,), {"forward": forward})  # pyright: ignore[reportAssignmentType]
    return made

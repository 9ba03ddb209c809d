"""New rows of a table (model.add_tokens): they train, the rows that were there stay as they are.

    W[ids] = round(rows)      rows [n, H] fp32, written into the frozen table W [V, H] before it is used

So the forward is the module's own on what ships, bit for bit, and the backward makes a gradient of n rows and
none of the table:

    embedding   d rows = sum over tokens t with token_t = ids_i of d y_t
    head        d x = d y W,   d rows = (d y)[:, ids]^T x

A head that is tied to the embedding is one table with one set of rows, which learns from both. What the rows
began with lies beside them, for whoever asks for the base alone.

Rows of the codes of a vector code (vector_codes/) can be made of fewer vectors; digits d_i of n_i levels:

    E(k) = e_0 + sum_i e_(i, d_i(k))      e_(i, 0) = 0: 1 + sum_i (n_i - 1) vectors; of n bits, n + 1

The logits of a head are then linear in the digits, and the softmax over all codes is a product of one for
each digit: given the hidden state, digits are drawn independently. Sums are made in fp32, in one order, digit
by digit; they are rounded and written like any other row, so nobody who loads the model knows. With the
shares P [n, p] of 0 and 1, rows = P vectors, and

    embedding   d vectors = sum over tokens t of P[i(t)]^T d y_t
    head        d vectors = ((d y)[:, ids] P)^T x
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .linear import embedding_factor

SLOT = "trained_rows"  # their name in the module
PEFT_KEY = "token_adapter.trainable_tokens_delta"  # of PEFT's trainable_token_indices


class NewRows(nn.Module):
    """The fp32 masters of the rows `ids` of a table. off: the table is what it was.

    levels: of the digits of a code whose points the last ids are, in their order, so that `rows` holds a row
    for each id before them and then the vectors that theirs are made of. These must begin alike, as e_0, of
    which `before` has one.
    """

    ids: Tensor
    before: Tensor
    shares: Tensor | None
    off: bool = False

    def __init__(self, table: Tensor, ids: Sequence[int], levels: Sequence[int] = ()) -> None:
        super().__init__()
        where = torch.tensor(list(ids), dtype=torch.int64, device=table.device)
        self.levels = tuple(levels)
        self.register_buffer("ids", where, persistent=False)
        self.alone = len(where) - math.prod(self.levels) if self.levels else len(where)
        shares = shares_of(self.alone, self.levels).to(table.device) if self.levels else None
        self.register_buffer("shares", shares, persistent=False)
        begun = where if shares is None else where[: self.alone + 1]
        self.register_buffer("before", table.detach()[begun].clone(), persistent=False)
        rows = self.before.to(torch.float32, copy=True)
        if shares is not None:
            rows = torch.cat([rows, rows.new_zeros(shares.shape[1] - len(rows), rows.shape[1])])
        self.rows = nn.Parameter(rows)

    @property
    def each(self) -> Tensor:
        """A row for each id [n, H], fp32; what is trained itself where nothing is made of vectors."""
        if not self.levels:
            return self.rows
        first = self.alone
        made, place = self.rows[first : first + 1], first + 1
        for count in self.levels:  # the lowest digit first, as ids_of counts
            made = torch.cat([made, *(made + step for step in self.rows[place : place + count - 1])])
            place += count - 1
        return torch.cat([self.rows[:first], made])

    @property
    def begun(self) -> Tensor:
        """What they were before training [n, H], as the table has it."""
        codes = self.before[self.alone :]
        return torch.cat([self.before[: self.alone], codes.expand(len(self.ids) - self.alone, -1)])

    def write(self, table: Tensor) -> Tensor:
        """The table [V, H] with these rows as they ship, in place: nothing is ever recorded of it."""
        with torch.no_grad():
            table.data[self.ids] = (self.begun if self.off else self.each).to(table.dtype)
        return table

    def looked_up(self, tokens: Tensor) -> Tensor:
        """float [T, p] of tokens [T]: how much of each of `rows` a token's own row is; 0 for an old one."""
        if self.shares is None:
            return (self.ids[:, None] == tokens[None]).float().t()
        order = self.ids.argsort()
        place = order[torch.searchsorted(self.ids[order], tokens).clamp_max(len(order) - 1)]
        return self.shares[place].float() * (self.ids[place] == tokens)[:, None]

    def gathered(self, values: Tensor) -> Tensor:
        """values [T, n], one for each id -> [T, p], one for each of `rows`."""
        return values if self.shares is None else values @ self.shares.float()

    def _apply(self, fn: Any, recurse: bool = True) -> NewRows:
        """`.to(dtype)` leaves the masters fp32."""
        return super()._apply(lambda t: fn(t).to(t.dtype) if t is self.rows else fn(t), recurse)


class _Looked(torch.autograd.Function):
    """look(tokens) [..., H], with the gradient of the rows that were looked up."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, rows: Tensor, tokens: Tensor, own: NewRows, look: Callable[[Tensor], Tensor], factor: float
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.own, ctx.factor = own, factor
        return look(tokens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (tokens,) = ctx.saved_tensors
        # a product and not a scatter: the same sums in the same order, so that a resumed run is bit-equal
        hits = ctx.own.looked_up(tokens.reshape(-1)).t()
        return hits @ dy.reshape(-1, dy.shape[-1]).float() * ctx.factor, None, None, None, None


class _Product(torch.autograd.Function):
    """x W^T [..., V], with the gradients of x and of the rows `ids` of W."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, rows: Tensor, own: NewRows, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.own = own
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        ids = ctx.own.ids
        own = ctx.own.gathered(dy[..., ids].reshape(-1, len(ids)).float())
        rows = own.t() @ x.reshape(-1, x.shape[-1]).float()
        return (dy.to(weight.dtype) @ weight).to(x.dtype), rows, None, None


def shares_of(alone: int, levels: Sequence[int]) -> Tensor:
    """bool [alone + prod levels, p]: of which of the p rows of NewRows each row is the sum."""
    count = math.prod(levels)
    parts = [torch.ones(count, 1, dtype=torch.bool)]
    stride = 1
    for size in levels:
        digit = torch.arange(count) // stride % size
        parts.append(digit[:, None] == torch.arange(1, size))
        stride *= size
    return torch.block_diag(torch.eye(alone, dtype=torch.bool), torch.cat(parts, 1)).bool()


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


def train_rows(model: nn.Module, tables: Mapping[str, Sequence[int]], levels: Sequence[int] = ()) -> None:
    """Let these rows of the tables of these modules train; modules that share a table share its rows. levels:
    NewRows. ValueError for a module that is neither an embedding nor a plain linear layer without a bias."""
    shared: dict[int, NewRows] = {}
    wanted = {id(table_of(model.get_submodule(name))): ids for name, ids in tables.items()}
    for name, module in list(model.named_modules()):
        table = module._parameters.get("weight")
        if table is None or id(table) not in wanted:
            continue
        if reason := untrainable(module):
            raise ValueError(f"model.add_tokens: {name} {reason}")
        if id(table) not in shared:
            shared[id(table)] = NewRows(table, wanted[id(table)], levels)
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
        made = _Looked.apply(own.rows, tokens, own, look, 1.0 if factor is None else factor)
        assert isinstance(made, Tensor)
        return made

    def multiplied(self: Any, x: Tensor) -> Tensor:
        own: NewRows = self._modules[SLOT]
        weight = own.write(self._parameters["weight"])
        if own.off or not torch.is_grad_enabled():
            return kind.forward(self, x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        made = _Product.apply(x, own.rows, own, weight)
        assert isinstance(made, Tensor)
        return made

    forward = looked if issubclass(kind, nn.Embedding) else multiplied
    made: type[nn.Module] = type(kind.__name__, (kind,), {"forward": forward})  # pyright: ignore[reportAssignmentType]
    return made

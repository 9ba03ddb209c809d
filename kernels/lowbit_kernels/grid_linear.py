"""grid_linear: a linear layer whose weight is trained on its integer grid, as one differentiable op.

Forward is two ops and nothing else:   codes = grid_codes(base, A, B, S, z, T);   y = packed_matmul(x, codes,
                                       S, z, T)
so what training multiplies with is what merge() writes. For backward only x and the small tensors are saved:
codes are recomputed, and dW = dY^T X exists one chunk of rows at a time (`grid_gradients`). Straight-through
on round, true gradient of clip. With q = code - z, v from codes.py, M = 1 where the clip is inactive (tested
on round(v) for round_then_clip, on v for clip_then_round), sums over the inputs of a group:

    frozen grid (units "grid", "weight")    dS = sum dW q                       dT = sum dW
                                            dD = S M dW  (times 1/s0 for "weight")
    live grid   (units "live")              dS = sum dW (q - M (v - z))         dT = sum dW (1 - M)        LSQ
                                            dD = M dW
    dA = gain B^T dD        dB = gain dD A^T        dX = dY W

In the live case z may be a rounded trained value: its gradient is -S dT, which the caller gets by passing T =
-S (z - sg(z)). The LSQ difference q - v is formed before the sum, because the two sums cancel (at 8 bit about
250-fold).

Where a weight is masked (codes.py) dW is put to 0 first: it is 0 whatever trains.

A dense part of some rows (units "grid", codes.py) costs dX and R / N of a product: dD and the scales of its
rows come from dW of those rows (grid_rows.py); the scales of all other rows from the row-wise identity of
estimates.py where a row has one, else from dW of the share `tokens` of the tokens.

`step_codes`, when given, are the codes that grid_codes makes of these very arguments, made once for all
forwards and backwards of an optimizer step; they are taken on trust. `low_rank` and `tokens` choose cheaper
gradients (estimates.py): "exact" with a low-rank part is the equations above.
"""

import torch
from torch import Tensor

from .codes import grid_codes, grid_values, locked
from .estimates import LOW_RANK, grid_estimates
from .grid import GridWeight, flat
from .grid_rows import grid_row_gradients
from .layout import group_count, grouped, outside_autocast, per_group, row_chunks, ungrouped, unpack_rows
from .matmul import packed_matmul, packed_matmul_dx


@torch.library.custom_op("lowbit::grid_gradients", mutates_args=())
@outside_autocast
@flat
def grid_gradients(
    x: Tensor,
    dy: Tensor,
    grid: GridWeight,
    group_size: int,
    clip_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dS [G, N], dT [G, N], dA [r, K], dB [N, r] in fp32 from x [M, K] and dy [M, N] (equations at the file's
    head).

    dA and dB have shape [0] without a low-rank part. Transient memory: a few fp32 chunks of
    layout.CHUNK_ELEMENTS.
    """
    codes, _, scale0, _, a, b, delta, _, scale, zero, _, _, gain, units, bits, _, lowest = grid
    assert delta is None, "grid_row_gradients is its op"
    (n, k), top = (codes.shape[0], x.shape[-1]), (1 << bits) - 1
    trained = grid.live or a is not None
    ds = torch.empty(scale.shape, dtype=torch.float32, device=x.device)
    dt = torch.empty_like(ds)
    da = torch.zeros(a.shape if a is not None else (0,), dtype=torch.float32, device=x.device)
    db = torch.empty(b.shape if b is not None else (0,), dtype=torch.float32, device=x.device)
    for rows in row_chunks(n, k):
        dw = grouped((dy[:, rows].t() @ x).float(), group_size)
        if (zeros := locked(rows, grid, k, group_size)) is not None:
            dw.masked_fill_(zeros, 0)
        z = float(1 << (bits - 1)) if zero is None else per_group(zero, rows)
        if not trained:
            q = grouped(unpack_rows(codes[rows], bits, k, torch.float32), group_size) - z
            ds[:, rows] = (dw * q).sum(-1).t()
            dt[:, rows] = dw.sum(-1).t()
            continue
        value = grid_values(rows, grid, k, group_size)
        rounded = value.round()
        inside = value if clip_first else rounded
        mask = (inside >= lowest) & (inside <= top)
        code = rounded.clamp_(lowest, top)
        masked = dw * mask
        if units == "live":
            # inside: q - (v - z) = code - v;  outside: q = code - z
            ds[:, rows] = (dw * torch.where(mask, code - value, code - z)).sum(-1).t()
            dt[:, rows] = (dw - masked).sum(-1).t()
        else:
            ds[:, rows] = (dw * (code - z)).sum(-1).t()
            dt[:, rows] = dw.sum(-1).t()
            factor = per_group(scale, rows)
            masked.mul_(factor if units == "grid" else factor / per_group(scale0, rows))
        if a is not None and b is not None:
            dd = ungrouped(masked, k)
            db[rows] = (dd @ a.float().t()) * gain
            da += (b[rows].float() * gain).t() @ dd
    return ds, dt, da, db


@grid_gradients.register_fake
@flat
def _(x, dy, grid, group_size, clip_first):
    def like(t):
        return x.new_empty(t.shape if t is not None else (0,), dtype=torch.float32)

    return like(grid.scale), like(grid.scale), like(grid.a), like(grid.b)


@torch.library.custom_op("lowbit::grid_linear", mutates_args=())
@outside_autocast
@flat
def grid_linear(
    x: Tensor,
    grid: GridWeight,
    group_size: int,
    clip_first: bool,
    step_codes: Tensor | None = None,
    low_rank: str = "exact",
    tokens: float = 1.0,
) -> Tensor:
    """x [..., K] -> [..., N]. Differentiable in x, a [r, K], b [N, r], scale [G, N] and offset [G, N] (file
    head), and in delta [R, K].
    """
    if low_rank not in LOW_RANK or not 0 < tokens <= 1:
        raise ValueError(
            f"low_rank={low_rank!r}, tokens={tokens}: allowed are {LOW_RANK} and a share above 0, at most 1"
        )
    if grid.mask is not None and (
        grid.low and low_rank != "exact" or grid.offset is not None and not grid.live
    ):
        raise ValueError(
            f"a mask with low_rank={low_rank!r}{' and an offset' * (grid.offset is not None)}: it needs "
            "low_rank='exact', and no offset on a frozen grid"
        )
    new = grid_codes(*grid, x.shape[-1], group_size) if step_codes is None else step_codes
    return packed_matmul(x, new, grid.scale, grid.zero, grid.offset, grid.bits, group_size)


@grid_linear.register_fake
@flat
def _(x, grid, group_size, clip_first, step_codes=None, low_rank="exact", tokens=1.0):
    return x.new_empty(*x.shape[:-1], grid.codes.shape[0])


def _estimated(grid: GridWeight, low_rank: str, tokens: float) -> bool:
    """Whether the cheaper gradients are asked for. Exact ones of a low-rank part, or of a dense one of all
    rows, need dW of every token, and the scales' is then free.
    """
    return low_rank != "exact" or (not grid.low and tokens < 1)


_FIRST = 1  # the place of the grid's fields in the op's arguments, after x
_PLACE = {name: _FIRST + i for i, name in enumerate(GridWeight._fields)}
_TENSORS = _PLACE["gain"]  # tensors come before numbers


def _setup(ctx, inputs, output):
    x, grid = inputs[0], GridWeight(*inputs[_FIRST : _FIRST + len(GridWeight._fields)])
    group_size, clip_first, step_codes, low_rank, tokens = inputs[_FIRST + len(GridWeight._fields) :]
    row_wise = group_count(x.shape[-1], group_size) == 1 and not grid.live
    row_wise = row_wise and ctx.needs_input_grad[_PLACE["scale"]]
    y = output if row_wise and (grid.rows is not None or _estimated(grid, low_rank, tokens)) else None
    assert grid.scale.shape[0] == 1 or y is None
    ctx.save_for_backward(*inputs[:_TENSORS], step_codes, y)
    ctx.numbers, ctx.static = inputs[_TENSORS : _FIRST + len(GridWeight._fields)], (group_size, clip_first)
    ctx.cheaper = (low_rank, tokens)


def _backward(ctx, dy):
    x, *tensors, new, y = ctx.saved_tensors
    grid, (group_size, clip_first) = GridWeight(*tensors, *ctx.numbers), ctx.static
    k, need = x.shape[-1], {name: ctx.needs_input_grad[place] for name, place in _PLACE.items()}
    dx = ds = dt = da = db = dd = None
    low, scales = need["a"] or need["b"], need["scale"] or need["offset"]
    estimated, moved = _estimated(grid, *ctx.cheaper), grid.delta is not None
    # All rows have their scales' gradients from the dense part; of some, the others are estimated.
    estimated = grid.rows is not None if moved else estimated
    if new is None and (ctx.needs_input_grad[0] or (estimated and scales and y is None)):
        new = grid_codes(*grid, k, group_size)
    if ctx.needs_input_grad[0]:
        dx = packed_matmul_dx(dy, new, grid.scale, grid.zero, grid.offset, grid.bits, k, group_size)
    rows = (x.reshape(-1, k), dy.reshape(-1, dy.shape[-1]))
    if estimated and (low or scales):
        output = None if y is None else y.reshape(-1, y.shape[-1])
        rest = (group_size, clip_first, *ctx.cheaper, low, scales)
        ds, dt, da, db = grid_estimates(*rows, output, new, *grid, *rest)
    elif (low or scales) and not moved:
        ds, dt, da, db = grid_gradients(*rows, *grid, group_size, clip_first)
    if moved and (need["delta"] or scales):
        some_s, some_t, dd = grid_row_gradients(*rows, *grid, group_size, clip_first)
        if ds is None or dt is None or grid.rows is None:
            ds, dt = some_s, some_t
        else:
            ds, dt = ds.index_copy(1, grid.rows, some_s), dt.index_copy(1, grid.rows, some_t)
    grads = {"a": da, "b": db, "delta": dd, "scale": ds, "offset": dt}
    out = [dx, *[None] * (len(ctx.needs_input_grad) - 1)]
    for name, grad in grads.items():
        # A custom op must return None, not a tensor, for what was not asked for or not given.
        if need[name] and grad is not None:
            out[_PLACE[name]] = grad.to(getattr(grid, name).dtype)
    return tuple(out)


grid_linear.register_autograd(_backward, setup_context=_setup)

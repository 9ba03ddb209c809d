"""grid_estimates: gradients of everything trained without dW = dY^T X of all tokens, the third GEMM of a
layer.

Letters: M tokens, N out features, K in features, G groups of g inputs, r rank; X_g, A_g are the columns of
one group; F is the factor between dW and dD: S (units "grid"), S / s0 ("weight"), 1 ("live").

Low rank. Without the mask M of the clip, dD = F dW, and F is one number per row and group. So the sum over
tokens goes last:

    dB = gain sum_g F_g * (dY^T P_g)        P_g = X_g A_g^T          [M, r] per group
    dA_g = gain Q_g^T X_g                   Q_g = dY (F_g * B)       [M, r] per group

which is 2 r / g of a GEMM (2 r / K with one factor per row) where dW is a whole one. `low_rank`:

    factorised    these equations: entries where the clip is active get a gradient too
    corrected     the clipped part is taken from the tokens drawn below, as a control variate:
                  factorised(all) + exact(drawn) - factorised(drawn), the drawn weighted as below: its mean
                  over the draws is the exact gradient. The first and the last term are one pass in which
                  token m has weight 1 - (sum of its draws' weights)

A sparse correction (gather dY[:, n] X[:, k] of each clipped entry) reads 4 M bytes an entry: by the bandwidth
of an H200, 1 % clipped would take as long as three to four GEMMs (a CPU took 1.9), and their number is known
to the device only. Hence the control variate: no new kernel, no wait for the device.

Scales (and offsets) from n = round(tokens M) draws of the M tokens. Token m has the share s_m of a line of
length one, in proportion to |dY_m| |X_m|, the size of its part of dW, plus a tenth of their mean; n
equidistant points with one random start mark who is drawn; a draw weighs 1 / (n s_m). Every token is drawn n
s_m times on average, so the estimate is unbiased, and tokens with small gradients are left out first: at the
same n the error was a quarter smaller than with equal shares (LOG.md). Shares are integers, so their running
sum does not depend on the order of additions. The start comes from the default generator of the device, which
checkpoints keep and in which processes differ.

One group per row and a frozen grid need no tokens: with the layer's own output, Y = S X (code - z)^T + T X 1,

    dS[n] = sum_m dY[m, n] (Y[m, n] - T sum_k X[m, k]) / S[n]
"""

import torch
from torch import Tensor

from .grid import GridWeight, flat
from .layout import group_count, grouped, outside_autocast, per_group, row_chunks, ungrouped

LOW_RANK = ("exact", "factorised", "corrected")
# Elements of the largest transient of the factorised form, [M, groups r] or [N, groups r]: 16 MB in fp32.
TRANSIENT = 1 << 22
EVEN = 0.1  # of the mean size, added to each: bounds a draw's weight to ten times that of equal shares
RESOLUTION = 4096.0  # the mean size as an integer


def drawn_count(tokens: int, share: float) -> int:
    """How many draws: the nearest number to share * tokens, at least one."""
    return tokens if share >= 1 else max(1, round(share * tokens))


def lengths(x: Tensor, dy: Tensor) -> Tensor:
    """Int64 [M]: the length of each token on the line, at least 1. A token that is not finite has half of the
    line: it must be seen.
    """
    size = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) * torch.linalg.vector_norm(
        dy, dim=1, dtype=torch.float32
    )
    finite = torch.where(size.isfinite(), size, 0.0)
    size = torch.where(size.isfinite(), size + EVEN * finite.mean(), (1 + EVEN) * finite.sum())
    return (
        (size * (RESOLUTION / finite.mean().clamp_min(1e-30)))
        .nan_to_num(0.0, RESOLUTION, 0.0)
        .long()
        .clamp_min(1)
    )


def drawn(length: Tensor, count: int, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows int64 [count], their weights [count], the weights' sum by token [M]) in fp32, from lengths [M]
    and start [1] in [0, 1).
    """
    ends = length.cumsum(0).double()  # integers below 2^53: exact
    points = (start.double() + torch.arange(count, device=length.device)) * (ends[-1] / count)
    rows = torch.searchsorted(ends, points, right=True).clamp_(max=len(length) - 1)
    below = torch.searchsorted(points, ends)  # how many points lie below the end of each token
    below[-1:].fill_(count)  # an assignment would copy the number from the host and wait for it
    weight = ends[-1] / (count * length.double())
    return rows, weight[rows].float(), (below.diff(prepend=below.new_zeros(1)) * weight).float()


def random_start(device: torch.device) -> Tensor:
    """One draw of the default generator of the device; the host does not wait for it."""
    return torch.rand(1, device=device)


def factorised(
    x: Tensor,
    dy: Tensor,
    a: Tensor,
    b: Tensor,
    factor: Tensor | None,
    gain: float,
    group_size: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dA [r, K] and dB [N, r] in fp32 as if nothing were clipped. factor [G, N] or None (1); weights [M, 1]
    or None (1): of the tokens.

    In the order that costs less: P and Q per group, or dW in chunks of rows.
    """
    (m, k), n, rank = x.shape, dy.shape[1], a.shape[0]
    if factor is None:
        factor, group_size = torch.ones(1, n, device=x.device), -1
    groups = group_count(k, group_size)
    small = b.float() * gain
    if group_size > 0 and 2 * m * rank * (k + n * groups) > m * n * k + 2 * n * k * rank:
        return _by_rows(
            x, dy if weights is None else dy * weights.to(dy.dtype), a, small, factor, gain, group_size
        )
    da = torch.empty(rank, k, dtype=torch.float32, device=x.device)
    db = torch.zeros(n, rank, dtype=torch.float32, device=x.device)
    for first, last, width in _spans(groups, k, group_size, max(1, TRANSIENT // (max(m, n) * rank))):
        count, start = last - first, first * max(group_size, 0)
        columns = slice(start, start + count * width)
        part = (
            x[:, columns].view(m, count, width).transpose(0, 1) if count > 1 else x[None, :, columns]
        )  # [count, M, width]
        wide = factor[first:last].t().float()  # [N, count]
        right = a[:, columns].to(x.dtype).view(rank, count, width).permute(1, 2, 0)  # [count, width, r]
        p = torch.bmm(part, right).transpose(0, 1).reshape(m, count * rank)
        q = dy @ (wide[:, :, None] * small[:, None, :]).reshape(n, count * rank).to(dy.dtype)
        if weights is not None:
            p, q = p * weights.to(p.dtype), q * weights.to(q.dtype)
        db += ((dy.t() @ p).float().view(n, count, rank) * wide[:, :, None]).sum(1)
        left = q.view(m, count, rank).permute(1, 2, 0)  # [count, r, M]
        da[:, columns] = torch.bmm(left, part).float().transpose(0, 1).reshape(rank, count * width)
    return da, db.mul_(gain)


def _spans(groups: int, k: int, group_size: int, at_once: int) -> list[tuple[int, int, int]]:
    """(first group, last group + 1, channels per group): at most `at_once` groups together, a ragged last one
    alone.
    """
    if groups == 1:
        return [(0, 1, k)]
    whole = k // group_size
    spans = [(i, min(i + at_once, whole), group_size) for i in range(0, whole, at_once)]
    return spans if whole == groups else [*spans, (whole, groups, k - whole * group_size)]


def _by_rows(
    x: Tensor, dy: Tensor, a: Tensor, small: Tensor, factor: Tensor, gain: float, group_size: int
) -> tuple[Tensor, Tensor]:
    """The same sums through dW, one chunk of rows at a time."""
    n, k = dy.shape[1], x.shape[1]
    da = torch.zeros(a.shape, dtype=torch.float32, device=x.device)
    db = torch.empty(n, a.shape[0], dtype=torch.float32, device=x.device)
    for rows in row_chunks(n, k):
        dw = grouped((dy[:, rows].t() @ x).float(), group_size)
        dd = ungrouped(dw * per_group(factor, rows), k)
        db[rows] = (dd @ a.float().t()) * gain
        da += small[rows].t() @ dd
    return da, db


@torch.library.custom_op("lowbit::grid_estimates", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
@outside_autocast
@flat
def grid_estimates(
    x: Tensor,
    dy: Tensor,
    y: Tensor | None,
    step_codes: Tensor | None,
    grid: GridWeight,
    group_size: int,
    clip_first: bool,
    low_rank: str,
    tokens: float,
    need_low_rank: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dS [G, N], dT [G, N], dA [r, K], dB [N, r] in fp32 from x [M, K] and dy [M, N]; what is not needed has
    shape [0].

    y [M, N]: the layer's output, for the row-wise identity (else None). step_codes: what grid_codes gives,
    needed for a frozen grid.
    """
    assert low_rank in LOW_RANK, low_rank
    exact_op = torch.ops.lowbit.grid_gradients  # late: grid_linear.py, which declares it, imports this file
    a, b, scale, offset = grid.a, grid.b, grid.scale, grid.offset
    m, low = x.shape[0], need_low_rank and grid.low
    # No two results of an op may share memory.
    ds, dt, da, db = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(4))
    rest = (group_size, clip_first)
    correct, identity = low and low_rank == "corrected", need_scale and y is not None
    xs, dys, weights, part = x, dy, None, False
    if correct or (need_scale and not identity):
        count = drawn_count(m, tokens)
        if part := count < m:
            rows, weight, sums = drawn(lengths(x, dy), count, random_start(x.device))
            xs, dys = x[rows], (dy[rows].float() * weight[:, None]).to(dy.dtype)
            weights = 1.0 - sums[:, None]
    if low and (part or not correct):  # corrected with all tokens drawn: nothing is left to estimate
        factor = None if grid.live else scale.float()
        if grid.units == "weight":
            factor = scale.float() / grid.scale0.float()
        assert a is not None and b is not None
        da, db = factorised(x, dy, a, b, factor, grid.gain, group_size, weights if correct else None)
    if correct or (need_scale and grid.live):
        ds, dt, more_a, more_b = exact_op(xs, dys, *grid, *rest)
        if correct:
            da, db = (da.add_(more_a), db.add_(more_b)) if part else (more_a, more_b)
    elif need_scale and not identity:
        # A frozen grid: dS = sum dW (code - z) needs the codes alone, neither the base nor the low-rank
        # product again.
        assert step_codes is not None
        plain = dict.fromkeys(("residual", "a", "b", "delta", "rows")) | {"units": "grid", "residual_bits": 0}
        ds, dt, _, _ = exact_op(xs, dys, *grid._replace(codes=step_codes, **plain), *rest)
    if not need_scale:
        return ds.new_empty(0), dt.new_empty(0), da, db
    if y is None:
        return ds, dt, da, db
    column = dy.t().float() @ x.float().sum(1)  # sum over tokens and inputs of dW
    total = torch.linalg.vecdot(dy.t().float(), y.t().float())
    if offset is not None:
        total = total - offset[0].float() * column
    return (total / scale[0].float()).unsqueeze(0), column.unsqueeze(0), da, db


@grid_estimates.register_fake
@flat
def _(x, dy, y, step_codes, grid, group_size, clip_first, low_rank, tokens, need_low_rank, need_scale):
    def like(t, wanted):
        return x.new_empty(t.shape if wanted and t is not None else (0,), dtype=torch.float32)

    low = need_low_rank and grid.low
    scales = like(grid.scale, need_scale), like(grid.scale, need_scale)
    return *scales, like(grid.a, low), like(grid.b, low)

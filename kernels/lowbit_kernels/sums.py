"""group_sums: the sum of the codes of every group, [G, N]. Integers, so exact in any order and on any device.

The reference is the only implementation: torch's own ops on chunks of unpacked rows, on every device. It
reads the codes once, where the product beside it reads them for every tile of tokens.
"""

import torch
from torch import Tensor

from .layout import group_count, grouped, row_chunks, unpack_rows


@torch.library.custom_op("lowbit::group_sums", mutates_args=())
def group_sums(codes: Tensor, bits: int, in_features: int, group_size: int) -> Tensor:
    """codes int16 [N, W] (P16) -> fp32 [G, N]: unsigned codes, without their zero points. Exact up to 2^24,
    which is more than a row of 65,000 codes of 8 bits sums to.
    """
    out = torch.empty(group_count(in_features, group_size), codes.shape[0], device=codes.device)
    for rows in row_chunks(codes.shape[0], in_features):
        values = unpack_rows(codes[rows], bits, in_features, torch.float32)
        out[:, rows] = grouped(values, group_size).sum(-1).t()
    return out


@group_sums.register_fake
def _(codes, bits, in_features, group_size):
    groups = group_count(in_features, group_size)
    return torch.empty(groups, codes.shape[0], dtype=torch.float32, device=codes.device)

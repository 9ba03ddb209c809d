"""Codes as one bit stream, lowest bit first: how compressed-tensors, GPTQ and MLX store integers (3 bits
straddle words).

Both sides use it: exporters write such streams, and checkpoints that come in quantized are read from them.
"""

import torch
from torch import Tensor


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] codes -> int32 [R, ceil(C bits / 32)], a bit stream along C, lowest bit first.

    32 codes are exactly `bits` words, so each word is a fixed sum of shifted columns of a [R, C/32, 32] view.
    """
    rows, columns = codes.shape
    blocks = torch.nn.functional.pad(codes, (0, -columns % 32)).view(rows, -1, 32)
    words = torch.zeros(rows, blocks.shape[1], bits, dtype=torch.int32, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = blocks[:, :, i].to(torch.int32)
        words[:, :, word] |= code << shift
        if shift + bits > 32:
            words[:, :, word + 1] |= code >> (32 - shift)
    return words.view(rows, -1)[:, : stream_words(columns, bits)].contiguous()


def unpack_stream(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_stream`: int32 [R, ceil(C bits / 32)] -> uint8 [R, C]."""
    rows, mask = words.shape[0], (1 << bits) - 1
    blocks = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).view(rows, -1, bits)
    codes = torch.empty(rows, blocks.shape[1], 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        low = 32 - shift  # bits of this word at and above the shift
        # >> is arithmetic on int32: mask the sign copies away before the rest is put on top.
        code = (blocks[:, :, word] >> shift) & (mask if low >= bits else (1 << low) - 1)
        if low < bits:
            code = code | ((blocks[:, :, word + 1] << low) & mask)
        codes[:, :, i] = code
    return codes.view(rows, -1)[:, :columns]


def stream_words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)

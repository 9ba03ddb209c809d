"""What the Triton kernels share: reading P16 codes as exact floats, rounding, split sums, and facts about the
launch.

Unpacking without integer-to-float conversion. A 16-bit float with a fixed exponent is an integer in its low
bits: or-ing a field of the half-word into 128.0 (bf16, 7 mantissa bits) or 1024.0 (fp16, 10 bits) gives 128 +
2^r code at once, r the place of the field in the mantissa, and one fused multiply-add subtracts 128 and the
zero and undoes 2^r, exactly. Both work on two half-words per register (lop3, fma.bf16x2), so a code costs
about one instruction. Several fields fit in one mantissa (`_window`), so most planes need no shift at all.
The inline assembly is lane-wise: it never looks across the two halves.

Every such helper has a plain twin, chosen by the constexpr ASM: for fp32 compute, for the interpreter (which
knows neither inline assembly nor bfloat16 arithmetic) and for targets that are not NVIDIA's.
"""

# Triton's language is typed for its compiler: launch options are no parameters of a kernel, and what is a
# number on the host is a constexpr in a signature.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import LANES, LINES, PLANES

# Whether this process interprets kernels on the CPU. Triton decides it when a kernel is decorated, so it is
# read once.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]

LANE = tl.constexpr(LANES)  # half-words per superblock of one row = input channels per plane
COMPUTE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# ------------------------------------------------------------------------------------------------ on the host


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels multiply in for inputs of `dtype`: the same, but fp32 under the interpreter."""
    return torch.float32 if INTERPRETED else dtype


def use_asm(dtype: torch.dtype) -> bool:
    """Whether kernels computing in `dtype` may use PTX: 16-bit floats on NVIDIA, compiled."""
    return not INTERPRETED and dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None


def launch_options(config: dict) -> dict:
    """What of a table entry is for the compiler. maxnreg: left alone, ptxas aims at more programs per
    multiprocessor on some architectures and spills for it."""
    return {name: config[name] for name in ("num_warps", "num_stages", "maxnreg") if name in config}


def fields(bits: int) -> int:
    """Planes per superblock."""
    return PLANES[bits]


def plane_group(group_size: int, in_features: int) -> int:
    """The group size as kernels take it: a multiple of 32, or 0 for one group per row.

    A plane (32 channels) must not be split by a group. ValueError otherwise; `supported` asks first.
    """
    if group_size == -1 or group_size >= in_features:
        return 0
    if group_size <= 0 or group_size % LANES:
        raise ValueError(
            f"group_size={group_size}: kernels take -1, multiples of {LANES}, or at least K={in_features}"
        )
    return group_size


def supported(bits: int, group_size: int, in_features: int) -> bool:
    """Whether the kernels can read this grid; the reference can read every one."""
    whole_row = group_size == -1 or group_size >= in_features
    return bits in PLANES and (whole_row or (group_size > 0 and group_size % LANES == 0))


def rows_of(x: Tensor) -> Tensor:
    """[..., K] -> [M, K] with contiguous channels, without a copy where it can be avoided."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


# ------------------------------------------------------------------------------------------------ PTX texts


@triton.constexpr_function
def _bf16(dtype) -> bool:
    return dtype == tl.bfloat16


@triton.constexpr_function
def _window(bits, plane, bf16):
    """(shift, r): field `plane` is brought to bit r of the mantissa by a right shift; planes of one window
    share the shift.
    """
    bits, plane = int(bits), int(plane)
    per = (7 if bf16 else 10) // bits
    shift = plane // per * per * bits
    return shift, plane * bits - shift


@triton.constexpr_function
def _twice(value):
    return f"0x{int(value) & 0xFFFF:04X}{int(value) & 0xFFFF:04X}"


@triton.constexpr_function
def _float_bits(value, bf16):
    """The 16 bits of a float that bf16 / fp16 holds exactly."""
    import struct

    if bf16:
        raw = struct.unpack("<I", struct.pack("<f", float(value)))[0]
        assert raw & 0xFFFF == 0, value
        return raw >> 16
    raw = struct.unpack("<H", struct.pack("<e", float(value)))[0]
    assert struct.unpack("<e", struct.pack("<H", raw))[0] == float(value), value
    return raw


@triton.constexpr_function
def _base(bits, plane, bf16):
    """What the magic number adds to the code, in code units: 128 / 2^r or 1024 / 2^r."""
    return (128.0 if bf16 else 1024.0) / (1 << _window(bits, plane, bf16)[1])


@triton.constexpr_function
def _magic_text(bits, plane, zero, bf16):
    """PTX from a pair of half-words $1 to a pair of floats $0 = field `plane` - zero; the zero is the number
    given, or, where that is None, -(base + zero) comes in as $2."""
    bits, plane = int(bits), int(plane)
    kind = "bf16x2" if bf16 else "f16x2"
    if bits == 8 and bf16:
        # 8 bits do not fit in 7: the low seven make t = 128..255, the top bit, inverted, picks h = -256 (0)
        # or -128 (1), and t + h = code - 128 is an exact integer.
        add = f"mov.b32 a,{_twice(_float_bits(128.0 - zero, True))};" if zero is not None else "mov.b32 a,$2;"
        move = "mov.b32 u,$1;" if plane == 0 else "shr.u32 u,$1,8;"
        tail = "mov.b32 $0,t;" if zero == 128 else f"fma.rn.{kind} $0,t,m,a;"
        return (
            "{ .reg .b32 u,h,t,m,a; "
            + move
            + " mov.b32 m,0x3F803F80; "
            + add
            + " lop3.b32 t,u,0x007F007F,0x43004300,0xea; "
            "lop3.b32 h,u,0x00800080,0xC300C300,0xae; fma.rn." + kind + " t,t,m,h; " + tail + " }"
        )
    shift, r = _window(bits, plane, bf16)
    magic = _twice(0x4300 if bf16 else 0x6400)
    mask = _twice(((1 << bits) - 1) << r)
    mul = _twice(_float_bits(1.0 / (1 << r), bf16))
    add = (
        "mov.b32 a,$2;"
        if zero is None
        else f"mov.b32 a,{_twice(_float_bits(-(_base(bits, plane, bf16) + zero), bf16))};"
    )
    pick = f"lop3.b32 t,$1,{mask},{magic},0xea;"
    if shift:
        pick = f"shr.u32 t,$1,{shift}; lop3.b32 t,t,{mask},{magic},0xea;"
    return (
        "{ .reg .b32 t,m,a; mov.b32 m," + mul + "; " + add + " " + pick + " fma.rn." + kind + " $0,t,m,a; }"
    )


@triton.constexpr_function
def _sign_text(plane, bf16):
    """PTX from a pair of half-words to a pair of +-1: bit `plane` becomes an inverted sign bit of 1.0."""
    one = _twice(0x3F80 if bf16 else 0x3C00)
    shift = 15 - int(plane)
    move = f"shl.b32 u,$1,{shift};" if shift else "mov.b32 u,$1;"
    # (not u & 0x8000) | 1.0: bit 1 means +1. Truth table of (~a & b) | c with a = 0xF0, b = 0xCC, c = 0xAA:
    # 0xAE.
    return "{ .reg .b32 u; " + move + " lop3.b32 $0,u,0x80008000," + one + ",0xae; }"


@triton.constexpr_function
def _mul_text(bf16):
    return (
        "mul.rn.f16x2 $0,$1,$2;"
        if not bf16
        else "{ .reg .b32 z; mov.b32 z,0x80008000; fma.rn.bf16x2 $0,$1,$2,z; }"
    )


@triton.constexpr_function
def _fma_text(bf16):
    return "fma.rn.bf16x2 $0,$1,$2,$3;" if bf16 else "fma.rn.f16x2 $0,$1,$2,$3;"


# ------------------------------------------------------------------------------------------------ in kernels


@triton.constexpr_function
def lines_of(bits):
    """Lines of LANE half-words that a superblock has."""
    return LINES[int(bits)]


@triton.constexpr_function
def place_of(bits, plane):
    """Which field of `plane_codes` a plane is."""
    return 0 if int(bits) == 6 else int(plane)


@triton.jit
def plane_codes(q, high, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Half-words that hold plane PLANE at field `place_of`: q as it is; of 6 bits the plane alone, put
    together from q, the line of its low four bits, and `high`, the line of the high two of all planes."""
    if BITS == 6:
        low = (q >> (PLANE % 4 * 4)) & 15
        if PLANE < 2:
            return low | ((high << (4 - PLANE * 2)) & 48)
        else:
            return low | ((high >> (PLANE * 2 - 4)) & 48)
    else:
        return q


@triton.jit
def round_even(v):
    """Round half to even, as torch.round, for |v| < 2^22 (fp32): adding 1.5 * 2^23 leaves no fraction bits.
    NaN stays NaN; larger values must be clamped by the caller first where they matter (they come out as large
    as they were)."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def field(q, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Field PLANE of half-words as int32, plainly. PLANE may be 0..P-1."""
    return (q.to(tl.int32) >> (BITS * PLANE)) & ((1 << BITS) - 1)


@triton.jit
def codes_symmetric(q, PLANE: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Plane PLANE of half-words q (int16, any shape) as code - 2^(BITS-1), exact, in CT. All planes of 1, 2,
    3, 4, 6, 8 bits.
    """
    if ASM:
        text: tl.constexpr = _magic_text(BITS, PLANE, 1 << (BITS - 1), _bf16(CT))
        if CT == tl.bfloat16:
            return tl.inline_asm_elementwise(text, "=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(text, "=r,r", [q], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return (field(q, PLANE, BITS) - (1 << (BITS - 1))).to(tl.float32).to(CT)


@triton.jit
def codes_raw(q, PLANE: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Plane PLANE of q as unsigned codes, exact, in CT."""
    if ASM:
        text: tl.constexpr = _magic_text(BITS, PLANE, 0, _bf16(CT))
        if CT == tl.bfloat16:
            return tl.inline_asm_elementwise(text, "=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(text, "=r,r", [q], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return field(q, PLANE, BITS).to(tl.float32).to(CT)


@triton.jit
def codes_minus(q, zero, PLANE: tl.constexpr, BITS: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Plane PLANE of q as code - zero, exact, in CT. zero: fp32 integers in 0..2^BITS-1, broadcastable to q's
    shape.
    """
    if ASM:
        text: tl.constexpr = _magic_text(BITS, PLANE, None, _bf16(CT))
        if BITS == 8 and CT == tl.bfloat16:
            add = (128.0 - zero).to(CT)
        else:
            add = (-_base(BITS, PLANE, _bf16(CT)) - zero).to(CT)
        if CT == tl.bfloat16:
            return tl.inline_asm_elementwise(
                text, "=r,r,r", [q, add], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(text, "=r,r,r", [q, add], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return (field(q, PLANE, BITS).to(tl.float32) - zero).to(CT)


@triton.jit
def signs(q, PLANE: tl.constexpr, CT: tl.constexpr, ASM: tl.constexpr):
    """Sign plane PLANE (0..15) of half-words q as +-1 in CT: bit 1 is +1."""
    if ASM:
        text: tl.constexpr = _sign_text(PLANE, _bf16(CT))
        if CT == tl.bfloat16:
            return tl.inline_asm_elementwise(text, "=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(text, "=r,r", [q], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return (field(q, PLANE, 1) * 2 - 1).to(tl.float32).to(CT)


@triton.jit
def mul16(a, b, CT: tl.constexpr, ASM: tl.constexpr):
    """a * b rounded once to CT, in one packed instruction where there is one. b broadcasts to a."""
    if ASM:
        text: tl.constexpr = _mul_text(_bf16(CT))
        if CT == tl.bfloat16:
            return tl.inline_asm_elementwise(text, "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(text, "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return (a.to(tl.float32) * b.to(tl.float32)).to(CT)


@triton.jit
def fma16(a, b, c, CT: tl.constexpr, ASM: tl.constexpr):
    """a * b + c in CT, in one packed instruction where there is one. b and c broadcast to a."""
    if ASM:
        text: tl.constexpr = _fma_text(_bf16(CT))
        if CT == tl.bfloat16:
            return tl.inline_asm_elementwise(
                text, "=r,r,r,r", [a, b, c], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                text, "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        return (a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)).to(CT)


@triton.jit
def add_in_order(part, offsets, mask, work, arrived, slot, size, PARTS: tl.constexpr, index):
    """Sum the tiles of PARTS programs, deterministically and in one launch.

    Each program writes its tile `part` to work[index * size + offsets]; the one that arrives last (counter
    arrived[slot]) reads all of them back in the order 0..PARTS-1 and returns (sum, 1); the others return
    (part, 0). The counter is left at zero. The barrier makes every thread's tile precede the counter, whose
    acquire-release order carries it to the last program.
    """
    tl.store(work + index.to(tl.int64) * size + offsets, part, mask=mask, cache_modifier=".cg")
    tl.debug_barrier()
    before = tl.atomic_add(arrived + slot, 1, sem="acq_rel", scope="gpu")
    last = before == PARTS - 1
    total = part
    if last:
        tl.debug_barrier()
        total = tl.load(work + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        for i in range(1, PARTS):
            total += tl.load(
                work + tl.cast(i, tl.int64) * size + offsets, mask=mask, other=0.0, cache_modifier=".cg"
            )
        tl.store(arrived + slot, 0)
    return total, last


@triton.jit
def store_parts(to, acc, offsets, mask, work, arrived, slot, size, PARTS: tl.constexpr, part):
    """to[offsets] = acc, or the sum of PARTS programs' acc (`add_in_order`), rounded to the type of `to`."""
    if PARTS == 1:
        tl.store(to + offsets, acc.to(to.dtype.element_ty), mask=mask)
    else:
        total, last = add_in_order(acc, offsets, mask, work, arrived, slot, size, PARTS, part)
        tl.store(to + offsets, total.to(to.dtype.element_ty), mask=mask & last)

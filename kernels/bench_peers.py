"""Foreign code that the kernels are compared with: left out, with the reason, if it is missing or wrong."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lowbit_kernels as lk
import torch
from lowbit_kernels import dispatch
from torch import Tensor

Call = Callable[[], Any]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def optional(
    made: Any, name: str, make: Callable[[], list[Call]], want: Tensor | None = None, allowed: float = 0.0
) -> None:
    """A peer that is wanted; a failure of foreign code, or a wrong result, leaves it out with its reason."""
    if name not in made.peers:
        return
    try:
        calls = make()
        got = calls[0]()
        if want is not None and not relative(got, want) <= allowed:
            raise ValueError(f"its result is wrong: relative error {relative(got, want):.2g}")
        made.calls[name] = calls
    except ModuleNotFoundError as error:
        made.left_out[name] = f"not installed ({error.name})"
    except Exception as error:
        made.left_out[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]


def bitsandbytes(x: Tensor, dense: list[Tensor]) -> list[Call]:
    bnb = importlib.import_module("bitsandbytes")
    packs = [bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4") for w in dense]
    return [lambda w=w, s=s: bnb.matmul_4bit(x, w.t(), quant_state=s) for w, s in packs]


def gemlite(case: Any, x: Tensor, weights: list[tuple[Tensor, Tensor]]) -> list[Call]:
    core = importlib.import_module("gemlite.core")
    if not core.GEMLITE_TRITON_CONFIG_CACHE and dispatch.architecture() == 90:
        # It has no table for an H200; the H100's, of the same architecture, spares minutes of search.
        core.GemLiteLinear.load_config(str(Path(str(core.__file__)).parent / "configs" / "h100.json"))
    dtype = {torch.bfloat16: core.DType.BF16, torch.float16: core.DType.FP16}[case.dtype]
    calls = []
    for codes, scale in weights:
        linear = core.GemLiteLinear(
            W_nbits=case.bits,
            group_size=case.group,
            in_features=case.k,
            out_features=case.n,
            input_dtype=dtype,
            output_dtype=dtype,
        )
        scales = scale.t().reshape(-1, 1).to(case.dtype)
        linear.pack(lk.unpack(codes, case.bits, case.k), scales, 1 << (case.bits - 1), None)
        calls.append(lambda linear=linear: linear(x))
    return calls

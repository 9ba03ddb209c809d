"""What a width costs on a CPU: a layer's packed product and its lr_qat step at 4, 6 and 8 bits, interleaved.

    python -m benchmarks.width_steps

Processor time of one thread, so that other jobs on the machine disturb it less; medians, milliseconds.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.adapters.attach import attach
from lowbit_ft.grid import IntGrid, PackedWeight
from lowbit_ft.model.linear import PackedLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--size", type=int, default=1024, help="inputs and outputs")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(given.size, given.size) / given.size**0.5
    x = torch.randn(given.tokens, given.size, requires_grad=True)
    model = nn.ModuleDict({str(bits): PackedLinear(_packed(weight, bits)) for bits in given.bits})
    attach(model, ADAPTERS["lr_qat"](method="lr_qat"))
    model.train()

    def product(layer: nn.Module) -> None:
        base = layer.base
        assert isinstance(base, PackedWeight)
        with torch.no_grad():
            base.linear(x)

    def step(layer: nn.Module) -> None:
        layer(x).square().mean().backward()

    _timed("packed product", product, model, given.repeats)
    _timed("lr_qat, forward and backward", step, model, given.repeats)


def _packed(weight: torch.Tensor, bits: int) -> PackedWeight:
    scale = weight.unflatten(1, (-1, 128)).abs().amax(-1).t() * 2 / (1 << bits)
    return PackedWeight.quantize(weight, scale, None, IntGrid(bits=bits, group_size=128))


def _timed(what: str, job: Callable[[nn.Module], None], model: nn.ModuleDict, repeats: int) -> None:
    times: dict[str, list[float]] = {bits: [] for bits in model}
    for _ in range(repeats):
        for bits, layer in model.items():
            start = time.process_time()
            job(layer)
            times[bits].append(1e3 * (time.process_time() - start))
    print(what + ": " + ", ".join(f"W{bits} {median(found):.1f} ms" for bits, found in times.items()))


if __name__ == "__main__":
    main()

"""Memory of a step: nothing of size N x K is saved for backward, and of what grows with the tokens only x."""

import pytest
import torch
from torch import Tensor

from lowbit_ft.adapters import ADAPTERS
from lowbit_ft.grid import BinaryGrid, IntGrid
from lowbit_ft.model.linear import PackedLinear
from tests.adapters.common import base_of, randomize
from tests.packed_tools import adapter_config

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ADAPTERS)
def test_nothing_of_the_weights_size_is_saved_for_backward(method: str, dtype: torch.dtype):
    config, (n, k) = ADAPTERS[method], (128, 256)
    base = base_of(BinaryGrid() if config.grid_name == "binary" else IntGrid(bits=4, symmetric=False), (n, k))
    layer = PackedLinear(base, torch.randn(n))
    layer.adapter = adapter_config(method).build(base)
    randomize(layer.adapter)
    x = torch.randn(8, k, dtype=dtype, requires_grad=True)
    held = {t.data_ptr() for t in [x, *layer.buffers(), *layer.parameters()]}
    saved: list[Tensor] = []

    def pack_hook(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in held:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        y = layer(x)
    assert all(t.numel() < n * k for t in saved), [tuple(t.shape) for t in saved]
    # Together they are a small part of the weight too: group tensors and activations of rank size.
    assert sum(t.numel() * t.element_size() for t in saved) < n * k / 2
    y.sum().backward()
    assert all(p.grad is not None for p in layer.adapter.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ADAPTERS)
def test_of_what_grows_with_the_tokens_only_x_is_saved(method: str, dtype: torch.dtype):
    """Twice the tokens, and not a byte more but x (lora beside the base: and the low-rank activations)."""
    config = ADAPTERS[method]
    base = base_of(
        BinaryGrid() if config.grid_name == "binary" else IntGrid(bits=4, symmetric=False), (128, 256)
    )
    layer = PackedLinear(base, torch.randn(128))
    layer.adapter = adapter_config(method).build(base)
    randomize(layer.adapter)
    sizes = []
    for tokens in (8, 16):
        x = torch.randn(tokens, 256, dtype=dtype, requires_grad=True)
        saved: dict[
            int, Tensor
        ] = {}  # by storage; holding the tensors keeps an address from being used twice
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: (s.setdefault(t.untyped_storage().data_ptr(), t), t)[1], lambda t: t
        ):
            y = layer(x)
        assert y.shape == (tokens, 128) and x.untyped_storage().data_ptr() in saved
        sizes.append(sum(t.untyped_storage().nbytes() for t in saved.values()) - x.untyped_storage().nbytes())
    assert sizes[1] - sizes[0] == (8 * 4 * dtype.itemsize if method == "lora" else 0)

"""The priors of images, and their variation, against their equations in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowbit_ft.data.synthesis.invert import Frame, noise, variation
from lowbit_ft.data.synthesis.priors import BatchNorms, Patches, entropy, prior_of, similarities
from lowbit_ft.model.images import read_processor

VIT = Path(__file__).resolve().parents[2] / "recipes" / "assets" / "tiny-vit-shapes"


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForImageClassification

    found = AutoModelForImageClassification.from_pretrained(VIT, dtype=torch.float32).eval()
    return found.requires_grad_(False)


def test_entropy_is_that_of_another_density() -> None:
    """scipy's Gaussian kernels with the same width, the integral by numpy."""
    stats = pytest.importorskip("scipy.stats")
    x = torch.rand(3, 45, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for row, found in zip(x.numpy(), entropy(x).numpy(), strict=True):
        at = np.linspace(row.min(), row.max(), 10)
        p = stats.gaussian_kde(row, bw_method=1.06 * len(row) ** -0.2)(at)
        assert found == pytest.approx(np.trapezoid(-p * np.log(p + 1e-4), at), abs=1e-6)


def test_patches_that_differ_have_more_entropy_than_alike_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    alike = torch.ones(1, 16, 8) + 1e-3 * torch.randn(1, 16, 8, generator=draw)
    two = torch.cat([torch.eye(8)[:1].expand(8, 8), torch.eye(8)[1:2].expand(8, 8)])[None]
    two = two + 0.2 * torch.randn(1, 16, 8, generator=draw)
    assert float(entropy(similarities(two))) > float(entropy(similarities(alike))) + 0.2


def test_patches_of_a_vit_are_its_heads_mean_of_attention(model: Any) -> None:
    """By attention computed here, in float64, from the layer's own weights."""
    images = noise(0, range(2), Frame(read_processor(VIT)), 0)
    prior = Patches(model)
    with prior.watched(), torch.no_grad():
        hidden = model(pixel_values=images, output_hidden_states=True).hidden_states
        found = prior.loss()
    wanted = 0.0
    for x, layer in zip(hidden, model.vit.layers, strict=False):
        x, at = layer.layernorm_before(x), layer.attention
        q, k, v = (
            linear(x).double().unflatten(-1, (4, 16)).transpose(1, 2)
            for linear in (at.q_proj, at.k_proj, at.v_proj)
        )
        said = ((q @ k.transpose(2, 3)) / 4).softmax(-1) @ v  # [B, heads, T, d]
        wanted -= float(entropy(similarities(said.mean(1)[:, 1:])).mean())
    assert float(found) == pytest.approx(wanted, abs=1e-3)
    assert not any(m._forward_pre_hooks for m in model.modules()), "a hook stayed"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), channels=st.integers(1, 5))
def test_batch_norms_compare_moments(seed: int, batch: int, channels: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()).eval()
    norm = net[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(batch, 3, 6, 7)
    prior = prior_of("auto", net)
    assert isinstance(prior, BatchNorms)

    def loss() -> float:
        with prior.watched(), torch.no_grad():
            net(x)
            return float(prior.loss())

    given = net[0](x).double().transpose(0, 1).flatten(1)
    off = (given.mean(1) - norm.running_mean).norm() + (given.var(1, correction=0) - norm.running_var).norm()
    assert loss() == pytest.approx(float(off.detach()), rel=1e-4)
    norm.running_mean.copy_(given.mean(1))
    norm.running_var.copy_(given.var(1, correction=0))
    assert loss() == pytest.approx(0, abs=1e-4), "images that are what it remembers have a loss"


def test_batch_norms_of_tokens_have_moments_too() -> None:
    """LeViT's: [B T, C], or [B, C, T]."""
    for shape in ((12, 3), (4, 3, 5)):
        norm = nn.BatchNorm1d(3).eval()
        assert norm.running_mean is not None
        norm.running_mean.normal_()
        x = torch.randn(shape)
        prior = BatchNorms(norm)
        with prior.watched(), torch.no_grad():
            norm(x)
        flat = x.double().transpose(0, 1).flatten(1)
        off = (flat.mean(1) - norm.running_mean).norm() + (flat.var(1, correction=0) - 1).norm()
        assert float(prior.loss()) == pytest.approx(float(off), rel=1e-4)


def test_a_model_without_what_a_prior_looks_at_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no batch norm that remembers.*prior: patches"):
        prior_of("batch_norm", nn.Sequential(nn.BatchNorm2d(3)))
    net = nn.Sequential(nn.Linear(3, 3))
    net.config = SimpleNamespace()  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no attention over the patches.*prior: batch_norm"):
        prior_of("auto", net)


def test_variation_is_its_sum() -> None:
    x = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    total = 0.0
    for image in x.numpy():
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
            squares = [
                (image[c, y + dy, z + dx] - image[c, y, z]) ** 2
                for c in range(3)
                for y in range(5 - dy)
                for z in range(4)
                if 0 <= z + dx < 4
            ]
            total += sum(squares) ** 0.5 / 2
    assert float(variation(x)) == pytest.approx(total)

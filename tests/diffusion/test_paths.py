"""Paths to noise and back: their equations in float64, and diffusers' own schedulers."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_ft.diffusion import paths
from lowbit_ft.diffusion.paths import PATHS, kept_signal, sampled
from lowbit_ft.diffusion.pictures import Pictures
from lowbit_ft.diffusion.traits import TRAITS
from tests.diffusion import dits

diffusers = pytest.importorskip("diffusers")
SHAPE = (4, 3, 8, 8)


def some() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(SHAPE, generator=draw) for _ in range(2))
    return x, noise, torch.tensor([0.0, 0.31, 0.77, 0.999])


def test_velocity() -> None:
    path, (x, noise, t) = PATHS["velocity"], some()
    for b in range(4):
        wanted = (1 - t[b].double()) * x[b].double() + t[b].double() * noise[b].double()
        torch.testing.assert_close(path.noisy(x, noise, t)[b].double(), wanted, atol=1e-6, rtol=1e-6)
    later = path.noisy(x, noise, t + 1e-3) - path.noisy(x, noise, t)
    torch.testing.assert_close(later / 1e-3, path.wanted(x, noise), atol=2e-3, rtol=1e-3)  # its derivative
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    told = path.told(torch.tensor([0.5, 1.0]))
    assert torch.equal(told, torch.tensor([500.0, 1000.0]))
    found = scheduler.scale_noise(x[:2], told, noise[:2])
    torch.testing.assert_close(path.noisy(x[:2], noise[:2], torch.tensor([0.5, 1.0])), found)


def test_noise() -> None:
    path, (x, noise, t) = PATHS["noise"], some()
    scheduler = diffusers.DDPMScheduler()  # betas of the DDPM paper, linear
    kept, product = kept_signal(), 1.0
    for k in range(1000):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * k / 999)
        assert float(kept[k]) == pytest.approx(product, rel=1e-10)
    assert path.told(t).tolist() == [0, 310, 770, 999]
    found = scheduler.add_noise(x, noise, path.told(t).long())
    torch.testing.assert_close(path.noisy(x, noise, t), found, atol=1e-5, rtol=1e-4)
    assert torch.equal(path.wanted(x, noise), noise)


class Says:
    """A model that is easily told apart: what it says depends on the picture, the time and the label."""

    config = SimpleNamespace(traits=TRAITS["DiTTransformer2DModel"])

    def parameters(self) -> Any:
        yield torch.zeros(1)

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        told = torch.tanh(x) + 0.1 * class_labels[:, None, None, None] + timestep[:, None, None, None] / 3000
        return SimpleNamespace(sample=torch.cat([told, told * 7], 1))  # with a variance, which is not read


@pytest.mark.parametrize(("name", "kind"), [("velocity", "flow"), ("noise", "ddim")])
def test_the_way_back_is_that_of_the_schedulers_of_diffusers(name: str, kind: str) -> None:
    model, noise, labels, steps, guidance = Says(), some()[1], torch.tensor([0, 1, 2, 0]), 10, 1.5
    shown, without = {"class_labels": labels}, {"class_labels": torch.full((4,), 3)}
    ours = sampled(model, PATHS[name], shown, without, noise, steps, guidance)
    if kind == "flow":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading")
        scheduler.set_timesteps(steps)
    x = noise
    for time in scheduler.timesteps:
        told = torch.full((4,), float(time))
        one, none = (model(x, told, each).sample[:, :3] for each in (labels, torch.full((4,), 3)))
        x = scheduler.step(none + guidance * (one - none), time, x).prev_sample
    torch.testing.assert_close(ours, x, atol=2e-5, rtol=1e-4)
    alone = sampled(model, PATHS[name], shown, without, noise, steps)
    assert (alone - ours).abs().max() > 1e-3


def test_pictures_are_made_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as memory is for, however many are asked for; they are the same."""
    noise, labels = some()[1], torch.tensor([0, 1, 2, 0])
    told, without = {"class_labels": labels}, {"class_labels": torch.full((4,), 3)}
    model = Says()
    whole = sampled(model, PATHS["velocity"], told, without, noise, 3, 1.5)
    monkeypatch.setattr(paths, "PLACES", 3 * noise.shape[2] * noise.shape[3])
    sizes, plain = list[int](), Says.__call__
    monkeypatch.setattr(
        Says, "__call__", lambda self, x, *a, **k: sizes.append(len(x)) or plain(self, x, *a, **k)
    )
    assert torch.equal(sampled(model, PATHS["velocity"], told, without, noise, 3, 1.5), whole)
    assert sizes == [3] * 6 + [1] * 6


def test_pictures_there_and_back() -> None:
    from safetensors.torch import save

    pictures = Pictures(3, dits.SIZE, 3)
    values = torch.rand(5, 3, dits.SIZE, dits.SIZE) * 2 - 1
    from PIL import Image

    sheet = Image.open(io.BytesIO(pictures.sheet(values, 3, scale=2)))
    assert sheet.size == (2 * (3 * dits.SIZE + 4), 2 * (2 * dits.SIZE + 2))
    corner = sheet.getpixel((2 * (dits.SIZE + 2), 0))  # of the second picture
    assert corner == tuple(round((float(v) + 1) * 127.5) for v in values[1, :, 0, 0])
    one = pictures.values(pictures.sheet(values[:1], 1, scale=1))
    torch.testing.assert_close(one, values[0], atol=1 / 127, rtol=0)
    with pytest.raises(ValueError, match="is no picture that Pillow reads"):
        pictures.values(b"GIF")
    deep = io.BytesIO()  # 16 bits, of which 8 would be cut off at white
    Image.new("I;16", (dits.SIZE, dits.SIZE), 20_000).save(deep, "PNG")
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        pictures.values(deep.getvalue())
    latents = Pictures(4, 8, 3)
    right = torch.randn(4, 8, 8).bfloat16()
    assert torch.equal(latents.values(save({"latent": right})), right.float())
    for wrong, said in (
        (save({"latent": torch.zeros(4, 8, 9)}), r"holds \['\[4, 8, 9\] torch.float32'\]; allowed: one"),
        (save({"latent": torch.full((4, 8, 8), torch.nan)}), "not finite"),
        (save({"latent": torch.full((4, 8, 8), 1e300, dtype=torch.float64)}), "not finite"),
        (save({"latent": torch.full((4, 8, 8), torch.nan).to(torch.float8_e4m3fn)}), "not finite"),
        (save({"a": right, "b": right.clone()}), "allowed: one floating tensor"),
        (b"PNG", "must be a .safetensors file of latents"),
    ):
        with pytest.raises(ValueError, match=said):
            latents.values(wrong)

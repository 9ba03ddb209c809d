"""Pictures as a diffusion transformer takes them, by its config.json, and back.

3 channels     a file that Pillow reads -> RGB in -1 .. 1, of the model's size (resized where it is of
               another; nothing is cropped or flipped)
others         the latents of an autoencoder, made before: a .safetensors file of one tensor [C, H, W],
               scaled as the model was trained (diffusers: times the autoencoder's scaling_factor)
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..files.picture import picture_of
from .texts import Texts
from .traits import Traits

GAP = 2  # pixels between pictures of a sheet


@dataclass(frozen=True)
class Pictures:
    """channels, size, and how many classes there are, of the model; texts: the states that it is told, of one
    that knows no classes. Takes the place of an image processor."""

    channels: int
    size: int
    classes: int
    texts: Texts | None = None
    traits: Traits = field(default_factory=Traits)

    @property
    def latent(self) -> bool:
        return self.channels != 3

    def values(self, data: bytes) -> Tensor:
        """The bytes of a file -> fp32 [C, size, size]. ValueError saying what is wrong with them."""
        return self._latents(data) if self.latent else self._pixels(data)

    def _pixels(self, data: bytes) -> Tensor:
        import numpy as np
        from PIL import Image  # optional: only images need it

        try:
            found = picture_of(data)
        except Exception as error:  # Pillow's readers raise anything for a damaged file
            raise ValueError(f"is no picture that Pillow reads ({type(error).__name__}: {error})") from error
        if found.size != (self.size, self.size):
            found = found.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(found)).permute(2, 0, 1) / 127.5 - 1

    def _latents(self, data: bytes) -> Tensor:
        from safetensors.torch import load

        wanted = [self.channels, self.size, self.size]
        try:
            found = list(load(data).values())
        except Exception as error:  # any type, for a damaged file
            raise ValueError(
                f"must be a .safetensors file of latents {wanted}, for this transformer has no pixels; it "
                f"cannot be read ({type(error).__name__}: {error})"
            ) from error
        if len(found) != 1 or list(found[0].shape) != wanted or not found[0].is_floating_point():
            got = [f"{list(one.shape)} {one.dtype}" for one in found[:3]]
            raise ValueError(f"holds {got}; allowed: one floating tensor {wanted}")
        values = found[
            0
        ].float()  # before it is looked at: doubles may be beyond, and narrow floats have no test
        if not bool(values.isfinite().all()):
            raise ValueError("holds numbers that are not finite")
        return values

    def sheet(self, values: Tensor, columns: int, scale: int = 4) -> bytes:
        """Pictures [B, 3, size, size] in -1 .. 1 -> a PNG file of them side by side. Of latents the first
        three channels, each from its least to its largest value."""
        from PIL import Image  # optional: only images need it

        if self.latent:
            values = values[:, :3] if self.channels > 3 else values[:, :1].expand(-1, 3, -1, -1)
            low, high = values.amin((0, 2, 3), True), values.amax((0, 2, 3), True)
            values = 2 * (values - low) / (high - low).clamp_min(1e-6) - 1
        pixels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        step, rows = self.size + GAP, -(-len(pixels) // columns)
        sheet = Image.new("RGB", (columns * step - GAP, rows * step - GAP), (255, 255, 255))
        for number, one in enumerate(pixels):
            at = (number % columns * step, number // columns * step)
            sheet.paste(Image.fromarray(one.cpu().numpy()), at)
        scale = max(1, scale if self.size <= 64 else 1)
        sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        return buffer.getvalue()

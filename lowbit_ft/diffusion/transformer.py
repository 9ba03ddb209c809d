"""DiffusersTransformer: a transformer of diffusers where transformers looks for a model.

diffusers' own class is built and its forward runs; its parts are the parts of this module too, under the
names they have in diffusers' files. One dictionary holds them for both, so a layer that is packed in the one
is packed in the other.

Labels are dropped by who makes batches, by a seed that can be resumed, and not by the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from .config import DiffusersConfig
from .traits import TRAITS, shapes

DISTILLED = 3.5  # the guidance that FluxPipeline tells a model that was distilled with one


@dataclass
class DiffusersOutput(ModelOutput):
    """sample [B, C, H, W]: the velocity or the noise, as the model was trained; of Flux [B, tokens, C]."""

    sample: Tensor | None = None


class DiffusersTransformer(PreTrainedModel):
    config: DiffusersConfig
    config_class = DiffusersConfig
    base_model_prefix = "body"
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    made: Any  # diffusers' own

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__(config)
        made = config.kind()(**config.options())
        vars(self)["made"] = made  # no part of this module: its parts are
        for name, part in made.named_children():
            self.add_module(name, part)
        assert not made._parameters and not made._buffers, f"{config.class_name} has tensors of its own"
        made._modules = self._modules
        for part in self.modules():
            if hasattr(part, "token_drop"):
                part.dropout_prob = 0.0  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        if self.walks:  # its end is modulated by the time and the label as its first layer embeds them
            first = self.get_submodule("transformer_blocks.0")
            seen = nn.Module()
            seen.add_module("emb", first.get_submodule("norm1.emb"))
            first.__dict__["seen_from_outside"] = {"norm1": seen}
        self.post_init()

    @property
    def walks(self) -> bool:
        """Whether a layer is given the hidden states first and returns nothing else."""
        return self.config.traits.chain

    streams = ("encoder_hidden_states", "hidden_states")  # what layers hand on that are no chain

    def get_decoder(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        """What cuts a picture into tokens."""
        return self._modules.get("x_embedder") or self.get_submodule("pos_embed")

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **_: Any
    ) -> None:
        """In the object whose forward asks."""
        self.made.gradient_checkpointing = enable
        self.made._gradient_checkpointing_func = gradient_checkpointing_func

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Positions are computed, and in no file."""
        table = getattr(module, "pos_embed", None)
        if isinstance(table, Tensor) and "pos_embed" in module._non_persistent_buffers_set:
            init.copy_(table, positions(module))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        use_cache: bool = False,
    ) -> DiffusersOutput:
        """hidden_states [B, C, H, W] (Flux: [B, tokens, C]); timestep [B], in the model's own units;
        class_labels int64 [B]. What is None is not given to the model; places of Flux (img_ids, txt_ids) and
        the guidance that it was distilled with are made where they are None."""
        traits, dtype = self.config.traits, next(p.dtype for p in self.parameters() if p.is_floating_point())
        if traits.texts:
            assert encoder_hidden_states is not None and pooled_projections is not None
            encoder_hidden_states = encoder_hidden_states.to(dtype)
            pooled_projections = pooled_projections.to(dtype)
        if traits.patch > 1:
            assert encoder_hidden_states is not None
            device, tokens = hidden_states.device, encoder_hidden_states.shape[1]
            img_ids = traits.places(hidden_states.shape[1], device) if img_ids is None else img_ids
            txt_ids = torch.zeros(tokens, 3, device=device) if txt_ids is None else txt_ids
            if guidance is None and self.config.guidance_embeds:
                told = getattr(self.config, "distilled_guidance", DISTILLED)
                guidance = torch.full_like(timestep, told, dtype=torch.float32)
        given = {
            "class_labels": class_labels,
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "guidance": guidance,
        }
        given = {name: value for name, value in given.items() if value is not None}
        self.made.training = self.training
        found = self.made(
            hidden_states=hidden_states.to(dtype), timestep=timestep, return_dict=False, **given
        )
        return DiffusersOutput(found[0])


def positions(embed: Any) -> Tensor:
    """The table of a PatchEmbed, as diffusers makes it: fp32 [1, patches, channels]."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed  # optional

    _, count, width = embed.pos_embed.shape
    made = get_2d_sincos_pos_embed(
        width,
        math.isqrt(count),
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        output_type="pt",
    )
    return made.float()[None]


def example(config: Any) -> dict[str, Tensor]:
    """What a model can be called with, by its config.json (a dict): one image that goes from black to white,
    half way to noise, with the label 0, or states of a text."""
    found = {name: _ramp(*shape) for name, shape in shapes(config).items()}
    if (label := found.get("class_labels")) is not None:
        found["class_labels"] = torch.zeros_like(label, dtype=torch.int64)
    half = 500.0 / TRAITS[config["_class_name"]].per
    return {"hidden_states": found.pop("hidden_states"), "timestep": torch.full((1,), half), **found}


def _ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)

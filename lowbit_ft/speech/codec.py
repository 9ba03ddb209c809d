"""SpeechCodec: TaDiCodec (arXiv 2508.16790) as a small model of transformers.

    codes     mel [F, M] -> encoder, both ways -> every 8 frames one vector -> L numbers -> a code (bsq)
    decoder   text, then frames of (x_t + codes + whether it is prompt) -> velocity v [F, M], both ways
    x_t = t x + (1 - t) e,  v* = x - e                       t = 0 is noise e, t = 1 the mel x

The time goes into the norms of the decoder, whose weight is 1 + W f(t) with W = 0 at the start; norms of
the encoder have no weight. Nothing depends on padding: a row's text and frames have positions of their own,
one behind the other, and the last code is the one that frames behind it look at.

Two things are ours: a vector that marks the frames of the prompt, and a row's own draw of what is dropped
(theirs is one for a batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from .config import SpeechCodecConfig


@dataclass
class SpeechCodecOutput(ModelOutput):
    """velocity [B, F, M]; codes int64 [B, F / frames_per_code], -1 where there are none; code_loss: a scalar,
    entropy_weight times the entropy term of the codes of the batch."""

    velocity: Tensor | None = None
    codes: Tensor | None = None
    code_loss: Tensor | None = None


class Norm(nn.Module):
    """Root mean square, without a weight; or with one that the time says."""

    def __init__(self, config: SpeechCodecConfig, timed: bool) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scale = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if timed else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x [B, S, H], time [B, H]."""
        found = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return found if self.scale is None or time is None else found * (1 + self.scale(time)[:, None])


class Attention(nn.Module):
    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(h, h, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        b, s, h = x.shape
        q, k, v = (
            p(x).view(b, s, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (_rotated(y, *rotary) for y in (q, k))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(found.transpose(1, 2).reshape(b, s, h))


class FeedForward(nn.Module):
    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__()
        h, inside = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(h, inside, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inside, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """Attention both ways, then SwiGLU."""

    def __init__(self, config: SpeechCodecConfig, timed: bool) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = Norm(config, timed), Norm(config, timed)
        self.self_attn, self.mlp = Attention(config), FeedForward(config)

    def forward(
        self, x: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor], time: Tensor | None = None
    ) -> Tensor:
        """x [B, S, H]; mask bool [B, 1, 1, S], what is looked at."""
        x = x + self.self_attn(self.attention_norm(x, time), mask, rotary)
        return x + self.mlp(self.mlp_norm(x, time))


class Tower(nn.Module):
    def __init__(self, config: SpeechCodecConfig, count: int, timed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, timed) for _ in range(count))
        self.norm = Norm(config, timed)
        self.width, self.theta = config.hidden_size // config.num_attention_heads, config.rope_theta

    def forward(self, x: Tensor, seen: Tensor, places: Tensor, time: Tensor | None = None) -> Tensor:
        """x [B, S, H]; seen bool [B, S]; places int64 [B, S]."""
        rotary = self._rotary(places, x.dtype)
        mask = seen[:, None, None]
        for layer in self.layers:
            x = layer(x, mask, rotary, time)
        return self.norm(x, time)

    def _rotary(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the angle of each pair of channels, [B, 1, S, D / 2]."""
        pairs = torch.arange(0, self.width, 2, device=places.device, dtype=torch.float32) / self.width
        angle = places[:, None, :, None] * self.theta**-pairs
        return angle.cos().to(dtype), angle.sin().to(dtype)


class Codes(nn.Module):
    """Hidden frames to codes and back."""

    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__()
        self.code, self.frames = config.vectors, config.frames_per_code
        self.to_code = nn.Linear(config.hidden_size, self.code.width)
        self.from_code = nn.Linear(self.code.width, config.hidden_size)

    def narrow(self, hidden: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden [B, F, H] of which `counts` [B] frames are real -> (points [B, C, L], ids [B, C], vectors
        [B, C, L], which of them are real [B, C]), C = F / frames. The vector of 8 frames is the mean of the
        two in the middle, as linear interpolation takes it; of a code that is cut short, the last real
        frame."""
        b, f, _ = hidden.shape
        last = (counts - 1).clamp_min(0)[:, None]
        middle = torch.arange(f // self.frames, device=hidden.device) * self.frames + (self.frames - 1) / 2
        low, high = (
            torch.minimum(m.long()[None].expand(b, -1), last) for m in (middle.floor(), middle.ceil())
        )
        h = self.to_code((_taken(hidden, low) + _taken(hidden, high)) / 2)
        points, ids = self.code.quantize(h)
        real = self.real(counts, h.shape[1])
        return points, ids.masked_fill(~real, -1), h, real

    def real(self, counts: Tensor, codes: int) -> Tensor:
        """bool [B, C]: which codes stand for real frames."""
        return torch.arange(codes, device=counts.device)[None] * self.frames < counts[:, None]

    def wide(self, points: Tensor, counts: Tensor) -> Tensor:
        """points [B, C, L] -> [B, C frames, H], linear between the middles of codes."""
        b, codes, _ = points.shape
        hidden = self.from_code(points)
        place = (torch.arange(codes * self.frames, device=points.device) + 0.5) / self.frames - 0.5
        last = (counts - 1).clamp_min(0)[:, None] // self.frames
        low = torch.minimum(place.floor().clamp_min(0).long()[None].expand(b, -1), last)
        high = torch.minimum((place.floor() + 1).clamp_min(0).long()[None].expand(b, -1), last)
        share = (place - place.floor()).to(hidden.dtype)[None, :, None]
        return _taken(hidden, low) * (1 - share) + _taken(hidden, high) * share


class Two(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


class SpeechCodecBase(PreTrainedModel):
    config: SpeechCodecConfig
    config_class = SpeechCodecConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]  (it is there)
        if isinstance(module, Norm) and module.scale is not None:
            nn.init.zeros_(module.scale.weight)
        if isinstance(module, Body):
            nn.init.zeros_(module.prompt)


class Body(SpeechCodecBase):
    """Everything but the last matrix: it gives the hidden frames of the decoder."""

    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__(config)
        h, m = config.hidden_size, config.num_mel_bins
        self.mel_in, self.noisy_in = nn.Linear(m, h), nn.Linear(m, h)
        self.encoder = Tower(config, config.encoder_layers, timed=False)
        self.codes = Codes(config)
        self.code_mlp, self.text_mlp, self.time_mlp = (Two(h) for _ in range(3))
        self.embed_tokens = nn.Embedding(config.vocab_size, h)
        self.prompt = nn.Parameter(torch.zeros(h))
        self.decoder = Tower(config, config.num_hidden_layers, timed=True)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self  # of whose parts a recipe packs what it likes

    def encode(self, mel: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mel [B, F, M] -> what `Codes.narrow` gives."""
        places = torch.arange(mel.shape[1], device=mel.device)[None].expand(len(mel), -1)
        hidden = self.encoder(self.mel_in(mel), frame_mask, places)
        return self.codes.narrow(hidden, frame_mask.sum(1))

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        noisy: Tensor,
        time: Tensor,
        frame_mask: Tensor,
        prompt_mask: Tensor,
        points: Tensor,
        keep: Tensor,
    ) -> Tensor:
        """points [B, C, L]: of the codes. The others as SpeechCodec's. Returns [B, F, H]."""
        dtype = self.noisy_in.weight.dtype
        seen_text, frames = attention_mask.bool(), noisy.shape[1]
        condition = self.code_mlp(self.codes.wide(points, frame_mask.sum(1)))
        x = self.noisy_in(noisy.to(dtype)) + condition * keep[:, None, None].to(dtype)
        x = x + prompt_mask[..., None].to(dtype) * self.prompt
        text = self.text_mlp(self.embed_tokens(input_ids))
        behind = seen_text.sum(1, keepdim=True) + torch.arange(frames, device=x.device)
        places = torch.cat([(seen_text.cumsum(1) - 1).clamp_min(0), behind], 1)
        found = self.decoder(
            torch.cat([text, x], 1),
            torch.cat([seen_text, frame_mask], 1),
            places,
            self.time_mlp(_waves(time, self.config.hidden_size).to(dtype)),
        )
        return found[:, -frames:]

    def forward(self, mel: Tensor, frame_mask: Tensor, **rest: Tensor) -> SpeechCodecOutput:
        """Called as SpeechCodec is; hidden frames in place of the velocity. rest: what `decode` takes too."""
        points, ids, vectors, real = self.encode(mel.to(self.noisy_in.weight.dtype), frame_mask)
        hidden = self.decode(frame_mask=frame_mask, points=points, **rest)
        term = self.codes.code.entropy(vectors.float(), real).loss
        return SpeechCodecOutput(hidden, ids, self.config.entropy_weight * term)


class SpeechCodec(SpeechCodecBase):
    """Body and the matrix that makes velocities."""

    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__(config)
        self.body = Body(config)
        self.velocity = nn.Linear(config.hidden_size, config.num_mel_bins)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.body

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mel: Tensor,
        noisy: Tensor,
        time: Tensor,
        frame_mask: Tensor,
        prompt_mask: Tensor,
        keep: Tensor,
        use_cache: bool = False,
    ) -> SpeechCodecOutput:
        """input_ids, attention_mask int64 [B, T]: the text. mel [B, F, M]: the frames that are encoded,
        normalised; noisy [B, F, M]: x_t, of which the frames of the prompt are clean; time [B]; frame_mask,
        prompt_mask bool [B, F]; keep [B]: 0 drops the codes of a row. F is a multiple of frames_per_code."""
        found = self.body(
            mel,
            frame_mask,
            input_ids=input_ids,
            attention_mask=attention_mask,
            noisy=noisy,
            time=time,
            prompt_mask=prompt_mask,
            keep=keep,
        )
        return SpeechCodecOutput(self.velocity(found.velocity), found.codes, found.code_loss)

    def probe(self, input_ids: Tensor) -> Tensor:
        """The velocity [B, F, M] for these tokens and some made-up sound, always the same: by which an export
        is compared with what was trained."""
        rows, frames = len(input_ids), 4 * self.config.frames_per_code
        count = torch.arange(rows * frames * self.config.num_mel_bins, device=input_ids.device)
        sound = torch.sin(0.37 * count.float()).view(rows, frames, -1)
        seen = torch.ones(rows, frames, dtype=torch.bool, device=input_ids.device)
        half = torch.full((rows,), 0.5, device=input_ids.device)
        found = self(input_ids, torch.ones_like(input_ids), sound, sound.flip(1), half, seen, ~seen, 2 * half)
        return found.velocity


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """values [B, S, H] at places [B, C] -> [B, C, H]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _waves(time: Tensor, width: int) -> Tensor:
    """Sines and cosines of time [B] in 0..1 -> [B, width], fp32."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=time.device) / (width // 2))
    angle = 1000 * time.float()[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], -1)

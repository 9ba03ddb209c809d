"""Fill a model with the values of its checkpoint, one tensor at a time: a module of it, or the whole. And its
tokenizer.

Parameters are on meta before (meta.py) and never all in memory unless the whole model is asked for: the walk
over the layers (walk.py) fills one, uses it and lets it go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..files.tensorfile import CheckpointError
from .checkpoint import Checkpoint
from .config import GENERATION, answered, stop_ids
from .experts import StandIn
from .tokenizer import read_tokenizer


def materialize(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Fill the meta parameters of `module`, which is called `prefix` in the model, and move its buffers to
    `device`.

    One tensor at a time; parameters are filled in place, so a tied pair stays one object and is read once.
    dtype None means the checkpoint's; parts the model keeps in float32 stay so. Parameters already filled
    are only moved. Raises CheckpointError for a missing tensor, a wrong shape, NaN or Inf.
    """
    for path, owner in module.named_modules():
        for short, parameter in owner.named_parameters(recurse=False):
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
                continue
            name = ".".join(part for part in (prefix, path, short) if part)
            wanted = parameter.dtype if parameter.dtype != checkpoint.dtype or dtype is None else dtype
            if isinstance(owner, StandIn) and short == "weight":
                value = checkpoint.matrix(name.removesuffix(".weight"), device=device, dtype=wanted)
            else:
                value = _checked(checkpoint, name, parameter, device, wanted)
            filled = nn.Parameter(value, requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, filled)
        for short, buffer in owner.named_buffers(recurse=False):
            name = ".".join(part for part in (prefix, path, short) if part)
            if short not in owner._non_persistent_buffers_set and checkpoint.has_weight_for(name):
                owner._buffers[short] = _checked(checkpoint, name, buffer, device, buffer.dtype)
            else:
                assert not buffer.is_meta, f"buffer {name} has no value; use Checkpoint.empty_model"
                owner._buffers[short] = buffer.to(device)


def load_model(
    checkpoint: Checkpoint,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """The whole full-precision model in memory (for evaluation against it, and for small models)."""
    model: Any = checkpoint.empty_model(attention)
    materialize(model, checkpoint, "", device, dtype)
    if stop_ids(checkpoint.folder / GENERATION) is not None:
        from transformers import GenerationConfig

        folder = str(checkpoint.folder)
        with answered(checkpoint.folder / GENERATION):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model  # without that file it keeps the one made from its configuration


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of the checkpoint, with the chat template that it is given. Raises CheckpointError if
    none loads without running code."""
    tokenizer = read_tokenizer(checkpoint.folder)
    if checkpoint.chat_template is not None:
        tokenizer.chat_template = checkpoint.chat_template
    return tokenizer


def _checked(checkpoint: Checkpoint, name: str, wanted: Tensor, device: Any, dtype: torch.dtype) -> Tensor:
    value = checkpoint.weight_for(name, device=device, dtype=dtype)
    if value.shape != wanted.shape:
        raise CheckpointError(
            f"{checkpoint.origin(name)} has shape {list(value.shape)}, but config.json makes the "
            f"model's {name!r} {list(wanted.shape)}. The files and config.json do not belong together."
        )
    return value

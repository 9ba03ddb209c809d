"""A model without weights: transformers' own code builds it, parameters on the meta device, buffers for real.

Buffers that no file holds (rotary inv_freq, gemma's embedding scale) are computed by the model's own code,
not by a copy of it here. No code that comes with a checkpoint is run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..files.tensorfile import CheckpointError
from .purpose import Purpose


def meta_model(
    config: Any, dtype: torch.dtype, attention: str, source: Path, purpose: Purpose | None = None
) -> Any:
    """The model of a configuration (left as it is) for a purpose; None: the causal language model. Parameters
    on meta, tied ones one object, real buffers. CheckpointError naming `source` when transformers cannot
    build it."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = (model_class(config) if purpose is None else purpose.auto_class()).from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    # A bad value of config.json raises anything: KeyError, ZeroDivisionError; a pad token without a row an
    # AssertionError.
    except Exception as error:
        fix = (
            "this model has no such attention in transformers; set model.attention: eager. "
            if (attention != "eager" and "attn_implementation" in str(error))
            else ""
        )
        said = (
            str(error) if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {error}"
        )
        said = said.partition("\n")[0]  # behind it transformers lists all classes that it has
        raise CheckpointError(
            f"{source}: no model can be built with attention={attention!r}: {fix}{said}"
        ) from error
    model.tie_weights()  # making the parameters meta replaced the objects, which undid the ties
    # Parts the model's class says must stay float32, as from_pretrained keeps them.
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, parameter in model.named_parameters():
            if re.search(rf"(^|\.){re.escape(pattern).replace(chr(92) + '*', '.*')}(\.|$)", name):
                parameter.data = parameter.data.to(kept)
    return model


@contextmanager
def uncached() -> Iterator[None]:
    """Inside, transformers makes its tables (anchors, positions of a size) each time. It caches them, and a
    table of tensors without data must not be what a model with data gets from there."""
    import transformers.pytorch_utils

    pytorch_utils: Any = transformers.pytorch_utils
    before = pytorch_utils.is_torchdynamo_compiling
    pytorch_utils.is_torchdynamo_compiling = lambda: True  # what its caches ask
    try:
        yield
    finally:
        pytorch_utils.is_torchdynamo_compiling = before


def model_class(config: Any) -> Any:
    """The auto class that builds and loads the model of a configuration: a causal language model, or, for
    checkpoints with other towers beside the text (images), the class that has them all."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    return AutoModelForCausalLM  # whose own message lists the kinds of configuration it knows

"""What a model is built for, where that is not to write text: a body that reads, and a head that answers.

    files   body (and the head of whatever it was trained for)   ->   model   body + the head of the purpose

The body is what transformers calls the base model, without its pooler. Everything else that holds parameters
is the head: it stays dense, and trains whole where the recipe says so. Tensors of another head in the files
are left out. What the files have not of this one is drawn from a seed by the model's own rule, so that every
stage of a run, whenever it reads the checkpoint, has the same.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import names as diffusion
from ..files.tensorfile import CheckpointError, TensorEntry

POOLERS = ("pooler",)  # parts of a base model that belong to the head
# The auto classes that a purpose may name, and what the hub calls their pipelines.
AUTO = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioTokenization": "feature-extraction",
    diffusion.AUTO: "unconditional-image-generation",
}


@dataclass(frozen=True)
class Purpose:
    """auto: the auto class of transformers; values: keys of config.json that it gives other values (labels by
    name); seed: of what is drawn."""

    auto: str
    values: Mapping[str, Any]
    seed: int = 0

    def auto_class(self) -> Any:
        import transformers  # slow: seconds

        return getattr(transformers, self.auto)

    def applied(self, config: Any, folder: Path) -> Any:
        """A copy of the configuration with the values, and the class that is built of it."""
        mapping = self.auto_class()._model_mapping
        if type(config) not in mapping:
            raise CheckpointError(
                f"{folder}: transformers has no {self.auto} of model_type {config.model_type!r}; give a "
                "checkpoint of another architecture, or another task"
            )
        found = copy.deepcopy(config)
        for key, value in self.values.items():
            setattr(found, key, value)
        found.architectures = [mapping[type(config)].__name__]
        return found

    def entries(self, config: Any) -> dict[str, Any]:
        """What config.json of a folder says of it. config: as `applied` made it."""
        return {**self.values, "architectures": list(config.architectures)}


def purpose_of(config: Any) -> Purpose | None:
    """The purpose that a configuration names by its architecture; None: to write text."""
    import transformers  # slow: seconds

    named = (getattr(config, "architectures", None) or [None])[0]
    for auto in AUTO:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping and named in _names(mapping[type(config)]):
            return Purpose(auto, {})
    return None


def example_of(config: Mapping[str, Any], purpose: Purpose | None) -> dict[str, Tensor]:
    """Something that a model can be called with, by its config.json: the first 32 tokens, [1, 32], an
    image that goes from black to white, [1, channels, height, width], or what a diffusion transformer sees.
    """
    return EXAMPLES.get("" if purpose is None else purpose.auto, _tokens)(config)


def _image(config: Mapping[str, Any]) -> dict[str, Tensor]:
    size = config.get("image_size", 64)  # of a convolutional network any will do
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, config.get("num_channels", 3), height, width)
    return {"pixel_values": torch.linspace(-1, 1, math.prod(shape)).view(shape)}


def _noisy(config: Mapping[str, Any]) -> dict[str, Tensor]:
    from ..diffusion.transformer import example  # slow: transformers

    return example(config)


def _tokens(config: Mapping[str, Any]) -> dict[str, Tensor]:
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 32)
    return {"input_ids": torch.arange(min(32, vocabulary))[None]}


# Of the auto classes, those whose models look at something else than tokens.
EXAMPLES: dict[str, Callable[[Mapping[str, Any]], dict[str, Tensor]]] = {
    "AutoModelForImageClassification": _image,
    diffusion.AUTO: _noisy,
}


def answer_of(outputs: Any) -> Tensor:
    """What a model says, in one tensor: its logits; of a question [B, L, 2], those of first and last; the
    sample of a diffusion transformer."""
    for name in ("logits", "sample"):
        if (said := getattr(outputs, name, None)) is not None:
            return said
    return torch.stack([outputs.start_logits, outputs.end_logits], -1)


def _names(found: Any) -> list[str]:
    return [one.__name__ for one in (found if isinstance(found, list | tuple) else [found])]


def head_parts(model: Any) -> list[str]:
    """The modules of the head, by the name of the outermost that lies in no body: everything that holds
    parameters outside of the base model, and its pooler."""
    body, prefix = model.base_model, f"{model.base_model_prefix}."
    # A model that is its own body has none.
    outside = [name for name, module in model.named_children() if body is not model and module is not body]
    poolers = [prefix + name for name, _ in body.named_children() if name in POOLERS]
    return [name for name in (*poolers, *outside) if any(True for _ in _own(model, name))]


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of the head by name, without those that the body has too (a tied decoder)."""
    parts = head_parts(model)
    inside = {id(p) for n, p in model.named_parameters() if not n.startswith(tuple(f"{x}." for x in parts))}
    return {
        f"{part}.{name}": parameter
        for part in parts
        for name, parameter in _own(model, part)
        if id(parameter) not in inside
    }


def _own(model: Any, part: str) -> Any:
    return model.get_submodule(part).named_parameters()


def of_another_head(model: Any, key: str) -> bool:
    """Whether a tensor of the files belongs to a part that this model has not: a head of something else."""
    first = key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    body = {name for name, _ in model.base_model.named_children()}
    return first not in body and first not in {name for name, _ in model.named_children()}


def refuse_other_body(model: Any, plan: Mapping[str, Any], config: Any, folder: Path) -> None:
    """CheckpointError where the files have nothing of the body: transformers calls it by another name in this
    class than in the checkpoint, and would draw all of it."""
    head = head_parameters(model)
    inside = [name for name, _ in model.named_parameters() if name not in head]
    if inside and not any(name in plan for name in inside):
        raise CheckpointError(
            f"{folder}: {type(model).__name__} of transformers looks for {inside[0]!r}, and the files of "
            f"this {config.model_type} have nothing of that name: it would start from random numbers. Give "
            "the checkpoint of an encoder (bert, roberta, ...), or another task"
        )


def refuse_other_labels(
    model: Any, plan: Mapping[str, Any], entries: Mapping[str, TensorEntry], folder: Path
) -> None:
    """CheckpointError where the files have a head of this kind that was made for other labels. plan: where
    the value of each parameter is (names.Source)."""
    for name, parameter in head_parameters(model).items():
        if name not in plan or plan[name].converter is not None:
            continue
        found, wanted = list(entries[plan[name].keys[0][0]].shape), list(parameter.shape)
        if found != wanted:
            raise CheckpointError(
                f"{folder}: its {name} is {found}, and the task's is {wanted}: the checkpoint was made for "
                "other labels. Give those that it has, in their order (task.labels), or the checkpoint from "
                "before that training"
            )


def drawn(model: Any, there: Collection[str], purpose: Purpose, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values for the parameters of the head that are not there, by the model's own rule; each module from a
    seed of its own name. model: on meta."""
    head = head_parameters(model)
    missing = [name for name in head if name not in there]
    found: dict[str, Tensor] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in missing):
        module = copy.deepcopy(model.get_submodule(owner)).to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(purpose.seed ^ zlib.crc32(owner.encode()))
            for parameter in module.parameters(recurse=False):
                nn.init.zeros_(parameter)  # what the rule leaves alone
            model._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if f"{owner}.{name}" in missing:
                found[f"{owner}.{name}"] = parameter.detach().to(dtype)
    return found

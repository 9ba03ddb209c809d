"""What a model is built for, where that is not to write text: a body that reads, and a head that answers.

    files   body (and the head of whatever it was trained for)   ->   model   body + the head of the purpose

The body is what transformers calls the base model, without its pooler. Everything else that holds parameters
is the head: it stays dense, and trains whole where the recipe says so. Tensors of another head in the files
are left out. What the files have not of this one, or have for other labels, is drawn from a seed by the
model's own rule, so that every stage of a run, whenever it reads the checkpoint, has the same.
"""

from __future__ import annotations

import copy
import inspect
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
# And those of detectors (RT-DETR, D-FINE and their kin), which say classes and boxes behind every layer.
PREDICTORS = (
    *("enc_score_head", "enc_bbox_head", "denoising_class_embed", "class_embed", "bbox_embed"),
    *("enc_out_class_embed", "enc_out_bbox_embed"),  # of LW-DETR and RF-DETR
    *("pre_bbox_head", "lqe_layers"),  # of D-FINE: the first boxes, and by how good a box is, its scores
)
TRAINING_ONLY = ("denoising_class_embed",)  # of these, what a forward without labels does not read
# The auto classes that a purpose may name, and what the hub calls their pipelines.
AUTO = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForAudioTokenization": "feature-extraction",
    diffusion.AUTO: "unconditional-image-generation",
}
# By which attribute of its class transformers says that a model has an attention; all have eager.
_ATTENTION = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
# The outputs that a graph of a model gives, where it has more of them than anybody asks for.
SAYS = {"AutoModelForObjectDetection": ("logits", "pred_boxes")}
OWN_LOSS = ("AutoModelForObjectDetection",)  # whose models make their loss themselves, of labels


@dataclass(frozen=True)
class Purpose:
    """auto: the auto class of transformers; values: keys of config.json that it gives other values (labels by
    name); seed: of what is drawn. relabels: what the files have for other labels is drawn anew; whole: by the
    rule of the whole model (a detector's classes begin rare), not of its module."""

    auto: str
    values: Mapping[str, Any]
    seed: int = 0
    relabels: bool = False
    whole: bool = False

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
        built = _built(mapping[type(config)], config)
        taken = inspect.signature(built.forward).parameters
        if EXAMPLES.get(self.auto) is _image and "pixel_values" not in taken:
            raise CheckpointError(
                f"{folder}: {built.__name__} looks at {list(taken)[1]!r} and not at the pixels of an image; "
                "give a checkpoint of another architecture"
            )
        if self.auto in OWN_LOSS and "labels" not in taken:
            raise CheckpointError(
                f"{folder}: {built.__name__} takes no labels, so it has no loss to train by; give a "
                "checkpoint of another architecture (rt_detr, d_fine, detr, ...)"
            )
        found = copy.deepcopy(config)
        for key, value in self.values.items():
            setattr(found, key, value)
        found.architectures = [built.__name__]
        names = self.values.get("id2label")
        if names is not None and found.num_labels != len(names):
            raise CheckpointError(
                f"{folder}: {type(config).__name__} keeps num_labels {found.num_labels} whatever its "
                f"labels are, and these are {len(names)}; give a checkpoint of another architecture"
            )
        return found

    def without(self, config: Any, attention: str) -> str | None:
        """The class of transformers in the model of a configuration (itself, or its backbone) that has no
        such attention; None: each has it, or it is not known which they are."""
        import transformers  # slow: seconds

        if (flag := _ATTENTION.get(attention)) is None:
            return None
        of = [
            (self.auto_class(), config),
            (transformers.AutoBackbone, getattr(config, "backbone_config", None)),
        ]
        for auto, one in of:
            if type(one) in auto._model_mapping:
                built = _built(auto._model_mapping[type(one)], one)
                if not getattr(built, flag, True):
                    return built.__name__
        return None

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


Size = tuple[int, int] | None


def example_of(config: Mapping[str, Any], purpose: Purpose | None, size: Size = None) -> dict[str, Tensor]:
    """Something that a model can be called with, by its config.json: the first 32 tokens, [1, 32], an image
    that goes from black to white, [1, channels, height, width], or what a diffusion transformer sees. size:
    (height, width) of what its image processor makes, where that is known."""
    return EXAMPLES.get("" if purpose is None else purpose.auto, _tokens)(config, size)


def _image(config: Mapping[str, Any], size: Size) -> dict[str, Tensor]:
    found = size or config.get("image_size") or 64  # of a convolutional network any will do
    height, width = (found, found) if isinstance(found, int) else found
    shape = (1, config.get("num_channels", 3), height, width)
    return {"pixel_values": torch.linspace(-1, 1, math.prod(shape)).view(shape)}


def _noisy(config: Mapping[str, Any], size: Size) -> dict[str, Tensor]:
    from ..diffusion.transformer import example  # slow: transformers

    return example(config)


def _tokens(config: Mapping[str, Any], size: Size) -> dict[str, Tensor]:
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 32)
    return {"input_ids": torch.arange(min(32, vocabulary))[None]}


# Of the auto classes, those whose models look at something else than tokens.
EXAMPLES: dict[str, Callable[[Mapping[str, Any], Size], dict[str, Tensor]]] = {
    "AutoModelForImageClassification": _image,
    "AutoModelForObjectDetection": _image,
    diffusion.AUTO: _noisy,
}


def answer_of(outputs: Any) -> Tensor:
    """What a model says, in one tensor: its logits; of a question [B, L, 2], those of first and last; of a
    detector the boxes behind the logits, [B, queries, C + 4]; the sample of a diffusion transformer."""
    if (boxes := getattr(outputs, "pred_boxes", None)) is not None:
        return torch.cat([outputs.logits, boxes.to(outputs.logits.dtype)], -1)
    for name in ("logits", "sample"):
        if (said := getattr(outputs, name, None)) is not None:
            return said
    return torch.stack([outputs.start_logits, outputs.end_logits], -1)


def _built(found: Any, config: Any) -> Any:
    """The class of a purpose: of several (DeiT with and without a teacher's token) the one that a
    configuration names, else the first, as transformers takes it."""
    several = found if isinstance(found, list | tuple) else [found]
    named = getattr(config, "architectures", None) or []
    return next((one for one in several if one.__name__ in named), several[0])


def _names(found: Any) -> list[str]:
    return [one.__name__ for one in (found if isinstance(found, list | tuple) else [found])]


def head_parts(model: Any, labels: bool = True) -> list[str]:
    """The modules of the head, by the name of the outermost that lies in no body: everything that holds
    parameters outside of the base model, its pooler, and what predicts inside of a detector. labels: a
    forward sees some; else without what only such a forward reads."""
    body, prefix = model.base_model, f"{model.base_model_prefix}."
    # A model that is its own body has none.
    outside = [name for name, module in model.named_children() if body is not model and module is not body]
    poolers = [prefix + name for name, _ in body.named_children() if name in POOLERS]
    inside = [name for name in predictors(model) if name not in outside]
    unread = () if labels else TRAINING_ONLY
    found = [n for n in (*poolers, *inside, *outside) if n.rpartition(".")[2] not in unread]
    return [name for name in found if any(True for _ in _own(model, name))]


def predictors(model: Any) -> list[str]:
    """The modules of a detector that say classes and boxes, wherever they lie."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PREDICTORS]


def head_parameters(model: Any, labels: bool = True) -> dict[str, nn.Parameter]:
    """The parameters of the head (`head_parts`) by name, without those that the body has too (a tied
    decoder); one that is in two of its parts by the first."""
    parts = head_parts(model, labels)
    seen = {id(p) for n, p in model.named_parameters() if not n.startswith(tuple(f"{x}." for x in parts))}
    found: dict[str, nn.Parameter] = {}
    for part in parts:
        for name, parameter in _own(model, part):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{part}.{name}"] = parameter
    return found


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


def for_other_labels(
    model: Any, plan: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> dict[str, str]:
    """What of the head the files have in another shape, for other labels: name -> tensor of the files."""
    return {
        name: plan[name].keys[0][0]
        for name, parameter in head_parameters(model).items()
        if name in plan
        and plan[name].converter is None
        and list(entries[plan[name].keys[0][0]].shape) != list(parameter.shape)
    }


def drawn(model: Any, there: Collection[str], purpose: Purpose, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values for the parameters of the head that are not there, by the model's own rule; each module from a
    seed of its own name. model: on meta."""
    head = head_parameters(model)
    missing = [name for name in head if name not in there]
    if purpose.whole and missing:
        return _drawn_whole(model, missing, purpose, dtype)
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


def _drawn_whole(model: Any, names: list[str], purpose: Purpose, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the rule of the whole model: it is built once, and these are kept of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(purpose.seed)
        values = dict(type(model)(copy.deepcopy(model.config)).named_parameters(remove_duplicate=False))
    return {name: values[name].detach().to(dtype) for name in names}

"""config.json of a diffusers transformer as a configuration of transformers: the same keys, and a model_type.

What a class is built with are the keys that its own __init__ names; the others (`_diffusers_version`) are
kept and not read.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedConfig

from ..names import listed
from .names import ARCHITECTURE, KEY, MODEL_TYPE, missing
from .pictures import Pictures
from .texts import Texts
from .traits import TRAITS, Traits

SIZES = ("text_tokens", "picture_size")  # what training here adds to config.json
# Of a transformer of classes, which diffusers always writes.
COUNTS = ("sample_size", "in_channels", "patch_size", "num_embeds_ada_norm")
MOST = 1 << 16  # of any of them: what is beyond cannot be held, and is a mistake in the file


class DiffusersConfig(PreTrainedConfig):
    """class_name: of diffusers, one of TRAITS. ValueError for another, and for a wrong count."""

    model_type = MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        self.class_name = str(kwargs.pop(KEY, kwargs.pop("class_name", next(iter(TRAITS)))))
        if self.class_name not in TRAITS:
            raise ValueError(f"{KEY}: got {self.class_name!r}; allowed: {listed(TRAITS)}")
        # transformers makes one of nothing, too, to compare with
        needed = COUNTS if kwargs and self.traits.chain else ()
        for name in (*COUNTS, *SIZES):
            size = kwargs.get(name)
            if (size is not None or name in needed) and not (type(size) is int and 0 < size <= MOST):
                raise ValueError(f"{name}: got {size!r}; allowed: whole numbers of 1 to {MOST}")
        kwargs.pop("architectures", None)
        super().__init__(architectures=[ARCHITECTURE], **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """With the name where diffusers reads it."""
        found = super().to_dict()
        found.pop("class_name", None)
        return found | {KEY: self.class_name}

    @property
    def traits(self) -> Traits:
        return TRAITS[self.class_name]

    @property
    def image_size(self) -> int:
        """Of the pictures that it was trained on here, else as diffusers says."""
        return getattr(self, "picture_size", None) or getattr(self, "sample_size", self.traits.size)

    @property
    def num_channels(self) -> int:
        return self.traits.channels(self.to_dict())

    @property
    def classes(self) -> int:
        """Labels that it knows; one more stands for none. 0: it is told texts."""
        return 0 if self.traits.texts else self.num_embeds_ada_norm

    @property
    def texts(self) -> Texts | None:
        """The states of a text that it takes."""
        tokens = getattr(self, "text_tokens", None) or self.traits.text_tokens
        return Texts.of(self.to_dict(), tokens) if self.traits.texts else None

    def kind(self) -> Any:
        """The class of diffusers. ValueError naming the extra where it is not installed."""
        if (reason := missing()) is not None:
            raise ValueError(f"{self.class_name} {reason}")
        import diffusers  # optional, slow

        return getattr(diffusers, self.class_name)

    def options(self) -> dict[str, Any]:
        """What the class is built with."""
        known = inspect.signature(self.kind().__init__).parameters
        return {name: getattr(self, name) for name in known if name != "self" and hasattr(self, name)}

    def pictures(self) -> Pictures:
        """How its pictures are read."""
        return Pictures(self.num_channels, self.image_size, self.classes, self.texts, self.traits)

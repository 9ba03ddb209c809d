"""config.json of a diffusers transformer as a configuration of transformers: the same keys, and a model_type.

What a class is built with are the keys that its own __init__ names; the others (`_diffusers_version`) are
kept and not read.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedConfig

from ..names import listed
from .names import ARCHITECTURE, CLASSES, KEY, MODEL_TYPE, missing
from .pictures import Pictures

# Of what is trained: how many of each there are, which diffusers always writes.
COUNTS = ("sample_size", "in_channels", "patch_size", "num_embeds_ada_norm")
MOST = 1 << 20  # of any of them: what is beyond cannot be held, and is a mistake in the file


class DiffusersConfig(PreTrainedConfig):
    """class_name: of diffusers, one of CLASSES. ValueError for another, and for a wrong count."""

    model_type = MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        self.class_name = str(kwargs.pop(KEY, kwargs.pop("class_name", next(iter(CLASSES)))))
        if self.class_name not in CLASSES:
            raise ValueError(f"{KEY}: got {self.class_name!r}; allowed: {listed(CLASSES)}")
        for key in COUNTS:
            value = kwargs.get(key)
            # transformers makes one of nothing, too, to compare with
            needed = CLASSES[self.class_name] and bool(kwargs)
            if (value is not None or needed) and not (type(value) is int and 1 <= value <= MOST):
                raise ValueError(f"{key}: got {value!r}; allowed is a count of 1 to {MOST}")
        kwargs.pop("architectures", None)
        super().__init__(architectures=[ARCHITECTURE], **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """With the name where diffusers reads it."""
        found = super().to_dict()
        found.pop("class_name", None)
        return found | {KEY: self.class_name}

    @property
    def image_size(self) -> int:
        return self.sample_size

    @property
    def num_channels(self) -> int:
        return self.in_channels

    @property
    def classes(self) -> int:
        """Labels that it knows; one more stands for none."""
        return self.num_embeds_ada_norm

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
        return Pictures(self.num_channels, self.image_size, self.classes)

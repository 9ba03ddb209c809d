"""data.synthesis: training rows that the full-precision model writes itself. SYNTHESIS is the list.

Acts before the first stage: rows are there before anything is quantized, so a calibrator that looks at text
(gptq) looks at these. It may touch its own folder of the run, synthesis/, only.

    base.py     the keys that all kinds share, and the maker of rows
    folder.py   synthesis/: shards, hashes, going on
    text.py     kinds whose rows are tokens      voice.py    Rows and Row, what such a kind has to say
    write.py    the model writes a batch of rows      draw.py      one token of a distribution
    filters.py  which of them are trained on
    schema.py   a task as it is asked            judged.py   what the model says of rows of a task
    invert.py   images from noise                priors.py   what a model says of an image without label
    labeller.py how a task of images answers

To add one: a TextConfig with `rows`, the Rows it makes, the Row that takes one token after the other; and a
line in SYNTHESIS.
"""

from .base import SynthesisConfig
from .filters import FilterConfig
from .self_chat import SelfChatConfig
from .self_generated import SelfGeneratedConfig
from .task_images import TaskImagesConfig
from .task_labels import TaskLabelsConfig
from .text import TextConfig
from .voice import Row, Rows, Voice

SYNTHESIS: dict[str, type[SynthesisConfig]] = {
    "self_generated": SelfGeneratedConfig,
    "self_chat": SelfChatConfig,
    "task_labels": TaskLabelsConfig,
    "task_images": TaskImagesConfig,
}

__all__ = ["SYNTHESIS", "FilterConfig", "Row", "Rows", "SynthesisConfig", "TextConfig", "Voice"]

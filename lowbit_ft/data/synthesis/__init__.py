"""data.synthesis: training rows that the full-precision model writes itself. SYNTHESIS is the list.

Acts before the first stage: rows are there before anything is quantized, so a calibrator that looks at text
(gptq) looks at these. It may touch its own folder of the run, synthesis/, only.

    base.py     the keys that all kinds share; Rows and Row, what a kind has to say
    write.py    the model writes a batch of rows      draw.py      one token of a distribution
    filters.py  which of them are trained on          folder.py    synthesis/: shards, hashes, going on

To add one: a config with `rows`, the Rows it makes, the Row that takes one token after the other; and a line
in SYNTHESIS.
"""

from .base import FilterConfig, Row, Rows, SynthesisConfig, Voice
from .self_chat import SelfChatConfig
from .self_generated import SelfGeneratedConfig

SYNTHESIS: dict[str, type[SynthesisConfig]] = {
    "self_generated": SelfGeneratedConfig,
    "self_chat": SelfChatConfig,
}

__all__ = ["SYNTHESIS", "FilterConfig", "Row", "Rows", "SynthesisConfig", "Voice"]

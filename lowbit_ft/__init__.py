"""lowbit_ft: fine-tune a low-bit language model whose trained integers are the integers that ship.

    recipe = lowbit_ft.load_recipe("recipes/quickstart.yaml")
    folder = lowbit_ft.run(recipe)            # a Hugging Face folder, ready to serve

Two configs are for your own scripts: `LowBitQuantConfig`, a quantization_config of from_pretrained, packs a
dense checkpoint while it loads; `LowBitConfig` is PEFT's, for adapters on a packed model.

The stages of `run` are functions of `lowbit_ft.pipeline` (quantize, train, merge, export, verify, evaluate,
generate, report); they are not repeated here because the files they call have the same names. Names are
resolved on first use: importing the package reads no model code and touches no device. It waits for
transformers and peft to be imported, and then makes `AutoModelForCausalLM.from_pretrained` and
`PeftModel.from_pretrained` read our folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations import register

if TYPE_CHECKING:
    from .integrations.peft import LowBitConfig
    from .pipeline import run
    from .quantize.while_loading import LowBitQuantConfig
    from .recipe.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["LowBitConfig", "LowBitQuantConfig", "Recipe", "load_recipe", "run"]

_HOME = {
    "LowBitConfig": "integrations.peft",
    "LowBitQuantConfig": "quantize.while_loading",
    "Recipe": "recipe.recipe",
    "load_recipe": "recipe.recipe",
    "run": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit_ft' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()

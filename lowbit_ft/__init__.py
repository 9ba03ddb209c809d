"""lowbit_ft: fine-tune a low-bit language model whose trained integers are the integers that ship.

    recipe = lowbit_ft.load_recipe("recipes/quickstart.yaml")
    folder = lowbit_ft.run(recipe)            # a Hugging Face folder, ready to serve

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
    from .pipeline import run
    from .recipe.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "load_recipe", "run"]

_HOME = {"Recipe": "recipe.recipe", "load_recipe": "recipe.recipe", "run": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit_ft' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()

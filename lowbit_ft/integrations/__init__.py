"""Integrations: our names in other libraries' tables, put there when (and only when) those libraries are
imported.

`register()` runs at `import lowbit_ft`. Registering needs `transformers.quantizers`, whose import takes about
two seconds, and a program that only reads a recipe needs none of it; so a finder on sys.meta_path waits for
that import and registers right behind it. Where transformers is imported already, it registers at once.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ..diffusion import names as diffusion
from ..diffusion.register import register as register_diffusion
from ..speech.names import MODEL_TYPE
from ..speech.register import register as register_speech


def register() -> None:
    """Make AutoModelForCausalLM.from_pretrained and PeftModel.from_pretrained read our folders.
    Idempotent.
    """
    after_import(
        "transformers.quantizers.auto", lambda: importlib.import_module("lowbit_ft.integrations.transformers")
    )
    after_import("peft", lambda: importlib.import_module("lowbit_ft.integrations.peft"))
    after_import("transformers.models.auto.modeling_auto", _models)
    after_import("transformers.modeling_layers", _models)


def _models() -> None:
    """Our own models, for the auto classes. transformers' layers import these before they have anything, and
    our model imports the layers: what is halfway there has its turn when it is done."""
    awaited = {
        "transformers.modeling_layers": "GradientCheckpointingLayer",
        "lowbit_ft.speech.codec": "SpeechCodec",
        "lowbit_ft.diffusion.transformer": diffusion.ARCHITECTURE,
    }
    there = {name: sys.modules[name] for name in awaited if name in sys.modules}
    if all(hasattr(module, awaited[name]) for name, module in there.items()):
        register_speech({"model_type": MODEL_TYPE})
        register_diffusion({"model_type": diffusion.MODEL_TYPE})


def after_import(name: str, callback: Callable[[], object]) -> None:
    """Call `callback` once, right after the module `name` was imported; now, if it is imported already."""
    if name in sys.modules:
        callback()
    elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, callback))


class _Waiting(MetaPathFinder):
    """Finds one module by asking all other finders, and takes itself off the list in doing so."""

    def __init__(self, name: str, callback: Callable[[], object]):
        self.name, self.callback = name, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.callback)
        return spec


class _Then(Loader):
    """The module's own loader, then the callback."""

    def __init__(self, loader: Loader, callback: Callable[[], object]):
        self.loader, self.callback = loader, callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = (
            self.loader
        )  # what tools that look at the module expect to see
        self.loader.exec_module(module)
        self.callback()

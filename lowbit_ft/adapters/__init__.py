"""Adapters: one method per file, its equation in the docstring. ADAPTERS is the list: method name -> config
class.

A new method is a file with a config (`build`, `reject`) and a module (`grid_args`), and one line in this
table; the recipe, the PEFT integration, the law test and the quality benchmark read the table.
"""

from .alpha_tuning import AlphaTuningConfig
from .base import SCALE_PARAMETERS, Adapter, AdapterConfig
from .dl_qat import DLQATConfig
from .ef_qat import EfQATConfig
from .full_qat import FullQATConfig
from .l4q import L4QConfig
from .lora import LoraConfig
from .lota import LotaConfig
from .lr_qat import LRQATConfig
from .scale import ScaleConfig

ADAPTERS: dict[str, type[AdapterConfig]] = {
    "lr_qat": LRQATConfig,
    "dl_qat": DLQATConfig,
    "l4q": L4QConfig,
    "lota": LotaConfig,
    "scale": ScaleConfig,
    "full_qat": FullQATConfig,
    "ef_qat": EfQATConfig,
    "alpha_tuning": AlphaTuningConfig,
    "lora": LoraConfig,
}


def is_scale(parameter: str) -> bool:
    """Whether the parameter of this name belongs to the optimizer's scale group."""
    last = parameter.rpartition(".")[2]
    return any(last in config.scale_parameters for config in ADAPTERS.values())


__all__ = ["ADAPTERS", "SCALE_PARAMETERS", "Adapter", "AdapterConfig", "is_scale"]

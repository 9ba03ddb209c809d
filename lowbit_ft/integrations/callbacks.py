"""StepCallback: a Trainer of transformers (or TRL) tells the adapters which optimizer step comes next.

    trainer = SFTTrainer(model, ..., callbacks=[StepCallback()])

l4q's warm-up (`warmup_steps`) and ef_qat's choice of rows (`refresh_steps`) count optimizer steps; our own
loop tells them, other people's loops do not know that there is anything to tell. A loop without callbacks
calls `begin_step(model, step, optimizer)` itself.
"""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..adapters.attach import adapted_layers
from ..adapters.attach import begin_step as begin_attached
from ..adapters.carry import carry_rows
from .peft_layer import LowBitLinear

__all__ = ["StepCallback", "begin_step"]


def begin_step(model: nn.Module, step: int, optimizer: Any = None) -> None:
    """Before optimizer step `step` (0-based): for adapters of PEFT and of attach(), under any wrapping (DDP,
    compiled). optimizer: whose averages follow the rows that ef_qat chooses anew; without it they stay where
    they are. ValueError when the model has neither.
    """
    wrapped = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    carried = [one for layer in wrapped for one in layer.begin_step(step)]
    carried += begin_attached(model, step)
    if optimizer is not None:
        carry_rows(optimizer, carried)
    if not wrapped and not any(adapted_layers(model)):
        raise ValueError("begin_step: the model has no adapters of lowbit_ft; get_peft_model or attach first")


class StepCallback(TrainerCallback):
    """begin_step at the start of every optimizer step."""

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        begin_step(model, state.global_step, optimizer)

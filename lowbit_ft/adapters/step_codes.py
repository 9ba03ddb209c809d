"""StepCodes: the codes of one layer, made once per optimizer step and used by every forward, recomputation
and backward of it.

Codes are a function of the trained tensors and the base, which change between steps only. With
train.keep_codes the first forward of a step (training mode, gradients on) keeps them: b bits per weight,
until the step ends. Nobody has to say when:

    versions    each tensor must be the very one they were made of, in the same memory and at the same
                version, so whoever writes to one (a loaded checkpoint, a method's schedule, a hand) makes
                them void
    optimizers  write past the versions (torch's fused AdamW, bitsandbytes): after the step of any optimizer
                they are dropped
    begin_step  drops them too (attach.py): for what writes through a raw pointer and is no torch optimizer

They are no part of a module's state: not in state dicts, not in copies, not used in eval mode or by merge.
"""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..grid import GridArgs, PackedWeight


class StepCodes:
    """The slot. `checked_outside`: somebody calls `refresh` before every forward, which a compiled forward
    cannot do itself.
    """

    def __init__(self) -> None:
        self.codes: Tensor | None = None
        self.made_of: list[tuple[Tensor, int, int]] = []
        self.checked_outside = False
        # The hook lives as long as the slot and does not hold it.
        hook = register_optimizer_step_post_hook(partial(_after_step, weakref.ref(self)))
        weakref.finalize(self, hook.remove)

    def get(self, base: PackedWeight, args: GridArgs, trained: Iterable[Tensor]) -> Tensor | None:
        """The codes of linear(x, args): kept ones if they hold, else made now. None where versions are not
        counted (inference mode).
        """
        tensors = [*trained, *base.to_tensors().values()]
        if any(tensor.is_inference() for tensor in tensors):
            self.drop()
            return None
        if not self.holds(tensors):
            self.drop()  # before the new ones are made: never two at once
            self.codes = base.codes_of(args)
            self.made_of = [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]
        return self.codes

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether the codes were made of these tensors as they are now."""
        if self.codes is None or len(tensors) != len(self.made_of):
            return False
        return all(
            a is b and a._version == version and a.data_ptr() == place
            for a, (b, version, place) in zip(tensors, self.made_of, strict=True)
        )

    def drop(self) -> None:
        self.codes, self.made_of = None, []

    def __deepcopy__(self, memo: dict[int, object]) -> "StepCodes":
        return StepCodes()

    def __reduce__(self) -> tuple[type["StepCodes"], tuple[()]]:
        return StepCodes, ()


def _after_step(slot: "weakref.ref[StepCodes]", *_: Any) -> None:
    if (codes := slot()) is not None:
        codes.drop()

"""The warning of a training loop that does not count its steps for the adapters."""

import functools
import warnings


@functools.cache
def say_uncounted(method: str, what: str) -> None:
    """Warn, once."""
    warnings.warn(
        f"{method}: {what} here, because this training loop does not say which step it is at. In a Trainer "
        "of transformers or TRL: callbacks=[lowbit_ft.integrations.callbacks.StepCallback()]; in a loop of "
        "your own: begin_step(model, step) of the same module before every optimizer step",
        stacklevel=3,
    )

"""Optimizers: train.optimizer. OPTIMIZERS is the list: how each is made, and what it keeps.

To add one: what makes it of parameter groups and the train section, in its own file, and one line in
OPTIMIZERS.
"""

from .adamw import adamw
from .base import Groups, Optimizer
from .bnb import adagrad, adam, ademamix, bitsandbytes, lion, momentum, rmsprop
from .t_signsgd import problem, t_signsgd

# Not here: (Paged)AdEMAMix32bit, whose state has the wrong shape (bitsandbytes 0.50); AdEMAMix is 32 bit as
# it is.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(adamw, states=2, counter=4, shards=True, short=True),
    "adamw32bit": bitsandbytes("AdamW32bit", adam, states=2),
    "adamw8bit": bitsandbytes("AdamW8bit", adam, states=2),
    "paged_adamw": bitsandbytes("PagedAdamW", adam, states=2),
    "paged_adamw32bit": bitsandbytes("PagedAdamW32bit", adam, states=2),
    "paged_adamw8bit": bitsandbytes("PagedAdamW8bit", adam, states=2),
    "adam": bitsandbytes("Adam", adam, states=2),
    "adam32bit": bitsandbytes("Adam32bit", adam, states=2),
    "adam8bit": bitsandbytes("Adam8bit", adam, states=2),
    "paged_adam": bitsandbytes("PagedAdam", adam, states=2),
    "paged_adam32bit": bitsandbytes("PagedAdam32bit", adam, states=2),
    "paged_adam8bit": bitsandbytes("PagedAdam8bit", adam, states=2),
    "ademamix": bitsandbytes("AdEMAMix", ademamix, states=3),
    "ademamix8bit": bitsandbytes("AdEMAMix8bit", ademamix, states=3),
    "paged_ademamix": bitsandbytes("PagedAdEMAMix", ademamix, states=3),
    "paged_ademamix8bit": bitsandbytes("PagedAdEMAMix8bit", ademamix, states=3),
    "lion": bitsandbytes("Lion", lion),
    "lion32bit": bitsandbytes("Lion32bit", lion),
    "lion8bit": bitsandbytes("Lion8bit", lion),
    "paged_lion": bitsandbytes("PagedLion", lion),
    "paged_lion32bit": bitsandbytes("PagedLion32bit", lion),
    "paged_lion8bit": bitsandbytes("PagedLion8bit", lion),
    "rmsprop": bitsandbytes("RMSprop", rmsprop),
    "rmsprop32bit": bitsandbytes("RMSprop32bit", rmsprop),
    "rmsprop8bit": bitsandbytes("RMSprop8bit", rmsprop),
    "sgd": bitsandbytes("SGD", momentum),
    "sgd32bit": bitsandbytes("SGD32bit", momentum),
    "sgd8bit": bitsandbytes("SGD8bit", momentum),
    "lamb": bitsandbytes("LAMB", adam, states=2),
    "lamb32bit": bitsandbytes("LAMB32bit", adam, states=2),
    "lamb8bit": bitsandbytes("LAMB8bit", adam, states=2),
    "lars": bitsandbytes("LARS", momentum),
    "lars32bit": bitsandbytes("LARS32bit", momentum),
    "lars8bit": bitsandbytes("LARS8bit", momentum),
    "adagrad": bitsandbytes("Adagrad", adagrad),
    "adagrad32bit": bitsandbytes("Adagrad32bit", adagrad),
    "adagrad8bit": bitsandbytes("Adagrad8bit", adagrad),
    "t_signsgd": Optimizer(t_signsgd, states=0, ternary=True, problem=problem),
}

__all__ = ["OPTIMIZERS", "Groups", "Optimizer"]

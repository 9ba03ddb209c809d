"""What an optimizer of the table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Groups = list[dict[str, Any]]  # what torch.optim takes: params, lr, weight_decay, and our name and peak


@dataclass(frozen=True)
class Optimizer:
    """make(groups, section) -> a torch.optim.Optimizer; ValueError where it cannot run.

    states: averages it keeps per trained number, of `bits` each (8: bitsandbytes' blocks); paged: they may
    wait in CPU memory; counter: bytes per tensor besides; shards: it can step on the shards of FSDP2;
    ternary: it steps between -1, 0 and 1, for the methods whose numbers those are; short: it can step on a
    group that is held in less than fp32, whose "master" says in what; package: what must be installed for it;
    problem(section): (key of train, what is wrong with it), None when nothing is.
    """

    make: Callable[[Groups, Any], torch.optim.Optimizer]
    states: int = 1
    bits: int = 32
    paged: bool = False
    counter: int = 0
    shards: bool = False
    ternary: bool = False
    package: str | None = None
    short: bool = False
    problem: Callable[[Any], tuple[str, str] | None] = lambda section: None

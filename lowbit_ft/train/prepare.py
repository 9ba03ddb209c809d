"""What training changes on a model, and how it is undone.

    attention by segments, MLPs in chunks, noise on embeddings, kept codes, the loss as the model's forward,
    checkpointing and offload of layer inputs, compiled layers, accelerate's wrapper (mixed precision, DDP)

`Prepared` does it in this order and `release` gives the model back as it came. What refuses, refuses while
little has been changed, and takes that back first.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from types import MethodType
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..adapters.attach import keep_codes
from ..model.mlp_chunks import cut_mlps
from ..model.shards import is_sharded
from ..model.walk import decoder_layers
from ..signals import Lesson
from .compiling import compile_layers
from .goal import NEXT_TOKENS, Goal
from .losses import LABELS
from .neftune import EmbeddingNoise
from .offload import Offload, open_store
from .processes import world
from .setup import activation_checkpointing, share_frozen


class Prepared:
    """A model as it trains. wrapped: what a training forward calls; it returns the sums of the parts of the
    loss.
    """

    def __init__(
        self,
        model: Any,
        section: Any,
        accelerator: Accelerator,
        run_dir: Path,
        lesson: Lesson = LABELS,
        goal: Goal = NEXT_TOKENS,
    ) -> None:
        self.model, self.section, self.accelerator = model, section, accelerator
        sharded = is_sharded(model)
        with ExitStack() as changes:
            changes.enter_context(goal.attention(model, lesson))
            if section.mlp_chunk is not None:
                changes.callback(cut_mlps(model, decoder_layers(model)[1], section.mlp_chunk))
            self.offload = None
            if section.offload != "no":
                self.offload = Offload(open_store(section.offload, accelerator.device, run_dir))
                changes.callback(self.offload.store.close)
            self.noise: EmbeddingNoise | None = None
            if section.neftune_alpha is not None:
                self.noise = EmbeddingNoise(
                    model, section.neftune_alpha, section.seed, accelerator.process_index
                )
                changes.callback(self.noise.remove)
            keep_codes(model, section.keep_codes)
            changes.callback(keep_codes, model, False)
            loss = goal.forward(model, section, lesson, changes)
            self.restored = changes.pop_all()  # nothing was refused: undone by release()
        self.own_forward = vars(model).get("forward")
        model.forward = MethodType(loss, model)
        if section.gradient_checkpointing:
            activation_checkpointing(model, True, self.offload)
        self.undo_compile = compile_layers(model) if section.compile else None
        # torch 2.13 renames broadcast_buffers; accelerate does not know it yet
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            if not sharded:
                share_frozen(model)
            # A sharded model averages its gradients itself: it gets mixed precision, but not DDP around it.
            # accelerate moves a model to "cpu:0", which copies every tensor, and with them the pages of base/
            # (model/mapped.py).
            move = None if accelerator.device.type != "cpu" else False
            self.wrapped: Any = accelerator.prepare_model(
                model, device_placement=move, evaluation_mode=sharded
            )
        ddp = isinstance(self.wrapped, nn.parallel.DistributedDataParallel)
        assert world() == 1 or ddp != sharded, "several processes, and nothing adds their gradients up"
        model.train()

    def release(self) -> None:
        """The model as it came: no wrappers, its own forward, in eval mode."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        if self.undo_compile is not None:
            self.undo_compile()
        vars(self.model).pop("forward", None)
        if self.own_forward is not None:
            self.model.forward = self.own_forward
        if self.section.gradient_checkpointing:
            activation_checkpointing(self.model, False)
        self.restored.close()
        self.model.eval()

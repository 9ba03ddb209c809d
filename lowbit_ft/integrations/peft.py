"""LOWBIT, a PEFT method: our adapters behind PEFT's own calls. Importing this module registers it.

    model = get_peft_model(packed_model, LowBitConfig(method="lr_qat", rank=16))   # or options={"rank": 16}
    model.save_pretrained(folder);  PeftModel.from_pretrained(packed_model, folder)
    model.load_adapter(folder, "french");  model.set_adapter("french")   # many tasks, one set of integers
    model.merge_and_unload()                                # packed integers, no adapter, no residual

A LowBitLinear wraps a PackedLinear (`base_layer`) and holds one Adapter per name in `lowbit_adapters`.
One is active at a time: they decide how the weight is *rounded*, and round(a + b) is not round(a) + round(b),
so two cannot be added, and unmerging cannot subtract: a merge leaves the base alone and is forgotten.

`modules_to_save` and `trainable_token_indices` train beside the integers (peft_whole.py). A loop that is not
ours tells l4q's warm-up its steps with `model.begin_step(step)`, or by callbacks.py.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import PeftType
from torch import Tensor, nn

from ..activations.place import scheme_of
from ..adapters import AdapterConfig
from ..adapters.attach import PEFT_SLOT, base_digest
from ..adapters.carry import Carried
from ..adapters.dense import held_short
from ..adapters.folder import refuse_pickle
from ..adapters.patterns import refuse_unmatched
from ..grid import Weight
from ..model.fused import Fused
from ..model.linear import PackedEmbedding, PackedLinear, deployed, in_memory, leave_out_of_ddp
from ..segments import layout, read_layout, segments_of
from .adapter_files import (
    NOT_OPTIONS,
    PEFT_TYPE,
    adapter_config,
    adapter_options,
    check_adapter,
    read_adapter,
    refuse_keys_of_others,
    refuse_other_base,
    say_on_card,
    with_parts,
    write_adapter,
)
from .lora_names import from_lora, plain_names
from .peft_combine import add_weighted_adapter
from .peft_extend import extend
from .peft_layer import LowBitLinear, make_room, one_name, outside_hosts, packed_hosts
from .peft_whole import resized_keys, settle_whole, whole_keys

__all__ = ["LowBitConfig", "LowBitLinear", "LowBitModel", "read_adapter", "write_adapter"]


@dataclass(init=False)
class LowBitConfig(PeftConfig):
    """method: a name of ADAPTERS; its own keys as keywords (rank=8) or in options={"rank": 8}. Those of
    LoraConfig (r, lora_alpha) are understood where they mean the same (lora_names.py).

    target_modules: names (ends of layer names), a regex, or None for every packed layer; exclude_modules
    likewise. modules_to_save: names of dense modules that are trained whole and saved with the adapter (a new
    head); trainable_token_indices: tokens whose rows of the embedding are trained, a list or {module: list}.
    A tied head stays tied. segments: "auto" gives a matrix that is several in one (q, k and v; gate and up)
    an A and a B of `rank` for each of them, by torch.export of the model's config; in a saved config it is
    the list that was found. base_digest, filled in by get_peft_model, names the packed base; another is
    refused when the adapter is loaded. ValueError with a line per key or value that the method has not.
    """

    method: str = "lr_qat"
    options: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    segments: str | list[dict[str, Any]] | None = None
    base_digest: str | None = None

    def __init__(
        self,
        method: str = "lr_qat",
        options: dict[str, Any] | None = None,
        target_modules: list[str] | str | None = None,
        exclude_modules: list[str] | str | None = None,
        modules_to_save: list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        segments: str | list[dict[str, Any]] | None = None,
        base_digest: str | None = None,
        **others: Any,
    ):
        ours = {f.name for f in fields(PeftConfig)}
        self.restored = "peft_type" in others  # of a saved config: its tensors come from a file
        super().__init__(**{key: value for key, value in others.items() if key in ours})
        self.peft_type = PeftType[PEFT_TYPE]
        keys = {key: value for key, value in others.items() if key not in ours}
        if self.restored and keys:
            warnings.warn(
                f"adapter_config.json: unknown keys {sorted(keys)} of a newer version are ignored",
                stacklevel=2,
            )
            keys = {}
        keys = from_lora(method, keys)
        if twice := sorted(keys.keys() & (options or {}).keys()):
            raise ValueError(
                f"LowBitConfig: {', '.join(twice)} given both in options and as a keyword; give each once"
            )
        refuse_keys_of_others(keys)
        if given := [key for key in NOT_OPTIONS if {**(options or {}), **keys}.get(key) is not None]:
            raise ValueError(
                f"LowBitConfig: {given[0]} is a key of recipes; PEFT's own are target_modules and "
                "modules_to_save (init_from: train with a recipe)"
            )
        self.method = method
        own = [f.name for f in fields(self) if f.name not in {*ours, "options", "base_digest"}]
        self.options = adapter_options(adapter_config(method, {**(options or {}), **keys}, own))
        everything = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
        self.target_modules = None if everything else plain_names(target_modules)
        self.exclude_modules = plain_names(exclude_modules)
        if isinstance(modules_to_save, str):
            raise ValueError(
                f"modules_to_save: got {modules_to_save!r}; allowed: a list; write [{modules_to_save!r}]"
            )
        self.modules_to_save = None if modules_to_save is None else list(modules_to_save)
        self.modules_to_tie: list[str] | None = None  # what shares the matrix of the first of them
        self.trainable_token_indices = trainable_token_indices
        if isinstance(segments, str) and segments not in ("auto", "none"):
            raise ValueError(f"segments: got {segments!r}; allowed: auto, none")
        self.segments = None if segments == "none" else segments
        if self.segments is not None:
            with_parts(self.adapter, {} if self.segments == "auto" else read_layout(self.segments))
        self.base_digest = base_digest
        # Once the model is known: what PEFT's matching of layer names reads, and what builds each layer's
        # tensors.
        self.matcher: SimpleNamespace | None = None
        self.by_layer: dict[str, AdapterConfig] = {}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        refuse_pickle(folder)
        check_adapter(folder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        say_on_card(Path(save_directory))

    @property
    def adapter(self) -> AdapterConfig:
        """The method's config, checked."""
        return adapter_config(self.method, self.options)

    def start(self) -> AdapterConfig:
        """What tensors are built from. An adapter that is loaded has its SVD and its warm-up behind it."""
        config = self.adapter
        if self.segments not in (None, "auto"):
            config = with_parts(config, read_layout(self.segments))
        passed = {"init": "zero", "warmup_steps": 0} if self.restored else {}
        return config.model_copy(update={k: v for k, v in passed.items() if k in type(config).model_fields})


def _bases(config: LowBitConfig, hosts: dict[str, PackedLinear]) -> Iterator[tuple[str, Weight]]:
    """The bases of the layers that get an adapter, one at a time."""
    for name, layer in hosts.items():
        if check_target_module_exists(config.matcher, name):
            with in_memory(layer):
                yield name, layer.base


class LowBitModel(BaseTuner):
    """PEFT's view of a packed model: which layers get adapters, and every check before the first does."""

    prefix = "lowbit_"
    tuner_layer_cls = LowBitLinear
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: LowBitConfig, model_config: dict) -> LowBitConfig:
        return peft_config  # target_modules None means every packed layer, and stays None in the file

    def _check_tied_modules(self, model: nn.Module, peft_config: LowBitConfig) -> None:
        settle_whole(model, peft_config, self._get_module_names_tied_with_embedding())

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        leave_out_of_ddp(model, ("model.", "base_model.model."))

    def _prepare_model(self, peft_config: LowBitConfig, model: nn.Module) -> None:
        """Every check, before the first layer is touched. ValueError in the user's terms."""
        hosts = packed_hosts(model)
        if not hosts:
            raise ValueError(
                "the model has no packed layers: quantize it first; adapters of this kind train on integers"
            )
        if any(layer.adapter is not None for layer in hosts.values()):
            raise ValueError(
                "the model has adapters from attach(); use write_adapter and load the folder on a fresh base"
            )
        self._check_names(hosts)
        if peft_config.restored and "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            raise ValueError(
                "the model has layers on the disk, where transformers' load_adapter leaves the adapters of "
                "those layers unread: load the folder with PeftModel.from_pretrained(model, folder)"
            )
        # Hashed once, while no layer is wrapped: the wrapping changes layer names and never a base.
        if not hasattr(model, "lowbit_base_digest"):
            model.lowbit_base_digest = base_digest(model)  # pyright: ignore[reportArgumentType]
        digest = str(model.lowbit_base_digest)
        if peft_config.base_digest is not None:
            refuse_other_base(digest, peft_config.base_digest, "adapter")
        if peft_config.segments == "auto":
            found = segments_of(model.config)
            parts = {name: found[name].outputs for name in hosts if name in found and found[name].outputs}
            peft_config.segments = layout(parts)
        config = peft_config.start()
        if config.wants_weight:
            raise ValueError(
                f"adapter.init: {getattr(config, 'init', '')} reads the dense weights, "
                "which a packed model no longer has: use init: svd with residual bits, or train with a recipe"
            )
        learned = next((n for n, h in hosts.items() if (s := scheme_of(h)) is not None and s.learn), None)
        if learned is not None:
            raise ValueError(
                f"{learned}: the scale or clip of its input trains with the adapter "
                "(quant.activations.learn), which PEFT's layers do not do; load merged/ of the run, whose "
                "inputs are on the trained ones, or pack a base with learn: false"
            )
        # An embedding is looked up; there is no product for an adapter to be in.
        hosts = {name: layer for name, layer in hosts.items() if not isinstance(layer, PackedEmbedding)}
        targets = list(hosts) if peft_config.target_modules is None else peft_config.target_modules
        peft_config.matcher = SimpleNamespace(
            target_modules=targets,
            exclude_modules=peft_config.exclude_modules,
            modules_to_save=peft_config.modules_to_save,
            target_parameters=None,
        )
        problems = []
        for name, module in outside_hosts(model, hosts):
            if not self._check_target_module_exists(peft_config, name):
                continue
            if isinstance(module, Fused):
                problems.append(
                    f"{name}: its parts are packed apart, and each has an adapter of its own; name these: "
                    f"{', '.join(module.fusion)}"
                )
            elif name not in hosts:
                problems.append(
                    f"{name}: a {type(module).__name__}, not a packed linear layer; "
                    "quantize it, or leave it out of target_modules"
                )
            elif reason := config.reject(hosts[name].grid):
                problems.append(f"{name}: {reason}")
        if problems:
            raise ValueError(
                f"adapter {config.method} cannot train these layers:\n  " + "\n  ".join(problems)
            )
        if not peft_config.restored:
            trained = [name for name in hosts if self._check_target_module_exists(peft_config, name)]
            refuse_unmatched(config, trained, "LowBitConfig: ")
        peft_config.base_digest = digest
        peft_config.by_layer = dict(config.over(_bases(peft_config, hosts)))

    def _check_names(self, hosts: dict[str, PackedLinear]) -> None:
        """PEFT finds an adapter's tensors by its name between dots: it must occur nowhere else in a key."""
        taken = {part for name in hosts for part in name.split(".")} | {
            "base_model",
            "base_layer",
            "model",
            PEFT_SLOT,
        }
        taken |= {"A", "B", "log_scale", "magnitude", "offset", "plane_scale"}
        taken |= {"delta", "rows", "left", "left_codes", "input_size"}
        for name in self.peft_config:
            if not name or "." in name or name in taken or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"adapter name {name!r}: it has a dot, or is a part of a layer, tensor or module name; "
                    "choose another"
                )

    @staticmethod
    def _check_target_module_exists(peft_config: LowBitConfig, key: str) -> Any:
        return check_target_module_exists(peft_config.matcher, key)

    def _create_and_replace(
        self,
        peft_config: LowBitConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if not isinstance(target, LowBitLinear):
            assert isinstance(target, PackedLinear), "_prepare_model lets only packed layers through"
            wrapped = LowBitLinear(target).train(target.training)
            self._replace_module(parent, target_name, wrapped, target)
            target = wrapped
        config = peft_config.by_layer[current_key]
        if not peft_config.inference_mode and (master := held_short(config)) is not None:
            raise ValueError(
                f"master: got {master!r}, which is for the AdamW of `lowbit-ft run` alone: any other loses "
                "the steps that it rounds away; set master: fp32"
            )
        target.update_layer(adapter_name, config.of_layer(current_key))

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)  # PEFT's version reads child.weight, which dequantizes

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        one_name(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def begin_step(self, step: int) -> list[Carried]:
        """Tell the active adapters which optimizer step (0-based) comes next (l4q's warm-up counts them).
        What comes back is for `carry_rows(optimizer, ...)` of adapters/carry.py: rows that ef_qat has chosen
        anew.
        """
        layers = [layer for layer in self.model.modules() if isinstance(layer, LowBitLinear)]
        return [one for layer in layers for one in layer.begin_step(step)]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """(adapters, weights, adapter_name): their weighted sum as one more, where that is exact."""
        add_weighted_adapter(self, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: rows of one batch share the rounded weights; "
                "use set_adapter and one batch per adapter"
            )
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)  # masters are fp32, always

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        one_name(self.active_adapters if adapter_names is None else adapter_names)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        del model.lowbit_base_digest
        if merge:
            for name, layer in packed_hosts(model).items():
                if {"residual", "mask"} & set(dict(layer.named_buffers())):  # a layer that no adapter was on
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, deployed(layer, None))
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT warns about missing tensors and goes on with untrained ones; here that is an error."""
        misfits = make_room(model, adapter_name, state_dict)  # PEFT asks the model which keys there are
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        held = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        needed = {key for key in held if f".{PEFT_SLOT}.{adapter_name}." in key} | whole_keys(
            model, adapter_name
        )
        resized = resized_keys(model, adapter_name) & state.keys()
        wanted = {key: held[key] for key in needed | (resized & held.keys())}
        problems = misfits + [f"missing: {key}" for key in needed - state.keys()]
        problems += [f"unknown: {key}" for key in state.keys() - wanted.keys() - resized]
        problems += [
            f"{key}: got shape {tuple(state[key].shape)}, the adapter has {shape}"
            for key, shape in wanted.items()
            if key in state and tuple(state[key].shape) != shape
        ]
        if problems:
            raise ValueError(
                f"adapter {adapter_name!r} does not fit its config:\n  " + "\n  ".join(sorted(problems)[:20])
            )
        return state


extend(LowBitConfig, LowBitModel)

"""LowBitLinear: a PackedLinear inside PEFT. The base below, named adapters beside it, one of them in use.

PEFT's own helpers read `base_layer.weight` for a device or a dtype, which would dequantize the layer, and
cast what they move; the ones that matter are replaced here. Adapters keep fp32 masters, the base its
integers.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters import Adapter, AdapterConfig
from ..adapters.attach import PEFT_PREFIX, PEFT_SLOT, own_of
from ..adapters.carry import Carried
from ..grid import Weight
from ..model.linear import PackedLinear, deployed, in_memory

ONE_ACTIVE = (
    "one adapter can be active at a time, got {names}: each decides how the weights are rounded, and "
    "round(a + b) is not round(a) + round(b), so two cannot be added. Choose one with set_adapter(name)"
)


class LowBitLinear(nn.Module, BaseTunerLayer):
    """A PackedLinear with named adapters: x [..., K] -> [..., N] with the active one, else with the base."""

    adapter_layer_names = (PEFT_SLOT,)
    other_param_names = ("untrained",)

    def __init__(self, base_layer: PackedLinear):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lowbit_adapters = nn.ModuleDict()
        self.untrained: dict[
            str, frozenset[str]
        ] = {}  # adapter name -> parameters its config keeps fixed (train_scale: false)
        self.merged_adapters: list[str] = []
        self.merged_weight: Weight | None = None
        self._disable_adapters = False
        self._active_adapter = []

    def update_layer(self, adapter_name: str, config: AdapterConfig) -> None:
        """Add a fresh adapter, frozen until it is made active."""
        with in_memory(self.base_layer):
            adapter = config.build(self.base_layer.base)
        self.untrained[adapter_name] = frozenset(
            n for n, p in adapter.named_parameters() if not p.requires_grad
        )
        self.lowbit_adapters[adapter_name] = adapter.requires_grad_(False).train(self.training)

    def adapter_named(self, names: str | list[str]) -> tuple[str, Adapter] | None:
        """The one adapter of `names`, if this layer has it. ValueError for more than one name."""
        name = one_name(names)
        if name is None or name not in self.lowbit_adapters:
            return None
        adapter = self.lowbit_adapters[name]
        assert isinstance(adapter, Adapter)
        return name, adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = None if self.disable_adapters else self.adapter_named(self.active_adapters)
        merged = None if self.disable_adapters else self.merged_weight
        if found is None and merged is None:
            return self.base_layer(x)
        with in_memory(self.base_layer):
            if merged is not None:
                return self.base_layer.forward_with(x, merged.linear)
            assert found is not None
            adapter, base = found[1], self.base_layer.base
            return self.base_layer.forward_with(x, lambda rows: adapter(rows, base))

    def begin_step(self, step: int) -> list[Carried]:
        """Tell the active adapter which optimizer step (0-based) comes next; the rows that have moved for it
        (adapters/carry.py).
        """
        if found := self.adapter_named(self.active_adapters):
            with in_memory(self.base_layer):
                return found[1].begin_step(step, self.base_layer.base)
        return []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        one_name(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_untrained()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._keep_untrained()

    def _keep_untrained(self) -> None:
        """PEFT switches whole adapters on; what the method's options keep fixed is switched off again."""
        for adapter_name, names in self.untrained.items():
            for name in names:
                self.lowbit_adapters[adapter_name].get_parameter(name).requires_grad_(False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the packed weight of one adapter; the base stays. ValueError when another one is merged."""
        found = self.adapter_named(self.active_adapters if adapter_names is None else adapter_names)
        if found is None:
            return
        name, adapter = found
        if self.merged_adapters == [name]:  # in PEFT's words, which its users filter
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        if self.merged_adapters:
            raise ValueError(
                f"adapter {self.merged_adapters[0]!r} is merged; "
                f"call unmerge_adapter() before merging {name!r}"
            )
        if getattr(adapter, "warming", False):
            raise ValueError(
                f"adapter {name!r} is still in its warm-up, where nothing is rounded: "
                "call model.begin_step(step) before every optimizer step, or set warmup_steps: 0"
            )
        if safe_merge and not all(torch.isfinite(p).all() for p in adapter.parameters()):
            raise ValueError(  # in PEFT's words, which its users catch
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken: NaN or Inf, "
                "its training diverged"
            )
        with in_memory(self.base_layer):
            self.merged_weight, self.merged_adapters = adapter.merge(self.base_layer.base), [name]

    def unmerge(self) -> None:
        """Forget the merged weight: the base was never changed."""
        self.merged_weight, self.merged_adapters = None, []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> PackedLinear:
        """The layer without PEFT: the merged integers, or the base as it was."""
        if not merge:
            return self.base_layer
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return deployed(self.base_layer, self.merged_weight)

    def _apply(self, fn: Any, recurse: bool = True) -> "LowBitLinear":
        """`.to(dtype)` casts the bias only: adapters keep fp32 masters, packed tensors their dtypes."""

        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        self.base_layer._apply(fn)
        self.lowbit_adapters._apply(keep)
        if (weight := self.merged_weight) is not None:
            self.merged_weight = replace(weight, **{n: keep(t) for n, t in weight.to_tensors().items()})
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's version reads base_layer.weight for device and dtype, and casts the masters to the latter.
        adapter = self.lowbit_adapters[adapter_name] if adapter_name in self.lowbit_adapters else None
        if adapter is not None and not any(p.is_meta for p in adapter.parameters()):
            adapter.to(device or self.base_layer.base.scale.device)


def one_name(names: str | list[str]) -> str | None:
    """The single name in `names`; ValueError for several."""
    several = [names] if isinstance(names, str) else list(names)
    if len(several) > 1:
        raise ValueError(ONE_ACTIVE.format(names=several))
    return several[0] if several else None


def make_room(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> list[str]:
    """Give adapters whose buffers grow while they train those of a file that is about to be read; what cannot
    be theirs. state: by the keys of the file, which know no name of an adapter."""
    misfits = []
    for name, layer in model.named_modules():
        if isinstance(layer, LowBitLinear) and (found := layer.adapter_named(adapter_name)):
            # In the model of a PeftModel layers are called so already.
            key = f"{PEFT_PREFIX}{name.removeprefix(PEFT_PREFIX)}.{PEFT_SLOT}."
            own = own_of(state, key)
            if said := found[1].misfit(own):
                misfits.append(key + said)
            else:
                found[1].resize({tensor: tuple(value.shape) for tensor, value in own.items()})
    return misfits


def packed_hosts(model: nn.Module) -> dict[str, PackedLinear]:
    """Layer name -> PackedLinear, under the names that the layers have without PEFT's wrapping."""
    hosts: dict[str, PackedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowBitLinear):
            hosts[name] = module.base_layer
        elif isinstance(module, PackedLinear) and name.removesuffix(".base_layer") not in hosts:
            hosts[name] = module
    return hosts


def outside_hosts(model: nn.Module, hosts: dict[str, PackedLinear]) -> list[tuple[str, nn.Module]]:
    """named_modules, without what lies inside a packed layer or its wrapping."""
    inside = [name + "." for name, module in model.named_modules() if isinstance(module, LowBitLinear)]
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and not name.startswith(tuple(inside))
    ]

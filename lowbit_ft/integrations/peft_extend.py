"""What is extended in PEFT itself, once, when it is imported: the few places where it knows no methods but
its own.

- the PeftType enum and the method table, so that "LOWBIT" has a config and a model (the enum has no other way
  in);
- the count of print_trainable_parameters, which sees Parameters and would leave out the packed weights;
- save_pretrained, which would write a pickle where it is asked for one (safe_serialization=False): refused;
- prepare_model_for_kbit_training, which switches checkpointing on for the methods it lists: for a packed
  model it does what it does for 4-bit bitsandbytes. The sign it reads (`is_loaded_in_4bit`) is up during the
  call only: left up, TRL would cast the adapters' fp32 masters to bfloat16;
- loading over a base that a device map has spread: PEFT takes the hooks off and spreads the model anew, which
  packed tensors on the disk do not survive. Ours stay where they are, so the map is out of its sight
  meanwhile.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import nn

from .adapter_files import PEFT_TYPE
from .peft_layer import packed_hosts


def extend(config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """All of it. Idempotent: a module may be imported again."""
    if PEFT_TYPE in PeftType.__members__:
        return
    _add_method(config_class, model_class)
    PeftModel.get_nb_trainable_parameters = _count_packed(PeftModel.get_nb_trainable_parameters, model_class)
    PeftModel.save_pretrained = _no_pickle(PeftModel.save_pretrained, model_class)
    PeftModel.load_adapter = _where_it_lies(PeftModel.load_adapter)
    from_there = classmethod(_from_where_it_lies(PeftModel.from_pretrained.__func__))
    PeftModel.from_pretrained = from_there  # pyright: ignore[reportAttributeAccessIssue]
    _from_within(peft.prepare_model_for_kbit_training, _as_4_bit)


def _add_method(config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    member._sort_order_ = len(PeftType)  # pyright: ignore[reportAttributeAccessIssue]
    type.__setattr__(PeftType, PEFT_TYPE, member)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = PeftType._value2member_map_[PEFT_TYPE] = member
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=config_class, model_cls=model_class)


def _count_packed(plain: Callable[[PeftModel], Any], model_class: type[BaseTuner]) -> Any:
    @functools.wraps(plain)
    def counted(self: PeftModel) -> tuple[int, int]:
        trainable, total = plain(self)
        if isinstance(self.base_model, model_class):
            hosts = packed_hosts(self.base_model.model).values()
            total += sum(layer.in_features * layer.out_features for layer in hosts)
        return trainable, total

    return counted


def _no_pickle(plain: Callable[..., None], model_class: type[BaseTuner]) -> Any:
    @functools.wraps(plain)
    def save_pretrained(
        self: PeftModel, save_directory: str, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        if not safe_serialization and isinstance(self.base_model, model_class):
            raise ValueError(
                "safe_serialization=False: no pickle is written or read here; leave it out, and the adapter "
                "is saved as safetensors"
            )
        plain(self, save_directory, safe_serialization, *args, **kwargs)

    return save_pretrained


def _from_within(function: Any, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Make `function` do what around(function) does, as the same object: who wrote `from peft import` before
    us holds it by its name, and would not see another one put in its place."""
    plain = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    plain.__kwdefaults__ = function.__kwdefaults__
    function.__wrapped__ = plain  # what inspect.signature reads
    function.__code__, function.__defaults__ = _call_around.__code__, None
    function.__kwdefaults__ = {"_around": around(plain)}


def _call_around(*args: Any, _around: Callable[..., Any] = lambda: None, **kwargs: Any) -> Any:
    return _around(*args, **kwargs)


def _as_4_bit(plain: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not packed_hosts(model):
            return plain(model, *args, **kwargs)
        model.is_loaded_in_4bit = True
        try:
            return plain(model, *args, **kwargs)
        finally:
            del model.is_loaded_in_4bit

    return prepare


def _where_it_lies(plain: Callable[..., Any]) -> Any:
    @functools.wraps(plain)
    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        with _map_out_of_sight(self.get_base_model()):
            return plain(self, *args, **kwargs)

    return load_adapter


def _from_where_it_lies(plain: Callable[..., Any]) -> Any:
    @functools.wraps(plain)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _map_out_of_sight(model):
            return plain(cls, model, *args, **kwargs)

    return from_pretrained


@contextmanager
def _map_out_of_sight(model: nn.Module) -> Iterator[None]:
    """`hf_device_map` of a packed model is not there inside; of any other model it is."""
    device_map = model.__dict__.pop("hf_device_map", None) if packed_hosts(model) else None
    try:
        yield
    finally:
        if device_map is not None:
            model.hf_device_map = device_map

"""place: schemes into the slots of a model's packed layers, and back out of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..model.linear import PackedEmbedding, PackedLinear
from . import activation_of
from .base import Activation, Scheme


def place(layer: PackedLinear, scheme: Scheme | None) -> None:
    """Put the input of a layer on what `scheme` says; None: leave it as it comes."""
    layer.activation = None if scheme is None else activation_of(scheme)


def scheme_of(layer: PackedLinear) -> Scheme | None:
    """What the input of a layer was put on, a learned scale at its start; None: it is used as it comes."""
    if layer.activation is None:
        return None
    assert isinstance(layer.activation, Activation)
    return layer.activation.scheme()


def shipped_of(layer: PackedLinear) -> Scheme | None:
    """What an exporter writes of the input of a layer: the scale that was trained, if one was."""
    if layer.activation is None:
        return None
    assert isinstance(layer.activation, Activation)
    return layer.activation.shipped()


def hosts(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """(name, layer) of every packed layer that multiplies, in model order: an embedding looks up."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and not isinstance(module, PackedEmbedding):
            yield name, module


def place_activations(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Put the inputs of the layers of these names on their schemes, of all others on none."""
    layers = dict(hosts(model))
    assert schemes.keys() <= layers.keys(), f"no packed layers: {sorted(schemes.keys() - layers.keys())[:3]}"
    for name, layer in layers.items():
        place(layer, schemes.get(name))


@contextmanager
def activations_off(model: nn.Module) -> Iterator[None]:
    """Inside, every packed layer takes its input as it comes."""
    held = [(layer, layer.activation) for _, layer in hosts(model)]
    for layer, _ in held:
        layer.activation = None
    try:
        yield
    finally:
        for layer, activation in held:
            layer.activation = activation

"""Activations: what a layer's input is on. ACTIVATIONS is the list: kind -> its class.

A quantizer stands in the slot `activation` of a PackedLinear, between its input (after `input_transform`) and
the packed op, which sees x^ = scale (codes - zero) and saves that for its backward. A kind is a file with the
scales it makes of x; rounding, the straight-through backward, what q, k and v share, the scheme that travels
in a folder's configuration, and the recipe read the table.
"""

from .base import Activation, Scheme
from .dual import Dual
from .group import Group
from .reading import scheme_from_json
from .segmented import Segmented
from .tensor import PerTensor
from .token import Token

ACTIVATIONS: dict[str, type[Activation]] = {
    "token": Token,
    "tensor": PerTensor,
    "group": Group,
    "dual": Dual,
}


def activation_of(scheme: Scheme) -> Activation:
    """The quantizer of a scheme."""
    kind = ACTIVATIONS[scheme.kind]
    return Segmented(scheme, kind) if scheme.segments else kind(scheme)


def read_scheme(entry: object) -> Scheme:
    """A scheme from a file. ValueError naming what is wrong."""
    return scheme_from_json(entry, ACTIVATIONS)


__all__ = ["ACTIVATIONS", "Activation", "Scheme", "activation_of", "read_scheme"]

"""Which matrices of a model can be packed, and the plain nn.Linear that stands in for one that is kept
another way.

Three ways of keeping a matrix occur in transformers, and all become one before anything is packed:

    nn.Linear                weight [N, K]                                               as it is
    Conv1D (GPT-2)           weight [K, N]                                               a StandIn: nn.Linear,
                             transposed
    experts of a mixture     gate_up_proj [E, N, K] (gpt-oss: [E, K, N]), down_proj      experts.Experts: 2 E
                             StandIns

So quantize, gptq, attach, merge and the readers see linears with names, `<experts>.3.down_proj` among them,
and PackedLinear stays the one layer class. `find_matrices` says which parameter of the dense model each of
them is (a part of); `refused` names what has the look of a weight matrix and can be packed in none of these
ways. Letters: N out features, K in features, E experts.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from .experts import Experts, StandIn, is_experts, projections

# Subclasses of nn.Linear whose own forward is x W^T + b all the same.
_PLAIN_FORWARDS = frozenset({"FalconLinear"})


@dataclass(frozen=True)
class Matrix:
    """A matrix [N, K] that is multiplied with. name: the linear's; parameter: the dense model's parameter
    that it is, or (expert not None) the row of it that it is; transposed: kept there as [K, N]. embedding: it
    is looked up, not multiplied with."""

    name: str
    parameter: str
    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    embedding: bool = False

    @property
    def plain(self) -> bool:
        """The parameter is the matrix."""
        return self.expert is None and not self.transposed


def find_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every matrix of a dense model (on any device) that can be packed, by the name of its linear, in model
    order.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            if embedding_problem(module) is None:
                found.append(
                    Matrix(
                        name, f"{name}.weight", (module.num_embeddings, module.embedding_dim), embedding=True
                    )
                )
        elif isinstance(module, nn.Linear):
            if linear_problem(module) is None:
                found.append(Matrix(name, f"{name}.weight", (module.out_features, module.in_features)))
        elif is_conv1d(module):
            found.append(Matrix(name, f"{name}.weight", (module.nf, module.nx), transposed=True))  # pyright: ignore[reportArgumentType]
        elif is_experts(module):
            for expert in range(module.num_experts):  # pyright: ignore[reportArgumentType]
                for key in projections(module):
                    a, b = module.get_parameter(key).shape[1:]
                    shape = (b, a) if module.is_transposed else (a, b)
                    matrix = Matrix(
                        f"{name}.{expert}.{key}", f"{name}.{key}", shape, expert, bool(module.is_transposed)
                    )
                    found.append(matrix)
    return {matrix.name: matrix for matrix in found}


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that keeps its weight as [K, N]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_problem(linear: nn.Linear) -> str | None:
    """Why a kind of nn.Linear cannot be packed; None when it can."""
    kind = type(linear)
    if kind.forward is nn.Linear.forward or kind.__name__ in _PLAIN_FORWARDS:
        return None
    return f"{kind.__name__} is an nn.Linear with a forward of its own"


def embedding_problem(embedding: nn.Embedding) -> str | None:
    """Why an embedding cannot be packed; None when it can."""
    kind = type(embedding)
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if kind.forward is nn.Embedding.forward or isinstance(scale, float | int):
        return None if embedding.max_norm is None else "it renormalizes its rows (max_norm)"
    return f"{kind.__name__} is an nn.Embedding with a forward of its own"


def unpackable(module: nn.Module) -> str | None:
    """Why the matrices of this module (its own, not its children's) can be packed in no way; None when it has
    none, or they can.
    """
    if isinstance(module, nn.Linear):
        return linear_problem(module)
    if (
        isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d | Experts)
        or is_experts(module)
        or is_conv1d(module)
    ):
        return None  # lookups and convolutions are not linears: they stay, and are listed
    held = [name for name, parameter in module.named_parameters(recurse=False) if _is_large(parameter)]
    if not held:
        return None
    return (
        f"{type(module).__name__} multiplies with weights of its own ({', '.join(held)}) in a way that "
        "is not known here"
    )


def _is_large(parameter: nn.Parameter) -> bool:
    """Two dimensions of a group or more: a matrix, or a stack of them; not a table of a few numbers per
    channel.
    """
    return sum(size >= 32 for size in parameter.shape) >= 2


def stand_in(model: nn.Module, names: Collection[str]) -> None:
    """Exchange the Conv1Ds and experts that hold matrices of these names for StandIns: linears on the meta
    device, of the dtype of what they stand for. Experts are exchanged whole."""
    wanted = set(names)
    for name, module in list(model.named_modules()):
        if is_conv1d(module) and name in wanted:
            n, k = module.nf, module.nx
            linear = StandIn(k, n, bias=False, device="meta", dtype=module.weight.dtype)  # pyright: ignore[reportArgumentType]
            linear.bias = module.bias  # pyright: ignore[reportAttributeAccessIssue]
            model.set_submodule(name, linear)
        elif is_experts(module):
            own = {f"{name}.{e}.{key}" for e in range(module.num_experts) for key in projections(module)}  # pyright: ignore[reportArgumentType]
            if own & wanted:
                assert own <= wanted, f"{name}: some experts are packed and some are not"
                model.set_submodule(name, Experts(module))

"""Which matrices of a model can be packed, and the plain nn.Linear that stands in for one that is kept
another way.

Four ways of keeping a matrix occur in transformers, and all become one before anything is packed; a matrix
that is several in one may be taken apart besides (fused.py):

    nn.Linear                weight [N, K]                                               as it is
    Conv1D (GPT-2)           weight [K, N]                                               a StandIn: nn.Linear,
                             transposed
    experts of a mixture     gate_up_proj [E, N, K] (gpt-oss: [E, K, N]), down_proj      experts.Experts: 2 E
                             StandIns
    parts of one of the      some rows of it                                             fused.Fused: a
    first two                                                                            StandIn for each
    Conv1d, Conv2d           weight [N, C / g, k, k]                                     as it is: a matrix
                                                                                         [N, C / g k k]

So quantize, gptq, attach, merge and the readers see linears with names, `<experts>.3.down_proj` among them,
and PackedLinear stays the one layer class. `find_matrices` says which parameter of the dense model each of
them is (a part of); `refused` names what has the look of a weight matrix and can be packed in none of these
ways. Letters: N out features, K in features, E experts.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from .conv import conv_problem, is_conv, matrix_of
from .experts import Experts, StandIn, is_experts, projections
from .fused import Fused, Fusion, Segment

# Subclasses of nn.Linear whose own forward is x W^T + b all the same.
_PLAIN_FORWARDS = frozenset({"FalconLinear"})


@dataclass(frozen=True)
class Matrix:
    """A matrix [N, K] that is multiplied with. name: the linear's; parameter: the dense model's parameter
    that it is, or (expert not None) the row of it that it is; transposed: kept there as [K, N]. embedding: it
    is looked up, not multiplied with. rows: of a part of a fused matrix, which rows of that one it is. conv:
    it multiplies patches (conv.py), and is kept there as [N, C / g, k, k], or without the last."""

    name: str
    parameter: str
    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    embedding: bool = False
    rows: Segment | None = None
    conv: bool = False

    @property
    def plain(self) -> bool:
        """The parameter is the matrix."""
        return self.expert is None and not self.transposed and self.rows is None and not self.conv

    @property
    def whole(self) -> str:
        """The linear of the dense model that it is, or is a part of."""
        return self.name if self.rows is None else self.name.rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Those by which patterns of a recipe may mean it."""
        return (self.name,) if self.rows is None else (self.name, self.whole)

    def parts(self, fusion: Fusion) -> dict[str, "Matrix"]:
        """The parts of a fused matrix, by name."""
        assert self.expert is None and not self.embedding and not self.conv, self.name
        k = self.shape[1]
        made = [
            replace(self, name=f"{self.name}.{part}", shape=(rows.size, k), rows=rows)
            for part, rows in fusion.items()
        ]
        return {matrix.name: matrix for matrix in made}


def in_parts(matrices: Mapping[str, Matrix], fusions: Mapping[str, Fusion]) -> dict[str, Matrix]:
    """With the parts of these matrices in their places."""
    found: dict[str, Matrix] = {}
    for name, matrix in matrices.items():
        found |= matrix.parts(fusions[name]) if name in fusions else {name: matrix}
    return found


def fusions_of(matrices: Iterable[Matrix]) -> dict[str, Fusion]:
    """The parts among these, by the name of the matrix that they are parts of."""
    found: dict[str, dict[str, Segment]] = {}
    for matrix in matrices:
        if matrix.rows is not None:
            found.setdefault(matrix.whole, {})[matrix.name.rpartition(".")[2]] = matrix.rows
    return dict(found)


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
        elif is_conv(module):
            if conv_problem(module) is None:
                n, k = matrix_of(module.get_parameter("weight")).shape
                found.append(Matrix(name, f"{name}.weight", (n, k), conv=True))
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
    if isinstance(module, nn.Embedding | nn.Conv3d | Experts) or is_experts(module) or is_conv1d(module):
        return None  # lookups and convolutions of three dimensions are not linears: they stay, and are listed
    if is_conv(module):
        return conv_problem(module)
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


def stand_in(model: nn.Module, names: Collection[str], fusions: Mapping[str, Fusion] | None = None) -> None:
    """Exchange the Conv1Ds and experts that hold matrices of these names for StandIns: linears on the meta
    device, of the dtype of what they stand for. Experts are exchanged whole. fusions: matrices that come in
    these parts."""
    wanted, apart = set(names), fusions or {}
    for name, module in list(model.named_modules()):
        if name in apart:
            bias, dtype = module.bias, module.weight.dtype
            k = module.nx if is_conv1d(module) else module.in_features
            model.set_submodule(name, Fused(apart[name], k, bias, dtype))  # pyright: ignore[reportArgumentType]
        elif is_conv1d(module) and name in wanted:
            n, k = module.nf, module.nx
            linear = StandIn(k, n, bias=False, device="meta", dtype=module.weight.dtype)  # pyright: ignore[reportArgumentType]
            linear.bias = module.bias  # pyright: ignore[reportAttributeAccessIssue]
            model.set_submodule(name, linear)
        elif is_experts(module):
            own = {f"{name}.{e}.{key}" for e in range(module.num_experts) for key in projections(module)}  # pyright: ignore[reportArgumentType]
            if own & wanted:
                assert own <= wanted, f"{name}: some experts are packed and some are not"
                model.set_submodule(name, Experts(module))

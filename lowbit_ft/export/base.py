"""What an exporter is: two inverse pure functions on one layer, a predicate that refuses with a way out, and
a config entry.

    pack(weight) -> {local name: tensor}        unpack(tensors, layer) -> weight        unpack(pack(w), spec)
                                                == w, bit for bit

`LayerSpec` is what is known of a layer before its tensors exist, and `Weights` is many layers of which one at
a time is in memory: the writer computes every offset of every file from the specs, then asks for the weights
one by one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..activations import Scheme
from ..grid import Grid, PackedWeight, Weight
from ..model.config import stop_ids
from ..model.conv import matrix_of
from ..model.fused import Segment
from ..model.matrices import Matrix
from ..model.names import Part
from ..model.tokenizer import read_tokenizer

TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, dtype)


@dataclass(frozen=True)
class LayerSpec:
    """Shape (N, K) of a layer, its grid, whether it carries a float offset per group, what its input is on
    (None: it comes as it is), and of a part of a fused matrix which of its rows it is.
    """

    shape: tuple[int, int]
    grid: Grid
    offset: bool = False
    activation: Scheme | None = None
    rows: Segment | None = None

    @classmethod
    def of(cls, weight: Weight) -> "LayerSpec":
        return cls(weight.shape, weight.grid, isinstance(weight, PackedWeight) and weight.offset is not None)

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    def __str__(self) -> str:
        inputs = f" {self.activation}" if self.activation is not None else ""
        return f"{self.grid}{' with a float offset' if self.offset else ''}{inputs}"


class Weights(Mapping[str, Weight]):
    """Layer name -> Weight, made anew on every access: `.items()` holds one layer at a time. `.specs` costs
    nothing.

    A layer whose weight does not match its spec is our own mistake (AssertionError).
    """

    def __init__(self, specs: Mapping[str, LayerSpec], make: Callable[[str], Weight]):
        self.specs = dict(specs)
        self._make = make

    @classmethod
    def of(cls, weights: Mapping[str, Weight]) -> "Weights":
        """Weights that are in memory already."""
        if isinstance(weights, Weights):
            return weights
        return cls({name: LayerSpec.of(weight) for name, weight in weights.items()}, weights.__getitem__)

    def __getitem__(self, name: str) -> Weight:
        spec = self.specs[name]
        weight = self._make(name)
        # What is not in the weight is the spec's own.
        made = replace(LayerSpec.of(weight), activation=spec.activation, rows=spec.rows)
        assert made == spec, f"{name}: announced as {spec}, made {made}"
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs


@dataclass(frozen=True)
class ReadBack:
    """What the format's own reader finds in a file: codes uint8 [N, K] (planes [q, N, K]), scale and zero as
    in the weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None


class Exporter(ABC):
    """One file format. Stateless: the members of EXPORTERS are instances without fields."""

    name: ClassVar[str]
    quant_method: ClassVar[str]  # of config.json, by which a folder is recognised
    # Whether packed tensors are named as the checkpoint names its layers (for readers that know the
    # checkpoint) or as the model does. The two differ only for checkpoints that were saved without the
    # model's prefix or under older names.
    checkpoint_names: ClassVar[bool] = False
    # Whether its readers take dense tensors that transformers fuses while loading (the experts of a mixture)
    # beside packed layers.
    dense_experts: ClassVar[bool] = True
    # Whether its servers read it only where the inputs are quantized too.
    needs_activations: ClassVar[bool] = False
    # Why its readers do not run the Hadamard that r4 of quant.rotation leaves before a linear; None: they do.
    no_online: ClassVar[str | None] = "has no place for it"
    # What kind of file holds the tensors: a key of writer.CONTAINERS.
    container: ClassVar[str] = "safetensors"
    # Under which key config.json says how the layers are packed; all formats have quantization_config, to be
    # recognised by.
    config_key: ClassVar[str] = "quantization_config"
    # Modules that writing (and reading back) needs beyond our own requirements, and the extra of ours that
    # installs them.
    writes_with: ClassVar[tuple[str, ...]] = ()
    reads_with: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    extra_note: ClassVar[str] = ""  # what must be known of that extra
    # Whether a reader in transformers makes a torch model of its folders, which is what lm-eval measures.
    measurable: ClassVar[bool] = True
    # Whether `transformers serve` reads it, which gets a folder and nothing else.
    transformers_serve: ClassVar[bool] = True
    # Whether servers that run q, k, v (and gate, up) as one layer read it: vLLM, SGLang.
    fused_by_servers: ClassVar[bool] = False
    # Why its folders hold language models alone; None: its readers build models for every task.
    language_only: ClassVar[str | None] = None
    # Whether its folders say what keys and values are on, and its reader computes it.
    carries_kv_cache: ClassVar[bool] = False
    # Whose flags say it instead: "vllm", "llama.cpp"; none: the server has no such cache (KVConfig.flags).
    kv_server: ClassVar[str | None] = None
    # The flag of its server that gives chat templates values, as JSON; None: it has none.
    chat_flag: ClassVar[str | None] = None
    # What of writing a folder `plan` counts no memory and no time for; None: nothing that matters.
    unplanned: ClassVar[str | None] = None
    # Whether its reader in transformers leaves generation_config.json aside, where the stop tokens are.
    drops_generation: ClassVar[bool] = False
    # What must be known before a folder is read: the first lines of its card.
    read_first: ClassVar[str] = ""
    # What to install for the lines of `use`.
    needs: ClassVar[str] = ""
    # The dtype its reader computes in, whatever the model was trained in; None: that one.
    computes_in: ClassVar[torch.dtype | None] = None
    # The most by which the reader's logits may differ, as a share of the largest; 0: its weights and ours are
    # the same numbers.
    tolerance: ClassVar[float] = 0.0

    @abstractmethod
    def reject(self, grid: Grid, offset: bool = False) -> str | None:
        """Why this format cannot hold the grid (offset: with a float offset per group), with the way out;
        None when it can.
        """

    def reject_width(self, grid: Grid, in_features: int) -> str | None:
        """Why this format cannot hold the grid on a layer of so many inputs, with the way out; None when it
        can.
        """
        return None

    def reject_activation(self, scheme: Scheme, grid: Grid, in_features: int | None = None) -> str | None:
        """Why no reader of this format puts the input of a layer on this grid on what `scheme` says, with the
        way out; None when one does. in_features: of the layer; None: not known yet.
        """
        return (
            f"{self.name} holds weights only, and its readers would compute with inputs that training did "
            "not see; set quant.activations: null, or export.format: compressed-tensors or native"
        )

    def reject_kv_cache(self) -> str | None:
        """Why no reader can compute with keys and values that are quantized, with the way out; None where one
        has a flag for it, or the question is the user's."""
        return None

    def reject_dtype(self, grid: Grid, dtype: str) -> str | None:
        """Why this format's readers would change the scales of the grid in a model of that dtype ("bfloat16",
        ...), with the way out; None when they do not."""
        return None

    def reject_model(self, layers: Mapping[str, LayerSpec]) -> list[str]:
        """Every reason why this format cannot hold these layers together, each naming a layer; empty when it
        can.
        """
        problems = []
        for name, spec in layers.items():
            reason = self.reject(spec.grid, spec.offset) or self.reject_width(spec.grid, spec.shape[1])
            if reason is None and spec.activation is not None:
                reason = self.reject_activation(spec.activation, spec.grid, spec.shape[1])
            if reason:
                problems.append(f"{name}: {reason}")
        return problems

    def reject_matrix(self, matrix: Matrix, grid: Grid, parts: Sequence[Part] | None) -> str | None:
        """Why this format cannot hold a matrix that is no plain nn.Linear (experts of a mixture, Conv1D, an
        embedding), with the way out; None when it can. parts: the file tensors that make it, None when the
        files keep it in another way."""
        if matrix.rows is not None:
            return self.reject_part(matrix)
        if matrix.plain and not matrix.embedding:
            if parts is not None and len(parts) == 1:
                return None
            return (
                f"{self.name} has one tensor per layer, as the checkpoint does not; exclude it, or set "
                "export.format: native"
            )
        what = (
            "an embedding"
            if matrix.embedding
            else "the experts of a mixture"
            if matrix.expert is not None
            else "a convolution"
            if matrix.conv
            else "a Conv1D"
        )
        return f"{self.name} files hold linear layers, and this is {what}; set export.format: native"

    def reject_part(self, matrix: Matrix) -> str:
        """The sentence about a part of a fused matrix that is packed apart."""
        return (
            f"{self.name} has one tensor and one grid for {matrix.whole.rpartition('.')[2]}, and "
            "quant.overrides gives its parts their own; give all parts the same bits, group_size and "
            "symmetric (an override of the whole layer), or set export.format: native"
        )

    def reject_experts(self, layers: Mapping[str, LayerSpec]) -> str | None:
        """Why this format cannot hold these layers together, packed experts among them, with the way out;
        None when it can.
        """
        return None

    def reader_config(self, config: dict[str, Any], model_type: str, experts: bool) -> dict[str, Any]:
        """`model_config` for a model of this type, perhaps with packed experts: what its reader must be told
        besides.
        """
        return config

    def stored_dtype(self, local: str, dtype: torch.dtype, expert: bool, trained: torch.dtype) -> torch.dtype:
        """dtype in the file of a tensor that `pack` makes in `dtype`, for a model that was trained in
        `trained`. The values are the same: a dtype that cannot hold them is not allowed."""
        return dtype

    def reject_checkpoint(self, config: Mapping[str, Any], folder: Path | None) -> list[str]:
        """Why this format cannot hold a model of this configuration (config.json with its defaults), each
        with the way out. folder: where its tokenizer is; None: not here yet."""
        return []

    def missing(self, modules: Sequence[str]) -> str | None:
        """The sentence about those of `modules` that are not installed, with what installs them; None when
        all are there.
        """
        absent = [name for name in modules if find_spec(name) is None]
        if not absent:
            return None
        hint = f"run pip install 'lowbit-ft[{self.extra}]'{self.extra_note}"
        return f"needs {', '.join(absent)}, not installed here; {hint}"

    @abstractmethod
    def specs(self, layer: LayerSpec) -> TensorSpecs:
        """Shape and dtype of every tensor that `pack` makes of such a layer."""

    @abstractmethod
    def pack(self, weight: Weight) -> dict[str, Tensor]:
        """The tensors of one layer under their local names (what follows "<layer>." in the file)."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> Weight:
        """The inverse of `pack`. ValueError when the tensors do not fit the spec."""

    @abstractmethod
    def model_config(self, layers: Mapping[str, LayerSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. skipped: names of the layers that stay dense."""

    def folder_config(self) -> dict[str, Any]:
        """Further keys of config.json."""
        return {}

    @abstractmethod
    def read_back(self, tensors: Mapping[str, Tensor], layer: LayerSpec) -> ReadBack:
        """One layer's tensors through the code of the format's own library, not ours (verify compares it with
        the weight).
        """

    def load_options(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Arguments that from_pretrained needs for this folder, whose quantization_config is `config`."""
        return {}

    def file_metadata(self, layers: Mapping[str, LayerSpec], dtype: torch.dtype) -> dict[str, str]:
        """What stands in the header of every safetensors file beside the tensors. dtype: of the model."""
        return {}

    def as_served(self, model: Any, config: Mapping[str, Any]) -> None:
        """Set what must be set on a model that transformers loaded, whose quantization_config is `config`, so
        that it computes its inputs as this format's servers do; by default nothing."""
        return

    def open(self, folder: Path, dtype: torch.dtype) -> nn.Module | None:
        """The model in a folder, when its reader is not transformers."""
        return None

    def dense(self, model: Any, layer: str, matrix: Matrix | None, dtype: torch.dtype) -> Tensor | None:
        """The weight [N, K] that a layer of the reader's model multiplies with; None when it never has one.
        matrix: where the model keeps it; None: in a module of the reader's own, under the layer's name."""
        if matrix is None:
            return model.get_submodule(layer).weight.to(dtype)
        value = model.get_parameter(matrix.parameter)
        value = value if matrix.expert is None else value[matrix.expert]
        value = matrix_of(value) if matrix.conv else value
        return (value.t() if matrix.transposed else value).to(dtype)

    def tokenizer(self, folder: Path) -> Any:
        """The tokenizer that the format's users get; None when the folder has none."""
        if not any(
            (folder / name).is_file()
            for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
        ):
            return None
        return read_tokenizer(folder)

    def stops(self, folder: Path) -> list[int]:
        """Ids of the tokens that end an answer, as the format's users get them, sorted."""
        for name in ("generation_config.json", "config.json"):
            if ids := stop_ids(folder / name):
                return sorted(set(ids))
        return []

    def reader(self) -> str:
        """The libraries that read the format, with versions."""
        return with_versions("transformers")

    @abstractmethod
    def serve(self, folder: str) -> str:
        """A command line that runs a folder of this format."""

    def use(self, folder: str) -> str:
        """Markdown for the model card: how Python loads a folder of this format."""
        install = f"  # pip install {self.needs}" if self.needs else ""
        return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}"){install}
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


def with_versions(*packages: str) -> str:
    """ "a 1.0 with b 2.0", for reports."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(package)
    return " with ".join(found)


def check_tensors(tensors: Mapping[str, Tensor], wanted: TensorSpecs, what: str) -> None:
    """ValueError listing what is missing, unknown, or of the wrong shape or dtype."""
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in wanted]
    for name, (shape, dtype) in wanted.items():
        if name in tensors and (tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype):
            got = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
            problems.append(f"{name} is {got}, not {dtype} {shape}")
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))


def check_values(weight: Weight) -> None:
    """ValueError for values that no writer of ours makes: scales that are not finite, zero points beyond the
    codes, weights that a mask calls zero and are not.
    """
    if not bool(torch.isfinite(weight.scale.float()).all()):
        raise ValueError("scale has NaN or Inf; the file is damaged")
    if isinstance(weight, PackedWeight):
        if weight.offset is not None and not bool(torch.isfinite(weight.offset.float()).all()):
            raise ValueError("offset has NaN or Inf; the file is damaged")
        if weight.zero is not None and weight.zero.numel() and int(weight.zero.max()) >= weight.grid.levels:
            raise ValueError(
                f"zero is {int(weight.zero.max())} on a grid of {weight.grid.levels} "
                "codes; the file is damaged"
            )
        weight.check_mask()
        weight.check_narrow()

"""Read a Hugging Face checkpoint one tensor at a time.

A `Checkpoint` is a folder plus the headers of its safetensors files: what it is, which tensors it has and
where each one's bytes lie. Reading is plain file I/O through a small staging buffer that is checked for
NaN/Inf and copied straight to the wanted device and dtype. Not `safetensors.safe_open`: its tensors are
views of a memory map, whose pages count as our memory until the last view is gone (peak while reading a
1.07 GB checkpoint whose largest tensor has 0.13 GB: 0.26 GB that way, 0.18 GB this way, in bf16; the gap is
wider when converting). So the most that is ever in memory is one tensor, and the full-precision model never
is.

`empty_model` builds the model with its parameters on the meta device and its buffers for real: buffers that
no file holds (rotary inv_freq, gemma's embedding scale) are computed by the model's own code, not by a copy
of it here. `materialize` then fills one module. Key names go through transformers' own conversion table
(renames, the base-model prefix, per-expert weights fused into one 3-D parameter), so what loads here is
what `from_pretrained` loads. A checkpoint that is quantized already (GPTQ, AWQ, compressed-tensors:
incoming/) looks the same from here; its packed layers are dequantized one at a time where a dense weight is
asked for, and `packed_weight` gives their integers.

Checkpoints are data from a stranger: only safetensors and JSON are read, no code in the folder is run, and
every file name in the index must lead to a file in the folder itself.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files.tensorfile import CheckpointError, TensorEntry, is_finite, pieces, read_header
from ..grid import IntGrid, PackedWeight
from ..incoming import Incoming, collapse
from .experts import StandIn
from .hub import locate, tensor_entries
from .matrices import Matrix, find_matrices
from .names import Part, Source, expert_keys, file_parts, weight_sources

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load_model",
    "load_tokenizer",
    "materialize",
    "model_class",
    "read_header",
]


class Checkpoint:
    """A Hugging Face checkpoint folder, its configuration and its tensor directory; holds no weights.

    Make one with `Checkpoint.open`. Attributes: source (as given), folder (resolved Path), revision (the
    commit, for a hub id, else None), config (transformers configuration), dtype (torch dtype that weights
    are read in by default).
    """

    def __init__(
        self, source: str, folder: Path, revision: str | None, config: Any, dtype: torch.dtype
    ) -> None:
        self.source, self.folder, self.revision = source, folder, revision
        self.config, self.dtype = config, dtype
        self._problems: list[str] = []
        self.incoming: Incoming | None = None  # what was packed already when the checkpoint came
        self._entries = self._scan()
        self._plan: dict[str, Source] | None = None
        self._matrices: dict[str, Matrix] = {}
        self._experts: Counter[str] = Counter()  # 3-D parameter -> its number of experts

    @classmethod
    def open(
        cls,
        source: str | Path,
        revision: str | None = None,
        dtype: str | torch.dtype = "bfloat16",
        check: bool = True,
    ) -> Checkpoint:
        """Open a local folder or a hub id (its JSON, tokenizer and safetensors are fetched at `revision`).

        Reads config.json and the safetensors headers. Raises CheckpointError; with check=False problems of
        the weight files are kept for `check()`.
        """
        from transformers import AutoConfig

        folder, commit = locate(str(source), revision)
        try:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # OSError, ValueError, KeyError, and validation errors of its own
            raise CheckpointError(_config_problem(folder, error)) from error
        resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        checkpoint = cls(str(source), folder, commit, config, resolved)
        if check:
            checkpoint.check()
        return checkpoint

    def check(self) -> None:
        """Raise CheckpointError listing every problem that was found in the weight files, if any."""
        if self._problems:
            raise CheckpointError("\n".join(self._problems))

    def names(self) -> list[str]:
        """The tensor names in the files, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor of that name in the files."""
        return self._entry(name).shape

    def file(self, name: str) -> Path:
        """The file that holds the tensor of that name."""
        return self._entry(name).file

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(entry.nbytes for entry in self._entries.values())

    def keys_for(self, name: str) -> list[str]:
        """The file tensors that the model's parameter or buffer `name` is made of; more than one, or one that
        is changed on the way, when transformers converts it. Empty when the files have none."""
        source = self._sources().get(name)
        return [] if source is None else [key for key, _ in source.keys]

    def converted(self) -> list[str]:
        """Model parameters that are not a file tensor as it is (fused experts and such)."""
        return sorted(name for name, source in self._sources().items() if source.converter is not None)

    def packed_key(self, name: str) -> str | None:
        """The packed layer of the files (its name there) that the model's parameter `name` is, when it is one
        and nothing else.
        """
        keys = self.keys_for(name)
        source = self._sources().get(name)
        if self.incoming is None or source is None or source.converter is not None or len(keys) != 1:
            return None
        key = keys[0].removesuffix(".weight")
        return key if key in self.incoming.layers else None

    def packed_weight(self, name: str, grid: IntGrid, device: str | torch.device = "cpu") -> PackedWeight:
        """The packed layer whose weight is the model's parameter `name`, on its grid, as it is in the files
        (incoming/).
        """
        key = self.packed_key(name)
        assert self.incoming is not None and key is not None, name
        return self.incoming.weight(key, grid, device)

    def stored_dtype(self, name: str) -> torch.dtype:
        """dtype of the tensor of that name in the files."""
        return self._entry(name).dtype

    def fingerprint(self) -> list[list[Any]]:
        """[name, size, modification time] of every weight file and config.json: changes when one is
        replaced.
        """
        files = sorted({entry.file for entry in self._entries.values()} | {self.folder / "config.json"})
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]

    def read(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        row: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The tensor called `name` in the files, contiguous, in its own memory, on `device`; with `row`, only
        tensor[row], with `rows` (first, last), only tensor[first:last].

        dtype None keeps the stored one; else floating tensors are converted on the way, 4 MB at a time, so a
        full-precision copy is never whole in memory. Raises CheckpointError for NaN or Inf, naming tensor and
        file.
        """
        entry = self._entry(name)
        packed = name.removesuffix(".weight")
        if self.incoming is not None and packed != name and packed in self.incoming.layers:
            whole = self.incoming.weight(packed, device=device)
            return (whole if rows is None else whole.rows(*rows)).dequantize(dtype or entry.dtype)
        skipped = 0  # elements before the part that is read
        if row is not None or rows is not None:
            first, last = rows if rows is not None else (row or 0, (row or 0) + 1)
            size, shape = entry.nbytes // entry.shape[0], (last - first, *entry.shape[1:])
            skipped = first * size // entry.dtype.itemsize
            shape = shape if rows is not None else shape[1:]
            entry = entry._replace(
                shape=shape, start=entry.start + first * size, nbytes=(last - first) * size
            )
        floating = entry.dtype.is_floating_point
        out = torch.empty(entry.shape, dtype=dtype if dtype and floating else entry.dtype, device=device)
        flat, position = out.view(-1), 0
        for piece in self._finite_pieces(name, entry, skipped):
            target = flat[position : position + piece.numel()].copy_(piece)
            if out.dtype is torch.float16 and not is_finite(target):
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} has values beyond float16 (65504); "
                    "set model.dtype: bfloat16"
                )
            position += piece.numel()
        return out

    def stored_pieces(self, name: str) -> Iterator[Tensor]:
        """The values of `read(name)` in order, flat, a few MB at a time; a piece is valid until the next is
        asked for.
        """
        packed = name.removesuffix(".weight")
        if self.incoming is not None and packed != name and packed in self.incoming.layers:
            return iter([self.read(name).view(-1)])
        return self._finite_pieces(name, self._entry(name))

    def _finite_pieces(self, name: str, entry: TensorEntry, skipped: int = 0) -> Iterator[Tensor]:
        position = 0
        for piece in pieces(entry):
            if entry.dtype.is_floating_point and not is_finite(piece):
                bad = skipped + position + int((~torch.isfinite(piece.float())).nonzero()[0])
                raise CheckpointError(
                    f"{entry.file}: tensor {name!r} of shape {list(self.shape(name))} has NaN or Inf "
                    f"(first at flat index {bad}). This checkpoint is damaged or badly converted: get it "
                    "again."
                )
            yield piece
            position += piece.numel()

    def empty_model(self, attention: str = "sdpa") -> Any:
        """The causal language model, in eval mode: parameters on meta (tied ones are one object), real
        buffers.
        """
        model = meta_model(self.config, self.dtype, attention, self.folder / "config.json")
        model.config._name_or_path = self.source
        if self._plan is None:
            self.check()
            self._plan = weight_sources(model, self._entries, self.folder)
            self._matrices = find_matrices(model)
            self._experts = Counter(matrix.parameter for matrix in self._matrices.values())
        return model.eval()

    def weight_for(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The value of the model parameter (or buffer) `name`: through renames, ties and fused experts. rows:
        of one that `row_blocks` cuts.

        dtype None means the checkpoint's `dtype`, for floating tensors. Raises CheckpointError if no file has
        it.
        """
        source = self._sources().get(name)
        if source is None:
            near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.5)
            raise CheckpointError(
                f"{self.folder}: no tensor for the model's parameter {name!r} in its safetensors files"
                + (f"; nearest names there: {', '.join(near)}" if near else "")
                + ". The files and config.json do not belong together."
            )
        if source.converter is None:
            return self.read(source.keys[0][0], device=device, dtype=dtype or self.dtype, rows=rows)
        assert rows is None, f"{name}: made of several tensors, read whole"
        tensors = [self.read(key, device=device, dtype=dtype or self.dtype) for key, _ in source.keys]
        converter = copy.deepcopy(source.converter)  # it collects tensors in itself
        for (key, pattern), tensor in zip(source.keys, tensors, strict=True):
            converter.add_tensor(source.first, key, pattern, tensor)
        del tensors
        value = converter.convert(source.first, config=self.config)[name]
        return value[0] if isinstance(value, list) else value

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Every matrix of the model that can be packed, by the name of its linear."""
        self._sources()
        return self._matrices

    def stored_matrix_dtype(self, layer: str) -> torch.dtype:
        """The dtype in which `matrix` can be read as it is in the files: theirs, or a wider one for bytes and
        for doubles fp32.
        """
        dtypes = {self.stored_dtype(key) for key in self.keys_for(self.matrices[layer].parameter)}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return torch.bfloat16 if dtype.itemsize == 1 else torch.float32 if dtype.itemsize > 4 else dtype

    def row_blocks(self, layer: str, limit: int | None) -> list[tuple[int, int] | None]:
        """(first, last) rows of the matrix of a linear that `matrix` can read by themselves, each of about
        `limit` bytes in the files; [None], all at once, where it is small, kept in another way than as one
        tensor, or limit is None."""
        matrix = self.matrices[layer]
        source = self._sources().get(matrix.parameter)
        n = matrix.shape[0]
        if (
            limit is None
            or not matrix.plain
            or source is None
            or source.converter is not None
            or self.packed_key(matrix.parameter)
        ):
            return [None]
        count = min(n, -(-self._entry(source.keys[0][0]).nbytes // limit))
        step = -(-n // count)
        return [None] if count <= 1 else [(first, min(first + step, n)) for first in range(0, n, step)]

    def matrix(
        self,
        layer: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The matrix [N, K] of a linear, however the files and the model keep it (turned, one expert of a
        stack). Of a stack of experts only the one that is asked for is read. rows: only these, one of
        `row_blocks`."""
        matrix = self.matrices[layer]
        if rows is not None:
            return self.weight_for(matrix.parameter, device=device, dtype=dtype, rows=rows)
        if matrix.expert is None:
            value = self.weight_for(matrix.parameter, device=device, dtype=dtype)
        else:
            value = self._expert(matrix, device, dtype or self.dtype)
        value = value.t().contiguous() if matrix.transposed else value
        if value.shape != matrix.shape:
            raise CheckpointError(
                f"{self.origin(matrix.parameter)} makes a matrix {list(value.shape)}, but config.json "
                f"makes the model's {layer!r} "
                f"{list(matrix.shape)}. The files and config.json do not belong together."
            )
        return value

    def parts(self, layer: str) -> list[Part] | None:
        """The file tensors that, one below the other, are the matrix [N, K] of a linear; None when the files
        keep it in another way.
        """
        matrix = self.matrices[layer]
        source = self._sources().get(matrix.parameter)
        return None if source is None else file_parts(matrix, source, self._entries)

    def _expert(self, matrix: Matrix, device: str | torch.device, dtype: torch.dtype) -> Tensor:
        source, expert = self._sources().get(matrix.parameter), matrix.expert
        assert expert is not None
        count = self._experts[matrix.parameter]
        keys = expert_keys(source, expert, count) if source is not None else None
        if source is None or source.converter is not None and keys is None:
            stack = self.weight_for(matrix.parameter, device=device, dtype=dtype)
            self._same_count(matrix, stack.shape[0], count)
            return stack[expert].clone()
        if source.converter is None:
            key = source.keys[0][0]
            self._same_count(matrix, self.shape(key)[0], count)
            return self.read(key, device=device, dtype=dtype, row=expert)
        converter = copy.deepcopy(source.converter)
        for key, pattern in keys or []:
            tensor = self.read(key, device=device, dtype=dtype)
            converter.add_tensor(source.first, key, pattern, tensor)
        value = converter.convert(source.first, config=self.config)[matrix.parameter]
        value = value[0] if isinstance(value, list) else value
        self._same_count(matrix, value.shape[0], 1)
        return value[0]

    def _same_count(self, matrix: Matrix, found: int, wanted: int) -> None:
        if found != wanted:
            raise CheckpointError(
                f"{self.folder}: the files have {found} experts for {matrix.parameter!r}, "
                f"config.json says {wanted}. "
                "The files and config.json do not belong together."
            )

    def has_weight_for(self, name: str) -> bool:
        """Whether the files have a value for the model's parameter or buffer `name`."""
        return name in self._sources()

    def origin(self, name: str) -> str:
        """Where the value of the model parameter `name` comes from, for messages: "file: tensor"."""
        key = self._sources()[name].keys[0][0]
        return f"{self.file(key)}: tensor {key!r}"

    # ---------------------------------------------------------------- the inside

    def _entry(self, name: str) -> TensorEntry:
        self.check()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}{hint}")
        return self._entries[name]

    def _scan(self) -> dict[str, TensorEntry]:
        """Read every header; problems go to self._problems so that all are reported at once."""
        entries, found = tensor_entries(self.folder)
        self._problems += found
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is not None and not found:
            try:
                entries, self.incoming = collapse(quantization, entries)
            except ValueError as error:
                self._problems.append(f"{self.folder / 'config.json'}: {error}")
            else:
                # From here on its layers are ours: no model of it may look for the packages of that format.
                del self.config.quantization_config
        return entries

    def _sources(self) -> dict[str, Source]:
        if self._plan is None:
            self.empty_model("eager")
        assert self._plan is not None
        return self._plan


def materialize(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Fill the meta parameters of `module`, which is called `prefix` in the model, and move its buffers to
    `device`.

    One tensor at a time; parameters are filled in place, so a tied pair stays one object and is read once.
    dtype None means the checkpoint's; parts the model keeps in float32 stay so. Parameters already filled
    are only moved. Raises CheckpointError for a missing tensor, a wrong shape, NaN or Inf.
    """
    for path, owner in module.named_modules():
        for short, parameter in owner.named_parameters(recurse=False):
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
                continue
            name = ".".join(part for part in (prefix, path, short) if part)
            wanted = parameter.dtype if parameter.dtype != checkpoint.dtype or dtype is None else dtype
            if isinstance(owner, StandIn) and short == "weight":
                value = checkpoint.matrix(name.removesuffix(".weight"), device=device, dtype=wanted)
            else:
                value = _checked(checkpoint, name, parameter, device, wanted)
            filled = nn.Parameter(value, requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, filled)
        for short, buffer in owner.named_buffers(recurse=False):
            name = ".".join(part for part in (prefix, path, short) if part)
            if short not in owner._non_persistent_buffers_set and checkpoint.has_weight_for(name):
                owner._buffers[short] = _checked(checkpoint, name, buffer, device, buffer.dtype)
            else:
                assert not buffer.is_meta, f"buffer {name} has no value; use Checkpoint.empty_model"
                owner._buffers[short] = buffer.to(device)


def meta_model(config: Any, dtype: torch.dtype, attention: str, source: Path) -> Any:
    """The causal language model of a configuration (left as it is): parameters on meta, tied ones one object,
    real buffers. CheckpointError naming `source` when transformers cannot build it."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = model_class(config).from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (ValueError, ImportError) as error:
        fix = (
            "this model has no such attention in transformers; set model.attention: eager. "
            if (attention != "eager" and "attn_implementation" in str(error))
            else ""
        )
        raise CheckpointError(
            f"{source}: no model can be built with attention={attention!r}: {fix}{error}"
        ) from error
    model.tie_weights()  # making the parameters meta replaced the objects, which undid the ties
    # Parts the model's class says must stay float32, as from_pretrained keeps them.
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, parameter in model.named_parameters():
            if re.search(rf"(^|\.){re.escape(pattern).replace(chr(92) + '*', '.*')}(\.|$)", name):
                parameter.data = parameter.data.to(kept)
    return model


def load_model(
    checkpoint: Checkpoint,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """The whole full-precision model in memory (for evaluation against it, and for small models)."""
    model: Any = checkpoint.empty_model(attention)
    materialize(model, checkpoint, "", device, dtype)
    try:
        from transformers import GenerationConfig

        folder = str(checkpoint.folder)
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        pass  # no generation_config.json: the model keeps the one made from its configuration
    return model


def model_class(config: Any) -> Any:
    """The auto class that builds and loads the model of a configuration: a causal language model, or, for
    checkpoints with other towers beside the text (images), the class that has them all."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    return AutoModelForCausalLM  # whose own message lists the kinds of configuration it knows


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of the checkpoint. Raises CheckpointError if none loads without running code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(checkpoint.folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged tokenizer.json
        raise CheckpointError(
            f"{checkpoint.folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error}). "
            "The folder needs tokenizer.json (or its older files) and tokenizer_config.json."
        ) from error


def _config_problem(folder: Path, error: Exception) -> str:
    path = folder / "config.json"
    if not path.is_file():
        return f"{path}: missing. Give a Hugging Face checkpoint folder (with config.json and *.safetensors)."
    text = str(error).strip().splitlines()
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return f"{path}: this model needs Python code of its own; code from a checkpoint is never run here"
    return f"{path}: cannot be used ({type(error).__name__}: {text[0] if text else 'no detail'})"


def _checked(checkpoint: Checkpoint, name: str, wanted: Tensor, device: Any, dtype: torch.dtype) -> Tensor:
    value = checkpoint.weight_for(name, device=device, dtype=dtype)
    if value.shape != wanted.shape:
        raise CheckpointError(
            f"{checkpoint.origin(name)} has shape {list(value.shape)}, but config.json makes the "
            f"model's {name!r} {list(wanted.shape)}. The files and config.json do not belong together."
        )
    return value

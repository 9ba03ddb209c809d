"""LowBitQuantConfig: `from_pretrained` of a dense checkpoint packs it while it loads.

    config = LowBitQuantConfig(bits=4, group_size=128)
    model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=config)

transformers builds the model without weights and puts in what is not packed; the packed layers stand in it as
empty PackedLinears, whose integers are made here afterwards, one layer at a time, from the files (direct.py).
The dense matrices are never asked for by transformers, so memory holds the packed model and one layer. What
comes out is what from_pretrained of a native folder gives: `save_pretrained`, PEFT and TRL go on from there.

The name: this is transformers' side, in the place of BitsAndBytesConfig; LowBitConfig is PEFT's, in the place
of LoraConfig. Importing this module registers it; nothing else constructs such a config.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..export import LayerSpec
from ..integrations.transformers import PackedQuantizer, mark_packed, named_in, put_empty, whole_of
from ..model.checkpoint import Checkpoint
from ..model.linear import PackedEmbedding
from ..model.roles import is_head
from .direct import Direct
from .quantize import Packing

METHOD = "lowbit_ft_packs"  # never in a file: what is saved afterwards is a native folder's


class LowBitQuantConfig(QuantizationConfigMixin):
    """How a dense checkpoint is packed: the keys of a recipe's `quant` section, as keywords.

    calibration: what gptq and signround look at: the path of a file (or a hub id), or rows: texts, mappings
    with the columns of a data format, token ids (a list of lists, a tensor [rows, tokens]). Given, it makes
    gptq the default at 2, 3 and 4 bits, as in a recipe; without it the default is mse. The keys of
    quant.calibration (samples, sequence_len, damping, ...) are keywords too. ValueError with a line for each
    key that is wrong.
    """

    def __init__(self, bits: int = 4, group_size: int = 128, *, calibration: Any = None, **options: Any):
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  (typed as an enum of transformers' own)
        self.options = {"bits": bits, "group_size": group_size, **options}
        self.direct = Direct.of(self.options, calibration)

    def to_dict(self) -> dict[str, Any]:
        """What was asked, without the rows."""
        return {"quant_method": METHOD, **self.direct.quant.model_dump(mode="json")}

    def __deepcopy__(self, memo: Any) -> "LowBitQuantConfig":
        return self  # nothing of it changes, and rows may be many


class PackingQuantizer(PackedQuantizer):
    """Puts empty packed layers in before transformers loads the rest, and fills them afterwards.
    `lowbit_table` of the model tells what became of each layer."""

    requires_calibration = False
    quantization_config: Any  # a LowBitQuantConfig until the model is packed

    def __init__(self, quantization_config: LowBitQuantConfig, **kwargs: Any):
        # Not PackedQuantizer's own, which is for folders that are packed.
        super(PackedQuantizer, self).__init__(quantization_config, **kwargs)
        self._packing: Callable[[], Packing] | None = None
        self._names: dict[str, str] = {}  # of the checkpoint's causal model -> of the model that is loaded

    def update_device_map(self, device_map: Any) -> Any:
        """Without one, the GPU if there is one, as bitsandbytes does: packing is much faster there."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise ValueError("LowBitQuantConfig packs safetensors files; this model has none")
        device, dtype, folder = _one_device(kwargs.get("device_map")), model.dtype, Path(files[0]).parent
        direct: Direct = self.quantization_config.direct
        attention, source = model.config._attn_implementation or "sdpa", model.config.name_or_path

        def packing() -> Packing:
            checkpoint = Checkpoint.open(folder, dtype=dtype)
            checkpoint.source = str(source or folder)
            return direct.packing(checkpoint, device, dtype, attention)

        # transformers builds its model in here without values and ties: what is packed with is made outside.
        self._packing = packing
        with torch.device("cpu"):
            specs = packing().layer_specs
        here = named_in(model, specs)
        self._names = dict(zip(specs, here, strict=True))
        put_empty(model, here)
        _tell_loader(model, here)
        if any(is_head(name) or isinstance(model.get_submodule(name), PackedEmbedding) for name in here):
            model.config.tie_word_embeddings = False  # a packed matrix is nobody's parameter

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._packing is not None
        packing = self._packing()
        for name, base in packing:
            model.get_submodule(self._names[name]).fill(base)
        model.lowbit_table = packing.table
        mark_packed(model)
        return model


def _tell_loader(model: Any, names: dict[str, LayerSpec]) -> None:
    """What is packed is neither missing, nor to be drawn at random, nor tied, and the dense matrices of the
    files (of parts of a fused one: that one) are not expected to go anywhere."""
    inside = "|".join(re.escape(name) for name in names)
    wholes = "|".join(re.escape(one) for one in dict.fromkeys(whole_of(*layer) for layer in names.items()))
    # Of experts the files have stacks, or matrices by other names: all that is in their module.
    stacks = sorted({name.rsplit(".", 2)[0] for name in names if _is_expert(name)})
    outside = "|".join(re.escape(stack) for stack in stacks)
    of_files = {rf"({wholes})\.weight$"} | ({rf"({outside})\."} if stacks else set())
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *of_files}
    missing = {*(model._keys_to_ignore_on_load_missing or ()), rf"^({inside})\."}
    model._keys_to_ignore_on_load_missing = missing
    for name in names:
        model.get_submodule(name)._is_hf_initialized = True
    tied = model.all_tied_weights_keys.items()
    keys = {f"{name}.weight" for name in names}
    model.all_tied_weights_keys = {one: other for one, other in tied if not {one, other} & keys}


def _is_expert(name: str) -> bool:
    """Whether a layer's name is <experts>.<number>.<projection>."""
    return ".experts." in name


def _one_device(device_map: Any) -> torch.device:
    """The device of a map that names one. ValueError for more: the packed model is made on one."""
    if device_map is None:
        return torch.device("cpu")
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if places in ({"auto"}, {"balanced"}, {"balanced_low_0"}, {"sequential"}):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = places.pop() if len(places) == 1 else None
    if place is None or place == "disk":
        raise ValueError(
            f"device_map: got {device_map!r}; a checkpoint is packed on one device: pack it first "
            "(lowbit-ft quantize MODEL --output DIR) and load DIR with this map"
        )
    try:
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device_map: got {device_map!r}; needs a device that is here and holds values, for example 'cpu'"
        )
    return device


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LowBitQuantConfig
AUTO_QUANTIZER_MAPPING[METHOD] = PackingQuantizer

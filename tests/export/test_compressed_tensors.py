"""compressed-tensors: its own packing and its own matching of layers agree with what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_ft.export import EXPORTERS, LayerSpec
from lowbit_ft.export.compressed_tensors import fused_conflict
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import write_model
from lowbit_ft.grid import BinaryGrid
from lowbit_ft.grid.bitstream import pack_stream, unpack_stream
from lowbit_ft.model.checkpoint import Checkpoint
from tests.export.common import COMPRESSED, NATIVE, checkpoint
from tests.packed_tools import IDS, int_grid, packed_model, random_weight, random_weights


def test_every_layer_is_in_one_group_or_ignored_by_the_librarys_own_matching(tmp_path: Path) -> None:
    """Also under the names of vLLM's fused layers, whose members its matching looks up one by one."""
    from compressed_tensors.utils import is_match

    exporter = EXPORTERS["compressed-tensors"]
    source = checkpoint(tmp_path / "c", num_hidden_layers=12)
    weights = random_weights(
        source.empty_model(),
        {"down_proj": int_grid(bits=8), "o_proj": int_grid(bits=3, group_size=-1), "": int_grid()},
    )
    weights = {name: weight for name, weight in weights.items() if ".1.mlp.down" not in name}
    write_model(tmp_path / "m", source, weights, exporter)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert len(groups) == 3 and config["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    modules = {n: m for n, m in source.empty_model().named_modules() if isinstance(m, torch.nn.Linear)}
    modules |= {
        n.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj"): m for n, m in modules.items()
    }
    for name, module in modules.items():
        hits = [
            g["weights"]["num_bits"]
            for g in groups
            if is_match(name, module, g["targets"], config["ignore"], fused)
        ]
        one = name.replace("qkv_proj", "q_proj").replace("gate_up_proj", "gate_proj")
        assert hits == ([weights[one].grid.bits] if one in weights else []), name
    assert verify(tmp_path / "m", weights, model=packed_model(source, weights), source=source.folder).ok


def test_layers_that_vllm_fuses_and_the_recipe_tears_apart_are_noted() -> None:
    grids: dict[str, Any] = {
        f"model.layers.{i}.self_attn.{p}_proj": int_grid() for i in range(2) for p in "qkvo"
    }
    assert fused_conflict(grids | {"model.layers.1.self_attn.o_proj": None, "lm_head": None}) is None
    told = fused_conflict(grids | {"model.layers.1.self_attn.v_proj": int_grid(bits=8)})
    assert told is not None and "model.layers.1.self_attn.q_proj is W4 g64 sym and v_proj W8 g64 sym" in told
    told = fused_conflict({"mlp.gate_proj": None, "mlp.up_proj": int_grid()})
    assert told is not None and "mlp.gate_proj is dense and up_proj W4" in told


@settings(max_examples=60)
@given(bits=st.integers(1, 8), rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_the_bit_stream_is_the_librarys(bits: int, rows: int, columns: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g).to(torch.uint8)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack_stream(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(
        pack_stream(codes, bits).t(), pack_to_int32(signed.t().contiguous(), bits, packed_dim=0)
    )
    assert torch.equal(unpack_stream(pack_stream(codes, bits), bits, columns), codes)


def test_compressed_tensors_refuses_what_it_cannot_hold() -> None:
    assert all(
        COMPRESSED.reject(int_grid(bits=b, symmetric=s)) is None
        for b in (2, 3, 4, 6, 8)
        for s in (True, False)
    )
    assert "sign planes" in str(COMPRESSED.reject(BinaryGrid()))
    assert "float offset" in str(COMPRESSED.reject(int_grid(), offset=True))
    half = int_grid(
        scale_dtype="float16"
    )  # of a GPTQ base: exact in the file, and in a model that is as wide
    assert "float16 scales do not survive bfloat16" in str(COMPRESSED.reject_dtype(half, "bfloat16"))
    assert (
        COMPRESSED.reject(half)
        is COMPRESSED.reject_dtype(half, "float16")
        is COMPRESSED.reject_dtype(half, "float32")
        is None
    )
    assert "does not divide 100" in str(COMPRESSED.reject_width(int_grid(), 100))
    assert COMPRESSED.reject_width(int_grid(group_size=-1), 100) is None
    two = {"a": int_grid(symmetric=False), "b": int_grid(bits=8, symmetric=False)}
    problems = COMPRESSED.reject_model({name: LayerSpec((4, 64), grid) for name, grid in two.items()})
    assert len(problems) == 1 and "2 different grids" in problems[0]
    assert NATIVE.reject_model({name: LayerSpec((4, 100), grid, True) for name, grid in two.items()}) == []


def test_a_packed_head_is_named_beside_linear(tmp_path: Path) -> None:
    """vLLM's head is no Linear: it has a scheme only where a target names it. transformers matches it by
    either, and reads the same weights."""
    from compressed_tensors.utils import is_match

    class ParallelLMHead(torch.nn.Module):
        """The name of vLLM's class, which is what a target is compared with."""

    exporter = EXPORTERS["compressed-tensors"]
    source = checkpoint(tmp_path / "c")
    weights = random_weights(source.empty_model(), int_grid())
    write_model(tmp_path / "dense", source, weights, exporter)
    head = source.empty_model().lm_head.weight
    weights["lm_head"] = random_weight((head.shape[0], head.shape[1]), int_grid())
    write_model(tmp_path / "packed", source, weights, exporter)
    targets = {}
    for name in ("dense", "packed"):
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        (group,) = config["config_groups"].values()
        targets[name] = group["targets"]
        matched = is_match("lm_head", ParallelLMHead(), group["targets"], config["ignore"])
        assert matched == (name == "packed")
    assert targets == {"dense": ["Linear"], "packed": ["Linear", "lm_head"]}
    assert verify(tmp_path / "packed", weights, model=packed_model(source, weights), source=source.folder).ok
    # As a checkpoint that comes in, it is the same codes again.
    again = Checkpoint.open(tmp_path / "packed")
    assert torch.equal(
        again.packed_weight("lm_head.weight", int_grid()).unpack_codes(), weights["lm_head"].unpack_codes()
    )


def test_transformers_reads_past_a_transform(tmp_path: Path) -> None:
    """Why r4 is not exported: what the library itself saves of such a Hadamard is not computed. When this
    fails, transformers has learned it, and the format can carry r4."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoModelForCausalLM

    source = checkpoint(tmp_path / "c", vocab_size=64, hidden_size=64)
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    wanted = model(IDS % 23).logits
    down = {"targets": ["re:.*down_proj$"]}
    sides = [{**down, "location": "input"}, {**down, "location": "weight_input", "inverse": True}]
    group = {"type": "hadamard", "head_dim": 64, "apply": sides}
    apply_transform_config(model, TransformConfig.model_validate({"config_groups": {"R4": group}}))
    torch.testing.assert_close(model(IDS % 23).logits, wanted, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "t")
    ModelCompressor.from_pretrained_model(model).update_config(str(tmp_path / "t"))
    assert (
        "transform_config" in json.loads((tmp_path / "t" / "config.json").read_text())["quantization_config"]
    )
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "t", dtype=torch.float32)
    assert float((read(IDS % 23).logits - wanted).abs().max()) > 0.01 * float(wanted.abs().max())
    reason = EXPORTERS["compressed-tensors"].no_online
    assert reason is not None and "transformers reads past that" in reason

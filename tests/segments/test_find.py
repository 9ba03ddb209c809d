"""The segments of the seven families, found in models without weights; and a model that cannot be traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit_ft.model.meta import meta_model
from lowbit_ft.segments import Segment, Segments, find_segments
from tests.architectures import CONFIGS

QKV = ("q", "k", "v")
HEADS = tuple(Segment(16 * i, 16) for i in range(4))  # hidden size 64, heads of 16
# Of one decoder layer, by the end of the name. Everything that is not here has none.
WANTED: dict[str, dict[str, Segments]] = {
    "llama": {"self_attn.o_proj": Segments(HEADS)},
    "qwen3": {"self_attn.o_proj": Segments(HEADS)},
    "gemma2": {"self_attn.o_proj": Segments(HEADS)},
    "phi3": {  # four heads of q, two of k and v
        "self_attn.o_proj": Segments(HEADS),
        "self_attn.qkv_proj": Segments((), (Segment(0, 64), Segment(64, 32), Segment(96, 32)), QKV),
        "mlp.gate_up_proj": Segments((), (Segment(0, 96), Segment(96, 96)), ("gate", "up")),
    },
    "gpt2": {
        "attn.c_attn": Segments((), (Segment(0, 64), Segment(64, 64), Segment(128, 64)), QKV),
        "attn.c_proj": Segments(HEADS),
    },
    "gpt_neox": {  # q, k and v of head 0, then of head 1, ...
        "attention.query_key_value": Segments((), tuple(Segment(16 * i, 16, 4, 48) for i in range(3)), QKV),
        "attention.dense": Segments(HEADS),
    },
    "falcon": {  # two groups: two heads of q, then k, then v
        "self_attention.query_key_value": Segments(
            (), (Segment(0, 32, 2, 64), Segment(32, 16, 2, 64), Segment(48, 16, 2, 64)), QKV
        ),
        "self_attention.dense": Segments(HEADS),
    },
}


def skeleton(name: str, **changes: Any) -> Any:
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    attention = "eager" if name == "gemma2" else "sdpa"
    return meta_model(config, torch.float32, attention, Path("config.json"))


@pytest.mark.parametrize("family", WANTED)
def test_segments_of(family: str) -> None:
    model = skeleton(family)
    found = find_segments(model)
    layers = {name.partition(".0.")[0] for name in found if ".0." in name}
    assert len(layers) == 1
    wanted = {f"{layers.copy().pop()}.{i}.{end}": one for i in (0, 1) for end, one in WANTED[family].items()}
    assert found == wanted
    assert all(parameter.is_meta for parameter in model.parameters()), "left as it was"
    for name, segments in found.items():
        linear = model.get_submodule(name)
        # FalconLinear and Conv1D have their sides under other names.
        n, k = (linear.nf, linear.nx) if hasattr(linear, "nf") else linear.weight.shape
        for size, parts in ((k, segments.inputs), (n, segments.outputs)):
            every = torch.cat([part.channels() for part in parts]) if parts else torch.arange(size)
            assert torch.equal(every.sort().values, torch.arange(size)), "each channel in one of them"
        assert segments.widths == ((16,) * 4 if segments.inputs else ())


def test_the_name_is_what_the_model_makes_of_it() -> None:
    """CodeGen's qkv_proj has q, v, k; GPT-BigCode's has one head of k and v. Mamba's input projection is no
    attention: its parts have numbers."""
    config = transformers.CodeGenConfig(
        vocab_size=128, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=64
    )
    found = find_segments(meta_model(config, torch.float32, "eager", Path("config.json")))
    fusion = found["transformer.h.0.attn.qkv_proj"].fusion
    assert list(fusion) == ["q", "v", "k"] and fusion["v"] == Segment(16, 16, 4, 48)
    fusion = find_segments(skeleton("gpt_bigcode"))["transformer.h.0.attn.c_attn"].fusion
    assert fusion == {"q": Segment(0, 64), "k": Segment(64, 16), "v": Segment(80, 16)}
    config = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, state_size=4)
    found = find_segments(meta_model(config, torch.float32, "eager", Path("config.json")))
    names = {name.rpartition(".")[2]: own.names for name, own in found.items()}
    assert names == {"in_proj": ("0", "1"), "x_proj": ("0", "1", "2")}, "a step, B and C are no q, k and v"


def test_partial_rotary_is_no_segment() -> None:
    """StableLM rotates a part of each head: q_proj's output is sliced, and put together again."""
    assert {name.rpartition(".")[2] for name in find_segments(skeleton("stablelm"))} == {"o_proj"}


def test_a_model_that_cannot_be_traced_is_refused_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="torch.export cannot trace DbrxForCausalLM"):
        find_segments(skeleton("dbrx"))
    assert not "".join(capfd.readouterr()).strip(), "without the compiler's own pages"


def test_a_segment_says_what_it_is() -> None:
    strided = Segment(16, 2, 3, 8)
    assert strided.channels().tolist() == [16, 17, 24, 25, 32, 33]
    assert (strided.size, strided.stop, str(strided)) == (6, 34, "16:34 (3 x 2 every 8)")
    assert str(Segment(4, 4)) == "4:8" and Segments((strided,)).widths == ()

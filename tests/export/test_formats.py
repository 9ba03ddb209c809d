"""The formats of other people's servers: every grid one accepts comes back bit for bit, and its real reader
agrees.

gguf is read by transformers here. The readers of gptq, awq and mlx are large and pin other versions, so these
tests skip where they are not installed; run this file in an environment that has them.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from lowbit_ft import pipeline
from lowbit_ft.export import EXPORTERS, LayerSpec, base, gguf_tokenizer
from lowbit_ft.export.answers import Answers, answer
from lowbit_ft.export.compressed_tensors import fused_conflict
from lowbit_ft.export.folder import copied_files
from lowbit_ft.export.gguf import block_type
from lowbit_ft.export.gguf_model import reject, rope_divisors
from lowbit_ft.export.mlx import MlxModel
from lowbit_ft.export.reader import load_exported
from lowbit_ft.export.verify import verify
from lowbit_ft.export.writer import check_files, check_model, write_model
from lowbit_ft.grid import BinaryGrid
from lowbit_ft.model.linear import PackedLinear
from lowbit_ft.model.load import Checkpoint, load_model
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from tests.packed_tools import (
    IDS,
    SIZE,
    int_grid,
    packed_model,
    random_weight,
    random_weights,
    tiny_checkpoint,
)

ASSET = Path(__file__).resolve().parents[2] / "recipes" / "assets" / "tiny-llama"
GGUF = EXPORTERS["gguf"]
ASYMMETRIC = ("gptq_v2", "awq", "torchao")
OTHERS = [name for name in EXPORTERS if name != "native"]
GRIDS = [
    int_grid(bits=bits, group_size=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (32, 64, 128, 256, -1), (True, False))
]
WIDE: dict[str, Any] = SIZE | dict(vocab_size=4096, hidden_size=256)


def checkpoint(folder: Path, config: Any = None, dtype: str = "float32", **changes: Any) -> Checkpoint:
    """A random model with the tokenizer of the small asset."""
    config = config or transformers.LlamaConfig(**(WIDE | changes))
    path = tiny_checkpoint(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ASSET / name, path / name)
    return Checkpoint.open(path, dtype=dtype)


def eager(source: Checkpoint, weights: dict[str, Any]) -> Any:
    """`packed_model` for models that have no sdpa attention."""
    model = load_model(source, "eager")
    for name, weight in weights.items():
        model.set_submodule(name, PackedLinear(weight, model.get_submodule(name).bias))
    return model.eval()


def needs_reader(name: str) -> None:
    if reason := EXPORTERS[name].missing(EXPORTERS[name].reads_with):
        pytest.skip(f"{name} {reason}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("source") / "tiny")


# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("name", OTHERS)
def test_every_grid_a_format_accepts_comes_back_bit_for_bit(name: str) -> None:
    exporter, accepted = EXPORTERS[name], set()
    for grid, k in itertools.product(GRIDS, (96, 256, 768)):
        if exporter.reject_model({"m.0.x": LayerSpec((32, k), grid)}):
            continue
        weight = random_weight((32, k), grid, seed=k)
        layer, tensors = LayerSpec.of(weight), exporter.pack(weight)
        assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == exporter.specs(layer)
        assert exporter.unpack(tensors, layer).digest() == weight.digest(), (grid, k)
        accepted.add((grid.bits, grid.group_size, grid.symmetric))
        if not exporter.missing(exporter.reads_with):
            read = exporter.read_back(tensors, layer)
            assert torch.equal(read.codes, weight.unpack_codes()), (grid, k)
            assert torch.equal(read.scale.float(), weight.scale.float())
            assert (read.zero is None) == grid.symmetric and (
                grid.symmetric or torch.equal(read.zero, weight.zero)
            )
    everything = {(g.bits, g.group_size, g.symmetric) for g in GRIDS}
    assert (
        accepted
        == {
            "compressed-tensors": everything,
            "gguf": {key for key in everything if key[2]},
            "gptq": {key for key in everything if key[2]},
            "gptq_v2": everything,
            "awq": {key for key in everything if key[0] == 4 and key[1] != -1}
            | {(4, -1, True), (4, -1, False)},
            "mlx": {key for key in everything if key[2] and key[1] in (32, 64, 128)},
            "torchao": everything,
        }[name]
    )


def test_gguf_takes_the_smallest_block_type_that_is_exact() -> None:
    names = {(g.bits, g.group_size): block_type(g, 768).name for g in GRIDS if g.symmetric}
    assert {n for (bits, _), n in names.items() if bits == 8} == {"Q8_0"}
    assert {n for (bits, _), n in names.items() if bits == 4} == {"Q4_0"}
    assert names[3, 128] == names[2, 64] == "Q4_0"
    assert names[3, 256] == names[3, -1] == "Q3_K" and names[2, 256] == names[2, -1] == "Q2_K"
    assert block_type(int_grid(bits=3, group_size=-1), 96).name == "Q4_0"  # no whole block of 256


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "compressed-tensors"])
def test_tensors_that_are_not_ours_are_refused(name: str) -> None:
    exporter = EXPORTERS[name]
    weight = random_weight((32, 512), int_grid(group_size=64))
    layer, tensors = LayerSpec.of(weight), exporter.pack(weight)
    for key in tensors:
        with pytest.raises(ValueError, match=f"missing {key}"):
            exporter.unpack({k: v for k, v in tensors.items() if k != key}, layer)
        with pytest.raises(ValueError, match=key):
            exporter.unpack(tensors | {key: torch.cat([tensors[key], tensors[key]])}, layer)
    if name == "gguf":
        blocks = tensors["weight"].clone()
        blocks[3, 1] += 1  # the scale of the first block, not of the second in the same group
        with pytest.raises(ValueError, match="differ in scale"):
            exporter.unpack({"weight": blocks}, layer)
        narrow = LayerSpec(layer.shape, int_grid(bits=2, group_size=64))
        with pytest.raises(ValueError, match="beyond 2 bits"):
            exporter.unpack(tensors, narrow)
        return
    if name == "torchao":
        with pytest.raises(ValueError, match="beyond 2 bits"):
            exporter.unpack(tensors, LayerSpec(layer.shape, int_grid(bits=2, group_size=64)))
        with pytest.raises(ValueError, match="zero points other than 8"):
            exporter.unpack(tensors | {"_weight_zero_point": tensors["_weight_zero_point"] + 1}, layer)
        return
    scales = tensors["scales"].clone()
    scales[0, 0] *= 1.01
    with pytest.raises(ValueError, match="not a file of ours"):
        exporter.unpack(tensors | {"scales": scales}, layer)
    if name.startswith("gptq"):
        with pytest.raises(ValueError, match="g_idx"):
            exporter.unpack(tensors | {"g_idx": tensors["g_idx"].flip(0)}, layer)
    if name != "mlx":
        with pytest.raises(ValueError, match="zero points other than 8"):
            exporter.unpack(tensors | {"qzeros": tensors["qzeros"] ^ 1}, layer)


def test_what_a_format_cannot_hold_is_refused_with_a_way_out() -> None:
    def told(name: str, words: str, **fields: Any) -> None:
        layers = {"model.layers.0.mlp.x": LayerSpec((32, 256), int_grid(**fields))}
        problems = EXPORTERS[name].reject_model(layers)
        assert len(problems) == 1 and words in problems[0] and "native" in problems[0], problems

    told("gguf", "asymmetric", symmetric=False)
    told("gptq", "gptq_v2", symmetric=False)
    told("mlx", "asymmetric", symmetric=False)
    told("awq", "holds 4 bits, not 3", bits=3)
    told("mlx", "groups of 32, 64 and 128, not the whole row", group_size=-1)
    for name in OTHERS:
        exporter = EXPORTERS[name]
        assert "sign planes" in str(exporter.reject(BinaryGrid(bits=4))) or name == "awq"
        assert "float offset" in str(exporter.reject(int_grid(), offset=True))
    for name in ("gguf", "gptq", "awq"):
        assert "float32" in str(EXPORTERS[name].reject(int_grid(scale_dtype="float32")))
    assert "multiple of 32 inputs" in str(GGUF.reject_width(int_grid(), 100))
    assert GGUF.reject_width(int_grid(group_size=64), 96) is None  # a last group of 32
    two = {"m.0.a": LayerSpec((32, 256), int_grid()), "m.0.b": LayerSpec((32, 256), int_grid(bits=8))}
    assert "one grid for all layers" in EXPORTERS["gptq"].reject_model(two)[0]
    assert GGUF.reject_model(two) == EXPORTERS["mlx"].reject_model(two) == []
    here_only = {"m.0.a": LayerSpec((32, 256), int_grid()), "m.1.b": LayerSpec((32, 256), int_grid())}
    assert "block 1 leaves it dense" in EXPORTERS["gptq"].reject_model(here_only)[0]
    odd = {"m.0.a": LayerSpec((30, 256), int_grid())}
    assert "multiple of 8 outputs" in EXPORTERS["awq"].reject_model(odd)[0]
    assert "multiple of 8 outputs" in EXPORTERS["gptq"].reject_model(odd)[0]
    assert "head" in EXPORTERS["awq"].reject_model({"lm_head": LayerSpec((32, 256), int_grid())})[0]


def test_scales_that_float16_has_not_are_refused() -> None:
    weight = random_weight((32, 256), int_grid())
    weight.scale[0, 3] = 2.0**-20 * (1 + 2.0**-7)
    for name in ("gguf", "gptq", "awq"):
        with pytest.raises(ValueError, match=r"1 of 128 scales have no float16 value \(such as 9.61e-07\)"):
            EXPORTERS[name].pack(weight)
    weight.scale[0, 3] = 2.0**-17  # the smallest scale we ever train is exact
    assert GGUF.unpack(GGUF.pack(weight), LayerSpec.of(weight)).digest() == weight.digest()


# ---------------------------------------------------------------------------------- gguf through transformers


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.symmetric], ids=str)
def test_transformers_reads_gguf_with_equal_logits(grid: Any, source: Checkpoint, tmp_path: Path) -> None:
    weights = random_weights(source.empty_model(), grid)
    write_model(tmp_path / "m", source, weights, GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", gguf_file="model.gguf", dtype=torch.float32
    )
    assert torch.equal(model.eval()(IDS).logits, packed_model(source, weights)(IDS).logits)
    assert verify(tmp_path / "m", weights).ok


TINY = WIDE | dict(num_hidden_layers=2)
GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
ARCHITECTURES: dict[str, Any] = {
    "llama, biases": transformers.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama, rope of llama 3": transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3),
    "llama, linear rope": transformers.LlamaConfig(
        **TINY, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=8.0)
    ),
    "llama, tied": transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**TINY),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=32),
    "gemma2": transformers.Gemma2Config(**TINY, **GEMMA),
    "gemma3": transformers.Gemma3TextConfig(**(TINY | dict(num_hidden_layers=7)), **GEMMA),
}


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_architectures_of_gguf(kind: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", ARCHITECTURES[kind])
    model = source.empty_model("eager")
    weights = random_weights(model, {"down_proj": int_grid(bits=8), "": int_grid()})
    if "tied" in kind:
        weights["lm_head"] = random_weight((4096, 256), int_grid(bits=8))
    write_model(tmp_path / "m", source, weights, GGUF)
    loaded = load_exported(tmp_path / "m", attention="eager")
    assert torch.equal(loaded(IDS).logits, eager(source, weights)(IDS).logits)
    if "tied" in kind:
        assert not loaded.config.tie_word_embeddings


def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path: Path) -> None:
    def told(words: str, config: Any) -> None:
        problems = reject(config.to_dict())
        assert len(problems) == 1 and words in problems[0] and "native" in problems[0], problems

    told("'opt'", transformers.OPTConfig())
    told("sliding window", transformers.MistralConfig(**TINY))
    told("silu", transformers.LlamaConfig(**TINY, hidden_act="gelu"))
    told(
        "'yarn'",
        transformers.LlamaConfig(**TINY, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)),
    )
    told("'llama3'", transformers.Qwen2Config(**TINY, rope_parameters=LLAMA3))
    told(
        "query_pre_attn_scalar", transformers.Gemma2Config(**TINY, **(GEMMA | dict(query_pre_attn_scalar=99)))
    )
    told(
        "final_logit_softcapping", transformers.Gemma3TextConfig(**TINY, **GEMMA, final_logit_softcapping=9.0)
    )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        told(f"{key} null", transformers.Gemma2Config(**TINY, **GEMMA, **{key: None}))
    told("46 layers", transformers.Gemma2Config(**(TINY | dict(num_hidden_layers=46)), **GEMMA))
    assert all(reject(config.to_dict()) == [] for config in ARCHITECTURES.values())
    source = checkpoint(tmp_path / "c", transformers.MistralConfig(**TINY))
    with pytest.raises(ValueError, match=r"(?s)gguf cannot hold this model.*sliding window"):
        check_model(source, {"model.layers.0.mlp.up_proj": LayerSpec((256, 256), int_grid())}, GGUF)


def test_the_rope_divisors_are_those_of_transformers() -> None:
    config = transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3)
    inverse, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    divisors = rope_divisors(config.to_dict())
    assert (
        divisors is not None
        and torch.allclose(plain / divisors, inverse, rtol=1e-5)
        and len(set(divisors.tolist())) > 2
    )
    assert rope_divisors(transformers.LlamaConfig(**TINY).to_dict()) is None


# ------------------------------------------------------------------------------------------ tokens


def sentencepiece_tokenizer(folder: Path) -> int:
    """A tokenizer as Llama 2 has it (BPE of words with a leading space, bytes for the rest), into `folder`;
    its vocabulary.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # pyright: ignore
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )  # pyright: ignore
    text = Path(base.__file__).read_text(encoding="utf-8")
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    )  # pyright: ignore
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary pieces
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    )
    wrapped.save_pretrained(folder)
    return len(wrapped)


def test_gguf_carries_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    size = sentencepiece_tokenizer(tmp_path / "t")
    path = tiny_checkpoint(tmp_path / "c", vocab_size=size + 5)  # more embeddings than tokens
    shutil.copytree(tmp_path / "t", path, dirs_exist_ok=True)
    source = Checkpoint.open(path, dtype="float32")
    weights = random_weights(source.empty_model(), int_grid())
    write_model(tmp_path / "m", source, weights, GGUF)
    report = verify(tmp_path / "m", weights, model=packed_model(source, weights), source=path)
    assert report.ok and report.tokens == [] and report.answers is not None and report.answers.tokens > 3
    tokenizer = GGUF.tokenizer(tmp_path / "m")
    assert len(tokenizer) == size + 5 and tokenizer.decode(
        tokenizer("def unpack(self): ü").input_ids, skip_special_tokens=True
    )


def test_stop_tokens_and_template_are_in_the_gguf_file_itself(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    (source.folder / "generation_config.json").write_text('{"eos_token_id": [3, 0]}')
    weights = random_weights(source.empty_model(), int_grid())
    write_model(tmp_path / "m", source, weights, GGUF)
    assert GGUF.stops(tmp_path / "m") == [0, 3]
    assert GGUF.tokenizer(tmp_path / "m").chat_template == (ASSET / "chat_template.jinja").read_text()
    assert verify(tmp_path / "m", weights, source=source.folder).tokens == []
    other = shutil.copytree(source.folder, tmp_path / "other")
    (other / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    (other / "chat_template.jinja").write_text("another")
    with pytest.raises(
        ValueError,
        match=r"(?s)tokens: chat_template: .*'another'.*stop tokens: \[0, 3\], and the model has \[0, 5\]",
    ):
        verify(tmp_path / "m", weights, source=other)
    (source.folder / "generation_config.json").write_text('{"eos_token_id": [3, 0, 5, 6]}')
    with pytest.raises(ValueError, match="has 4 tokens, and gguf has room for 3"):
        write_model(tmp_path / "n", source, weights, GGUF)
    assert not (tmp_path / "n").exists()


def test_a_tokenizer_without_chat_template_is_exported_and_verified_on_plain_text(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    (source.folder / "chat_template.jinja").unlink()
    weights = random_weights(source.empty_model(), int_grid())
    write_model(tmp_path / "m", source, weights, GGUF)
    report = verify(tmp_path / "m", weights, model=packed_model(source, weights), source=source.folder)
    assert (
        report.ok
        and report.answers is not None
        and report.answers.prompts == 3
        and report.answers.same == report.answers.tokens
    )
    assert GGUF.tokenizer(tmp_path / "m").chat_template is None


def test_tokenizers_that_llama_cpp_has_not_are_refused(tmp_path: Path) -> None:
    def told(words: str, change: Any) -> None:
        content = json.loads((ASSET / "tokenizer.json").read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (problem,) = gguf_tokenizer.reject(tmp_path)
        assert words in problem, problem

    told("'Unigram'", lambda t: t["model"].update(type="Unigram"))
    told("no name for the way", lambda t: t["pre_tokenizer"].update(type="Whitespace"))
    split = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x"}},
            {"type": "ByteLevel", "use_regex": False},
        ],
    }
    told("no name for the way", lambda t: t.update(pre_tokenizer=split))
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot be read" in gguf_tokenizer.reject(tmp_path)[0]
    (tmp_path / "tokenizer.json").unlink()
    assert "holds its tokenizer" in gguf_tokenizer.reject(tmp_path)[0]
    rules = {name: json.dumps({"Regex": rule}) for rule, name in gguf_tokenizer.PRE.items()}
    assert set(rules) == {"llama-bpe", "qwen2", "tekken"}
    for rule, name in gguf_tokenizer.PRE.items():
        split["pretokenizers"][0]["pattern"] = {"Regex": rule}
        assert gguf_tokenizer._kind({"model": {"type": "BPE"}, "pre_tokenizer": split}) == ("gpt2", name)


def test_the_splitting_rules_are_those_of_transformers_reader() -> None:
    mapping = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping", reason="an older transformers"
    )
    theirs = mapping.GGUF_PRE_TOKENIZER_SPLITS
    assert {name: rule for rule, name in gguf_tokenizer.PRE.items()} == {
        name: theirs[name] for name in gguf_tokenizer.PRE.values()
    }


# -------------------------------------------------------------------------------- compressed-tensors for vLLM


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


# ------------------------------------------------------------------------------------------ verify


def test_answers_go_on_behind_a_tie_and_fail_on_a_difference() -> None:
    table = torch.tensor(
        [[0.0, 5.0, 1.0, 0.0], [0.0, 0.0, 5.0, 4.999], [0.0, 5.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]
    )

    def logits(ids: torch.Tensor, table: torch.Tensor = table) -> torch.Tensor:
        return table[ids]

    said = answer(logits, torch.tensor([[0]]), stops=[3])
    assert said.ids[0, :5].tolist() == [0, 1, 2, 1, 2] and said.ids.shape[1] == 17
    assert answer(logits, torch.tensor([[0]]), stops=[2]).ids.tolist() == [[0, 1, 2]]
    same = Answers.compare(logits, [said], 1e-4)
    assert same.ok and same.same == same.tokens == 16 and "16 of 16" in str(same)
    tie = table.clone()
    tie[1, 3] = 5.0005
    near = Answers.compare(lambda ids: logits(ids, tie), [said], 1e-3)
    assert near.ok and near.same == 8 and "ties within the tolerance" in str(near)
    assert not Answers.compare(lambda ids: logits(ids, tie), [said], 1e-6).ok
    assert not Answers.compare(lambda ids: logits(ids) * float("nan"), [said], 1e-3).ok


def test_verify_finds_a_changed_bit_in_a_gguf_file(source: Checkpoint, tmp_path: Path) -> None:
    weights = random_weights(source.empty_model(), int_grid(bits=3))
    write_model(tmp_path / "m", source, weights, GGUF)
    layer = "model.layers.0.self_attn.q_proj"  # whose rows are stored in another order
    codes = weights[layer].codes.clone()
    codes[5, 3] ^= 1
    damaged = dict(weights) | {
        layer: type(weights[layer])(
            codes=codes, scale=weights[layer].scale, shape=(256, 256), grid=weights[layer].grid
        )
    }
    with pytest.raises(
        ValueError, match=rf"(?s)1 of 7 layers differ.*{layer}: 1 codes, 0 scales and zero points, 1 weights"
    ):
        verify(tmp_path / "m", damaged)
    with pytest.raises(ValueError, match="logits: largest difference"):
        verify(tmp_path / "m", weights, model=packed_model(source, damaged))


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "mlx", "torchao"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formats_own_reader_agrees(name: str, dtype: str, tmp_path: Path) -> None:
    needs_reader(name)
    source = checkpoint(tmp_path / "c", dtype=dtype, num_hidden_layers=2)
    weights = random_weights(source.empty_model(), int_grid(symmetric=name not in ASYMMETRIC))
    weights = {
        layer: weight for layer, weight in weights.items() if "o_proj" not in layer
    }  # stays dense in every block
    write_model(tmp_path / "m", source, weights, EXPORTERS[name])
    report = verify(
        tmp_path / "m", weights, model=lambda: packed_model(source, weights), source=source.folder
    )
    assert report.ok and report.logit_difference is not None and report.answers is not None
    assert (
        "scales and weights equal" in str(report)
        if name == "torchao"
        else "codes and scales equal" in str(report)
    )
    if name == "torchao":
        assert report.logit_difference == 0
    with pytest.raises(ValueError, match="1 of 12 layers differ|12 of 12"):
        other = random_weights(source.empty_model(), int_grid(symmetric=name not in ASYMMETRIC))
        first = next(iter(weights))
        verify(
            tmp_path / "m",
            weights
            | {first: other[next(n for n in other if n != first and other[n].shape == other[first].shape)]},
        )


@pytest.mark.slow
@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits != 4 and g.group_size in (64, -1)], ids=str)
def test_gptq_of_other_widths_through_gptqmodel(grid: Any, source: Checkpoint, tmp_path: Path) -> None:
    needs_reader("gptq_v2")
    weights = random_weights(source.empty_model(), grid)
    for weight in weights.values():
        weight.scale.mul_(2.0 ** (4 - grid.bits))  # weights of one size at all widths, as in real models
    write_model(tmp_path / "m", source, weights, EXPORTERS["gptq_v2"])
    expected = packed_model(source, weights)(IDS).logits
    with torch.no_grad():
        assert (
            load_exported(tmp_path / "m")(IDS).logits - expected
        ).abs().max() < 1e-2 * expected.abs().max()


def test_mixed_bits_through_mlx(source: Checkpoint, tmp_path: Path) -> None:
    needs_reader("mlx")
    weights = random_weights(
        source.empty_model(),
        {"down_proj": int_grid(bits=8, group_size=32), "o_proj": int_grid(bits=3), "": int_grid(bits=2)},
    )
    write_model(tmp_path / "m", source, weights, EXPORTERS["mlx"])
    assert verify(tmp_path / "m", weights, model=packed_model(source, weights), source=source.folder).ok


def test_a_reader_that_is_not_there_is_named_with_its_extra(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(source.empty_model(), int_grid())
    for name in OTHERS:
        write_model(tmp_path / name, source, weights, EXPORTERS[name])
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    for name, extra in {
        "gguf": "gguf",
        "gptq": "gptq",
        "awq": "gptq",
        "mlx": "mlx",
        "torchao": "torchao",
    }.items():
        for read in (load_exported, lambda folder: verify(folder, weights)):
            with pytest.raises(
                ValueError, match=rf"reading {name} needs .*pip install 'lowbit-ft\[{extra}\]'"
            ):
                read(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"gguf needs gguf, not installed here; run pip install 'lowbit-ft\[gguf\]'"
    ):
        write_model(tmp_path / "again", source, weights, GGUF)
    assert not (tmp_path / "again").exists()


# ------------------------------------------------------------------------------------------ recipes


def problems_of(*overrides: str) -> list[str]:
    """What the quickstart recipe is refused for with these overrides; empty when it is not."""
    try:
        load_recipe(ASSET.parents[1] / "quickstart.yaml", overrides)
    except RecipeError as error:
        return error.problems
    return []


def test_a_recipe_learns_of_a_format_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ASSET.parents[2])

    def refused(words: str, *overrides: str) -> None:
        problems = problems_of(f"output={tmp_path / 'run'}", *overrides)
        assert len(problems) == 1 and words in problems[0], problems

    def accepted(*overrides: str) -> None:
        assert problems_of(f"output={tmp_path / 'run'}", *overrides) == []

    alpha = ("quant.grid=binary", "quant.calibrate=greedy", "adapter={method: alpha_tuning}")
    accepted("export.format=gguf")
    refused("changes asymmetric weights", "export.format=gguf", "quant.symmetric=false")
    refused(
        "one grid for all layers",
        "export.format=awq",
        "export.verify=false",
        "quant.overrides=[{match: '*.down_proj', group_size: 32}]",
    )
    accepted("export.format=compressed-tensors", "quant.bits=1", *alpha)
    accepted("export.format=gguf", "quant.bits=1", *alpha)
    refused("sign planes", "export.format=gguf", "quant.bits=2", *alpha)
    opt = checkpoint(
        tmp_path / "opt",
        transformers.OPTConfig(
            vocab_size=4096,
            hidden_size=256,
            num_hidden_layers=1,
            ffn_dim=256,
            num_attention_heads=4,
            word_embed_proj_dim=256,
            max_position_embeddings=512,
        ),
    )
    refused("gguf is written for llama, mistral", "export.format=gguf", f"model.path={opt.folder}")
    accepted("export.format=native", f"model.path={opt.folder}")
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    refused("export.verify: got true, and reading gptq needs gptqmodel, optimum", "export.format=gptq")
    accepted("export.format=gptq", "export.verify=false")
    refused(
        "export.format: got 'gguf', which needs gguf, not installed here; run pip install 'lowbit-ft[gguf]'",
        "export.format=gguf",
        "export.verify=false",
    )


def test_an_mlx_answer_ends_at_its_stop_token() -> None:
    model = MlxModel.__new__(MlxModel)
    torch.nn.Module.__init__(model)
    model.stops = frozenset([5])
    model.forward = lambda ids: SimpleNamespace(
        logits=torch.nn.functional.one_hot(ids + 1, 16).float()
    )  # counts up
    assert model.generate(torch.tensor([[2]]), max_new_tokens=9).tolist() == [[2, 3, 4, 5]]
    assert model.generate(torch.tensor([[2]]), max_new_tokens=2).tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_files_of_a_processor_are_copied(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert [path.name for path in copied_files(tmp_path)] == [name]


@pytest.mark.slow
def test_a_run_ends_in_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ASSET.parents[2])
    out = tmp_path / "run"
    overrides = [
        "train.max_steps=1",
        "eval.perplexity=false",
        "eval.generate=[]",
        "export.format=gguf",
        f"output={out}",
    ]
    folder = pipeline.run(load_recipe(ASSET.parents[1] / "quickstart.yaml", overrides))
    said = capsys.readouterr().out
    assert (
        folder == out / "exported"
        and (folder / "model.gguf").is_file()
        and f"serve it: llama-server -m {folder}/model.gguf" in said
    )
    assert (
        "logits: largest difference 0 (must be equal)" in said
        and "tokens: special tokens, stop tokens and chat template" in said
    )
    assert "gguf_file" in (folder / "README.md").read_text()
    manifest = check_files(folder)
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"format: gptq is verified through its reader, which needs gptqmodel, optimum"
    ):
        pipeline.export(out, "gptq")
    assert check_files(folder) == manifest

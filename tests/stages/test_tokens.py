"""model.add_tokens: new rows of embedding and head that train alone, and what of them ships."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_ft import pipeline
from lowbit_ft.adapters import LRQATConfig
from lowbit_ft.adapters.attach import adapters_off, attach
from lowbit_ft.export.reader import load_exported
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.grown import GrownCheckpoint, NewTokens
from lowbit_ft.model.load import load_model
from lowbit_ft.model.rows import row_tables, train_rows
from lowbit_ft.model.shipped import trained_tensors
from lowbit_ft.model.whole import untrained, whole_tensors
from lowbit_ft.plan.model import skeleton
from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.recipe import Recipe, load_recipe
from lowbit_ft.recipe.sections.quant import QuantSection
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.rotations import FoldedCheckpoint, Rotation
from lowbit_ft.session import resume
from lowbit_ft.stages.models import trained_model
from tests.export.common import checkpoint
from tests.stages.test_modules import SIZE, gguf_tensors

pytestmark = pytest.mark.usefixtures("in_the_repository")
NEW = ["<|tool|>", "zorglub"]
OLD, IDS = 4096, [4096, 4097]
PROMPT = torch.tensor([[5, 4096, 9, 4097, 4096, 11, 30, 2]])


@dataclass
class Ran:
    recipe: Recipe
    root: Path
    said: str

    @property
    def out(self) -> Path:
        return self.root / "out"


def recipe_of(root: Path, output: Path, *overrides: str) -> Recipe:
    rows = root / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"text": f"say {i} <|tool|> or zorglub<|tool|> now"}) for i in range(8))
    )
    train = {
        "train": {"path": str(rows), "format": "text"},
        "sequence_len": 16,
        "packing": False,
        "train_on": "all",
    }
    recipe: dict[str, Any] = {
        "name": "tokens",
        "model": {"path": str(root / "model"), "dtype": "bfloat16", "device": "cpu"},
        "quant": {"group_size": 32, "calibrate": "absmax"},
        "adapter": {"method": "lr_qat", "rank": 4, "modules_to_save": ["norm"]},
        "data": train,
        "train": {"max_steps": 2, "gradient_accumulation_steps": 1, "micro_batch_size": 2, "save_every": 1},
        "eval": {"perplexity": False, "window": 16},
        "export": {"format": "native", "verify": False},
        "output": str(output),
    }
    recipe["model"]["add_tokens"] = NEW
    recipe["train"] |= {"learning_rate": 0.1, "modules_learning_rate": 0.02, "warmup_ratio": 0}
    file = root / "recipe.json"
    file.write_text(json.dumps(recipe))
    return load_recipe(file, list(overrides))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run on a model with a tied head, two steps."""
    root = tmp_path_factory.mktemp("tokens")
    checkpoint(root / "model", transformers.LlamaConfig(**SIZE, tie_word_embeddings=True))
    recipe = recipe_of(root, root / "out")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("lowbit_ft.session.Session.say", lambda self, text: said.append(str(text)))
        pipeline.train(recipe)
    return Ran(recipe, root, "\n".join(said))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def test_new_rows_alone_train_and_ship(ran: Ran) -> None:
    """Old rows are the checkpoint's bytes in every folder, new ones the rounded masters; the head is the same
    table; who loads it computes what was trained."""
    assert "rows 64" in ran.said and "new tokens are in no row" not in ran.said
    old = load_file(ran.root / "model" / "model.safetensors")["model.embed_tokens.weight"]
    start = old.float().mean(0, dtype=torch.float64).to(old.dtype)
    with resume(ran.out) as session:
        model = trained_model(session)
    ((name, module, rows),) = row_tables(model)
    assert name == "model.embed_tokens" and model.lm_head.trained_rows is rows
    assert not module.weight.requires_grad and not torch.equal(rows.rows[0], rows.rows[1])
    shipped = rows.rows.detach().bfloat16()
    assert torch.equal(
        load_file(ran.out / "base/model.safetensors")[f"{name}.weight"][OLD:], start.expand(2, -1)
    )

    for folder in (ran.out / "merged", pipeline.export(ran.out, "compressed-tensors")):
        table = load_file(folder / "model.safetensors")[f"{name}.weight"]
        assert torch.equal(table[:OLD], old) and torch.equal(table[OLD:], shipped)
        assert not torch.equal(table[OLD:], start.expand(2, -1))
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == OLD + 2
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer("a<|tool|>", add_special_tokens=False)["input_ids"][-1] == IDS[0]
        assert tokenizer.convert_tokens_to_ids(NEW) == IDS and tokenizer.chat_template
        loaded = load_exported(folder)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(logits(loaded), logits(model))
    folder = pipeline.export(ran.out, "gguf")
    stored = gguf_tensors(folder)["token_embd.weight"].view(torch.bfloat16).view(OLD + 2, -1)
    assert torch.equal(stored[:OLD], old) and torch.equal(stored[OLD:], shipped)
    field = gguf.GGUFReader(folder / "model.gguf").fields["tokenizer.ggml.tokens"]
    assert [bytes(field.parts[i]).decode() for i in field.data[-2:]] == NEW
    norm = load_file(ran.out / "merged" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, model.model.norm.weight) and not torch.equal(norm, torch.ones_like(norm))


def test_a_run_goes_on_bit_equal_and_merges_again(ran: Ran) -> None:
    before = {p.name: p.read_bytes() for p in (ran.out / "adapter").iterdir()}
    merged = (ran.out / "merged" / "model.safetensors").read_bytes()
    pipeline.merge(ran.out)  # compares with what training wrote
    shutil.rmtree(ran.out / "checkpoints" / "step-00000002")
    for name in ("adapter", "merged"):
        shutil.rmtree(ran.out / name)
    pipeline.train(ran.recipe)
    assert {p.name: p.read_bytes() for p in (ran.out / "adapter").iterdir()} == before
    assert (ran.out / "merged" / "model.safetensors").read_bytes() == merged
    assert isinstance(pipeline.generate(ran.out / "merged", "<|tool|>", 2, "cpu"), str)


def test_peft_reads_the_rows(ran: Ran, tmp_path: Path) -> None:
    """And they ship without a run, with the norm that was trained whole."""
    facts = json.loads((ran.out / "adapter" / "adapter_config.json").read_text())
    assert facts["trainable_token_indices"] == {"model.embed_tokens": IDS}
    base = AutoModelForCausalLM.from_pretrained(ran.out / "base", dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(base, ran.out / "adapter").eval()
    assert torch.equal(logits(theirs), logits(load_exported(ran.out / "merged")))
    out = pipeline.export(ran.out / "adapter", "native", tmp_path / "out", ran.out / "base")
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, ran.out / "merged"))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_whole_table(tied: bool) -> None:
    """And of nothing else: the table has none, and its rows before training come back."""
    config = transformers.Gemma2Config(**{**SIZE, "vocab_size": 40}, head_dim=16, tie_word_embeddings=tied)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    ours.load_state_dict(plain.state_dict())
    ids = torch.tensor([[3, 38, 39, 38, 5]])
    ours.requires_grad_(False)
    train_rows(ours, {"model.embed_tokens": [38, 39], "lm_head": [38, 39]})
    before = ours(ids).logits
    assert torch.equal(before, plain(ids).logits)
    for model in (plain, ours):
        model(ids).logits.square().sum().backward()
    tables = {name: rows for name, _, rows in row_tables(ours)}
    assert len(tables) == 2 - tied and [n for n, p in ours.named_parameters() if p.grad is not None] == [
        f"{name}.trained_rows.rows" for name in tables
    ]
    for name, rows in tables.items():
        whole = plain.get_submodule(name).weight.grad[38:]
        assert rows.rows.grad is not None
        torch.testing.assert_close(rows.rows.grad, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for rows in tables.values():
            rows.rows.add_(1.0)
        assert not torch.equal(ours(ids).logits, before)
        with untrained(ours):
            assert torch.equal(ours(ids).logits, before)
        for name, trained in trained_tensors(ours).items():
            old = plain.get_parameter(name)
            assert torch.equal(trained.value()[38:], old[38:] + 1) and torch.equal(
                trained.value()[:38], old[:38]
            )


def test_rows_that_are_there_are_taken(tmp_path: Path) -> None:
    """A table with more rows than tokens does not grow; a row begins as a copy; what is read by rows is what
    is read whole."""
    size: dict[str, Any] = SIZE | {"vocab_size": 4100}
    source = checkpoint(tmp_path / "model", transformers.LlamaConfig(**size))
    grown = GrownCheckpoint(source, source.folder, NewTokens((4096, 4097), 4100, copied=7))
    table = grown.weight_for("model.embed_tokens.weight")
    before = source.weight_for("model.embed_tokens.weight")
    assert torch.equal(table[4096:4098], before[7].expand(2, -1))
    assert torch.equal(table[4098:], before[4098:]) and torch.equal(table[:4096], before[:4096])
    assert torch.equal(
        grown.read("lm_head.weight", rows=(4090, 4099)), grown.read("lm_head.weight")[4090:4099]
    )
    pieces = torch.cat(list(grown.stored_pieces("lm_head.weight")))
    assert torch.equal(pieces.view(4100, -1), grown.read("lm_head.weight"))
    larger = GrownCheckpoint(source, source.folder, NewTokens((4100,), 4101))
    assert load_model(larger).lm_head.weight.shape[0] == larger.config.vocab_size == 4101
    assert larger.nbytes == source.nbytes + 2 * 2 * 32
    turned = FoldedCheckpoint(larger, Rotation(r1=True))
    pieces = sum(len(piece) for piece in turned.stored_pieces("lm_head.weight"))
    assert turned.shape("lm_head.weight") == (4101, 32) and pieces == 4101 * 32

    model, _ = quantize(larger, QuantSection(group_size=32, calibrate="absmax"), dtype=torch.float32)
    rows = dict.fromkeys(larger.tables, (4100,))
    config = LRQATConfig(rank=4, modules_to_save=["lm_head"])  # pyright: ignore[reportCallIssue]
    attach(model, config.with_token_rows(rows))  # a head that trains whole has no rows of its own
    assert [name for name, _, _ in row_tables(model)] == ["model.embed_tokens"]
    assert isinstance(model.lm_head, nn.Linear) and whole_tensors(model)["lm_head.weight"][0].shape == (
        4101,
        32,
    )
    with adapters_off(model):
        assert logits(model).isfinite().all()


def test_plan_counts_the_rows(ran: Ran) -> None:
    before, after, whole = (
        skeleton(recipe_of(ran.root, ran.root / "no", *keys), ran.root / "model")
        for keys in (
            ["model.add_tokens=null"],
            ["model.add_tokens=[aab, zzq, xyu]"],
            ["model.add_tokens=null", "adapter.modules_to_save=[norm, lm_head]"],
        )
    )
    assert after.trainable - before.trainable == 3 * 32  # tied: one table
    assert len(after.trained) - len(before.trained) == 1  # of the optimizer's state
    assert after.trained_bytes - before.trained_bytes == 4 * 96
    more = {key: after.held[key] - before.held[key] for key in ("adapters", "embeddings", "head")}
    assert more == {"adapters": 4 * 96, "embeddings": 2 * 96, "head": 0}
    assert whole.trainable - before.trainable == OLD * 32 and whole.table_bytes == 2 * OLD * 32


def test_what_is_refused_is_refused_at_once(ran: Ran) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(
            ran.root,
            ran.root / "no",
            "model.add_tokens={tokens: [' ', the, new, new], init: {copy_of: <|im_stat|>}}",
            "quant.embeddings=8",
            "train.signal.kind=logits",
            "train.teacher=residual",
            "train.gradient.kind=zeroth_order",
        )
    said = str(error.value)
    for words in (
        "got ' ' as token 0; allowed: text that is not blank",
        "got 'the', which the tokenizer has already (id ",
        "got 'new' twice",
        "copy_of '<|im_stat|>', which is no token of the vocabulary; did you mean '<|im_start|>'?",
        "quant.embeddings: got 8 with model.add_tokens: rows of a packed table are integers",
        "got 'logits' with model.add_tokens: a teacher knows nothing of the new tokens",
        "got 'zeroth_order', which knows the step of a grid",
    ):
        assert words in said, said
    assert Checkpoint.open(ran.root / "model").config.vocab_size == OLD

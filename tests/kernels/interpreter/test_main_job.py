"""The main job, recipe to exported model, on a Llama of one layer: once through the references, once through
the Triton kernels.

The two paths add in different orders, so trained scales may differ in their last bits. The integers that ship
may not.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from lowbit_kernels import dispatch
from safetensors.torch import load_file

from lowbit_ft import pipeline
from lowbit_ft.model import attention
from lowbit_ft.recipe.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "recipes" / "assets" / "tiny-llama"
QUICK = [
    "quant.group_size=32",
    "train.max_steps=2",
    "train.micro_batch_size=1",
    "train.gradient_accumulation_steps=1",
    "train.eval_every=null",
    "train.save_every=2",
    "data.train.limit=6",
    "data.valid=null",
    "data.sequence_len=40",
    "data.train_on=all",
    "eval.windows=1",
    "eval.window=40",
    "eval.kl=false",
    "eval.generate=[]",
    "export.format=native",
    "export.verify=false",
]
METHODS = {
    "lr_qat": ["adapter={method: lr_qat, rank: 4, alpha: 4}"],
    "alpha_tuning": ["adapter={method: alpha_tuning}", "quant={grid: binary, bits: 1, group_size: 32}"],
}
USED = {
    "lr_qat": {"quantize_pack", "grid_codes", "grid_gradients", "packed_matmul", "packed_matmul_dx"},
    "alpha_tuning": {"binary_matmul", "binary_matmul_dx", "binary_gradients"},
}


# The interpreter's time goes by programs, not by their size, so the job runs with tiles that hold a whole
# layer. Splits of all kinds are the other files' business.
ONE_TILE = {
    "packed_matmul": {"regime": "fused", "BLOCK_M": 64, "BLOCK_N": 128},
    "packed_matmul_dx": {"regime": "fused", "BLOCK_M": 64, "BLOCK_N": 128},
    "binary_matmul": {"regime": "fused", "BLOCK_M": 64, "BLOCK_N": 128},
    "grid_codes": {"BLOCK_N": 128},
    "grid_gradients": {"form": "chunked", "BLOCK_N": 128, "CHUNK_MB": 1},
    "quantize_pack": {"BLOCK_N": 128},
    "binary_gradients": {"form": "chunked", "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "CHUNK_MB": 1},
    "binary_dequantize": {"BLOCK_N": 128},
    "unpack": {"BLOCK_N": 128},
}


@pytest.fixture(autouse=True)
def one_tile(own_table, monkeypatch, tmp_path):
    """A user's table of ONE_TILE."""
    path = tmp_path / "configs.json"
    entries = {
        op: [
            {
                "arch": dispatch.INTERPRETER,
                "m": [1, 1 << 20],
                "n": [1, 1 << 20],
                "k": [1, 1 << 20],
                "config": c | {"num_warps": 1, "num_stages": 1},
            }
        ]
        for op, c in ONE_TILE.items()
    }
    path.write_text(json.dumps(entries))
    monkeypatch.setenv("LOWBIT_KERNELS_CACHE", str(path))
    dispatch.reload()
    yield
    dispatch.reload()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer with the tokenizer of the tiny one."""
    folder = tmp_path_factory.mktemp("model") / "one-layer"
    shutil.copytree(
        TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*.index.json")
    )
    small = json.loads((TINY / "config.json").read_text())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=small["vocab_size"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=small.get("bos_token_id"),
        eos_token_id=small.get("eos_token_id"),
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch):
    """A switch that puts the Triton kernels behind every op for CPU tensors; off again after the test. Counts
    the launches.
    """
    launches: Counter[str] = Counter()
    found = dispatch.launcher

    def counted(op: str):
        kernel = found(op)

        def run(*args, **kwargs):
            launches[op] += 1
            return kernel(*args, **kwargs)

        return run

    def switch() -> Counter[str]:
        monkeypatch.setattr(dispatch, "launcher", counted)
        dispatch.register("cpu")
        return launches

    yield switch
    for op in dispatch.KERNELS:
        definition = dispatch.definition(op)
        definition.register_kernel("cpu")(definition._init_fn)


@pytest.mark.parametrize("method", METHODS)
def test_same_integers(method, model, tmp_path, monkeypatch, through_triton, capsys):
    monkeypatch.chdir(ROOT)
    # That a Llama attends by segments is not asked here: three forwards each time, 40 % of the launches.
    monkeypatch.setattr(attention, "_differs", lambda *_: "")

    def job(name: str) -> dict[str, torch.Tensor]:
        made = load_recipe(
            "recipes/quickstart.yaml",
            [*QUICK, f"output={tmp_path / name}", f"model.path={model}", *METHODS[method]],
        )
        folder = pipeline.run(made)
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors |= load_file(file)
        return tensors

    reference = job("reference")
    launches = through_triton()
    kernels = job("triton")
    assert USED[method] <= set(launches), (
        f"these ops never reached their kernels: {USED[method] - set(launches)}"
    )
    assert reference.keys() == kernels.keys()
    codes = [name for name in reference if name.endswith((".codes", ".planes"))]
    assert len(codes) == 7
    for name in codes:
        assert torch.equal(reference[name], kernels[name]), name
    for name in reference.keys() - set(codes):
        torch.testing.assert_close(kernels[name].float(), reference[name].float(), rtol=1e-2, atol=1e-4)
    moved = json.loads((tmp_path / "triton" / "moved.json").read_text())
    assert moved["scale_change"] > 0, "nothing was trained"

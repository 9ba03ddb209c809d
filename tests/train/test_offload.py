"""Layer inputs that wait elsewhere: the same bits come back, slots are used again, and nothing is left
behind.
"""

from __future__ import annotations

import errno
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.recipe.yaml import RecipeError
from lowbit_ft.train import offload as module
from lowbit_ft.train.loop import train
from lowbit_ft.train.offload import FileStore, MemoryStore, Offload, PinnedStore, open_store
from tests.forks import run
from tests.toy import batches, equal, quiet, section, state

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LAYERS, STEPS = 3, 3


def model_of() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        attention_dropout=0.2,
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    return model


def go(run_dir: Path, **changes: Any) -> dict[str, torch.Tensor]:
    model, setting = model_of(), section(max_steps=STEPS, gradient_checkpointing=True, **changes)
    train(model, batches(), batches(seed=1), setting, run_dir, console=quiet())
    return state(model)


@pytest.mark.parametrize("mode", ["no", "bf16"])
def test_offload_changes_no_bit_and_moves_the_layer_inputs(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[int, ...]] = []
    pack = Offload.pack
    monkeypatch.setattr(Offload, "pack", lambda self, x: moved.append(tuple(x.shape)) or pack(self, x))
    want = go(tmp_path / "no", mixed_precision=mode)
    assert not moved
    for where in ("cpu", "disk"):
        assert equal(go(tmp_path / where, offload=where, mixed_precision=mode), want)
        log = [(tmp_path / w / "metrics.jsonl").read_text().splitlines() for w in ("no", where)]
        losses = [[line.split('"lr"')[0] for line in lines] for lines in log]
        assert losses[0] == losses[1] and len(losses[0]) > STEPS
        layers = [shape for shape in moved if len(shape) == 3]
        # steps x 2 micro-batches x layers, each its input alone: nothing from inside a layer
        assert len(layers) == STEPS * 2 * LAYERS and {shape[-1] for shape in layers} == {16}
        assert all(len(shape) == 3 or not torch.Size(shape).numel() for shape in moved), moved
        assert not [p for p in (tmp_path / where).iterdir() if p.name not in ("metrics.jsonl", "checkpoints")]
        moved.clear()


def graph(
    offload: Offload, layers: int = 4, width: int = 8
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(start, end, inputs) of a few checkpointed products."""
    x = start = torch.randn(3, width, requires_grad=True)
    inputs = []
    for i in range(layers):
        inputs.append(x.detach().clone())
        run = offload.wrap(lambda f, y: torch.utils.checkpoint.checkpoint(f, y, use_reentrant=False))
        x = run(lambda y, i=i: torch.sin(y * (i + 1)), x)
    return start, x, inputs


def test_slots_are_used_again_and_a_graph_may_be_kept(tmp_path: Path) -> None:
    store = open_store("disk", CPU, tmp_path)
    assert isinstance(store, FileStore) and isinstance(open_store("cpu", CPU, tmp_path), MemoryStore)
    offload, size = Offload(store), 3 * 8 * 4
    for _ in range(5):
        start, end, _ = graph(offload)
        once = torch.autograd.grad(end.sum(), start, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(end.sum(), start)[0], once)
        assert store.size == 4 * size
        del end
    graph(offload)  # never used in a backward
    graph(offload)
    assert store.size == 4 * size and os.fstat(store.file.fileno()).st_size == 4 * size
    assert list(tmp_path.iterdir()) == []  # the file has no name
    held = [offload.pack(torch.full((5,), float(i), dtype=torch.bfloat16)) for i in range(3)]
    assert [offload.unpack(h).tolist() for h in held] == [[float(i)] * 5 for i in range(3)]
    store.close()


class Ahead(MemoryStore):
    """Notes what is asked for and what is waited for."""

    ahead = True

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.count = 0

    def put(self, x: torch.Tensor) -> Any:
        self.count += 1
        self.log.append(("put", self.count - 1))
        return self.count - 1, x.clone()

    def get(self, slot: Any, shape: Any, dtype: Any) -> Any:
        self.log.append(("get", slot[0]))
        return slot

    def wait(self, got: Any) -> torch.Tensor:
        self.log.append(("wait", got[0]))
        return got[1]

    def release(self, slot: Any) -> None:
        self.log.append(("release", slot[0]))


def test_the_backward_asks_one_layer_ahead() -> None:
    store = Ahead()
    start, end, inputs = graph(Offload(store))
    assert store.log == [("put", i) for i in range(4)]
    store.log.clear()
    end.sum().backward()
    asked = [entry for entry in store.log if entry[0] != "release"]
    # its own, then the one before it, of which the next backward finds the copy under way
    assert asked == [
        ("get", 3),
        ("wait", 3),
        ("get", 2),
        ("wait", 2),
        ("get", 1),
        ("wait", 1),
        ("get", 0),
        ("wait", 0),
    ]
    del end
    assert sorted(n for what, n in store.log if what == "release") == [0, 1, 2, 3]
    want = inputs[0].requires_grad_()
    x = want
    for i in range(4):
        x = torch.sin(x * (i + 1))
    x.sum().backward()
    assert torch.equal(start.grad, want.grad)


class OnGpu(torch.Tensor):
    """Notes the streams its memory is used on."""

    log: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.log.append(("recorded", stream.name))

    def copy_(self, source: Any, non_blocking: bool = False) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.log.append(("copy", Stream.current.name, non_blocking))
        return super().copy_(source)


class Stream:
    current: Any = None

    def __init__(self, name: str = "copies") -> None:
        self.name = name

    def wait_stream(self, other: Any) -> None:
        OnGpu.log.append((f"{self.name} waits for", other.name))

    def wait_event(self, event: Any) -> None:
        OnGpu.log.append((f"{self.name} waits for", event))

    def record_event(self) -> str:
        OnGpu.log.append(("event",))
        return "event"


def test_pinned_buffers_wait_for_what_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls and their order; no stream runs here."""
    compute = Stream("compute")
    monkeypatch.setattr(Stream, "current", compute)

    @contextmanager
    def inside(stream: Any) -> Any:
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    made: list[bool] = []

    def empty(*size: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> Any:
        made.append(pin_memory)
        return torch.empty(*size, **options).as_subclass(OnGpu)

    cuda = SimpleNamespace(
        Stream=lambda device: Stream(),
        current_stream=lambda device: Stream.current,
        stream=inside,
        Event=object,
    )
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8))
    OnGpu.log.clear()
    store = PinnedStore(torch.device("cuda"))
    x = torch.randn(2, 3).as_subclass(OnGpu)
    slot = store.put(x)
    assert OnGpu.log == [
        ("copies waits for", "compute"),
        ("copy", "copies", True),
        ("recorded", "copies"),
    ] and made == [True]
    OnGpu.log.clear()
    got = store.get(slot, x.shape, x.dtype)
    assert OnGpu.log == [("copy", "copies", True), ("event",)]
    OnGpu.log.clear()
    assert torch.equal(store.wait(got), x) and OnGpu.log == [
        ("compute waits for", "event"),
        ("recorded", "compute"),
    ]
    store.release(slot)
    assert store.put(x) is slot and made == [
        True,
        False,
    ]  # the second was what came back; no other buffer was pinned
    assert store.put(x.repeat(2, 1)).nbytes == 48 and made == [True, False, True]


def test_a_full_disk_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        ValueError,
        match=r"could not write .* \(No space left on device\); free space there, .* or "
        r"set train.offload: cpu",
    ):
        go(tmp_path, offload="disk")


def test_a_killed_run_leaves_no_file(tmp_path: Path) -> None:
    """SIGKILL in the middle of a backward, while the file holds the inputs of every layer."""
    script = (
        "import os, signal, sys; from pathlib import Path; "
        "from lowbit_ft.train.offload import FileStore; from tests.train.test_offload import go\n"
        "take = FileStore.get\n"
        "def get(self, *a):\n"
        "    held = os.fstat(self.file.fileno()).st_size\n"
        "    print(held, len(list(self.folder.iterdir())), flush=True); os.kill(os.getpid(), "
        "signal.SIGKILL)\n"
        "FileStore.get = get; go(Path(sys.argv[1]), offload='disk')\n"
    )
    ran = run(["-c", script, tmp_path])
    assert ran.returncode == -signal.SIGKILL, ran.stderr[-2000:]
    held, names = map(int, ran.stdout.split())
    assert held >= LAYERS * 16 * 4 * 6 and names == 1  # metrics.jsonl
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_offload_needs_checkpointing_and_a_disk_that_is_large_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing: true"):
        section(offload="disk")
    assert section(offload=False).offload == "no"
    quick = [
        str(ROOT / "recipes" / "quickstart.yaml"),
        ["train.gradient_checkpointing=true", "train.offload=disk", f"output={tmp_path / 'a' / 'b'}"],
    ]
    assert load_recipe(*quick).train.offload == "disk"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        RecipeError,
        match=r"train.offload: got 'disk', .* needs 0\.\d+ GB .* has 0.001 GB free.* set train.offload: cpu",
    ):
        load_recipe(*quick)

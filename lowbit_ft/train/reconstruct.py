"""train.reconstruct: adapters fitted decoder layer by decoder layer to what the dense layer gives there.

For decoder layer l, F the dense layer, F^ the packed one with its adapters, x the dense model's hidden states
before l and x^ those that the packed model itself has there (its earlier layers are fitted already):

    loss = sum |F^(u) - F(x)|^2  /  sum |F(x) - x|^2          both sums over all calibration tokens and widths

    u = x^                        inputs: quantized    what inference sees; earlier errors are made good too
    u = x                         inputs: dense        every layer by itself
    u = x^ or x, one by one       inputs: mixed        a fair coin for each number, thrown anew in each step
                                                       (QDrop, arXiv 2203.05740, section 4.3)

The unit is the square of what the dense layer adds to the stream: 0.01 is an error of a tenth of it, 1 is
that of leaving the layer out. What trains is all that the method trains of packed weights (A, B, scales, zero
points, offsets, plane scales), through the same forward as in training, so the merge stays exact. Adam, two
rates, both falling linearly to zero; windows in an order drawn from the seed and the layer's number. The loss
over all windows is measured before, on the way and at the end, and the best of these states is kept: it never
ends above its start (grid/calibrate/descent.py). (mixed is measured on x^.)

Memory beside the packed model: one dense layer while its outputs are made, which is then dropped; gradients
and Adam's averages of one packed layer; activations of one micro-batch. Hidden states wait on the CPU.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import is_scale
from ..adapters.attach import adapted_layers, adapter_state, load_adapter_state
from ..grid.calibrate.descent import checked, descend
from ..model.checkpoint import Checkpoint
from ..model.linear import packed_op_only
from ..model.walk import Batch, LayerWalk, decoder_layers, entering
from ..model.whole import is_whole

BETAS = (0.9, 0.99)  # of Adam: a layer has few steps, and its gradients are alike
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fit:
    """One decoder layer: the loss before and after, the step whose state was kept (0: the start's), seconds.
    trained: numbers that were fitted; 0 where no layer in it has an adapter (then nothing was done).
    """

    layer: str
    before: float
    after: float
    step: int
    trained: int
    seconds: float


@dataclass
class LayerText:
    """What a packed layer is fitted on, [batch] -> [B, L, H] each, on the CPU. call(number, inputs) gives the
    packed layer's output on the device; unit: mean square of what the dense layer adds.
    """

    targets: list[Tensor]
    quantized: list[Tensor] | None
    dense: list[Tensor] | None
    call: Callable[[int, Tensor], Tensor]
    unit: float

    def inputs(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """Of one batch: what the loss is measured on, or with a generator what a step is trained on."""
        if self.quantized is None:
            assert self.dense is not None
            return self.dense[number]
        x = self.quantized[number]
        if self.dense is None or generator is None:
            return x
        return torch.where(torch.rand(x.shape, generator=generator) < 0.5, x, self.dense[number])

    @property
    def batches(self) -> int:
        return len(self.targets)

    def loss(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """Of one batch, fp32, differentiable."""
        out = self.call(number, self.inputs(number, generator))
        target = self.targets[number].to(out.device)
        return (out.float() - target.float()).square().mean() / self.unit

    @torch.no_grad()
    def whole(self) -> float:
        """Over the windows that a check looks at."""
        numbers = checked(self.batches)
        total = sum(float(self.loss(n)) * self.targets[n].numel() for n in numbers)
        return total / sum(self.targets[n].numel() for n in numbers)


def fit(
    trained: dict[str, nn.Parameter], text: LayerText, section: Any, seed: int
) -> tuple[float, float, int]:
    """Train `trained` in place by a ReconstructSection; the loss before, after, and the step that was
    kept.
    """
    rates = {True: section.scale_learning_rate or section.learning_rate, False: section.learning_rate}
    groups = [
        {"params": parameters, "lr": rate, "peak": rate}
        for scale, rate in rates.items()
        if (parameters := [p for name, p in trained.items() if is_scale(name) == scale])
    ]
    optimizer = torch.optim.Adam(groups, betas=BETAS)

    def step(share: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
        optimizer.zero_grad()

    return descend(trained, text, section.steps, seed, step, "train.reconstruct")


def reconstruct(
    model: Any,
    checkpoint: Checkpoint,
    batches: list[Batch],
    section: Any,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    done: Sequence[dict[str, Tensor]] = (),
) -> Iterator[tuple[Fit, dict[str, Tensor]]]:
    """Fit the adapters of every decoder layer of the packed `model`, in place; (what came of it, the layer's
    adapter state by PEFT key) one after the other, while the next layer waits.

    batches: input_ids and friends, each a micro-batch. done: states of the first layers, from before: they
    are put back and only computed through. The same arguments give the same bits, done or not.
    """
    name, layers = decoder_layers(model)
    for layer, state in zip(layers, done, strict=False):
        load_adapter_state(layer, state)
    if len(done) >= len(layers):
        return
    walk = LayerWalk(checkpoint.empty_model(attention), checkpoint, batches, device, dtype, logits=False)
    walk.forget_rest()
    quantized = None if section.inputs == "dense" else entering(model, layers[0], walk.batches)
    with packed_op_only(model):
        for index, dense_name, _ in walk:
            assert dense_name == f"{name}.{index}", f"{dense_name} is not {name}.{index}"
            began, layer = time.perf_counter(), layers[index]
            targets, unit = _dense_outputs(walk, index)
            walk.drop(index)
            dense = None if section.inputs == "quantized" else walk.hidden
            walk.hidden = targets
            with on_device(layer, device):
                text = LayerText(
                    targets,
                    quantized,
                    dense,
                    lambda number, x, _i=index, _l=layer: walk.call(_i, number, x, _l),
                    unit,
                )
                if index >= len(done):
                    yield _fitted(layer, dense_name, text, section, seed + index, began)
                if quantized is not None:
                    with torch.no_grad():
                        for number, x in enumerate(quantized):
                            quantized[number] = text.call(number, x).to(CPU)


def _fitted(
    layer: nn.Module, name: str, text: LayerText, section: Any, seed: int, began: float
) -> tuple[Fit, dict[str, Tensor]]:
    trained = {key: p for key, p in layer.named_parameters() if p.requires_grad and not is_whole(key)}
    before, after, step = fit(trained, text, section, seed) if trained else (0.0, 0.0, 0)
    count = sum(p.numel() for p in trained.values())
    state = {key: tensor.to("cpu", copy=True) for key, tensor in adapter_state(layer).items()}
    return Fit(name, before, after, step, count, time.perf_counter() - began), state


def _dense_outputs(walk: LayerWalk, index: int) -> tuple[list[Tensor], float]:
    """What the dense layer makes of the dense hidden states, on the CPU, and the mean square of what it
    adds.
    """
    outputs: list[Tensor] = []
    added = torch.zeros((), dtype=torch.float64)

    def keep(number: int, out: Tensor) -> None:
        outputs.append(out.to(CPU))
        added.add_((out.float() - walk.hidden[number].to(out.device).float()).square().sum().double().to(CPU))

    walk.run(index, keep)
    return outputs, max(float(added) / sum(out.numel() for out in outputs), 1e-30)


@contextmanager
def on_device(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a layer of a model that waits elsewhere (on the CPU, to be cut over processes) is on `device`;
    after it what trains has moved back, and the packed tensors are the ones from before: perhaps pages of a
    file.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    home = next((t.device for t in tensors if t.device.type != device.type), None)
    if home is None:
        yield
        return
    buffers = {module: dict(module._buffers) for module in layer.modules()}
    frozen = {p: p.data for p in layer.parameters() if not p.requires_grad}
    layer.to(device)
    try:
        yield
    finally:
        layer.to(home)
        for module, held in buffers.items():
            module._buffers.update(held)
        for parameter, data in frozen.items():
            parameter.data = data


def has_adapters(model: Any) -> bool:
    """Whether any decoder layer of the model has an adapter to fit."""
    return any(True for layer in decoder_layers(model)[1] for _ in adapted_layers(layer))

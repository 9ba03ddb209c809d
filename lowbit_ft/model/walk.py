"""LayerWalk: run text through a full-precision model one decoder layer at a time.

The dense model is never whole in memory: a layer is read from the checkpoint, all the batches pass through
it, and it is dropped. Its users: the calibrators that look at text (which pack the layer before going on),
evaluation (which wants the full-precision logits as the reference) and train.reconstruct (which wants what
every dense layer makes of its input).

How: the decoder layers are stood in for by stubs that record the arguments the model gives each of them
(attention masks and rotary positions differ by layer in some models) and pass the hidden states on. Then
layer i is called with its own recorded arguments. `logits` runs the model once more with stubs, the last of
which hands over the final hidden states, so whatever the model does after its layers (norm, head, soft caps)
is its own code.

On the device are one layer, the text of one batch, and what the model has beside its layers. Between layers
the hidden states of all batches wait in CPU memory, samples x length x width in the model's dtype, and so do
the recorded arguments (`held_bytes` counts both; quantize/memory.py says beforehand).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .load import materialize

Batch = dict[str, Any]  # tensors, and what segment_inputs adds


def text_tower(model: Any) -> str:
    """The prefix of the names of everything in the decoder that reads text ("" when that is the whole model):
    a multimodal model has other towers beside it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if getattr(model, "main_input_name", "") == "pixel_values" and not model.can_generate():
        decoder = model.base_model  # a detector's decoder is one part of the network that reads the image
    if isinstance(decoder, nn.Linear):  # what some encoders call the last matrix of their masked LM
        decoder = model.base_model
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList that holds the decoder layers: the longest one of the text tower that is not inside
    another, and its name.
    """
    text = text_tower(model)
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) > 0 and name.startswith(text)
    ]
    outer = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other, _ in lists)]
    if not outer:
        raise ValueError(
            f"{type(model).__name__}: no list of decoder layers found; this model cannot be "
            "walked layer by layer"
        )
    return max(outer, key=lambda item: len(item[1]))


def kind_of(layer: nn.Module) -> list[Any]:
    """What makes two decoder layers alike: classes, shapes, and plain settings of every module, but not its
    number.
    """
    found: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            k: v
            for k, v in vars(module).items()
            if isinstance(v, str | int | float | bool | type(None))
            and k not in ("layer_idx", "training", "layer_id", "layer_number")
        }
        shapes = [(n, tuple(t.shape), str(t.dtype)) for n, t in module.named_parameters(recurse=False)]
        found.append((name, type(module).__name__, sorted(plain.items(), key=str), shapes))
    return found


class LayerWalk:
    """model: from Checkpoint.empty_model, everything on meta. batches: dicts of input_ids [B, L] and friends.
    logits: whether `logits` will be asked for; without them an output head that is not tied stays unread."""

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        batches: list[Batch],
        device: torch.device,
        dtype: torch.dtype,
        logits: bool = True,
    ):
        self.model, self.checkpoint, self.device, self.dtype = model, checkpoint, device, dtype
        self.name, self.layers = decoder_layers(model)
        self.batches = [
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches
        ]
        inside = {id(p) for p in self.layers.parameters()}
        unread = None if logits else model.get_output_embeddings()
        for name, module in model.named_modules():
            if name == self.name or name.startswith(self.name + ".") or module is unread:
                continue
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and not any(id(p) in inside for p in own):
                _materialize_own(module, checkpoint, name, device, dtype)
        # Hidden states wait on the CPU: [batch] -> [B, L, H].
        self.hidden: list[Tensor] = []
        self.arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in self.layers]
        self._record()

    def __iter__(self) -> Iterator[tuple[int, str, nn.Module]]:
        """(index, name, layer) with the layer's weights read and its forward its own. Call `advance` before
        going on.
        """
        for index, layer in enumerate(self.layers):
            name = f"{self.name}.{index}"
            materialize(layer, self.checkpoint, name, self.device, self.dtype)
            layer.__dict__.pop("forward", None)  # the stub was an instance attribute over the class's own
            yield index, name, layer

    @torch.no_grad()
    def run(self, index: int, keep: Callable[[int, Tensor], None] | None = None) -> None:
        """Pass every batch through layer `index`; keep(batch, output) is called with each result."""
        for number in range(len(self.batches)):
            out = self.call(index, number, self.hidden[number])
            if keep is not None:
                keep(number, out)

    def call(
        self, index: int, number: int, hidden: Tensor, layer: Callable[..., Any] | None = None
    ) -> Tensor:
        """The output [B, L, H] of layer `index` (or of one that stands in for it) for these hidden states,
        with what the model gives it beside them for batch `number`.
        """
        args, kwargs = _moved(self.arguments[index][number], self.device, {})
        out = (layer or self.layers[index])(hidden.to(self.device), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, index: int) -> None:
        """The hidden states of every batch become the output of layer `index`."""

        def keep(number: int, out: Tensor) -> None:
            self.hidden[number] = out.cpu()

        self.run(index, keep)

    def drop(self, index: int) -> None:
        """Forget the weights of layer `index`, packed ones too: all it has goes back to the meta device."""
        self.layers[index].to("meta")

    def forget_rest(self) -> None:
        """Forget the weights of everything but the layers; `logits` cannot be asked for after it."""
        inside = set(self.layers.modules())
        for module in self.model.modules():
            if module not in inside:
                for key, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        module._parameters[key] = nn.Parameter(
                            torch.empty_like(parameter, device="meta"), requires_grad=False
                        )

    def held_bytes(self) -> int:
        """Bytes of the hidden states and recorded arguments of all batches that wait in CPU memory now."""
        found: dict[int, int] = {}

        def see(tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()

        _moved([self.hidden, self.arguments], torch.device("cpu"), {}, see)
        return sum(found.values())

    @torch.no_grad()
    def logits(self, number: int) -> Tensor:
        """The model's logits [B, L, V] for batch `number`, from the hidden states that left the last
        layer.
        """
        self.hand_over(number)
        return self.model(**self.batches[number], use_cache=False).logits

    def hand_over(self, number: int | None) -> None:
        """From here on a forward of `model` ends with the final hidden states of batch `number`; None: with
        what came in.
        """
        for layer in self.layers:
            layer.forward = lambda hidden, *args, **kwargs: self._like_layer(hidden)
        if number is not None:
            final = self.hidden[number].to(self.device)
            self.layers[-1].forward = lambda hidden, *args, **kwargs: self._like_layer(final)

    def _like_layer(self, hidden: Tensor) -> Any:
        return hidden if self.beside is None else (hidden, *self.beside)

    def _record(self) -> None:
        self.beside = self._beside()
        cpu, moved = torch.device("cpu"), {}  # what one batch gives to several layers is kept once
        for index, layer in enumerate(self.layers):

            def stub(hidden: Tensor, *args: Any, _index: int = index, **kwargs: Any) -> Any:
                if _index == 0:
                    self.hidden.append(hidden.cpu())
                self.arguments[_index].append(_moved((args, kwargs), cpu, moved))
                if _index == len(self.layers) - 1:
                    raise _Seen  # the head has nothing to say
                return self._like_layer(hidden)

            layer.forward = stub
        for batch in self.batches:
            moved.clear()
            try:
                self.model(**batch, use_cache=False)
            except _Seen:
                pass

    def _beside(self) -> tuple[None, ...] | None:
        """Some models' layers return a tuple, some a tensor: ask the first one, for real, on the first
        batch. What stands beside the hidden states in a tuple, as nothing; None: they return a tensor.
        """
        layer, seen = self.layers[0], []
        materialize(layer, self.checkpoint, f"{self.name}.0", self.device, self.dtype)

        def spy(*args: Any, **kwargs: Any) -> Any:
            out = real(*args, **kwargs)
            seen.append((None,) * (len(out) - 1) if isinstance(out, tuple) else None)
            raise _Seen

        real, layer.forward = layer.forward, spy
        try:
            self.model(**self.batches[0], use_cache=False)
        except _Seen:
            pass
        finally:
            layer.__dict__.pop("forward")
        return seen[0]


@torch.no_grad()
def entering(model: Any, first: nn.Module, batches: list[Batch]) -> list[Tensor]:
    """The hidden states that a model in memory gives its first decoder layer, [batch] -> [B, L, H] on the
    CPU. They are not the dense model's where its embedding is packed.
    """
    seen: list[Tensor] = []

    def spy(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].cpu())
        raise _Seen

    device = model.get_input_embeddings()
    device = next(t.device for t in [*device.parameters(), *device.buffers()])
    handle = first.register_forward_pre_hook(spy)
    try:
        for batch in batches:
            try:
                model(**_moved(dict(batch), device, {}), use_cache=False)
            except _Seen:
                pass
    finally:
        handle.remove()
    return seen


class _Seen(Exception):
    """Leaves the model's forward once enough is known."""


def _moved(
    value: Any, device: torch.device, memo: dict[int, Any], see: Callable[[Tensor], Any] | None = None
) -> Any:
    """The tensors in nested tuples, lists and dicts on `device`; one that occurs twice (memo) is moved once.
    see: called with each.
    """
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = (value, value.to(device))  # held, so that no other tensor comes by this id
        if see is not None:
            see(memo[id(value)][1])
        return memo[id(value)][1]
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device, memo, see) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device, memo, see) for key, item in value.items()}
    return value


def _materialize_own(
    module: nn.Module, checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype
) -> None:
    """materialize() for the parameters and buffers of this very module, not those of its children."""
    children, module._modules = module._modules, {}
    try:
        materialize(module, checkpoint, name, device, dtype)
    finally:
        module._modules = children

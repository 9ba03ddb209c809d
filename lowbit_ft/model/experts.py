"""Experts: the experts of one mixture layer as separate linears, so that each can be packed, adapted and
merged.

transformers keeps the experts of a layer as two 3-D parameters, gate_up_proj [E, 2 I, H] and down_proj [E, H,
I] (gpt-oss: the last two turned), and multiplies with slices of them. Here expert 3 is two linears,
`3.gate_up_proj` and `3.down_proj`. Everything else is the model's own: the activation and the gate (its
`_apply_gate`, which may interleave and clamp), the biases, which stay parameters of the layer ([E, N], not
packed), and what the router hands over.

The forward sorts the chosen (token, expert) pairs by expert, runs each expert once on its tokens, and adds
the k answers of a token in the order in which they were chosen: the order of additions of transformers' own
`grouped_mm`, so that a dense reader of the exported weights gives the same numbers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# What nn.Module keeps about itself; the rest of an experts module's attributes is what its gate looks at.
_BOOKKEEPING = frozenset(vars(nn.Module()))


class StandIn(nn.Linear):
    """A linear whose weight the dense model keeps in another form: read it with Checkpoint.matrix, not by the
    parameter's name.
    """


def is_experts(module: nn.Module) -> bool:
    """Experts as transformers' own expert functions understand them: they may run any that has these flags.
    Whatever else keeps 3-D parameters is none."""
    if isinstance(module, Experts) or not all(
        hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed")
    ):
        return False
    stacks = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    return stacks == set(projections(module))


def projections(experts: nn.Module) -> tuple[str, str]:
    """Names of the two 3-D parameters, in the order in which they are used."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


class Experts(nn.Module):
    """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]. Children `0`, `1`, ... hold the
    two linears of an expert.

    Made from the model's fused module, whose 3-D parameters it drops: the linears are StandIns on the meta
    device.
    """

    num_experts: int

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.first, self.second = projections(fused)
        for key, value in vars(fused).items():
            if key not in _BOOKKEEPING:
                setattr(self, key, value)
        for key, child in fused.named_children():  # the activation; a norm behind the experts
            self.add_module(key, child)
        for key, buffer in fused.named_buffers(recurse=False):
            self.register_buffer(key, buffer, persistent=key not in fused._non_persistent_buffers_set)
        for key, parameter in fused.named_parameters(recurse=False):
            if key not in (self.first, self.second):
                self.register_parameter(key, parameter)
        self._gate = type(fused)._apply_gate if fused.has_gate else None  # pyright: ignore[reportAttributeAccessIssue]
        for expert in range(self.num_experts):
            linears = {}
            for key in (self.first, self.second):
                parameter = fused.get_parameter(key)
                n, k = parameter.shape[1:] if not fused.is_transposed else parameter.shape[:0:-1]
                linears[key] = StandIn(k, n, bias=False, device="meta", dtype=parameter.dtype)
            self.add_module(str(expert), nn.ModuleDict(linears))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, chosen = top_k_index.shape
        expert, order = torch.sort(top_k_index.reshape(-1))
        counts = self.counts(expert)
        assert len(counts) == self.num_experts, "the router chose an expert that is not there"
        parts = hidden_states[order // chosen].split(counts)
        # In training every expert runs, on no token too: then every adapter has a gradient in every step,
        # which DDP waits for.
        everyone = self.training and torch.is_grad_enabled()
        outputs = torch.cat([self._run(e, x) for e, x in enumerate(parts) if len(x) or everyone])
        if getattr(self, "has_post_expert_norm", False):
            outputs = self.post_expert_norm(outputs)  # pyright: ignore[reportCallIssue]
        outputs = outputs * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return outputs[back].view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def counts(self, expert: Tensor) -> list[int]:
        """How many of the chosen pairs go to each expert."""
        return torch.bincount(expert, minlength=self.num_experts).tolist()

    def _run(self, expert: int, x: Tensor) -> Tensor:
        linears = self.get_submodule(str(expert))
        y = linears[self.first](x)  # pyright: ignore[reportIndexIssue]
        if self.has_bias:
            y = y + self.get_parameter(f"{self.first}_bias")[expert]
        y = self._gate(self, y) if self._gate is not None else self.act_fn(y)  # pyright: ignore[reportCallIssue]
        y = linears[self.second](y)  # pyright: ignore[reportIndexIssue]
        return y + self.get_parameter(f"{self.second}_bias")[expert] if self.has_bias else y


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """(name, module) of every Experts, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name, module

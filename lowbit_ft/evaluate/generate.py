"""generate: text from a model, one prompt at a time.

Greedy by default, whatever the folder's generation_config says: samples before and after training are then
comparable. One prompt at a time, because padding in a batch changes low bits of the logits and with them, now
and then, a greedy choice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.chat import ChatTemplate


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 48,
    tokenizer: Any = None,
    chat: bool | None = None,
    sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, without the prompt and without special tokens.

    chat: wrap each prompt as a user
    message in the tokenizer's chat template; None does so when there is one. sample: draw at `temperature`
    from `seed`. Raises ValueError for a missing tokenizer, template or prompt.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: got one string; give a list of prompts")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}; needs 1 or more")
    if sample and temperature <= 0:
        raise ValueError(
            f"temperature: got {temperature}; needs more than 0 (for greedy decoding leave sample off)"
        )
    if tokenizer is None:
        raise ValueError("tokenizer: a model was given without one; pass tokenizer=")
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not template:
        raise ValueError("chat: this tokenizer has no chat template; use chat=False")
    runner: Any = model
    where, training = next(runner.parameters()).device, runner.training
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
    # A sampling setting of generation_config.json would only cause a warning when greedy; pad is for models
    # without one.
    options |= {"temperature": temperature} if sample else {"temperature": None, "top_p": None, "top_k": None}
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        options["pad_token_id"] = tokenizer.eos_token_id
    texts = []
    runner.eval()
    try:
        for prompt in prompts:
            ids = encode_prompt(tokenizer, prompt, template if chat is None else chat).to(where)
            with torch.random.fork_rng(devices=[where] if where.type == "cuda" else [], enabled=sample):
                if sample:
                    torch.manual_seed(seed)
                output = runner.generate(ids, attention_mask=torch.ones_like(ids), **options)
            texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    finally:
        runner.train(training)
    return texts


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Token ids [1, L]. ValueError when the prompt gives no token."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = ChatTemplate(tokenizer).render(messages, prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError(f"prompts: {prompt!r} gives no token")
    return torch.tensor([ids], dtype=torch.int64)

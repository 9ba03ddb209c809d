"""The last step of recipes/assets/tiny-llama: trained on with chats, until its answers end by themselves.

    python benchmarks/continue_asset.py --model <folder to start from> --output <folder to write>

The model was made on plain files, in which the tokens of its chat template never stand: the rows of
<|im_start|>, <|im_end|> and <|pad|> were one vector, so no adapter behind the frozen head could end an
answer. It is trained on in float32 with chats cut from the same files (text/train.jsonl) along their syntax
trees:

    Finish this function.                    its def and first statements   -> the other statements
    Write the next line.                     a few lines of a function      -> the line that follows
    Write the first line of this function.   its body                       -> the def

None is the task of the quickstart, docstring summaries: a function loses its docstring, and docstrings/ is
not read. Only answers are learned, with the token that ends them. First the two rows alone, then every
weight, with windows of plain text that hold the model where it was. Printed before and after, of the weights
as written (bfloat16): the perplexity on text/valid.jsonl, and the share of chats cut from it that end.
"""

import argparse
import ast
import json
import math
import random
import shutil
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

ASSETS = Path(__file__).resolve().parents[1] / "recipes" / "assets"
WINDOW = 256
TURN_TOKENS = [1, 2, 3]  # <|pad|>, <|im_start|>, <|im_end|>
ROW_STEPS = 120
MATRIX_RATE, NORM_RATE, ROW_RATE = 1.5e-5, 3e-4, 5e-4
LONGEST_ANSWER = 64  # tokens: what a sample of the quickstart may show is 32
Chat = tuple[str, str]  # what the user writes, what the assistant answers
Tokens = tuple[list[int], int]  # of a chat, and where its answer begins


def read_files(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def functions(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """Every function of a file without its docstring: the lines of its def, the lines of each statement."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a few files hold other languages or broken code on purpose
        return []
    lines, found = text.splitlines(), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.body[0].lineno == node.lineno:
            continue
        whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        head = whole[: node.body[0].lineno - node.lineno]
        ends = [(statement.end_lineno or 0) - node.lineno + 1 for statement in node.body]
        parts = [whole[a:b] for a, b in pairwise([len(head), *ends])]  # a comment goes with what follows it
        parts = parts if ast.get_docstring(node, clean=False) is None else parts[1:]
        if head and parts and all(parts):
            found.append((head, parts))
    return found


def chats_of(files: list[str], seed: int) -> list[Chat]:
    """The chats of some files, up to three of each function, shuffled."""
    draw, chats = random.Random(seed), []
    for text in files:
        for head, parts in functions(text):
            body = "\n".join(line for part in parts for line in part)
            chats.append(("Write the first line of this function.\n" + body, head[0]))
            if len(parts) > 1:
                cut = draw.randrange(1, len(parts))
                given = [*head, *(line for part in parts[:cut] for line in part)]
                rest = textwrap.dedent("\n".join(line for part in parts[cut:] for line in part)).strip("\n")
                chats.append(("Finish this function.\n" + "\n".join(given), rest))
            lines = [line for part in parts for line in part if line.strip()]
            if len(lines) > 2:
                cut = draw.randrange(2, len(lines))
                given = textwrap.dedent("\n".join(lines[max(0, cut - 6) : cut]))
                chats.append(("Write the next line.\n" + given, lines[cut].strip()))
    draw.shuffle(chats)
    return [(asked, answer) for asked, answer in chats if answer.strip()]


def chat_tokens(tokenizer: Any, chats: list[Chat]) -> list[Tokens]:
    """(tokens, where the answer begins) of the chats that fit into a window."""
    kept = []
    for asked, answer in chats:
        user = [{"role": "user", "content": asked}]
        whole = [*user, {"role": "assistant", "content": answer}]
        prompt, ids = (
            tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks))[
                "input_ids"
            ]
            for turns, asks in ((user, True), (whole, False))
        )
        if len(ids) <= WINDOW and len(ids) - len(prompt) <= LONGEST_ANSWER and ids[: len(prompt)] == prompt:
            kept.append((ids, len(prompt)))
    return kept


def plain_windows(tokenizer: Any, files: list[str], ending: int) -> Tensor:
    """The files one behind the other, cut into windows [n, 256]."""
    ids = [i for text in files for i in (*tokenizer(text, verbose=False)["input_ids"], ending)]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    losses = [model(input_ids=w, labels=w, use_cache=False).loss.item() * len(w) for w in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


@torch.no_grad()
def share_that_ends(model: Any, chats: list[Tokens], ending: int) -> float:
    """Of the greedy answers to these chats, the share that ends within LONGEST_ANSWER tokens."""
    ended = 0
    for ids, start in chats:
        asked = torch.tensor([ids[:start]])
        answer = model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=LONGEST_ANSWER, do_sample=False
        )
        ended += int(answer[0, -1]) == ending
    return ended / len(chats)


class ChatBatches:
    """Batches of eight chats of about the same length (little padding), drawn from a seed."""

    def __init__(self, chats: list[Tokens], pad: int, seed: int):
        self.chats, self.pad, self.draw, self.ready = chats, pad, random.Random(seed), []

    def loss(self, model: Any) -> Tensor:
        """Mean cross-entropy of the answers of the next batch, with the tokens that end them."""
        if not self.ready:
            drawn = sorted(self.draw.sample(self.chats, 64), key=lambda chat: len(chat[0]))
            self.ready = [drawn[i : i + 8] for i in range(0, 64, 8)]
            self.draw.shuffle(self.ready)
        rows = self.ready.pop()
        longest = max(len(ids) for ids, _ in rows)
        inputs = torch.tensor([ids + [self.pad] * (longest - len(ids)) for ids, _ in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
        asked = torch.arange(longest) < torch.tensor([[start] for _, start in rows])
        labels = inputs.masked_fill((mask == 0) | asked, -100)
        return model(input_ids=inputs, attention_mask=mask, labels=labels, use_cache=False).loss


def text_loss(model: Any, teacher: Any, windows: Tensor) -> Tensor:
    """What holds the model where it was on plain text: the divergence from the model it was,
    cross-entropy, and no probability for the turn tokens, which never stand there."""
    scores = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    loss = F.nll_loss(scores, windows[:, 1:].flatten())
    with torch.no_grad():
        before = teacher(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    divergence = F.kl_div(scores, before, log_target=True, reduction="batchmean")
    turns = -torch.log1p(-scores[:, TURN_TOKENS].exp().sum(-1)).mean()
    return 2 * divergence + loss + 20 * turns


def train_rows(model: Any, chats: ChatBatches) -> None:
    """The embeddings of <|im_start|> and <|im_end|> alone, which begin as one vector."""
    embedding = model.model.embed_tokens.weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is embedding)
    chosen = torch.zeros(len(embedding), 1)
    chosen[TURN_TOKENS[1:]] = 1
    optimizer = torch.optim.Adam([embedding], lr=3e-3, betas=(0.9, 0.95))
    for step in range(ROW_STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / ROW_STEPS)
        chats.loss(model).backward()
        embedding.grad.mul_(chosen)
        optimizer.step()
        optimizer.zero_grad()
    embedding.data = embedding.data.to(torch.bfloat16).float()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def train_all(model: Any, teacher: Any, chats: ChatBatches, plain: Tensor, steps: int) -> None:
    """Every weight: a batch of chats and four windows of plain text a step. The matrices move little, because
    the noise of such small batches costs perplexity; norms and turn tokens move more."""
    embedding = model.model.embed_tokens.weight
    rows = torch.nn.Parameter(embedding.data[TURN_TOKENS[1:]].clone())  # their own rate, and moments
    groups = {
        MATRIX_RATE: [p for p in model.parameters() if p.dim() == 2],
        NORM_RATE: [p for p in model.parameters() if p.dim() == 1],
        ROW_RATE: [rows],
    }
    optimizer = torch.optim.AdamW(
        [{"params": params, "rate": rate} for rate, params in groups.items()],
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    order: list[int] = []
    began = time.monotonic()
    for step in range(1, steps + 1):
        if len(order) < 4:
            order = chats.draw.sample(range(len(plain)), len(plain))
        windows = plain[[order.pop() for _ in range(4)]]
        factor = min(1, step / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        loss = chats.loss(model)
        (0.5 * loss + text_loss(model, teacher, windows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rows.grad = embedding.grad[TURN_TOKENS[1:]].clone()
        optimizer.step()
        embedding.data[TURN_TOKENS[1:]] = rows.data
        optimizer.zero_grad()
        if step % 20 == 0:
            print(
                f"step {step}/{steps}  chats {loss.item():.3f}  {time.monotonic() - began:.0f} s", flush=True
            )


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-llama", help="where it starts")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    teacher: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).requires_grad_(
        False
    )
    ending = tokenizer.convert_tokens_to_ids("<|im_end|>")
    train_files, valid_files = (read_files(ASSETS / "text" / f"{name}.jsonl") for name in ("train", "valid"))
    plain, held_out = (
        plain_windows(tokenizer, files, tokenizer.eos_token_id) for files in (train_files, valid_files)
    )
    chats = chat_tokens(tokenizer, chats_of(train_files, options.seed))
    asked = chat_tokens(tokenizer, chats_of(valid_files, options.seed))[:64]
    print(f"{len(chats)} chats of {sum(len(ids) for ids, _ in chats)} tokens, {len(plain)} plain windows")

    def measure(when: str) -> None:
        print(
            f"{when}: perplexity {perplexity(model, held_out):.4f} on {len(held_out)} windows, "
            f"{share_that_ends(model, asked, ending):.0%} of {len(asked)} held-out chats end",
            flush=True,
        )

    measure("before")
    train_rows(model, ChatBatches(chats, model.config.pad_token_id, options.seed))
    drawn = ChatBatches(chats, model.config.pad_token_id, options.seed)
    train_all(model, teacher, drawn, plain, options.steps)
    kept = load_file(options.model / "model.safetensors")
    trained = model.state_dict()
    written = {name: trained[name].to(old.dtype).contiguous() for name, old in kept.items()}
    model.load_state_dict({n: t.float() for n, t in written.items()}, strict=False)
    measure("after")
    options.output.mkdir(parents=True, exist_ok=True)
    for file in options.model.iterdir():
        if file.name != "model.safetensors":
            shutil.copyfile(file, options.output / file.name)
    save_file(written, options.output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()

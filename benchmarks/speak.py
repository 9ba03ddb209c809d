"""A language model that speaks: what it learns of 900 sentences, with a row for each code or rows of bits.

    python -m benchmarks.speech_codec speech DIR --voice en-us      one voice: what is said decides the codes
    lowbit-ft encode recipes/assets/speech-codec DIR/train.jsonl DIR/speak-train.jsonl         and valid
    python -m benchmarks.speak train DIR OUT [--cases factorised]   the recipe quickstart-speak on these rows
    python -m benchmarks.speak measure DIR OUT [--picture PNG]      results/speak.json

The loss of codes is that of code tokens alone, on held-out sentences; a uniform choice of codes has 14 ln 2 =
9.704. Sound that is spoken is compared with what the codec makes of the true codes, the mean of four draws of
noise each, frame by frame of the shorter one; so is sound of another sentence's codes, and of the same codes
with other noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speech_codec import codec, draw, rows_of
from lowbit_ft import pipeline
from lowbit_ft.evaluate.speak import Drawing, speak
from lowbit_ft.export.reader import load_exported
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.tokenizer import read_tokenizer
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.speech.sample import Spoken, decode, encode
from lowbit_ft.speech.tokens import audio_tokens_of, row_of
from lowbit_ft.tasks.speech_tokens import Frames, SpeechTokens

CODEC = Path("recipes/assets/speech-codec")
CASES = {
    "each": ["model.add_tokens.audio.rows=each"],
    "factorised": ["model.add_tokens.audio.rows=factorised"],
}
SPOKEN, NOISES = 12, 4  # held-out sentences that are spoken, draws of noise each


def train(folder: Path, out: Path, names: Sequence[str], overrides: Sequence[str]) -> None:
    for name in names:
        given = [
            f"data.train.path={folder / 'speak-train.jsonl'}",
            f"data.valid.path={folder / 'speak-valid.jsonl'}",
            "export.format=native",
            "export.verify=false",
            f"output={out / name}",
        ]
        pipeline.run(load_recipe("recipes/quickstart-speak.yaml", [*given, *overrides, *CASES[name]]))


@torch.no_grad()
def code_loss(model: Any, tokenizer: Any, rows: Sequence[tuple[str, list[int]]]) -> dict[str, float]:
    """Of the codes of these sentences: mean -log p, how often the likeliest one is true, and its bits."""
    audio = audio_tokens_of(tokenizer)
    assert audio is not None
    known = {token: code for code, token in enumerate(audio.codes)}
    total = count = right = bits = 0.0
    for text, codes in rows:
        messages = row_of(text, codes, plain=False)["messages"]
        written = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = torch.tensor(tokenizer(written, add_special_tokens=False)["input_ids"])
        log_p = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        at = [i for i, token in enumerate(ids[1:].tolist()) if token in known]
        wanted = ids[1:][at]
        total -= float(log_p[at].gather(1, wanted[:, None]).sum())
        likeliest = log_p[at][:, list(audio.codes)].argmax(-1)
        true = torch.tensor([known[token] for token in wanted.tolist()])
        right += float((likeliest == true).sum())
        bits += sum(14 - int(x).bit_count() for x in likeliest ^ true)
        count += len(at)
    shares = {"loss": total / count, "right": right / count, "bits": bits / count / 14}
    return {name: round(value, 4) for name, value in shares.items()}


@torch.no_grad()
def measure(folder: Path, out: Path, names: Sequence[str], result: Path, picture: Path | None) -> None:
    """Adds to what `result` has of other cases."""
    maker = codec(CODEC).eval()
    task = SpeechTokens(frames=Frames(**{key: getattr(maker.config, key) for key in Frames.model_fields}))
    parts: dict[str, list[Any]] = {}
    for part in ("train", "valid"):
        texts = [json.loads(line)["text"] for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        rows = rows_of(folder, part, task, read_tokenizer(CODEC))
        codes = [encode(maker, row["mel"]) for row in rows[:100]]
        parts[part] = list(zip(texts, codes, [row["input_ids"] for row in rows], strict=False))
    sound = rows[0]["mel"]  # of the first held-out sentence
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    found |= {"held_out_sentences": len(parts["valid"]), "uniform": round(14 * 0.693147, 4)}
    found["codes"] = {part: sum(len(c) for _, c, _ in rows) for part, rows in parts.items()}
    few = parts["valid"][:SPOKEN]
    own = [Spoken(c, ids) for _, c, ids in few]
    true = heard(maker, own)
    other = heard(maker, [Spoken(few[i - 1][1], ids) for i, (_, _, ids) in enumerate(few)])
    found["mel_error_to_codec"] = {
        "other noise": apart(heard(maker, own, first=NOISES), true, maker.config.mel_std),
        "codes of another sentence": apart(other, true, maker.config.mel_std),
    }
    for name in names:
        entry: dict[str, Any] = {}
        shown = {"its own codes": decode(maker, own[:1])[0]}
        for stage in ("base", "merged"):  # base: packed, before training
            model, tokenizer = load_exported(out / name / stage).eval(), read_tokenizer(out / name / stage)
            for part, rows in parts.items():
                entry[f"{stage}, {part}"] = code_loss(model, tokenizer, [(t, c.tolist()) for t, c, _ in rows])
        audio = audio_tokens_of(tokenizer)
        assert audio is not None
        how = {"likeliest": Drawing(least=4, temperature=0.0), "drawn": Drawing(least=4)}
        for word, drawing in how.items():
            said = [torch.tensor(speak(model, tokenizer, audio, t, drawing)) for t, _, _ in few]
            rows = [Spoken(c, ids) for c, (_, _, ids) in zip(said, few, strict=True)]
            shown[f"codes that the model says, {word}"] = decode(maker, rows[:1])[0]
            entry[f"mel error, {word}"] = apart(heard(maker, rows), true, maker.config.mel_std)
            entry[f"codes said, {word}"] = [len(c) for c in said]
        found[name] = entry
        found["codes there"] = [len(c) for _, c, _ in few]
        write_text(result, json.dumps(found, indent=2) + "\n")
        if picture is not None:
            draw(maker, sound, shown, picture)
    print(json.dumps(found, indent=2))


def heard(maker: Any, rows: list[Spoken], first: int = 0) -> list[Tensor]:
    """The mean log-mel of each over NOISES draws of noise."""
    draws = [decode(maker, rows, seed=first + seed) for seed in range(NOISES)]
    return [torch.stack(list(one)).mean(0) for one in zip(*draws, strict=True)]


def apart(some: list[Tensor], others: list[Tensor], scale: float) -> float:
    """Mean |difference| of log-mels, over the frames that both have."""
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in zip(some, others, strict=True)]
    return round(float(torch.cat([(a - b).abs() for a, b in pairs]).mean()) * scale, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["train", "measure"])
    parser.add_argument("folder", type=Path, help="of the speech")
    parser.add_argument("out", type=Path, help="of the runs")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--set", nargs="*", default=[], help="keys of the recipe")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/speak.json"))
    parser.add_argument("--picture", type=Path)
    a = parser.parse_args()
    if a.command == "train":
        train(a.folder, a.out, a.cases, a.set)
    else:
        measure(a.folder, a.out, a.cases, a.result, a.picture)


if __name__ == "__main__":
    main()

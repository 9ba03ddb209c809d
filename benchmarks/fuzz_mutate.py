"""What fuzz.py does to a file: bytes cut and flipped, JSON and YAML values exchanged for those of another
kind.

A mutation changes one file, is chosen by a seeded `random.Random`, and says in words what it did.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

DEEP = 100_000
HUGE = "9" * 5000
# Values that some writer, or somebody who means harm, puts where another is expected.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 5, 7, 4.0, 0.5, -1.5, 1e9, 10**12, 10**11, 10**7, 2**63, 1e300,
    float("nan"), float("inf"), "", "x", "1", "null", "org/kernel", "a\x00b", "ä\ud800", "/dev/zero", "../up",
    [], {}, [1], [None], ["x", 1], [[1]], {"x": 1}, {"": None}, [0, 1, 2, 3, 4] * 5, "x" * 3000,
    "re:(.*)*(.*)*X", "(?R)*", "(?:a{60000}){60000}", "zzz", "float8", "load", "eager", "auto",
)  # fmt: skip
KEYS = (
    "auto_map", "_attn_implementation", "attn_implementation", "num_hidden_layers", "head_dim",
    "rope_scaling",
    "rope_parameters", "layer_types", "quantization_config", "text_config", "dtype", "torch_dtype", "x",
    "transformers_weights", "eos_token_id", "chat_template", "stage", "rows", "step", "model_type", "bits",
    "use_cache", "output_attentions", "return_dict", "id2label", "num_labels", "tie_word_embeddings",
    "sliding_window", "sym", "dynamic", "targets", "ignore", "format", "__class__", "extra_special_tokens",
)  # fmt: skip
ADDED: dict[str, Any] = {
    "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    "rope_parameters": {"rope_type": "zzz"},
    "rope_scaling": {"rope_type": "yarn", "factor": 0},
    "layer_types": ["full_attention"],
    "_attn_implementation": "org/kernel",
    "transformers_weights": "../other.safetensors",
}
TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{{ messages[0].nothing.more }}",
    "{% if %}",
    "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "",
    "{{ messages }}",
    "{% generation %}x{% endgeneration %}",
    "{{ ''.__class__.__mro__ }}",
)


def value(rng: random.Random) -> Any:
    return rng.choice(VALUES)


def mutate_tree(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """One place of a JSON or YAML value changed: exchanged, removed, wrapped, added to."""
    places = list(_places(tree, ()))
    if not places or rng.random() < 0.04:
        new = value(rng)
        return new, f"all = {_short(new)}"
    path = rng.choice(places)
    tree = json.loads(json.dumps(tree))  # its own copy
    holder = tree
    for part in path[:-1]:
        holder = holder[part]
    last, act = path[-1], rng.random()
    where = ".".join(map(str, path))
    if act < 0.55:
        holder[last] = new = value(rng)
        return tree, f"{where} = {_short(new)}"
    if act < 0.68:
        del holder[last]
        return tree, f"{where} removed"
    if act < 0.76:
        holder[last] = [holder[last]] if rng.random() < 0.5 else str(holder[last])
        return tree, f"{where} wrapped"
    inside = holder[last] if isinstance(holder[last], dict) else tree
    if isinstance(inside, dict):
        key = rng.choice(KEYS)
        inside[key] = new = ADDED[key] if key in ADDED and rng.random() < 0.6 else value(rng)
        return tree, f"{key} added to {where}: {_short(new)}"
    inside.append(new := value(rng))
    return tree, f"appended {_short(new)}"


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Cut, flipped, doubled, or exchanged for something short and strange."""
    act, at = rng.random(), rng.randrange(max(1, len(data)))
    if act < 0.3:
        return data[:at], f"cut at {at}"
    if act < 0.5:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], f"byte {at} changed"
    if act < 0.6:
        return data[:at] + data[at:][:50] + data[at:], f"bytes from {at} doubled"
    if act < 0.7:
        return data[:at] + data[at + 1 + rng.randrange(9) :], f"bytes from {at} removed"
    whole = rng.choice(
        [b"", b"null", b"[]", b"{}", b"[1]", b"\xef\xbb\xbf{}", b"\xff\xfe", b"0", b'"x"', b"\x00" * 40]
        + [
            b"[" * DEEP,
            b'{"a":' * DEEP,
            b"[" * 500 + b"]" * 500,
            HUGE.encode(),
            b'{"a": ' + HUGE.encode() + b"}",
        ]
        + [b"- " * 20_000, b"{" + b", ".join(b'"k%d": 1' % i for i in range(20_000)) + b"}"]
        + [b"\n".join(b"key_%d: 1" % i for i in range(20_000)), b"a: &a [*a]", b'{"x": NaN}']
    )
    return whole, f"all = {whole[:20]!r} ({len(whole)} bytes)"


def mutate_file(path: Path, rng: random.Random) -> str:
    """One file of a folder: its JSON, its bytes, or what kind of file it is. Returns what was done."""
    data, name = path.read_bytes(), path.name
    path.unlink()
    act = rng.random()
    if act < 0.03:
        os.mkfifo(path)
        return f"{name} is a pipe"
    if act < 0.05:
        path.symlink_to("/dev/zero")
        return f"{name} is a link to /dev/zero"
    if act < 0.06:
        path.mkdir()
        return f"{name} is a folder"
    if act < 0.08:
        return f"{name} is missing"
    if name.endswith(".jinja") and act < 0.7:
        path.write_text(text := rng.choice(TEMPLATES))
        return f"{name} = {text[:40]!r}"
    if act < 0.75 and name.endswith((".json", ".jsonl")):
        return f"{name}: {_mutate_json(path, data, rng)}"
    new, what = mutate_bytes(data, rng)
    path.write_bytes(new)
    return f"{name}: {what}"


def mutate_header(path: Path, rng: random.Random) -> str:
    """The JSON header of a safetensors file, or the bytes of the file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.unlink()
    if rng.random() < 0.25:
        new, what = mutate_bytes(data, rng)
        path.write_bytes(new)
        return f"{path.name}: {what}"
    tree, what = mutate_tree(json.loads(data[8 : 8 + length]), rng)
    header = json.dumps(tree).encode("utf-8", "surrogatepass")
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return f"{path.name}, header: {what}"


def _mutate_json(path: Path, data: bytes, rng: random.Random) -> str:
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    at = rng.randrange(len(lines))
    what = ""
    tree = json.loads(lines[at])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree, did = mutate_tree(tree, rng)
        what += f"{did}; "
    lines[at] = json.dumps(tree).encode()
    path.write_bytes(b"\n".join(lines))
    return what


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in list(pairs)[:400]:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _short(new: Any) -> str:
    text = ascii(new)
    return text if len(text) < 50 else text[:50] + "..."

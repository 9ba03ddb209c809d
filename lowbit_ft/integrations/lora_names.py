"""LoraConfig's names in a LowBitConfig: a script that is ported keeps them where they mean the same, and is
told why where they do not.

    r, lora_alpha      rank, alpha: D = alpha / r * B A in both
    lora_dropout       dropout, which `lora` has. The other methods have no place for it: D is inside the
                       rounded weight, so inputs that D does not see are inputs that the model does not see
    the rest           accepted with the value that changes nothing, refused with the reason otherwise
"""

from typing import Any

from ..adapters import ADAPTERS

RENAMED = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}

# Name -> (the values that ask for nothing, why another is refused).
WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_rslora": (
        (False, None),
        "it scales by alpha / sqrt(r), here the gain is alpha / r: give lora_alpha times sqrt(r)",
    ),
    "use_dora": (
        (False, None),
        "its magnitudes renormalise a dense weight after the product; method='dl_qat' trains a magnitude per "
        "group that the integers keep",
    ),
    "init_lora_weights": (
        (True, None),
        "A starts as Kaiming, B at zero; other starts are the method's own (options={'init': 'svd'})",
    ),
    "fan_in_fan_out": ((False, None), "how a matrix is kept is known once it is packed; leave it out"),
}


def from_lora(method: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys by the names of `method`. ValueError with a line for each that means something else here."""
    out, lines = {}, []
    for key, value in keys.items():
        if key == "bias" and value in ("none", None):
            continue
        if key in WITHOUT_EFFECT:
            allowed, reason = WITHOUT_EFFECT[key]
            if value not in allowed:
                lines.append(f"{key}: got {value!r}; allowed: {allowed[0]!r}: {reason}")
            continue
        ours = RENAMED.get(key, key)
        if ours != key and ours in keys:
            lines.append(f"{key} and {ours} are one key; give it once")
            continue
        if key == "lora_dropout" and not _has_dropout(method):
            if value:
                lines.append(
                    f"lora_dropout: got {value!r}; allowed with method {method!r}: 0. The low-rank "
                    "product is inside the rounded weight: there is no side path whose inputs could be "
                    "dropped, and dropping those of the whole layer is another model than ships. "
                    "method='lora' has it"
                )
            continue
        out[ours] = value
    if lines:
        raise ValueError("\n".join(lines))
    return out


def _has_dropout(method: str) -> bool:
    kind = ADAPTERS.get(method)
    return kind is not None and "dropout" in kind.model_fields


def plain_names(names: Any) -> list[str] | str | None:
    """Sets come as sorted lists, so that the same config writes the same file."""
    return names if names is None or isinstance(names, str) else sorted(names)

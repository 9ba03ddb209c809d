"""KVConfig: one choice of quant.kv_cache, complete. It has a JSON form, which travels in the
quantization_config of a folder under `kv_cache`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .codec import Codec
from .kinds import KINDS
from .token_head import TokenHead, vllm_signs

AFTER, BEFORE = "after_rope", "before_rope"
ALLOWED: dict[str, tuple[Any, ...]] = {
    "bits": (8, 4),
    "kind": tuple(KINDS),
    "where": (AFTER, BEFORE),
    "symmetric": (True, False),
    "rotate": (True, False),
}


@dataclass(frozen=True)
class KVConfig:
    """bits: 8 or 4; kind: of KINDS; where: after_rope or before_rope; symmetric: no zero points; rotate: keys
    and values of every head, as vLLM's int4 cache does it; r3: the layers whose keys are rotated (sites.r3 of
    quant.rotation)."""

    bits: int
    kind: str
    where: str
    symmetric: bool
    rotate: bool
    r3: tuple[int, ...] = field(default=())

    @classmethod
    def of(
        cls,
        bits: int,
        kind: str,
        where: str = AFTER,
        symmetric: bool | None = None,
        rotate: bool | None = None,
        r3: Iterable[int] = (),
    ) -> KVConfig:
        """With what is left open (None) as the server of this kind has it: vLLM's int4 cache rotates and has
        zero points, nothing else does."""
        int4 = kind == TokenHead.name and bits == 4
        return cls(
            bits,
            kind,
            where,
            not int4 if symmetric is None else symmetric,
            int4 and symmetric is not True if rotate is None else rotate,
            tuple(sorted(r3)),
        )

    def reject(self) -> tuple[str, str] | None:
        """(key, why no cache implements this, with the way out); None when one does."""
        if self.where == BEFORE and self.kind != "token":
            return "where", (
                f"{BEFORE} is LLM-QAT's form, the whole vector of a token on one scale: no cache keeps keys "
                f"by {self.kind} before their rotary embedding; set kind: token, or where: {AFTER}"
            )
        if self.rotate and self.kind != TokenHead.name:
            return "rotate", f"only kind: {TokenHead.name} rotates (as vLLM does at 4 bits); leave it out"
        if not self.symmetric and self.kind == "block":
            return "symmetric", "llama.cpp's q8_0 and q4_0 blocks have no zero point; leave it out"
        if self.r3 and (self.rotate or self.where == BEFORE):
            why = "this cache rotates keys and values by itself" if self.rotate else f"R3 is {AFTER}"
            return "rotate", f"{why}, so sites.r3 of quant.rotation has nothing to do; set it to off"
        return None

    def codec(self, dim: int) -> Codec:
        """Of keys and of values in heads of `dim` numbers; R3 is per layer (model/kv_seam.py)."""
        if self.rotate:
            return TokenHead(self.bits, self.symmetric, signs=vllm_signs(dim))
        return KINDS[self.kind](self.bits, self.symmetric)

    @property
    def packed(self) -> bool:
        """Whether a cache of transformers stores integers: before rotary embedding none can."""
        return self.where == AFTER

    def flags(self, server: str) -> str | None:
        """What makes "vllm" or "llama.cpp" compute these very values; None when nothing does."""
        if self.where == BEFORE or self.r3:
            return None
        if server == "vllm" and self.kind == TokenHead.name and self.symmetric == (self.bits == 8):
            plain = self.rotate == (self.bits == 4)
            return f"--kv-cache-dtype int{self.bits}_per_token_head" if plain else None
        if server == "llama.cpp" and self.kind == "block":
            kind = f"q{self.bits}_0"
            return f"--cache-type-k {kind} --cache-type-v {kind} --flash-attn on"
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"r3": list(self.r3)}

    @classmethod
    def from_json(cls, value: Any) -> KVConfig:
        """ValueError naming the key that is wrong."""
        where = "quantization_config.kv_cache"
        if not isinstance(value, Mapping) or set(value) != {*ALLOWED, "r3"}:
            raise ValueError(f"{where}: got {value!r}; needs an object with {', '.join(ALLOWED)} and r3")
        for key, allowed in ALLOWED.items():
            if not any(value[key] == one and type(value[key]) is type(one) for one in allowed):
                raise ValueError(f"{where}.{key}: got {value[key]!r}; allowed: {allowed}")
        r3 = value["r3"]
        if not isinstance(r3, list) or not all(type(i) is int and i >= 0 for i in r3):
            raise ValueError(f"{where}.r3: got {r3!r}; needs a list of layer numbers")
        made = cls(**{**value, "r3": tuple(sorted(r3))})
        if reason := made.reject():
            raise ValueError(f"{where}.{reason[0]}: {reason[1]}")
        return made

    def __str__(self) -> str:
        parts = [f"{self.bits} bits by {self.kind}", self.where.replace("_", " ")]
        parts += [] if self.symmetric else ["with zero points"]
        parts += ["rotated"] if self.rotate else []
        parts += [f"R3 in {len(self.r3)} layers"] if self.r3 else []
        return ", ".join(parts)

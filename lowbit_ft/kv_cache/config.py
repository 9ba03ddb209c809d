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
        kind = KINDS[self.kind]
        if self.where == BEFORE and not kind.before_rope:
            return "where", (
                f"{BEFORE} is LLM-QAT's form, the whole vector of a token on one scale: no cache keeps keys "
                f"by {self.kind} before their rotary embedding; set kind: token, or where: {AFTER}"
            )
        if self.rotate and self.kind != TokenHead.name:
            return "rotate", f"only kind: {TokenHead.name} rotates (as vLLM does at 4 bits); leave it out"
        if not self.symmetric and not kind.zero_point:
            return "symmetric", f"kind: {self.kind} has no zero points; leave it out"
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

    def served(self, server: str | None, command: str) -> tuple[str, str]:
        """(the command line of "vllm", "llama.cpp" or another server (None), with the flag that makes it
        compute these very values where there is one; what to know about it)."""
        int4, cached = self.bits == 4, self.where == AFTER and not self.r3
        if server == "vllm" and cached and self.kind == TokenHead.name and self._as_vllm:
            flag = f"--kv-cache-dtype int{self.bits}_per_token_head"
            return f"{command} {flag}", (
                "a flag and not in the folder: without it the cache has 16 bits, which training did not see. "
                "It is of vLLM's Triton attention, on a GPU, head_dim from 32 on; leave it out on a CPU, "
                "where vLLM 0.32 reads this cache as fp8"
                + (". vLLM rotates in bfloat16 there, so codes may differ at ties" if int4 else "")
            )
        if server == "llama.cpp" and cached and self.kind == "block":
            kind = f"q{self.bits}_0"
            flags = f"--cache-type-k {kind} --cache-type-v {kind} --flash-attn on"
            return f"LLAMA_ATTN_ROT_DISABLE=1 {command} {flags}", (
                "flags and not in the file: without them the cache has 16 bits. One that rotates what it "
                "puts into a quantized cache computes other values; the variable is reported to stop that"
            )
        return command, (
            f"keys and values were trained on {self}, which this server has no flag for: it keeps them in 16 "
            "bits. merged/ of the run has them as they were trained (lowbit-ft serve)"
        )

    @property
    def _as_vllm(self) -> bool:
        return self.symmetric == (self.bits == 8) and self.rotate == (self.bits == 4)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"r3": list(self.r3)}

    @classmethod
    def from_json(cls, value: Any) -> KVConfig:
        """ValueError naming the key that is wrong."""
        where, table = "quantization_config.kv_cache", _allowed()
        if not isinstance(value, Mapping) or set(value) != {*table, "r3"}:
            raise ValueError(f"{where}: got {value!r}; needs an object with {', '.join(table)} and r3")
        for key, allowed in table.items():
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


def _allowed() -> dict[str, tuple[Any, ...]]:
    """The values of every key but r3; the kinds as the table is now."""
    either = (True, False)
    return {
        "bits": (8, 4),
        "kind": tuple(KINDS),
        "where": (AFTER, BEFORE),
        "symmetric": either,
        "rotate": either,
    }

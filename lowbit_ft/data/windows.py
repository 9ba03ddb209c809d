"""What training runs on: an Example is one window of tokens, Examples are all windows of a source, with what
became of its rows.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

IGNORE = -100  # the label cross_entropy leaves out (torch's ignore_index)


@dataclass(frozen=True)
class Example:
    """One window: input_ids [L], labels [L] (the same ids, or -100; not shifted), segments (lengths, sum
    L)."""

    input_ids: list[int]
    labels: list[int]
    segments: list[int]


@dataclass
class Share:
    """A source of a mixture: rows of an epoch that are its own, and (None: a stream) those it has."""

    name: str
    weight: float | None
    drawn: int = 0
    usable: int | None = None


@dataclass
class DataReport:
    """What became of the rows: rows = used + skipped (malformed) + dropped (no target within sequence_len) +
    masked (every turn says of itself that it is not learned) + left (in no epoch of a mixture) + alike (two
    answers that are the same within sequence_len). unread and lost count rows among all of them but the
    skipped ones: columns that the format does not read, and what a chat template does not write."""

    rows: int = 0
    used: int = 0
    skipped: int = 0
    dropped: int = 0
    masked: int = 0
    truncated: int = 0  # rows that lost their end
    tokens: int = 0
    target_tokens: int = 0
    windows: int = 0
    sequence_len: int = 0
    problems: list[str] = field(default_factory=list)  # of the first skipped rows
    notes: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)  # column -> rows
    lost: dict[str, int] = field(default_factory=dict)  # "tools", "system content" -> rows
    incomplete: int = 0  # rows that lost anything
    left: int = 0  # rows of a mixture that its epoch ends before
    sources: list[Share] = field(default_factory=list)  # of a mixture
    alike: int = 0

    def __str__(self) -> str:
        full = 100 * self.tokens / max(self.windows * self.sequence_len, 1)
        lines = [
            f"{self.used:,} of {self.rows:,} rows used: {self.windows:,} windows of {self.sequence_len:,} "
            f"({full:.0f} % full), {self.tokens:,} tokens, {self.target_tokens:,} of them targets"
        ]
        lines += self._mixture()
        if self.truncated:
            lines.append(f"{self.truncated:,} rows truncated to {self.sequence_len} tokens")
        if self.dropped:
            lines.append(f"{self.dropped:,} rows dropped: no target within {self.sequence_len} tokens")
        if self.alike:
            lines.append(
                f"{self.alike:,} rows dropped: their two answers are the same within {self.sequence_len} "
                "tokens"
            )
        if self.masked:
            lines.append(f"{self.masked:,} rows dropped: each of their turns has weight 0 (or train: false)")
        if self.incomplete:
            lines.append(
                f"{self.incomplete:,} rows are not written whole by the chat template, which leaves out: "
                f"{_counts(self.lost)}"
            )
        if self.unread:
            lines.append(f"columns not read: {_counts(self.unread)}")
        if self.skipped:
            lines.append(f"{self.skipped:,} rows skipped (on_bad_row: skip), the first of them:")
            lines += [f"  {problem}" for problem in self.problems]
        return "\n".join(lines + self.notes)

    def _mixture(self) -> list[str]:
        drawn = max(sum(share.drawn for share in self.sources), 1)
        lines = []
        for share in self.sources:
            said = f"{share.name}: {share.drawn:,} rows of an epoch ({100 * share.drawn / drawn:.1f} %)"
            if share.usable is None:
                said = f"{share.name}: {share.drawn:,} rows so far"
            elif share.drawn > share.usable:
                said += f", its {share.usable:,} about {share.drawn / share.usable:.1f} times each"
            elif share.drawn < share.usable:
                said += f", chosen from {share.usable:,}"
            lines.append("  " + said + (f", weight {share.weight:g}" if share.weight is not None else ""))
        if self.left:
            lines.append(
                f"{self.left:,} rows are in no epoch, which ends with the source that ends first "
                "(data.stopping_strategy: all_exhausted repeats the shorter ones instead)"
            )
        return lines


def _counts(of: dict[str, int]) -> str:
    """The ten most frequent, with their counts."""
    most = sorted(of.items(), key=lambda item: (-item[1], item[0]))
    told = ", ".join(f"{name} ({count})" for name, count in most[:10])
    return told + (f" and {len(most) - 10} more" if len(most) > 10 else "")


class Examples(Sequence[Example]):
    """Windows held in memory, 5 bytes per token. `digest` names their content."""

    streaming = False

    def __init__(self, windows: Iterable[Example], report: DataReport | None = None):
        self.report = report if report is not None else DataReport()
        self._ids, self._learned = array("i"), bytearray()
        self._segments, self._starts = array("i"), [(0, 0)]  # (token, segment) where each window starts
        for window in windows:
            self._ids.extend(window.input_ids)
            self._learned.extend(label != IGNORE for label in window.labels)
            self._segments.extend(window.segments)
            self._starts.append((len(self._ids), len(self._segments)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...  # pyright: ignore[reportIncompatibleMethodOverride]
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        (start, first), (stop, last) = self._starts[index], self._starts[index + 1]
        ids = self._ids[start:stop].tolist()
        labels = [i if t else IGNORE for i, t in zip(ids, self._learned[start:stop], strict=True)]
        return Example(ids, labels, self._segments[first:last].tolist())

    def unseen(self, ids: Iterable[int]) -> list[int]:
        """Those of these tokens that no window holds."""
        held = set(self._ids)
        return [i for i in ids if i not in held]

    @cached_property
    def digest(self) -> str:
        """sha256 over tokens, mask and segments: a resumed run must be given the same data."""
        sha = hashlib.sha256()
        for part in (self._ids, self._learned, self._segments):
            sha.update(len(part).to_bytes(8, "little") + bytes(part))
        return sha.hexdigest()

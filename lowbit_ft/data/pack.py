"""From tokenized rows to windows: the packing itself, pure functions over Examples.

pack       whole rows share a window (chat, completion, alpaca): best fit over the open windows
pack_text  rows are joined and cut every sequence_len tokens (text)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .windows import IGNORE, Example

OPEN_WINDOWS = (
    64  # that pack() chooses from: at 64, rows of 1/8 window fill over 99 %, and a stream stays small
)


def pack(rows: Iterable[Example], sequence_len: int) -> Iterator[Example]:
    """Puts whole rows (each <= sequence_len) into windows: each into the open window that it fills best.

    At most OPEN_WINDOWS are open; beyond, the fullest is closed. No token is lost, segments are kept.
    """
    windows: list[list[Example]] = []
    room: list[int] = []
    for row in rows:
        size = len(row.input_ids)
        assert size <= sequence_len, "rows are cut before they are packed"
        fits = [i for i, left in enumerate(room) if left >= size]
        if fits:
            best = min(fits, key=room.__getitem__)
            windows[best].append(row)
            room[best] -= size
        else:
            windows.append([row])
            room.append(sequence_len - size)
        fullest = min(range(len(room)), key=room.__getitem__)
        if room[fullest] == 0 or len(room) > OPEN_WINDOWS:
            yield join(windows.pop(fullest))
            room.pop(fullest)
    for window in windows:
        yield join(window)


def pack_text(documents: Iterable[Example], sequence_len: int) -> Iterator[Example]:
    """Joins documents and cuts every sequence_len tokens; a document's part in a window is a segment of it.

    No token is lost, but for a last window of one token, which has nothing to predict.
    """
    parts: list[Example] = []
    room = sequence_len
    for document in documents:
        ids, labels = document.input_ids, document.labels
        start = 0
        while start < len(ids):
            stop = min(start + room, len(ids))
            # what the first token of a part follows is in another window
            parts.append(Example(ids[start:stop], [IGNORE, *labels[start + 1 : stop]], [stop - start]))
            room -= stop - start
            start = stop
            if room == 0:
                yield join(parts)
                parts, room = [], sequence_len
    rest = join(parts)
    if any(label != IGNORE for label in rest.labels):
        yield rest


def join(parts: list[Example]) -> Example:
    """One window of them all."""
    return Example(
        [i for part in parts for i in part.input_ids],
        [label for part in parts for label in part.labels],
        [length for part in parts for length in part.segments],
    )

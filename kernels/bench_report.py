"""From results to kernels/README.md: the targets with what was measured against each, all shapes, and
roofline plots.

Everything between the markers in the README is written here and never by hand. A target without a result says
"not measured".
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- results: written by bench.py table -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Target:
    """A promise about an H200: a row of the results, the peer, and peer time / our time at least `ratio`."""

    text: str
    row: str
    peer: str
    ratio: float


TARGETS = [
    Target("decode M=1, 4 bit", "packed_matmul 4b g128 M1 14336x4096 bfloat16", "cublas", 3.2),
    Target("decode M=1, 4 bit", "packed_matmul 4b g128 M1 14336x4096 bfloat16", "gemlite", 1.8),
    Target("decode M=1, 4 bit", "packed_matmul 4b g128 M1 14336x4096 bfloat16", "bitsandbytes nf4", 1.8),
    Target("decode M=1, 2 bit", "packed_matmul 2b g128 M1 14336x4096 bfloat16", "cublas", 4.6),
    Target("decode M=1, 3 bit", "packed_matmul 3b g128 M1 14336x4096 bfloat16", "cublas", 3.6),
    Target("decode M=1, 4 bit, 4096x4096", "packed_matmul 4b g128 M1 4096x4096 bfloat16", "cublas", 2.0),
    Target("M=64, 4 bit", "packed_matmul 4b g128 M64 14336x4096 bfloat16", "best of the packed", 1.25),
    Target("M=256, 4 bit", "packed_matmul 4b g128 M256 14336x4096 bfloat16", "best of the packed", 1.25),
    Target("forward M=4096", "packed_matmul 4b g128 M4096 14336x4096 bfloat16", "cublas", 0.94),
    Target("dX M=4096", "packed_matmul_dx 4b g128 M4096 14336x4096 bfloat16", "cublas", 0.94),
    Target("scale gradient M=4096", "scale_gradient 4b g128 M4096 4096x4096 bfloat16", "cublas dW", 1 / 1.10),
    Target(
        "grid step M=4096 rank 64", "grid_step 4b g128 r64 M4096 4096x4096 bfloat16", "three cublas", 1 / 1.20
    ),
    Target(
        "grid step M=4096 rank 64", "grid_step 4b g128 r64 M4096 4096x4096 bfloat16", "eager autograd", 1.25
    ),
    Target("sign planes q=3, M=1", "binary_matmul 3b g128 M1 14336x4096 bfloat16", "cublas", 2.8),
    Target("Hadamard D=4096", "hadamard 16b g-1 M4096 1x4096 bfloat16", "clone", 1 / 1.15),
]
PACKED = ("bitsandbytes nf4", "gemlite", "torch unpack")


def _ratio(row: dict, peer: str) -> float | None:
    times = row.get("microseconds", {})
    if peer == "best of the packed":
        found = [times[name] for name in PACKED if name in times]
        return min(found) / times["ours"] if found else None
    return times[peer] / times["ours"] if peer in times else None


def tuned_ratio(target: Target, row: dict, tuning: dict | None) -> str:
    """What the target would be with the tuner's best time, of another minute than its peer's; empty where
    it was not tuned.
    """
    found = (tuning or {}).get(target.row, {})
    ratio, times = _ratio(row, target.peer), found.get("times")
    if ratio is None or not times:
        return ""
    if row.get("captured") != found.get("captured"):  # one of the two holds the time in which Python launches
        return f"ours {times[0][0]:.1f} us in a CUDA graph; the peer was not"
    after = ratio * row["microseconds"]["ours"] / times[0][0]
    return f"{after:.2f}x" + (" met" if after >= target.ratio else " **missed**")


def target_table(rows: dict[str, dict], tuning: dict | None = None) -> str:
    lines = [
        "| target (H200) | against | wanted | measured | with the tuner's tiles |",
        "|---|---|---|---|---|",
    ]
    for target in TARGETS:
        row = rows.get(target.row, {})
        ratio = _ratio(row, target.peer)
        if ratio is not None:
            got = f"{ratio:.2f}x " + ("met" if ratio >= target.ratio else "**missed**")
        else:
            got = row.get("failed") or row.get("left_out", {}).get(target.peer) or "not measured"
        lines.append(
            f"| {target.text} | {target.peer} | >= {target.ratio:.2f}x | {got} | "
            f"{tuned_ratio(target, row, tuning)} |"
        )
    lines.append(_own("M=16 against M=1, 4 bit", rows, 16, tuning))
    copied = rows.get("quantize_pack 4b g128 M1 14336x4096 bfloat16", {})
    if "microseconds" in copied:
        times, moved = copied["microseconds"], 4.0 * copied["n"] * copied["k"]
        share = (copied["bytes"] / times["ours"]) / (moved / times["copy"])
        lines.append(
            f"| quantize and pack | copy bandwidth | >= 85 % | {share:.0%} "
            f"{'met' if share >= 0.85 else '**missed**'} | |"
        )
    else:
        lines.append("| quantize and pack | copy bandwidth | >= 85 % | not measured | |")
    return "\n".join(lines)


def _own(text: str, rows: dict[str, dict], m: int, tuning: dict | None) -> str:
    times = [
        rows.get(f"packed_matmul 4b g128 M{i} 14336x4096 bfloat16", {}).get("microseconds") for i in (m, 1)
    ]
    if not all(times):
        return f"| {text} | its own time | <= 1.10x | not measured | |"
    ratio = times[0]["ours"] / times[1]["ours"]  # type: ignore[index]
    best = [
        (tuning or {}).get(f"packed_matmul 4b g128 M{i} 14336x4096 bfloat16", {}).get("times") for i in (m, 1)
    ]
    after = f"{best[0][0][0] / best[1][0][0]:.2f}x" if best[0] and best[1] else ""
    return (
        f"| {text} | its own time | <= 1.10x | {ratio:.2f}x "
        f"{'met' if ratio <= 1.10 else '**missed**'} | {after} |"
    )


def roofline(row: dict, ceilings: dict[str, float]) -> float | None:
    """The share of what memory and arithmetic allow: their longer time over ours."""
    if "microseconds" not in row or not ceilings:
        return None
    seconds = max(row["bytes"] / ceilings["bytes_per_s"], row["flops"] / ceilings["flops_per_s"])
    return seconds * 1e6 / row["microseconds"]["ours"]


def shape_table(result: dict) -> str:
    lines = ["| op | us | roofline | peers (their time / ours) | error / allowed |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed'][:80]} | | | |")
            continue
        times, share = row["microseconds"], roofline(row, result["ceilings"])
        peers = ", ".join(f"{name} {t / times['ours']:.2f}x" for name, t in times.items() if name != "ours")
        peers += "".join(f", {name}: left out" for name in row.get("left_out", {}))
        accuracy = f"{row['error']:.1e} / {row['allowed']:.1e}"
        bound = "" if share is None else f"{share:.0%}"
        lines.append(f"| {row['name']} | {times['ours']:.1f} | {bound} | {peers} | {accuracy} |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> bool:
    """Roofline share over M, a line per shape; False where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, op in zip(axes, ("packed_matmul", "packed_matmul_dx"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in result["rows"]:
            share = roofline(row, result["ceilings"])
            if row.get("op") == op and row.get("bits") == 4 and share is not None:
                lines.setdefault(f"{row['n']}x{row['k']}", []).append((row["m"], share))
        for name, points in sorted(lines.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(title=f"{op}, 4 bit", xlabel="M (rows of x)", xscale="log", ylim=(0, 1.05))
        if lines:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("share of the roofline")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return True


def between(text: str, body: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the two markers replaced. ValueError where they are missing or
    turned round.
    """
    start, stop = text.find(begin), text.find(end)
    if start < 0 or stop < start:
        raise ValueError(f"the markers {begin!r} ... {end!r} must be in the file, in this order")
    return text[: start + len(begin)] + "\n\n" + body.strip() + "\n\n" + text[stop:]


def _latest(folder: Path) -> dict | None:
    """The kernels' part of the newest results by their own date, one GPU per report."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))]
    found = [
        {**data["kernels"], "tuning": data.get("tuning"), "notes": data.get("notes", [])}
        for data in files
        if data.get("kernels")
    ]
    return max(found, key=lambda result: result["date"], default=None)


def report(result: dict | None, picture: Callable[[dict], str | None] = lambda _: None) -> str:
    """The Markdown between the markers."""
    if result is None:
        return "No GPU has run these kernels yet: every figure below is **not measured**.\n\n" + target_table(
            {}
        )
    head = f"{result['gpu']}, {result['date']}, torch {result['torch']}, triton {result['triton']}."
    top = result["ceilings"]
    head += (
        f" Measured ceilings: {top['bytes_per_s'] / 1e12:.2f} TB/s, {top['flops_per_s'] / 1e12:.0f} TFLOP/s."
        if top
        else ""
    )
    rows = {row["name"]: row for row in result["rows"]}
    image = picture(result)
    parts = [
        head,
        "\n".join(f"* {note}" for note in result.get("notes", [])),
        target_table(rows, result.get("tuning")),
        f"![share of the roofline]({image})" if image else "",
        shape_table(result),
    ]
    return "\n\n".join(part for part in parts if part)


def write_report(folder: Path, readme: Path, dry: bool = False) -> str:
    """Write the report of the newest results into the README (not in a dry run) and return it."""

    def picture(result: dict) -> str | None:
        path = readme.parent / "results" / f"{result['gpu'].lower().replace(' ', '-')}.svg"
        return path.relative_to(readme.parent).as_posix() if not dry and plot(result, path) else None

    folder, readme = folder.resolve(), readme.resolve()
    text = report(_latest(folder) if folder.is_dir() else None, picture)
    if not dry:
        readme.write_text(between(readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    return text

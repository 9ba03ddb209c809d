"""Images that a detector makes itself (data.synthesis task_images) against noise and real pictures.

    python -m benchmarks.image_synthesis --work DIR --seeds 0 1 --methods scale lr_qat

The detector of recipes/assets/tiny-rtdetr is rounded to --grid and trained on, with its own loss, each time
from the same rounding, at equal images and steps:

    noise        Gaussian noise, with what the detector sees there (a random box where that is nothing)
    random       images made for one random box each (labels: drawn)
    own          images that only the prior shapes, with what the detector sees (labels: own)
    adaptive     images made for boxes that moved to what it sees (labels: adaptive)
    adaptive small  the same, the boxes found in images of half the sides (adapt.scale)
    true labels  images made for the boxes of real pictures
    real         the real pictures

Static scales of inputs are calibrated on the same images. `scale` trains scales alone: the codes are those of
the rounding. Measured: COCO's mAP on recipes/assets/boxes/valid.parquet, which no run but `real`'s kin has
seen. Rows are kept in --out as they come (JSON), so a stopped run goes on; so are the images in --work.
--picture writes some of each source, with their boxes.
"""

import argparse
import io
import itertools
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw

from lowbit_ft import pipeline
from lowbit_ft.data.read import read_rows
from lowbit_ft.data.synthesis import SYNTHESIS
from lowbit_ft.data.synthesis.base import Given
from lowbit_ft.data.synthesis.folder import RowsFolder, fill
from lowbit_ft.data.synthesis.invert import noise, stored
from lowbit_ft.data.synthesis.task_images import Pictures
from lowbit_ft.files.atomic import write_text
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.model.images import picture_of, read_processor
from lowbit_ft.model.load import load_model
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.rundir import environment
from lowbit_ft.tasks import TASKS
from lowbit_ft.tasks.detection_labels import BoxLabeller

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "recipes" / "assets"
SOURCES = ("noise", "random", "own", "adaptive", "adaptive small", "true labels", "real")
KEY = (
    *("source", "method", "signal", "grid", "range", "zero_points"),
    *("seed", "images", "synthesis_steps", "steps", "batch"),
)
OLDER = {
    "signal": "labels",
    "range": "mse",
    "zero_points": False,
}  # what rows do not say that were kept before it was asked
APART = {"scores": 0, "outputs": 0}
SIGNALS: dict[str, dict[str, Any]] = {  # all but labels ask the model itself, at 8 bits
    "labels": {},
    "logits": {"kind": "logits"},
    "mix": {"kind": "mix"},
    "layers": {"kind": "layers", "losses": APART},
    "layers and labels": {"kind": "layers", "losses": {"labels": 1, **APART}},
}
LABELS = {
    "noise": "own",
    "random": "drawn",
    "own": "own",
    "adaptive": "adaptive",
    "adaptive small": "adaptive",
    "true labels": "drawn",
}


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=ASSETS / "tiny-rtdetr")
    p.add_argument("--rows", type=Path, default=ASSETS / "boxes", help="train.parquet and valid.parquet")
    p.add_argument("--work", type=Path, required=True, help="where the images are kept")
    p.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    p.add_argument("--methods", nargs="+", default=["scale"], help="scale: frozen codes; lr_qat")
    p.add_argument("--signals", nargs="+", default=["labels"], choices=SIGNALS, help="of train.signal")
    p.add_argument("--grid", default="3:8", help="bits of weights : of inputs")
    p.add_argument("--range", default="mse", help="the start of the inputs' scales: mse, lsq, ...")
    p.add_argument(
        "--zero-points", action="store_true", help="of the inputs; else their scales are symmetric"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--images", type=int, default=64)
    p.add_argument("--synthesis-steps", type=int, default=80)
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--valid", type=int, default=80, help="pictures")
    p.add_argument("--picture", type=Path, help="a PNG to write")
    p.add_argument("--out", type=Path, default=HERE / "results" / "image_synthesis.json")
    p.add_argument("--threads", type=int, default=1)
    return p.parse_args()


def source_of(path: Path) -> Any:
    return SimpleNamespace(path=str(path), split="train", name=None, revision=None, limit=None)


class Real(BoxLabeller):
    """Draws the boxes of real pictures."""

    def __init__(self, plain: BoxLabeller, rows: list[Any], sides: tuple[int, int]):
        super().__init__(plain.task, plain.detect)
        self.real = [self.answer({**row, "about": {"size": list(sides)}}) for row in rows]

    def drawn(self, number: int, chance: random.Random) -> Any:
        return self.real[number % len(self.real)]


class Noise(Pictures):
    """Noise as it is, with what the detector sees there; a random box where that is nothing."""

    def _make(self, numbers: range, stage: int, *_: Any) -> Any:
        return stored(noise(self.config.seed, numbers, self.frame, stage)), None

    def _own(self, files: Any, model: Any) -> list[Any]:
        chances = [random.Random(i) for i in range(len(files))]
        drawn = [self.labeller.drawn(i, chance) for i, chance in enumerate(chances)]
        return [b if a is None else a for a, b in zip(super()._own(files, model), drawn, strict=True)]


class Bench:
    def __init__(self, o: argparse.Namespace):
        self.o, self.processor = o, read_processor(o.model)
        names = json.loads((o.model / "config.json").read_text())["id2label"]
        self.task: Any = TASKS["object_detection"].model_validate(
            {"kind": "object_detection", "labels": [names[key] for key in sorted(names, key=int)]}
        )
        checkpoint = Checkpoint.open(str(o.model), dtype="float32", purpose=self.task.purpose(0))
        self.teacher: Callable[[], Any] = lambda: load_model(checkpoint, "eager", dtype=torch.float32).eval()

    def images(self, source: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The rows of a source, and what is told of them."""
        o = self.o
        if source == "real":
            return o.rows / "train.parquet", self.told(self.real(), {})
        given = {
            "kind": "task_images",
            "samples": o.images,
            "batch_size": 32,
            "seed": seed,
            "labels": LABELS[source],
            "steps": o.synthesis_steps,
            "check_every": 20,
            "weights": {"prior": 0.2, "variation": 0.01, "task": 1.0},
            "adapt": {"begin": 20, "every": 10},
        }
        if source == "adaptive small":
            given["adapt"]["scale"] = 0.5
        config = SYNTHESIS["task_images"].model_validate(given)
        labeller = self.task.labeller(self.processor)
        if source == "true labels":
            labeller = Real(labeller, self.real(), (64, 64))
        asked = Given(self.processor, [], None, config.longest(0), labeller)
        maker = (Noise if source == "noise" else Pictures)(config, asked)  # pyright: ignore[reportArgumentType]
        place = o.work / f"{source}-{seed}-{o.images}-{o.synthesis_steps}".replace(", ", "-").replace(
            " ", "-"
        )
        folder = RowsFolder(place, json.dumps([source, given]))
        folder.by(lambda: "dense")
        fill(folder, maker, 32, self.teacher(), lambda rows, steps: None)
        shards = range(-(-o.images // 32))
        return place / "train", self.told([r for s in shards for r in folder.kept(s)], folder.state.own_score)

    def real(self) -> list[Any]:
        found = [row.value for row in read_rows(source_of(self.o.rows / "train.parquet"))]
        return [{**row, "about": {"size": [64, 64]}} for row in found[: self.o.images] if row is not None]

    def told(self, rows: list[Mapping[str, Any]], score: Mapping[str, float]) -> dict[str, Any]:
        """Of a source: the shares of its classes, boxes to an image, their width, the detector's own mAP."""
        labeller = self.task.labeller(self.processor)
        answers = [labeller.answer(row) for row in rows]
        classes = Counter(word for answer in answers for word in labeller.words(answer))
        widths = [box[2] for answer in answers for box in answer[1]]
        return {
            "classes": {name: classes[name] / max(1, classes.total()) for name in labeller.names},
            "boxes": len(widths) / max(1, len(answers)),
            "least_boxes": min(len(answer[0]) for answer in answers),
            "width": sum(widths) / max(1, len(widths)),
            "own_map": score.get("map"),
        }

    def run(self, source: str, method: str, signal: str, seed: int, folder: Path) -> dict[str, Any]:
        o = self.o
        path, told = self.images(source, seed)
        bits, inputs = (int(v) for v in o.grid.split(":"))
        name = f"{source}-{method}-{signal}-{seed}".replace(" ", "-")
        made = {
            "name": name,
            "model": {"path": str(o.model), "dtype": "float32", "attention": "eager", "device": "cpu"},
            "task": {"kind": "object_detection", "labels": list(self.task.labels)},
            "quant": {
                "bits": bits,
                "group_size": -1,
                "calibrate": "mse",
                "convolutions": True,
                "activations": {
                    "kind": "tensor",
                    "bits": inputs,
                    "dynamic": False,
                    "learn": True,
                    "range": o.range,
                    "symmetric": not o.zero_points,
                },
                "calibration": {"samples": 32},
            },
            "adapter": {"method": method},
            "data": {"train": {"path": str(path), "limit": o.images}},
            "train": {
                "max_steps": o.steps,
                "micro_batch_size": o.batch,
                "gradient_accumulation_steps": 1,
                "learning_rate": o.learning_rate,
                "modules_learning_rate": o.learning_rate / 4,
                "seed": seed,
            },
            "eval": {"data": {"path": str(o.rows / "valid.parquet"), "limit": o.valid}},
            "export": {"format": "native", "verify": False},
            "output": str(folder / name),
        }
        if method == "scale":
            made["quant"]["residual_bits"] = 0
            made["train"]["scale_learning_rate"] = o.learning_rate
        if signal != "labels":
            made["train"] |= {"signal": SIGNALS[signal], "teacher": str(o.model)}
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(made))
        pipeline.run(load_recipe(file))
        table = json.loads((folder / name / "evaluation.json").read_text())["rows"]
        scores = {row["stage"]: row["scores"]["map"] for row in table}
        return {"base": scores["base"], "start": scores["quantized"], "trained": scores["merged"], **told}

    def draw(self, path: Path, seed: int, across: int = 8, side: int = 96) -> None:
        """Some images of each source, a line for each, with their boxes."""
        made = [source for source in self.o.sources if source in LABELS]
        sheet = Image.new("RGB", (across * (side + 4), len(made) * (side + 4)), "white")
        for line, source in enumerate(made):
            place, _ = self.images(source, seed)
            rows = [json.loads(x) for file in sorted(place.glob("*.jsonl")) for x in file.open("rb")]
            for column, row in enumerate(rows[:across]):
                image = picture_of((place / row["image"]).read_bytes())
                scale = side / image.width
                image = image.resize((side, side), Image.Resampling.NEAREST)
                pen = ImageDraw.Draw(image)
                for x, y, w, h in row["objects"]["bbox"]:
                    pen.rectangle([round(n * scale) for n in (x, y, x + w - 1, y + h - 1)], outline="yellow")
                sheet.paste(image, (column * (side + 4), line * (side + 4)))
        data = io.BytesIO()
        sheet.quantize(64).save(data, "PNG", optimize=True)
        path.write_bytes(data.getvalue())


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| images | method | signal | classes | boxes | width | own mAP | rounded | trained |")
    print("| --- | --- | --- | --- | --: | --: | --: | --: | --: |")
    for r in rows:
        shares = " ".join(f"{v:.2f}" for v in r["classes"].values())
        own = "" if r["own_map"] is None else f"{r['own_map']:.3f}"
        print(
            f"| {r['source']} | {r['method']} | {r['signal']} | {shares} | {r['boxes']:.2f} | "
            f"{r['width']:.2f} | {own} | {r['start']:.3f} | {r['trained']:.3f} |"
        )


def main() -> None:
    o = options()
    torch.set_num_threads(o.threads)
    o.work.mkdir(parents=True, exist_ok=True)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = json.loads(o.out.read_text()) if o.out.exists() else {}
    rows: list[dict[str, Any]] = [{**OLDER, **row} for row in kept.get("rows", [])]
    kept.setdefault("environment", environment())
    done = {tuple(row[key] for key in KEY) for row in rows}
    bench = Bench(o)
    with tempfile.TemporaryDirectory() as folder:
        for seed in o.seeds:
            for method in o.methods:
                for signal, source in itertools.product(o.signals, o.sources):
                    made = (o.images, o.synthesis_steps, o.steps, o.batch)
                    values = (source, method, signal, o.grid, o.range, o.zero_points, seed, *made)
                    if values in done:
                        continue
                    found = bench.run(source, method, signal, seed, Path(folder))
                    rows.append(dict(zip(KEY, values, strict=True)) | found)
                    write_text(o.out, json.dumps({**kept, "rows": rows}, indent=1) + "\n")
    if o.picture is not None:
        bench.draw(o.picture, o.seeds[0])
    print()
    print_table(rows)


if __name__ == "__main__":
    main()

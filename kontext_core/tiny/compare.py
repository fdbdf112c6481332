"""The few-step student beside both of its controls, in one table: `python -m kontext_core.tiny.compare`.

All answer the same requests of the test split, `--count` a category: the teacher in its own number of steps and in 4, 2
and 1; the LADD student; the student of plain regression that computed as much (`recipe distill` makes both); and the
truth, only encoded and decoded. See `contest` for what is measured. A category is written to `comparison.json` when it
is done, and the same command goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from ..evaluation.distance import Interval
from ..models.lora_apply import apply
from ..models.transformer import Flux
from ..record import stamp
from ..weights.files import open_weights
from ..weights.formats import TRANSFORMER
from ..weights.load import FEW_STEP, KontextModel, load_model, load_transformer
from ..weights.lora_file import load_lora
from . import world
from .bench import SEED_STRIDE, Editor
from .contest import TRUTH, Row, Way, compete, goals, table
from .editor import model_editor
from .parts import ASSETS

STEPS = (4, 2, 1)
LADD = "ladd"
LEAST = {4: 0.95, 1: 0.85}
"""Steps -> the share of the teacher's score that the student is to reach."""
SCORES = {"local": 0.90, "global": 0.95, "text": 0.75, "style": 0.80, "character": 0.80}
"""Category -> what the teacher is to get done and kept."""


def load_student(model: KontextModel, path: Path) -> Flux:
    """A distilled transformer, or a LoRA that makes the model's own one distilled.

    Raises:
        ValueError: the file is no transformer of the model's sizes, and no LoRA for it.
    """
    dtype = model.transformer.compute_dtype
    if any(".lora_" in key for key in open_weights(path).tensors):
        student = load_transformer(model.files[TRANSFORMER], dtype=dtype, device=model.device)
        apply({"transformer": student}, [(load_lora(path), 1.0)])
        return student
    student = load_transformer(path, dtype=dtype, device=model.device)
    if student.params != model.transformer.params:
        raise ValueError(f"{path}: the student has other sizes than the teacher, {model.name}")
    return student


def make_ways(
    model: KontextModel, students: dict[str, Flux], *, num_steps: int | None = None, seed: int = 0
) -> dict[Way, Editor]:
    """Every way of making the pictures; the teacher in its many steps first."""
    many = num_steps or model.preset.default_steps
    ways = {
        ("teacher", number): model_editor(
            model, num_steps=number, sampler="euler", shift="resolution", seed=seed
        )
        for number in STEPS
    }
    ways = {("teacher", many): model_editor(model, num_steps=many, seed=seed), **ways}
    for name, student in students.items():
        for number in STEPS:
            own = replace(model, few_step=student)
            ways[name, number] = model_editor(own, few_step=number, seed=seed)
    ways[TRUTH, 0] = _decoded_truth(model)
    return ways


def _decoded_truth(model: KontextModel) -> Editor:
    @torch.inference_mode()
    def edit(examples: list[world.Example]) -> list[np.ndarray]:
        pictures = torch.from_numpy(np.stack([item.target for item in examples])).permute(0, 3, 1, 2)
        dtype = next(model.autoencoder.parameters()).dtype
        latents = model.autoencoder.encode((pictures.float() / 127.5 - 1).to(model.device, dtype))
        made = model.autoencoder.decode(latents).float().cpu()
        pixels = ((made + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).numpy())

    return edit


class Results:
    """The finished categories of one comparison, on disk.

    Raises:
        ValueError: the folder holds a comparison of something else.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        self.path, self.settings = folder / "comparison.json", settings
        self.rows: dict[str, list[Row]] = {}
        if self.path.is_file():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            differ = [key for key, value in settings.items() if found["settings"].get(key) != value]
            if differ:
                raise ValueError(
                    f"{self.path} compares something else ({', '.join(differ)}): give another --output, or take it "
                    "away"
                )
            self.rows = {name: [_row(row) for row in rows] for name, rows in found["categories"].items()}

    def add(self, category: str, rows: list[Row]) -> None:
        """Keep a category, written beside and renamed."""
        self.rows[category] = rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")
        os.replace(partial, self.path)

    def as_dict(self) -> dict:
        """`{"settings", "categories": {category: [row]}}`."""
        categories = {name: [asdict(row) for row in rows] for name, rows in self.rows.items()}
        return {"settings": self.settings, "categories": categories}


def _row(values: dict) -> Row:
    return Row(
        **{key: Interval(**value) if isinstance(value, dict) else value for key, value in values.items()}
    )


def _tokenizers(model: str) -> dict[str, Path]:
    """The recipe's own tokenizers for a folder without any: `export` writes weights alone."""
    folder, names = Path(model), {"t5_tokenizer": "tokenizer_2", "clip_tokenizer": "tokenizer"}
    return {
        key: ASSETS / name for key, name in names.items() if folder.is_dir() and not (folder / name).is_dir()
    }


def _files(args: argparse.Namespace, model: KontextModel) -> dict[str, Path]:
    """Name -> file of each student, the LADD one first."""
    own = model.files[FEW_STEP].path if FEW_STEP in model.files else None
    made = args.runs / "distill"
    ladd = args.ladd or (made / "ladd.safetensors" if (made / "ladd.safetensors").is_file() else own)
    if ladd is None:
        raise ValueError(
            f"no student in {made} and none beside the model: run the distill stage, or give --ladd"
        )
    files = {LADD: ladd}
    if not args.no_regression:
        files["regression"] = args.regression or made / "regression.safetensors"
    for text in args.student:
        name, _, path = text.partition("=")
        if not path or name in files or name in ("teacher", TRUTH):
            raise ValueError(f"--student {text}: give NAME=FILE, with a name of its own")
        files[name] = Path(path)
    missing = [f"{name} ({path})" for name, path in files.items() if not path.is_file()]
    if missing:
        raise ValueError(
            f"no such file: {', '.join(missing)}. `recipe distill` without --no-control makes the regression "
            "student; --no-regression leaves it out"
        )
    return files


def run(args: argparse.Namespace) -> Results:
    """Compare, category by category, and write what was found.

    Raises:
        ValueError: a student is missing or does not fit, or the folder holds another comparison.
    """
    if set(args.categories) - set(world.CATEGORIES) or args.count < 2:
        raise ValueError(
            f"categories are {', '.join(args.categories)} and count is {args.count}: use some of "
            f"{', '.join(world.CATEGORIES)}, and 2 or more"
        )
    model = load_model(args.model, **_tokenizers(args.model))
    files = _files(args, model)
    weights = {**{part: file.path for part, file in model.files.items() if part != FEW_STEP}, **files}
    settings = {
        "model": model.name,
        "split": args.split,
        "count": args.count,
        "seed": args.seed,
        "steps": args.steps or model.preset.default_steps,
        "weights": {name: stamp(name, path).digest for name, path in weights.items()},
    }
    results = Results(args.output or args.runs / "distill" / "comparison", settings)
    students = {name: load_student(model, path) for name, path in files.items()}
    ways = make_ways(model, students, num_steps=args.steps, seed=args.seed)
    for category in args.categories:
        if category in results.rows:
            continue
        start = args.seed * SEED_STRIDE
        items = [world.example(args.split, category, start + number) for number in range(args.count)]
        rows = compete(
            ways,
            items,
            first=LADD,
            reference=("teacher", settings["steps"]),
            batch=args.batch,
            on_way=lambda way, category=category: print(category, *way, file=sys.stderr, flush=True),
        )
        results.add(category, rows)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="kontext-tiny", help="the teacher (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="folder of the recipe's stages")
    parser.add_argument(
        "--ladd", type=Path, help="LADD student (default: the distill stage's, or the model's own)"
    )
    parser.add_argument("--regression", type=Path, help="regression student (default: the distill stage's)")
    parser.add_argument("--no-regression", action="store_true", help="leave that control out")
    parser.add_argument(
        "--student", action="append", default=[], metavar="NAME=FILE", help="another one, or a LoRA"
    )
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=500, help="requests a category (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which requests, and their noise")
    parser.add_argument("--steps", type=int, help="the teacher's many steps (default: its own)")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once (default: %(default)s)")
    parser.add_argument(
        "--categories", type=lambda text: text.split(","), default=list(world.CATEGORIES), help="(all)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of comparison.json (default: beside the students)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    args = parser.parse_args(argv)
    try:
        results = run(args)
    except ValueError as error:
        parser.error(str(error))
    rows = [row for category in args.categories for row in results.rows[category]]
    many = ("teacher", results.settings["steps"])
    found = goals(rows, first=LADD, reference=many, least=LEAST, scores=SCORES)
    if args.json:
        print(json.dumps({**results.as_dict(), "goals": [asdict(goal) for goal in found]}))
    else:
        print("\n".join([table(rows, LADD), "", *map(str, found)]))


if __name__ == "__main__":
    main()

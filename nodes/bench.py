"""Kontext Bench Item and Kontext Compare: a benchmark's edits in the graph, and two pictures in numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io

from ..kontext_core import images
from ..kontext_core.evaluation.metrics import in_words, psnr, ssim
from . import host_compare, host_graph, host_training
from .schema import CATEGORY, make_schema

SUITES = ("tiny", "kontext-bench")
CATEGORIES = ("all", "local", "global", "text", "style", "character")
METADATA = "metadata.jsonl"
MAX_INDEX = 999_999


class KontextBenchItem(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextBenchItem",
            display_name="Kontext Bench Item",
            category=CATEGORY,
            description="One edit of a benchmark: the picture and the instruction, and where it is known the right "
            "answer. From the synthetic world of kontext-tiny, or from a copy of KontextBench.",
            search_aliases=["benchmark", "evaluation", "kontextbench", "test set"],
            inputs=[
                io.Combo.Input(
                    "suite",
                    options=list(SUITES),
                    default="tiny",
                    tooltip="tiny: the synthetic world, made on the spot; kontext-bench: a folder with the published "
                    "pictures.",
                ),
                io.Combo.Input(
                    "category",
                    options=list(CATEGORIES),
                    default="local",
                    tooltip="Kind of edit; all: kontext-bench in its own order, in tiny one kind after the other.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=MAX_INDEX,
                    control_after_generate=True,
                    tooltip="Which one; increment goes through them.",
                ),
                io.String.Input(
                    "folder",
                    default="kontext-bench/test",
                    tooltip="For kontext-bench: its folder with metadata.jsonl, inside ComfyUI's input folder.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture to edit."),
                io.String.Output(display_name="instruction", tooltip="What to change."),
                io.Image.Output(
                    display_name="truth",
                    tooltip="A right answer; for kontext-bench, which has none, the picture.",
                ),
                io.String.Output(
                    display_name="item", tooltip="Which edit it is, for Kontext Compare's score."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, suite, category, index, folder) -> io.NodeOutput:
        if suite == "tiny":
            names = CATEGORIES[1:]
            if category == "all":
                category, index = names[index % len(names)], index // len(names)
            item = {"suite": suite, "category": category, "index": index}
            found = tiny_example(item)
            image, truth = (_image(pixels) for pixels in (found.context, found.target))
            instruction = found.instruction
        else:
            item = bench_row(host_training.pictures_folder(folder, "folder"), category, index)
            image = images.to_comfy(images.load_image(item.pop("path")).image)
            instruction, truth = item["instruction"], image
        host_graph.tell(cls.hidden.unique_id, [instruction])
        return io.NodeOutput(image, instruction, truth, json.dumps(item))


def tiny_example(item: dict):
    """An example of the synthetic world's test split."""
    from ..kontext_core.tiny import world

    return world.example("test", item["category"], item["index"])


def _image(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]


def bench_row(folder: Path, category: str, index: int) -> dict:
    """A row of KontextBench's metadata.jsonl, with the picture's `path`.

    Raises:
        ValueError: there is no such file, row or picture.
    """
    file = folder / METADATA
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {METADATA}: copy KontextBench's folder test there, images and all"
        )
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
            if row and (category == "all" or category in str(row["category"]).lower()):
                rows.append({key: str(row[key]) for key in ("file_name", "category", "instruction")})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number} is no row of KontextBench: {error}") from error
    if index >= len(rows):
        raise ValueError(f"index is {index}; {file} has {len(rows)} edits of the category {category}")
    row = rows[index]
    path = folder / row["file_name"]
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{file}: there is no picture {row['file_name']!r} in that folder")
    return {"suite": "kontext-bench", "index": index, **row, "path": path}


class KontextCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextCompare",
            display_name="Kontext Compare",
            category=CATEGORY,
            description="Two pictures, or two batches, beside each other and in numbers: PSNR, SSIM and the share of "
            "pixels that differ. With a benchmark's item it says whether the edit is right.",
            search_aliases=["before after", "difference", "psnr", "ssim", "image compare", "score"],
            inputs=[
                io.Image.Input("before", tooltip="One picture, or as many as after."),
                io.Image.Input("after", tooltip="What it is compared with, at the same size."),
                io.Float.Input(
                    "gain",
                    default=4.0,
                    min=1.0,
                    max=64.0,
                    step=0.5,
                    tooltip="How much brighter the difference is shown than it is.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White where pixels count; without it all do."),
                io.String.Input(
                    "item",
                    optional=True,
                    force_input=True,
                    tooltip="From Kontext Bench Item: scores after as the answer to that edit (suite tiny).",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="difference", tooltip="What differs, on black."),
                io.Float.Output(
                    display_name="psnr", tooltip="In dB, the mean of the batch; 99 for equal pictures."
                ),
                io.Float.Output(display_name="ssim", tooltip="Structural similarity, 1 for equal pictures."),
                io.String.Output(display_name="report", tooltip="The numbers, a line a picture."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, before, after, gain, mask=None, item=None) -> io.NodeOutput:
        if before.shape[1:3] != after.shape[1:3] or len(before) not in (1, len(after)):
            sizes = [f"{len(image)} of {image.shape[2]}×{image.shape[1]}" for image in (before, after)]
            raise ValueError(
                f"before is {sizes[0]} and after {sizes[1]}: give one picture or as many, all of one size; Kontext "
                "Restore brings a result back to its original's size"
            )
        first, second = (images.from_comfy(image)[0] for image in (before, after))
        first = first.expand_as(second)
        where = None
        if mask is not None:
            where = (mask[None] if mask.dim() == 2 else mask)[:, None]
            if where.shape[-2:] != first.shape[-2:] or len(where) not in (1, len(second)):
                raise ValueError(f"the mask has shape {tuple(mask.shape)} for pictures {tuple(after.shape)}")
        noise, likeness = psnr(first, second, where).clamp(max=99.0), ssim(first, second, where)
        difference = (second - first).abs() / 2
        counted = (
            torch.ones_like(difference[:, :1])
            if where is None
            else (where > 0).expand(len(second), -1, -1, -1)
        )
        changed = (difference.amax(1, keepdim=True) > 4 / 255) & (counted > 0)
        share = changed.sum((1, 2, 3)) / counted.sum((1, 2, 3)).clamp(min=1)
        lines = [
            f"{number}. {in_words(a, b, digits=2)}, {c:.1%} of the pixels differ"
            for number, (a, b, c) in enumerate(
                zip(noise.tolist(), likeness.tolist(), share.tolist(), strict=True), 1
            )
        ]
        if item is not None:
            lines += score_lines(item, after)
        host_graph.tell(cls.hidden.unique_id, lines)
        shown = (difference * gain).clamp(max=1) * 2 - 1
        return io.NodeOutput(
            images.to_comfy(shown),
            float(noise.mean()),
            float(likeness.mean()),
            "\n".join(lines),
            ui=host_compare.compare(before, after[..., :3], None if mask is None else where[:, 0]),
        )


def score_lines(item: str, pictures: torch.Tensor) -> list[str]:
    """What the benchmark's scorer says of each picture.

    Raises:
        ValueError: not an item of Kontext Bench Item, or of a suite that people have to judge.
    """
    try:
        found = json.loads(item)
        suite = found["suite"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"item is {item[:60]!r}; connect the item output of Kontext Bench Item") from error
    if suite != "tiny":
        raise ValueError(f"{suite} has no scorer: its edits are judged by people; disconnect item")
    from ..kontext_core.tiny.scorer import score

    example = tiny_example(found)
    lines = []
    for number, picture in enumerate(pictures, 1):
        result = score(example, picture[..., :3].clamp(0, 1).float().cpu().numpy())
        words = [
            "done" if result.done else "not done",
            "the rest kept" if result.kept else "the rest not kept",
        ]
        lines.append(f"{number}. {', '.join(words)}")
    return lines

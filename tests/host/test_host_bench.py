"""Kontext Bench Item and Kontext Compare: an edit of each suite, its score, and two pictures in numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from kontext_core.tiny import world


def item(**changes) -> dict:
    inputs = {"suite": "tiny", "category": "local", "index": 3, "folder": "bench"}
    return {"class_type": "KontextBenchItem", "inputs": {**inputs, **changes}}


def compare(before: list, after: list, **more) -> dict:
    return {"class_type": "KontextCompare", "inputs": {"before": before, "after": after, "gain": 4.0, **more}}


def shown(source: list) -> dict:
    return {"class_type": "PreviewAny", "inputs": {"source": source}}


def texts(run) -> dict[str, str]:
    return {node: output["text"][0] for node, output in run.history["outputs"].items() if "text" in output}


def test_an_item_is_the_worlds_example_and_its_truth_scores_as_right(host):
    example = world.example("test", "local", 3)
    run = host.run(
        {
            "item": item(),
            "right": compare(["item", 0], ["item", 2], item=["item", 3]),
            "wrong": compare(["item", 0], ["item", 0], item=["item", 3]),
            "words": shown(["item", 1]),
            "right_report": shown(["right", 3]),
            "wrong_report": shown(["wrong", 3]),
            "wrong_psnr": shown(["wrong", 1]),
            "wrong_ssim": shown(["wrong", 2]),
            "save": {
                "class_type": "SaveImage",
                "inputs": {"images": ["item", 2], "filename_prefix": "truth"},
            },
        }
    )
    (truth,) = host.pictures(run)
    assert np.array_equal(np.asarray(truth), example.target)
    said = texts(run)
    assert said["words"] == example.instruction
    assert "done, the rest kept" in said["right_report"] and "not done" in said["wrong_report"]
    assert float(said["wrong_psnr"]) == 99 and float(said["wrong_ssim"]) == pytest.approx(1, abs=1e-5)
    assert "0.0% of the pixels differ" in said["wrong_report"]


def test_the_numbers_and_the_difference_are_those_of_the_pixels(host):
    before = np.full((32, 32, 3), 100, np.uint8)
    after = before.copy()
    after[:, 16:] += 10
    names = [host.upload(Image.fromarray(p), f"{n}.png") for n, p in (("one", before), ("two", after))]
    loads = {
        key: {"class_type": "LoadImage", "inputs": {"image": name}}
        for key, name in zip("ab", names, strict=True)
    }
    run = host.run(
        {
            **loads,
            "compare": compare(["a", 0], ["b", 0]),
            "report": shown(["compare", 3]),
            "save": {"class_type": "SaveImage", "inputs": {"images": ["compare", 0], "filename_prefix": "d"}},
        }
    )
    (difference,) = host.pictures(run)
    pixels = np.asarray(difference)
    assert (pixels[:, :16] == 0).all() and (abs(pixels[:, 16:].astype(int) - 40) <= 1).all()
    # half the pixels are 10 of 255 off: 10·log10(255² / 50)
    assert "PSNR 31.14 dB" in texts(run)["report"] and "50.0% of the pixels differ" in texts(run)["report"]


def test_pictures_too_small_for_ssim_are_compared_by_the_rest(host):
    name = host.upload(Image.new("RGB", (8, 10), (90, 120, 60)), "small.png")
    graph = {
        "a": {"class_type": "LoadImage", "inputs": {"image": name}},
        "compare": compare(["a", 0], ["a", 0]),
        "report": shown(["compare", 3]),
    }
    report = texts(host.run(graph))["report"]
    assert report == "1. PSNR 99.00 dB, SSIM not measured, 0.0% of the pixels differ"


def test_a_folder_of_kontext_bench_is_read_and_mistakes_are_named(host):
    folder = host.server.base / "input" / "bench"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (48, 32), "red").save(folder / "images" / "0003.jpg")
    rows = [
        {
            "file_name": "images/0003.jpg",
            "key": 1,
            "category": "Instruction Editing - Local",
            "instruction": "go",
        },
        {"file_name": "../../secret.jpg", "key": 2, "category": "Text Editing", "instruction": "no"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    graph = {
        "item": item(suite="kontext-bench", index=0),
        "words": shown(["item", 1]),
        "save": {"class_type": "SaveImage", "inputs": {"images": ["item", 0], "filename_prefix": "b"}},
    }
    run = host.run(graph)
    assert texts(run)["words"] == "go" and host.pictures(run)[0].size == (48, 32)

    def error(**changes) -> str:
        return host.error({**graph, "item": item(suite="kontext-bench", **changes)})

    assert "has 1 edits" in error(index=1)
    assert "no picture '../../secret.jpg'" in error(category="text", index=0)
    assert "name a folder inside" in error(index=0, folder="../models")
    assert "holds no metadata.jsonl" in error(index=0, folder=".")
    scored = {**graph, "compare": compare(["item", 0], ["item", 0], item=["item", 3])}
    assert "judged by people" in host.error(scored)
    sizes = {**graph, "tiny": item(), "compare": compare(["item", 0], ["tiny", 0])}
    assert "Kontext Restore" in host.error(sizes)

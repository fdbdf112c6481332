"""A folder of pairs: what is found, what is encoded once, and mistakes named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kontext_core import geometry
from kontext_core.edit import encode_image
from kontext_core.images import load_image
from kontext_core.training.pairs import empty_prompt, find_pairs, load_pairs
from kontext_core.weights.load import load_model

AREA = 64 * 64


@pytest.fixture(scope="module")
def model(random_tiny_folder):
    return load_model(random_tiny_folder)


def write_picture(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two square pairs and one wide one, a control in another format, one without a caption of its own."""
    targets, controls = tmp_path / "targets", tmp_path / "controls"
    for number, size in enumerate([(64, 64), (80, 80), (130, 60)]):
        write_picture(targets / f"{number}.png", size, number)
        write_picture(controls / f"{number}.{'jpg' if number == 1 else 'png'}", size, 10 + number)
        (targets / f"{number}.txt").write_text(f"make the\nsquare {number}\n")
    (targets / "notes.md").write_text("not a picture")
    return targets, controls


def test_pairs_are_found_by_name(folders):
    pairs = find_pairs(*folders)
    assert [pair.target.name for pair in pairs] == ["0.png", "1.png", "2.png"]
    assert [pair.control.name for pair in pairs] == ["0.png", "1.jpg", "2.png"]
    assert pairs[0].caption == "make the square 0"
    assert all(pair.control is None for pair in find_pairs(folders[0]))


def test_what_is_missing_is_named(folders, tmp_path):
    targets, controls = folders
    (controls / "2.png").unlink()
    with pytest.raises(ValueError, match=r"^2 in .*no picture of the same name"):
        find_pairs(targets, controls)
    (targets / "0.txt").unlink()
    with pytest.raises(ValueError, match=r"^0 in .*no caption"):
        find_pairs(targets)
    assert find_pairs(targets, default_caption="x")[0].caption == "x"
    with pytest.raises(ValueError, match="is not a folder"):
        find_pairs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        find_pairs(tmp_path / "empty")
    write_picture(targets / "0.webp", (16, 16), 0)
    with pytest.raises(ValueError, match=r"has both 0\.png and 0\.webp"):
        find_pairs(targets)
    (targets / "0.webp").unlink()


def test_pairs_are_encoded_into_their_buckets(model, folders, tmp_path):
    data = load_pairs(model, find_pairs(*folders), tmp_path / "cache", areas=[AREA])
    assert len(data) == 3 and sorted(len(group) for group in data.groups) == [1, 2]
    square = next(group for group in data.groups if len(group) == 2)
    assert square.tensors["target"].shape == (2, 16, 8, 8) == square.tensors["context"].shape
    wide = next(group for group in data.groups if len(group) == 1)
    assert wide.tensors["target"].shape[-1] > wide.tensors["target"].shape[-2]
    picture = load_image(folders[0] / "0.png").image
    plan = geometry.fit((64, 64), "crop", max_area=AREA)
    expected = encode_image(model, geometry.apply(plan, picture)).half()
    assert torch.equal(square.tensors["target"][:1], expected)
    batch = data.batch(0, 0, 2)
    assert batch["txt"].shape[1:] == (model.t5_tokenizer.max_length, 192) and not batch["weight"].any()
    txt, vec = empty_prompt(model)
    assert txt.shape == batch["txt"].shape[1:] and vec.shape == batch["vec"].shape[1:]


def test_pairs_are_encoded_once(model, folders, tmp_path):
    def encoded(**options) -> int:
        seen = []
        options = {"areas": [AREA], "on_pair": lambda done, total: seen.append(total), **options}
        load_pairs(model, find_pairs(*folders), tmp_path / "cache", **options)
        return len(seen)

    assert encoded() == 3
    assert encoded() == 0
    (folders[0] / "2.txt").write_text("another instruction")
    assert encoded() == 1
    write_picture(folders[1] / "0.png", (64, 64), 99)
    os.utime(folders[1] / "0.png", ns=(1, 1))
    assert encoded() == 2  # the two squares share a shard
    # nothing out of date is left
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_small_areas_come_first(model, folders, tmp_path):
    pairs = find_pairs(folders[0])[:2]
    data = load_pairs(model, pairs, tmp_path / "cache", areas=[AREA, 32 * 32], phase_steps=5)
    sizes = [data.batch(step, 0, 1)["target"].shape[-1] for step in range(30)]
    assert set(sizes[:5]) == {4} and set(sizes[5:]) == {4, 8}


def test_a_damaged_picture_is_named(model, folders, tmp_path):
    (folders[0] / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png cannot be read as a picture"):
        load_pairs(model, find_pairs(*folders), tmp_path / "cache", areas=[AREA])

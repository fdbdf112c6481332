"""A picture carries what made it; the record is checked when read; the same run writes the same bytes."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from kontext_core import images, record
from kontext_core.record import Record, Stamp


def example(**changes) -> Record:
    values = {
        "action": "edit",
        "prompts": ("make the circle “rot” 赤",),
        "settings": {"seed": 3, "steps": 4, "guidance": 2.5, "size": [128, 96], "few_step": None},
        "inputs": (Stamp(role="picture", name="in.png", size=3, digest="sha256:0"),),
        "weights": (Stamp(role="transformer", name="t.safetensors", size=9, digest="sha256:1"),),
        "versions": {"kontext": "0.1.0", "torch": "2"},
    }
    return Record(**{**values, **changes})


def test_a_record_survives_the_picture(tmp_path):
    image = torch.rand(1, 3, 9, 7) * 2 - 1
    written = example(pixels=record.pixel_digest(image))
    record.save_with_record(tmp_path / "a.png", image, written)
    assert record.load_record(tmp_path / "a.png") == written
    record.save_with_record(tmp_path / "b.png", image, written)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_changed_picture_or_none_with_a_record_is_refused(tmp_path):
    image = torch.zeros(1, 3, 9, 7)
    path = tmp_path / "a.png"
    record.save_with_record(path, image + 0.5, example(pixels=record.pixel_digest(image)))
    with pytest.raises(ValueError, match=r"a\.png was changed after"):
        record.load_record(path)
    images.save_image(path, image)
    with pytest.raises(ValueError, match="holds no record"):
        record.load_record(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("settings"), "should have the fields"),
        (lambda d: d.update(extra=1), "should have the fields"),
        (lambda d: d.update(prompts="one"), "prompts is of the wrong type"),
        (lambda d: d.update(prompts=[1]), "prompts are not all text"),
        (lambda d: d["weights"][0].pop("digest"), "weights of the record should have"),
        (lambda d: d["inputs"][0].update(size="3"), "size is of the wrong type"),
        (lambda d: d.update(format=99), "format 99; this version reads up to 1"),
        (lambda d: d.pop("format"), "no format number"),
    ],
)
def test_a_damaged_record_is_refused_by_the_field(change, words):
    data = json.loads(example().to_json())
    change(data)
    with pytest.raises(ValueError, match=words):
        Record.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"'])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ValueError, match=r"not JSON|no format number"):
        Record.from_json(text)


def test_a_stamp_is_the_sha256_of_the_file_and_follows_its_changes(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"one")
    first = record.stamp("transformer", path)
    assert first == Stamp(
        role="transformer",
        name="w.safetensors",
        size=3,
        digest="sha256:" + hashlib.sha256(b"one").hexdigest(),
    )
    path.write_bytes(b"three")
    assert record.stamp("transformer", path).digest == "sha256:" + hashlib.sha256(b"three").hexdigest()


def test_a_large_file_is_sampled_from_its_first_byte_to_its_last(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SAMPLED_FROM", 1000)
    monkeypatch.setattr(record, "SAMPLE", 10)
    path = tmp_path / "w.gguf"
    digests = set()
    for place in (0, 1995, 2000):  # the first and the last byte count, as does the size
        data = bytearray(2000)
        if place < 2000:
            data[place] = 1
        path.write_bytes(data)
        digests.add(record.stamp("transformer", path).digest)
    assert len(digests) == 3 and all(d.startswith("sampled:") for d in digests)


def test_pictures_are_stamped_by_their_pixels():
    image = torch.rand(1, 3, 9, 7) * 2 - 1
    again = record.stamp_picture("picture", "b.jpg", image + 1e-6)
    assert record.stamp_picture("picture", "a.png", image).digest == again.digest
    assert record.pixel_digest(image) != record.pixel_digest(image.transpose(2, 3))


def test_differences_name_every_cause():
    assert record.differences(example(), example()) == []
    other = example(
        prompts=("other",),
        settings={**example().settings, "seed": 4},
        versions={"kontext": "0.1.0", "torch": "3"},
        weights=(),
    )
    found = "\n".join(record.differences(example(), other))
    assert "prompts: " in found and "seed is 3 and 4" in found and "torch is '2' and '3'" in found
    assert "transformer t.safetensors is sha256:1 and absent" in found


def test_versions_name_no_machine():
    versions = record.current_versions(dtype=torch.bfloat16)
    assert versions["dtype"] == "bfloat16" and versions["device"] == "cpu"
    assert set(versions) == {"kontext", "python", "torch", "device", "dtype", "platform"}

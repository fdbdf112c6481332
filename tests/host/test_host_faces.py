"""Kontext Face Similarity in a real ComfyUI, on the random face network of the fixtures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

NETWORK = "glintr100.onnx"


def workflow(host, **changes) -> dict:
    pixels = np.random.default_rng(1).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    first = host.upload(Image.fromarray(pixels), "face.png")
    second = host.upload(Image.fromarray(255 - pixels), "negative.png")
    values = {"reference": ["a", 0], "image": ["both", 0], "detector": "whole picture", **changes}
    return {
        "a": {"class_type": "LoadImage", "inputs": {"image": first}},
        "b": {"class_type": "LoadImage", "inputs": {"image": second}},
        "both": {"class_type": "ImageBatch", "inputs": {"image1": ["a", 0], "image2": ["b", 0]}},
        "faces": {"class_type": "KontextFaceSimilarity", "inputs": values},
        "mean": {"class_type": "PreviewAny", "inputs": {"source": ["faces", 0]}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["faces", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["faces", 1], "filename_prefix": "faces"}},
    }


def test_a_picture_is_like_itself_and_its_negative_is_the_opposite(host):
    run = host.run(workflow(host, embedder=NETWORK))
    outputs = run.history["outputs"]
    # a bias-free layer turns the negative of [-1, 1] into the negative of its numbers
    assert outputs["report"]["text"][0] == "1. similarity 1.000\n2. similarity -1.000"
    assert float(outputs["mean"]["text"][0]) == pytest.approx(0, abs=1e-4)
    assert len(outputs["save"]["images"]) == 3


def test_a_detector_of_another_kind_is_an_error_in_words(host):
    assert "choose face_detection_yunet" in host.error(workflow(host, embedder=NETWORK, detector=NETWORK))

"""What the comparison says of diffusers, in the installed one; the host's side: tests/host/test_host_nodes.py."""

from __future__ import annotations

import inspect
import re

import pytest

import dev

TEXTS = [dev.ROOT / "README.md", dev.ROOT / "docs" / "comparison.md"]
diffusers = pytest.importorskip("diffusers")


def test_the_pipelines_that_are_named_are_there():
    named = set(
        re.findall(r"`(Flux\w+Pipeline)`", "".join(text.read_text(encoding="utf-8") for text in TEXTS))
    )
    assert {"FluxKontextPipeline", "FluxKontextInpaintPipeline"} <= named
    for name in named:
        assert hasattr(diffusers, name), f"{name} is not in diffusers {diffusers.__version__}"


def test_512_tokens_are_diffusers_default():
    call = inspect.signature(diffusers.FluxKontextPipeline.__call__)
    assert call.parameters["max_sequence_length"].default == 512


def test_diffusers_takes_one_picture_an_edit():
    """A list of pictures is a batch: no input places a second picture beside the first."""
    names = set(inspect.signature(diffusers.FluxKontextPipeline.__call__).parameters)
    assert "image" in names
    assert not names & {"images", "reference_images", "image_2", "image_embeds_2", "reference_latents"}


def test_every_test_that_is_named_exists():
    for text in TEXTS:
        for name in re.findall(r"`(tests/[\w/.]+)`", text.read_text(encoding="utf-8")):
            assert (dev.ROOT / name).exists(), f"{text.name} names {name}"

"""What `python dev.py demo` queues, on the bundled model: a person would see the edit, and nothing else changed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dev
from kontext_core.edit import edit_image
from kontext_core.images import load_image, to_uint8
from kontext_core.tiny import world
from kontext_core.weights.load import load_model
from kontext_core.weights.locate import BUNDLED

WORKFLOW = Path(dev.ROOT) / "workflows" / "api" / "local_edit.json"

pytestmark = pytest.mark.skipif(
    not (BUNDLED["kontext-tiny"] / "ae.safetensors").is_file(),
    reason="kontext-tiny is not bundled in this checkout",
)


@pytest.fixture(scope="module")
def truth() -> world.Example:
    """The example whose picture the workflow edits; its instruction is the workflow's in other words."""
    return world.example("test", "local", 12)


@pytest.fixture(scope="module")
def run(host):
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    return host.run(workflow)


@pytest.fixture(scope="module")
def edited(host, run) -> np.ndarray:
    (picture,) = host.pictures(run)
    return np.asarray(picture.convert("RGB"), float)


def test_the_workflow_edits_the_picture_that_ships_with_it(truth):
    shipped = Image.open(dev.ROOT / "workflows" / "input" / "toy_meadow.png").convert("RGB")
    assert np.array_equal(np.asarray(shipped), truth.context)


def test_what_was_asked_for_is_seen(edited, truth):
    inside = truth.change_mask
    to_target = np.abs(edited - truth.target)[inside].mean()
    to_context = np.abs(edited - truth.context)[inside].mean()
    assert to_target < to_context


def test_the_rest_stays(edited, truth):
    outside = ~truth.change_mask
    error = np.square(edited - truth.context)[outside].mean()
    # 30.4 dB when this was written; the autoencoder alone comes to about 33 dB.
    assert 10 * np.log10(255**2 / error) > 28


def test_the_node_gives_what_the_core_gives(edited):
    inputs = json.loads(WORKFLOW.read_text(encoding="utf-8"))["5"]["inputs"]
    picture = load_image(dev.ROOT / "workflows" / "input" / "toy_meadow.png")
    result = edit_image(
        load_model("kontext-tiny", dtype=torch.float32),
        picture.image,
        inputs["prompt"],
        num_steps=inputs["steps"],
        guidance=inputs["guidance"],
        seed=inputs["seed"],
    )
    core = to_uint8(result.images)[0].movedim(0, -1).numpy().astype(float)
    # The host saves by cutting off where the core rounds: one level, and the rounding of 28 float32 steps.
    assert np.abs(edited - core).max() <= 2


def test_previews_show_true_colours(run, edited):
    """The last preview is what the edit looks like, an eighth of its size and rounded by JPEG."""
    shown = Image.open(io.BytesIO(run.previews[-1])).convert("RGB")
    small = np.asarray(shown.resize((16, 16), Image.Resampling.BOX), float)
    true = np.asarray(Image.fromarray(edited.astype(np.uint8)).resize((16, 16), Image.Resampling.BOX), float)
    assert np.abs(small - true).mean() < 25

"""What a token counts in training: what an edit changes, and what stands in a new picture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kontext_core.tiny import world
from kontext_core.tiny.encode import SCENERY, drawn_weights
from kontext_core.tiny.render import mask_of
from kontext_core.tiny.scene import Scene

SIZES = [(128, 128), (160, 96)]


def scenes(category: str) -> Iterator[Scene]:
    return (world.plan("val", category, index).truth.after for index in range(6))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("category", ["style", "character", "generate", "text"])
def test_things_count_whole_and_scenery_a_quarter(category, size):
    w, h = size
    for scene in scenes(category):
        weights = drawn_weights(scene, size).reshape(h // 16, w // 16).float() / 255
        parts = [*scene.things, *(part for part in (scene.creature, scene.sign) if part is not None)]
        assert weights.min() >= SCENERY - 1 / 255
        for part in parts:
            mask = torch.from_numpy(mask_of(part, size)).reshape(h // 16, 16, w // 16, 16).mean((1, 3))
            assert (weights[mask > 0.3] == 1).all() and (mask > 0.3).any()
        masks = [torch.from_numpy(mask_of(part, size)) for part in parts]
        far = torch.stack(masks).amax(0).reshape(h // 16, 16, w // 16, 16).amax((1, 3)) == 0
        assert torch.allclose(weights[far], torch.tensor(SCENERY), atol=1 / 255)


def test_a_scene_of_nothing_else_is_all_scenery():
    weights = drawn_weights(Scene(background="beach"), (128, 128))
    assert weights.unique().tolist() == [round(255 * SCENERY)]

"""Labels of tokens name what is painted there."""

from __future__ import annotations

import numpy as np
import pytest

from kontext_core.tiny import world
from kontext_core.tiny.labels import CLASSES, PARTS, WHOLE, token_labels
from kontext_core.tiny.render import mask_of

FIELDS = list(CLASSES)


@pytest.mark.parametrize("size", [(128, 128), (160, 96)])
@pytest.mark.parametrize("category", world.CATEGORIES)
def test_labels_name_the_parts_of_the_scene(category: str, size: tuple[int, int]) -> None:
    for index in range(6):
        scene = world.plan("val", category, index).truth.after
        labels = token_labels(scene, size)
        assert labels.shape == (size[0] * size[1] // 256, len(FIELDS)) and labels.dtype == np.uint8
        assert (labels < np.array(list(CLASSES.values()))).all()
        for field in WHOLE:
            values = set(labels[:, FIELDS.index(field)])
            assert len(values) == 1, field
        shapes = {PARTS["shape"][k - 1] for k in labels[:, FIELDS.index("shape")] if k}
        assert shapes <= {thing.shape for thing in scene.things}
        letters = {PARTS["letter"][k - 1] for k in labels[:, FIELDS.index("letter")] if k}
        word = set(scene.sign.word if scene.sign else "")
        # in a small picture letters are narrower than a token, which can name but one of two
        assert letters == word if min(size) >= 128 else letters <= word and bool(letters) == bool(word)


def test_a_label_lies_where_the_thing_is_painted() -> None:
    found = 0
    for index in range(20):
        scene = world.plan("val", "local", index).truth.after
        labels = token_labels(scene).reshape(8, 8, -1)
        if len(scene.things) != 1:
            continue
        thing = scene.things[0]
        share = mask_of(thing).reshape(8, 16, 8, 16).mean((1, 3))
        marked = labels[..., FIELDS.index("shape")] > 0
        assert marked[share > 0.6].all(), "a token full of the thing has no label"
        assert share[marked].mean() > 3 * share[~marked].mean()
        found += 1
    for index in range(20):
        scene = world.plan("val", "character", index).truth.after
        assert scene.creature is not None
        share = mask_of(scene.creature).reshape(8, 16, 8, 16).mean((1, 3))
        marked = token_labels(scene).reshape(8, 8, -1)[..., FIELDS.index("body")] > 0
        assert marked[share > 0.7].all()
        assert share[marked].mean() > 3 * share[~marked].mean()
        found += 1
    assert found >= 20


def test_a_side_that_is_no_multiple_of_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        token_labels(world.plan("val", "local", 0).truth.after, (130, 128))

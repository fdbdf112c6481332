"""Ways side by side, with editors whose answers are known: shares, distances, and who wins for sure."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kontext_core.tiny import world
from kontext_core.tiny.contest import compete, goals, table
from kontext_core.tiny.world import Example

MANY = ("teacher", 28)


@lru_cache(maxsize=2)
def examples(category: str, count: int = 12) -> list[Example]:
    return [world.example("val", category, number) for number in range(count)]


def truth(items: list[Example]) -> list[np.ndarray]:
    return [item.target for item in items]


def blurred(items: list[Example]) -> list[np.ndarray]:
    blur = ImageFilter.GaussianBlur(2)
    return [np.asarray(Image.fromarray(item.target).filter(blur)) for item in items]


def every_other(items: list[Example]) -> list[np.ndarray]:
    return [item.context if item.index % 2 else item.target for item in items]


def test_unique_answers_have_shares_of_the_teacher_and_a_psnr():
    ways = {MANY: truth, ("ladd", 4): truth, ("ladd", 1): every_other}
    seen = []
    rows = compete(
        ways, examples("local"), first="ladd", reference=MANY, batch=5, on_way=lambda way: seen.append(way)
    )
    assert seen == list(ways) and [(row.name, row.num_steps) for row in rows] == seen
    teacher, four, one = rows
    assert teacher.both == four.both == 1 and teacher.psnr == 99 and four.of_reference.value == 1
    assert (
        one.both == one.of_reference.value == 0.5
        and 0 < one.of_reference.low < 0.5 < one.of_reference.high < 1
    )
    assert one.psnr < 99 and one.distance is None and one.first_nearer is None
    found = goals(rows, first="ladd", reference=MANY, least={4: 0.95, 1: 0.85}, scores={"local": 0.9})
    assert [(goal.met, goal.category) for goal in found] == [
        (True, "local"),
        (True, "local"),
        (False, "local"),
    ]
    # twelve of twelve leave 0.76 possible; six of twelve do not leave 0.85
    assert [goal.sure for goal in found] == [False, True, True]


@pytest.mark.parametrize("blurs", ["regression", "ladd"])
def test_where_there_are_many_answers_the_sharp_one_is_nearer_for_sure(blurs):
    editors = {name: blurred if name == blurs else truth for name in ("ladd", "regression")}
    rows = compete(
        {MANY: truth, **{(name, 1): editor for name, editor in editors.items()}, ("regression", 2): truth},
        examples("generate")[:6],
        first="ladd",
        reference=MANY,
    )
    teacher, ladd, regression, alone = rows
    assert teacher.distance.value == 0 and teacher.sharpness.value == 1 and teacher.psnr is None
    assert ladd.first_nearer is None and teacher.first_nearer is None and alone.first_sharper is None
    sign = 1 if blurs == "regression" else -1
    assert sign * regression.first_nearer.value > 0 and sign * regression.first_sharper.value > 0
    assert regression.first_nearer.value == pytest.approx(regression.distance.value - ladd.distance.value)
    assert regression.first_sharper.value == pytest.approx(ladd.sharpness.value - regression.sharpness.value)
    found = [
        goal for goal in goals(rows, first="ladd", reference=MANY, least={}, scores={}) if "than" in goal.goal
    ]
    assert [goal.goal for goal in found] == [
        f"ladd {what} than regression, 1 step" for what in ("nearer", "sharper")
    ]
    assert all(goal.sure and goal.met == (blurs == "regression") for goal in found)
    text = table(rows, "ladd")
    assert len(text.splitlines()) == 5 and "generate   regression" in text


def test_a_teacher_that_gets_nothing_right_has_no_shares():
    ways = {MANY: lambda items: [item.context for item in items], ("ladd", 4): truth}
    rows = compete(ways, examples("local")[:3], first="ladd", reference=MANY)
    assert [row.of_reference for row in rows] == [None, None]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="1 examples and a reference"):
        compete({MANY: truth}, examples("local")[:1], first="ladd", reference=MANY)
    with pytest.raises(ValueError, match="and a way"):
        compete({MANY: truth}, examples("local"), first="ladd", reference=("teacher", 4))

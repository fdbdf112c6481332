"""The scorer on pictures that are right, worn, unchanged, spoilt and wrong: every threshold shows its worth here.

Counts are small so that the suite stays quick; the shares that the larger runs of `bench` give are higher.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kontext_core.tiny import phrases, score_unique, world
from kontext_core.tiny.measures import preference, psnr, worst_tile
from kontext_core.tiny.render import render
from kontext_core.tiny.scene import BACKGROUNDS, BOARD_INKS, COLUMNS, PLACES, Scene, slot
from kontext_core.tiny.scorer import score
from kontext_core.tiny.world import Example

COUNT = {"local": 16, "global": 16, "text": 16, "style": 8, "character": 8, "generate": 8}
EDITS = world.EDIT_CATEGORIES


@lru_cache(maxsize=1)
def items() -> dict[str, list[Example]]:
    return {name: [world.example("val", name, k) for k in range(count)] for name, count in COUNT.items()}


def shares(category: str, answer: Callable[[Example], np.ndarray]) -> tuple[float, float, float]:
    """(done, kept, both) of an answer over a category."""
    scores = [score(item, answer(item)) for item in items()[category]]
    return tuple(float(np.mean([getattr(s, name) for s in scores])) for name in ("done", "kept", "both"))


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(picture: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.Generator(np.random.PCG64(0)).normal(0, 255 * sigma, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def like_an_autoencoder(picture: np.ndarray) -> np.ndarray:
    """About 31 dB: soft edges, blocks of 8 pixels, a little noise."""
    return noisy(jpeg(blur(picture, 0.4), 88), 0.01)


def drawn(scene: Scene) -> np.ndarray:
    return render(scene)


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_the_truth_is_done_and_kept(category: str) -> None:
    assert shares(category, lambda item: item.target)[2] >= 1 - 1 / COUNT[category]


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_a_truth_as_an_autoencoder_gives_it_back_still_passes(category: str) -> None:
    assert shares(category, lambda item: like_an_autoencoder(item.target))[2] >= 0.85


@pytest.mark.parametrize("category", EDITS)
def test_an_unchanged_picture_is_not_done(category: str) -> None:
    done, kept, both = shares(category, lambda item: item.context)
    assert done == both == 0
    if category in ("local", "text", "style"):
        assert kept >= 0.85  # a picture has its own look and is its own background


@pytest.mark.parametrize("category", world.CATEGORIES)
@pytest.mark.parametrize("spoil", ["blur", "black", "noise", "other"])
def test_a_spoilt_picture_fails(category: str, spoil: str) -> None:
    others = items()["generate"][0].target
    answers = {
        "blur": lambda item: blur(item.target, 5),
        "black": lambda item: item.target * 0,
        "noise": lambda item: noisy(item.target, 0.35),
        "other": lambda item: others if category != "generate" else items()["local"][item.index].target,
    }
    # dots and hatches are grainy themselves, so noise hides in a few styles
    assert shares(category, answers[spoil])[2] <= (0.3 if (category, spoil) == ("style", "noise") else 0.13)


@pytest.mark.parametrize("category", ["local", "text"])
def test_half_a_change_is_not_done(category: str) -> None:
    def halfway(item: Example) -> np.ndarray:
        return ((item.context.astype(int) + item.target) // 2).astype(np.uint8)

    assert shares(category, halfway)[0] <= 0.1


def test_another_colour_another_shape_and_another_place_are_not_done() -> None:
    for item in items()["local"]:
        index = score_unique.edited_thing(item)
        if index is None:
            continue
        scene = item.truth.after
        others = list(score_unique.other_things(scene, index))
        thing = scene.things[index]
        free = [x for x in COLUMNS if abs(x - thing.x) > 0.2]
        others.append(scene.with_thing(index, x=free[0]))
        wrong = [score(item, drawn(other)).done for other in others]
        assert not any(wrong), item.instruction


def test_a_second_change_is_not_kept() -> None:
    for item in items()["local"]:
        edited, scene = score_unique.edited_thing(item), item.truth.after
        bystanders = [k for k in range(len(scene.things)) if k != edited]
        for index in bystanders:
            colour = "blue" if scene.things[index].colour != "blue" else "red"
            result = score(item, drawn(scene.with_thing(index, colour=colour)))
            assert result.done and not result.kept, item.instruction
            assert not score(item, drawn(scene.without_thing(index))).kept


def test_another_setting_is_not_done() -> None:
    for item in items()["global"]:
        for other in score_unique.other_settings(item.kind, item.truth.after):
            assert not score(item, drawn(other)).done, item.instruction


def test_a_thing_lost_or_recoloured_by_a_global_edit_is_not_kept() -> None:
    for item in items()["global"]:
        scene = item.truth.after
        assert not score(item, drawn(scene.without_thing(0))).kept, item.instruction
        if scene.grade == "none":
            colour = "blue" if scene.things[0].colour not in ("blue", "purple") else "yellow"
            assert not score(item, drawn(scene.with_thing(0, colour=colour))).kept, item.instruction


def test_a_word_with_one_letter_wrong_is_not_done() -> None:
    for item in items()["text"]:
        scene = item.truth.after
        for position in range(len(scene.sign.word)):
            letter = "X" if scene.sign.word[position] != "X" else "O"
            word = scene.sign.word[:position] + letter + scene.sign.word[position + 1 :]
            assert not score(item, drawn(replace(scene, sign=replace(scene.sign, word=word)))).done
        longer = replace(scene.sign, word=scene.sign.word + "N")
        assert not score(item, drawn(replace(scene, sign=longer))).done


def test_a_word_in_another_ink_is_not_done() -> None:
    for item in items()["text"]:
        sign = item.truth.after.sign
        for ink in BOARD_INKS[sign.board]:
            if ink != sign.ink:
                wrong = replace(item.truth.after, sign=replace(sign, ink=ink))
                assert not score(item, drawn(wrong)).done, item.instruction


def moved(item: Example) -> Scene:
    """The target with another layout: mirrored, the horizon elsewhere, unplaced things on other places."""
    scene = item.truth.after
    things = []
    taken: set[str] = set()
    for thing in scene.things:
        places = phrases.places_named(item.instruction, thing) or list(PLACES)
        free = [p for p in places if p not in taken and PLACES[p][1] == thing.air]
        place = free[-1] if free else thing.place
        taken.add(place)
        x, y, _ = slot(place)
        things.append(replace(thing, x=x + 0.015, y=y - 0.01))
    return replace(scene, things=tuple(things), mirror=not scene.mirror, horizon=0.61)


@pytest.mark.parametrize("category", ["style", "generate"])
def test_another_layout_is_as_right(category: str) -> None:
    chosen = [item for item in items()[category] if item.truth.after.sign is None]
    right = [score(item, drawn(moved(item))).both for item in chosen if item.truth.after.creature is None]
    assert len(right) >= 4 and np.mean(right) >= 0.8


def test_another_look_is_not_kept_and_a_missing_or_other_thing_not_done() -> None:
    for item in items()["style"]:
        scene = item.truth.after
        for name in ("flat", "mosaic", "neon", "halftone"):
            if name != scene.look.name:
                result = score(item, drawn(replace(scene, look=replace(scene.look, name=name))))
                assert not result.kept, (item.instruction, name)
        assert not score(item, drawn(scene.without_thing(0))).done
        shape = "kite" if scene.things[0].air else "car"
        if scene.things[0].shape != shape:
            assert not score(item, drawn(scene.with_thing(0, shape=shape))).done
        background = BACKGROUNDS[BACKGROUNDS.index(scene.background) - 1]
        assert not score(item, drawn(replace(scene, background=background))).done


def test_another_part_is_not_kept_and_another_pose_not_done() -> None:
    for item in items()["character"][:5]:
        scene = item.truth.after
        creature = scene.creature
        others = {
            "body": "tall" if creature.body != "tall" else "round",
            "eyes": "one eye" if creature.eyes != "one eye" else "three eyes",
            "top": "horns" if creature.top != "horns" else "bunny ears",
            "wear": "scarf" if creature.wear != "scarf" else "nothing",
            "colour": "green" if creature.colour != "green" else "orange",
        }
        for part, value in others.items():
            wrong = replace(scene, creature=replace(creature, **{part: value}))
            assert not score(item, drawn(wrong)).kept, (part, value, creature)
        pose = "jumping" if creature.pose != "jumping" else "standing"
        assert not score(item, drawn(replace(scene, creature=replace(creature, pose=pose)))).done
        background = BACKGROUNDS[BACKGROUNDS.index(scene.background) - 1]
        assert not score(item, drawn(replace(scene, background=background))).done


def test_a_character_may_stand_anywhere() -> None:
    scores = []
    for item in items()["character"]:
        scene = item.truth.after
        if scene.things:
            continue
        x = 0.375 if scene.creature.x > 0.4 else 0.625
        scores.append(score(item, drawn(replace(scene, creature=replace(scene.creature, x=x + 0.03)))).both)
    assert scores and np.mean(scores) >= 0.8


def test_float_pictures_are_scored_as_bytes_are() -> None:
    item = items()["local"][0]
    assert score(item, item.target.astype(np.float32) / 255).both


def test_a_picture_of_another_shape_or_range_is_refused() -> None:
    item = items()["local"][0]
    with pytest.raises(ValueError, match=r"shape is \(64, 64, 3\), but must be \(128, 128, 3\)"):
        score(item, np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"floats must be in \[0, 1\]"):
        score(item, item.target.astype(np.float32))
    with pytest.raises(ValueError, match=r"dtype is int64"):
        score(item, item.target.astype(np.int64))


def test_measures_mean_what_they_say() -> None:
    black, grey = np.zeros((32, 32, 3), np.float32), np.full((32, 32, 3), 0.1, np.float32)
    everywhere = np.ones((32, 32), bool)
    assert psnr(black, grey) == pytest.approx(20.0, abs=1e-4)
    spot = black.copy()
    spot[:16, :16] = 0.1
    assert worst_tile(black, spot, everywhere, 16) == pytest.approx(20.0, abs=1e-4)
    assert preference(black, black, grey) == 1.0 and preference(grey, black, grey) == -1.0


@pytest.mark.parametrize("size", [(96, 96), (160, 96), (192, 192)])
def test_other_sizes_are_scored_alike(size: tuple[int, int]) -> None:
    for category in world.CATEGORIES:
        right = [world.example("val", category, index, size) for index in (2, 3)]
        assert all(score(item, item.target).both for item in right), category
        assert not any(score(item, item.context).done for item in right if item.context is not None)

"""A picture that is fitted, encoded, decoded and brought back, the transformer left out: its size, and no shift.

The bundled autoencoder stands for the published one. It keeps a picture to about 31 dB, so the shift is measured by
registration, which looks at the whole picture, on pictures of the kind it knows (and not where a crop gave the
original back).
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from kontext_core import geometry
from kontext_core.geometry import POLICIES
from kontext_core.registration import match
from kontext_core.tiny import world
from kontext_core.weights.load import load_autoencoder
from kontext_core.weights.locate import BUNDLED

FILE = BUNDLED["kontext-tiny"] / "ae.safetensors"
AREA = 128 * 128
MAX_SHIFT = 0.1  # pixels of the input, and of the canvas where that is larger

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="kontext-tiny's autoencoder is not there")


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(FILE, dtype=torch.float32)


def picture(size: tuple[int, int], number: int) -> torch.Tensor:
    """A scene of the synthetic world, drawn at this size: (1,3,H,W) in [-1,1]."""
    pixels = world.example("test", "local", number, size).context
    return torch.from_numpy(pixels.copy()).movedim(-1, 0)[None].float() / 127.5 - 1


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Random (width, height): aspect ratios up to 3:1 either way, from half to twice the model's own area."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        aspect = math.exp(rng.uniform(-math.log(3), math.log(3)))
        side = rng.uniform(90, 180)
        found.append((round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))))
    return found


def worst_shift(autoencoder, policy: str, all_sizes: list[tuple[int, int]]) -> float:
    """Pixels by which a picture moved at most, of the input or of the canvas, whichever are more."""
    worst = 0.0
    for number, size in enumerate(all_sizes):
        plan = geometry.fit(size, policy, max_area=AREA)
        before = picture(size, number)
        canvas = geometry.apply(plan, before)
        with torch.inference_mode():
            decoded = autoencoder.decode(autoencoder.encode(canvas)).clamp(-1, 1)
        after = geometry.invert(plan, decoded, original=before)
        assert after.shape == before.shape
        assert after.data_ptr() != before.data_ptr()
        x, y, w, h = plan.window
        one, two = (t[0, :, y : y + h, x : x + w] / 2 + 0.5 for t in (before, after))
        assert not torch.equal(one, two), f"{policy} {size}: the input itself came back"
        found = match(one, two)
        # A measure that could not see the shift that is refused would say nothing.
        assert found.reliable and max(found.error) < MAX_SHIFT, f"{policy} {size}: {found.report()}"
        moved = max(abs(shift) * max(1, scale) for shift, scale in zip(found.shift, plan.scale, strict=True))
        if moved >= MAX_SHIFT:
            print(f"{policy} {size}, scene {number}: moved by {moved:.3f}")
        worst = max(worst, moved)
    return worst


@pytest.mark.parametrize("policy", POLICIES)
def test_sizes_come_back_through_the_autoencoder_without_a_shift(autoencoder, policy):
    assert worst_shift(autoencoder, policy, sizes(6, seed=1)) < MAX_SHIFT


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_hundred_sizes_come_back_through_the_autoencoder_without_a_shift(autoencoder, policy):
    assert worst_shift(autoencoder, policy, sizes(100, seed=2)) < MAX_SHIFT


def test_the_measure_sees_a_tenth_of_a_pixel_through_the_autoencoder(autoencoder):
    before = picture((128, 128), 3)
    with torch.inference_mode():
        after = autoencoder.decode(autoencoder.encode(before)).clamp(-1, 1)
    moved = geometry.resample_axis(after, -1, 128, start=-0.2, step=1.0)
    first, second = (match(before[0] / 2 + 0.5, t[0] / 2 + 0.5).shift[0] for t in (after, moved))
    assert second - first == pytest.approx(0.2, abs=0.03)

"""Ways of making pictures side by side: the same requests, scored one by one and as a distribution.

- Scores: done, kept and both, and `both` as a share of the teacher's many steps, paired by request.
- Where the answer is unique (local, global, text): PSNR to it.
- Where it is not (style, character, generate): the distance of patch statistics from the truth's
  (`evaluation.distance`), the sharpness as a share of the truth's, and how much nearer and sharper the first way is
  at as many steps.

Intervals are 95 % bootstrap intervals over requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..evaluation.distance import Interval, compare, mean_share, sharpness
from .bench import Editor, interval
from .measures import as_floats, psnr
from .scorer import Score, score
from .world import OPEN, Example

TRUTH = "autoencoder"
"""The way that only encodes and decodes the truth: no model can be expected to be nearer."""

Way = tuple[str, int]
"""A name and its number of steps; 0 for what takes none."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one way in one category.

    Attributes:
        count: requests; done, kept, both: shares of them.
        of_reference: `both` as a share of the reference's; None where that is 0.
        psnr: mean in dB to the only right answer; None where there are many.
        distance: from the truth's distribution; sharpness: as a share of the truth's; None where the answer is unique.
        first_nearer, first_sharper: by how much the first way at as many steps is nearer to the truth and sharper;
            above 0 where it is. None for itself.
    """

    category: str
    name: str
    num_steps: int
    count: int
    done: float
    kept: float
    both: float
    of_reference: Interval | None = None
    psnr: float | None = None
    distance: Interval | None = None
    sharpness: Interval | None = None
    first_nearer: Interval | None = None
    first_sharper: Interval | None = None


def compete(
    ways: dict[Way, Editor],
    examples: Sequence[Example],
    *,
    first: str,
    reference: Way,
    batch: int = 16,
    on_way: Callable[[Way], None] | None = None,
) -> list[Row]:
    """Every way on the same examples of one category.

    Args:
        ways: (name, steps) -> what makes the pictures, as `bench.run_bench` takes it.
        first: name of the way that is compared with all others of as many steps.
        reference: the way whose `both` the others' is a share of.
        on_way: called after each way.

    Raises:
        ValueError: fewer than two examples, or the reference is no way.
    """
    if len(examples) < 2 or reference not in ways:
        raise ValueError(f"{len(examples)} examples and a reference {reference}: give two or more, and a way")
    category = examples[0].category
    pictures: dict[Way, list[np.ndarray]] = {}
    scores: dict[Way, list[Score]] = {}
    for way, editor in ways.items():
        pictures[way] = [
            picture
            for start in range(0, len(examples), batch)
            for picture in editor(list(examples[start : start + batch]))
        ]
        scores[way] = [score(item, made) for item, made in zip(examples, pictures[way], strict=True)]
        if on_way is not None:
            on_way(way)
    whole = {way: torch.tensor([one.both for one in found]).float() for way, found in scores.items()}
    looks = _looks(pictures, examples, first) if category in OPEN else {}
    rows = []
    for way, found in scores.items():
        shares = {key: float(np.mean([getattr(one, key) for one in found])) for key in ("done", "kept")}
        fidelity = None
        if category not in OPEN:
            truths = [as_floats(item.target) for item in examples]
            made = [as_floats(picture) for picture in pictures[way]]
            fidelity = float(np.mean([psnr(*pair) for pair in zip(made, truths, strict=True)]))
        rows.append(
            Row(
                category=category,
                name=way[0],
                num_steps=way[1],
                count=len(examples),
                both=float(whole[way].mean()),
                of_reference=mean_share(whole[way], whole[reference]) if whole[reference].any() else None,
                psnr=fidelity,
                **shares,
                **looks.get(way, {}),
            )
        )
    return rows


def _looks(
    pictures: dict[Way, list[np.ndarray]], examples: Sequence[Example], first: str
) -> dict[Way, dict[str, Interval | None]]:
    """Distance and sharpness of each way, and the first one's lead at as many steps."""
    truth = _stacked([item.target for item in examples])
    sets = {way: _stacked(made) for way, made in pictures.items()}
    sharp, sharp_truth = {way: sharpness(images) for way, images in sets.items()}, sharpness(truth)
    leaders = {way: (first, way[1]) for way in sets if way[0] != first and (first, way[1]) in sets}
    result = compare(
        {str(way): images for way, images in sets.items()},
        truth,
        rivals={str(way): str(leader) for way, leader in leaders.items()},
    )
    return {
        way: {
            "distance": result.distances[str(way)],
            "sharpness": mean_share(sharp[way], sharp_truth),
            "first_nearer": result.nearer.get(str(way)),
            "first_sharper": mean_share(sharp[leaders[way]], sharp_truth, sharp[way])
            if way in leaders
            else None,
        }
        for way in sets
    }


def _stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack([as_floats(picture) for picture in pictures])).permute(0, 3, 1, 2)


def table(rows: Sequence[Row], first: str) -> str:
    """All rows as text, one a line."""
    heads = ("of teacher", "distance", f"{first} nearer by", "sharpness", f"{first} sharper by")
    lines = [
        f"{'':10} {'':12} {'steps':>5} {'count':>5} {'done':>6} {'kept':>6} {'both':>6} {'PSNR':>5}  "
        + " ".join(f"{head:24}" for head in heads).rstrip()
    ]
    for row in rows:
        intervals = (row.of_reference, row.distance, row.first_nearer, row.sharpness, row.first_sharper)
        lines.append(
            f"{row.category:10} {row.name:12} {row.num_steps:5} {row.count:5} {row.done:6.3f} {row.kept:6.3f} "
            f"{row.both:6.3f} {'-' if row.psnr is None else f'{row.psnr:.1f}':>5}  "
            + " ".join(f"{_short(interval):24}" for interval in intervals).rstrip()
        )
    return "\n".join(lines)


def _short(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A goal, what was found, and whether it was met: by the value itself, and whether by the whole interval."""

    goal: str
    category: str
    found: Interval
    met: bool
    sure: bool

    def __str__(self) -> str:
        answer = ("yes" if self.met else "no") + ("" if self.sure else ", but the interval holds both")
        return f"{self.category:10} {self.goal:44} {_short(self.found):24} {answer}"


def goals(
    rows: Sequence[Row], *, first: str, reference: Way, least: dict[int, float], scores: dict[str, float]
) -> list[Goal]:
    """What the rows say of the reference and of the first way.

    Args:
        least: steps -> the share of the reference's `both` that is asked of the first way.
        scores: category -> the `both` that is asked of the reference.
    """
    found = []
    for row in rows:
        if (row.name, row.num_steps) == reference and row.category in scores:
            bound = scores[row.category]
            low, high = interval(round(row.both * row.count), row.count)
            text = f"{row.name}, {_steps(row.num_steps)}: {bound:.2f} done and kept"
            found.append(_goal(text, row.category, Interval(value=row.both, low=low, high=high), bound))
        if row.name == first and row.num_steps in least and row.of_reference is not None:
            bound = least[row.num_steps]
            text = f"{first}, {_steps(row.num_steps)}: {bound:.2f} of the {reference[0]}'s"
            found.append(_goal(text, row.category, row.of_reference, bound))
        for what, lead in (("nearer", row.first_nearer), ("sharper", row.first_sharper)):
            if lead is not None and row.name != TRUTH:
                text = f"{first} {what} than {row.name}, {_steps(row.num_steps)}"
                found.append(_goal(text, row.category, lead, 0.0))
    return found


def _goal(text: str, category: str, found: Interval, bound: float) -> Goal:
    sure = found.low >= bound or found.high < bound
    return Goal(goal=text, category=category, found=found, met=found.value >= bound, sure=sure)


def _steps(number: int) -> str:
    return f"{number} step" + ("" if number == 1 else "s")

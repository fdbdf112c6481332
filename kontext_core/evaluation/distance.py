"""How far two sets of pictures are apart as distributions, and how sharp they are: deterministic, with intervals.

`PatchSketch` describes a set: at each level of a Laplacian pyramid, patches are projected on fixed random directions,
and every picture keeps a histogram of each projection. The sliced Wasserstein distance of two sets is the mean over
directions of the area between the two cumulative distributions; bootstrapping over pictures only re-adds histograms.
Pictures or latents, any number of channels. Source: arXiv 1710.10196 section 5 (patches of a Laplacian pyramid).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 128
REACH = (
    5.0  # the histograms' range, in standard deviations of the truth; what lies beyond falls in the last bin
)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, kw_only=True)
class PatchSpace:
    """Where patches are compared: directions and scales by pyramid level, made from the truth.

    Attributes:
        directions: (K, C·patch²) a level, scaled so that the truth's projections have standard deviation 1.
        centers: (K,) a level, the truth's means.
    """

    directions: tuple[Tensor, ...]
    centers: tuple[Tensor, ...]


def patch_space(
    truth: Tensor, *, levels: int = 3, patch: int = 3, num_directions: int = 64, seed: int = 0
) -> PatchSpace:
    """The space in which sets are compared with `truth` (B, C, H, W).

    Raises:
        ValueError: fewer than two pictures, or too small for the patch at the coarsest level.
    """
    if len(truth) < 2:
        raise ValueError(f"{len(truth)} picture(s) make no distribution: give two or more")
    if min(truth.shape[-2:]) // 2 ** (levels - 1) < patch:
        raise ValueError(
            f"pictures of {truth.shape[3]}x{truth.shape[2]} are too small for {levels} levels of {patch}x{patch} "
            "patches: use fewer levels"
        )
    generator = torch.Generator().manual_seed(seed)
    directions, centers = [], []
    few = truth[:: max(1, len(truth) // 64)]  # enough for the scale of a direction
    for level in _pyramid(few, levels):
        raw = torch.randn(num_directions, level.shape[1], patch, patch, generator=generator)
        raw = raw / raw.flatten(1).norm(dim=1)[:, None, None, None]
        values = F.conv2d(level, raw).transpose(0, 1).flatten(1)
        scale = values.std(dim=1).clamp(min=1e-6)
        directions.append(raw / scale[:, None, None, None])
        centers.append(values.mean(dim=1) / scale)
    return PatchSpace(directions=tuple(directions), centers=tuple(centers))


def _pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Laplacian levels, finest first; the last is what is left of the picture."""
    x, made = images.float(), []
    for _ in range(levels - 1):
        small = F.avg_pool2d(x, 2)
        made.append(x - F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False))
        x = small
    return [*made, x]


@torch.no_grad()
def histograms(space: PatchSpace, images: Tensor) -> Tensor:
    """Cumulative histograms (B, levels, K, BINS) of each picture's projected patches."""
    return torch.cat([_histograms(space, part) for part in images.split(16)])


def _histograms(space: PatchSpace, images: Tensor) -> Tensor:
    made = []
    for level, directions, centers in zip(
        _pyramid(images, len(space.directions)), space.directions, space.centers, strict=True
    ):
        values = F.conv2d(level, directions).flatten(2) - centers[:, None]  # (B, K, patches)
        cells = ((values / REACH + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        counts = torch.zeros(*values.shape[:2], BINS)
        counts.scatter_add_(2, cells, torch.ones_like(values))
        made.append(counts.cumsum(-1) / values.shape[-1])
    return torch.stack(made, dim=1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Sliced Wasserstein distance of mean cumulative histograms (..., levels, K, BINS), in the truth's deviations."""
    return (a - b).abs().sum(-1).mean((-1, -2)) * (2 * REACH / BINS)


def distance(space: PatchSpace, images: Tensor, truth: Tensor) -> float:
    """The sliced Wasserstein distance of two sets of pictures (B, C, H, W); 0 for equal ones."""
    return float(_distance(histograms(space, images).mean(0), histograms(space, truth).mean(0)))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Distances of several sets from the truth, and how much nearer others are.

    Attributes:
        distances: name -> distance from the truth.
        nearer: name -> (its distance − that of the set it is compared with): above 0 where the other one is nearer.
    """

    distances: dict[str, Interval]
    nearer: dict[str, Interval]


def compare(
    sets: dict[str, Tensor],
    truth: Tensor,
    *,
    rivals: dict[str, str] | None = None,
    levels: int = 3,
    patch: int = 3,
    resamples: int = 400,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Distances of sets from the truth with bootstrap intervals over pictures.

    Picture i of every set answers the same request as picture i of the truth; pictures are resampled together, so
    the differences are paired. An interval is the resamples' spread around the value itself: a resampled distance is
    larger than the sample's own by about the noise that the sample's already has, so their mean is left out of it.

    Args:
        rivals: name of a set -> name of the set it is compared with; all with the first one by default.

    Raises:
        ValueError: sets of other sizes than the truth, or no set.
    """
    if not sets or any(len(images) != len(truth) for images in sets.values()):
        sizes = {name: len(images) for name, images in sets.items()}
        raise ValueError(
            f"sets of {sizes} pictures for a truth of {len(truth)}: one picture a request is needed"
        )
    space = patch_space(truth, levels=levels, patch=patch, seed=seed)
    count = len(truth)
    rows = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, count).scatter_add_(1, rows, torch.ones(resamples, count)) / count
    weights = torch.cat((torch.full((1, count), 1 / count), weights))  # row 0 is the sample itself
    reference = histograms(space, truth).flatten(1)
    found = {}
    for name, images in sets.items():
        sketch = histograms(space, images).flatten(1)
        found[name] = torch.cat(
            [_chunk_distance(part, sketch, reference, space) for part in weights.split(50)]
        )
    first = next(iter(sets))
    rivals = {name: first for name in sets if name != first} if rivals is None else rivals
    return Comparison(
        distances={name: _interval(values, confidence) for name, values in found.items()},
        nearer={name: _interval(found[name] - found[other], confidence) for name, other in rivals.items()},
    )


def _chunk_distance(weights: Tensor, sketch: Tensor, reference: Tensor, space: PatchSpace) -> Tensor:
    shape = (len(weights), len(space.directions), len(space.centers[0]), BINS)
    return _distance((weights @ sketch).reshape(shape), (weights @ reference).reshape(shape))


def _interval(values: Tensor, confidence: float) -> Interval:
    """values[0] is the sample's own, the others are the resamples'."""
    tail = (1 - confidence) / 2
    around = values[1:] - values[1:].mean()
    low, high = torch.quantile(around, torch.tensor([tail, 1 - tail])).tolist()
    value = float(values[0])
    return Interval(value=value, low=value + low, high=value + high)


def sharpness(images: Tensor) -> Tensor:
    """Root mean square (B,) of the finest Laplacian level of (B, C, H, W): blur lowers it, noise raises it."""
    return _pyramid(images, 2)[0].square().mean((1, 2, 3)).sqrt()


def sharpness_share(
    images: Tensor, truth: Tensor, *, resamples: int = 400, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean sharpness as a share of the truth's, paired by picture, with a bootstrap interval: 1 is as sharp."""
    return mean_share(
        sharpness(images), sharpness(truth), resamples=resamples, confidence=confidence, seed=seed
    )


def mean_share(
    ours: Tensor,
    theirs: Tensor,
    rivals: Tensor | None = None,
    *,
    resamples: int = 400,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """mean(ours) / mean(theirs), or (mean(ours) − mean(rivals)) / mean(theirs), with a bootstrap interval.

    Args:
        ours, theirs, rivals: (B,) numbers that answer the same requests, resampled together.

    Raises:
        ValueError: of other lengths, or `theirs` has the mean 0.
    """
    parts = [ours, theirs] if rivals is None else [ours, theirs, rivals]
    if len({len(part) for part in parts}) != 1:
        raise ValueError(
            f"{len(ours)} pictures for a truth of {len(theirs)}: one picture a request is needed"
        )
    ours, theirs = ours.float(), theirs.float()
    if float(theirs.mean()) == 0:
        raise ValueError("there is nothing to be a share of: the mean compared with is 0")
    above = ours if rivals is None else ours - rivals.float()
    rows = torch.randint(len(ours), (resamples, len(ours)), generator=torch.Generator().manual_seed(seed))
    shares = above[rows].mean(1) / theirs[rows].mean(1)
    # a resample of few examples may have none that `theirs` got right
    shares = shares[torch.isfinite(shares)]
    return _interval(torch.cat(((above.mean() / theirs.mean())[None], shares)), confidence)

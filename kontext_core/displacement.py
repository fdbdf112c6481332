"""The displacement that the parts of a picture share, and how surely it is known.

Each block of a token's size is registered by itself: within it

    target = gain · moved + bias - d · gradient + softness · laplacian

with a gain and a bias for each channel, so that neither a tint nor a softness of its own is taken for a
displacement d. A block knows d as far as it has edges: along an edge it knows nothing. An autoencoder also bends
each block a little by itself, with a deviation tau that the blocks' scatter tells. So block i, whose own noise has
the covariance S_i, counts with (S_i + tau² I)^-1, and none outweighs all others, however sharp its edges; Tukey's
weights leave out blocks that do not follow the rest, which are edits.

Source: Lucas and Kanade 1981 (a block); DerSimonian and Laird 1986 (random effects); Efron 1982 (jackknife).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16  # pixels, a token's
NUM_ITERATIONS = 30
LEVEL = 1 / 255
CORRELATED = 6.0  # pixels whose noise, that of an autoencoder, is about one
MIN_TAU = 1e-3  # pixels
TUKEY = 4.685


@dataclass(frozen=True, kw_only=True)
class Common:
    """A displacement (2,) in pixels to the right and down, and its standard error (2,), infinite where unknown."""

    displacement: Tensor
    error: Tensor


def common_displacement(moved: Tensor, target: Tensor, weight: Tensor) -> Common:
    """By how much `target` lies off `moved`, both (3,H,W) and less than a pixel or so apart.

    Args:
        weight: (H,W) in 0..1, how much a pixel counts.
    """
    d, information, noise, groups = _blocks(moved, target, weight)
    identity = torch.eye(2, dtype=torch.float64)
    robust = torch.ones(len(d), dtype=torch.float64)
    tau_square = 0.05**2
    for _ in range(NUM_ITERATIONS):
        # (S + tau² I)^-1 with S = noise · information^-1, which need not exist
        spread = noise[:, None, None] * identity + tau_square * information
        own = torch.linalg.solve(spread, information)
        weights = own * robust[:, None, None]
        total = weights.sum(0)
        mean = torch.linalg.pinv(total, rtol=1e-6, hermitian=True) @ (weights @ d[:, :, None]).sum(0)[:, 0]
        off = d - mean
        square = torch.einsum("ni,nij,nj->n", off, own, off)
        robust = (1 - square / TUKEY**2).clamp(min=0).square()
        # tau is right when a block is off by what it is expected to be; only blocks that it matters for can tell.
        tells = robust * torch.einsum("nii->n", tau_square * own) / 2
        tau_square *= float(((tells * square / 2).sum() / tells.sum().clamp(min=1e-12)).clamp(0.25, 4))
        tau_square = min(max(tau_square, MIN_TAU**2), 4.0)
    return Common(displacement=mean, error=_error(weights, total, off, groups))


def _error(weights: Tensor, total: Tensor, off: Tensor, groups: Tensor) -> Tensor:
    """Standard error (2,): by leaving out one group after the other, and no less than the weights say."""
    values, axes = torch.linalg.eigh(total)
    known = values > 1e-6 * values.max().clamp(min=1e-12)
    covariance = axes[:, known] @ torch.diag(1 / values[known]) @ axes[:, known].T
    count = int(groups.max()) + 1 if len(groups) else 0
    of_group = torch.zeros(count, 2, 2, dtype=torch.float64).index_add(0, groups, weights)
    pulls = torch.zeros(count, 2, 1, dtype=torch.float64).index_add(0, groups, weights @ off[:, :, None])
    least = (1e-9 * values.max()).clamp(min=1e-12)  # where one group knows all
    rest = total - of_group + least * torch.eye(2, dtype=torch.float64)
    without = torch.linalg.solve(rest, pulls)[:, :, 0]
    square = torch.maximum(covariance.diagonal(), without.square().sum(0))
    blind = (axes[:, ~known].abs() > 1e-3).any(1)
    return torch.where(blind, torch.inf, square.sqrt())


def _blocks(moved: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each block its displacement (N,2), what it knows of it (N,2,2), the square of its noise (N,), its group (N,).

    A group is two by two blocks: what bends one reaches into its neighbours.
    """
    dx, dy = gradient(moved)
    maps = {"m": moved, "x": -dx, "y": -dy, "l": _laplacian(moved), "t": target - moved}
    maps = {name: value.double() for name, value in maps.items()}
    inner = F.pad(torch.ones_like(weight[2:-2, 2:-2]), (2, 2, 2, 2))  # where there is a gradient
    w = (weight * inner).double()
    count = _sums(w[None])[:, 0]
    mean = {name: _sums(w * value) / count.clamp(min=1e-9)[:, None] for name, value in maps.items()}
    # The gain stays 1 where a block is flat.
    flat = count[:, None] * (2 * LEVEL) ** 2

    def product(a: str, b: str) -> Tensor:
        """(N,3): the sum over a block, what its bias explains taken out."""
        return _sums(w * maps[a] * maps[b]) - count[:, None] * mean[a] * mean[b]

    own = product("m", "m") + flat
    by_gain = {name: product("m", name) for name in "xylt"}

    def left(a: str, b: str) -> Tensor:
        """(N,): and what its gain explains, over the channels."""
        return (product(a, b) - by_gain[a] * by_gain[b] / own).sum(1)

    softness = left("l", "l") + count * (0.5 * LEVEL) ** 2 + 1e-12
    lx, ly, lt = (left("l", name) for name in "xyt")

    def free(a: str, b: str, la: Tensor, lb: Tensor) -> Tensor:
        return left(a, b) - la * lb / softness

    xy = free("x", "y", lx, ly)
    information = torch.stack([free("x", "x", lx, lx), xy, xy, free("y", "y", ly, ly)], 1).view(-1, 2, 2)
    right = torch.stack([free("x", "t", lx, lt), free("y", "t", ly, lt)], 1)
    # A pull of a tenth of a level keeps d at 0 where a block knows nothing.
    pull = (count * (0.1 * LEVEL) ** 2 + 1e-12)[:, None, None] * torch.eye(2, dtype=torch.float64)
    d = torch.linalg.solve(information + pull, right[:, :, None])[:, :, 0]
    residual = free("t", "t", lt, lt) - (d * right).sum(1)
    noise = (residual / (3 * count).clamp(min=1)).clamp(min=(0.5 * LEVEL) ** 2) * CORRELATED
    rows, columns = (torch.arange(-(-n // BLOCK)) // 2 for n in weight.shape)
    groups = (rows[:, None] * len(columns) + columns).flatten()
    chosen = (count > BLOCK**2 / 4).cpu()
    return d.cpu()[chosen], information.cpu()[chosen], noise.cpu()[chosen], groups[chosen]


def gradient(image: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical derivative of (3,H,W), fourth order, zero on a border of two pixels."""
    out = []
    for dim in (2, 1):
        n = image.shape[dim]
        part = [image.narrow(dim, k, n - 4) for k in range(5)]
        slope = (part[0] - part[4] + 8 * (part[3] - part[1])) / 12
        out.append(F.pad(slope, (2, 2, 0, 0) if dim == 2 else (0, 0, 2, 2)))
    return out[0], out[1]


def _laplacian(image: Tensor) -> Tensor:
    """Of (3,H,W), the edges continued."""
    out = F.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
    return out[:, 1:-1, 2:] + out[:, 1:-1, :-2] + out[:, 2:, 1:-1] + out[:, :-2, 1:-1] - 4 * image


def _sums(values: Tensor) -> Tensor:
    """(C,H,W) summed over blocks: (N,C); those at the right and bottom edges may be smaller."""
    padded = F.pad(values, (0, -values.shape[2] % BLOCK, 0, -values.shape[1] % BLOCK))
    return (F.avg_pool2d(padded[None], BLOCK)[0] * BLOCK**2).flatten(1).T

"""How an edit moved and tinted what it should have left alone: shift and colour, measured and undone.

The edited picture is modelled as  edited(p) = gain · original(p - shift) + bias  wherever it was not edited,
with one shift in pixels for all channels and a gain and a bias for each. Phase correlation gives the whole
pixels, Gauss-Newton on the gradients gain, bias and most of the fraction; Tukey's weights leave out the places
where the model does not hold, which are the edit itself, and with it sharp edges that came back softer. What those
know of the last fraction is asked block by block (`displacement`), which also says how surely the shift is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .displacement import common_displacement, gradient
from .geometry import resample_axis

NUM_ITERATIONS = 20
NUM_REFINEMENTS = 4
LEVEL = 1 / 255
MIN_UNCHANGED = 0.1  # below this share of agreeing pixels nothing reliable can be said
MIN_SHIFT = 0.02  # pixels; a smaller shift is not worth the softening of a resampling


@dataclass(frozen=True, kw_only=True)
class Match:
    """How one edited picture relates to its original.

    Attributes:
        shift: pixels to the right and down that the edited picture has moved.
        error: the shift's standard error in pixels; infinite where nothing in the picture tells, as along the
            edges of a picture that has none across them.
        gain: factor of red, green and blue.
        bias: offset of red, green and blue, in shares of the full range.
        unchanged: share of the looked-at pixels that follow the model.
        reliable: False when too little is unchanged; then shift, gain and bias are the identity.
    """

    shift: tuple[float, float] = (0.0, 0.0)
    error: tuple[float, float] = (math.inf, math.inf)
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    unchanged: float = 0.0
    reliable: bool = False

    def report(self) -> str:
        """One sentence for a person."""
        if not self.reliable:
            return f"only {self.unchanged:.0%} of the picture is unchanged: shift and colour are kept"
        gain = ", ".join(f"{g:.3f}" for g in self.gain)
        bias = ", ".join(f"{255 * b:+.1f}" for b in self.bias)
        moved = ", ".join(
            "nothing tells" if math.isinf(error) else f"{shift:+.2f}"
            for shift, error in zip(self.shift, self.error, strict=True)
        )
        return (
            f"moved by ({moved}) px, colour gain ({gain}), "
            f"bias ({bias}) levels, {self.unchanged:.0%} unchanged"
        )


def match(
    original: Tensor, edited: Tensor, weight: Tensor | None = None, *, max_shift: float = 16.0
) -> Match:
    """Measure shift and colour between one picture and its edit, both (3,H,W) in [0,1].

    Args:
        weight: (H,W), 1 where the edit is known to have changed nothing, 0 where it may have; None where
            that is not known.
        max_shift: pixels beyond which a shift is taken for an edit.
    """
    weight = torch.ones_like(original[0]) if weight is None else weight.float()
    if weight.sum() < 64 or min(original.shape[1:]) < 8:
        return Match()
    # A little blur makes the gradients good to a fraction of a pixel and evens out what an autoencoder does.
    source, target = blur(original[None], 1.0), blur(edited[None], 1.0)[0]
    whole = _whole_shift(source[0].mean(0), target.mean(0), weight, max_shift)
    shift = torch.tensor(whole, dtype=torch.float64)
    gain = torch.ones(3, dtype=torch.float64)
    bias = _weighted_median((target - source[0]).flatten(1), weight.flatten()).cpu().double()
    share = 0.0
    for _ in range(NUM_ITERATIONS):
        moved = _shifted(source, -shift)[0]
        dx, dy = gradient(moved)
        tint = [v.to(target).view(3, 1, 1) for v in (gain, bias)]
        predicted = tint[0] * moved + tint[1]
        residual = target - predicted
        robust, share = _tukey(residual.norm(dim=0), weight)
        step, gain, bias = _solve(moved, dx, dy, target, robust, gain)
        # A Gauss-Newton step is good for about the blur's width.
        step = step.clamp(-1.5, 1.5)
        shift = shift + step
        if step.abs().max() < 1e-4:
            break
    tint = [v.to(target).view(3, 1, 1) for v in (gain, bias)]
    for _ in range(NUM_REFINEMENTS):
        moved = _shifted(source, -shift)[0]
        found = common_displacement(tint[0] * moved + tint[1], target, weight)
        step = found.displacement.clamp(-1.5, 1.5)
        shift = shift + step
        if step.abs().max() < 1e-3:
            break
    unreliable = share < MIN_UNCHANGED or shift.abs().max() > max_shift or ((gain < 0.5) | (gain > 2)).any()
    if unreliable or not torch.isfinite(torch.cat([shift, gain, bias])).all():
        return Match(unchanged=share)
    values = {"shift": tuple(shift.tolist()), "error": tuple(found.error.tolist())}
    values |= {"gain": tuple(gain.tolist()), "bias": tuple(bias.tolist())}
    return Match(**values, unchanged=share, reliable=True)


def undo(edited: Tensor, found: Match, *, align: bool = True, match_color: bool = True) -> Tensor:
    """Bring an edited picture (3,H,W) in [0,1] back to its original's place and colour."""
    out = edited
    if align and max(abs(s) for s in found.shift) >= MIN_SHIFT:
        out = _shifted(out[None], torch.tensor(found.shift))[0]
    if match_color:
        gain, bias = (out.new_tensor(v).view(3, 1, 1) for v in (found.gain, found.bias))
        out = (out - bias) / gain
    return out.clamp(0, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B,C,H,W), sigma in pixels; the edges are continued."""
    radius = max(1, math.ceil(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=torch.float32, device=image.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(image.dtype).expand(image.shape[1], 1, -1)
    for dim in (3, 2):
        padding = (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius)
        image = F.conv2d(
            F.pad(image, padding, mode="replicate"), kernel.unsqueeze(5 - dim), groups=image.shape[1]
        )
    return image


def _shifted(image: Tensor, shift: Tensor) -> Tensor:
    """image(p + shift), shift in pixels to the right and down."""
    for dim, start in ((-1, shift[0].item()), (-2, shift[1].item())):
        if start:
            image = resample_axis(image, dim, image.shape[dim], start=start, step=1.0)
    return image


def _solve(
    moved: Tensor, dx: Tensor, dy: Tensor, target: Tensor, weight: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One weighted least-squares step: (shift's change (2,), gain (3,), bias (3,)).

    With the shift's change d small, target = gain · (moved - d·gradient) + bias; the product gain · d is
    linear in d with the last gain. A weak pull of a level keeps gain 1 and d 0 where the picture is flat and
    tells nothing.
    """
    normal = torch.zeros(8, 8, dtype=torch.float64)
    right = torch.zeros(8, dtype=torch.float64)
    for c in range(3):
        g = gain[c].item()
        columns = torch.stack([-g * dx[c], -g * dy[c], moved[c], torch.ones_like(moved[c])]).flatten(1)
        weighted = columns * weight.flatten()
        index = torch.tensor([0, 1, 2 + c, 5 + c])
        normal[index[:, None], index] += (weighted @ columns.T).cpu().double()
        right[index] += (weighted @ target[c].flatten()).cpu().double()
    pull = weight.sum().item() * (0.5 * LEVEL) ** 2
    normal += torch.diag(torch.tensor([pull * 0.1] * 2 + [pull] * 3 + [pull * 1e-3] * 3, dtype=torch.float64))
    right[2:5] += pull
    solution = torch.linalg.solve(normal, right)
    return solution[:2], solution[2:5], solution[5:]


def _tukey(residual: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Tukey's biweight of a residual (H,W) times `weight`, and the share of the weight that it keeps."""
    scale = 1.4826 * _weighted_median(residual.flatten()[None], weight.flatten())[0]
    ratio = residual / (4.685 * scale.clamp(min=0.5 * LEVEL))
    robust = weight * (1 - ratio.square()).clamp(min=0).square()
    # A place follows the model if it is off by less than an autoencoder is.
    agrees = weight * (residual < 6 * LEVEL * math.sqrt(3))
    return robust, (agrees.sum() / weight.sum()).item()


def _weighted_median(values: Tensor, weight: Tensor) -> Tensor:
    """Median of each row of (R,N) over the entries whose weight (N,) is above one half of the largest."""
    chosen = values[:, weight > 0.5 * weight.max()]
    stride = max(1, chosen.shape[1] // 200_000)  # a sample is as good, and a sort of millions is slow
    return chosen[:, ::stride].median(dim=1).values


def _whole_shift(source: Tensor, target: Tensor, weight: Tensor, max_shift: float) -> tuple[float, float]:
    """The shift in whole pixels at the peak of the phase correlation of two (H,W), or none."""
    height, width = source.shape
    window = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(width, periodic=False)
    window = window.to(weight) * weight
    spectra = [torch.fft.rfft2((x - (x * window).sum() / window.sum()) * window) for x in (source, target)]
    cross = spectra[0].conj() * spectra[1]
    surface = torch.fft.irfft2(cross / cross.abs().clamp(min=1e-9), s=(height, width))
    reach_y, reach_x = (min(int(max_shift), n // 4) for n in (height, width))
    near = torch.roll(surface, (reach_y, reach_x), (0, 1))[: 2 * reach_y + 1, : 2 * reach_x + 1]
    row, column = divmod(int(near.argmax()), near.shape[1])
    # A flat picture has no peak, and a repeating one has several: the shift has to explain more than none
    # does.
    peak = torch.tensor([column - reach_x, row - reach_y], dtype=torch.float64)
    misses = []
    for shift in (torch.zeros(2), peak):
        difference = (target - _shifted(source[None, None], -shift)[0, 0]).flatten()[None]
        difference = difference - _weighted_median(difference, weight.flatten())
        misses.append(_weighted_median(difference.abs(), weight.flatten()).item())
    return tuple(peak.tolist()) if misses[1] < 0.9 * misses[0] else (0.0, 0.0)

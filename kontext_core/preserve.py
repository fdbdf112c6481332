"""Edit and preserve: take an edit where it was meant, and the original's own pixels everywhere else.

The mask is given or found from what the edit changed. The edit is first moved and tinted back onto the
original by what `registration` measures outside the mask. It is then blended in with a seam that lies wholly
inside the mask, so that every pixel outside is the original's, bit for bit, whatever its type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import Match, blur, match, undo

MASK_CELLS = 256  # the longer side of the grid on which changed regions are connected
NOTICEABLE = 0.02  # an OKLab distance that is just seen
MIN_REGION = 5e-4  # share of the picture below which a changed region is taken for noise
MAX_HOLE = 0.01  # share of the picture up to which an unchanged hole in a region is filled


@dataclass(frozen=True, kw_only=True)
class Preserved:
    """What `preserve` gives.

    Attributes:
        image: (B,C,H,W), the original's type and channels.
        mask: (B,1,H,W) float32 in [0,1]; where it is 0 the image is the original.
        blend: (B,1,H,W) float32, how much of the edit each pixel has.
        matches: what was measured of each picture.
    """

    image: Tensor
    mask: Tensor
    blend: Tensor
    matches: tuple[Match, ...]

    def report(self) -> str:
        """One line a picture."""
        shares = (self.mask > 0).float().mean((1, 2, 3)).tolist()
        return "\n".join(
            f"{share:.1%} of the picture edited; {found.report()}"
            for share, found in zip(shares, self.matches, strict=True)
        )


def preserve(
    original: Tensor,
    edited: Tensor,
    mask: Tensor | None = None,
    *,
    feather: int = 8,
    grow: int = 8,
    sensitivity: float = 1.0,
    align: bool = True,
    match_color: bool = True,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Preserved:
    """Put an edit into its original inside a mask and leave every other pixel alone.

    Args:
        original: (1 or B,C,H,W), 3 channels or 4 with alpha, float in `bounds` or uint8. Its alpha is kept.
        edited: (B,3 or 4,H,W) of the same size and type; its alpha is not used.
        mask: (H,W), (B,H,W) or (B,1,H,W) in [0,1], above 0 where the edit may show; None finds it.
        feather: pixels inside the mask's edge over which the edit sets in.
        grow: pixels by which a mask that was found is widened.
        sensitivity: of the search: 2 finds changes half as strong.
        align: undo the shift. match_color: undo the tint.

    Raises:
        ValueError: sizes, types or batches that do not go together, or a setting out of range.
    """
    _check(original, edited, feather, grow, sensitivity)
    batch, (height, width) = edited.shape[0], edited.shape[2:]
    source = _unit(original, bounds).expand(batch, -1, -1, -1)
    target = _unit(edited, bounds)
    given = None if mask is None else _as_mask(mask, batch, height, width).to(target)
    masks, matches, corrected = [], [], []
    for i in range(batch):
        settings = {"align": align, "match_color": match_color}
        if given is None:
            found, region = _match_and_find(source[i], target[i], grow, sensitivity, settings)
        else:
            region = given[i]
            found = match(source[i], target[i], (region[0] == 0).float())
        masks.append(region)
        matches.append(found)
        corrected.append(undo(target[i], found, **settings))
    region = torch.stack(masks)
    blend = region * seam(region > 0, feather)
    image = _compose(original, torch.stack(corrected), blend, bounds)
    return Preserved(image=image, mask=region.float(), blend=blend.float(), matches=tuple(matches))


def changed_mask(original: Tensor, edited: Tensor, *, grow: int = 8, sensitivity: float = 1.0) -> Tensor:
    """(1,H,W), 1 where an edit changed the picture for the eye; both (3,H,W) in [0,1], already aligned.

    Two distances in OKLab are looked at: that of the local means, in which an autoencoder's noise cancels,
    and the local root mean square, which sees a change of texture or lettering. Each is measured against its
    own noise floor in this picture. Regions are kept when they are strong somewhere and large enough.
    """
    height, width = original.shape[1:]
    sigma = max(1.5, 0.004 * max(height, width))
    difference = _oklab(edited) - _oklab(original)
    mean = blur(difference[None], sigma)[0].norm(dim=0)
    spread = blur(difference.square().sum(0)[None, None], sigma)[0, 0].clamp(min=0).sqrt()
    score = torch.maximum(mean / _floor(mean, 1.0), spread / _floor(spread, 2.5)) * sensitivity
    scale = max(1.0, max(height, width) / MASK_CELLS)
    grid = (max(1, round(height / scale)), max(1, round(width / scale)))
    cells = F.adaptive_max_pool2d(score[None, None], grid)[0, 0]
    # The blur itself makes a speck that wide.
    speck = math.pi * (2 * sigma / scale) ** 2
    cells = _regions(cells > 0.7, cells > 1.2, speck + MIN_REGION * cells.numel())
    mask = F.interpolate(cells[None, None].float(), size=(height, width), mode="nearest")
    return _grow(mask, grow)[0]


def seam(inside: Tensor, feather: int) -> Tensor:
    """(B,1,H,W) of bools as a ramp: 0 outside, rising to 1 over `feather` pixels inside; float32.

    The ramp follows the exact Euclidean distance to the nearest pixel outside. The picture's own border is no
    edge.
    """
    if not feather:
        return inside.float()
    reach = feather + 1
    height, width = inside.shape[2:]
    # Along each row: the distance to the nearest pixel outside, by the last one seen from either side.
    x = torch.arange(width, device=inside.device, dtype=torch.float32)
    far = torch.full((), 4.0 * (height + width), device=inside.device)
    left = x - torch.where(inside, -far, x).cummax(-1).values
    right = torch.where(inside, far, x).flip(-1).cummin(-1).values.flip(-1) - x
    row = torch.minimum(left, right).clamp(max=reach).square()
    square = row
    padded = F.pad(row, (0, 0, reach, reach), value=float(reach * reach))
    for dy in range(-reach, reach + 1):
        square = torch.minimum(square, padded[:, :, reach + dy : reach + dy + height] + dy * dy)
    ramp = (square.sqrt() / reach).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def latent_mask(mask: Tensor, cell: int = 8) -> Tensor:
    """(B,1,H,W) pixels as (B,1,H/8,W/8) latent cells: a cell is edited when any of its pixels is.

    For inpainting by latent mask; H and W are multiples of `cell`.
    """
    return F.max_pool2d(mask, cell)


def _match_and_find(
    original: Tensor, edited: Tensor, grow: int, sensitivity: float, settings: dict
) -> tuple[Match, Tensor]:
    """Measure over everything, find the change, and measure again outside of it."""
    found = match(original, edited)
    region = changed_mask(original, undo(edited, found, **settings), grow=grow, sensitivity=sensitivity)
    outside = (region[0] == 0).float()
    # A little of what is left is better than guessing from nothing.
    if outside.mean() > 0.02:
        found = match(original, edited, outside)
        region = changed_mask(original, undo(edited, found, **settings), grow=grow, sensitivity=sensitivity)
    return found, region


def _floor(distance: Tensor, factor: float) -> Tensor:
    """The distance that counts as a change: six deviations above the median, within what the eye allows."""
    sample = distance.flatten()[:: max(1, distance.numel() // 200_000)]
    middle = sample.median()
    noise = middle + 6 * 1.4826 * (sample - middle).abs().median()
    return noise.clamp(factor * NOTICEABLE, 2 * factor * NOTICEABLE)


def _regions(weak: Tensor, strong: Tensor, least: float) -> Tensor:
    """The connected regions of `weak` (h,w) that hold a strong cell and `least` cells, holes filled."""
    labels = _components(weak, diagonal=True)
    count = labels.max().item() + 1
    size = torch.bincount(labels.flatten(), minlength=count)
    has_strong = torch.zeros(count, dtype=torch.bool, device=weak.device)
    has_strong[labels[strong]] = True
    keep = has_strong & (size >= least)
    keep[0] = False
    kept = keep[labels]
    holes = _components(~kept, diagonal=False)
    size = torch.bincount(holes.flatten())
    fill = size <= MAX_HOLE * weak.numel()
    edges = torch.cat([holes[0], holes[-1], holes[:, 0], holes[:, -1]])
    fill[edges] = False
    fill[0] = False
    return kept | fill[holes]


def _components(cells: Tensor, *, diagonal: bool) -> Tensor:
    """Labels (h,w) int64 of connected regions, 0 outside: the largest cell number spreads through each."""
    number = torch.arange(1, cells.numel() + 1, device=cells.device, dtype=torch.float32).view(cells.shape)
    labels = number * cells
    while True:
        grid = labels[None, None]
        spread = (
            F.max_pool2d(grid, 3, 1, 1)
            if diagonal
            else torch.maximum(F.max_pool2d(grid, (1, 3), 1, (0, 1)), F.max_pool2d(grid, (3, 1), 1, (1, 0)))
        )
        # Jumping to the label of the cell that is named halves the way that is left.
        spread = spread[0, 0] * cells
        jumped = torch.cat([spread.new_zeros(1), spread.flatten()])[spread.long()] * cells
        if torch.equal(jumped, labels):
            break
        labels = jumped
    names = torch.cat([labels.new_zeros(1), labels.flatten()])
    return torch.unique(names, return_inverse=True)[1][1:].view(cells.shape)


def _grow(mask: Tensor, pixels: int) -> Tensor:
    for size in (pixels, pixels) if pixels else ():
        kernel = (2 * size + 1, 1)
        mask = F.max_pool2d(mask, kernel, 1, (size, 0)).transpose(2, 3)
    return mask


def _compose(original: Tensor, corrected: Tensor, blend: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Blend in float32 and choose pixel by pixel: what is kept passes through no arithmetic."""
    frame = original.expand(corrected.shape[0], -1, -1, -1)
    color = frame[:, :3]
    if color.dtype == torch.uint8:
        low, high = 0, 255
        edit = (corrected * 255).round()
        mixed = (color + (edit - color) * blend).round()
    else:
        low, high = bounds
        edit = low + (high - low) * corrected
        mixed = color + (edit - color.float()) * blend
    mixed = torch.where(blend < 1, mixed, edit).clamp(low, high).to(color.dtype)
    color = torch.where(blend > 0, mixed, color)
    return torch.cat([color, frame[:, 3:]], 1)


def _unit(image: Tensor, bounds: tuple[float, float]) -> Tensor:
    if image.dtype == torch.uint8:
        return image[:, :3].float() / 255
    low, high = bounds
    return ((image[:, :3].float() - low) / (high - low)).clamp(0, 1)


def _as_mask(mask: Tensor, batch: int, height: int, width: int) -> Tensor:
    shape = tuple(mask.shape)
    mask = mask.float()
    mask = mask[None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    if mask.dim() != 4 or tuple(mask.shape[1:]) != (1, height, width) or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"the mask has shape {shape}; expected ({height},{width}), or 1 or {batch} of them: "
            "make it on the original picture, at its size"
        )
    return mask.clamp(0, 1).expand(batch, -1, -1, -1)


def _oklab(image: Tensor) -> Tensor:
    """(3,H,W) sRGB in [0,1] to OKLab, with a hundredth of white added.

    Near black the cube root sees noise as a change; on a screen in a room there is always that much stray
    light. Source: bottosson.github.io/posts/oklab.
    """
    linear = torch.where(image <= 0.04045, image / 12.92, ((image.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_cones = image.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = image.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    cones = torch.einsum("ij,jhw->ihw", to_cones, linear + 0.01) ** (1 / 3)
    return torch.einsum("ij,jhw->ihw", to_lab, cones)


def _check(original: Tensor, edited: Tensor, feather: int, grow: int, sensitivity: float) -> None:
    for name, image in (("the original", original), ("the edit", edited)):
        if image.dim() != 4 or image.shape[1] not in (3, 4):
            raise ValueError(f"{name} has shape {tuple(image.shape)}; expected (B,3 or 4,H,W)")
        if not torch.isfinite(image).all():
            raise ValueError(f"{name} holds NaN or infinite values")
    if original.shape[2:] != edited.shape[2:]:
        sizes = ["x".join(str(n) for n in reversed(image.shape[2:])) for image in (original, edited)]
        raise ValueError(
            f"the original is {sizes[0]} and the edit {sizes[1]}: bring the edit back to the original's size"
        )
    if original.dtype != edited.dtype:
        raise ValueError(f"the original is {original.dtype}, the edit {edited.dtype}; give both in one type")
    if original.shape[0] not in (1, edited.shape[0]):
        raise ValueError(f"{original.shape[0]} originals for {edited.shape[0]} edits; give one, or one each")
    if feather < 0 or grow < 0 or sensitivity <= 0:
        raise ValueError(
            f"feather {feather} and grow {grow} are 0 or more pixels, sensitivity {sensitivity} is above 0"
        )

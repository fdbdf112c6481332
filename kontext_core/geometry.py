"""Sizes, buckets, fit policies and their exact inverses.

A picture of any size goes to the model's size by one of four policies, and the result comes back at the size
and framing the picture came in:

- ``stretch``: the whole picture to the whole canvas, each axis by its own scale (what BFL does).
- ``crop``: a centred window of the canvas's aspect ratio to the whole canvas (what ComfyUI does); on the way
  back the result is pasted into the original, whose cropped-off borders stay as they were.
- ``pad``: the whole picture, at one scale, into the middle of the canvas; the rest is mirrored or one colour.
- ``keep``: the nearest multiple of 16 on each axis, no bucket.

Windows are whole pixels on both sides, so that both directions are plain separable resamplings of one
rectangle to another. Pixel centres sit at half-integers on both sides (align_corners=False): nothing shifts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

MULTIPLE = 16
POLICIES = ("stretch", "crop", "pad", "keep")
KONTEXT_AREA = 1024 * 1024

# (width, height). Source: black-forest-labs/flux src/flux/util.py
PREFERRED_SIZES: tuple[tuple[int, int], ...] = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)

Size = tuple[int, int]
Window = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One picture's way to the model's canvas and back. Every size is (width, height) in pixels.

    Attributes:
        policy: one of `POLICIES`.
        source: the picture's size.
        size: the canvas's size, multiples of 16, or the picture's own where nothing was fitted.
        window: x, y, width, height of the part of the picture that is used.
        content: x, y, width, height of the place it takes on the canvas.
        pad_color: red, green, blue (0..255) of the padding, or None to mirror the picture.
    """

    policy: str
    source: Size
    size: Size
    window: Window
    content: Window
    pad_color: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"fit policy is {self.policy!r}; choose one of {', '.join(POLICIES)}")
        if self.size != self.source:
            _check_size("size", self.size)
        for name, (x, y, w, h), (width, height) in (
            ("window", self.window, self.source),
            ("content", self.content, self.size),
        ):
            if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
                raise ValueError(f"{name} {(x, y, w, h)} does not lie inside {width}x{height}")

    @property
    def scale(self) -> tuple[float, float]:
        """Canvas pixels per picture pixel, horizontally and vertically."""
        return self.content[2] / self.window[2], self.content[3] / self.window[3]

    @property
    def cropped(self) -> tuple[int, int, int, int]:
        """Picture pixels cut off at the left, top, right and bottom."""
        return _margins(self.window, self.source)

    @property
    def padded(self) -> tuple[int, int, int, int]:
        """Canvas pixels added at the left, top, right and bottom."""
        return _margins(self.content, self.size)

    @property
    def cropped_percent(self) -> float:
        """Share of the picture's area that the model does not see."""
        return 100 * (1 - self.window[2] * self.window[3] / (self.source[0] * self.source[1]))

    @property
    def padded_percent(self) -> float:
        """Share of the canvas's area that is padding."""
        return 100 * (1 - self.content[2] * self.content[3] / (self.size[0] * self.size[1]))

    @property
    def stretched_percent(self) -> float:
        """How much the model sees the picture wider (positive) or narrower (negative) than it is."""
        return 100 * (self.scale[0] / self.scale[1] - 1)

    def report(self) -> str:
        """One sentence for a person: where the picture went and what it lost."""
        words = [f"{self.source[0]}x{self.source[1]} to {self.size[0]}x{self.size[1]} by {self.policy}"]
        for verb, margins, percent, of in (
            ("cropped", self.cropped, self.cropped_percent, "picture"),
            ("padded", self.padded, self.padded_percent, "canvas"),
        ):
            if any(margins):
                sides = zip(margins, ("left", "top", "right", "bottom"), strict=True)
                where = ", ".join(f"{n} px {side}" for n, side in sides if n)
                words.append(f"{verb} {where} ({percent:.1f} % of the {of})")
        if abs(self.stretched_percent) >= 0.05:
            words.append(f"aspect ratio changed by {self.stretched_percent:+.1f} %")
        return "; ".join(words)

    def to_json(self) -> dict:
        """A dictionary of numbers, strings and lists; `from_json` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict) -> Geometry:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            got = sorted(data) if isinstance(data, dict) else repr(data)
            raise ValueError(f"a geometry has the fields {sorted(names)}; got {got}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def fit(
    size: Size,
    policy: str = "stretch",
    target: Size | str | None = "auto",
    *,
    max_area: int = KONTEXT_AREA,
    pad_color: tuple[int, int, int] | None = None,
) -> Geometry:
    """Plan how a picture of `size` (width, height) goes to the model's canvas.

    Args:
        target: (width, height), multiples of 16, or "auto" (or None) for the preferred size whose aspect
            ratio is nearest. `keep` takes no target.
        max_area: the area in pixels that the model prefers; the preferred sizes are scaled to it.
        pad_color: red, green, blue in 0..255 for `pad`; None mirrors the picture.

    Raises:
        ValueError: an unknown policy, an empty picture, a target that is not a multiple of 16.
    """
    width, height = (int(n) for n in size)
    if min(width, height) < 1:
        raise ValueError(f"a picture of {width}x{height} pixels is empty")
    auto = target is None or target == "auto"
    if policy == "keep":
        if not auto:
            raise ValueError(f"fit 'keep' has the picture's own size, got {target}; use stretch, crop or pad")
        canvas = tuple(_round_to_multiple(n) for n in (width, height))
    elif auto:
        canvas = nearest_size((width, height), max_area)
    elif isinstance(target, str):
        raise ValueError(f"size is {target!r}; give (width, height) or 'auto'")
    else:
        canvas = tuple(int(n) for n in target)
        _check_size("size", canvas)
    window, content = (0, 0, width, height), (0, 0, *canvas)
    if policy == "crop":
        window = _centre_window((width, height), canvas)
    elif policy == "pad":
        content = _centre_content((width, height), canvas)
    return Geometry(
        policy=policy,
        source=(width, height),
        size=canvas,
        window=window,
        content=content,
        pad_color=pad_color if policy == "pad" else None,
    )


def unfitted(size: Size) -> Geometry:
    """The way of a picture that is its own canvas, whatever its size (width, height)."""
    return Geometry(policy="keep", source=size, size=size, window=(0, 0, *size), content=(0, 0, *size))


def parse_padding(padding: str) -> tuple[int, int, int] | None:
    """A `pad_color` as it is written: #rrggbb, or None for "mirror".

    Raises:
        ValueError: it is neither.
    """
    text = padding.strip().lower()
    if text in ("", "mirror"):
        return None
    digits = text.removeprefix("#")
    if len(digits) != 6 or any(digit not in "0123456789abcdef" for digit in digits):
        raise ValueError(f"padding is {padding!r}; use mirror, or a colour such as #808080")
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def nearest_size(size: Size, max_area: int = KONTEXT_AREA) -> Size:
    """The preferred (width, height) whose aspect ratio is nearest to that of `size`.

    Source: black-forest-labs/flux src/flux/sampling.py, prepare_kontext (the ties too).
    """
    aspect = size[0] / size[1]
    return min(preferred_sizes(max_area), key=lambda wh: (abs(aspect - wh[0] / wh[1]), *wh))


def preferred_sizes(max_area: int = KONTEXT_AREA) -> tuple[Size, ...]:
    """The preferred sizes scaled to an area of `max_area` pixels, each side a multiple of 16."""
    if max_area < MULTIPLE * MULTIPLE:
        raise ValueError(f"max_area is {max_area}; the smallest canvas is {MULTIPLE}x{MULTIPLE} pixels")
    scale = math.sqrt(max_area / KONTEXT_AREA)
    scaled = ((_round_to_multiple(w * scale), _round_to_multiple(h * scale)) for w, h in PREFERRED_SIZES)
    return tuple(dict.fromkeys(scaled))


def apply(geometry: Geometry, image: Tensor, bounds: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Bring a picture (B,C,H,W) to the canvas (B,C,H',W').

    Args:
        bounds: the range of the picture's values; the resampling's overshoot is clamped to it. A mask or an
            alpha channel has (0, 1). Where `pad_color` does not apply (not three channels) the padding is the
            lower bound.

    Raises:
        ValueError: the picture's size is not the geometry's.
    """
    _check_shape("the picture", image, geometry.source)
    x, y, w, h = geometry.window
    out = resample(image[:, :, y : y + h, x : x + w], geometry.content[2:], bounds)
    if not any(geometry.padded):
        return out
    left, top, right, bottom = geometry.padded
    if geometry.pad_color is None:
        rows = _mirror(geometry.content[3], top, bottom, image.device)
        columns = _mirror(geometry.content[2], left, right, image.device)
        return out.index_select(2, rows).index_select(3, columns)
    canvas = out.new_full((*out.shape[:2], geometry.size[1], geometry.size[0]), bounds[0])
    if out.shape[1] == 3:
        low, high = bounds
        color = [low + (high - low) * c / 255 for c in geometry.pad_color]
        canvas[:] = torch.tensor(color, dtype=out.dtype, device=out.device).view(1, 3, 1, 1)
    canvas[:, :, top : top + out.shape[2], left : left + out.shape[3]] = out
    return canvas


def invert(
    geometry: Geometry,
    image: Tensor,
    original: Tensor | None = None,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """Bring a canvas (B,C,H',W') back to the picture's size and framing (B,C,H,W).

    Args:
        original: the picture that was cropped, (1 or B,C,H,W): its borders are kept. Needed only when the
            geometry has cropped something.

    Raises:
        ValueError: the canvas's size is not the geometry's, or a crop comes without its original.
    """
    _check_shape("the result", image, geometry.size)
    x, y, w, h = geometry.content
    out = resample(image[:, :, y : y + h, x : x + w], geometry.window[2:], bounds)
    if not any(geometry.cropped):
        return out
    if original is None:
        raise ValueError(
            f"the picture was cropped ({geometry.report()}): give the original, whose borders are kept"
        )
    _check_shape("the original", original, geometry.source)
    x, y, w, h = geometry.window
    frame = original.to(out).expand(out.shape[0], -1, -1, -1).clone()
    frame[:, :, y : y + h, x : x + w] = out
    return frame


def resample(image: Tensor, size: Size, bounds: tuple[float, float] | None = None) -> Tensor:
    """Resize (B,C,H,W) to (width, height) with an antialiased Lanczos kernel, as Pillow's LANCZOS does.

    An axis whose length does not change is passed through untouched, bit for bit.
    """
    width, height = size
    out = image
    # The axis that shrinks most goes first: the second pass then has less to do.
    for dim, length in sorted(((-1, width), (-2, height)), key=lambda axis: axis[1] / image.shape[axis[0]]):
        if out.shape[dim] != length:
            out = resample_axis(out, dim, length)
    if bounds is not None and out is not image:
        out = out.clamp(*bounds)
    return out


def resample_axis(
    image: Tensor, dim: int, length: int, start: float = 0.0, step: float | None = None
) -> Tensor:
    """Sample one axis at `length` points whose cells are `step` pixels wide, the first beginning at `start`.

    With the defaults the whole axis is resized to `length`; with step 1 it is shifted by `start` pixels.
    The kernel is Lanczos-3, widened to the cell when it shrinks. Where it leaves the picture, and everywhere
    in a shift, the weights are tilted so that their centroid is the sampled point itself: Pillow only
    renormalises there, which pulls the edges inwards, and Lanczos alone moves a ramp by 0.086 pixels when
    asked for 0.1.
    Weights are computed in float64, the sum in at least float32.

    Source: Pillow src/libImaging/Resample.c (the convention inside the picture).
    """
    num = image.shape[dim]
    step = num / length if step is None else step
    widening = max(step, 1.0)
    support = 3.0 * widening
    centre = (start + (torch.arange(length, dtype=torch.float64) + 0.5) * step).clamp(0.0, float(num))
    first = (centre - support).floor()
    taps = first[:, None] + torch.arange(math.ceil(2 * support) + 1, dtype=torch.float64)
    offset = (taps + 0.5 - centre[:, None]) / widening
    inside = (taps >= 0) & (taps < num)
    weight = torch.sinc(offset) * torch.sinc(offset / 3) * (offset.abs() < 3) * inside
    weight = weight / weight.sum(1, keepdim=True)
    if num > 1:
        leaves = (centre < support) | (centre > num - support)
        tilted = torch.ones_like(leaves) if step == 1.0 else leaves
        weight = weight + tilted[:, None] * _tilt(weight, offset, inside)
    index = taps.clamp(0, num - 1).long().to(image.device)
    compute = torch.promote_types(image.dtype, torch.float32)
    weight = weight.to(image.device, compute)
    shape = [1] * image.dim()
    shape[dim] = length
    source = image.to(compute)
    out = None
    for tap in range(index.shape[1]):
        term = source.index_select(dim, index[:, tap]) * weight[:, tap].view(shape)
        out = term if out is None else out.add_(term)
    return out.to(image.dtype)


def _tilt(weight: Tensor, offset: Tensor, inside: Tensor) -> Tensor:
    """What to add to weights (length, taps) so that their sum stays and their centroid comes to offset 0."""
    near = (1 - offset.abs() / 2).clamp(min=0) * inside
    mean = (near * offset).sum(1, keepdim=True) / near.sum(1, keepdim=True)
    slope = near * (offset - mean)
    return -slope * (weight * offset).sum(1, keepdim=True) / (slope * offset).sum(1, keepdim=True)


def _centre_window(size: Size, canvas: Size) -> Window:
    """The centred window of the canvas's aspect ratio, the same number of pixels off both sides.

    Source: ComfyUI comfy/utils.py, common_upscale with crop "center".
    """
    (width, height), aspect = size, canvas[0] / canvas[1]
    x = y = 0
    if width / height > aspect:
        x = round((width - height * aspect) / 2)
    elif width / height < aspect:
        y = round((height - width / aspect) / 2)
    # A picture a pixel or two wide keeps at least one of them.
    x, y = min(x, (width - 1) // 2), min(y, (height - 1) // 2)
    return x, y, width - 2 * x, height - 2 * y


def _centre_content(size: Size, canvas: Size) -> Window:
    """The largest whole-pixel rectangle of the picture's aspect ratio in the middle of the canvas."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    w, h = (min(max(round(n * scale), 1), limit) for n, limit in zip(size, canvas, strict=True))
    return (canvas[0] - w) // 2, (canvas[1] - h) // 2, w, h


def _mirror(length: int, before: int, after: int, device: torch.device) -> Tensor:
    """Indices that continue an axis by reflection about its first and last pixel, as often as it takes."""
    index = torch.arange(-before, length + after, device=device)
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def _margins(window: Window, size: Size) -> tuple[int, int, int, int]:
    x, y, w, h = window
    return x, y, size[0] - x - w, size[1] - y - h


def _round_to_multiple(n: float) -> int:
    return max(MULTIPLE, MULTIPLE * math.floor(n / MULTIPLE + 0.5))


def _check_size(name: str, size: Size) -> None:
    if len(size) != 2 or any(n < MULTIPLE or n % MULTIPLE for n in size):
        near = "x".join(str(_round_to_multiple(n)) for n in size)
        raise ValueError(
            f"{name} is {'x'.join(map(str, size))}; both sides must be multiples of {MULTIPLE}, try {near}"
        )


def _check_shape(name: str, image: Tensor, size: Size) -> None:
    if image.dim() != 4 or (image.shape[3], image.shape[2]) != tuple(size):
        raise ValueError(f"{name} has shape {tuple(image.shape)}; expected (B,C,{size[1]},{size[0]})")

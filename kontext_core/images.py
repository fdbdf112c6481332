"""Pictures: files, PIL, uint8 and a host's floats <-> (B,3,H,W) float32 in [-1,1], alpha kept aside.

Reading turns whatever a camera or a painting program wrote into plain RGB: upright, first frame, 8 or 16
bits, palette, grey, CMYK. Writing goes beside the target and is renamed when it is whole, so that an
interrupt leaves either the old file or the new one.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

logger = logging.getLogger("kontext")

MAX_PIXELS = 200_000_000  # beyond it a picture is taken for a mistake or a decompression bomb
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture as it was read.

    Attributes:
        image: (1,3,H,W) float32 in [-1,1].
        alpha: (1,1,H,W) float32 in [0,1], or None when the file has no transparency.
        icc_profile: the RGB colour profile that the numbers are meant in, to be written back with them.
        text: the PNG's text chunks.
    """

    image: Tensor
    alpha: Tensor | None = None
    icc_profile: bytes | None = None
    text: Mapping[str, str] = field(default_factory=dict)


def load_image(source: str | os.PathLike | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a picture file of any format that Pillow knows.

    Of an animation it is the first frame; EXIF orientation is applied; 16-bit grey keeps its precision, while
    Pillow itself reads 16-bit colour to 8 bits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, is truncated or damaged, or has more than `max_pixels` pixels.
    """
    name = str(source) if isinstance(source, str | os.PathLike) else getattr(source, "name", "the picture")
    too_large = f"up to {max_pixels / 1e6:g} million pixels are read: make it smaller first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no picture at {name}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder; give a picture file") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has far too many pixels; {too_large}") from error
    except UnidentifiedImageError as error:
        kinds = "PNG, JPEG, WebP, TIFF, GIF, BMP and what else Pillow opens"
        raise ValueError(f"{name} is not a picture that can be read; use {kinds}") from error
    with opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise ValueError(f"{name} has {width}x{height} pixels; {too_large}")
        try:
            opened.seek(0)
            opened.load()
        except (OSError, SyntaxError, EOFError, ValueError) as error:
            # Pillow's decoders use these four for damaged data.
            raise ValueError(f"{name} is truncated or damaged: {error}") from error
        text = {k: v for k, v in getattr(opened, "text", {}).items() if isinstance(v, str)}
        return replace(from_pil(ImageOps.exif_transpose(opened)), text=text)


def from_pil(image: Image.Image) -> Picture:
    """A PIL picture of any mode as a `Picture`.

    Raises:
        ValueError: a floating-point picture whose values leave 0..1, or an integer one beyond 16 bits.
    """
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I") or image.mode == "F":
        grey = torch.from_numpy(_grey_levels(image)).float()
        rgb = grey.expand(3, -1, -1)[None] * 2 - 1
        return Picture(image=rgb.contiguous())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = torch.from_numpy(np.array(image.getchannel("A")))[None, None].float() / 255
        image = image.convert("RGB")
    elif image.mode == "CMYK":
        image, profile = _cmyk_to_rgb(image, profile), None
    elif image.mode != "RGB":
        # A grey or Lab profile describes other channels than the three that are written.
        image, profile = image.convert("RGB"), profile if image.mode == "P" else None
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return Picture(image=from_uint8(pixels), alpha=alpha, icc_profile=profile)


def to_pil(image: Tensor, alpha: Tensor | None = None) -> list[Image.Image]:
    """(B,3,H,W) in [-1,1], and (1 or B,1,H,W) alpha in [0,1], as one RGB or RGBA picture each."""
    pixels = to_uint8(image).permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(p) for p in pixels]
    if alpha is not None:
        levels = (alpha.float() * 255).round().clamp(0, 255).byte()[:, 0].cpu()
        for picture, level in zip(pictures, levels.expand(len(pictures), -1, -1), strict=True):
            picture.putalpha(Image.fromarray(level.numpy()))
    return pictures


def from_uint8(image: Tensor) -> Tensor:
    """uint8 levels of any shape as float32 in [-1,1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """[-1,1] of any shape as the nearest uint8 level; the exact inverse of `from_uint8`.

    Raises:
        ValueError: NaN or infinite values, which no picture has.
    """
    if not torch.isfinite(image).all():
        raise ValueError("the picture holds NaN or infinite values")
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()


def from_comfy(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """A host's IMAGE (B,H,W,C) in [0,1], C 1, 3 or 4, as ((B,3,H,W) in [-1,1], alpha (B,1,H,W) or None)."""
    if image.dim() != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an IMAGE is (B,H,W,C) with 1, 3 or 4 channels; got {tuple(image.shape)}")
    planes = image.movedim(-1, 1).float()
    alpha = planes[:, 3:] if planes.shape[1] == 4 else None
    return (planes[:, :3].expand(-1, 3, -1, -1) * 2 - 1).contiguous(), alpha


def to_comfy(image: Tensor, alpha: Tensor | None = None) -> Tensor:
    """(B,3,H,W) in [-1,1] as a host's IMAGE (B,H,W,3), or (B,H,W,4) with alpha, in [0,1].

    What lies within rounding of an 8-bit level is put on it: the host saves by cutting off, not by rounding,
    and would turn level 37 that comes back as 36.999997 into 36.
    """
    planes = ((image.float() + 1) / 2).clamp(0, 1)
    level = (planes * 255).round()
    planes = torch.where((planes * 255 - level).abs() < 1e-3, level / 255, planes)
    if alpha is not None:
        planes = torch.cat([planes, alpha.to(planes).expand(planes.shape[0], -1, -1, -1)], 1)
    return planes.movedim(1, -1).contiguous()


def save_image(
    path: str | os.PathLike,
    image: Tensor,
    alpha: Tensor | None = None,
    *,
    text: Mapping[str, str] | None = None,
    icc_profile: bytes | None = None,
) -> Path:
    """Write one picture, (1,3,H,W) in [-1,1], whole or not at all. The suffix decides the format.

    Args:
        text: PNG text chunks, keyword to text (UTF-8); other formats have none and a warning says so.

    Raises:
        ValueError: an unknown suffix, more than one picture, alpha for a format without it, NaN values.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"cannot tell the format of {path.name!r}; use one of {', '.join(FORMATS)}")
    if image.dim() != 4 or image.shape[0] != 1 or image.shape[1] != 3:
        raise ValueError(f"one picture (1,3,H,W) is saved to a file; got shape {tuple(image.shape)}")
    if alpha is not None and kind == "JPEG":
        raise ValueError(f"{path.name}: JPEG has no transparency; use .png or .webp")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it first")
    picture = to_pil(image, alpha)[0]
    options: dict = {"icc_profile": icc_profile} if icc_profile else {}
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in (text or {}).items():
            chunks.add_itxt(key, value)
        options["pnginfo"] = chunks
    else:
        options |= {"quality": 95} | ({"lossless": True} if kind == "WEBP" else {"subsampling": 0})
        if text:
            logger.warning("%s: only PNG keeps the record of how it was made", path.name)
    data = io.BytesIO()
    picture.save(data, kind, **options)
    write_whole(path, data.getvalue())
    return path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it: there is never half a file under its name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _grey_levels(image: Image.Image) -> np.ndarray:
    """Modes I, I;16 and F as float64 (H,W) in 0..1."""
    values = np.array(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the picture holds NaN or infinite values")
    top = 1.0 if image.mode == "F" else 65535.0
    if values.min() < 0 or values.max() > top:
        found = f"{values.min():g} to {values.max():g}"
        raise ValueError(f"values of a {image.mode} picture go from {found}; 0 to {top:g} can be read")
    return values / top


def _cmyk_to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Through the picture's own profile to sRGB, or by Pillow's plain formula without a usable one."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            logger.warning("the CMYK colour profile cannot be used (%s); colours are approximate", error)
    return image.convert("RGB")

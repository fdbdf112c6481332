"""A folder of pairs as training data: targets with captions, and controls of the same file names (ai-toolkit's layout).

    targets/0001.png   targets/0001.txt   controls/0001.jpg

Each pair is encoded once, pictures and words, into shards beside the run, one group a size; a shard is made again only
when a file in it, its caption, the size or the model has changed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import geometry, latents
from ..conditioning import encode_prompt
from ..edit import encode_image
from ..images import load_image
from .data import LatentDataset, write_shard

if TYPE_CHECKING:
    from ..weights.load import KontextModel

log = logging.getLogger("kontext")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHARD = 32  # pairs a file


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A target, what it is made from (None: from text alone), and the instruction."""

    target: Path
    control: Path | None
    caption: str

    def stamp(self) -> str:
        """Changes with the files and the caption."""
        parts = [self.caption]
        for path in (self.target, self.control):
            if path is not None:
                status = path.stat()
                parts += [path.name, str(status.st_size), str(status.st_mtime_ns)]
        return "\0".join(parts)


def find_pairs(
    targets: str | Path, controls: str | Path | None = None, *, default_caption: str | None = None
) -> list[Pair]:
    """The pairs of a folder, by name.

    Args:
        controls: folder of context pictures; None trains text to image.
        default_caption: for targets without a .txt.

    Raises:
        ValueError: a folder is missing or empty, or a target has no caption or control; the first few are named.
    """
    pictures = _pictures(Path(targets), "targets")
    contexts = {} if controls is None else _pictures(Path(controls), "controls")
    without_control = [name for name in pictures if controls is not None and name not in contexts]
    if without_control:
        raise ValueError(
            f"{_some(without_control)} in {targets} have no picture of the same name in {controls}; add them, or "
            "take the targets away"
        )
    pairs, without_caption = [], []
    for name, path in pictures.items():
        words = path.with_suffix(".txt")
        if words.is_file():
            caption = " ".join(words.read_text(encoding="utf-8").split())
        elif default_caption is not None:
            caption = default_caption
        else:
            without_caption.append(name)
            continue
        pairs.append(Pair(target=path, control=contexts.get(name), caption=caption))
    if without_caption:
        raise ValueError(
            f"{_some(without_caption)} in {targets} have no caption: write the instruction into a .txt of the same "
            "name, or give a default caption"
        )
    return pairs


def load_pairs(
    model: KontextModel,
    pairs: Sequence[Pair],
    cache: Path,
    *,
    areas: Sequence[int],
    fit: str = "crop",
    phase_steps: int | None = None,
    on_pair: Callable[[int, int], None] | None = None,
) -> LatentDataset:
    """Encode what is not in the cache yet, and load everything.

    Args:
        areas: pixels of the pictures; several train at several resolutions.
        fit: how a picture meets its bucket, see `geometry.fit`.
        phase_steps: with several areas, begin with the smallest and let the next one join after so many steps;
            None draws them all alike.
        on_pair: called with (done, total) while encoding.
    """
    model_stamp = _model_stamp(model)
    groups: dict[str, list[Path]] = {}
    shares: dict[int, dict[str, float]] = {area: {} for area in sorted(set(areas))}
    jobs: list[tuple[Path, list[Pair], list]] = []
    for area in shares:
        by_size: dict[tuple, list[Pair]] = {}
        for pair in pairs:
            by_size.setdefault(_sizes(pair, area, fit), []).append(pair)
        for sizes, members in by_size.items():
            name = f"{area}-" + "-from-".join(f"{w}x{h}" for w, h in sizes)
            shares[area][name] = float(len(members))
            for start in range(0, len(members), SHARD):
                part = members[start : start + SHARD]
                key = "\0".join([model_stamp, fit, name, *(pair.stamp() for pair in part)])
                path = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
                groups.setdefault(name, []).append(path)
                if not path.is_file():
                    jobs.append((path, part, list(sizes)))
    total, done = sum(len(part) for _, part, _ in jobs), 0
    for path, part, sizes in jobs:
        rows = []
        for pair in part:
            rows.append(_encode(model, pair, sizes, fit))
            done += 1
            if on_pair is not None:
                on_pair(done, total)
        write_shard(path, {key: torch.cat([row[key] for row in rows]) for key in rows[0]})
    _forget(cache, {path for files in groups.values() for path in files})
    if phase_steps is None:
        everything = {name: share for of_area in shares.values() for name, share in of_area.items()}
        return LatentDataset(groups, everything)
    begun: dict[str, float] = {}
    phases = []
    for number, of_area in enumerate(shares.values()):
        begun = {**begun, **of_area}
        phases.append((number * phase_steps, begun))
    return LatentDataset(groups, phases[0][1], phases[1:])


def empty_prompt(model: KontextModel) -> tuple[Tensor, Tensor]:
    """txt (L, context_in) and vec (vec_in,) of the empty prompt, for dropped captions."""
    encoded = encode_prompt(model, [""])
    return encoded.txt[0].clone(), encoded.vec[0].clone()


def _pictures(folder: Path, what: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{what}: {folder} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            if path.stem in found:
                raise ValueError(
                    f"{folder} has both {found[path.stem].name} and {path.name}: keep one of them"
                )
            found[path.stem] = path
    if not found:
        raise ValueError(f"{what}: {folder} holds no pictures ({', '.join(SUFFIXES)})")
    return found


def _some(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _sizes(pair: Pair, area: int, fit: str) -> tuple:
    """Canvas (width, height) of the target and, if there is one, of the control: each its own nearest bucket."""
    from PIL import Image

    sizes = []
    for path in (pair.target, pair.control):
        if path is None:
            continue
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(0x0112, 1) >= 5
                size = image.size[::-1] if turned else image.size
        except OSError as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error
        sizes.append(geometry.fit(size, fit, max_area=area).size)
    return tuple(sizes)


def _encode(model: KontextModel, pair: Pair, sizes: list, fit: str) -> dict[str, Tensor]:
    """One pair's row of a shard."""
    out = {}
    for key, path, size in zip(("target", "context"), (pair.target, pair.control), sizes, strict=False):
        picture = load_image(path).image
        plan = geometry.fit((picture.shape[-1], picture.shape[-2]), fit, size)
        out[key] = encode_image(model, geometry.apply(plan, picture)).half().cpu()
    encoded = encode_prompt(model, [pair.caption])
    for warning in encoded.warnings:
        log.warning("%s: %s", pair.target.name, warning)
    out["txt"], out["vec"] = encoded.txt.cpu().clone(), encoded.vec.cpu().clone()
    h, w = out["target"].shape[-2:]
    out["weight"] = torch.zeros(1, h * w // latents.PATCH**2, dtype=torch.uint8)
    return out


def _model_stamp(model: KontextModel) -> str:
    """Changes with the autoencoder and the text encoders: their sizes and a few of their numbers."""
    parts = []
    for module in (model.autoencoder, model.t5, model.clip):
        parts.append(repr(module.params))
        for parameter in list(module.parameters())[:: max(1, len(list(module.parameters())) // 8)]:
            row = parameter.detach().reshape(-1)[:64].contiguous().view(torch.uint8)
            parts.append(hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest())
    return "\0".join([*parts, str(model.t5_tokenizer.max_length)])


def _forget(cache: Path, wanted: set[Path]) -> None:
    """Take shards away that no pair needs any more."""
    for path in cache.glob("*.safetensors"):
        if path not in wanted:
            log.info("%s is out of date; taking it away", path.name)
            path.unlink()

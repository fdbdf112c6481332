"""Several edits in a row on one picture, latents chained: how much of what no edit touched is still as it was.

A chain is a scene and local edits of it, each of the scene that the one before should have left. The truth knows
where each edit falls; all other pixels are compared with the first picture. No masks are composited anywhere.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..edit import decode_latent, edit_image, encode_image
from ..schedules import Shift
from . import holdout, phrases
from .dice import Dice
from .editor import SAMPLER, SHIFT
from .edits import LOCAL_KINDS, Draft, local_edit
from .measures import as_floats, psnr
from .render import render
from .scene import Scene
from .scorer import score
from .world import VERSION, Example, change_mask, plan

if TYPE_CHECKING:
    from ..weights.load import KontextModel

GOAL = 30.0  # dB
SMALLEST = 0.2  # a thing of less is not edited on: at 128 pixels it is a few blocks of the autoencoder
_TRIES = 200


@dataclass(frozen=True, kw_only=True)
class ChainReport:
    """A finished measurement.

    Attributes:
        summary: `{"suite", "measure", "split", "model", "steps", "seed", "count", "goal", "share", "psnr", "done",
            "autoencoder", "seconds_per_edit", "turns"}`: after the last turn the share of chains that reach the goal
            (dB), their PSNR as {"mean", "median", "lowest"}, the share of edits done over all turns, and what the
            autoencoder alone leaves in the same pixels; "turns" has the same turn by turn.
        sheet: the first picture and every turn of the first chains, edited pixels darkened in the last.
    """

    summary: dict[str, Any]
    sheet: Image.Image

    @property
    def table(self) -> str:
        """The summary as text."""
        lines = [
            f"{'turn':<6}{'median dB':>10}{'mean dB':>9}{'lowest':>8}{'>= ' + str(int(GOAL)):>8}{'done':>7}"
        ]
        for row in self.summary["turns"]:
            found = row["psnr"]
            lines.append(
                f"{row['turn']:<6}{found['median']:>10.2f}{found['mean']:>9.2f}{found['lowest']:>8.2f}"
                f"{row['share']:>8.3f}{row['done']:>7.3f}"
            )
        alone = self.summary["autoencoder"]
        lines.append(f"autoencoder alone: {alone['median']:.2f} dB in the pixels left after the last turn")
        lines.append(f"{self.summary['seconds_per_edit']:.3f} seconds per edit")
        return "\n".join(lines)


def make_chain(split: str, number: int, turns: int, size: tuple[int, int] = (128, 128)) -> list[Example]:
    """The examples of one chain: each one's context is the target of the one before.

    Args:
        number: any integer from 0; every number is another chain.
        size: (w, h) in pixels.
    """
    first = plan(split, "local", 2 * number)  # even: nothing held out is asked for
    scene = first.truth.before
    assert scene is not None
    picture, chain = render(scene, size), []
    for turn in range(turns):
        draft = _next(split, number, turn, scene)
        target = render(draft.after, size)
        chain.append(
            Example(
                split=split,
                category="local",
                kind=draft.kind,
                index=number * turns + turn,
                novel=False,
                instruction=draft.instruction,
                caption="",
                context=picture,
                target=target,
                change_mask=change_mask(picture, target),
                truth=replace(first.truth, before=scene, after=draft.after),
            )
        )
        scene, picture = draft.after, target
    return chain


def _next(split: str, number: int, turn: int, scene: Scene) -> Draft:
    dice = Dice("kontext-tiny chain", VERSION, split, number, turn)
    kinds = dict(LOCAL_KINDS)
    # as in training, two to four things stand in every context
    if len(scene.things) <= 2:
        del kinds["remove"]
    if len(scene.things) >= 4:
        del kinds["add"]
    for _ in range(_TRIES):
        draft = local_edit(dice, dice.weighted(kinds), scene)
        if draft is None or phrases.tokens(draft.instruction) > phrases.LIMIT:
            continue
        if min(thing.size for thing in draft.after.things) < SMALLEST:
            continue
        if holdout.admissible(split, draft.before, draft.after, set(draft.focus), False):
            return draft
    raise AssertionError(f"no edit of chain {number}, turn {turn + 1}, in {_TRIES} draws")


def run_chains(
    model: KontextModel,
    *,
    split: str = "test",
    count: int = 20,
    turns: int = 5,
    seed: int = 0,
    batch: int = 8,
    num_steps: int | None = None,
    few_step: int | None = None,
    guidance: float | None = None,
    sampler: str = SAMPLER,
    shift: Shift = SHIFT,
    size: tuple[int, int] = (128, 128),
    sheet_rows: int = 6,
    on_chain: Callable[[int, int], None] | None = None,
) -> ChainReport:
    """Edit `count` pictures `turns` times in a row and compare what no edit should have touched.

    Args:
        seed: which chains, and their noise.
        num_steps, few_step, guidance, sampler, shift: as `edit_image` takes them.
        on_chain: called with (chains so far, count) after each batch.

    Raises:
        ValueError: count, turns or batch below 1.
    """
    if min(count, turns, batch) < 1:
        raise ValueError(f"count is {count}, turns {turns} and batch {batch}; ask for at least 1 of each")
    numbers = [seed * 100_000 + k for k in range(count)]
    quality, done = np.zeros((count, turns)), np.zeros((count, turns), dtype=bool)
    alone, seconds, shown = np.zeros(count), 0.0, []
    for start in range(0, count, batch):
        chains = [make_chain(split, number, turns, size) for number in numbers[start : start + batch]]
        pictures = torch.from_numpy(np.stack([chain[0].context for chain in chains]))
        pictures = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        given = {
            "num_steps": num_steps,
            "few_step": few_step,
            "guidance": guidance,
            "sampler": sampler,
            "shift": shift,
        }
        edited = [np.zeros(size[::-1], dtype=bool) for _ in chains]
        panels = [[chain[0].context] for chain in chains]
        latent: Tensor | None = None
        for turn in range(turns):
            result = edit_image(
                model,
                pictures if latent is None else None,
                [chain[turn].instruction for chain in chains],
                seed=[seed + chain[turn].index for chain in chains],
                reference_latents=() if latent is None else [latent],
                **given,
            )
            latent, seconds = result.latent, seconds + sum(result.seconds.values())
            for k, (chain, made) in enumerate(zip(chains, _bytes(result.images), strict=True)):
                edited[k] |= chain[turn].change_mask
                quality[start + k, turn] = _untouched(made, chain[0].context, edited[k])
                done[start + k, turn] = score(chain[turn], made).done
                panels[k].append(made)
        back = _bytes(decode_latent(model, encode_image(model, pictures)))
        for k, chain in enumerate(chains):
            alone[start + k] = _untouched(back[k], chain[0].context, edited[k])
            if len(shown) < sheet_rows:
                shown.append((panels[k], [item.instruction for item in chain], edited[k]))
        if on_chain is not None:
            on_chain(start + len(chains), count)
    rows = [
        {
            "turn": turn + 1,
            "share": float((quality[:, turn] >= GOAL).mean()),
            "psnr": _spread(quality[:, turn]),
            "done": float(done[:, turn].mean()),
        }
        for turn in range(turns)
    ]
    summary = {
        "suite": "tiny",
        "measure": "turns",
        "split": split,
        "model": model.name,
        "steps": few_step or num_steps or model.preset.default_steps,
        "seed": seed,
        "count": count,
        "goal": GOAL,
        "share": rows[-1]["share"],
        "psnr": rows[-1]["psnr"],
        "done": float(done.mean()),
        "autoencoder": _spread(alone),
        "seconds_per_edit": seconds / (count * turns),
        "turns": rows,
    }
    return ChainReport(summary=summary, sheet=_sheet(shown))


def _bytes(images: Tensor) -> list[np.ndarray]:
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def _untouched(picture: np.ndarray, first: np.ndarray, edited: np.ndarray) -> float:
    """PSNR in dB outside the edits."""
    return psnr(as_floats(picture), as_floats(first), ~edited)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "median": float(np.median(values)), "lowest": float(values.min())}


def _sheet(shown: list[tuple[list[np.ndarray], list[str], np.ndarray]]) -> Image.Image:
    height, width = shown[0][0][0].shape[:2]
    gap, words = 6, 30
    columns = len(shown[0][0]) + 1
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, len(shown) * (height + words + gap) + gap), (252, 251, 248)
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row, (panels, instructions, edited) in enumerate(shown):
        top = gap + row * (height + words + gap)
        touched = np.where(edited[..., None], panels[-1] // 4, panels[-1])
        for column, panel in enumerate([*panels, touched]):
            left = gap + column * (width + gap)
            sheet.paste(Image.fromarray(panel), (left, top))
            if 0 < column <= len(instructions):
                text = "\n".join(textwrap.wrap(instructions[column - 1], width // 6)[:2])
                draw.multiline_text((left, top + height + 2), text, fill=(50, 46, 60), font=font, spacing=1)
    return sheet

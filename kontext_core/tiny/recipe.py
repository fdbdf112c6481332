"""The recipe of kontext-tiny: one command a stage, `python -m kontext_core.tiny.recipe STAGE`.

Stages, in order: `autoencoder`, `encode` (latents of the world on disk), `flow` (transformer and text encoders),
`export` (the bundled files). Each goes on where it was stopped; work lands in runs/tiny by default.
"""

from __future__ import annotations

import argparse
import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.autoencoder import Autoencoder, AutoencoderParams
from ..training import mixed
from ..training.autoencoder import AutoencoderLoss, AutoencoderTask, normalise_latents, reconstruction_psnr
from ..training.checkpoint import save_weights
from ..training.loop import LoopConfig, train
from . import world

log = logging.getLogger("kontext")

AUTOENCODER = AutoencoderParams(ch=16, ch_mult=(1, 2, 4, 8), num_res_blocks=1)
CATEGORIES = ("local", "global", "text", "style", "character")
"""What the autoencoder sees, in turn."""


@lru_cache(maxsize=2)
def picture_pool(count: int, split: str = "train") -> Tensor:
    """uint8 (count, 3, 128, 128): contexts and targets of the world, all categories in turn."""
    pictures: list[np.ndarray] = []
    index = 0
    while len(pictures) < count:
        example = world.example(split, CATEGORIES[index % len(CATEGORIES)], index // len(CATEGORIES))
        pictures += [picture for picture in (example.context, example.target) if picture is not None]
        index += 1
    return torch.from_numpy(np.stack(pictures[:count])).permute(0, 3, 1, 2).contiguous()


def train_autoencoder(folder: Path, *, steps: int, finish_steps: int, pool: int, batch: int, seconds: float | None) -> None:
    """Train, normalise the latents, train briefly again; writes ae.safetensors."""
    torch.manual_seed(0)
    module = Autoencoder(AUTOENCODER, operations=mixed)
    pictures = picture_pool(pool)

    def draw(step: int, micro: int, count: int) -> Tensor:
        rows = torch.randint(len(pictures), (count,), generator=torch.Generator().manual_seed(step * 7 + micro))
        return pictures[rows]

    first = LoopConfig(steps=steps, batch=batch, lr=2e-3, warmup=50, ema=0.995, checkpoint_every=100)
    task = AutoencoderTask(module, draw, AutoencoderLoss(), torch.bfloat16)
    train(task, first, folder / "first", stop_after_seconds=seconds)
    held_out = picture_pool(60, "val").float() / 127.5 - 1
    log.info("autoencoder: %.2f dB", reconstruction_psnr(module, held_out))
    normalise_latents(module, pictures[:256].float() / 127.5 - 1)
    log.info("autoencoder, normalised: %.2f dB", reconstruction_psnr(module, held_out))
    second = LoopConfig(steps=finish_steps, batch=batch // 2, lr=3e-4, warmup=20, ema=0.99, checkpoint_every=100, seed=1)
    # whole pictures only: GroupNorm's statistics are over the picture
    terms = AutoencoderLoss(kl=0.0, full_every=1, crop=128)
    module.encoder.requires_grad_(False)
    train(AutoencoderTask(module, draw, terms, torch.bfloat16), second, folder / "finish", stop_after_seconds=seconds)
    log.info("autoencoder, finished: %.2f dB", reconstruction_psnr(module, held_out))
    save_weights(folder / "ae.safetensors", module.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("autoencoder",))
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="working folder")
    parser.add_argument("--steps", type=int, default=None, help="steps of the stage (the recipe's by default)")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this long, resumable")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.stage == "autoencoder":
        folder = args.runs / "autoencoder"
        train_autoencoder(folder, steps=args.steps or 1600, finish_steps=150, pool=3000, batch=16, seconds=args.seconds)


if __name__ == "__main__":
    main()

"""The autoencoder of kontext-tiny: its training from nothing, and of one half alone."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..devices import fast_dtype
from ..models.autoencoder import Autoencoder, AutoencoderParams
from ..training import mixed
from ..training.autoencoder import (
    AutoencoderLoss,
    AutoencoderTask,
    Pictures,
    init_low_pass,
    normalise_latents,
    reconstruction_psnr,
)
from ..training.checkpoint import save_weights
from ..training.loop import LoopConfig, steps_done, train
from ..weights.locate import BUNDLED
from . import world

log = logging.getLogger("kontext")

AUTOENCODER = AutoencoderParams(ch=16, ch_mult=(1, 2, 4, 8), num_res_blocks=1)
BUNDLED_FILE = BUNDLED["kontext-tiny"] / "ae.safetensors"
DTYPE = fast_dtype("cpu", torch.bfloat16)
CATEGORIES = ("local", "global", "text", "style", "character")
"""What the autoencoder sees, in turn."""
Half = Literal["encoder", "decoder"]


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


def train_autoencoder(
    folder: Path,
    *,
    steps: int,
    finish_steps: int,
    pool: int,
    batch: int,
    seconds: float | None,
    warm: bool = False,
    held_out: int = 60,
) -> None:
    """Train, normalise the latents, train briefly again; writes ae.safetensors, also of an unfinished second part.

    Args:
        pool: pictures to train on; held_out: pictures of the validation split that the log's PSNR is measured on.
        seconds: stop after this long, resumable.
        warm: start from the bundled weights, at half the rate: the latents stay near what they were.
    """
    started = time.time()
    torch.manual_seed(0)
    module = Autoencoder(AUTOENCODER, operations=mixed)
    if warm:
        module.load_state_dict(floats(BUNDLED_FILE))
    else:
        init_low_pass(module, torch.Generator().manual_seed(0))
    pictures = picture_pool(pool)
    first = LoopConfig(
        steps=steps,
        batch=batch,
        lr=5e-4 if warm else 1e-3,
        muon_lr=1e-3 if warm else 2e-3,
        warmup=20,
        ema=0.995,
        checkpoint_every=100,
    )
    task = AutoencoderTask(module, _draws(pictures), AutoencoderLoss(), DTYPE)
    train(task, first, folder / "first", stop_after_seconds=seconds)
    unseen = picture_pool(held_out, "val").float() / 127.5 - 1
    log.info("autoencoder: %.2f dB", reconstruction_psnr(module, unseen))
    if steps_done(folder / "first") < steps:
        # latents are normalised once, when they have stopped moving: the second part trains a decoder for them
        return
    normalise_latents(module, pictures[:256].float() / 127.5 - 1)
    log.info("autoencoder, normalised: %.2f dB", reconstruction_psnr(module, unseen))
    second = LoopConfig(
        steps=finish_steps,
        batch=batch // 2,
        lr=3e-4,
        muon_lr=6e-4,
        warmup=20,
        ema=0.99,
        checkpoint_every=100,
        seed=1,
    )
    left = None if seconds is None else max(0.0, seconds - (time.time() - started))
    train(_half_task(module, "decoder", pictures), second, folder / "finish", stop_after_seconds=left)
    log.info("autoencoder, finished: %.2f dB", reconstruction_psnr(module, unseen))
    save_weights(folder / "ae.safetensors", module.state_dict())


def train_half(
    folder: Path,
    half: Half,
    *,
    steps: int,
    pool: int,
    batch: int,
    lr: float,
    seconds: float | None,
    held_out: int = 60,
) -> None:
    """Train one half of the bundled autoencoder on whole pictures, the other one frozen; writes ae.safetensors.

    The decoder alone leaves the latents what they are, and every model that was trained on them right. The encoder
    alone learns to say all that the decoder can paint: latents keep their meaning and gain detail, and the flow has to
    be trained on them for a while.

    Args:
        half: which is trained.
        pool, held_out: as in `train_autoencoder`; batch: four times the pictures of a step.
        lr: AdamW's, Muon's is twice it.
        seconds: stop after this long, resumable.
    """
    module = Autoencoder(AUTOENCODER, operations=mixed)
    module.load_state_dict(floats(BUNDLED_FILE))
    pictures, unseen = picture_pool(pool), picture_pool(held_out, "val").float() / 127.5 - 1
    log.info("autoencoder: %.2f dB", reconstruction_psnr(module, unseen))
    config = LoopConfig(
        steps=steps, batch=batch, lr=lr, muon_lr=2 * lr, warmup=20, ema=0.99, checkpoint_every=100, seed=1
    )
    train(_half_task(module, half, pictures), config, folder / half, stop_after_seconds=seconds)
    log.info("autoencoder, its %s finished: %.2f dB", half, reconstruction_psnr(module, unseen))
    save_weights(folder / "ae.safetensors", module.state_dict())


def _draws(pictures: Tensor) -> Pictures:
    """Random rows of the pool: the same for the same step and micro-batch."""

    def draw(step: int, micro: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(step * 7 + micro)
        return pictures[torch.randint(len(pictures), (count,), generator=generator)]

    return draw


def _half_task(module: Autoencoder, half: Half, pictures: Tensor) -> AutoencoderTask:
    """One half on whole pictures, since GroupNorm's statistics are over the picture; the other is frozen."""
    frozen = module.encoder if half == "decoder" else module.decoder
    frozen.requires_grad_(False)
    terms = AutoencoderLoss(kl=0.0 if half == "decoder" else AutoencoderLoss.kl, full_every=1, crop=128)
    return AutoencoderTask(module, _draws(pictures), terms, DTYPE)


def floats(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors as float32, whatever they are stored in."""
    return {name: value.float() for name, value in load_file(file).items()}

"""The autoencoder's stage in two parts, stopped after every step and gone on with."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from kontext_core.tiny.autoencode import train_autoencoder
from kontext_core.training.loop import steps_done

OPTIONS = {"steps": 2, "finish_steps": 2, "pool": 8, "batch": 4, "warm": True, "held_out": 2}


def test_a_stage_stopped_in_either_part_ends_as_one_that_never_was(tmp_path):
    train_autoencoder(tmp_path / "whole", seconds=None, **OPTIONS)
    parts, seen = tmp_path / "parts", []
    for _ in range(3):
        train_autoencoder(parts, seconds=0.0, **OPTIONS)
        seen.append((steps_done(parts / "first"), steps_done(parts / "finish")))
    # the second part begins only when the first has ended: its decoder is for those latents and no others
    assert seen == [(1, 0), (2, 1), (2, 2)]
    whole, again = (load_file(tmp_path / name / "ae.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)

"""Fixtures for the whole tree: a model of kontext-tiny's shape with random weights, for tests of machinery."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


def write_random_tiny(folder: Path, *, seed: int = 0, few_step: bool = False) -> Path:
    """A model folder in the layout of the published one, of kontext-tiny's sizes, with random weights."""
    import torch
    from safetensors.torch import save_file

    from kontext_core.models.autoencoder import Autoencoder
    from kontext_core.models.clip import ClipTextEncoder
    from kontext_core.models.t5 import T5Encoder
    from kontext_core.models.transformer import Flux
    from kontext_core.presets import KONTEXT_TINY
    from kontext_core.weights.locate import BUNDLED

    assets = BUNDLED["kontext-tiny"]
    torch.manual_seed(seed)
    files = {
        "flux1-kontext-tiny.safetensors": Flux(KONTEXT_TINY.transformer),
        "ae.safetensors": Autoencoder(KONTEXT_TINY.autoencoder),
        "text_encoder/model.safetensors": ClipTextEncoder(KONTEXT_TINY.clip),
        "text_encoder_2/model.safetensors": T5Encoder(KONTEXT_TINY.t5),
    }
    if few_step:
        files["flux1-kontext-tiny-fewstep.safetensors"] = Flux(KONTEXT_TINY.transformer)
    for name, module in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)
    heads = {"num_attention_heads": KONTEXT_TINY.clip.num_heads}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(heads))
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(assets / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def random_tiny_folder(tmp_path_factory) -> Path:
    """A folder with random weights of kontext-tiny's shape; the same in every run. Not to be written to."""
    return write_random_tiny(tmp_path_factory.mktemp("models") / "random-tiny")


@pytest.fixture(scope="session")
def random_few_step_folder(tmp_path_factory) -> Path:
    """The same with a distilled transformer beside the other."""
    return write_random_tiny(tmp_path_factory.mktemp("models") / "random-tiny-fewstep", few_step=True)

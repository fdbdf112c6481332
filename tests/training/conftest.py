"""A small flow task that trains in milliseconds a step: random latents and words, transformer and text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kontext_core.models.clip import ClipParams, ClipTextEncoder
from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.training import mixed
from kontext_core.training.data import LatentDataset, write_shard
from kontext_core.training.flow import FlowConfig, FlowTask, KontextModule

TRANSFORMER = TransformerParams(
    vec_in_dim=16, context_in_dim=24, hidden_size=32, num_heads=2, depth=1, depth_single_blocks=2, axes_dim=(4, 6, 6)
)  # fmt: skip
T5 = T5Params(vocab_size=30, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
CLIP = ClipParams(
    vocab_size=30, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, max_length=8, eos_token_id=29
)  # fmt: skip


def make_module(seed: int = 0) -> KontextModule:
    """Weights of a start for training, with the zeros of adaLN filled, so that every gradient is there at once."""
    generator = torch.Generator().manual_seed(seed)
    module = KontextModule(
        Flux(TRANSFORMER, operations=mixed),
        T5Encoder(T5, operations=mixed),
        ClipTextEncoder(CLIP, operations=mixed),
    )
    for part in (module.transformer, module.t5, module.clip):
        part.init_weights(generator)
    with torch.no_grad():
        for parameter in module.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    return module


def write_data(folder: Path, count: int = 6) -> dict[str, list[Path]]:
    """Shards of edits (4×4 cells) and of text to image (4×6 cells), every number random."""
    generator = torch.Generator().manual_seed(3)
    groups = {}
    for name, (h, w) in {"edit": (4, 4), "text": (4, 6)}.items():
        clip = torch.randint(0, 28, (count, 8), generator=generator).int()
        clip[:, 5:] = 29
        tensors = {
            "target": torch.randn(count, 16, h, w, generator=generator).half(),
            "t5": torch.randint(0, 30, (count, 6), generator=generator).int(),
            "clip": clip,
            "weight": torch.randint(0, 256, (count, h * w // 4), generator=generator).to(torch.uint8),
        }
        if name == "edit":
            tensors["context"] = torch.randn(count, 16, 4, 4, generator=generator).half()
        write_shard(folder / f"{name}.safetensors", tensors)
        groups[name] = [folder / f"{name}.safetensors"]
    return groups


def make_task(groups: dict[str, list[Path]], *, seed: int = 0, dtype=torch.float32, **options) -> FlowTask:
    data = LatentDataset(groups, dict.fromkeys(groups, 1.0))
    empty = torch.ones(6, dtype=torch.long), torch.full((8,), 29)
    config = options.pop("config", FlowConfig())
    return FlowTask(make_module(seed), data, config, empty=empty, dtype=dtype, **options)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, list[Path]]:
    return write_data(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def task_of(shards):
    """Makes a new task over the shards, always with the same weights."""

    def make(**options) -> FlowTask:
        return make_task(shards, **options)

    return make

"""A toy world: two patterns that nothing tells apart beforehand, and a teacher that has learnt them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kontext_core.models.clip import ClipParams, ClipTextEncoder
from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.training import mixed
from kontext_core.training.data import LatentDataset, write_shard
from kontext_core.training.flow import FlowConfig, FlowTask, KontextModule
from kontext_core.training.loop import LoopConfig, train

CELLS, WORDS = 8, 4


def build_module(seed: int = 0, hidden: int = 32) -> KontextModule:
    """The smallest model of Kontext's shape: one double-stream and two single-stream blocks."""
    params = TransformerParams(
        vec_in_dim=16,
        context_in_dim=16,
        hidden_size=hidden,
        num_heads=2,
        depth=1,
        depth_single_blocks=2,
        axes_dim=(4, hidden // 4 - 2, hidden // 4 - 2),
        mlp_ratio=2.0,
    )
    t5 = T5Params(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    clip = ClipParams(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, eos_token_id=7
    )
    module = KontextModule(
        Flux(params, operations=mixed),
        T5Encoder(t5, operations=mixed),
        ClipTextEncoder(clip, operations=mixed),
    )
    generator = torch.Generator().manual_seed(seed)
    for part in (module.transformer, module.t5, module.clip):
        part.init_weights(generator)
    return module


def write_toy_shard(path: Path, *, count: int = 256, seed: int = 0, context: bool = False) -> Path:
    """Latents ±P plus a little noise, P one fixed pattern of fine detail; the same words for all."""
    pattern = torch.randn(16, CELLS, CELLS, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (count, 1, 1, 1), generator=generator) * 2.0 - 1
    target = sign * pattern + 0.1 * torch.randn(count, 16, CELLS, CELLS, generator=generator)
    clip = torch.zeros(count, 77, dtype=torch.int32)
    clip[:, 1] = 7
    tensors = {
        "target": target.half(),
        "t5": torch.ones(count, WORDS, dtype=torch.int32),
        "clip": clip,
        "weight": torch.zeros(count, (CELLS // 2) ** 2, dtype=torch.uint8),
    }
    if context:
        tensors["context"] = torch.randn(count, 16, CELLS, CELLS, generator=generator).half()
    write_shard(path, tensors)
    return path


@dataclass(frozen=True)
class Toy:
    """A trained teacher, the shard it learnt from and one it never saw."""

    teacher: KontextModule
    shard: Path
    held_out: Path

    def data(self) -> LatentDataset:
        return LatentDataset({"toy": [self.shard]}, {"toy": 1.0})


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    """A teacher that makes either pattern from noise; trained in a few seconds."""
    folder = tmp_path_factory.mktemp("toy")
    shard = write_toy_shard(folder / "toy.safetensors")
    held_out = write_toy_shard(folder / "held-out.safetensors", seed=1, count=128)
    module = build_module()
    empty = (torch.ones(WORDS, dtype=torch.int64), torch.zeros(77, dtype=torch.int64))
    flow = FlowConfig(t_mean=0.0, changed_weight=0.0, caption_dropout=0.0, guidance=(2.5, 2.5))
    data = LatentDataset({"toy": [shard]}, {"toy": 1.0})
    for part in (module.t5, module.clip):
        part.requires_grad_(False)  # all words are the same here
    task = FlowTask(module, data, flow, empty=empty, dtype=torch.float32)
    config = LoopConfig(
        steps=250, batch=32, lr=4e-3, warmup=10, ema=0.97, checkpoint_every=10_000, log_every=10_000
    )
    train(task, config, folder / "teacher")
    return Toy(module.eval(), shard, held_out)


@pytest.fixture(name="build_module", scope="session")
def build_module_fixture():
    """`build_module`, which tests cannot import."""
    return build_module


@pytest.fixture(name="write_toy_shard", scope="session")
def write_toy_shard_fixture():
    """`write_toy_shard`, likewise."""
    return write_toy_shard

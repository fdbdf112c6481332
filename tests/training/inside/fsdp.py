"""Runs under torchrun: a few steps on the shards in a folder; the first process prints losses and norms as JSON.

Arguments: this test folder, the shards' folder, the run's folder, the number of steps, and "sharded", "whole" or "muon"
(whole, with Muon).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def main(tests: str, shards: str, folder: str, steps: int, kind: str) -> None:
    import torch

    from kontext_core.training import parallel
    from kontext_core.training.activation import Checkpointing
    from kontext_core.training.loop import LoopConfig, train

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("small", Path(tests, "conftest.py"))
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    world = parallel.start()
    groups = {path.stem: [path] for path in sorted(Path(shards).glob("*.safetensors"))}
    task = small.make_task(groups, world=world, checkpointing=Checkpointing("full"))
    if kind == "sharded":
        parallel.shard(task.module, world, torch.float32)
    losses = []
    config = LoopConfig(
        steps=steps,
        batch=4,
        accumulate=2,
        lr=1e-3,
        muon_lr=2e-3 if kind == "muon" else 0.0,
        warmup=0,
        ema=0.9,
        checkpoint_every=2,
        log_every=1,
    )
    train(task, config, Path(folder), on_step=lambda step, steps, loss: losses.append(loss), world=world)
    total = sum(float(parallel.full(p.detach()).double().norm()) for p in task.module.parameters())
    if world.rank == 0:
        print(json.dumps({"size": world.size, "losses": losses, "norm": total}), flush=True)
    parallel.stop(world)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5])

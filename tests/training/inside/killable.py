"""Trains the small task in a folder, a line a step, a checkpoint every two; made to be killed.

Arguments: this test folder, the shards' folder, the run's folder, the number of steps.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main(tests: str, shards: str, folder: str, steps: int) -> None:
    import torch

    from kontext_core.training.loop import LoopConfig, train

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("small", Path(tests, "conftest.py"))
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    groups = {path.stem: [path] for path in sorted(Path(shards).glob("*.safetensors"))}
    config = LoopConfig(
        steps=steps, batch=2, lr=1e-3, muon_lr=1e-3, warmup=2, ema=0.9, checkpoint_every=2, log_every=1
    )
    train(
        small.make_task(groups),
        config,
        Path(folder),
        on_step=lambda step, steps, loss: print(step, loss.hex(), flush=True),
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))

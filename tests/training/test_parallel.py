"""Two processes over gloo, FSDP2 or each with the whole model, give one process's losses, weights and checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kontext_core.training.checkpoint import load_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(processes: int, shards: dict, folder: Path, steps: int, kind: str) -> dict:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    shard_folder = next(iter(shards.values()))[0].parent
    run = subprocess.run(
        [*command, str(HERE / "inside/fsdp.py"), str(HERE), str(shard_folder), str(folder), str(steps), kind],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow  # three starts of Python with torch.distributed
@pytest.mark.parametrize("kind", ["sharded", "whole", "muon"])
def test_two_processes_are_as_one_and_their_checkpoint_is_anyones(shards, tmp_path, kind):
    pytest.importorskip("torch.distributed.fsdp", reason="FSDP2 needs a newer torch").fully_shard  # noqa: B018
    one = launch(1, shards, tmp_path / "one", 4, kind)
    two = launch(2, shards, tmp_path / "two", 4, kind)
    assert (one["size"], two["size"]) == (1, 2)
    # the same rows summed in another order, over four steps of AdamW
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
    first, second = (load_checkpoint(tmp_path / name / "checkpoint") for name in ("one", "two"))
    assert first[1]["step"] == second[1]["step"] == 4
    for part, tensors in first[0].items():
        assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in second[0][part].items()}
    # what two processes began one goes on with
    resumed = launch(1, shards, tmp_path / "two", 6, kind)
    assert len(resumed["losses"]) == 2

"""Pictures along the way: the same edits with the averaged weights, every so many steps, and the loss as a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..edit import edit_image
from ..images import save_image

if TYPE_CHECKING:
    from ..weights.load import KontextModel


def preview_writer(
    model: KontextModel,
    folder: Path,
    edits: Sequence[tuple[Tensor | None, str]],
    *,
    num_steps: int | None = None,
    seed: int = 0,
) -> Callable[[int, nn.Module], None]:
    """A `preview` for `loop.train`: writes `<step>-<number>.png` for each (picture (1, 3, H, W) or None, prompt).

    Args:
        model: gives what is not trained; its transformer and, where they are trained, its text encoders are the
            trained module's.
    """
    if not edits:
        raise ValueError("no previews given: name a prompt, and a picture for an edit")

    def write(step: int, module: nn.Module) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"transformer": module.transformer}
        parts |= {name: part for name in ("t5", "clip") if (part := getattr(module, name)) is not None}
        trained = replace(model, few_step=None, **parts)
        was_training = module.training
        module.eval()
        try:
            for number, (picture, prompt) in enumerate(edits):
                result = edit_image(trained, picture, prompt, num_steps=num_steps, seed=seed)
                save_image(folder / f"{step:07d}-{number}.png", result.images)
        finally:
            module.train(was_training)

    return write


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.jsonl; a last line that is cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_loss(log: Path, output: Path) -> None:
    """Draw loss, its running mean and the gradient's norm over the steps of a log.jsonl.

    Raises:
        ValueError: matplotlib is not installed, or nothing is logged yet.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install flux-kontext[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_log(log) if log.is_file() else []
    if not rows:
        raise ValueError(f"{log} holds nothing to draw yet")
    steps = [row["step"] for row in rows]
    losses = torch.tensor([row["loss"] for row in rows])
    width = max(1, len(rows) // 20)
    smooth = [losses[max(0, i - width + 1) : i + 1].mean().item() for i in range(len(rows))]
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1))
    upper.plot(steps, losses, linewidth=0.6, alpha=0.4, label="loss")
    upper.plot(steps, smooth, label=f"mean of {width}")
    upper.set_ylabel("loss")
    upper.legend()
    lower.plot(steps, [row["gradient_norm"] for row in rows], linewidth=0.8)
    lower.set_ylabel("gradient norm")
    lower.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)

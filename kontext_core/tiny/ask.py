"""What the middle of the model knows: the flow stage's classifier asked what each token shows, or is going to show.

Near t = 1 nothing of the target is to be seen, so right answers there are what was understood of the words and of
the context: a low share says what a model plans wrongly, before a single picture is painted.

    python -m kontext_core.tiny.ask runs/tiny [--t 0.98] [--examples 96] [--categories text,character]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import flow, latents
from ..training.checkpoint import load_checkpoint
from ..training.data import LatentDataset
from ..training.flow import FlowConfig, FlowTask, Noised
from ..training.supervision import Listening, TokenClassifier
from .edits import DRAFTS
from .labels import CLASSES, PARTS
from .parts import DTYPE, build_module

Shares = dict[str, tuple[float, int]]
"""Field -> share of right answers, and of how many tokens."""


@torch.inference_mode()
def ask(task: FlowTask, batch: dict[str, Tensor], t: float, *, seed: int = 0) -> tuple[Shares, Shares]:
    """The classifier's shares of right answers on a batch of labelled examples, of target and context.

    Of the target, tokens count that the edit changes by a third or more; in fields of which a picture may show
    nothing, those that show something. No caption is dropped.

    Args:
        task: of a module with its classifier.
        batch: of a `LatentDataset`, with labels.
        t: one time for all, 1 is noise alone.

    Raises:
        ValueError: the module has no classifier, or the batch no labels.
    """
    classifier = task.module.classifier
    if classifier is None or "labels" not in batch:
        raise ValueError(
            "there is nothing to ask: give a module with its classifier, and a batch with labels"
        )
    x_0 = latents.pack(batch["target"].float())
    count, tokens = x_0.shape[:2]
    times = torch.full((count,), t)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    noisy, ids = flow.interpolate(x_0, eps, times), latents.position_ids(*batch["target"].shape[-2:])
    if "context" in batch:
        noisy = torch.cat((noisy, latents.pack(batch["context"].float())), dim=1)
        ids = torch.cat((ids, latents.position_ids(*batch["context"].shape[-2:], index=1)))
    weight = batch["weight"].float() / 255
    sample = Noised(
        tokens=noisy.to(task.dtype),
        ids=ids,
        target=flow.velocity_target(x_0, eps),
        t=times,
        guidance=torch.full((count,), 2.5),
        words=(batch["t5"], batch["clip"]),
        dropped=torch.zeros(count, dtype=torch.bool),
        weight=weight,
    )
    listening = Listening(classifier.after, None)
    task.velocity(sample, hooks=listening)
    assert listening.heard is not None
    heard = listening.heard.float()
    context: Shares = {}
    if "context_labels" in batch:
        labels = batch["context_labels"]
        everywhere = torch.ones(labels.shape[:2], dtype=torch.bool)
        context = _shares(classifier, heard[:, tokens:], labels, everywhere)
    return _shares(classifier, heard[:, :tokens], batch["labels"], weight >= 1 / 3), context


def _shares(classifier: TokenClassifier, heard: Tensor, labels: Tensor, where: Tensor) -> Shares:
    logits = classifier.linear_in(F.layer_norm(heard, heard.shape[-1:])).split(classifier.classes, dim=-1)
    found: Shares = {}
    for column, (name, part) in enumerate(zip(CLASSES, logits, strict=True)):
        truth = labels[..., column].long()
        counted = where & (truth > 0) if name in PARTS else where
        if counted.any():
            right = (part.argmax(-1) == truth) & counted
            found[name] = (float(right.sum() / counted.sum()), int(counted.sum()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="working folder of the recipe")
    parser.add_argument("--t", type=float, default=0.98, help="time; 1 is noise alone")
    parser.add_argument("--examples", type=int, default=96, help="of each category, from its last shard")
    parser.add_argument("--categories", default=",".join(DRAFTS), help="comma-separated")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their averages")
    args = parser.parse_args()
    found = load_checkpoint(args.runs / "flow" / "checkpoint")
    if found is None:
        parser.error(f"no checkpoint in {args.runs / 'flow'}: run the flow stage first")
    parts, state = found
    module, empty = build_module()
    module.load_state_dict(parts["weights"] if args.raw else parts.get("ema") or parts["weights"])
    module.eval()
    print(f"step {state['step']}, t = {args.t}")
    for category in args.categories.split(","):
        files = sorted((args.runs / "latents").glob(f"*-128x128-train-{category}-*"))[-1:]
        if not files:
            print(f"{category}: no latents in {args.runs / 'latents'}")
            continue
        data = LatentDataset({category: files}, {category: 1.0})
        task = FlowTask(module, data, FlowConfig(), empty=empty, dtype=DTYPE)
        batch = {key: value[: args.examples] for key, value in data.groups[0].tensors.items()}
        for what, shares in zip(("target", "context"), ask(task, batch, args.t), strict=True):
            if shares:
                told = ", ".join(f"{name} {share:.2f}" for name, (share, _) in shares.items())
                print(f"{category} {what}: {told}")


if __name__ == "__main__":
    main()

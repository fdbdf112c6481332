"""Deep supervision: a middle block is asked, token by token, what the finished picture shows there.

Where the data knows (a synthetic world does), cross-entropy on class numbers teaches a small transformer what is meant
by an instruction long before the velocity's noisy error does. The layer that answers is dropped after training.
Source of the idea: representation alignment, arXiv 2410.06940, with the truth in place of another network's features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.transformer import BlockHooks


class TokenClassifier(nn.Module):
    """Class numbers of several fields from a block's output, by one linear layer of its normalised tokens.

    Args:
        hidden_size: of the transformer.
        classes: how many classes each field has.
        after: number of the single-stream block whose output is asked.
    """

    def __init__(self, hidden_size: int, classes: Sequence[int], *, after: int) -> None:
        super().__init__()
        self.classes, self.after = tuple(classes), after
        self.linear_in = nn.Linear(hidden_size, sum(classes))
        nn.init.zeros_(self.linear_in.weight)
        nn.init.zeros_(self.linear_in.bias)

    def loss(self, tokens: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the fields, and the share of right answers where `weight` is its mean or more.

        Args:
            tokens: (B, N, hidden) of the block.
            labels: (B, N, fields) class numbers.
            weight: (B, N), of which each example has the mean 1.
        """
        normed = F.layer_norm(tokens.float(), tokens.shape[-1:])
        logits = self.linear_in(normed).split(self.classes, dim=-1)
        total, right = weight.new_zeros(()), weight.new_zeros(())
        # equal weights count everywhere: a mean may lie a rounding error above them
        heavy = (weight > 0.999 * weight.mean(1, keepdim=True)).float()
        for field, part in enumerate(logits):
            truth = labels[..., field].long()
            entropy = F.cross_entropy(part.flatten(0, 1), truth.flatten(), reduction="none")
            total = total + (entropy.view_as(weight) * weight).mean()
            right = right + ((part.argmax(-1) == truth) * heavy).sum() / heavy.sum().clamp(min=1)
        return total / len(self.classes), right.detach() / len(self.classes)


class Listening(BlockHooks):
    """Hooks that keep the output of one single-stream block, and run others' hooks within."""

    def __init__(self, after: int, within: BlockHooks | None) -> None:
        self.after, self.within = after, within or BlockHooks()
        self.heard: Tensor | None = None

    def double(
        self, index: int, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], img: Tensor, txt: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.within.double(index, run, img, txt)

    def single(self, index: int, run: Callable[[Tensor], Tensor], x: Tensor, num_text: int) -> Tensor:
        x = self.within.single(index, run, x, num_text)
        if index == self.after:
            self.heard = x[:, num_text:]
        return x


def heavier(share: Tensor, extra: float) -> Tensor:
    """Weights (B, N) of mean 1 an example: 1 + extra·share before the division."""
    weight = 1 + extra * share
    return weight / weight.mean(1, keepdim=True)

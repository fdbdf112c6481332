"""Approximations that skip work between steps: off unless asked for, and exact when off.

    every        context tokens (half of an edit's) are computed in every k-th evaluation only; between them the
                 target attends to their keys and values of the last full one. There is no exact form: context tokens
                 see t and the target.
    regions      between full evaluations, target tokens whose predicted picture is the first reference's are not
                 computed either: they go straight on to what was predicted (the idea of RegionE).
    first_block  when the first block's change has hardly changed since the last evaluation, the change that all
                 other blocks made then is added once more (first-block caching).

A `Reuse` belongs to one set of prompts and references, and begins anew with every sampling of them. Samples of a batch
never mix: a token, or the rest of an evaluation, is skipped only where no sample of the batch needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .models.operations import block_operations, one_block
from .models.transformer import BlockHooks, TransformerParams


@dataclass(frozen=True, kw_only=True)
class Accelerate:
    """What may be skipped; the defaults skip nothing.

    Attributes:
        every: evaluations from one full one to the next; 1 computes the context each time.
        regions: largest distance (root mean square over a token, in units of the latent's spread) at which the
            prediction counts as the reference's; 0 computes every token. Needs `every` above 1.
        first_block: relative change of the first block's residual below which the other blocks are skipped; 0 never
            skips them.
        warmup: evaluations at the start that are computed in full.
    """

    every: int = 1
    regions: float = 0.0
    first_block: float = 0.0
    warmup: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.warmup < 1:
            raise ValueError(
                f"every is {self.every} and warmup {self.warmup}; both are counts of evaluations from 1 on"
            )
        if not 0 <= self.regions < float("inf") or not 0 <= self.first_block < float("inf"):
            raise ValueError(
                f"regions is {self.regions} and first_block {self.first_block}; both are 0 (off) or more"
            )
        if self.regions > 0 and self.every == 1:
            raise ValueError(
                "regions are skipped between full evaluations: set every to 2 or more, 4 is usual"
            )

    @property
    def off(self) -> bool:
        return self.every == 1 and self.first_block == 0


@dataclass
class Saved:
    """What was skipped so far.

    Attributes:
        full, part: evaluations of all tokens, and of some.
        skipped: evaluations, of either kind, that ended after the first block.
        operations, operations_of_all: what the blocks took, and what they would have taken.
        notes: what was asked for and could not be done here.
    """

    full: int = 0
    part: int = 0
    skipped: int = 0
    operations: int = 0
    operations_of_all: int = 0
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Part of the operations that was saved, 0..1."""
        return 1 - self.operations / self.operations_of_all if self.operations_of_all else 0.0

    def add(self, other: Saved) -> None:
        for name in ("full", "part", "skipped", "operations", "operations_of_all"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.notes = tuple(dict.fromkeys((*self.notes, *other.notes)))

    def as_json(self) -> dict[str, int | float | list[str]]:
        """Counts of evaluations, the share of operations that was saved, and notes."""
        counts = {name: getattr(self, name) for name in ("full", "part", "skipped")}
        return {**counts, "operations": round(self.share, 4), "notes": list(self.notes)}

    def __str__(self) -> str:
        counts = (
            f"{self.full} full and {self.part} partial evaluations, {self.skipped} of them ended after the first "
            f"block: {100 * self.share:.0f} % of the operations saved"
        )
        return "; ".join((counts, *self.notes))


class FirstBlock(BlockHooks):
    """Runs the first block, and the others only if it changes its tokens otherwise than the last time."""

    def __init__(self, threshold: float, num_blocks: tuple[int, int]) -> None:
        self.threshold = threshold
        self.num_blocks = num_blocks
        self.skipping = False
        self.forget()

    def forget(self) -> None:
        """The next evaluation is computed; its tokens may be others."""
        self._first: Tensor | None = None
        self._rest: Tensor | None = None
        self._after_first: Tensor | None = None

    def double(self, index: int, run: Callable, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        if self.threshold == 0:
            return run(img, txt)
        if index > 0:
            return (img, txt) if self.skipping else run(img, txt)
        before = img.clone()  # a block may write into what it is given
        img, txt = run(img, txt)
        change = img - before
        self.skipping = self._is_near(change)
        if not self.skipping:
            self._first = change
            self._after_first = torch.cat((txt, img), dim=1)
        return img, txt

    def single(self, index: int, run: Callable, x: Tensor, num_text: int) -> Tensor:
        if self.threshold == 0:
            return run(x)
        last = index == self.num_blocks[1] - 1
        if self.skipping:
            return x + self._rest if last else x
        x = run(x)
        if last:
            self._rest, self._after_first = x - self._after_first, None
        return x

    def _is_near(self, change: Tensor) -> bool:
        """Whether every sample's change is near the last computed one."""
        if self._first is None or self._rest is None or self._first.shape != change.shape:
            return False
        distance = (change - self._first).float().abs().flatten(1).mean(1)
        return bool((distance < self.threshold * self._first.float().abs().flatten(1).mean(1)).all())


class Reuse:
    """What one sampling keeps from evaluation to evaluation.

    An evaluation is `begin`, one `attend` a block in order (full ones record, partial ones add what was recorded),
    the block hooks of `first_block`, `finish`.

    Args:
        num_text, num_context: tokens; num_context is 0 without references.
        grid: (rows, columns) of the target's tokens.
        reference: (B or 1, N, C) tokens that unchanged regions have; None if no reference has the target's grid.
    """

    def __init__(
        self,
        settings: Accelerate,
        params: TransformerParams,
        *,
        num_text: int,
        grid: tuple[int, int],
        num_context: int,
        reference: Tensor | None = None,
    ) -> None:
        self.settings, self.params = settings, params
        self.num_text, self.grid, self.num_context = num_text, grid, num_context
        self.num_target = grid[0] * grid[1]
        self.reference = reference if settings.regions > 0 else None
        self.saved = Saved(notes=self._cannot())
        self.first_block = FirstBlock(settings.first_block, (params.depth, params.depth_single_blocks))
        self.restart()

    def restart(self) -> None:
        """A new sampling: nothing of an earlier one is used; what was saved counts on."""
        self.first_block.skipping = False
        self.first_block.forget()
        self.active: Tensor | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._x_0: Tensor | None = None
        self._evaluations = self._since_full = self._block = 0
        self._kind = ""

    def _cannot(self) -> tuple[str, ...]:
        """What the settings ask for and these references do not allow."""
        if self.settings.every > 1 and self.num_context == 0:
            return ("there are no references whose tokens could be reused",)
        if self.settings.regions > 0 and self.reference is None:
            return ("no region is left out, since the first reference has not the picture's size",)
        return ()

    @property
    def is_part(self) -> bool:
        """Whether the evaluation that has begun is partial."""
        return self._kind == "part"

    def begin(self) -> Tensor | None:
        """Begin an evaluation: None for all tokens, else the target tokens (numbers, ascending) to compute."""
        can = self.settings.every > 1 and (self.num_context > 0 or self.reference is not None)
        part = (
            can and self._evaluations >= self.settings.warmup and self._since_full < self.settings.every - 1
        )
        part = part and len(self._kept) == self.params.depth + self.params.depth_single_blocks
        kind = "part" if part else "full"
        # A residual of other tokens, or of other neighbours, says nothing.
        if kind != self._kind or (kind == "full" and self.reference is not None):
            self.first_block.forget()
        self._kind, self._block = kind, 0
        self._evaluations += 1
        if part:
            self._since_full += 1
            return torch.arange(self.num_target) if self.active is None else self.active
        self._since_full = 0
        self._kept = []
        return None

    @torch.compiler.disable
    def attend(
        self, inner: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *rest, **options
    ) -> Tensor:
        """Attention of one block through `inner(q, k, v, …)`; k and v (B, heads, tokens, D), already turned."""
        if self.settings.every > 1:
            if self.is_part:
                keys, values = self._kept[self._block_number()]
                if self.active is not None:
                    keys, values = keys[:, :, self._others], values[:, :, self._others]
                k, v = torch.cat((k, keys), dim=2), torch.cat((v, values), dim=2)
            else:
                first = self.num_text + (0 if self.reference is not None else self.num_target)
                self._kept.append((k[:, :, first:].clone(), v[:, :, first:].clone()))
        return inner(q, k, v, *rest, **options)

    def _block_number(self) -> int:
        number = self._block
        if self.first_block.skipping and number > 0:
            raise AssertionError("a skipped block attends")
        self._block += 1
        return number

    def finish(self, x: Tensor, t: float, velocity: Tensor) -> Tensor:
        """End an evaluation: the velocity (B, N, C) of all target tokens.

        Args:
            x: (B, N, C) target tokens.
            velocity: (B, N, C), or of the active tokens alone in a partial evaluation.
        """
        full_keys = self.num_text + self.num_target + self.num_context
        whole = block_operations(self.params, full_keys, full_keys)
        queries = self.num_text + velocity.shape[1] if self.is_part else full_keys
        skipped = self.settings.first_block > 0 and self.first_block.skipping
        count = one_block if skipped else block_operations
        self.saved.operations += len(x) * (count(self.params, queries, full_keys) if velocity.shape[1] else 0)
        self.saved.operations_of_all += len(x) * whole
        self.saved.skipped += skipped
        if self.is_part:
            self.saved.part += 1
            return velocity if self.active is None else self._filled(x, t, velocity)
        self.saved.full += 1
        if skipped:  # nothing was recorded: keep computing in full until something is
            self._kept = []
        elif self.reference is not None:
            self._x_0 = x.float() - t * velocity.float()
            self._choose()
        return velocity

    def _choose(self) -> None:
        """The tokens that differ from the reference in any sample, and their neighbours."""
        distance = (self._x_0 - self.reference.to(self._x_0)).square().mean(-1).sqrt()
        changed = (distance > self.settings.regions).any(0).view(1, 1, *self.grid).float()
        changed = F.max_pool2d(changed, 3, stride=1, padding=1).flatten() > 0
        self.active = changed.nonzero()[:, 0]
        outside = torch.ones(self.num_context, dtype=torch.bool, device=changed.device)
        self._others = torch.cat((~changed, outside)).nonzero()[:, 0]

    def _filled(self, x: Tensor, t: float, velocity: Tensor) -> Tensor:
        """Tokens that were left out go straight on to what was predicted for them."""
        out = ((x.float() - self._x_0) / t).to(velocity)
        out[:, self.active] = velocity
        return out

"""LoRAs of one layer on its activations: W x + sum of s B (A x), for weights that are unpacked at each use.

The same product as (W + sum of s B A) x, summed in another order: equal to rounding. Changing the weight costs
rank multiplications for each of its numbers, in float32, at each use; this costs them for each row of x, in its
own dtype, and no second copy of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import Patch

Rows = tuple[int, int] | None  # (first, number) of a layer's rows, or all of them


class LowRank:
    """The LoRAs of one layer with their strengths, all of them changes that `fits` takes.

    The factors are joined, rounded to the dtype of the activations and brought to their device at the first
    use, and stay there; LoRAs of the same rows are added by one product.
    """

    def __init__(self, changes: Sequence[tuple[Patch, float]]) -> None:
        self.groups: dict[Rows, list[tuple[Patch, float]]] = {}
        for patch, strength in changes:
            rows = None if patch.offset is None else patch.offset[1:]
            self.groups.setdefault(rows, []).append((patch, strength))
        self.down: Tensor | None = None  # (R, columns), the groups' ranks one after the other
        self.ups: list[tuple[Rows, Tensor]] = []  # (rows, rank), strength and scale included

    @staticmethod
    def fits(changes: Sequence[tuple[Patch, float]]) -> bool:
        """Whether the changes are all plain LoRAs: the others need the weight itself."""
        return all(patch.kind == "lora" and patch.magnitude is None for patch, _ in changes)

    @torch.no_grad()
    def bring(self, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the factors; nothing where they are there already."""
        if self.down is not None and self.down.dtype == dtype and self.down.device == device:
            return
        downs, self.ups = [], []
        for rows, changes in self.groups.items():
            ups = []
            for patch, strength in changes:
                down, up = (
                    patch.tensors[role].to(device, torch.float32).flatten(1) for role in ("down", "up")
                )
                downs.append(down)
                up = torch.cat(up.chunk(2)[::-1]) if patch.swap_halves else up
                ups.append(up * (strength * patch.scale))
            self.ups.append((rows, torch.cat(ups, dim=1).to(dtype)))
        self.down = torch.cat(downs).to(dtype)

    @property
    def is_finite(self) -> bool:
        """Whether no factor holds NaN or infinite numbers."""
        self.bring(torch.float32, torch.device("cpu"))
        finite = all(bool(torch.isfinite(part).all()) for part in (self.down, *(up for _, up in self.ups)))
        self.down = None  # made again in the dtype of the activations
        return finite

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """out (..., rows) and the LoRAs' share for x (..., columns), added in place where it can be."""
        self.bring(x.dtype, x.device)
        ranks = [up.shape[1] for _, up in self.ups]
        hidden = (x.reshape(-1, x.shape[-1]) @ self.down.T).split(ranks, dim=1)
        flat = out.reshape(-1, out.shape[-1])
        for (rows, up), part in zip(self.ups, hidden, strict=True):
            share = flat if rows is None else flat.narrow(1, *rows)
            share.addmm_(part, up.T)
        return flat.view(out.shape)

    def of_rows(self, ids: Tensor) -> Tensor:
        """What rows ids (N,) of an embedding table gain: (N, columns), float32."""
        self.bring(torch.float32, ids.device)
        ((rows, up),) = self.ups
        assert rows is None, "a table is changed as a whole"
        return up[ids] @ self.down

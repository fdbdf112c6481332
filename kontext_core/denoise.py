"""The transformer as a velocity function of (x, t): everything that no step changes is computed once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import latents
from .accelerate import Accelerate, Reuse, Saved
from .conditioning import PromptConditioning, References
from .models.attention import attention
from .models.blocks import ModulationTables
from .models.transformer import Flux


class Denoiser:
    """velocity(x, t) for x (B, N, 64) tokens: text projection, RoPE and modulation tables are made up front.

    Args:
        height: the target's latent cells; width likewise.
        guidance: the embedded guidance, one number; ignored by a transformer without guidance embedding.
        planned: times whose modulation is computed in one pass; any other t is computed when asked for.
        accelerate: what may be skipped between steps; nothing by default.
        options: of the transformer's `forward`, such as `attend`.
    """

    def __init__(
        self,
        transformer: Flux,
        prompt: PromptConditioning,
        references: References | None,
        height: int,
        width: int,
        *,
        guidance: float,
        planned: Iterable[float] = (),
        accelerate: Accelerate | None = None,
        **options: Any,
    ) -> None:
        self.device, self.dtype = transformer.txt_in.weight.device, transformer.compute_dtype
        self.transformer = transformer
        self.options = options
        self.batch = len(prompt.txt)
        self.guidance = float(guidance)
        self.vec = prompt.vec.to(self.device, self.dtype)
        ids = latents.position_ids(height, width)
        context: Tensor | None = None
        if references is not None:
            ids = torch.cat((ids, references.ids))
            context = references.tokens.to(self.device, self.dtype).expand(self.batch, -1, -1)
        txt = prompt.txt.to(self.device, self.dtype)
        with torch.inference_mode():
            text_ids = latents.text_ids(txt.shape[1]).to(self.device)
            self.prepared = transformer.prepare(txt, text_ids, ids.to(self.device), context)
            times = sorted({float(t) for t in planned}, reverse=True)
            self.rows = {t: index for index, t in enumerate(times)}
            self.tables = self._tables(times) if times else None
        self.last_t = 0.0
        self.reuse: Reuse | None = None
        if accelerate is not None and not accelerate.off:
            grid = (height // latents.PATCH, width // latents.PATCH)
            self.reuse = Reuse(
                accelerate,
                transformer.params,
                num_text=txt.shape[1],
                grid=grid,
                num_context=0 if context is None else context.shape[1],
                reference=None if references is None else _first_like(references, grid),
            )

    @property
    def saved(self) -> Saved | None:
        """What acceleration has skipped so far; None without it."""
        return None if self.reuse is None else self.reuse.saved

    def _tables(self, times: list[float]) -> ModulationTables:
        """Rows ordered (t, sample) for all given times."""
        t = torch.tensor(times, device=self.device).repeat_interleave(self.batch)
        guidance = torch.full_like(t, self.guidance)
        vec = self.vec.repeat(len(times), 1)
        return self.transformer.modulation_tables(t, vec, guidance, self.dtype, group=self.batch)

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The velocity (B, N, 64) at x, in x's dtype."""
        row = self.rows.get(float(t))
        if row is None:
            modulation = self._tables([float(t)])
        else:
            modulation = self.tables.rows(row * self.batch, (row + 1) * self.batch)
        tokens = x.to(self.device, self.dtype)
        if self.reuse is None:
            return self._run(tokens, modulation, **self.options).to(x)
        if t > self.last_t:  # in a sampling t falls: this is the first evaluation of one
            self.reuse.restart()
        self.last_t = float(t)
        chosen = self.reuse.begin()
        options = {**self.options, "hooks": self.reuse.first_block}
        options["attend"] = partial(self.reuse.attend, self.options.get("attend", attention))
        if chosen is None:
            out = self._run(tokens, modulation, **options)
        elif not len(chosen):
            out = tokens[:, :0]
        else:
            all_of_them = len(chosen) == tokens.shape[1]
            chosen = chosen.to(self.device)
            part = self.prepared.part(
                self.prepared.txt.shape[1], None if all_of_them else chosen, tokens.shape[1]
            )
            tokens = tokens if all_of_them else tokens[:, chosen]
            out = self._run(tokens, modulation, prepared=part, **options)
        return self.reuse.finish(x, float(t), out.to(x))

    def _run(self, tokens: Tensor, modulation: ModulationTables, **options: Any) -> Tensor:
        """The transformer on target tokens (B, N, 64), with the prepared context."""
        arguments = {"prepared": self.prepared, "modulation": modulation, **options}
        return self.transformer(tokens, None, None, None, None, None, num_target=tokens.shape[1], **arguments)


def _first_like(references: References, grid: tuple[int, int]) -> Tensor | None:
    """The first reference's tokens if it has the target's grid."""
    ids = references.ids[: references.lengths[0]]
    size = tuple(int(ids[:, axis].max() - ids[:, axis].min()) + 1 for axis in (1, 2))
    return references.tokens[:, : references.lengths[0]] if size == grid else None

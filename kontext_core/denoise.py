"""The transformer as a velocity function of (x, t): everything that no step changes is computed once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import latents
from .conditioning import PromptConditioning, References
from .models.transformer import Flux, ModulationTables


class Denoiser:
    """velocity(x, t) for x (B, N, 64) tokens: text projection, RoPE and modulation tables are made up front.

    Args:
        height: the target's latent cells; width likewise.
        guidance: the embedded guidance, one number; ignored by a transformer without guidance embedding.
        planned: times whose modulation is computed in one pass; any other t is computed when asked for.
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
        **options: Any,
    ) -> None:
        self.device, self.dtype = transformer.txt_in.weight.device, transformer.compute_dtype
        self.transformer = transformer
        self.options = options
        self.batch = len(prompt.txt)
        self.guidance = float(guidance)
        self.vec = prompt.vec.to(self.device, self.dtype)
        ids = latents.position_ids(height, width)
        self.context: Tensor | None = None
        if references is not None:
            ids = torch.cat((ids, references.ids))
            self.context = references.tokens.to(self.device, self.dtype).expand(self.batch, -1, -1)
        txt = prompt.txt.to(self.device, self.dtype)
        with torch.inference_mode():
            text_ids = latents.text_ids(txt.shape[1]).to(self.device)
            self.prepared = transformer.prepare(txt, text_ids, ids.to(self.device))
            times = sorted({float(t) for t in planned}, reverse=True)
            self.rows = {t: index for index, t in enumerate(times)}
            self.tables = self._tables(times) if times else None

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
        if self.context is not None:
            tokens = torch.cat((tokens, self.context), dim=1)
        out = self.transformer(
            tokens,
            None,
            None,
            None,
            None,
            None,
            num_target=x.shape[1],
            prepared=self.prepared,
            modulation=modulation,
            **self.options,
        )
        return out.to(x)

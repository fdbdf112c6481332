"""The core's autoencoder as a ComfyUI VAE: raw latents, the host's memory management, no tile seams.

Source: Comfy-Org/ComfyUI comfy/sd.py `VAE`.
"""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
from torch import Tensor

from ..kontext_core.models.autoencoder import Autoencoder
from ..kontext_core.models.tiling import decode_in_bands, encode_in_bands, whole_bytes


class HostAutoencoder(Autoencoder):
    """The core's autoencoder speaking raw latents, which is what a LATENT holds."""

    def encode(self, images: Tensor) -> Tensor:
        return self.encode_raw(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_raw(latents)


class HostVAE(comfy.sd.VAE):
    """A VAE whose `first_stage_model` is ours.

    Attributes:
        kontext_area: pixels that the model this autoencoder belongs to prefers; read by the nodes that fit
            pictures.
    """

    def __init__(self, core: Autoencoder, area: int):
        # With no weights the host sets every attribute to its default, says that there are none, and stops;
        # what follows is what it does with weights.
        root = logging.getLogger()
        root.addFilter(_no_weights)
        try:
            super().__init__(sd={})
        finally:
            root.removeFilter(_no_weights)
        self.kontext_area = area
        params = core.params
        dtype = next(core.parameters()).dtype
        model = HostAutoencoder(params, operations=comfy.ops.disable_weight_init, dtype=dtype, device="meta")
        model.load_state_dict(core.state_dict(), strict=True, assign=True)
        self.first_stage_model = model.eval().requires_grad_(False)
        self.latent_channels = params.z_channels
        self.downscale_ratio = self.upscale_ratio = params.downscale
        share = (params.ch / 128) ** 2  # the host's numbers are the published autoencoder's, 128 wide
        encode, decode = self.memory_used_encode, self.memory_used_decode
        self.memory_used_encode = lambda shape, dtype: share * encode(shape, dtype)
        self.memory_used_decode = lambda shape, dtype: share * decode(shape, dtype)

        management = comfy.model_management
        self.device = management.vae_device()
        self.vae_dtype = management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        if hasattr(management, "archive_model_dtypes"):
            management.archive_model_dtypes(self.first_stage_model)
        self.output_device = management.intermediate_device()
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = patcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )
        self.model_size()

    def decode_tiled_(self, samples: Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> Tensor:
        """In the memory that a tile of this size (latent cells) takes, but without tiles: no seams."""
        del overlap
        latents = samples.to(self.device, self.vae_dtype)
        budget = self._budget(len(samples), tile_x, tile_y)
        decoded = decode_in_bands(
            self.first_stage_model, latents, budget=budget, raw=True, on_step=_Progress()
        )
        return self.process_output(decoded.to(self.output_device).float())

    def encode_tiled_(
        self, pixel_samples: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64
    ) -> Tensor:
        """As `decode_tiled_`; sizes in pixels."""
        del overlap
        images = self.process_input(pixel_samples).to(self.device, self.vae_dtype)
        cell = self.first_stage_model.params.downscale
        budget = self._budget(len(images), tile_x // cell, tile_y // cell)
        encoded = encode_in_bands(
            self.first_stage_model, images, budget=budget, raw=True, on_step=_Progress()
        )
        return encoded.to(self.output_device).float()

    def _budget(self, batch: int, width: int, height: int) -> int:
        """Bytes that a tile of width × height latent cells would take."""
        params = self.first_stage_model.params
        height, width = max(1, height) * params.downscale, max(1, width) * params.downscale
        return whole_bytes(params, batch, height, width, self.vae_dtype.itemsize)


class _Progress:
    """Progress in the host's bar, which also lets a user cancel between layers."""

    def __init__(self):
        self.bar: comfy.utils.ProgressBar | None = None

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(total)
        self.bar.update_absolute(done, total)


def _no_weights(record: logging.LogRecord) -> bool:
    return "No VAE weights" not in record.getMessage()

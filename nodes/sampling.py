"""Schedule to SIGMAS and sampler to SAMPLER, for the host's own sampling nodes."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..kontext_core import latents, schedules
from ..kontext_core.samplers import SAMPLERS
from . import host_sampling
from .conditioning import tokens_of
from .schema import ADVANCED, CATEGORY, make_schema

FEW_STEP = ["off", "1", "2", "4"]
SHIFTS = ["resolution", "constant", "none"]
SHIFT_TOOLTIP = (
    "How the steps crowd towards noise. resolution: as black-forest-labs/flux does, more the larger the picture; "
    "constant: by mu whatever the size, as ComfyUI does it (mu 1.15); none: equal steps, as distilled models want."
)
MU_TOOLTIP = "The constant shift; read only when shift is constant. ComfyUI's own default is 1.15."


def core_shift(shift: str, mu: float) -> schedules.Shift:
    """The widgets' shift as `kontext_core.schedules` takes it."""
    return float(mu) if shift == "constant" else shift


class KontextSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextSchedule",
            display_name="Kontext Schedule",
            category=CATEGORY,
            description="The steps from noise to picture, as SIGMAS for any custom sampler node.",
            search_aliases=["flux scheduler", "resolution shift", "sigmas"],
            inputs=[
                io.Int.Input(
                    "steps",
                    default=28,
                    min=1,
                    max=1000,
                    tooltip="20 to 30 for FLUX.1 Kontext [dev]; 1, 2 or 4 for a distilled model.",
                ),
                io.Combo.Input("shift", options=SHIFTS, default="resolution", tooltip=SHIFT_TOOLTIP),
                io.Float.Input(
                    "mu", default=1.15, min=-10.0, max=10.0, step=0.01, tooltip=MU_TOOLTIP, **ADVANCED
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from noise alone; less goes only that much of the way, in as many steps.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=16384,
                    step=16,
                    tooltip="Width in pixels of what is sampled, for the resolution shift. A latent replaces it.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=16384,
                    step=16,
                    tooltip="Height in pixels of what is sampled, for the resolution shift. A latent replaces it.",
                ),
                io.Combo.Input(
                    "few_step",
                    optional=True,
                    options=FEW_STEP,
                    default="off",
                    tooltip="Steps of a distilled model or a turbo LoRA, in place of steps and shift; take the sampler "
                    "few_step with it.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent that will be sampled; its size replaces width and height.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="For a custom sampler node.")],
        )

    @classmethod
    def execute(cls, steps, shift, mu, denoise, width, height, few_step="off", latent=None) -> io.NodeOutput:
        if few_step != "off":
            return io.NodeOutput(schedules.strength_timesteps(schedules.few_steps(int(few_step)), denoise))
        if latent is not None:
            rows, columns = latent["samples"].shape[-2:]
        else:
            rows, columns = height // latents.CELL, width // latents.CELL
        total = max(steps, int(steps / denoise))
        grid = schedules.timesteps(total, tokens_of(rows, columns), core_shift(shift, mu))
        return io.NodeOutput(grid[-(steps + 1) :])


class KontextSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextSampler",
            display_name="Kontext Sampler",
            category=CATEGORY,
            description="A sampler for flow models, as SAMPLER for any custom sampler node.",
            search_aliases=["euler", "heun", "few step", "lcm"],
            inputs=[
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="euler",
                    tooltip="euler: the usual one; heun: two evaluations a step; dpmpp_2m: second order, "
                    "good at 10 to 20 steps; few_step: for distilled models, noises again between its 1 to 4 steps.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For a custom sampler node.")],
        )

    @classmethod
    def execute(cls, sampler) -> io.NodeOutput:
        return io.NodeOutput(host_sampling.make_sampler(sampler))


def noise_for(shape: torch.Size, seed: int, bfl: bool = False) -> torch.Tensor:
    """Seeded noise (B, C, h, w): picture i of a batch is what seed + i gives alone."""
    batch, channels, rows, columns = shape
    return latents.noise(batch, rows, columns, seed, channels=channels, bfl=bfl).float()

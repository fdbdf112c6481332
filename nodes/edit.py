"""Kontext Edit: the whole edit in one node, made of the same calls as the separate nodes."""

from __future__ import annotations

import time

import torch
from comfy_api.latest import io, ui

from ..kontext_core import geometry as core
from ..kontext_core import images, latents, schedules
from ..kontext_core.samplers import SAMPLERS
from . import host, host_compare, host_graph, host_record, host_sampling
from .conditioning import GUIDANCE_TOOLTIP, asked_size, fit_inputs, plan_fit, tokens_of
from .geometry import restore
from .sampling import FEW_STEP, MU_TOOLTIP, SHIFT_TOOLTIP, SHIFTS, core_shift, noise_for
from .schema import ADVANCED, CATEGORY, KontextGeometry, make_schema

BFL_TEXT_LENGTH = 512
MAX_SEED = 0xFFFFFFFFFFFFFFFF


class KontextEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        picture = "A further reference picture: what the instruction calls the second, third … image."
        return make_schema(
            node_id="KontextEdit",
            display_name="Kontext Edit",
            category=CATEGORY,
            description="Edits a picture by instruction, or makes one from words alone when no picture is connected. "
            "The result has the size and framing of the picture.",
            search_aliases=["flux kontext", "image edit", "instruction edit", "text to image"],
            inputs=[
                io.Model.Input("model", tooltip="From Kontext Load Model or ComfyUI's own loader, LoRAs and all."),
                io.Clip.Input("clip", tooltip="Text encoders that belong to the model."),
                io.Vae.Input("vae", tooltip="The model's autoencoder."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to change: “Change the car to red, keep everything else the same”.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The same seed gives the same picture. Picture i of a batch is what seed + i gives alone.",
                ),
                io.Int.Input(
                    "steps",
                    default=28,
                    min=1,
                    max=1000,
                    tooltip="Number of steps; 20 to 30 are usual. few_step takes its own number instead.",
                ),
                io.Float.Input("guidance", default=2.5, min=0.0, max=100.0, step=0.1, tooltip=GUIDANCE_TOOLTIP),
                io.Combo.Input(
                    "few_step",
                    options=FEW_STEP,
                    default="off",
                    tooltip="Steps with a distilled model or a turbo LoRA; schedule and sampler follow. "
                    "The bundled model brings its own distilled one when it has been made.",
                ),
                *fit_inputs(),
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="euler",
                    tooltip="euler: the usual one; heun: two evaluations a step; dpmpp_2m: good at 10 to 20 steps; "
                    "few_step: noises again between steps.",
                    **ADVANCED,
                ),
                io.Combo.Input("shift", options=SHIFTS, default="resolution", tooltip=SHIFT_TOOLTIP, **ADVANCED),
                io.Float.Input("mu", default=1.15, min=-10.0, max=10.0, step=0.01, tooltip=MU_TOOLTIP, **ADVANCED),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Results of one picture, each from its own seed. A batch of pictures gives one each.",
                ),
                io.Boolean.Input(
                    "bfl_parity",
                    default=False,
                    tooltip="As black-forest-labs/flux does it: 512 text tokens, resolution shift, stretch, Euler, and "
                    "noise drawn in bfloat16. Overrides those widgets.",
                    **ADVANCED,
                ),
                io.Image.Input("image", optional=True, tooltip="The picture to edit; without one, words make it."),
                io.Image.Input("image_2", optional=True, tooltip=picture),
                io.Image.Input("image_3", optional=True, tooltip=picture),
                io.Image.Input("image_4", optional=True, tooltip=picture),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Edits this latent, such as an earlier edit's, instead of encoding image, with no loss; "
                    "image then only says what to come back to. Its noise mask limits where the edit may change.",
                ),
                io.String.Input(
                    "record",
                    default="",
                    force_input=True,
                    optional=True,
                    tooltip="Of the edit whose latent or picture this one goes on from: this record then holds that "
                    "one's instructions and settings too.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The edit, at the picture's own size and framing."),
                io.Latent.Output(display_name="latent", tooltip="The edit's latent, for another Kontext Edit."),
                KontextGeometry.Output(display_name="geometry", tooltip="How the picture was fitted."),
                io.String.Output(
                    display_name="record", tooltip="Settings, fingerprints of files and versions, for Kontext Save."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, clip, vae, prompt, seed, steps, guidance, few_step, fit, padding, convention, width, height,
        sampler, shift, mu, batch_size, bfl_parity, image=None, image_2=None, image_3=None, image_4=None, latent=None,
        record="",
    ) -> io.NodeOutput:  # fmt: skip
        settings = {
            "seed": seed, "steps": steps, "guidance": guidance, "few_step": few_step, "fit": fit, "padding": padding,
            "convention": convention, "width": width, "height": height, "sampler": sampler, "shift": shift, "mu": mu,
            "batch_size": batch_size, "bfl_parity": bfl_parity, "latent": latent is not None,
        }  # fmt: skip
        if bfl_parity:
            fit, shift, sampler = "stretch", "resolution", "euler"
        size, area = asked_size(width, height), host.preferred_area(vae)

        plan, references = None, []
        for number, picture in enumerate([image, image_2, image_3, image_4]):
            if picture is None:
                continue
            pixels, _ = images.from_comfy(picture)
            if not torch.isfinite(pixels).all():
                raise ValueError(f"picture {number + 1} holds NaN or infinite values")
            fitting = plan_fit(pixels.shape, fit, padding, width, height, area)
            if number == 0:
                plan = fitting
                if latent is not None:
                    continue
            references.append(host_graph.encode(vae, images.to_comfy(core.apply(fitting, pixels))))
        mask = None
        if latent is not None:
            references.insert(0, check_latent(latent, plan))
            mask = latent_mask(latent, plan)

        rows, columns = target_cells(
            references if image is not None or latent is not None else [], size, area
        )
        if mask is not None and (rows, columns) != tuple(references[0].shape[-2:]):
            raise ValueError(
                f"the latent has a noise mask, outside of which it stays as it is: leave width and height at 0, not "
                f"{width}×{height}"
            )
        batch = batch_of(batch_size, references)
        pictures = [image, image_2, image_3, image_4]
        record = host_record.make(
            cls.hidden,
            model,
            clip,
            "KontextEdit",
            prompt,
            {**settings, "batch": batch, "masked": mask is not None},
            pictures,
            record,
        )
        conditioning, warnings = host_graph.encode_prompt(clip, prompt, BFL_TEXT_LENGTH if bfl_parity else 0)
        conditioning = host_graph.with_values(conditioning, {"guidance": guidance})
        for reference in references:
            conditioning = host_graph.with_reference(conditioning, reference, convention)
        report = [plan.report()] if plan is not None else []
        host_graph.tell(cls.hidden.unique_id, [*report, *warnings])

        started = time.perf_counter()
        if few_step != "off":
            model, sampler = host.few_step_model(model), "few_step"
            sigmas = schedules.few_steps(int(few_step))
        else:
            sigmas = schedules.timesteps(steps, tokens_of(rows, columns), core_shift(shift, mu))
        start = references[0].expand(batch, -1, -1, -1) if mask is not None else None
        empty = host_graph.zeros(batch, rows, columns)
        samples = host_sampling.sample(
            model,
            conditioning,
            noise_for(empty.shape, seed, bfl_parity),
            empty if start is None else start,
            host_sampling.make_sampler(sampler, [latents.seed_after(seed, i) for i in range(batch)]),
            sigmas,
            seed=seed,
            mask=mask,
        )
        host_graph.check_finite(samples, "the model's result")
        decoded = host_graph.decode(vae, samples)
        host_graph.check_finite(decoded, "the decoded picture")
        result = decoded
        if plan is not None and size is None:
            result = restore(images.from_comfy(decoded)[0], plan, image)
        elif plan is not None:
            result = with_alpha(decoded, plan, image)
        if plan is None:
            plan = core.unfitted((decoded.shape[2], decoded.shape[1]))
        seconds = time.perf_counter() - started
        host_graph.log_time(f"edited {batch} × {columns * 8}×{rows * 8} in {len(sigmas) - 1} steps", started)
        shown = ui.PreviewText("\n".join(warnings)).as_dict() if warnings else {}
        shown |= host_compare.compare(
            image, result, prompt=prompt, seed=seed, steps=len(sigmas) - 1, seconds=round(seconds, 2)
        )
        return io.NodeOutput(result, {"samples": samples}, plan, record, ui=shown)


def with_alpha(decoded: torch.Tensor, plan: core.Geometry, image: torch.Tensor) -> torch.Tensor:
    """IMAGE at a size that was asked for, with its picture's transparency brought there as the picture was.

    What pad adds is opaque, since the model painted it; mirrored padding mirrors the transparency.
    """
    _, alpha = images.from_comfy(image)
    if alpha is None:
        return decoded
    cover = core.apply(
        plan, 1 - alpha, bounds=(0.0, 1.0)
    )  # padding is the lower bound: nothing is see-through
    return images.to_comfy(images.from_comfy(decoded)[0], (1 - cover).expand(len(decoded), -1, -1, -1))


def check_latent(latent: dict, plan: core.Geometry | None) -> torch.Tensor:
    """The samples of a LATENT that is to be edited.

    Raises:
        ValueError: it is no FLUX latent, or not of the size that the connected picture is fitted to.
    """
    samples = latent["samples"]
    if samples.ndim != 4 or samples.shape[1] != latents.LATENT_CHANNELS:
        raise ValueError(
            f"the latent has shape {tuple(samples.shape)}; a FLUX latent is (batch, 16, height / 8, width / 8): "
            "encode with the VAE of this model"
        )
    size = (samples.shape[-1] * latents.CELL, samples.shape[-2] * latents.CELL)
    if plan is not None and plan.size != size:
        raise ValueError(
            f"the latent is {size[0]}×{size[1]} pixels and the picture is fitted to {plan.size[0]}×{plan.size[1]}: "
            "connect the picture that the latent was made from, with the same fit"
        )
    return samples


def latent_mask(latent: dict, plan: core.Geometry | None) -> torch.Tensor | None:
    """The noise mask of a LATENT as (1 or B, 1, rows, columns); made on the picture it is fitted as the picture is.

    Raises:
        ValueError: it has neither the latent's size nor the picture's.
    """
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    batch, _, rows, columns = latent["samples"].shape
    height, width = mask.shape[-2:]
    if len(mask) not in (1, batch):
        raise ValueError(
            f"the latent has {len(mask)} noise masks and {batch} pictures: give one, or one each"
        )
    if (height, width) in ((rows, columns), (rows * latents.CELL, columns * latents.CELL)):
        return mask
    if plan is not None and (width, height) == plan.source:
        return core.apply(plan, mask, bounds=(0.0, 1.0))
    picture = "" if plan is None else f", or the picture's {plan.source[0]}×{plan.source[1]}"
    raise ValueError(
        f"the latent's noise mask is {width}×{height}: make it at the latent's own size, "
        f"{columns * latents.CELL}×{rows * latents.CELL} pixels{picture}"
    )


def target_cells(references: list, size: tuple[int, int] | None, area: int) -> tuple[int, int]:
    """(rows, columns) in latent cells of what is made: as asked, as the first reference, or the model's square."""
    if size is not None:
        width, height = size
        if width % 16 or height % 16:
            raise ValueError(f"the size is {width}×{height}; both sides must be multiples of 16")
        return height // latents.CELL, width // latents.CELL
    if references:
        return tuple(references[0].shape[-2:])
    width, height = core.nearest_size((1, 1), area)
    return height // latents.CELL, width // latents.CELL


def batch_of(asked: int, references: list) -> int:
    """Pictures to make: as many as a batch of pictures has, or as asked for a single one.

    Raises:
        ValueError: batches of different lengths.
    """
    lengths = sorted({len(reference) for reference in references} - {1})
    if len(lengths) > 1 or (lengths and asked not in (1, lengths[0])):
        raise ValueError(
            f"batches of {', '.join(map(str, lengths))} pictures and batch_size {asked} do not go together: "
            "use batches of one length, and batch_size 1"
        )
    return lengths[0] if lengths else asked

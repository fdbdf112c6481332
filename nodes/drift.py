"""Kontext Drift: how far a chain of edits has moved from its first picture where nobody asked it to."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..kontext_core import images
from ..kontext_core.evaluation.drift import draw_drift, measure_drift
from ..kontext_core.turns import parse_turns
from . import host_graph
from .schema import CATEGORY, make_schema

TURNS_TOOLTIP = (
    "One instruction a line, done one after another. “from 1: …” starts from turn 1 instead of the line above, "
    "“from 0: …” from the picture; “redo 2 [seed 7]” does turn 2 again with another seed; “[seed 7]”, “[steps 12]” and "
    "“[guidance 3]” at the end of any line are its own."
)


class KontextDrift(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextDrift",
            display_name="Kontext Drift",
            category=CATEGORY,
            description="Measures each turn against the first picture where no edit was asked for (PSNR, SSIM, "
            "similarity of embeddings) and draws it.",
            search_aliases=["psnr", "ssim", "consistency", "degradation over turns"],
            inputs=[
                io.Image.Input(
                    "original", tooltip="The picture before the first turn; of a batch the first."
                ),
                io.Image.Input("turns", tooltip="The turns' pictures in order, as one batch."),
                io.String.Input(
                    "instructions",
                    multiline=True,
                    default="",
                    tooltip="What the turns did, one a line, as in Kontext Turns: names them in the drawing and says "
                    "which came from which. Empty: each from the one before.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where edits were asked for: one for all turns, or one each. Without it, what each "
                    "turn changed against the one before is found and left out.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="Measures the similarity of the whole pictures too."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="drawing", tooltip="The measures over the turns, with small pictures."
                ),
                io.String.Output(display_name="report", tooltip="The numbers, a line a turn."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, original, turns, instructions, mask=None, clip_vision=None) -> io.NodeOutput:
        start, _ = images.from_comfy(original)
        pictures, _ = images.from_comfy(turns)
        if len(pictures) % len(start):
            raise ValueError(
                f"{len(pictures)} pictures of turns for {len(start)} originals: each turn gives one each"
            )
        # Of a batch the first picture is measured.
        start, pictures = start[:1], pictures[:: len(start)]
        session = parse_turns(instructions or "\n".join(f"Turn {i + 1}" for i in range(len(pictures))))
        if len(session.turns) != len(pictures):
            raise ValueError(f"there are {len(session.turns)} instructions for {len(pictures)} pictures")
        masks = None if mask is None else _masks(mask, len(pictures))
        drift = measure_drift(
            start,
            pictures.split(1),
            parents=[turn.parent for turn in session.turns],
            masks=masks,
            embed=None if clip_vision is None else _embedding(clip_vision),
        )
        labels = [turn.instruction for turn in session.turns]
        drawing = images.to_comfy(
            images.from_pil(draw_drift(drift, labels, pictures=pictures.split(1))).image
        )
        lines = [
            f"{number}. {label}: {found.report()}"
            for number, (found, label) in enumerate(zip(drift, labels, strict=True), 1)
        ]
        host_graph.tell(cls.hidden.unique_id, lines)
        return io.NodeOutput(drawing, "\n".join(lines), ui=ui.PreviewImage(drawing, cls=cls))


def _masks(mask, count: int) -> list:
    """MASK (H, W), (1 or count, H, W) as one (1, 1, H, W) a turn."""
    mask = mask[None] if mask.dim() == 2 else mask
    if len(mask) not in (1, count):
        raise ValueError(f"there are {len(mask)} masks for {count} turns: connect one, or one each")
    return list(mask.expand(count, -1, -1)[:, None].split(1))


def _embedding(clip_vision):
    def embed(image):
        return clip_vision.encode_image(images.to_comfy(image)).image_embeds

    return embed

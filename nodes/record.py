"""Pictures that remember how they were made: saved with a record, and the record loaded back."""

from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from ..kontext_core import images
from ..kontext_core.record import load_record
from ..kontext_core.replay import beyond_turns, replay
from . import host_graph, host_record
from .schema import CATEGORY, Choice, make_schema

logger = logging.getLogger("kontext")

# Of `replay`, in the order of the outputs behind the record.
REPLAYED = (
    "few_step", "fit", "padding", "convention", "width", "height", "sampler", "shift", "mu", "batch_size",
    "bfl_parity", "chain", "index",
)  # fmt: skip


class KontextSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextSave",
            display_name="Kontext Save",
            category=CATEGORY,
            description="Saves PNG pictures with the graph and a record of how they were made: every setting, the "
            "fingerprints of weights and input pictures, and the versions.",
            search_aliases=["save image", "metadata", "reproducible"],
            inputs=[
                io.Image.Input("image", tooltip="The pictures to save."),
                io.String.Input(
                    "filename_prefix",
                    default="kontext/edit",
                    tooltip="Name in the output folder, with a number added; %date:yyyy-MM-dd% works as in Save Image.",
                ),
                io.String.Input(
                    "record",
                    default="",
                    force_input=True,
                    optional=True,
                    tooltip="From Kontext Edit or Kontext Turns. Without one only the graph is saved.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, filename_prefix, record="") -> io.NodeOutput:
        hidden = cls.hidden
        written = host_record.save(image, record, filename_prefix, hidden.prompt, hidden.extra_pnginfo)
        return io.NodeOutput(ui={"images": written})


class KontextLoadRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextLoadRecord",
            display_name="Kontext Load Record",
            category=CATEGORY,
            description="Reads back how a picture was made, from the record that Kontext Save or the command line "
            "wrote into it, and checks that its pixels are still those.",
            search_aliases=["metadata", "reproduce", "read seed", "png info"],
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=host_record.list_pictures(),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="A PNG in the input folder that holds a record.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture."),
                io.String.Output(
                    display_name="prompt",
                    tooltip="Its instruction; of several turns the lines for Kontext Turns.",
                ),
                io.Int.Output(
                    display_name="seed",
                    tooltip="Its own seed, in a batch too; of several turns the first one's.",
                ),
                io.Int.Output(display_name="steps", tooltip="Its number of steps."),
                io.Float.Output(display_name="guidance", tooltip="Its guidance."),
                io.String.Output(display_name="record", tooltip="All of the record, as JSON."),
                Choice.Output(
                    display_name="few_step", tooltip="Its few_step; off for a usual number of steps."
                ),
                Choice.Output(display_name="fit", tooltip="How its picture met the model's size."),
                io.String.Output(display_name="padding", tooltip="What was put around it by pad."),
                Choice.Output(display_name="convention", tooltip="Where its references were placed."),
                io.Int.Output(
                    display_name="width", tooltip="The width that was asked for; 0 for its picture's own."
                ),
                io.Int.Output(
                    display_name="height", tooltip="The height that was asked for; 0 for its picture's own."
                ),
                Choice.Output(display_name="sampler", tooltip="Its sampler."),
                Choice.Output(display_name="shift", tooltip="Its shift."),
                io.Float.Output(display_name="mu", tooltip="Its constant shift."),
                io.Int.Output(
                    display_name="batch_size",
                    tooltip="1: a picture of a batch is made again alone, from its own seed. The batch's length with "
                    "bfl_parity, whose noise is one draw for a batch.",
                ),
                io.Boolean.Output(display_name="bfl_parity", tooltip="Whether it was made as BFL does it."),
                Choice.Output(display_name="chain", tooltip="How its turns went on, for Kontext Turns."),
                io.Int.Output(
                    display_name="index",
                    tooltip="Which picture of the batch it is, from 0, when the batch is made again.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, picture) -> bool | str:
        if picture is not None and not host_record.picture_path(picture).is_file():
            return f"there is no {picture} in the input folder: upload it first"
        return True

    @classmethod
    def fingerprint_inputs(cls, picture):
        return host_record.picture_path(picture).stat().st_mtime_ns

    @classmethod
    def execute(cls, picture) -> io.NodeOutput:
        path = host_record.picture_path(picture)
        record = load_record(path)
        loaded = images.load_image(path)
        lines = [f"{key}: {value}" for key, value in record.settings.items()]
        lines += [f"{item.role}: {item.name} {item.digest}" for item in record.weights]
        lines += [f"{key} {value}" for key, value in record.versions.items()]
        try:
            again, beyond = replay(record), beyond_turns(record)
        except ValueError as error:
            raise ValueError(f"{picture}: {error}") from error
        if beyond:
            beyond = [f"Kontext Turns cannot make this again as it was: {'; '.join(beyond)}"]
            logger.warning("%s: %s", picture, beyond[0])
        host_graph.tell(cls.hidden.unique_id, [*beyond, *record.prompts, *lines[:6]])
        return io.NodeOutput(
            images.to_comfy(loaded.image, loaded.alpha),
            *(again[key] for key in ("prompt", "seed", "steps", "guidance")),
            record.to_json(),
            *(again[key] for key in REPLAYED),
            ui=ui.PreviewText("\n".join([*beyond, *record.prompts, *lines])),
        )

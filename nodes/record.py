"""Pictures that remember how they were made: saved with a record, and the record loaded back."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..kontext_core import images
from ..kontext_core.record import load_record
from . import host_graph, host_record
from .schema import CATEGORY, make_schema


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
                    tooltip="From Kontext Edit. Without one only the graph is saved.",
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
                io.String.Output(display_name="prompt", tooltip="Its instructions, a line each."),
                io.Int.Output(display_name="seed", tooltip="Its seed."),
                io.Int.Output(display_name="steps", tooltip="Its number of steps."),
                io.Float.Output(display_name="guidance", tooltip="Its guidance."),
                io.String.Output(display_name="record", tooltip="All of the record, as JSON."),
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
        host_graph.tell(cls.hidden.unique_id, [*record.prompts, *lines[:6]])
        missing = [key for key in ("seed", "steps", "guidance") if key not in record.settings]
        if missing:
            names = ", ".join(missing)
            raise ValueError(f"the record of {picture} holds no {names}: {record.action} does not write them")
        return io.NodeOutput(
            images.to_comfy(loaded.image, loaded.alpha),
            "\n".join(record.prompts),
            int(record.settings["seed"]),
            int(record.settings["steps"]),
            float(record.settings["guidance"]),
            record.to_json(),
            ui=ui.PreviewText("\n".join([*record.prompts, *lines])),
        )

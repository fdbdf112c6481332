"""Kontext Dataset and Kontext Train LoRA: from a folder of pairs to a LoRA, inside the graph."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..kontext_core import images
from ..kontext_core.training.curve import draw_loss
from ..kontext_core.training.lora import TARGETS
from ..kontext_core.training.pairs import find_pairs
from ..kontext_core.training.preview import read_log
from ..kontext_core.training.sheet import pair_sheet
from . import host, host_graph, host_lora, host_training
from .schema import ADVANCED, CATEGORY, make_schema

FITS = ("crop", "stretch", "pad", "keep")
CHECKPOINTING = ("none", "selective", "full")
PRECISIONS = ("default", "bfloat16", "float32")
MAX_SEED = 0xFFFFFFFF


class KontextDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextDataset",
            display_name="Kontext Dataset",
            category=CATEGORY,
            description="A folder of pairs to train a LoRA on: pictures after the edit with their instructions, and "
            "pictures before it of the same names. Says what is missing before anything is trained.",
            search_aliases=["paired dataset", "training data", "control images", "captions"],
            inputs=[
                io.String.Input(
                    "targets",
                    default="my_pairs/targets",
                    tooltip="Folder, inside ComfyUI's input folder, of the pictures after the edit; beside each a .txt "
                    "of the same name with the instruction.",
                ),
                io.String.Input(
                    "controls",
                    default="my_pairs/controls",
                    tooltip="Folder of the pictures before the edit, named as the targets are. Empty: text to image.",
                ),
                io.String.Input(
                    "caption",
                    multiline=True,
                    default="",
                    tooltip="The instruction of targets that have no .txt; empty: each must have one.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="crop",
                    tooltip="How a picture meets the size it is trained at; see Kontext Reference.",
                ),
                io.Int.Input(
                    "side",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="Trains at about side × side pixels, whatever the shape; 0 for the model's own size. "
                    "Smaller is faster and needs less memory.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="dataset",
                    tooltip="For Kontext Train LoRA: the folders and settings, as JSON.",
                ),
                io.Image.Output(
                    display_name="sheet", tooltip="The first eight pairs: before, after, instruction."
                ),
                io.String.Output(
                    display_name="report", tooltip="How many pairs, sizes and instructions there are."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, targets, controls, caption, fit, side):
        try:
            pairs, _ = _read_pairs(targets, controls, caption)
        except ValueError as error:
            return str(error)
        return [pair.stamp() for pair in pairs]

    @classmethod
    def execute(cls, targets, controls, caption, fit, side) -> io.NodeOutput:
        pairs, settings = _read_pairs(targets, controls, caption)
        settings |= {"fit": fit, "areas": [side * side] if side else []}
        settings["first"] = {"control": str(pairs[0].control or ""), "caption": pairs[0].caption}
        captions = len({pair.caption for pair in pairs})
        kind = "pairs" if settings["control"] else "pictures without a control (text to image)"
        report = f"{len(pairs)} {kind}, {captions} different instructions"
        host_graph.tell(cls.hidden.unique_id, [report])
        sheet = images.to_comfy(images.from_pil(pair_sheet(pairs)).image)
        return io.NodeOutput(json.dumps(settings), sheet, report, ui=ui.PreviewImage(sheet, cls=cls))


def _read_pairs(targets: str, controls: str, caption: str) -> tuple[list, dict]:
    """The pairs, and where they are as settings of a `TrainConfig`."""
    target_folder = host_training.pictures_folder(targets, "targets")
    control_folder = host_training.pictures_folder(controls, "controls") if controls.strip() else None
    pairs = find_pairs(target_folder, control_folder, default_caption=caption.strip() or None)
    settings = {
        "data": str(target_folder),
        "control": None if control_folder is None else str(control_folder),
        "caption": caption.strip() or None,
    }
    return pairs, settings


class KontextTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextTrainLora",
            display_name="Kontext Train LoRA",
            category=CATEGORY,
            description="Trains a LoRA on pairs, in a process of its own: ComfyUI goes on answering. Cancel stops it "
            "with a checkpoint that the next run goes on from. The LoRA lies in models/loras when it is done.",
            search_aliases=["lora training", "finetune", "paired training", "dreambooth"],
            inputs=[
                io.String.Input("dataset", force_input=True, tooltip="From Kontext Dataset."),
                io.Combo.Input(
                    "model",
                    options=host.list_models("diffusion_models"),
                    tooltip="The transformer that is trained on; it stays as it is.",
                ),
                io.Combo.Input(
                    "t5", options=host.list_models("text_encoders"), tooltip="Its T5 text encoder."
                ),
                io.Combo.Input(
                    "clip", options=host.list_models("text_encoders"), tooltip="Its CLIP text encoder."
                ),
                io.Combo.Input("vae", options=host.list_models("vae"), tooltip="Its autoencoder."),
                io.String.Input(
                    "name",
                    default="my_kontext_lora",
                    tooltip="The LoRA's file name in models/loras, and that of the run in output/kontext_training.",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimizer steps in all. More in a later run of the same name go on from where it was.",
                ),
                io.Int.Input("batch", default=1, min=1, max=256, tooltip="Pairs a step."),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=512,
                    tooltip="Size of the LoRA: 4 to 16 for a style, 32 for more.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=1e-7,
                    tooltip="1e-4 is usual for FLUX.1; kontext-tiny takes 1e-3 and more.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=100,
                    min=0,
                    max=1_000_000,
                    tooltip="Makes a sample picture every so many steps, shown on the node; 0 for none.",
                ),
                io.String.Input(
                    "sample_prompt",
                    default="",
                    tooltip="The samples' instruction, done on the first pair's control; empty: that pair's own.",
                ),
                io.Int.Input(
                    "sample_steps", default=20, min=1, max=1000, tooltip="Sampling steps of a sample."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Same seed, same data: the same LoRA.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="Goes on from the checkpoint of this name, if there is one. Off: begins again.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(TARGETS),
                    default="blocks",
                    tooltip="Which layers change: attention alone; blocks: attention and MLPs; all: modulation too.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of steps that are trained without words.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=list(CHECKPOINTING),
                    default="none",
                    tooltip="Computes activations again instead of keeping them: full needs least memory, and is a "
                    "third slower.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="default",
                    tooltip="What is computed in; default: bfloat16 where the device is fast at it, else float32.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=250,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between checkpoints. Cancel writes one too; a crash loses the steps since the last.",
                    **ADVANCED,
                ),
                io.Model.Input(
                    "apply_to",
                    optional=True,
                    tooltip="A model that comes out with the new LoRA on it, at strength 1.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="apply_to with the trained LoRA on it."),
                io.String.Output(display_name="lora", tooltip="The file's name in models/loras."),
                io.Image.Output(display_name="samples", tooltip="The sample pictures in order, as a batch."),
                io.Image.Output(display_name="loss", tooltip="The loss over the steps, drawn."),
                io.String.Output(display_name="report", tooltip="Steps, loss, parameters and time."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, dataset, model, t5, clip, vae, name, steps, batch, rank, learning_rate, sample_every, sample_prompt,
        sample_steps, seed, resume, targets, caption_dropout, checkpointing, precision, checkpoint_every,
        apply_to=None,
    ) -> io.NodeOutput:  # fmt: skip
        data = read_dataset(dataset)
        first = data.pop("first")
        folder = host_training.run_folder(name)
        if not resume:
            host_training.forget(folder)
        preview = {"prompt": sample_prompt.strip() or first["caption"], "image": first["control"] or None}
        settings = {
            **data, **host_training.model_settings(model, t5, clip, vae), **host_training.device_settings(precision),
            "output": str(folder), "steps": steps, "batch": batch, "rank": rank, "lr": learning_rate, "seed": seed,
            "targets": targets, "caption_dropout": caption_dropout, "checkpointing": checkpointing,
            "checkpoint_every": checkpoint_every, "warmup": min(20, steps // 10), "log_every": 1,
            "preview_every": sample_every, "preview_steps": sample_steps, "previews": [preview],
        }  # fmt: skip
        done = host_training.train(settings, cls.hidden.unique_id)
        file = host_training.publish(Path(done["output"]), name)
        rows = read_log(folder / "log.jsonl") if (folder / "log.jsonl").is_file() else []
        report = (
            f"{file}: {done['step']} steps on {done['examples']} pairs, {done['parameters']:,} parameters, "
            f"{done['seconds']:.0f} s"
        )
        host_graph.tell(cls.hidden.unique_id, [report])
        if apply_to is not None:
            path = host.find_file("loras", file)
            apply_to = host_lora.add_lora(apply_to, None, path, 1.0, 1.0)[0]
        loss = images.to_comfy(images.from_pil(draw_loss(rows)).image)
        samples = read_samples(folder / "previews")
        shown = ui.PreviewImage(loss if samples is None else samples[-1:], cls=cls)
        return io.NodeOutput(apply_to, file, loss if samples is None else samples, loss, report, ui=shown)


def read_dataset(text: str) -> dict:
    """What Kontext Dataset gave.

    Raises:
        ValueError: the text is something else.
    """
    try:
        data = json.loads(text)
        known = {"data", "control", "caption", "fit", "areas", "first"}
        if set(data) == known and {"control", "caption"} == set(data["first"]):
            return data
    except (ValueError, TypeError):
        pass
    raise ValueError(f"dataset is {text[:60]!r}; connect the dataset output of Kontext Dataset")


def read_samples(folder: Path) -> torch.Tensor | None:
    """The sample pictures of a run in order, as IMAGE; None when there are none."""
    files = sorted(folder.glob("*.png"))[-64:]
    pictures = [images.to_comfy(images.load_image(file).image) for file in files]
    same = [picture for picture in pictures if picture.shape == pictures[-1].shape]
    return torch.cat(same) if same else None

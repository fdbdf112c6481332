"""Kontext Preset: an instruction in the wording that Kontext follows best, as plain STRING."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..kontext_core import prompts
from . import host_graph
from .schema import CATEGORY, make_schema

CUSTOM = "custom"


class KontextPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextPreset",
            display_name="Kontext Preset",
            category=CATEGORY,
            description="Writes an instruction for a common edit in the wording that Kontext follows best, and "
            "points out what it is known to misread.",
            search_aliases=[
                "prompt builder",
                "relight",
                "remove background",
                "product shot",
                "text edit",
                "style",
            ],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*prompts.PRESETS, CUSTOM],
                    default="relight",
                    tooltip="The edit. custom takes the instruction as it is written, adds what to keep, and "
                    "checks it.",
                ),
                io.String.Input(
                    "subject",
                    default="",
                    tooltip="What the edit is about, named so that it cannot be mistaken: “the woman with short "
                    "black hair”. Empty: the main subject.",
                ),
                io.String.Input(
                    "change",
                    default="",
                    tooltip=_meanings(0, "What it becomes. Empty takes an example."),
                ),
                io.String.Input(
                    "detail",
                    default="",
                    tooltip=_meanings(1, "More about it. Empty takes an example."),
                ),
                io.String.Input(
                    "old_text",
                    default="",
                    tooltip="replace_text, remove_text: the words in the picture, in upper and lower case as they "
                    "stand there. Quotation marks are added.",
                ),
                io.String.Input(
                    "new_text",
                    default="",
                    tooltip="replace_text, add_text: the words to draw, in upper and lower case as wanted. "
                    "Quotation marks are added.",
                ),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    tooltip="custom: the instruction in your own words.",
                ),
                io.String.Input(
                    "keep",
                    default="",
                    tooltip="custom: what stays, added as “while keeping … exactly the same” where the "
                    "instruction does not say so itself.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompt", tooltip="For Kontext Edit, Kontext Prompt or any text input."
                ),
                io.String.Output(
                    display_name="hints", tooltip="What Kontext may misread in it; empty when nothing."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, preset, subject, change, detail, old_text, new_text, instruction, keep) -> io.NodeOutput:
        if preset == CUSTOM:
            prompt, hints = prompts.keeping(instruction, keep), []
        else:
            texts = {"subject": subject, "old": old_text, "new": new_text}
            texts |= dict(zip(free_slots(preset), (change, detail), strict=False))
            names = {slot.name for slot in prompts.PRESETS[preset].slots}
            needed = {"replace_text": ("old", "new"), "remove_text": ("old",), "add_text": ("new",)}
            empty = [f"{name}_text" for name in needed.get(preset, ()) if not texts[name].strip()]
            if empty:
                raise ValueError(f"{preset} needs {' and '.join(empty)}: the words as they are drawn")
            prompt = prompts.build(preset, **{name: text for name, text in texts.items() if name in names})
            hints = prompts.check_replacement(old_text, new_text) if preset == "replace_text" else []
        lines = [str(hint) for hint in [*prompts.check(prompt), *hints]]
        host_graph.tell(cls.hidden.unique_id, lines)
        return io.NodeOutput(prompt, "\n".join(lines), ui=ui.PreviewText("\n".join([prompt, *lines])))


def free_slots(preset: str) -> list[str]:
    """The blanks of a preset that `change` and `detail` fill, in this order."""
    return [slot.name for slot in prompts.PRESETS[preset].slots if slot.name != "subject" and not slot.quoted]


def _meanings(place: int, words: str) -> str:
    """A tooltip that says what a widget means for each preset that uses it."""
    slots = {name: {slot.name: slot for slot in preset.slots} for name, preset in prompts.PRESETS.items()}
    uses = [
        f"{name}: {slots[name][free_slots(name)[place]].labels[0]} (“{slots[name][free_slots(name)[place]].default}”)"
        for name in prompts.PRESETS
        if len(free_slots(name)) > place
    ]
    return f"{words} {'; '.join(uses)}."

"""Instructions in the wording that Kontext follows best: quoting, presets, and what it is known to misread.

What the published guides agree on, and this file applies: name the thing that changes instead of using a
pronoun; use a verb for one definite change; say what stays, because the model redraws what nobody speaks
for; put words that are to be drawn between quotation marks, in the case they shall have; do one large change
at a time.

Source: docs.bfl.ai, the FLUX.1 Kontext guides to prompting and image editing; docs.comfy.org, FLUX.1 Kontext
Dev.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.tokenizers import ClipTokenizer, T5Tokenizer

LANGUAGES = ("en", "zh", "ja")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A blank in a preset: its name in the template, what fills it by default, and its labels."""

    name: str
    default: str
    labels: tuple[str, str, str]
    quoted: bool = False  # words to be drawn: put between quotation marks as they are


@dataclass(frozen=True, kw_only=True)
class Preset:
    """An instruction with blanks. `labels` are English, Chinese and Japanese; the instruction is English."""

    name: str
    labels: tuple[str, str, str]
    template: str
    slots: tuple[Slot, ...]

    def label(self, language: str) -> str:
        """The preset's name for a person; English where the language is not known."""
        return _in_language(self.labels, language)


@dataclass(frozen=True, kw_only=True)
class Hint:
    """Something in a prompt that Kontext may misread: the place, and what to write instead."""

    code: str
    found: str
    advice: str

    def __str__(self) -> str:
        return f"“{self.found}”: {self.advice}" if self.found else self.advice


_SUBJECT = Slot(name="subject", default="the main subject", labels=("subject", "主体", "主題"))

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="relight",
            labels=("Relight", "重新打光", "ライティング変更"),
            template="Change the lighting of the scene to {light}, with matching shadows and highlights, "
            "while keeping {subject}, every object, the camera angle and the composition exactly the same",
            slots=(
                Slot(
                    name="light",
                    default="warm late afternoon sunlight from the left",
                    labels=("light", "光线", "光"),
                ),
                _SUBJECT,
            ),
        ),
        Preset(
            name="remove_background",
            labels=("Remove background", "去除背景", "背景を除去"),
            template="Replace the background with a plain, evenly lit {color} backdrop, while keeping "
            "{subject} in exactly the same position, at the same scale and in the same pose, with every edge "
            "and fine detail intact",
            slots=(Slot(name="color", default="white", labels=("color", "颜色", "色")), _SUBJECT),
        ),
        Preset(
            name="product_shot",
            labels=("Product shot", "产品图", "商品写真"),
            template="Place {subject} on {surface} as a professional studio product photograph with {light}, "
            "while keeping the shape, proportions, colors, logo and lettering of {subject} exactly the same",
            slots=(
                Slot(name="subject", default="the product", labels=("product", "产品", "商品")),
                Slot(name="surface", default="a clean white surface", labels=("surface", "台面", "台")),
                Slot(name="light", default="soft diffused light", labels=("light", "光线", "光")),
            ),
        ),
        Preset(
            name="restyle",
            labels=("Restyle", "风格转换", "画風変更"),
            template="Change the style of the picture to {style} with {traits}, while keeping the original "
            "composition, the position of every object and the facial features of every person",
            slots=(
                Slot(name="style", default="a watercolor painting", labels=("style", "风格", "画風")),
                Slot(
                    name="traits",
                    default="soft washes of color and visible paper texture",
                    labels=("traits of the style", "风格特征", "画風の特徴"),
                ),
            ),
        ),
        Preset(
            name="pose",
            labels=("Pose", "姿势", "ポーズ"),
            template="Change the pose of {subject} to {pose}, while keeping the same face, hairstyle, "
            "clothing, background, lighting and camera framing",
            slots=(
                Slot(name="subject", default="the person", labels=("subject", "主体", "主題")),
                Slot(
                    name="pose",
                    default="standing upright with both arms crossed",
                    labels=("pose", "姿势", "ポーズ"),
                ),
            ),
        ),
        Preset(
            name="expression",
            labels=("Expression", "表情", "表情"),
            template="Change the facial expression of {subject} to {expression}, while keeping the same "
            "identity, facial features, hairstyle, head position, clothing, lighting and background",
            slots=(
                Slot(name="subject", default="the person", labels=("subject", "主体", "主題")),
                Slot(name="expression", default="a gentle smile", labels=("expression", "表情", "表情")),
            ),
        ),
        Preset(
            name="replace_text",
            labels=("Replace text", "替换文字", "文字を置き換え"),
            template="Replace {old} with {new}, while keeping the same font, size, color, position and "
            "perspective of the lettering",
            slots=(
                Slot(name="old", default="OLD", labels=("old text", "原文字", "元の文字"), quoted=True),
                Slot(name="new", default="NEW", labels=("new text", "新文字", "新しい文字"), quoted=True),
            ),
        ),
        Preset(
            name="add_text",
            labels=("Add text", "添加文字", "文字を追加"),
            template="Add the text {new} {place} in {font}, while keeping everything else in the picture "
            "exactly the same",
            slots=(
                Slot(name="new", default="NEW", labels=("text", "文字", "文字"), quoted=True),
                Slot(name="place", default="centered at the top", labels=("place", "位置", "位置")),
                Slot(name="font", default="bold sans-serif letters", labels=("lettering", "字体", "書体")),
            ),
        ),
        Preset(
            name="remove_text",
            labels=("Remove text", "去除文字", "文字を消す"),
            template="Remove the text {old} and continue the surface behind the letters, while keeping "
            "everything else in the picture exactly the same",
            slots=(Slot(name="old", default="OLD", labels=("text", "文字", "文字"), quoted=True),),
        ),
    )
}


def build(name: str, /, **values: str) -> str:
    """The instruction of a preset with its blanks filled; an empty or absent value leaves the default.

    Raises:
        ValueError: an unknown preset or blank.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    names = [slot.name for slot in preset.slots]
    unknown = [key for key in values if key not in names]
    if unknown:
        raise ValueError(f"preset {name!r} has no {', '.join(unknown)}; it has {', '.join(names)}")
    filled = {}
    for slot in preset.slots:
        value = values.get(slot.name, "").strip() or slot.default
        filled[slot.name] = quote(value) if slot.quoted else value.rstrip(" .,;")
    return string.Formatter().vformat(preset.template, (), filled)


def quote(words: str) -> str:
    """Words that are to be drawn, between marks that do not occur in them, their case untouched.

    Marks that the user has already put around them are taken off first.
    """
    words = " ".join(words.split())
    for pair in ("''", '""', "“”", "‘’", "「」", "『』"):
        if len(words) > 2 and words[0] == pair[0] and words[-1] == pair[1]:
            words = words[1:-1]
            break
    for left, right in ("''", '""', "“”"):
        if left not in words and right not in words:
            return f"{left}{words}{right}"
    return f"“{words}”"


def keeping(instruction: str, what: str) -> str:
    """An instruction with a clause that says what stays; unchanged if it has one or `what` is empty."""
    instruction, what = instruction.strip(), what.strip()
    if not what or not instruction or _KEEPS.search(_outside_quotes(instruction)):
        return instruction
    return f"{instruction.rstrip(' .,;')}, while keeping {what.rstrip(' .')} exactly the same"


def _words(pattern: str) -> re.Pattern:
    return re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)


_KEEPS = _words(r"keep|keeping|maintain\w*|preserv\w*|retain\w*|unchanged|the same")
_CHANGES = _words("add|remove|replace|change|make|put|place|turn|delete|swap|paint|color|move")
_QUOTED = re.compile(r"'(?=\S)[^'\n]*?\S?'(?!\w)|\"[^\"\n]*\"|“[^”\n]*”|‘[^’\n]*’")

# What to look for outside of quotation marks, what that is called, and what to write instead.
_MISREAD: tuple[tuple[str, re.Pattern, str], ...] = (
    (
        "vague",
        _words(
            r"transform|convert|reimagine|redo|improve|enhance|fix|modify|edit|turn (?:\w+ ){1,4}into",
        ),
        "this asks for a whole new picture; name the one thing that changes and what it becomes",
    ),
    (
        "keep",
        _words("background|style|lighting|scene|setting|pose|season|weather|daytime|night|transform|convert"),
        "this change reaches the whole picture; end with “while keeping …” and what shall stay",
    ),
    (
        "pronoun",
        _words("it|its|he|him|his|she|her|hers|they|them|their|theirs"),
        "name what is meant (“the woman with short black hair”); a pronoun may be taken for another thing",
    ),
    (
        "quote",
        _words("the (?:text|word|words|letters|title)|saying|that says|reads|reading"),
        "put the words that are to be drawn between quotation marks, in upper or lower case as wanted",
    ),
    (
        "negation",
        _words("do not|don't|dont|never|avoid|without changing"),
        "say what shall be there instead, or “while keeping …”; what is only forbidden tends to appear",
    ),
    (
        "weights",
        re.compile(r"\([^()]+:\d+(?:\.\d+)?\)"),
        "weights in brackets are read as words; use plain sentences",
    ),
)
_FOREIGN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def check(prompt: str) -> list[Hint]:
    """What Kontext is known to misread in an editing instruction; empty when nothing stands out."""
    text = _outside_quotes(prompt)
    answered = {"keep": bool(_KEEPS.search(text)), "quote": text != prompt}
    hints = []
    for code, pattern, advice in _MISREAD:
        found = pattern.search(text)
        if found and not answered.get(code):
            hints.append(Hint(code=code, found=found.group(), advice=advice))
    if len(_CHANGES.findall(text)) > 3:
        advice = "many changes at once; do them one after another as turns and each is followed better"
        hints.append(Hint(code="many", found="", advice=advice))
    foreign = _FOREIGN.search(prompt)
    if foreign:
        advice = "the text encoder does not know these characters; write the instruction in English"
        hints.append(Hint(code="language", found=foreign.group(), advice=advice))
    return hints


def check_replacement(old: str, new: str) -> list[Hint]:
    """Hints for replacing drawn words: lettering keeps its place when both are about as long."""
    if old.strip() and len(new.strip()) > 1.5 * len(old.strip()) + 3:
        advice = f"much longer than “{old.strip()}”: the layout may move; a similar length is kept best"
        return [Hint(code="length", found=new.strip(), advice=advice)]
    return []


def token_hint(prompt: str, t5: T5Tokenizer, clip: ClipTokenizer) -> str:
    """How much of each text encoder's room a prompt takes, and what does not fit, in one line."""
    words = []
    for name, tokenizer in (("T5", t5), ("CLIP", clip)):
        tokens = tokenizer.encode([prompt])
        plain = tokenizer.tokenizer.encode(prompt, add_special_tokens=False)
        used = len(tokenizer.prefix) + len(plain.ids) + 1
        words.append(f"{name} {used} of {tokenizer.max_length} tokens")
        if tokens.cut[0]:
            words[-1] += f" (cut off: “{tokens.cut[0]}”)"
        if tokens.unknown[0]:
            words[-1] += f" (not known: {', '.join(tokens.unknown[0])})"
    return "; ".join(words)


def _outside_quotes(prompt: str) -> str:
    """The prompt without the words between quotation marks, which are to be drawn and not obeyed."""
    return _QUOTED.sub("''", prompt)


def _in_language(labels: tuple[str, str, str], language: str) -> str:
    return labels[LANGUAGES.index(language)] if language in LANGUAGES else labels[0]

"""Teaching the text encoders to read: from an instruction's words alone, what the edited picture must show.

The flow learns what words mean only by way of noisy pictures. Here learned queries attend to the T5 encoder's output,
as a picture's tokens will, and are asked for what the words say: the kind of edit, which thing, the new colour, each
letter of the new word. No picture is painted, so an example costs a hundredth of one of the flow. The reader is
dropped afterwards; the flow stage then starts from encoders that can read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.clip import ClipTextEncoder
from ..models.t5 import T5Encoder
from ..models.tokenizers import ClipTokenizer, T5Tokenizer
from ..training.flow import KontextModule
from ..training.loop import LoopConfig, train
from . import phrases, world
from .figures import SLOTS
from .labels import PARTS, WHOLE
from .letters import ALPHABET
from .scene import COLOURS, PLACES, SHAPES, Scene, Thing

log = logging.getLogger("kontext")

UNASKED = -100
"""The class number of what an instruction says nothing of: it counts for nothing."""
KINDS = (
    *("recolour", "remove", "add", "replace", "move", "bigger", "smaller"),
    *("background", "time", "weather", "grade"),
    *("replace word", "add word", "recolour word"),
    *("style", "character", "things", "sign", "creature", "look"),
)
SIDES = ("left", "middle", "right")
_COLOURS, _PLACES = tuple(COLOURS), tuple(PLACES)
FIELDS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    **{
        f"old {name}": values
        for name, values in (("shape", SHAPES), ("colour", _COLOURS), ("place", _PLACES))
    },
    **{
        f"new {name}": values
        for name, values in (("shape", SHAPES), ("colour", _COLOURS), ("place", _PLACES))
    },
    "side": SIDES,
    **{f"letter {k}": ("", *ALPHABET) for k in range(SLOTS)},
    "ink": PARTS["ink"],
    **{name: WHOLE[name] for name in ("background", "time", "weather", "grade")},
    **{f"colour of {shape}": ("", *_COLOURS) for shape in SHAPES},
    **{f"shape at {place}": ("", *SHAPES) for place in _PLACES},
    **{f"colour at {place}": ("", *_COLOURS) for place in _PLACES},
    **{
        name: PARTS[name]
        for name in ("body", "body colour", "eyes", "top", "pattern", "wear", "wear colour", "pose")
    },
    **{name: WHOLE[name] for name in ("look", "tone")},
}
"""What is asked, and the answers there are."""
_COLUMN = {name: k for k, name in enumerate(FIELDS)}
POOLED = ("kind", "side", "background", "time", "weather", "grade", "pose", "look", "tone")
"""The fields that CLIP's pooled vector is asked for too."""
MIX = {"local": 0.25, "global": 0.10, "text": 0.25, "style": 0.10, "character": 0.10, "generate": 0.20}
"""Shares of what is read: no pictures are needed, so words to be spelt and captions are as cheap as any."""
HELD_OUT = 300
"""Validation texts of each category that are read at the end."""


def answers(category: str, plan: world.Plan) -> dict[str, str]:
    """Field -> answer, of what the instruction of a world's example says."""
    before, after, text = plan.truth.before, plan.truth.after, plan.instruction
    kind = category if category in ("style", "character") else plan.kind
    found = {"kind": kind}
    if category == "local":
        assert before is not None
        found |= _of_things(plan.kind, before, after, text)
    elif category == "global":
        found[kind] = getattr(after, kind)
    elif kind in ("replace word", "add word", "sign") and after.sign is not None:
        found |= {f"letter {k}": after.sign.word[k : k + 1] for k in range(SLOTS)}
    if after.sign is not None and kind in ("add word", "recolour word", "sign") and after.sign.ink in text:
        found["ink"] = after.sign.ink
    if category in ("style", "character", "generate"):
        found |= {name: getattr(after, name) for name in ("background", "time", "weather")}
        colours = dict.fromkeys(SHAPES, "") | {thing.shape: thing.colour for thing in after.things}
        found |= {f"colour of {shape}": colour for shape, colour in colours.items()}
        if any(way in text for ways in phrases.WHERE.values() for way in ways):
            at = {thing.place: thing for thing in after.things}
            for place in _PLACES:
                found[f"shape at {place}"] = at[place].shape if place in at else ""
                found[f"colour at {place}"] = at[place].colour if place in at else ""
    if after.creature is not None:
        found["pose"] = after.creature.pose
        if category == "generate":
            names = ("body", "colour", "eyes", "top", "pattern", "wear", "wear_colour")
            fields = ("body", "body colour", "eyes", "top", "pattern", "wear", "wear colour")
            found |= {field: getattr(after.creature, name) for field, name in zip(fields, names, strict=True)}
            if after.creature.wear == "nothing":
                del found["wear colour"]
    if category == "generate":
        found["grade"], found["look"] = after.grade, after.look.name
        if after.look.name != "flat":
            found["tone"] = after.look.tone
    return found


def _of_things(kind: str, before: Scene, after: Scene, text: str) -> dict[str, str]:
    """What is said of the one thing that a local edit changes."""
    gone, come = set(before.things) - set(after.things), set(after.things) - set(before.things)
    found: dict[str, str] = {}
    if gone:
        found |= _named(next(iter(gone)), text)
    if come:
        new = next(iter(come))
        if kind in ("add", "replace"):
            found["new shape"] = new.shape
        if kind in ("add", "replace", "recolour"):
            found["new colour"] = new.colour
        if kind == "add":
            found["new place"] = new.place
        if kind == "move":
            found["side"] = SIDES[PLACES[new.place][0]]
    return found


def _named(thing: Thing, text: str) -> dict[str, str]:
    """By what a text refers to a thing, in the order in which `phrases.reference` does."""
    if thing.name in text:
        return {"old shape": thing.shape, "old colour": thing.colour}
    if any(f"{thing.colour} {noun}" in text for noun in ("thing", "object")):
        return {"old colour": thing.colour}
    for noun in ("thing", "object"):
        if any(f"{noun} {where}" in text for where in phrases.WHERE[thing.place]):
            return {"old place": thing.place}
    return {"old shape": thing.shape}


def numbers(category: str, plan: world.Plan) -> list[int]:
    """Class numbers of the answers in the order of FIELDS, UNASKED where nothing is said."""
    row = [UNASKED] * len(FIELDS)
    for name, answer in answers(category, plan).items():
        row[_COLUMN[name]] = FIELDS[name].index(answer)
    return row


def texts(split: str, category: str, start: int, count: int, tokenizers: Path) -> dict[str, Tensor]:
    """`t5` (count, L) and `clip` (count, 77) token ids and `answers` (count, fields), of the world's examples from
    number `start` on."""
    plans = [world.plan(split, category, index) for index in range(start, start + count)]
    words = [plan.instruction for plan in plans]
    return {
        "t5": T5Tokenizer.from_path(tokenizers / "tokenizer_2").encode(words).ids.short(),
        "clip": ClipTokenizer.from_path(tokenizers / "tokenizer").encode(words).ids.short(),
        "answers": torch.tensor([numbers(category, plan) for plan in plans], dtype=torch.int16),
    }


class Texts:
    """Instructions in memory, drawn from by step: the same step always gives the same batch.

    Args:
        split: of the world.
        counts: category -> how many.
        first: number of the first scene of each category.
        tokenizers: the model folder that holds them.
        workers: processes that draw the scenes.
    """

    def __init__(
        self, split: str, counts: Mapping[str, int], *, first: int, tokenizers: Path, workers: int = 1
    ) -> None:
        jobs = [
            (split, category, first + start, min(1000, count - start), tokenizers)
            for category, count in counts.items()
            for start in range(0, count, 1000)
        ]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            parts = [future.result() for future in [pool.submit(texts, *job) for job in jobs]]
        self.tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def __len__(self) -> int:
        return len(self.tensors["t5"])

    def batch(self, step: int, micro: int, size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step * 1_009 + micro)
        rows = torch.randint(len(self), (size,), generator=generator)
        return {key: value[rows].long() for key, value in self.tensors.items()}


class Reader(nn.Module):
    """Both encoders, a query for each field that attends to the T5 tokens once, and an answer from CLIP's vector."""

    def __init__(self, t5: T5Encoder, clip: ClipTextEncoder, heads: int = 4) -> None:
        super().__init__()
        self.t5, self.clip, self.heads = t5, clip, heads
        width = t5.params.d_model
        self.queries_in = nn.Linear(width, len(FIELDS), bias=False)  # its rows are the queries
        self.key_in, self.value_in = nn.Linear(width, width), nn.Linear(width, width)
        self.answers_in = nn.ModuleDict({_key(name): nn.Linear(width, len(a)) for name, a in FIELDS.items()})
        self.pooled_in = nn.ModuleDict(
            {_key(name): nn.Linear(clip.params.hidden_size, len(FIELDS[name])) for name in POOLED}
        )

    def forward(self, t5: Tensor, clip: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Token ids (B, L) and (B, 77) -> logits (B, classes) by field, of T5's tokens and of CLIP's vector."""
        txt = self.t5(t5, dtype=torch.float32)
        normed = F.layer_norm(txt, txt.shape[-1:])

        def split(value: Tensor) -> Tensor:
            return value.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

        asked = F.scaled_dot_product_attention(
            split(self.queries_in.weight).expand(len(t5), -1, -1, -1),
            split(self.key_in(normed)),
            split(self.value_in(normed)),
        )
        asked = asked.transpose(1, 2).flatten(2)
        longest = int(clip.argmax(-1).max()) + 1
        _, vec = self.clip(clip[:, :longest], dtype=torch.float32)
        of_tokens = {name: self.answers_in[_key(name)](asked[:, k]) for k, name in enumerate(FIELDS)}
        return of_tokens, {name: self.pooled_in[_key(name)](vec) for name in POOLED}


def _key(name: str) -> str:
    return name.replace(" ", "_")


@torch.no_grad()
def temper(t5: T5Encoder, ids: Tensor, spread: float = 1.5) -> None:
    """Make queries smaller where attention has become one-hot: over these ids (B, L) no head's logits spread by more
    than this standard deviation then. Encoders trained before `optim.RATES` need it, fresh ones do not."""

    def scale(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        heads = module.params.num_heads
        q, k = (layer(args[0]).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (module.q, module.k))
        found = (q @ k.transpose(-1, -2)).std((0, 2, 3))
        module.q.weight.mul_((spread / found).clamp(max=1).repeat_interleave(q.shape[-1])[:, None])

    hooks = [block.layer[0].SelfAttention.register_forward_pre_hook(scale) for block in t5.encoder.block]
    t5(ids, dtype=torch.float32)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def stagger(t5: T5Encoder) -> None:
    """Let the heads look along the text from the start: one at the word before, one at the word after, every third one
    back with less and less weight, the others anywhere. Random biases are too small for any of it."""
    # (buckets, heads): keys at or before the query, then keys after it
    table = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    half = len(table) // 2
    for head in range(table.shape[1]):
        kind = head % 4
        if kind == 0:
            table[1, head] += 3
        elif kind == 1:
            table[half + 1, head] += 3
        elif kind == 2:
            table[:half, head] -= 0.4 * torch.arange(half)
            table[half:, head] -= 4


class ReadingTask:
    """Cross-entropy of every answer that an instruction gives; a `Task` for `loop.train`.

    Args:
        pooled: weight of what CLIP's vector answers.
        text_tokens: T5 tokens of a prompt, longer ones are cut; drawn anew in each step between this and all, for
            paddings must not matter.
    """

    def __init__(self, module: Reader, data: Texts, *, pooled: float = 0.3, text_tokens: int = 32) -> None:
        self.module, self.data, self.pooled, self.text_tokens = module, data, pooled, text_tokens
        self.batch: Callable[[int, int, int], dict[str, Tensor]] = data.batch

    def loss(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        whole = batch["t5"].shape[1]
        length = int(torch.randint(self.text_tokens, whole + 1, (), generator=generator))
        of_tokens, of_vector = self.module(batch["t5"][:, :length], batch["clip"])
        total, pooled, right, asked = torch.zeros(()), torch.zeros(()), 0, 0
        for name, logits in of_tokens.items():
            truth = batch["answers"][:, _COLUMN[name]]
            total = total + F.cross_entropy(logits, truth, ignore_index=UNASKED, reduction="sum")
            right += int((logits.argmax(-1) == truth).sum())
            asked += int((truth != UNASKED).sum())
            if name in of_vector:
                pooled = pooled + F.cross_entropy(
                    of_vector[name], truth, ignore_index=UNASKED, reduction="sum"
                )
        count = len(batch["t5"])
        return (total + self.pooled * pooled) / count, {"right": right / max(1, asked)}


@torch.inference_mode()
def accuracy(module: Reader, data: Texts, size: int = 256) -> dict[str, float]:
    """Field -> share of right answers from T5's tokens, of what is asked in `data`; fields never asked are left out."""
    right, asked = dict.fromkeys(FIELDS, 0), dict.fromkeys(FIELDS, 0)
    for start in range(0, len(data), size):
        batch = {key: value[start : start + size].long() for key, value in data.tensors.items()}
        for name, logits in module(batch["t5"], batch["clip"])[0].items():
            truth = batch["answers"][:, _COLUMN[name]]
            right[name] += int((logits.argmax(-1) == truth).sum())
            asked[name] += int((truth != UNASKED).sum())
    return {name: right[name] / asked[name] for name in FIELDS if asked[name]}


def train_reading(
    module: KontextModule,
    folder: Path,
    *,
    tokenizers: Path,
    steps: int,
    examples: int,
    first: int,
    workers: int,
    lr: float,
    seconds: float | None = None,
) -> dict[str, float]:
    """Train the module's encoders to read; returns what `accuracy` finds on held-out texts.

    Args:
        folder: gets the checkpoint and the log, and is gone on with.
        tokenizers: the model folder that holds them.
        examples: how many texts, from scene number `first` of each category on.
        lr: AdamW's peak, Muon's is twice it.
    """
    counts = {category: max(1, round(examples * share)) for category, share in MIX.items()}
    data = Texts("train", counts, first=first, tokenizers=tokenizers, workers=workers)
    temper(module.t5, data.batch(0, 0, 64)["t5"])
    stagger(module.t5)
    reader = Reader(module.t5, module.clip)
    config = LoopConfig(
        steps=steps,
        batch=64,
        lr=lr,
        muon_lr=2 * lr,
        warmup=min(20, steps),
        schedule="stable",
        decay=0.3,
        ema=0.98,
        checkpoint_every=200,
    )
    train(ReadingTask(reader, data), config, folder, stop_after_seconds=seconds)
    held_out = Texts("val", dict.fromkeys(MIX, HELD_OUT), first=0, tokenizers=tokenizers)
    found = accuracy(reader, held_out)
    log.info("held-out texts: %s", ", ".join(f"{name} {share:.2f}" for name, share in found.items()))
    return found

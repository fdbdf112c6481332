"""The tokenizers of kontext-tiny, trained on its world's instructions, in the published ones' formats.

T5 style: a unigram model whose pieces are byte-pair merges of lower-case words, scored by their frequency. No
piece but a single character holds an upper-case letter, a digit or a sign: words to be drawn are always
spelled out, letter by letter, which is what a small model can learn to copy into a picture.

CLIP style: byte-level, lower-casing BPE with `</w>` at the end of a word. It knows every text.

Both come out the same, byte for byte, from the same corpus.

    python -m kontext_core.tiny.tokenizers FOLDER
"""

from __future__ import annotations

import json
import math
import string
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.tokenizers import CLIP_END, CLIP_LENGTH, CLIP_START, clip_pipeline

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T5_VOCAB_SIZE = 1500
T5_LENGTH = 48
CLIP_VOCAB_SIZE = 1000
CORPUS_SIZE = 20_000
"""Instructions that the bundled tokenizers were trained on."""

SPACE = "▁"
T5_PAD, T5_END, T5_UNKNOWN = T5_SPECIAL = ("<pad>", "</s>", "<unk>")
T5_SINGLES = (SPACE, *string.ascii_letters, *string.digits, *string.punctuation)
UNUSED_COUNT = 0.1  # what a piece that the corpus's segmentation never uses counts as
TYPOGRAPHY = {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-"}


def train_t5(corpus: Sequence[str], vocab_size: int = T5_VOCAB_SIZE) -> Tokenizer:
    """A T5-style tokenizer of at most vocab_size pieces; fewer if the corpus has no more to merge.

    Ids: `<pad>` 0, `</s>` 1, `<unk>` 2, the single characters, then merges, the most frequent pairs first.
    Typographic quotes and dashes and full-width letters are read as plain ones, a capital that begins a
    lower-case word as a small letter. (transformers 5's own T5 class rebuilds the pipeline without this; its
    PreTrainedTokenizerFast keeps it.)

    Raises:
        ValueError: the corpus is empty, or vocab_size leaves no room beside the single characters.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers.trainers import BpeTrainer

    _check(corpus, vocab_size, len(T5_SPECIAL) + len(T5_SINGLES))
    # The world's instructions start in lower case, people's do not: "Make it red" must be "make it red",
    # while "STOP" stays as it is. The package has no back-references, so there is one rule a letter.
    lower = {rf"\b{letter}(?=[a-z])": letter.lower() for letter in string.ascii_uppercase}
    lower[r"^\s*A(?=\s+[a-z])"] = "a"
    rules = [*TYPOGRAPHY.items(), *((Regex(pattern), letter) for pattern, letter in lower.items())]
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), *(normalizers.Replace(pattern, plain) for pattern, plain in rules)]
    )
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    alone = pre_tokenizers.Split(Regex(f"[^a-z{SPACE}]"), "isolated")

    merger = Tokenizer(models.BPE())
    merger.normalizer = normalizer
    merger.pre_tokenizer = pre_tokenizers.Sequence([words, alone])
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(T5_SPECIAL),
        initial_alphabet=list(T5_SINGLES),
        limit_alphabet=len(T5_SINGLES),
        show_progress=False,
    )
    merger.train_from_iterator(corpus, trainer)
    merges = json.loads(merger.to_str())["model"]["merges"]
    pieces = list(dict.fromkeys([*T5_SINGLES, *("".join(pair) for pair in merges)]))

    counts = Counter(token for line in merger.encode_batch(list(corpus)) for token in line.tokens)
    total = sum(counts.values())
    scores = [round(math.log(max(counts[piece], UNUSED_COUNT) / total), 6) for piece in pieces]
    vocab = [*((token, 0.0) for token in T5_SPECIAL), *zip(pieces, scores, strict=True)]
    unk_id = T5_SPECIAL.index(T5_UNKNOWN)
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk_id, byte_fallback=False))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in T5_SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", T5_END],
        pair=["$A", T5_END, "$B", T5_END],
        special_tokens=[(T5_END, T5_SPECIAL.index(T5_END))],
    )
    return tokenizer


def train_clip(
    corpus: Sequence[str], vocab_size: int = CLIP_VOCAB_SIZE
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP-style vocabulary and its merges, at most vocab_size ids.

    Ids: 256 bytes, 256 bytes that end a word, merges, `<|startoftext|>`, `<|endoftext|>`.

    Raises:
        ValueError: the corpus is empty, or vocab_size leaves no room beside the bytes.
    """
    from tokenizers import models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    single = sorted(pre_tokenizers.ByteLevel.alphabet())
    single += [f"{byte}</w>" for byte in single]
    _check(corpus, vocab_size, len(single) + 2)
    tokenizer = clip_pipeline(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    # Byte-pair merges do not depend on how many follow: ask for plenty, keep what fits.
    # Equal counts are settled by id, and bytes that end a word get theirs in hash order unless they have one.
    trainer = BpeTrainer(
        vocab_size=2 * vocab_size, end_of_word_suffix="</w>", special_tokens=single, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [(left, right) for left, right in learned[: vocab_size - len(single) - 2]]
    tokens = dict.fromkeys([*single, *(left + right for left, right in merges), CLIP_START, CLIP_END])
    return {token: index for index, token in enumerate(tokens)}, merges


def save_t5(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(
        tokenizer.to_str(pretty=True) + "\n", encoding="utf-8", newline="\n"
    )
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": T5_LENGTH,
        "eos_token": T5_END,
        "pad_token": T5_PAD,
        "unk_token": T5_UNKNOWN,
        "extra_ids": 0,
        "additional_special_tokens": [],
    }
    _write_json(folder / "tokenizer_config.json", config)


def save_clip(vocab: dict[str, int], merges: Sequence[tuple[str, str]], folder: Path) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    special = {"bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": CLIP_END, "unk_token": CLIP_END}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", {**config, **special})


def train_tokenizers(corpus: Sequence[str], folder: Path) -> None:
    """Train both on a corpus and write `tokenizer/` (CLIP) and `tokenizer_2/` (T5) into a model folder."""
    save_clip(*train_clip(corpus), folder / "tokenizer")
    save_t5(train_t5(corpus), folder / "tokenizer_2")


def _check(corpus: Sequence[str], vocab_size: int, fixed: int) -> None:
    if not corpus:
        raise ValueError("the corpus is empty; give a list of instructions.")
    if vocab_size <= fixed:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be above {fixed}, the special tokens and single characters."
        )


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    from .world import corpus as world_corpus

    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m kontext_core.tiny.tokenizers FOLDER")
    train_tokenizers(world_corpus(CORPUS_SIZE), Path(sys.argv[1]))

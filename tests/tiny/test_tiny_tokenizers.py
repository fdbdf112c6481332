"""Training and reading back kontext-tiny's tokenizers."""

from __future__ import annotations

import itertools
import string
from pathlib import Path

import pytest
import torch

import kontext_core
from kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer
from kontext_core.tiny.tokenizers import (
    CLIP_VOCAB_SIZE,
    T5_VOCAB_SIZE,
    train_clip,
    train_t5,
    train_tokenizers,
)

BUNDLED = Path(kontext_core.__file__).parent / "assets" / "kontext-tiny"

CORPUS = [
    line.format(color=color, thing=thing, word=word)
    for line, color, thing, word in itertools.product(
        [
            "Make the {thing} {color}.",
            "make the {color} {thing} bigger",
            'change the sign on the {thing} to "{word}"',
            "Remove the {thing} and add a {color} one, please.",
            "replace the background with a {color} beach; keep the {thing}",
        ],
        ["red", "green", "blue", "yellow", "purple"],
        ["house", "balloon", "umbrella", "tree", "cat", "car"],
        ["HELLO", "OPEN 24", "STOP", "CAFE 7"],
    )
]
PROMPTS = [
    "",
    "make the cat blue",
    "  Make   the CAT blue,\n please. ",
    'change the sign to "EXIT 42"',
    "把猫变成红色 make it red",
    "an unseen zebra's crossing - 50% #1",
    "café",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    train_tokenizers(CORPUS, path)
    return path


def test_the_files_are_the_published_layout(folder):
    assert {str(file.relative_to(folder).as_posix()) for file in folder.rglob("*.*")} == {
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
    }


def test_training_twice_writes_the_same_bytes(folder, tmp_path):
    for _ in range(4):  # the package's hash order changes from call to call
        train_tokenizers(CORPUS, tmp_path)
        for file in folder.rglob("*.*"):
            assert file.read_bytes() == (tmp_path / file.relative_to(folder)).read_bytes(), file.name


def test_t5_special_ids_and_length_are_t5s(folder):
    tokenizer = T5Tokenizer.from_path(folder / "tokenizer_2")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.max_length) == (0, 1, 2, 48)
    assert tokenizer.encode([""]).ids[0].tolist() == [1] + [0] * 47


def test_t5_spells_out_capitals_digits_and_signs(folder):
    tokenizer = T5Tokenizer.from_path(folder / "tokenizer_2")
    pieces = tokenizer.tokenizer.get_vocab()
    alone = set(string.ascii_uppercase + string.digits + string.punctuation)
    assert alone <= set(pieces)
    assert not [piece for piece in pieces if len(piece) > 1 and alone & set(piece) and not piece[0] == "<"]
    assert tokenizer.tokenizer.encode("HELLO 24", add_special_tokens=False).tokens == [*"▁HELLO▁24"]


def test_t5_knows_the_words_of_its_corpus_as_wholes(folder):
    tokenizer = T5Tokenizer.from_path(folder / "tokenizer_2")
    tokens = tokenizer.tokenizer.encode("make the purple umbrella green", add_special_tokens=False).tokens
    assert tokens == ["▁make", "▁the", "▁purple", "▁umbrella", "▁green"]


def test_unknown_words_are_reported_and_not_an_error(folder):
    tokens = T5Tokenizer.from_path(folder / "tokenizer_2").encode(PROMPTS)
    assert tokens.unknown == [[], [], [], [], ["把猫变成红色"], [], ["café"]]
    assert ClipTokenizer.from_path(folder / "tokenizer").encode(PROMPTS).unknown == [[]] * len(PROMPTS)


def test_typographic_quotes_are_plain_ones_to_t5(folder):
    tokenizer = T5Tokenizer.from_path(folder / "tokenizer_2")
    plain, fancy = tokenizer.encode(['a "B" it\'s - C', "a “B” it’s — Ｃ"]).ids
    assert torch.equal(plain, fancy)


def test_a_capital_at_the_start_of_a_word_is_a_small_letter_to_t5(folder):
    tokenizer = T5Tokenizer.from_path(folder / "tokenizer_2")
    written = ['Make the Red house "STOP IT"', "A cat on a tree"]
    small = ['make the red house "STOP IT"', "a cat on a tree"]
    assert torch.equal(tokenizer.encode(written).ids, tokenizer.encode(small).ids)
    assert tokenizer.encode(["Make 红色 it"]).unknown == [["红色"]]  # offsets still point into the prompt


def test_clip_ends_with_its_special_tokens(folder):
    tokenizer = ClipTokenizer.from_path(folder / "tokenizer")
    last = tokenizer.vocab_size - 1
    assert tokenizer.prefix == [last - 1] and tokenizer.eos_id == tokenizer.pad_id == last
    ids = tokenizer.encode(["", "Make the CAT", "make the cat"]).ids
    assert ids.shape == (3, 77) and ids[0].tolist() == [last - 1] + [last] * 76
    assert torch.equal(ids[1], ids[2])


def test_transformers_reads_both_and_gives_the_same_ids(folder):
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5TokenizerFast

    ours = T5Tokenizer.from_path(folder / "tokenizer_2")
    whole = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2")
    assert whole.model_max_length == 48
    ids = whole(PROMPTS, padding="max_length", truncation=True).input_ids
    assert torch.equal(torch.tensor(ids), ours.encode(PROMPTS).ids)
    # transformers 5's T5 class drops a tokenizer.json's normalizer, so it would see "Make" as it stands
    prompts = [prompt for prompt in PROMPTS if "Make" not in prompt]
    rebuilt = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    ids = rebuilt(prompts, padding="max_length", truncation=True).input_ids
    assert torch.equal(torch.tensor(ids), ours.encode(prompts).ids)
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ours = ClipTokenizer.from_path(folder / "tokenizer")
    assert torch.equal(
        torch.tensor(theirs(PROMPTS, padding="max_length", truncation=True).input_ids),
        ours.encode(PROMPTS).ids,
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_bundled_tokenizers_know_the_world_and_cut_nothing(split):
    from kontext_core.tiny.world import corpus

    prompts = corpus(300, split)
    t5, clip = T5Tokenizer.from_path(BUNDLED / "tokenizer_2"), ClipTokenizer.from_path(BUNDLED / "tokenizer")
    for tokens in (t5.encode(prompts), clip.encode(prompts)):
        assert not any(tokens.cut) and not any(tokens.unknown)
    assert t5.vocab_size <= T5_VOCAB_SIZE and clip.vocab_size == CLIP_VOCAB_SIZE
    words = sum(len(prompt.split()) for prompt in prompts)
    pieces = sum(len(t5.tokenizer.encode(prompt, add_special_tokens=False).ids) for prompt in prompts)
    assert pieces < 1.4 * words  # words are whole; only the spelled ones and punctuation are more


def test_vocabularies_stay_within_their_sizes():
    assert train_t5(CORPUS, 130).get_vocab_size() == 130
    vocab, merges = train_clip(CORPUS, 560)
    assert len(vocab) == 560 and len(merges) == 560 - 514 and sorted(vocab.values()) == list(range(560))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="corpus is empty"):
        train_t5([])
    with pytest.raises(ValueError, match="must be above 514"):
        train_clip(CORPUS, 400)

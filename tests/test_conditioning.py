"""Where references stand, re-computed here from the conventions' own definitions; prompts and their warnings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kontext_core import latents
from kontext_core.conditioning import (
    CONVENTIONS,
    PromptConditioning,
    encode_prompt,
    make_references,
    place_references,
)
from kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer
from kontext_core.weights.locate import BUNDLED

SIZES = [(8, 12), (16, 4), (6, 6), (4, 20)]
TARGET = (10, 14)


def corner_and_extent(ids: torch.Tensor) -> tuple[list[float], list[float]]:
    """(index, y, x) of the first token, and (rows, columns); ids must fill a rectangle row by row."""
    first, last = ids[0], ids[-1]
    rows, columns = int(last[1] - first[1]) + 1, int(last[2] - first[2]) + 1
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) + first[1:]
    assert ids[:, 0].eq(first[0]).all() and torch.equal(ids[:, 1:], expected.float())
    return first.tolist(), [rows, columns]


def expected_corners(sizes, target, convention):
    """Tokens: `index` counts up in place; `uxo` goes down the diagonal; `offset` fills a canvas whose right or
    lower edge is grown, whichever leaves its longer side shorter."""
    corners, height, width = [], 0, 0
    for number, (h, w) in enumerate(sizes, start=1):
        h, w = h // 2, w // 2
        if convention == "index":
            corners.append([number, 0, 0])
        elif convention == "uxo":
            before = sizes[: number - 1]
            corners.append([0, (target[0] + sum(s[0] for s in before)) // 2,
                            (target[1] + sum(s[1] for s in before)) // 2])  # fmt: skip
        elif height + h > width + w:
            corners.append([1, 0, width])
            height, width = max(height, h), width + w
        else:
            corners.append([1, height, 0])
            height, width = height + h, max(width, w)
    return corners


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[:2], SIZES, SIZES[::-1]], ids=["1", "2", "4", "reversed"])
def test_placement_is_the_conventions(convention, sizes):
    placed = place_references(sizes, TARGET, convention)
    corners = expected_corners(sizes, TARGET, convention)
    for ids, corner, (h, w) in zip(placed, corners, sizes, strict=True):
        assert corner_and_extent(ids) == (corner, [h // 2, w // 2])


@pytest.mark.parametrize("convention", ["offset", "index"])
def test_a_single_reference_stands_where_the_paper_puts_it(convention):
    (ids,) = place_references([(8, 12)], TARGET, convention)
    assert torch.equal(ids, latents.position_ids(8, 12, index=1))


@pytest.mark.parametrize("convention", ["offset", "uxo"])
def test_references_never_overlap(convention):
    placed = torch.cat(place_references(SIZES, TARGET, convention))
    target = latents.position_ids(*TARGET)
    everything = torch.cat((target, placed))
    assert len(torch.unique(everything, dim=0)) == len(everything)


def test_an_unknown_convention_is_an_error():
    with pytest.raises(ValueError, match="convention is 'grid'; use one of offset, index, uxo"):
        place_references([(8, 8)], TARGET, "grid")


def test_references_are_packed_in_order_and_spread_over_the_batch():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(1, 16, 4, 6, generator=generator), torch.randn(2, 16, 2, 4, generator=generator)
    references = make_references([one, two], TARGET, "index")
    assert references.lengths == (6, 2) and references.tokens.shape == (2, 8, 64)
    assert torch.equal(references.tokens[1, :6], latents.pack(one)[0])
    assert torch.equal(references.tokens[:, 6:], latents.pack(two))
    assert references.ids[:, 0].tolist() == [1] * 6 + [2] * 2
    assert make_references([], TARGET) is None


def test_one_prompt_is_repeated_and_other_numbers_are_refused():
    one = PromptConditioning(txt=torch.ones(1, 3, 4), vec=torch.ones(1, 5), warnings=("w",))
    three = one.expand(3)
    assert three.txt.shape == (3, 3, 4) and three.vec.shape == (3, 5) and three.warnings == ("w",)
    with pytest.raises(ValueError, match="3 prompts for a batch of 2"):
        three.expand(2)


@pytest.fixture(scope="module")
def model():
    """Only what prompts need: the bundled tokenizers, and small encoders."""
    from kontext_core.models.clip import ClipParams, ClipTextEncoder
    from kontext_core.models.t5 import T5Encoder, T5Params

    assets = BUNDLED["kontext-tiny"]
    t5, clip = T5Tokenizer.from_path(assets / "tokenizer_2"), ClipTokenizer.from_path(assets / "tokenizer")
    torch.manual_seed(0)
    return SimpleNamespace(
        name="small",
        device=torch.device("cpu"),
        t5_tokenizer=t5,
        clip_tokenizer=clip,
        t5=T5Encoder(
            T5Params(vocab_size=t5.vocab_size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval(),
        clip=ClipTextEncoder(
            ClipParams(
                vocab_size=clip.vocab_size, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2,
                eos_token_id=clip.eos_id,
            )
        ).eval(),
    )  # fmt: skip


def test_prompts_are_padded_to_the_models_length(model):
    encoded = encode_prompt(model, ["make the circle red", ""])
    assert encoded.txt.shape == (2, model.t5_tokenizer.max_length, 16) and encoded.vec.shape == (2, 16)
    assert encoded.warnings == ()
    alone = encode_prompt(model, ["make the circle red"])
    # rows of a batch are independent; a matrix product of two rows may round differently from one of one
    assert torch.allclose(encoded.txt[:1], alone.txt, atol=1e-5)
    assert torch.allclose(encoded.vec[:1], alone.vec, atol=1e-5)


def test_a_long_prompt_is_cut_and_the_warning_shows_what(model):
    encoded = encode_prompt(model, ["make the circle red " * 40 + "and the last words"])
    assert encoded.txt.shape[1] == model.t5_tokenizer.max_length
    (warning,) = encoded.warnings
    assert f"over {model.t5_tokenizer.max_length} tokens" in warning and "and the last words" in warning


def test_unknown_words_are_a_warning(model):
    (warning,) = encode_prompt(model, ["make it 红色"]).warnings
    assert "small does not know" in warning and "红" in warning


def test_no_prompt_at_all_is_an_error(model):
    with pytest.raises(ValueError, match="pass at least one"):
        encode_prompt(model, [])


def test_what_clip_alone_cuts_is_no_warning_and_is_mentioned_once_a_prompt(model, caplog):
    """The bundled T5 takes fewer tokens than CLIP: a longer one here, as the published one's."""
    t5 = T5Tokenizer.from_path(BUNDLED["kontext-tiny"] / "tokenizer_2", max_length=512)
    longer = SimpleNamespace(**{**vars(model), "t5_tokenizer": t5})
    with caplog.at_level("INFO", logger="kontext"):
        for _ in range(2):
            assert encode_prompt(longer, ["make the circle red " * 30]).warnings == ()
    (line,) = caplog.records
    assert line.levelname == "INFO" and "first 77 tokens, T5 reads all of it" in line.getMessage()

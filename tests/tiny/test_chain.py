"""Edits in a row: chains that the truth knows, and the measure of what no edit touched."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kontext_core.__main__ import main
from kontext_core.tiny import holdout
from kontext_core.tiny.chain import _untouched, make_chain


def test_every_edit_begins_where_the_one_before_ends() -> None:
    for number in range(6):
        chain = make_chain("test", number, 5)
        assert len({item.index for item in chain}) == 5
        for first, second in zip(chain, chain[1:], strict=False):
            assert first.truth.after == second.truth.before
            assert np.array_equal(first.target, second.context)
        for item in chain:
            assert 2 <= len(item.truth.before.things) <= 4, "as in training"
            assert item.change_mask.any() and not item.change_mask.all()
            assert np.array_equal(item.context[~item.change_mask], item.target[~item.change_mask]) or (
                np.abs(item.context.astype(int) - item.target)[~item.change_mask].max() <= 4
            )
            seen = holdout.combinations(item.truth.before) | holdout.combinations(item.truth.after)
            assert not seen & (holdout.HELD["test"] | holdout.HELD["val"])


def test_a_chain_is_the_same_every_time_and_other_numbers_are_other_chains() -> None:
    words = [[item.instruction for item in make_chain("test", number, 3)] for number in (0, 0, 1)]
    assert words[0] == words[1] != words[2]


def test_what_the_edits_touch_is_left_out_and_the_rest_is_not() -> None:
    item = make_chain("test", 0, 1)[0]
    mask = item.change_mask
    inside, outside = item.context.copy(), item.context.copy()
    inside[mask] = 0
    outside[~mask] = 255 - outside[~mask]
    assert _untouched(inside, item.context, mask) == 99.0
    assert _untouched(outside, item.context, mask) < 12


def test_the_command_prints_one_json_object(tmp_path, capsys) -> None:
    sheet = tmp_path / "turns.png"
    command = ["bench", "--turns", "2", "--count", "2", "--steps", "1", "--batch", "2", "--json"]
    assert main([*command, "--sheet", str(sheet)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["measure"], found["count"], found["steps"], found["goal"]) == ("turns", 2, 1, 30.0)
    assert [row["turn"] for row in found["turns"]] == [1, 2]
    last = found["turns"][-1]
    assert (found["share"], found["psnr"]) == (last["share"], last["psnr"])
    assert last["psnr"]["lowest"] <= last["psnr"]["median"]
    # the bundled autoencoder gives back what no edit touched; a black picture would be at 5 dB
    assert 20 < found["autoencoder"]["lowest"] < 60
    assert sheet.stat().st_size > 10_000


def test_counts_below_one_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--turns", "0"])
    assert "--turns" in capsys.readouterr().err

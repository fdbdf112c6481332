"""The command that puts the scorer to the test prints what the scorer's own tests hold."""

from __future__ import annotations

import json

import pytest

from kontext_core.tiny.score_check import GROUPS, check, main, table


def test_right_pictures_pass_and_no_other(capsys) -> None:
    main(["--count", "3", "--categories", "local,text,style,character", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["count"]) == ("val", 3)
    for category, rows in found["categories"].items():
        assert {row["group"] for row in rows.values()} == set(GROUPS)
        for name, row in rows.items():
            assert row["both"] <= min(row["done"], row["kept"])
            if name == "truth":
                assert row["both"] == 1, category
            if row["group"] in ("unchanged", "wrong") and name != "half a change":
                assert row["both"] == 0, (category, name)
            if name in ("blurred", "black"):
                assert row["both"] == 0, (category, name)


def test_the_table_names_every_picture() -> None:
    result = check(count=1, categories=["global"])
    assert all(name in table(result) for name in ("global, 1", "one mistake", "black", *GROUPS))


def test_mistakes_are_told(capsys) -> None:
    with pytest.raises(ValueError, match="count is 0"):
        check(count=0)
    with pytest.raises(SystemExit):
        main(["--count", "1", "--categories", "remix"])
    assert "category is 'remix'" in capsys.readouterr().err

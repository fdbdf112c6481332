"""The benchmark: shares of a perfect and of an idle editor, the JSON, the contact sheet."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from kontext_core.__main__ import main
from kontext_core.edit import edit_image
from kontext_core.tiny import chain, editor
from kontext_core.tiny.bench import BenchReport, interval, run_bench
from kontext_core.tiny.world import EDIT_CATEGORIES, Example


def perfect(examples: list[Example]) -> list[np.ndarray]:
    return [item.target for item in examples]


def idle(examples: list[Example]) -> list[np.ndarray]:
    return [item.context for item in examples]


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return run_bench(perfect, "val", 4, 3, batch=3, model="truth", steps=1)


def test_the_summary_is_the_promised_json(report: BenchReport) -> None:
    summary = json.loads(json.dumps(report.summary))
    assert list(summary) == ["suite", "split", "model", "steps", "seed", "seconds_per_edit", "categories"]
    assert (summary["suite"], summary["split"], summary["seed"]) == ("tiny", "val", 3)
    assert list(summary["categories"]) == list(EDIT_CATEGORIES)
    for row in summary["categories"].values():
        assert list(row) == ["count", "done", "kept", "both"] and row["count"] == 4
        assert row["both"] <= min(row["done"], row["kept"])
    assert np.mean([row["both"] for row in summary["categories"].values()]) >= 0.95


def test_details_tell_new_combinations_from_known_ones(report: BenchReport) -> None:
    for details in report.details.values():
        assert {name: part["count"] for name, part in details["novel"].items()} == {"known": 2, "new": 2}
        assert sum(part["count"] for part in details["kinds"].values()) == 4


def test_the_table_and_the_sheet_show_every_category(report: BenchReport) -> None:
    assert all(name in report.table for name in EDIT_CATEGORIES)
    width, height = report.sheet.size
    assert width >= 4 * 3 * 128 and height >= 5 * 128


@pytest.mark.parametrize("steps", [["--steps", "2"], ["--few-step", "1"]])
def test_the_command_prints_the_json_or_the_table_and_writes_the_sheet(
    random_few_step_folder, tmp_path, capsys, steps: list[str]
) -> None:
    sheet = tmp_path / "made" / "sheet.png"
    command = ["bench", "--suite", "tiny", "--split", "val", "--count", "1", "--seed", "4", *steps]
    command += ["--model", str(random_few_step_folder), "--sheet", str(sheet)]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert list(answer) == ["suite", "split", "model", "steps", "seed", "seconds_per_edit", "categories"]
    assert (answer["suite"], answer["split"], answer["seed"]) == ("tiny", "val", 4)
    assert answer["steps"] == int(steps[1]) and answer["seconds_per_edit"] > 0
    assert list(answer["categories"]) == ["local", "global", "text", "style", "character"]
    # weights drawn by chance edit nothing
    assert all(
        row == {"count": 1, "done": 0, "kept": row["kept"], "both": 0}
        for row in answer["categories"].values()
    )
    assert "character 1/1" in captured.err
    with Image.open(sheet) as picture:
        assert picture.width >= 4 * 3 * 128 and picture.height >= 5 * 128
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["category", *EDIT_CATEGORIES] and lines[-1] == str(
        sheet
    )


@pytest.mark.parametrize("turns", [[], ["--turns", "1"]])
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], ("few_step", 2.5, None)),
        (["--sampler", "euler", "--shift", "resolution"], ("euler", "resolution", None)),
        (["--shift", "1.15", "--guidance", "3"], ("few_step", 1.15, 3.0)),
    ],
)
def test_the_suite_samples_in_its_own_way_unless_told_another(
    random_few_step_folder, tmp_path, monkeypatch, turns: list[str], options: list[str], settings: tuple
) -> None:
    seen = []

    def recorded(*inputs, **given):
        seen.append((given["sampler"], given["shift"], given.get("guidance")))
        return edit_image(*inputs, **given)

    for module in (chain, editor):
        monkeypatch.setattr(module, "edit_image", recorded)
    command = ["bench", "--split", "val", "--count", "1", "--steps", "2", *turns, *options]
    assert main([*command, "--model", str(random_few_step_folder), "--sheet", str(tmp_path / "s.png")]) == 0
    assert seen and set(seen) == {settings}


def test_an_unknown_shift_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--shift", "fast"])
    assert "'fast' is no shift; use resolution, none or a number" in capsys.readouterr().err


def test_an_idle_editor_does_nothing() -> None:
    done = run_bench(idle, "val", 4, categories=["local", "global", "text"]).summary["categories"]
    assert all(row["done"] == row["both"] == 0 for row in done.values())


def test_progress_is_told_and_other_seeds_are_other_edits() -> None:
    seen: list[tuple[str, int, int]] = []
    asked: list[str] = []

    def editor(examples: list[Example]) -> list[np.ndarray]:
        asked.extend(item.instruction for item in examples)
        return perfect(examples)

    for seed in (0, 1):
        run_bench(
            editor, "val", 3, seed, categories=["local"], batch=2, on_edit=lambda *row: seen.append(row)
        )
    assert seen[:2] == [("local", 2, 3), ("local", 3, 3)]
    assert asked[:3] != asked[3:]


def test_wilson_intervals_hold_the_share() -> None:
    assert interval(0, 0) == (0.0, 1.0)
    low, high = interval(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-3) and high == pytest.approx(0.9448, abs=1e-3)


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ValueError, match=r"categories are \['remix'\]"):
        run_bench(perfect, count=1, categories=["remix"])
    with pytest.raises(ValueError, match=r"count is 0"):
        run_bench(perfect, count=0)
    with pytest.raises(ValueError, match=r"gave 0 pictures for 1 examples"):
        run_bench(lambda examples: [], count=1, categories=["local"])

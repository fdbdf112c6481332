"""The benchmarks run, print the JSON that is promised, and compare what the rivals give before their time counts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kontext_core.cache import cache_of
from kontext_core.weights.load import load_model

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    """The benchmarks import one another as scripts of one folder do."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def narrow(monkeypatch):
    """Blocks of two heads; no compiler, and no ComfyUI in this process."""
    import block
    import peers

    monkeypatch.setattr(peers, "HEADS", 2)
    monkeypatch.setattr(peers, "HIDDEN", 2 * peers.HEAD)
    monkeypatch.setattr(peers.Case, "comfyui", lambda self: None)
    monkeypatch.setattr(peers.Case, "reference", lambda self: None)
    monkeypatch.setattr(block, "_compiled", lambda case: None)
    return block


def test_the_report_of_a_block_has_the_promised_fields_and_null_for_who_is_not_here(narrow):
    report = narrow.measure([24, 40], 8, 1, CPU, torch.float32)
    assert {"single", "double", "lengths"} <= set(report) and set(report["lengths"]) == {"24", "40"}
    for kind in ("single", "double"):
        row = report[kind]
        assert row == report["lengths"]["24"][kind]
        for name in ("limit", "kontext_core", "diffusers"):
            assert row[f"{name}_s"] > 0 and row["ratios_to_limit"][name] > 0
        for name in ("kontext_core_compiled", "comfyui", "reference"):
            assert row[f"{name}_s"] is None
        # float32 sums of 256 to 1,280 products in another order, of values up to some tens
        assert 0 < row["max_abs_difference"] < 1e-4 * row["largest_value"]
        assert row["abs_differences"]["diffusers"] == row["max_abs_difference"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert "diffusers" in narrow.as_text(report)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_rival_that_does_not_compute_the_same_is_no_rival(narrow, monkeypatch, wrong):
    import peers

    monkeypatch.setattr(peers.Case, "diffusers", lambda self: lambda *tokens: tokens[0] * wrong)
    with pytest.raises(ValueError, match=r"diffusers gives .* not finite: it computes something else"):
        narrow.measure([24], 8, 1, CPU, torch.float32)


def test_all_rivals_have_been_called_before_the_first_round(narrow, monkeypatch):
    import peers

    calls = []
    limit = peers.Case.limit

    def counted(self):
        run = limit(self)
        return lambda *tokens: (calls.append(1), run(*tokens))[1]

    monkeypatch.setattr(peers.Case, "limit", counted)
    narrow.measure([24], 8, 1, CPU, torch.float32)
    assert len(calls) == 4, "a block of each kind: once to warm up, once in the one round"


def test_one_name_gives_its_report_and_several_an_object_of_them(monkeypatch, capsys):
    import run

    assert set(run.RUNNERS) == set(run.NAMES) == set(run.MODULES)
    for name in run.NAMES:
        monkeypatch.setitem(run.RUNNERS, name, lambda args, name=name: {"from": name})
    for given, expected in (
        (["block"], {"from": "block"}),
        (["host", "start"], {"host": {"from": "host"}, "start": {"from": "start"}}),
        ([], {name: {"from": name} for name in run.NAMES}),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", *given, "--json"])
        run.main()
        assert json.loads(capsys.readouterr().out) == expected


def test_every_way_to_skip_work_pays_for_its_own_encoding(monkeypatch):
    import context

    monkeypatch.setattr(context, "CATEGORIES", ("local",))
    model = load_model("kontext-tiny")
    model.preset = replace(model.preset, default_steps=1)
    encoder = cache_of(model.autoencoder)
    words = cache_of(model.t5, model.clip, model.t5_tokenizer, model.clip_tokenizer)
    for number in (1, 2):
        assert len(context._edits(model, None, 1, 1)["both"]) == 1
        assert (encoder.misses, words.misses) == (number, number)


def test_growth_counts_time_memory_and_operations_along_its_axes(monkeypatch):
    import growth

    assert set(growth.AXES) == {"pixels", "references", "steps", "batch"}
    monkeypatch.setattr(growth, "AXES", {"pixels": [32, 64], "steps": [1, 2]})
    report = growth.measure(1, True, None, CPU, torch.float32)
    for found in report["axes"].values():
        less, more = found["points"]
        assert more["operations"] > less["operations"] and more["seconds"] > 0
    # what a step needs is given back after it: twice the steps, no more memory
    less, more = report["axes"]["steps"]["points"]
    assert more["bytes"] <= 1.1 * less["bytes"]
    assert "time grows as operations" in growth.as_text(report)

"""`python dev.py test`: two processes beside each other, one exit code, and all that both print."""

from __future__ import annotations

import os
import sys

import pytest

import dev

PASSES = "def test_{name}():\n    print('ran {name}')\n"
FAILS = "def test_{name}():\n    assert False, 'ran {name}'\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that lays out a project with a test for each process, and runs dev.py's command."""
    (tmp_path / "tests" / "browser").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\ntestpaths = ['tests']\n")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "prepare_environment", lambda: sys.executable)
    monkeypatch.setattr(dev, "prepare_host", lambda python: (tmp_path, python))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def run(browser: str, other: str, *arguments: str) -> int:
        (tmp_path / "tests" / "browser" / "test_seen.py").write_text(browser.format(name="seen"))
        (tmp_path / "tests" / "test_plain.py").write_text(other.format(name="plain"))
        return dev.test(list(arguments))

    return run


def test_both_parts_run_and_are_told_of(project, capfd):
    assert project(PASSES, PASSES, "-s") == 0
    out = capfd.readouterr().out
    assert 0 <= out.index("ran plain") < out.index("ran seen")
    assert out.count("1 passed") == 2


@pytest.mark.parametrize(("browser", "other"), [(FAILS, PASSES), (PASSES, FAILS)])
def test_a_failure_in_either_part_is_the_commands(project, capfd, browser, other):
    assert project(browser, other) == 1
    assert "1 failed" in capfd.readouterr().out


def test_a_choice_that_leaves_one_part_empty_is_no_failure(project, capfd):
    assert project(PASSES, PASSES, "-k", "plain") == 0
    assert project(PASSES, PASSES, "-k", "nowhere") == dev.NOTHING_COLLECTED


def test_named_tests_run_by_themselves(project, capfd):
    assert project(FAILS, PASSES, "tests/test_plain.py") == 0
    assert capfd.readouterr().out.count("1 passed") == 1

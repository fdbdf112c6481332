"""The browser side's words: every language has each of them, with the same blanks; nothing writes HTML."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "web" / "js").glob("*.js"))


def english() -> dict[str, str]:
    """Key -> text of web/js/text.js, texts that run over two lines joined."""
    source = (ROOT / "web" / "js" / "text.js").read_text(encoding="utf-8")
    table = source[source.index("ENGLISH = {") : source.index("};")]
    entries = re.findall(r'^  "(\w+)":((?:\s*\+?\s*"[^"\n]*")+),$', table, re.MULTILINE)
    return {key: "".join(re.findall(r'"([^"]*)"', texts)) for key, texts in entries}


def blanks(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_every_word_is_translated_with_its_blanks(language):
    words = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["kontext"]
    ours = english()
    assert len(ours) > 60 and set(words) == set(ours)
    assert [key for key in ours if blanks(ours[key]) != blanks(words[key])] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_nothing_is_put_into_a_page_as_html_or_loaded_from_elsewhere(module):
    source = module.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in source
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\"']+", source) == []


def test_only_the_entry_registers_an_extension():
    registering = [path.name for path in MODULES if "registerExtension" in path.read_text(encoding="utf-8")]
    assert registering == ["kontext.js"]


def test_every_word_that_is_used_exists():
    used = {
        key for path in MODULES for key in re.findall(r"\bt\(\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert used and used <= set(english())

"""The browser side's words: every language has each of them, with the same blanks; nothing writes HTML."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "web" / "js").glob("*.js"))


def table_of(module: str, name: str) -> dict[str, str]:
    """Key -> text of a table in web/js, texts that run over two lines joined."""
    source = (ROOT / "web" / "js" / module).read_text(encoding="utf-8")
    table = source[source.index(f"{name} = {{") :]
    table = table[: table.index("};")]
    entries = re.findall(r'^  "(\w+)":((?:\s*\+?\s*"[^"\n]*")+),$', table, re.MULTILINE)
    return {key: "".join(re.findall(r'"([^"]*)"', texts)) for key, texts in entries}


def english() -> dict[str, str]:
    """Key -> text of what the browser side says by itself, and what it knows of the server's sentences."""
    said = {f"said_{key}": text for key, text in table_of("sentences.js", "SENTENCES").items()}
    return table_of("text.js", "ENGLISH") | said


def spoken() -> tuple[set[str], set[str]]:
    """(texts without blanks, texts with "{}" for each blank) in the source of the nodes and the core."""
    plain, filled = set(), set()
    for folder in ("nodes", "kontext_core"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    plain.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    filled.add("".join(str(getattr(part, "value", "{}")) if isinstance(part, ast.Constant) else "{}"
                                       for part in node.values))  # fmt: skip
    return plain, filled


def blanks(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_every_word_is_translated_with_its_blanks(language):
    words = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["kontext"]
    ours = english()
    assert len(ours) > 60 and set(words) == set(ours)
    assert [key for key in ours if blanks(ours[key]) != blanks(words[key])] == []


def test_the_server_still_says_what_the_browser_translates():
    """Each sentence is in the source between its blanks; a blank of ours may stand for one of theirs."""
    plain, filled = spoken()
    known = table_of("sentences.js", "SENTENCES")
    known |= {key: text for key, text in table_of("text.js", "ENGLISH").items() if key.startswith("hint_")}
    known["hint_length"] = known["hint_length"].removeprefix("much longer than the words it replaces")
    known["drift"] = known["drift"].removeprefix("{label}: ")  # which the nodes put before what the core says
    assert len(known) > 60
    lost = []
    for key, sentence in known.items():
        fragments = [re.escape(part) for part in re.split(r"\{\w+\}", sentence)]
        in_order = re.compile(".*?".join(fragments), re.DOTALL)
        wider = [text for text in filled if len(text.replace("{}", "")) > 3]
        if not (
            sentence in plain
            or any(in_order.search(text) for text in filled)
            or any(re.fullmatch(".+".join(map(re.escape, text.split("{}"))), sentence) for text in wider)
        ):
            lost.append(key)
    assert lost == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_nothing_is_put_into_a_page_as_html_or_loaded_from_elsewhere(module):
    source = module.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in source
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\"']+", source) == []


def test_only_the_entry_registers_an_extension():
    registering = [path.name for path in MODULES if "registerExtension" in path.read_text(encoding="utf-8")]
    assert registering == ["kontext.js"]


def test_everything_that_others_could_meet_is_under_one_prefix():
    """Classes, names in the browser's storage, events, routes, and what is registered with the host."""
    css = (ROOT / "web" / "css" / "kontext.css").read_text(encoding="utf-8")
    rules = re.sub(r"/\*.*?\*/|\{[^{}]*\}", " ", css, flags=re.DOTALL)
    classes = set(re.findall(r"\.([a-z][\w-]*)", rules))
    assert len(classes) > 50 and {name for name in classes if not name.startswith("kontext-")} == set()
    assert set(re.findall(r"var\((--[\w-]+)", css)) >= {"--kontext-accent"}
    assert {name for name in re.findall(r"(--[\w-]+):", css) if not name.startswith("--kontext-")} == set()
    source = "\n".join(path.read_text(encoding="utf-8") for path in MODULES)
    named = re.findall(r"localStorage\.(?:get|set)Item\(\"([^\"]+)", source)
    named += re.findall(r"\b(?:name|id): \"([\w.]+)\"", source[source.index("registerExtension(") :])
    named += re.findall(r"addDOMWidget\(\"(\w+)\"", source)
    assert len(named) > 4 and {name for name in named if not name.startswith("kontext")} == set()


def test_every_word_that_is_used_exists():
    used = {
        key for path in MODULES for key in re.findall(r"\bt\(\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert used and used <= set(english())

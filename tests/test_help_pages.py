"""Every help page shows its node: the picture that it names is there (`python dev.py pictures` makes them)."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).resolve().parents[1] / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WORKFLOWS = sorted((DOCS.parents[1] / "workflows").glob("*.json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_help_page_has_its_picture(page):
    assert f"![](images/{page.stem}.jpg)" in page.read_text(encoding="utf-8")
    with Image.open(DOCS / "images" / f"{page.stem}.jpg") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_its_thumbnail(workflow):
    if workflow.stem == "few_step" and not workflow.with_suffix(".jpg").is_file():
        pytest.skip("made when kontext-tiny's distilled transformer is there")
    with Image.open(workflow.with_suffix(".jpg")) as picture:
        assert min(picture.size) >= 256

"""What a node of ours shows in the browser: plan, hints, progress, before/after, trouble; and that it goes with it."""

from __future__ import annotations

import pytest

EVIL = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 1</script>'


@pytest.fixture(scope="module")
def edited(tab):
    """The tab after one edit whose prompt is an attack."""
    tab.graph(prompt=f"{EVIL} make her hair red", steps=3, fit="crop")
    tab.page.wait_for_selector(".kontext-chip", timeout=30_000)
    assert tab.run() == "execution_success"
    tab.page.wait_for_selector(".kontext-handle:visible", timeout=30_000)
    return tab


@pytest.fixture
def handle(edited):
    found = edited.page.locator(".kontext-handle:visible").first
    found.focus()
    edited.page.keyboard.press("0")
    while int(found.get_attribute("aria-valuenow")) != 50:
        edited.page.keyboard.press(
            "ArrowLeft" if int(found.get_attribute("aria-valuenow")) > 50 else "ArrowRight"
        )
    return found


def test_size_tokens_and_memory_are_said_before_a_run(edited):
    chips = edited.page.locator(".kontext-chip").all_text_contents()
    assert " × " in chips[0]
    assert any("tokens" in chip for chip in chips)
    assert any(chip.endswith(("MB", "GB")) for chip in chips)
    assert any(chip.startswith("crops") for chip in chips)


def test_a_run_that_the_host_had_in_its_cache_is_shown_in_another_tab(edited):
    """Everything is there already, so the host says nothing of the edit: its history does."""
    page = edited.page.context.new_page()
    other = type(edited)(page, edited.tiny, edited.rendering).open(edited.page.url.split("#")[0])
    try:
        other.graph(prompt=f"{EVIL} make her hair red", steps=3, fit="crop")
        other.eval("""() => window.comfyAPI.api.api.addEventListener("execution_cached",
            (event) => { window.kept = event.detail.nodes.map(String); })""")
        assert other.run() == "execution_success"
        page.wait_for_selector(".kontext-handle:visible", timeout=30_000)
        caption = page.locator(".kontext-stage .kontext-caption").first.inner_text()
        assert "421 × 301" in caption
        assert other.eval("window.kept.includes(String(window.edit.id))"), (
            "the edit ran again: this shows nothing"
        )
        assert other.errors == []
    finally:
        page.close()


def test_what_kontext_may_misread_is_said(edited):
    assert "pronoun" in edited.page.locator(".kontext-notes").first.inner_text()


def test_both_pictures_are_shown_at_the_size_they_came_in(edited):
    assert "421 × 301" in edited.page.locator(".kontext-stage .kontext-caption").first.inner_text()
    pictures = "[...document.querySelectorAll('.kontext-pictures img')]"
    edited.page.wait_for_function(
        f"{pictures}.slice(0, 2).every((one) => one.naturalWidth > 0)", timeout=10_000
    )
    sizes = edited.eval(f"{pictures}.map((one) => [one.naturalWidth, one.naturalHeight])")
    assert sizes[:2] == [[421, 301], [421, 301]]


def test_keys_move_the_divider_zoom_and_show_the_difference(edited, handle):
    press = edited.page.keyboard.press
    press("ArrowRight")
    assert handle.get_attribute("aria-valuenow") == "52"
    press("Home")
    assert handle.get_attribute("aria-valuetext") == "0 % before"
    press("End")
    assert handle.get_attribute("aria-valuenow") == "100"
    press("+")
    assert edited.page.locator(".kontext-zoom:visible").first.inner_text() == "150 %"
    press("0")
    press("d")
    assert edited.page.locator(".kontext-difference").count() == 1
    edited.page.locator(".kontext-button[aria-pressed=true]:visible").first.press("d")
    assert edited.page.locator(".kontext-difference").count() == 0


def test_keys_of_the_view_do_not_reach_the_host(edited, handle):
    count = edited.eval("window.app.graph.nodes.length")
    edited.page.keyboard.press("Delete")
    assert edited.eval("window.app.graph.nodes.length") == count


def test_the_mouse_moves_the_divider(edited, handle):
    box = edited.page.locator(".kontext-pictures").first.bounding_box()
    x, y = box["x"], box["y"] + box["height"] / 3
    edited.page.mouse.move(x + box["width"] / 2, y)
    edited.page.mouse.down()
    edited.page.mouse.move(x + box["width"] / 4, y)
    edited.page.mouse.up()
    assert abs(int(handle.get_attribute("aria-valuenow")) - 25) <= 1


def test_presets_write_the_prompt(edited):
    edited.page.locator(".kontext-panel .kontext-wide", has_text="Presets").first.click()
    edited.page.wait_for_selector(".kontext-popover")
    edited.page.locator("[data-preset=replace_text]").click()
    edited.page.locator(".kontext-field[name=old]").fill("OPEN")
    edited.page.locator(".kontext-field[name=new]").fill(EVIL[:20])
    edited.page.wait_for_function("document.querySelector('.kontext-result').textContent.includes('OPEN')")
    edited.page.locator(".kontext-primary").click()
    prompt = edited.eval("window.edit.widgets.find((w) => w.name === 'prompt').value")
    assert prompt.startswith("Replace 'OPEN' with")
    assert edited.page.locator(".kontext-popover").count() == 0


def test_script_in_a_prompt_stays_text(edited):
    assert edited.eval("window.pwned") is None


def test_an_error_is_said_on_its_node_and_goes_with_the_next_run(edited):
    trouble = {"node_id": edited.eval("String(window.edit.id)"), "node_type": "KontextEdit", "traceback": []}
    edited.say("execution_error", **trouble, exception_message="<b>wrong</b> kind of file")
    mark = edited.page.locator(".kontext-bad:visible").first
    mark.wait_for()
    assert mark.inner_text() == "<b>wrong</b> kind of file"
    edited.say("execution_start")
    mark.wait_for(state="hidden")


def test_the_panel_is_not_saved_and_goes_with_its_node(edited):
    saved = edited.eval("window.edit.serialize().widgets_values")
    declared = edited.eval("window.edit.widgets.filter((w) => w.serialize !== false).length")
    assert len([value for value in saved if value is not None]) <= declared
    before = edited.page.locator(".kontext-panel").count()
    edited.eval("""() => {
        window.extra = LiteGraph.createNode("KontextEdit");
        app.graph.add(window.extra);
    }""")
    edited.page.wait_for_timeout(300)
    edited.eval("app.graph.remove(window.extra)")
    edited.page.wait_for_timeout(300)
    assert edited.page.locator(".kontext-panel").count() == before


def test_the_console_stays_clean(edited):
    assert edited.errors == []

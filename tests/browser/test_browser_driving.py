"""A node's view and its buttons by mouse and by key: Run, sliders, zoom and pan, the difference, frames, presets, the
host's mask editor, and a picture that carries its workflow."""

from __future__ import annotations

import io
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

PANELS = "import('/extensions/flux-kontext/js/panel.js')"
LINES = "Make the disc red\nfrom 0: Make the disc blue"

BUILD = """async ({tiny, lines}) => {
  const app = window.app, make = (type, x, y) => {
    const node = LiteGraph.createNode(type); node.pos = [x, y]; app.graph.add(node); return node;
  };
  app.graph.clear();
  const set = (node, name, value) => { node.widgets.find((one) => one.name === name).value = value; };
  const model = make("KontextLoadModel", 20, 60), clip = make("KontextLoadTextEncoders", 20, 200),
        vae = make("KontextLoadVAE", 20, 340), load = make("LoadImage", 20, 450), mask = make("LoadImageMask", 20, 800),
        turns = make("KontextTurns", 420, 60), preserve = make("KontextPreserve", 900, 60),
        show = make("PreviewImage", 1300, 60);
  set(model, "model", tiny.diffusion_models); set(clip, "t5", tiny.t5); set(clip, "clip", tiny.clip);
  set(vae, "vae", tiny.vae); set(load, "image", "scene.png"); set(mask, "image", "scene.png");
  set(mask, "channel", "red"); set(turns, "instructions", lines); set(turns, "steps", 2);
  const to = (from, slot, node, name) => from.connect(slot, node, node.inputs.findIndex((one) => one.name === name));
  to(model, 0, turns, "model"); to(clip, 0, turns, "clip"); to(vae, 0, turns, "vae"); to(load, 0, turns, "image");
  to(load, 0, preserve, "original"); to(turns, 1, preserve, "edited"); to(mask, 0, preserve, "mask");
  preserve.connect(0, show, 0);
  await app.loadGraphData(app.graph.serialize());
  app.canvas.ds.scale = 0.8; app.canvas.ds.offset = [0, 60]; app.canvas.setDirty(true, true);
}"""

# Name each panel's element by its node, for the tests to find.
NAME = f"""async () => {{
  for (const panel of (await {PANELS}).allPanels()) panel.element.dataset.of = panel.node.type;
}}"""


@pytest.fixture(scope="module")
def turned(tab):
    """The tab after Kontext Turns and Kontext Preserve ran, each with its view."""
    tab.eval(BUILD, {"tiny": tab.tiny, "lines": LINES})
    assert tab.run() == "execution_success"
    tab.page.wait_for_function("document.querySelectorAll('.kontext-panel .kontext-handle').length === 2")
    tab.page.wait_for_timeout(1000)
    tab.eval(NAME)
    return tab


def picture_box(panel) -> dict:
    return panel.locator(".kontext-pictures").bounding_box()


def drag(mouse, start: tuple[float, float], end: tuple[float, float]) -> None:
    mouse.move(*start)
    mouse.down()
    mouse.move(*end, steps=4)
    mouse.up()


@pytest.mark.parametrize("kind", ["KontextTurns", "KontextPreserve"])
def test_the_divider_of_turns_and_preserve_follows_mouse_and_keys(turned, kind):
    panel = turned.page.locator(f"[data-of={kind}]")
    handle = panel.locator(".kontext-handle")
    box = picture_box(panel)
    y = box["y"] + box["height"] / 3
    drag(turned.page.mouse, (box["x"] + box["width"] / 2, y), (box["x"] + box["width"] / 4, y))
    assert abs(int(handle.get_attribute("aria-valuenow")) - 25) <= 1
    handle.focus()
    at = int(handle.get_attribute("aria-valuenow"))
    turned.page.keyboard.press("ArrowRight")
    turned.page.keyboard.press("PageUp")
    assert int(handle.get_attribute("aria-valuenow")) == at + 12


def test_each_turn_is_looked_at_in_the_node(turned):
    panel = turned.page.locator("[data-of=KontextTurns]")
    picker = panel.locator("[title='Next picture']")
    assert picker.inner_text() == "2/2"
    second = panel.locator(".kontext-picture[alt=After]").get_attribute("src")
    picker.press("Enter")
    assert picker.inner_text() == "1/2"
    assert panel.locator(".kontext-picture[alt=After]").get_attribute("src") != second


def test_the_wheel_zooms_the_view_that_was_clicked_and_the_graph_otherwise(turned):
    panel = turned.page.locator("[data-of=KontextPreserve]")
    box = picture_box(panel)
    turned.eval("document.activeElement?.blur()")
    turned.page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.3)
    turned.page.mouse.down()
    turned.page.mouse.up()
    scale = turned.eval("app.canvas.ds.scale")
    turned.page.mouse.wheel(0, -200)
    turned.page.wait_for_timeout(300)
    assert panel.locator(".kontext-zoom").inner_text() == "165 %"  # exp(200 / 400)
    assert turned.eval("app.canvas.ds.scale") == scale
    turned.page.mouse.wheel(0, 400)
    turned.page.wait_for_timeout(300)
    assert panel.locator(".kontext-zoom").inner_text() == "100 %"


def test_shift_and_arrows_pan_an_enlarged_picture(turned):
    panel = turned.page.locator("[data-of=KontextPreserve]")
    panel.locator(".kontext-handle").focus()
    for _ in range(3):
        turned.page.keyboard.press("+")
    before = panel.locator(".kontext-world").bounding_box()
    turned.page.keyboard.press("Shift+ArrowRight")
    turned.page.keyboard.press("Shift+ArrowDown")
    after = panel.locator(".kontext-world").bounding_box()
    step = 40 * turned.eval("app.canvas.ds.scale")
    assert after["x"] - before["x"] == pytest.approx(-step, abs=2)
    assert after["y"] - before["y"] == pytest.approx(-step, abs=2)
    turned.page.keyboard.press("0")


def test_the_difference_shows_four_times_what_changed(turned):
    panel = turned.page.locator("[data-of=KontextPreserve]")
    panel.locator(".kontext-handle").focus()
    turned.page.keyboard.press("d")
    outlined = panel.locator("[aria-label^='Draw the border']")
    if outlined.get_attribute("aria-pressed") == "true":
        outlined.click()
    turned.page.mouse.move(1200, 1000)
    turned.page.wait_for_timeout(400)
    shown = Image.open(io.BytesIO(panel.locator(".kontext-pictures").screenshot())).convert("RGB")
    turned.shot("difference")
    urls = panel.locator(".kontext-picture:not(canvas)").evaluate_all("(all) => all.map((one) => one.src)")
    read = [Image.open(io.BytesIO(turned.page.request.get(url).body())).convert("RGB") for url in urls]
    first, second = (
        np.asarray(one.resize(shown.size, Image.Resampling.BILINEAR), dtype=float) for one in read
    )
    expected = np.minimum(255, 4 * np.abs(first - second))
    assert expected.mean() > 3, "the edit changed nothing that could be seen"
    # Chromium scales a picture in another way than PIL does, and the difference is four times as large.
    assert np.abs(np.asarray(shown, dtype=float) - expected).mean() < 8
    outlined.click()
    panel.locator("[aria-label^='Show only what changed']").click()
    assert panel.locator(".kontext-difference").count() == 0


def test_nothing_of_the_views_reaches_the_console(turned):
    assert turned.errors == []


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_what_is_cropped_or_padded_is_drawn_over_the_picture(tab, fit):
    tab.graph(fit=fit, width=256, height=512)
    tab.page.wait_for_selector(".kontext-seen", state="attached")
    tab.page.wait_for_timeout(400)
    rectangle = "(one) => { const {x, y, width, height} = one.getBoundingClientRect(); return [x, y, width, height]; }"
    seen = tab.page.locator(".kontext-panel .kontext-seen").evaluate(rectangle)
    whole = tab.page.locator(".kontext-panel .kontext-pictures").evaluate(rectangle)
    assert seen[2] / seen[3] == pytest.approx(256 / 512, rel=0.03)
    if fit == "crop":  # as high as the picture, in the middle
        assert seen[3] == pytest.approx(whole[3], abs=3) and seen[2] < whole[2]
    else:  # as wide as the picture, and higher
        assert seen[2] == pytest.approx(whole[2], abs=3) and seen[3] > whole[3]
    assert seen[0] + seen[2] / 2 == pytest.approx(whole[0] + whole[2] / 2, abs=3)
    assert seen[1] + seen[3] / 2 == pytest.approx(whole[1] + whole[3] / 2, abs=3)
    mark = tab.page.locator(f".kontext-panel .kontext-{'cropped' if fit == 'crop' else 'padded'}")
    assert mark.evaluate("(one) => one.getTotalLength()") > 0
    tab.shot("before_run" if fit == "crop" else "before_run_pad")


def chip(tab, start: str) -> str:
    tab.page.wait_for_function(
        "(start) => [...document.querySelectorAll('.kontext-chip')].some((one) => one.textContent.startsWith(start))",
        arg=start,
    )
    return next(
        text for text in tab.page.locator(".kontext-chip").all_text_contents() if text.startswith(start)
    )


def test_run_stands_beside_what_it_needs_and_queues_what_comes_of_its_node(tab):
    tab.eval("localStorage.removeItem('kontext.speeds')")
    tab.graph(steps=2)
    chip(tab, "≥")  # roughly, before the first run
    tab.eval("""() => {
        const api = window.comfyAPI.api.api, other = LiteGraph.createNode("PreviewImage");
        other.pos = [1000, 500];
        app.graph.add(other);
        window.load.connect(0, other, 0);
        window.aside = String(other.id);
        [window.ran, window.ends] = [[], 0];
        api.addEventListener("executed", ({detail}) => window.ran.push(String(detail.node)));
        api.addEventListener("execution_success", () => { window.ends += 1; });
    }""")
    run = tab.page.locator(".kontext-panel button", has_text="Run").first
    assert run.get_attribute("title") == "Queue this node and what comes of it"
    assert run.bounding_box()["y"] == pytest.approx(
        tab.page.locator(".kontext-chip").first.bounding_box()["y"], abs=40
    )
    run.click()
    tab.page.wait_for_function("window.ends === 1")
    run.press("Enter")
    tab.page.wait_for_function("window.ends === 2")
    ran = tab.eval("window.ran")
    assert tab.eval("String(window.edit.id)") in ran and tab.eval("window.aside") not in ran
    assert tab.errors == []


def test_the_time_grows_with_the_batch(tab):
    tab.graph(steps=2, seed=random.randrange(1 << 30))
    chip(tab, "≥" if tab.eval("!localStorage.getItem('kontext.speeds')") else "≈")
    assert tab.run() == "execution_success"  # from here on the time is known

    def seconds(text: str) -> float:
        number, unit = re.fullmatch(r"≈ ([\d.]+) (\w+)", text).groups()
        return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]

    said = {}
    for batch in (1, 2):
        before = chip(tab, "≈")
        tab.eval(
            """(batch) => {
            for (const [name, value] of [["steps", 20], ["batch_size", batch]]) {
              window.edit.widgets.find((one) => one.name === name).value = value;
            }
        }""",
            batch,
        )
        tab.page.wait_for_function(
            "(old) => [...document.querySelectorAll('.kontext-chip')].some((one) => one.textContent.startsWith('≈') "
            "&& one.textContent !== old)",
            arg=before,
        )
        said[batch] = seconds(chip(tab, "≈"))
    assert said[2] == pytest.approx(2 * said[1], rel=0.1)


def test_run_says_so_where_nothing_takes_the_picture(tab):
    tab.graph()
    tab.eval("() => app.graph.remove(app.graph.nodes.find((node) => node.type === 'PreviewImage'))")
    tab.page.locator(".kontext-panel button", has_text="Run").first.click()
    tab.toast("connect Preview Image")
    tab.clear_messages()


def test_keys_choose_a_preset(tab):
    tab.graph(prompt="")
    button = tab.page.locator(".kontext-panel button", has_text="Presets").first
    button.press("Enter")
    tab.page.wait_for_selector(".kontext-popover .kontext-card:focus")
    drawings = tab.eval("[...document.querySelectorAll('.kontext-card > svg')].map((one) => one.innerHTML)")
    assert (
        len(drawings) == tab.page.locator(".kontext-card").count() > 5
    )  # a small drawing on each, no two the same
    assert len(set(drawings)) == len(drawings) and all("<rect" in one for one in drawings)
    chosen = tab.page.locator(".kontext-card[aria-checked=true]")
    for key, preset in (
        ("ArrowRight", "remove_background"),
        ("ArrowDown", "pose"),
        ("ArrowLeft", "restyle"),
        ("ArrowUp", "relight"),
        ("ArrowUp", "replace_text"),
    ):
        tab.page.keyboard.press(key)
        assert chosen.get_attribute("data-preset") == preset
    tab.shot("presets")
    tab.page.locator(".kontext-field[name=new]").fill("SHUT")
    tab.page.wait_for_function("document.querySelector('.kontext-result').textContent.includes('SHUT')")
    tab.page.keyboard.press("Enter")
    assert "SHUT" in tab.eval("window.edit.widgets.find((one) => one.name === 'prompt').value")
    button.press("Enter")
    tab.page.wait_for_selector(".kontext-popover .kontext-card:focus")
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".kontext-popover").count() == 0
    assert button.evaluate("(one) => one === document.activeElement")


def test_a_replacement_that_is_much_longer_is_pointed_out(tab):
    tab.graph()
    tab.page.locator(".kontext-panel button", has_text="Presets").first.click()
    tab.page.locator("[data-preset=replace_text]").click()
    tab.page.locator(".kontext-field[name=old]").fill("GO")
    tab.page.locator(".kontext-field[name=new]").fill("A MUCH LONGER WORDING")
    tab.page.locator(".kontext-popover .kontext-note", has_text="much longer than the words").wait_for()
    tab.page.keyboard.press("Escape")


def test_open_presets_go_with_their_node(tab):
    tab.graph()
    tab.page.locator(".kontext-panel button", has_text="Presets").first.click()
    tab.page.wait_for_selector(".kontext-popover .kontext-card:focus")
    tab.eval("app.graph.remove(window.edit)")
    assert tab.page.locator(".kontext-popover").count() == 0
    assert tab.errors == []


def test_a_large_sample_goes_with_its_training_node(tab):
    tab.eval("""async () => {
        app.graph.clear();
        app.graph.add(LiteGraph.createNode("KontextTrainLora"));
        await app.loadGraphData(app.graph.serialize());
    }""")
    tab.page.wait_for_timeout(1200)  # the graph is looked at twice a second
    tab.say(
        "kontext.training", node=tab.eval("String(app.graph.nodes[0].id)"), step=1, steps=9, loss=1, seconds=1,
        sample={"filename": "scene.png", "subfolder": "", "type": "input"},
    )  # fmt: skip
    tab.page.locator(".kontext-sample").first.press("Enter")
    assert tab.page.locator(".kontext-dialog").count() == 1
    tab.eval("app.graph.remove(app.graph.nodes[0])")
    assert tab.page.locator(".kontext-dialog").count() == 0


def test_the_picture_goes_to_the_hosts_mask_editor(tab):
    tab.graph()
    tab.page.locator(".kontext-stage [aria-label^='Open the picture in the host']").first.click()
    tab.page.wait_for_selector("[role=dialog] canvas, .mask-editor-dialog canvas", state="attached")
    links = tab.eval("""() => {
        const preserve = app.graph.nodes.find((node) => node.type === "KontextPreserve");
        const link = preserve.inputs.find((input) => input.name === "mask").link;
        const found = app.graph.links.get?.(link) ?? app.graph.links[link];
        return [app.graph.getNodeById(found.origin_id).type, found.origin_slot];
    }""")
    assert links == ["LoadImage", 1]
    tab.page.wait_for_timeout(1500)
    tab.shot("mask_editor")
    tab.page.get_by_role("dialog").get_by_role("button", name="Cancel").last.click()
    tab.page.wait_for_selector("[role=dialog] canvas, .mask-editor-dialog canvas", state="detached")


def test_everything_outside_the_node_has_a_name_too(tab):
    """Presets, the large view, the tools of painting and the sidebar."""
    tab.graph()
    tab.page.wait_for_selector(".kontext-panel .kontext-view")
    tab.page.locator("[class*='kontext.turns'], [data-testid='kontext.turns-tab-button']").first.click()
    tab.page.wait_for_selector(".kontext-turns")
    tab.eval("""async () => {
        document.querySelector(".kontext-stage [aria-label^='Paint over']").click();
        document.querySelector(".kontext-panel [aria-label='Open large']").click();
        document.querySelector(".kontext-panel [aria-haspopup=dialog]").click();
        await new Promise((resolve) => setTimeout(resolve, 1000));
    }""")
    found, nameless = tab.eval("""() => {
        const all = [...document.querySelectorAll(["turns", "popover", "dialog", "painting", "stage"].flatMap((place) =>
          ["button", "input", "[role]", "img"].map((one) => `.kontext-${place} ${one}`)).join())];
        const named = (one) => one.getAttribute("aria-label") || one.hasAttribute("alt") || one.textContent.trim()
          || one.labels?.length || one.getAttribute("title") || one.getAttribute("aria-labelledby");
        const free = ["group", "status", "alert", "listitem", "list"];
        return [all.length, all.filter((one) => !free.includes(one.getAttribute("role")) && !named(one))
          .map((one) => one.outerHTML.slice(0, 160))];
    }""")
    assert found > 30 and nameless == []
    tab.page.keyboard.press("Escape")
    tab.open(tab.page.url.split("#")[0])


def test_a_picture_that_is_dropped_brings_every_value(tab):
    """The workflow in a saved PNG, as artists share them: dropped on the page it is the graph again."""
    tab.graph(
        prompt='Make the "disc" <b>red</b> 漢字', steps=2, fit="pad", padding="#808080", seed=77, batch_size=1
    )
    values = "() => Object.fromEntries(app.graph.nodes.map((node) => [node.type, node.serialize().widgets_values]))"
    tab.eval("""() => {
        const save = LiteGraph.createNode("SaveImage");
        save.pos = [1000, 400];
        app.graph.add(save);
        window.edit.connect(0, save, 0);
        for (const one of window.edit.widgets) if (one.name === "control_after_generate") one.value = "fixed";
    }""")
    before = tab.eval(values)
    assert tab.run() == "execution_success"
    tab.eval("""async () => {
        const [saved] = Object.values(app.nodeOutputs).flatMap((output) => output?.images ?? [])
          .filter((image) => image.type === "output");
        const url = window.comfyAPI.api.api.apiURL(`/view?${new URLSearchParams(saved)}`);
        const file = new File([await (await fetch(url)).blob()], saved.filename, {type: "image/png"});
        app.graph.clear();
        const data = new DataTransfer();
        data.items.add(file);
        document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }""")
    tab.page.wait_for_function("app.graph.nodes.some((node) => node.type === 'KontextEdit')")
    tab.page.wait_for_timeout(800)
    assert json.dumps(tab.eval(values), sort_keys=True) == json.dumps(before, sort_keys=True)


def test_the_console_stays_clean(tab):
    assert tab.errors == []

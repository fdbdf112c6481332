"""A session at work: the forming picture, touch, quotes, what will not fit; turns compared, branched and saved."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
from PIL import Image

import dev
from kontext_core.turns import parse_turns

PICTURE = "toy_meadow.png"
PROMPTS = ("Make the red heart blue", "Make the red heart green")

WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const image = document.querySelector(".kontext-panel .kontext-pictures img:not([hidden])");
    const caption = document.querySelector(".kontext-panel .kontext-stage .kontext-caption")?.textContent;
    const step = document.querySelector(".kontext-progress:not([hidden]) span")?.textContent;
    if (image?.src.startsWith("blob:")) window.seen.push([image.src, caption, step]);
  }).observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ["src"]});
}"""


@pytest.fixture(scope="module")
def made(tab, host):
    """The tab with the turns panel open, after two edits of one picture."""
    for name in tab.eval(
        "async () => (await window.comfyAPI.api.api.listUserDataFullInfo('.')).map((file) => file.path)"
    ):
        if name.startswith("kontext/turns"):
            url = f"{host.server.url}/api/userdata/{name.replace('/', '%2F')}"
            assert tab.page.request.delete(url).ok
    tab.open(host.server.url)
    shutil.copy(dev.ROOT / "workflows" / "input" / PICTURE, host.server.base / "input" / PICTURE)
    tab.graph(prompt=PROMPTS[0], steps=12, seed=1, control_after_generate="fixed", image=PICTURE)
    tab.page.wait_for_selector(".kontext-chip")
    tab.eval(WATCH)
    tab.start()
    tab.page.wait_for_function("window.seen.length > 2")
    tab.shot("running", wait=0)
    assert tab.eval("() => window.running") == "execution_success"
    tab.page.wait_for_selector(".kontext-handle:visible")
    tab.eval(
        "(prompt) => { window.edit.widgets.find((one) => one.name === 'prompt').value = prompt; }", PROMPTS[1]
    )
    assert tab.run() == "execution_success"
    tab.page.locator("[class*='kontext.turns'], [data-testid='kontext.turns-tab-button']").first.click()
    tab.page.wait_for_function("document.querySelectorAll('.kontext-turn').length === 2")
    # the node beside the sidebar, not below it
    tab.eval("() => { app.canvas.ds.offset = [300, 90]; app.canvas.setDirty(true, true); }")
    tab.page.wait_for_timeout(500)
    tab.touch = tab.page.context.new_cdp_session(tab.page)
    return tab


@pytest.fixture(scope="module")
def redone(made):
    """The same after the first turn was done again with another seed."""
    made.eval("""() => {
        const api = window.comfyAPI.api.api;
        window.ended = new Promise((resolve) => api.addEventListener("execution_success", resolve, {once: true}));
    }""")
    _turn(made, PROMPTS[0]).locator("[aria-label^='Do this turn again']").first.click()
    made.eval("async () => { await window.ended; }")
    made.page.wait_for_function("document.querySelectorAll('.kontext-turn').length === 3")
    return made


def test_the_picture_is_seen_while_it_forms(made):
    seen = made.eval("window.seen")
    assert len({source for source, _, _ in seen}) >= 2, "the preview did not move"
    assert {caption for _, caption, _ in seen} == {"The picture so far"}
    assert any(step and step.startswith("Step") for _, _, step in seen)


def test_the_preview_goes_when_the_result_is_there(made):
    made.page.wait_for_timeout(1500)
    shown = made.eval(
        "[...document.querySelectorAll('.kontext-panel .kontext-pictures img')].map((one) => one.src)"
    )
    assert shown and not [source for source in shown if source.startswith("blob:")]
    # the host's own blurry copy would stand below it
    assert made.eval("window.edit.imgs ?? null") is None
    assert made.eval("""() => [...document.querySelectorAll(`[data-node-id="${window.edit.id}"] img`)]
        .filter((one) => !one.closest(".kontext-panel") && one.offsetParent).length""") == 0  # fmt: skip


def _fingers(tab, kind: str, points: list[tuple[float, float]]) -> None:
    touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
    tab.touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})


def test_two_fingers_zoom_and_one_moves_the_picture(made):
    view = made.page.locator(".kontext-panel .kontext-view").first
    zoom = made.page.locator(".kontext-panel .kontext-zoom:visible").first
    box = view.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    _fingers(made, "touchStart", [(x - 20, y)])
    _fingers(made, "touchStart", [(x - 20, y), (x + 20, y)])
    for spread in (30, 40, 50, 60):
        _fingers(made, "touchMove", [(x - spread, y), (x + spread, y)])
    _fingers(made, "touchEnd", [])
    assert 250 <= int(zoom.inner_text().split()[0]) <= 350
    assert made.eval("app.canvas.ds.scale") == 0.8, "the graph was zoomed as well"
    before = made.page.locator(".kontext-panel .kontext-world").first.bounding_box()
    _fingers(made, "touchStart", [(x + 30, y + 40)])
    for step in range(1, 5):
        _fingers(made, "touchMove", [(x + 30 - 10 * step, y + 40 - 5 * step)])
    _fingers(made, "touchEnd", [])
    after = made.page.locator(".kontext-panel .kontext-world").first.bounding_box()
    assert after["x"] - before["x"] == pytest.approx(-40, abs=3)
    assert after["y"] - before["y"] == pytest.approx(-20, abs=3)
    zoom.click()
    assert zoom.inner_text() == "100 %"


def test_a_finger_moves_the_divider(made):
    handle = made.page.locator(".kontext-panel .kontext-handle:visible").first
    box = made.page.locator(".kontext-panel .kontext-pictures").first.bounding_box()
    y = box["y"] + box["height"] / 4
    _fingers(made, "touchStart", [(box["x"] + box["width"] * 0.5, y)])
    _fingers(made, "touchMove", [(box["x"] + box["width"] * 0.3, y)])
    _fingers(made, "touchEnd", [])
    assert abs(int(handle.get_attribute("aria-valuenow")) - 30) <= 2


def test_the_mouse_moves_an_enlarged_picture(made):
    view = made.page.locator(".kontext-panel .kontext-view").first
    box = view.bounding_box()
    x, y = box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.3
    made.page.mouse.dblclick(x, y)
    assert made.page.locator(".kontext-panel .kontext-zoom:visible").first.inner_text() == "300 %"
    world = made.page.locator(".kontext-panel .kontext-world").first
    before = world.bounding_box()
    x -= 60  # the first click put the divider under the mouse
    made.page.mouse.move(x, y)
    made.page.mouse.down()
    made.page.mouse.move(x - 25, y + 15, steps=4)
    made.page.mouse.up()
    after = world.bounding_box()
    assert after["x"] - before["x"] == pytest.approx(-25, abs=2)
    assert after["y"] - before["y"] == pytest.approx(15, abs=2)
    made.page.mouse.dblclick(x, y)


def test_selected_words_are_quoted_for_a_text_edit(made):
    prompt = "Replace OPEN with SHUT on the sign"
    made.eval("""(prompt) => {
        const found = window.edit.widgets.find((one) => one.name === "prompt");
        found.value = prompt;
        found.callback?.(prompt);
    }""", prompt)  # fmt: skip
    made.page.wait_for_timeout(300)
    field = """() => {
        const found = window.edit.widgets.find((one) => one.name === "prompt");
        const shown = document.querySelector(`[data-node-id="${window.edit.id}"] textarea`);
        const area = [found.inputEl, found.element, shown]
          .find((one) => one?.tagName === "TEXTAREA" && one.isConnected);
        area.focus();
        area.setSelectionRange(8, 12);
    }"""
    made.eval(field)
    made.page.locator(".kontext-panel [aria-label^='Put the selected words']:visible").first.click()
    said = made.eval("window.edit.widgets.find((one) => one.name === 'prompt').value")
    assert said == "Replace 'OPEN' with SHUT on the sign"


def test_what_will_not_fit_is_said_before_it_runs(made):
    change = """(values) => {
        for (const [name, value] of Object.entries(values)) {
          window.edit.widgets.find((one) => one.name === name).value = value;
        }
    }"""
    made.eval(change, {"width": 4096, "height": 4096, "batch_size": 64})
    made.page.wait_for_selector(".kontext-warned")
    note = made.page.locator(".kontext-notes").first.inner_text()
    assert "Needs about" in note and "smaller size" in note
    made.shot("wont_fit")
    made.eval(change, {"width": 0, "height": 0, "batch_size": 1})
    made.page.wait_for_selector(".kontext-warned", state="detached")
    assert "Needs about" not in made.page.locator(".kontext-notes").first.text_content()


def _turn(made, prompt: str):
    return made.page.locator(".kontext-turn", has_text=prompt)


def test_a_turn_says_its_instruction_seed_seconds_and_drift(made):
    said = _turn(made, PROMPTS[1]).inner_text()
    assert PROMPTS[1] in said and "seed 1" in said.lower() and "dB" in said and " s" in said
    assert _turn(made, PROMPTS[1]).locator("img").evaluate("(one) => one.naturalWidth") > 16


def test_two_turns_are_compared_by_click(made):
    _turn(made, PROMPTS[0]).locator(".kontext-words").click()
    stage = made.page.locator(".kontext-turns .kontext-stage")
    made.page.wait_for_function(
        "document.querySelector('.kontext-turns .kontext-caption')?.textContent.startsWith('#1')"
    )
    _turn(made, PROMPTS[1]).locator("[aria-label^='Compare']").click()
    made.page.wait_for_function(
        "document.querySelector('.kontext-turns .kontext-caption')?.textContent.startsWith('#1 | #2')"
    )
    assert made.page.locator(".kontext-turn[aria-selected=true]").count() == 2
    pictures = stage.locator(".kontext-picture:visible")
    made.page.wait_for_function(
        "[...document.querySelectorAll('.kontext-turns .kontext-pictures img')].every((one) => one.naturalWidth > 64)"
    )
    assert pictures.count() == 2
    made.shot("turns")


def test_a_branch_writes_picture_prompt_and_seed_into_the_graph(made, host):
    made.eval("""() => {
        window.edit.widgets.find((one) => one.name === "prompt").value = "something else";
        window.edit.widgets.find((one) => one.name === "seed").value = 77;
    }""")
    _turn(made, PROMPTS[0]).locator("[aria-label^='Put this picture']").click()
    made.page.wait_for_function(
        "(name) => window.load.widgets.find((one) => one.name === 'image').value !== name", arg=PICTURE
    )
    assert made.eval(
        "['prompt', 'seed'].map((name) => window.edit.widgets.find((one) => one.name === name).value)"
    ) == [PROMPTS[0], 1]
    assert _loaded(made, host).tobytes() == _result(host, 0).tobytes()


def _loaded(made, host) -> Image.Image:
    """The picture that Load Image names, read from the server's input folder."""
    name = made.eval("window.load.widgets.find((one) => one.name === 'image').value")
    return Image.open(host.server.base / "input" / name).convert("RGB")


def _name(host, number: int) -> str:
    """Name of the picture that a turn gave, as the list of turns is kept."""
    kept = next(host.server.base.glob("user/**/kontext/turns-0.json"))
    return json.loads(kept.read_text(encoding="utf-8"))[number]["after"]["filename"]


def _result(host, number: int) -> Image.Image:
    """What a turn gave, as the node showed it, read from the server's temporary folder."""
    return Image.open(next(host.server.base.glob(f"temp/**/{_name(host, number)}"))).convert("RGB")


def test_keys_compare_and_the_buttons_of_a_row_work_by_key(made, host):
    rows = made.page.locator(".kontext-list")
    rows.focus()
    for key in ("Home", "Shift+ArrowDown"):
        made.page.keyboard.press(key)
    made.page.wait_for_function(
        "document.querySelector('.kontext-turns .kontext-caption')?.textContent.startsWith('#1 | #2')"
    )
    branch = _turn(made, PROMPTS[1]).locator("[aria-label^='Put this picture']")
    rows.focus()
    for _ in range(2):  # compare, then branch, of the first row
        made.page.keyboard.press("Tab")
    assert branch.evaluate("(one) => one === document.activeElement")
    made.page.keyboard.press("Enter")
    made.page.wait_for_function(
        "(prompt) => window.edit.widgets.find((one) => one.name === 'prompt').value === prompt",
        arg=PROMPTS[1],
    )
    made.page.wait_for_function(
        "(name) => window.load.widgets.find((one) => one.name === 'image').value === name", arg=_name(host, 1)
    )
    made.toast("are in the graph")
    assert _loaded(made, host).tobytes() == _result(host, 1).tobytes()


def test_redo_starts_from_the_same_picture_with_another_seed(redone):
    newest = redone.page.locator(".kontext-turn").first.inner_text()
    assert PROMPTS[0] in newest
    assert int(re.search(r"seed (\d+)", newest)[1]) != 1
    size = redone.eval("""async () => {
        const image = new Image();
        const name = window.load.widgets.find((one) => one.name === "image").value;
        image.src = window.comfyAPI.api.api.apiURL(`/view?${new URLSearchParams({filename: name, type: "input"})}`);
        await image.decode();
        return [image.naturalWidth, image.naturalHeight];
    }""")
    assert size == list(Image.open(dev.ROOT / "workflows" / "input" / PICTURE).size)


def test_the_turns_are_saved_as_a_strip_of_pictures(redone):
    with redone.page.expect_download() as waiting:
        redone.page.locator("[aria-label^='Save the sequence as one']").first.click()
    found = waiting.value
    assert found.suggested_filename == "kontext-turns.png"
    strip = Image.open(io.BytesIO(found.path().read_bytes()))
    wide, high = Image.open(dev.ROOT / "workflows" / "input" / PICTURE).size
    width = round(wide / high * 256)
    assert strip.height == 296 and abs(strip.width - (3 * (width + 8) + 8)) <= 3
    # three pictures, not three blanks
    for number in range(3):
        part = strip.convert("L").crop((8 + number * (width + 8), 8, 8 + number * (width + 8) + width, 264))
        low, high = part.getextrema()
        assert high - low > 100


def test_the_turns_are_saved_as_a_workflow_that_opens(redone, host):
    with redone.page.expect_download() as waiting:
        redone.page.locator("[aria-label^='Save the sequence as a work']").first.click()
    saved = json.loads(waiting.value.path().read_text(encoding="utf-8"))
    turns = next(node for node in saved["nodes"] if node["type"] == "KontextTurns")
    lines = next(value for value in turns["widgets_values"] if isinstance(value, str) and PROMPTS[0] in value)
    # three edits of one picture, not a chain of three
    session = parse_turns(lines)
    assert [turn.instruction for turn in session.turns] == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert [turn.parent for turn in session.turns] == [None, None, None]
    assert session.turns[0].seed == 1
    kinds = redone.eval("""async (saved) => {
        await app.loadGraphData(saved);
        return app.graph.nodes.map((node) => node.type).sort();
    }""", saved)  # fmt: skip
    assert kinds == sorted(
        [
            "KontextLoadModel",
            "KontextLoadTextEncoders",
            "KontextLoadVAE",
            "KontextTurns",
            "LoadImage",
            "PreviewImage",
        ]
    )
    first = redone.eval(
        "app.graph.nodes.find((node) => node.type === 'LoadImage').widgets.find((one) => one.name === 'image').value"
    )
    assert re.fullmatch(
        r"kontext-[0-9a-f]{32}\.png", first
    )  # by what is in it: no other session writes over it
    start = Image.open(dev.ROOT / "workflows" / "input" / PICTURE).convert("RGB")
    assert Image.open(host.server.base / "input" / first).convert("RGB").tobytes() == start.tobytes()


def test_a_saved_session_keeps_where_each_turn_began(made):
    """Branches, a second try, a picture made from words, and turns that handed a latent on (`start`)."""
    picture = {name: {"filename": name, "subfolder": "", "type": "temp"} for name in "pabcdefgx"}
    turns = [
        {"prompt": "one", "seed": 1, "before": picture["p"], "after": picture["a"]},
        {"prompt": "two", "seed": 2, "before": picture["p"], "after": picture["b"]},
        {"prompt": "three", "seed": 3, "before": picture["b"], "after": picture["c"]},
        {"prompt": "redo 1", "seed": 4, "before": picture["a"], "after": picture["d"]},
        {"prompt": "from words", "seed": 5, "before": None, "after": picture["x"]},
        {"prompt": "six", "seed": 6, "before": picture["x"], "after": picture["e"]},
        {"prompt": "seven", "seed": 7, "before": picture["p"], "start": picture["d"], "after": picture["f"]},
    ]
    sessions = made.eval(
        "async (turns) => (await import('/extensions/flux-kontext/js/sessions.js')).sessionsOf(turns)", turns
    )
    assert [session["ref"]["filename"] for session in sessions] == ["p", "x"]
    first, second = (parse_turns("\n".join(session["lines"])) for session in sessions)
    assert [(turn.instruction, turn.parent, turn.seed) for turn in first.turns] == [
        ("one", None, 1), ("two", None, 2), ("three", 1, 3), ("redo 1", 0, 4), ("seven", 3, 7),
    ]  # fmt: skip
    assert [(turn.instruction, turn.parent) for turn in second.turns] == [("six", None)]
    text = "one [steps 4]\ntwo\nfrom 1: three\nredo 3 [seed 9] [guidance 2.5]\nfrom 0: five"
    starts = made.eval(
        "async (text) => (await import('/extensions/flux-kontext/js/sessions.js')).startsOf(text)", text
    )
    assert starts == [0 if turn.parent is None else turn.parent + 1 for turn in parse_turns(text).turns]


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_the_panel_speaks_the_languages_of_the_host(made, host, language):
    """The words come from locales/<language>/main.json; none is left in English."""
    words = json.loads((dev.ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["kontext"]
    made.open(host.server.url, **{"Comfy.Locale": language})
    try:
        made.graph()
        made.page.wait_for_selector(".kontext-chip")
        said = made.page.locator(".kontext-panel .kontext-wide").first.inner_text()
        assert said.strip() == words["run"]

        def filled(key: str, **values) -> str:
            return re.sub(r"\{(\w+)\}", lambda blank: str(values[blank[1]]), words[key])

        made.graph(fit="crop", width=256, height=512)
        made.page.wait_for_selector(".kontext-chip")
        size = made.page.locator(".kontext-chip", has_text="256 × 512")
        size.wait_for()
        fitted = filled("said_fitted", source="421x301", target="256x512", policy="crop")
        sides = "{}, {}".format(filled("said_left", count=135), filled("said_right", count=135))
        cropped = filled("said_cropped", sides=sides, percent="64.1")
        assert size.get_attribute("title") == f"{fitted}; {cropped}; {filled('said_aspect', percent='-0.3')}"
        node = made.eval("String(window.edit.id)")
        made.say(
            "kontext.lines", node=node, lines=["1. no face found", "100 + 64 reference tokens", "as it is"]
        )
        lines = made.page.locator(".kontext-panel [role=status] .kontext-note")
        lines.first.wait_for()
        assert lines.all_text_contents() == [
            f"1. {words['said_no_face']}", filled("said_reference_tokens", counts="100 + 64"), "as it is",
        ]  # fmt: skip
        made.eval("""() => {
            const model = app.graph.nodes.find((node) => node.type === "KontextLoadModel");
            model.widgets.find((one) => one.name === "model").value = "gone.safetensors";
        }""")
        missing = filled("said_not_listed", name="'gone.safetensors'", folder="diffusion_models")
        made.page.locator(".kontext-notes", has_text=missing).first.wait_for()
        wrong = "a.sft: a FLUX autoencoder (VAE), where a FLUX transformer is needed."
        made.say("execution_error", node_id=node, node_type="KontextEdit", exception_message=wrong)
        kinds = {"parts": words["said_autoencoder"], "wanted": words["said_transformer"]}
        made.page.locator(
            ".kontext-bad", has_text=filled("said_wrong_kind", file="a.sft", **kinds)
        ).first.wait_for()
        made.clear_messages()
        settings = json.loads((dev.ROOT / "locales" / language / "settings.json").read_text(encoding="utf-8"))
        assert settings["kontext_turns_keep"] == {"name": words["keep"], "tooltip": words["keep_help"]}
        served = made.page.request.get(f"{host.server.url}/i18n").json()[language]
        assert served["settings"]["kontext_turns_keep"]["name"] == words["keep"]
        assert (
            made.page.locator(".kontext-panel .kontext-view").first.get_attribute("aria-label")
            == words["view"]
        )
    finally:
        made.open(host.server.url)


def test_the_console_stays_clean(made):
    assert made.errors == []

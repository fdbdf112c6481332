"""Masks painted in the node, trouble in words, a training's curve, kept pictures, themes, labels, and fifty nodes."""

from __future__ import annotations

import random
import re

import pytest
import torch
from safetensors.torch import save_file

EVIL = "<img src=x onerror=window.pwned=1>"
FRAMES = 60
ROUNDS = 8  # of measuring frames, at most: what a machine does beside it only adds
PANELS = "import('/extensions/flux-kontext/js/panel.js')"


@pytest.fixture(scope="module")
def painted(tab):
    """The tab after a mask was painted over the picture of Kontext Edit by mouse and keyboard, and a run with it."""
    tab.graph(prompt="Make the disc red", steps=3, seed=random.randrange(1 << 30))
    tab.page.wait_for_selector(".kontext-stage [aria-label^='Paint over']")
    tab.page.wait_for_timeout(500)
    tab.page.locator(".kontext-stage [aria-label^='Paint over']").first.click()
    box = tab.page.locator(".kontext-painting").first.bounding_box()
    mouse, press = tab.page.mouse, tab.page.keyboard.press
    mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
    mouse.down()
    mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * 0.5, steps=8)
    mouse.up()
    strokes = [tab.eval(COVERED)]
    for key in ("]", "]", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp", " "):
        press(key)
    strokes.append(tab.eval(COVERED))
    press("z")
    strokes.append(tab.eval(COVERED))
    tab.shot("mask")
    press("Enter")
    tab.page.wait_for_function("app.graph.nodes.some((node) => node.type === 'LoadImageMask')")
    tab.page.wait_for_timeout(1200)  # the graph is looked at twice a second
    tab.strokes, tab.outlined = strokes, tab.page.locator(".kontext-border:visible").count()
    assert tab.run() == "execution_success"
    tab.page.wait_for_function("document.querySelectorAll('.kontext-handle').length > 1")
    tab.shot("masked")
    return tab


COVERED = """() => {
  const canvas = document.querySelector(".kontext-paint");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 3; i < pixels.length; i += 4) count += pixels[i] > 127;
  return count / (canvas.width * canvas.height);
}"""


def test_a_mask_is_painted_by_mouse_and_keyboard_and_undone(painted):
    stroke, dab, undone = painted.strokes
    assert 0.01 < stroke < 0.3
    assert dab > stroke
    assert undone == stroke


def test_the_painted_mask_reaches_kontext_preserve_and_is_outlined(painted):
    assert painted.outlined > 0
    kinds = painted.eval("""() => {
        const preserve = app.graph.nodes.find((node) => node.type === "KontextPreserve");
        const from = (name) => {
          const link = preserve.inputs.find((input) => input.name === name).link;
          return app.graph.getNodeById((app.graph.links.get?.(link) ?? app.graph.links[link]).origin_id).type;
        };
        return ["original", "edited", "mask"].map(from);
    }""")
    assert kinds == ["LoadImage", "KontextEdit", "LoadImageMask"]


def test_a_mask_is_a_file_by_what_is_in_it(painted, host):
    """Used again as it is, it is no further file; with another stroke it is one, and the first is left alone."""
    load = "app.graph.nodes.find((node) => node.type === 'LoadImageMask')"
    masks = f"{load}.widgets.find((one) => one.name === 'image').value"
    folder = host.server.base / "input"
    first, before = painted.eval(masks), {path: path.read_bytes() for path in folder.glob("kontext-*.png")}
    assert re.fullmatch(r"kontext-[0-9a-f]{32}\.png", first) and folder / first in before

    def use(key: str | None) -> str:
        stage = painted.page.locator(".kontext-panel", has=painted.page.locator("[aria-haspopup=dialog]"))
        stage.locator("[aria-label^='Paint over']").click()
        painted.page.wait_for_selector(".kontext-painting")
        for one in [key] if key else []:
            painted.page.keyboard.press(one)
        painted.page.keyboard.press("Enter")
        painted.page.wait_for_selector(".kontext-painting", state="detached")
        return painted.eval(masks)

    assert use(None) == first
    assert {path: path.read_bytes() for path in folder.glob("kontext-*.png")} == before
    second = use(" ")
    assert second != first and (folder / second).is_file()
    assert {path: path.read_bytes() for path in before} == before
    painted.eval(f"""(name) => {{
        {masks.removesuffix(".value")}.value = name;
    }}""", first)  # fmt: skip


def test_what_was_not_painted_is_the_originals(painted):
    """Read back in the page: the two pictures of Preserve differ only near the mask."""
    share = painted.eval("""async () => {
        const { kontext: [entry] } = Object.entries(app.nodeOutputs).find(([id]) =>
          app.graph.getNodeById(Number(id))?.type === "KontextPreserve"
          || app.graph.getNodeById(id)?.type === "KontextPreserve")[1];
        const read = async (ref) => {
          const image = new Image();
          image.src = window.comfyAPI.api.api.apiURL(`/view?${new URLSearchParams(ref)}`);
          await image.decode();
          const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          return context.getImageData(0, 0, image.width, image.height).data;
        };
        const [before, after, mask] = await Promise.all([entry.before, entry.after, entry.mask].map(read));
        let outside = 0, inside = 0;
        for (let i = 0; i < before.length; i += 4) {
          const differs = [0, 1, 2].some((c) => before[i + c] !== after[i + c]);
          if (differs && mask[i] === 0) outside++;
          if (differs && mask[i] > 0) inside++;
        }
        return [outside, inside];
    }""")
    assert share[0] == 0
    assert share[1] > 0


def test_full_pictures_of_turns_survive_a_restart(painted, host):
    """The host empties its temporary folder when it starts; the copies in the user data are shown then."""
    names = "async () => (await window.comfyAPI.api.api.listUserDataFullInfo('.')).map((file) => file.path)"
    painted.page.wait_for_function(
        f"async () => (await ({names})()).filter((path) => path.startsWith('kontext/pictures/')).length >= 2"
    )
    gone = [path for path in host.server.base.glob("**/temp/**/kontext_*.png")]
    assert gone
    for path in gone:
        path.unlink()
    size = painted.eval("""async () => {
        const { TurnStore } = await import("/extensions/flux-kontext/js/turns_store.js");
        const store = new TurnStore();
        await store.load();
        const url = await store.address(store.turns.at(-1).after);
        const image = new Image();
        image.src = url;
        await image.decode();
        return [image.naturalWidth, image.naturalHeight, url.startsWith("blob:")];
    }""")
    assert size == [421, 301, True]


def test_a_lora_that_matches_nothing_is_said_on_its_node(painted, host):
    name = "lora_unet_down_blocks_{}_attn.lora_{}.weight"
    weights = {name.format(i, side): torch.zeros(4, 4) for i in (0, 1) for side in ("down", "up")}
    save_file(weights, host.put_model("loras", "for_another_model.safetensors"))
    painted.eval("""() => {
        const node = LiteGraph.createNode("KontextLoadLora");
        const edit = app.graph.nodes.find((one) => one.type === "KontextEdit");
        const model = app.graph.nodes.find((one) => one.type === "KontextLoadModel");
        node.pos = [20, -260];
        app.graph.add(node);
        node.widgets.find((one) => one.name === "lora").value = "for_another_model.safetensors";
        model.connect(0, node, 0);
        node.connect(0, edit, edit.inputs.findIndex((input) => input.name === "model"));
    }""")
    assert painted.run() == "execution_error"
    mark = painted.page.locator(".kontext-bad:visible").first
    mark.wait_for()
    assert "for_another_model" in mark.inner_text()
    assert "for_another_model" in painted.toast("for_another_model").inner_text()
    painted.clear_messages()


def test_script_in_file_names_stays_text(tab, host):
    name = f"{EVIL}.png"
    (host.server.base / "input" / name).write_bytes((host.server.base / "input" / "scene.png").read_bytes())
    tab.graph(prompt=EVIL, image=name)
    tab.eval("""async (name) => {
        const model = app.graph.nodes.find((node) => node.type === "KontextLoadModel");
        model.widgets.find((widget) => widget.name === "model").value = name;
        await app.loadGraphData(app.graph.serialize());
    }""", f"{EVIL}.safetensors")  # fmt: skip
    mark = tab.page.locator(".kontext-bad:visible").first
    assert EVIL in mark.inner_text()
    tab.page.wait_for_timeout(1200)
    assert tab.eval("window.pwned") is None
    tab.clear_messages()


def test_a_training_shows_its_loss_and_samples(tab):
    tab.eval("""async () => {
        app.graph.clear();
        const node = LiteGraph.createNode("KontextTrainLora"), api = window.comfyAPI.api.api;
        node.pos = [300, 40];
        app.graph.add(node);
        await app.loadGraphData(app.graph.serialize());
        const shown = app.graph.nodes[0];
        app.canvas.ds.scale = 0.9; app.canvas.ds.offset = [100, 80]; app.canvas.setDirty(true, true);
        const node_id = {node: String(shown.id), prompt_id: `of:${app.graph.id}`};
        await new Promise((resolve) => setTimeout(resolve, 1200));  // the graph is looked at twice a second
        const say = (detail) => api.dispatchEvent(
          new CustomEvent("kontext.training", {detail: {...node_id, ...detail}}));
        for (let step = 1; step <= 600; step++) {
          const loss = 0.2 + 0.8 * Math.exp(-step / 120) + 0.1 * Math.sin(step * 12.9898) ** 2;
          const sample = step % 150 ? null : {filename: "scene.png", subfolder: "", type: "input", step};
          say({step, steps: 1000, loss, seconds: step * 0.5, sample: sample && {...sample, filename: `scene.png`}});
        }
        say({step: 600, steps: 1000, loss: null, seconds: 300,
          sample: {filename: "toy_meadow.png", subfolder: "", type: "input"}});
        await new Promise((resolve) => setTimeout(resolve, 600));
    }""")
    view = tab.page.locator(".kontext-training:visible").first
    assert (
        "600" in view.locator(".kontext-facts").inner_text()
        and "loss" in view.locator(".kontext-facts").inner_text()
    )
    drawn = view.locator(".kontext-loss").get_attribute("d")
    assert 100 < drawn.count("L") <= 300
    assert view.locator(".kontext-sample").count() == 2
    tab.shot("training")
    view.locator(".kontext-sample").last.press("Enter")
    assert tab.page.locator(".kontext-dialog").count() == 1
    tab.page.keyboard.press("Escape")
    assert tab.page.locator(".kontext-dialog").count() == 0


CONTRAST = """() => {
  const parse = (color) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(".kontext-panel .kontext-chip, .kontext-panel .kontext-wide")].map((one) => {
    const style = getComputedStyle(one);
    const [a, b] = [light(parse(style.color)), light(parse(style.backgroundColor))].sort((x, y) => y - x);
    return [one.textContent, Math.round((100 * (a + 0.05)) / (b + 0.05)) / 100];
  });
}"""


@pytest.mark.parametrize("palette", ["dark", "light", "mine"])
def test_words_can_be_read_in_every_theme(tab, palette):
    """WCAG asks a contrast of 3 for large and 4.5 for small text; the hosts's own quiet text has about 4."""
    tab.graph(fit="crop")
    tab.eval("""async (palette) => {
        const setting = app.extensionManager.setting;
        await setting.set("Comfy.ColorPalette", palette);
        await new Promise((resolve) => setTimeout(resolve, 800));
    }""", palette)  # fmt: skip
    tab.page.wait_for_selector(".kontext-chip")
    found = tab.eval(CONTRAST)
    tab.shot(f"theme_{palette}")
    tab.eval("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    assert found and [words for words, contrast in found if contrast < 3.5] == []


def test_nothing_moves_where_less_motion_is_wished(tab):
    tab.graph()
    tab.page.wait_for_selector(".kontext-done", state="attached")
    moving = "getComputedStyle(document.querySelector('.kontext-done')).transitionDuration"
    assert tab.eval(moving) == "0.2s"
    tab.page.emulate_media(reduced_motion="reduce")
    assert tab.eval(moving) == "0s"
    tab.page.emulate_media(reduced_motion="no-preference")


def test_everything_that_can_be_used_has_a_name(tab):
    tab.graph()
    tab.page.wait_for_selector(".kontext-panel .kontext-view")
    found, nameless = tab.eval("""() => {
        const all = [...document.querySelectorAll(
          ".kontext-panel button, .kontext-panel [role], .kontext-panel input, .kontext-panel img")];
        const free = ["group", "status", "alert", "listitem"];
        const named = (one) => one.getAttribute("aria-label") || one.getAttribute("alt") || one.textContent.trim();
        return [all.length, all.filter((one) => !free.includes(one.getAttribute("role")) && !named(one))
          .map((one) => one.outerHTML.slice(0, 120))];
    }""")
    assert found > 10 and nameless == []


def test_the_host_reads_no_style_of_our_panels_in_a_frame(tab):
    """It would have the page laid out anew for each; it looks where a widget does not say its height."""
    tab.graph()
    tab.page.wait_for_selector(".kontext-panel .kontext-view")
    tab.eval("() => { app.graph.add(LiteGraph.createNode('KontextPrompt')); }")
    tab.page.wait_for_timeout(1500)
    read = tab.eval("""async () => {
        const asked = window.getComputedStyle;
        let read = 0;
        window.getComputedStyle = (element, ...rest) => {
          const style = asked.call(window, element, ...rest);
          if (!element.closest?.(".kontext-panel")) return style;
          return new Proxy(style, {get: (target, name) => {
            read += 1;
            const found = target[name];
            return typeof found === "function" ? found.bind(target) : found;
          }});
        };
        for (let i = 0; i < 20; i++) {
          app.canvas.ds.offset[0] += i % 2 ? 3 : -3;
          app.canvas.setDirty(true, true);
          await new Promise(requestAnimationFrame);
        }
        window.getComputedStyle = asked;
        return read;
    }""")
    assert read == 0


def test_fifty_nodes_stay_fluent_and_leave_nothing(tab):
    """Frame time by the page's clock; work in it, listeners, elements and memory by the browser's profiler."""
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Performance.enable")

    def measure() -> dict[str, float]:
        session.send("HeapProfiler.collectGarbage")
        return {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}

    def build(kinds: list[str]) -> None:
        tab.eval(
            """async (kinds) => {
            app.graph.clear();
            for (let i = 0; i < 50; i++) {
              const node = LiteGraph.createNode(kinds[i % kinds.length]);
              node.pos = [(i % 10) * 420, Math.floor(i / 10) * 900];
              app.graph.add(node);
            }
            app.canvas.ds.scale = 0.25; app.canvas.ds.offset = [50, 50];
            const scene = {filename: "scene.png", subfolder: "", type: "input"};
            for (const panel of (await PANELS).allPanels()) {
              if (panel.node.type === "KontextEdit") {  // ten with two pictures each
                panel.setResults([{before: scene, after: scene, size: [421, 301], seconds: 1}]);
              }
            }
            await new Promise((resolve) => setTimeout(resolve, 1500));
        }""".replace("PANELS", PANELS),
            kinds,
        )

    def drawn() -> tuple[float, dict[str, float]]:
        """Median milliseconds of a frame while the graph is moved, and the profiler's own for each frame."""
        start = measure()
        median = tab.eval(frames)
        end = measure()
        work = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration", "TaskDuration")
        return median, {name: 1000 * (end[name] - start[name]) / FRAMES for name in work}

    ours = ["KontextEdit", "KontextPreserve", "KontextPrompt", "KontextTurns", "KontextLoadModel"]
    frames = """async () => {
        const gaps = []; let last = await new Promise(requestAnimationFrame);
        for (let i = 0; i < FRAMES; i++) {
          app.canvas.ds.offset[0] += i % 2 ? 3 : -3; app.canvas.setDirty(true, true);
          const now = await new Promise(requestAnimationFrame); gaps.push(now - last); last = now;
        }
        return gaps.sort((a, b) => a - b)[FRAMES / 2];
    }""".replace("FRAMES", str(FRAMES))
    clear = "async () => { app.graph.clear(); await new Promise((resolve) => setTimeout(resolve, 1500)); }"
    build(ours)
    tab.eval(clear)  # what the host makes once is there now
    theirs = []
    for number in range(2):
        build(["KSampler", "CLIPTextEncode", "LoadImage", "CLIPTextEncode", "CLIPTextEncode"])
        theirs.append(drawn())
        if number == 0:
            at_rest = measure()
        tab.eval(clear)
    before = measure()
    hosts, hosts_work = min(theirs, key=lambda one: one[0])
    # Three frames of a screen at 60 Hz, or two and a half of the host's own: twice as many fields and twenty pictures
    # are drawn, without a GPU.
    enough = max(51, 2.5 * hosts)
    # Nodes 2.0 of 1.32.9 keeps every node that was ever drawn, the host's own too: then totals say nothing of ours.
    host_keeps_its_own = before["JSEventListeners"] - at_rest["JSEventListeners"] > 80
    rounds = []
    while len(rounds) < 2 or (len(rounds) < ROUNDS and min(rounds, key=lambda one: one[0])[0] >= enough):
        build(ours)
        rounds.append(drawn())
        pictures = tab.eval("document.querySelectorAll('.kontext-panel .kontext-picture:not(canvas)').length")
        assert pictures == 20
        assert tab.eval(f"async () => (await {PANELS}).allPanels().length") == 40
        tab.eval(clear)
    after = measure()
    assert tab.eval(f"async () => (await {PANELS}).allPanels().length") == 0
    full, work = min(rounds, key=lambda one: one[0])
    for whose, frame, parts in (("the host's", hosts, hosts_work), ("ours", full, work)):
        said = ", ".join(f"{name.removesuffix('Duration')} {value:.1f}" for name, value in parts.items())
        print(f"\nfifty nodes, {whose}: {frame:.0f} ms a frame; of the profiler, ms a frame: {said}")
    print("\n"
          + ", ".join(f"{name} {before[name]:.0f} -> {after[name]:.0f}"
                      for name in ("JSEventListeners", "Nodes", "JSHeapUsedSize")))  # fmt: skip
    assert full < enough
    if host_keeps_its_own:
        return
    # Eighty panels or more came and went: what is left is less than one listener or five elements for each.
    assert after["JSEventListeners"] - before["JSEventListeners"] < 80
    assert after["Nodes"] - before["Nodes"] < 400
    assert after["JSHeapUsedSize"] - before["JSHeapUsedSize"] < 12e6


def test_the_console_stays_clean(tab):
    assert tab.errors == []

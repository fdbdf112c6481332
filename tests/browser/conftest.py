"""A real Chromium on a real ComfyUI: one browser for the session, a fresh page with an empty graph for each test.

The server is the one of tests/host, once with the packaged front end and once (slow) with the current one;
KONTEXT_FRONT_END names the folder of a third one to use alone. Every module that takes `tab` runs in classic rendering
and in Nodes 2.0.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import dev

ROOT = Path(__file__).resolve().parents[2]


def _load_host_fixtures():
    path = ROOT / "tests" / "host" / "conftest.py"
    spec = importlib.util.spec_from_file_location("kontext_host_fixtures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fixtures = _load_host_fixtures()
comfyui, tiny, inside = fixtures.comfyui, fixtures.tiny, fixtures.inside

# What the host logs by itself, without the pack: files that a fresh installation does not have yet.
# The current front end asks an older server for /api/jobs and says at length that it is not there.
HOSTS_OWN = (
    "404 (Not Found)",  # unless the address is one of ours
    "net::ERR_",
    "Content Security Policy",
    "JobsApiError",
    "no longer in the document",
)

# A node that passes a picture on once the file "released" lies in the input folder: a run that waits, for the tests of
# what happens meanwhile.
HOLD = """
import pathlib, time
import comfy.model_management, folder_paths

class Hold:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "tests"

    @classmethod
    def IS_CHANGED(cls, image):
        return float("nan")

    def run(self, image):
        while not (pathlib.Path(folder_paths.get_input_directory()) / "released").exists():
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.05)
        return (image,)

NODE_CLASS_MAPPINGS = {"HoldForTests": Hold}
"""

SHOTS_OF_NODES_2 = ("masked", "running")

OTHER_FRONT_END = os.environ.get("KONTEXT_FRONT_END")
FRONT_ENDS = ["other"] if OTHER_FRONT_END else ["packaged", pytest.param("current", marks=pytest.mark.slow)]


@pytest.fixture(scope="session", params=FRONT_ENDS)
def host(request, comfyui, tmp_path_factory):
    """The server, with the front end that is asked for."""
    folders = {"packaged": lambda: None, "other": lambda: OTHER_FRONT_END}
    folders["current"] = lambda: dev.current_front_end(Path(sys.executable))
    front_end = folders[request.param]()
    arguments = ["--front-end-root", str(front_end)] if front_end else []
    base = tmp_path_factory.mktemp("browser")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "hold_for_tests.py").write_text(HOLD)
    with dev.ComfyServer(*comfyui, base, arguments) as server:
        host = fixtures.Host(server)
        scene().save(base / "input" / "scene.png")
        fixtures.put_face_network(host)
        fixtures.put_vision_network(host)
        yield host
        host.client.close()


def scene() -> Image.Image:
    """A picture with a disc, a sign and a word, of an odd size."""
    image = Image.linear_gradient("L").resize((421, 301)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 80, 200, 220), fill=(240, 200, 60))
    draw.rectangle((260, 60, 360, 200), fill=(200, 60, 70))
    draw.text((290, 120), "OPEN", fill="white")
    return image


@pytest.fixture(scope="session")
def chromium():
    """The browser; the tests are left out where there is none, except under CI."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        if os.environ.get("CI"):
            pytest.fail("there is no chromium, and CI is set: install Debian's package chromium")
        pytest.skip("there is no chromium on this machine")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        yield browser
        browser.close()


# A theme of a user's own, dark green on light green.
MINE = {
    "node_slot": {},
    "litegraph_base": {},
    "comfy_base": {
        "input-text": "#0a2a12",
        "comfy-input-bg": "#d8f5dd",
        "comfy-menu-bg": "#b4e3bd",
        "descrip-text": "#2f5a38",
        "border-color": "#5a9a68",
    },
}
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingNodesWarning": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,  # its dialog would cover the page
    "Comfy.VueNodes.AutoScaleLayout": False,
    "Comfy.Locale": "en",
    "Comfy.CustomColorPalettes": {"mine": {"id": "mine", "name": "Mine", "colors": MINE}},
    "Comfy.Minimap.Visible": False,
}


class Page:
    """A tab with ComfyUI in it, and the few things that tests do with it."""

    def __init__(self, page, tiny: dict[str, str], rendering: str = "classic"):
        self.page, self.tiny, self.rendering, self.errors = page, tiny, rendering, []
        page.set_default_timeout(120_000)  # a machine may be busy
        page.on("console", self._collect)
        page.on("pageerror", lambda error: self.errors.append(error.stack or str(error)))
        page.route("**/kontext/whose", self._whose)

    def _collect(self, message) -> None:
        if message.type != "error":
            return
        url = message.location.get("url", "")
        missing = message.text.startswith("Failed to load resource")
        asked_by_us = missing and any(part in url for part in ("kontext", "blob:"))
        if asked_by_us or not any(own in message.text for own in HOSTS_OWN):
            self.errors.append(f"{message.text} {url}")

    @staticmethod
    def _whose(route) -> None:
        """The server's answer, and one for the runs that tests make up: "of:<id of the workflow>"."""
        prompt = route.request.post_data_json["prompt"]
        if prompt.startswith("of:"):
            route.fulfill(json={"mine": True, "workflow": prompt.removeprefix("of:")})
        else:
            route.continue_()

    def say(self, event: str, **detail) -> None:
        """A message of the host's, as of a run of the open graph."""
        self.eval(
            """([event, detail]) => window.comfyAPI.api.api.dispatchEvent(
                new CustomEvent(event, {detail: {...detail, prompt_id: `of:${app.graph.id}`}}))""",
            [event, detail],
        )

    def toast(self, text: str):
        """The host's message that says this, once it is there; front ends 1.32 and 1.58 name them differently."""
        shown = self.page.locator(".p-toast-message, [data-testid=toast]", has_text=text).first
        shown.wait_for(timeout=15_000)
        return shown

    def open(self, url: str, **settings) -> Page:
        values = {**SETTINGS, "Comfy.VueNodes.Enabled": self.rendering == "nodes2", **settings}
        for name, value in values.items():
            self.page.request.post(f"{url}/api/settings/{name}", data=json.dumps(value))
        self.page.goto(url, timeout=180_000, wait_until="domcontentloaded")
        self.page.wait_for_function(
            "window.comfyAPI?.app?.app?.extensionManager && window.app?.graph", timeout=180_000
        )
        ours = "window.comfyAPI.app.app.extensions.some((one) => one.name === 'kontext.view')"
        self.page.wait_for_function(ours, timeout=60_000)
        self.page.wait_for_selector("link[data-kontext]", state="attached", timeout=60_000)
        self.page.wait_for_timeout(600)
        self.errors = [
            error for error in self.errors if "kontext" in error
        ]  # the host's own, before any node
        return self

    def eval(self, script: str, argument=None):
        return self.page.evaluate(script, argument)

    def graph(
        self, prompt: str = "Make the sky red", steps: int = 3, image: str = "scene.png", **values
    ) -> None:
        """An empty graph with loaders, Load Image, Kontext Edit and Preview Image."""
        self.eval(
            BUILD, {"tiny": self.tiny, "prompt": prompt, "steps": steps, "image": image, "values": values}
        )

    def shot(self, name: str, wait: int = 700) -> None:
        """Keep a picture for the docs, when KONTEXT_WRITE_SCREENSHOTS is set: of classic rendering, a few of Nodes 2.0.

        Args:
            wait: milliseconds for what moves to come to rest.
        """
        if not os.environ.get("KONTEXT_WRITE_SCREENSHOTS"):
            return
        if self.rendering != "classic":
            if name not in SHOTS_OF_NODES_2:
                return
            name = f"{name}_nodes2"
        self.page.wait_for_timeout(wait)
        self.page.screenshot(path=ROOT / "docs" / "images" / f"browser_{name}.png")

    def clear_messages(self) -> None:
        """Close the host's dialog of a failed run, and its toasts."""
        self.page.wait_for_timeout(500)
        self.page.keyboard.press("Escape")
        closing = ".p-toast-close-button, [data-testid=toast-close], .p-dialog-close-button"
        self.eval("(all) => document.querySelectorAll(all).forEach((one) => one.click())", closing)
        self.page.wait_for_timeout(500)

    def run(self) -> str:
        """Queue the graph and wait until it is done: "execution_success" or "execution_error"."""
        self.start()
        return self.eval("() => window.running")

    def start(self) -> None:
        """Queue the graph and go on."""
        self.eval(f"() => {{ window.running = ({RUN})(); }}")


BUILD = """async ({tiny, prompt, steps, image, values}) => {
  const app = window.app, make = (type, x, y) => {
    const node = LiteGraph.createNode(type); node.pos = [x, y]; app.graph.add(node); return node;
  };
  app.graph.clear();
  app.graph.id = crypto.randomUUID();  // front end 1.49 gives new nodes the values that the graph's id had before
  const set = (node, name, value) => { node.widgets.find((w) => w.name === name).value = value; };
  const model = make("KontextLoadModel", 20, 60), clip = make("KontextLoadTextEncoders", 20, 200),
        vae = make("KontextLoadVAE", 20, 340), load = make("LoadImage", 20, 450),
        edit = make("KontextEdit", 420, 60), show = make("PreviewImage", 1000, 60);
  set(model, "model", tiny.diffusion_models); set(clip, "t5", tiny.t5); set(clip, "clip", tiny.clip);
  set(vae, "vae", tiny.vae); set(load, "image", image); set(edit, "prompt", prompt); set(edit, "steps", steps);
  for (const [name, value] of Object.entries(values)) set(edit, name, value);
  const to = (from, slot, node, name) => from.connect(slot, node, node.inputs.findIndex((i) => i.name === name));
  to(model, 0, edit, "model"); to(clip, 0, edit, "clip"); to(vae, 0, edit, "vae"); to(load, 0, edit, "image");
  edit.connect(0, show, 0);
  await app.loadGraphData(app.graph.serialize());  // as a workflow is opened: Nodes 2.0 wants it so
  window.edit = app.graph.nodes.find((node) => node.type === "KontextEdit");
  window.load = app.graph.nodes.find((node) => node.type === "LoadImage");
  app.canvas.ds.scale = 0.8; app.canvas.ds.offset = [70, 90]; app.canvas.setDirty(true, true);
}"""

RUN = """() => new Promise((resolve, reject) => {
  const api = window.comfyAPI.api.api, names = ["execution_success", "execution_error"];
  const end = (event) => { names.forEach((name) => api.removeEventListener(name, end)); resolve(event.type); };
  names.forEach((name) => api.addEventListener(name, end));
  window.app.queuePrompt(0, 1).catch(reject);
})"""


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def tab(request, chromium, host):
    """One tab for a module: opening the front end takes seconds. Its graphs take the bundled model."""
    tiny = dict.fromkeys(("diffusion_models", "t5", "clip", "vae"), "kontext-tiny (bundled)")
    context = chromium.new_context(viewport={"width": 1500, "height": 1050})
    context.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
    tab = Page(context.new_page(), tiny, request.param).open(host.server.url)
    yield tab
    context.close()

"""The workflows' thumbnails and the help pages' pictures, made by running every workflow in a real ComfyUI.

    python dev.py pictures                       everything: workflows/*.jpg and web/docs/images/*.jpg
    python dev.py pictures local_edit turns      these workflows' thumbnails and their nodes' pictures
    python dev.py pictures --thumbnails          no browser needed
    python dev.py pictures --nodes               the nodes as they come, nothing is run: a minute

A workflow is run through the API; its result, with what went in as insets, becomes workflows/<name>.jpg. With
chromium and playwright the same graph is then opened in the front end, where its nodes show what they made, and each
node of the pack that no earlier workflow had is photographed for its help page. Nodes that stand in no workflow are
photographed as they come.

Run it again whenever the bundled model, a workflow or a node's looks have changed. Those that cannot run yet (few_step
without a distilled model, face_similarity without a face network) are named and left as they are.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # this folder is first on the path then, and would hide Python's own `queue`
    sys.path.pop(0)

import argparse
import io
import json
import math
import shutil
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
HELP = ROOT / "web" / "docs" / "images"
SIDE, INSET, GAP = 512, 120, 6
QUALITY = 88
BUNDLED = "kontext-tiny (bundled)"
# Workflows for files that are not in the repository run on the bundled ones, through this pack's loaders.
TWINS = {
    "UNETLoader": ("KontextLoadModel", {"model": BUNDLED, "weight_dtype": "default"}),
    "DualCLIPLoader": ("KontextLoadTextEncoders", {"t5": BUNDLED, "clip": BUNDLED}),
    "VAELoader": ("KontextLoadVAE", {"vae": BUNDLED}),
}
REAL = ".safetensors"  # the end of a value of ours that names a file which is not in the repository
ALONE = "workflow of its own"

OPEN = """async (graph) => {
  await window.app.loadGraphData(graph);
  window.app.canvas.setDirty(true, true);
}"""
ADD = """(type) => {
  window.app.graph.clear();
  const node = LiteGraph.createNode(type); node.pos = [0, 0]; window.app.graph.add(node);
  node.setSize([Math.max(400, node.size[0]), node.size[1]]);
}"""
RUN = """() => new Promise((resolve, reject) => {
  const api = window.comfyAPI.api.api, names = ["execution_success", "execution_error"];
  const end = (event) => { names.forEach((name) => api.removeEventListener(name, end)); resolve(event.type); };
  names.forEach((name) => api.addEventListener(name, end));
  window.app.queuePrompt(0, 1).catch(reject);
})"""
# Brings a node to the page's middle; where it then is, in pixels of the page.
SHOW = """(type) => {
  const canvas = window.app.canvas, node = window.app.graph.nodes.find((one) => one.type === type), title = 32;
  const scale = Math.min(1.25, (innerHeight - 340) / (node.size[1] + title), (innerWidth - 400) / node.size[0]);
  canvas.ds.scale = scale;
  canvas.ds.offset = [240 / scale - node.pos[0], 260 / scale - node.pos[1]];  // clear of the front end's bars
  canvas.deselectAll?.();
  canvas.setDirty(true, true);
  const box = canvas.canvas.getBoundingClientRect();
  return {x: box.x + 240 - 6, y: box.y + 260 - title * scale - 6,
          width: node.size[0] * scale + 12, height: (node.size[1] + title) * scale + 12};
}"""


def runnable(workflow: dict) -> dict:
    """The workflow with its native loaders as this pack's, and every loader on the bundled model."""
    result = json.loads(json.dumps(workflow))
    for node in result.values():
        if node["class_type"] in TWINS:
            node["class_type"], node["inputs"] = TWINS[node["class_type"]]
        elif node["class_type"].startswith("KontextLoad"):
            node["inputs"] = {
                key: BUNDLED if names_file(value) else value for key, value in node["inputs"].items()
            }
    return result


def names_file(value: object) -> bool:
    return isinstance(value, str) and value.endswith(REAL)


def inputs_of(workflow: dict) -> list[Image.Image]:
    """The pictures that a workflow loads, in the order of its nodes."""
    names = [node["inputs"]["image"] for node in workflow.values() if node["class_type"] == "LoadImage"]
    return [Image.open(WORKFLOWS / "input" / name).convert("RGB") for name in names]


def square(picture: Image.Image, side: int) -> Image.Image:
    """The picture's middle square, enlarged or reduced."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    cut = picture.convert("RGB").crop((left, top, left + edge, top + edge))
    return cut.resize((side, side), Image.Resampling.LANCZOS)


def thumbnail(before: list[Image.Image], after: list[Image.Image]) -> Image.Image:
    """One result with what went in at its lower left; several as a grid that begins with what went in."""
    if len(after) > 1:
        pictures = [*before, *after][:9]
        columns = math.ceil(math.sqrt(len(pictures)))
        side = (SIDE - GAP * (columns - 1)) // columns
        rows = math.ceil(len(pictures) / columns)
        sheet = Image.new("RGB", (SIDE, rows * (side + GAP) - GAP), "white")
        for number, picture in enumerate(pictures):
            sheet.paste(
                square(picture, side), (number % columns * (side + GAP), number // columns * (side + GAP))
            )
        return sheet
    sheet = square(after[0], SIDE)
    for number, picture in enumerate(before):
        x = GAP + number * (INSET + GAP)
        sheet.paste("white", (x, SIDE - INSET - GAP, x + INSET, SIDE - GAP))
        sheet.paste(square(picture, INSET - 6), (x + 3, SIDE - INSET - GAP + 3))
    return sheet


class Photographer:
    """A tab of the front end in which workflows are opened and nodes photographed; a context manager."""

    def __init__(self, url: str) -> None:
        from playwright.sync_api import sync_playwright

        executable = shutil.which("chromium") or shutil.which("chromium-browser")
        if executable is None:
            raise RuntimeError("there is no chromium: install it, or ask for --thumbnails alone")
        self.url, self.playwright = url, sync_playwright().start()
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        self.browser = self.playwright.chromium.launch(executable_path=executable, args=options)
        self.page = self.browser.new_page(viewport={"width": 1400, "height": 1500})
        self.page.set_default_timeout(300_000)

    def __enter__(self) -> Photographer:
        for name in ("Comfy.TutorialCompleted", "Comfy.Graph.CanvasInfo.Disabled"):
            self.page.request.post(f"{self.url}/api/settings/{name}", data="true")
        # the second one is a dialog over the page where a workflow names files that are not in the repository
        for name in ("Comfy.Graph.CanvasMenu", "Comfy.Workflow.ShowMissingModelsWarning"):
            self.page.request.post(f"{self.url}/api/settings/{name}", data="false")
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function("window.comfyAPI?.app?.app?.extensionManager && window.app?.graph")
        self.page.wait_for_timeout(1500)
        return self

    def __exit__(self, *_: object) -> None:
        self.browser.close()
        self.playwright.stop()

    def open(self, workflow: dict, run: bool) -> None:
        self.page.evaluate(OPEN, workflow)
        self.page.wait_for_timeout(500)
        if run and self.page.evaluate(RUN) != "execution_success":
            raise RuntimeError("the workflow failed in the front end")
        self.page.wait_for_timeout(4000)

    def take(self, node: str) -> None:
        """Photograph the node of this class that is in the graph."""
        clip = self.page.evaluate(SHOW, node)
        self.page.wait_for_timeout(700)
        HELP.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(self.page.screenshot(clip=clip))) as picture:
            picture.convert("RGB").save(HELP / f"{node}.jpg", quality=QUALITY)
        print(HELP / f"{node}.jpg", flush=True)

    def alone(self, node: str) -> None:
        self.page.evaluate(ADD, node)
        self.page.wait_for_timeout(700)
        self.take(node)


def homes(names: list[str], known: list[str]) -> dict[str, list[str]]:
    """Workflow -> the nodes that are photographed in it: the first that has them; the rest alone."""
    found: dict[str, list[str]] = {name: [] for name in names}
    left = list(known)
    for name in names:
        nodes = read(name).values()
        types = {node["class_type"] for node in nodes}
        if any(names_file(value) for node in nodes for value in node["inputs"].values()):
            continue  # opened, it would ask for files that are not there
        found[name] = [node for node in left if node in types]
        left = [node for node in left if node not in types]
    return {**found, ALONE: left}


def read(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def make(client, name: str, folder: Path) -> None:
    """Run a workflow and write its thumbnail."""
    workflow = read(name)
    history = client.wait(client.queue(runnable(workflow)))
    files = [path for path in client.save(history, folder) if "_drift" not in path.name]
    after = [Image.open(path) for path in sorted(files)]
    thumbnail(inputs_of(workflow), after).save(WORKFLOWS / f"{name}.jpg", quality=QUALITY, optimize=True)
    print(WORKFLOWS / f"{name}.jpg", flush=True)


def main() -> int:
    everything = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="workflow", help=f"of {', '.join(everything)}; all by default"
    )
    parser.add_argument("--thumbnails", action="store_true", help="leave the help pages as they are")
    parser.add_argument(
        "--nodes", action="store_true", help="only the help pages' pictures, without running anything"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(everything))
    if unknown:
        parser.error(f"there is no workflow {', '.join(unknown)}; there are {', '.join(everything)}")
    sys.path.insert(0, str(ROOT))
    import dev

    queue = dev.load_queue()
    names, problems = args.names or everything, []
    with tempfile.TemporaryDirectory() as base:
        with dev.ComfyServer(*dev.prepare_host(Path(sys.executable)), Path(base)) as server:
            client = queue.Client(server.url)
            known = [node for node in client.get("/object_info") if node.startswith("Kontext")]
            # simple ones first, so that a node is shown where it is easiest to understand
            ordered = sorted(
                names, key=lambda name: (name not in ("local_edit", "mixed_native"), len(read(name)))
            )
            where = homes(ordered, known)
            tab = None if args.thumbnails else Photographer(server.url).__enter__()
            try:
                for name in ordered:
                    run = not args.nodes
                    try:
                        if run:
                            make(client, name, Path(base) / "made" / name)
                    except queue.WorkflowError as error:
                        problems.append(f"{name}: {str(error).splitlines()[0]}")
                        print(problems[-1], file=sys.stderr, flush=True)
                        run = False
                    if tab is not None and where[name]:
                        ui = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
                        tab.open(ui, run)
                        for node in where[name]:
                            tab.take(node)
                if tab is not None and not args.names:
                    for node in where[ALONE]:
                        tab.alone(node)
            finally:
                if tab is not None:
                    tab.__exit__()
                client.close()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

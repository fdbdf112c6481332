"""Every workflow template, and every saved workflow of an earlier version, in the browser: opened, run, painted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kontext_core.weights.locate import BUNDLED

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
SAVED = sorted((ROOT / "tests" / "saved").glob("*/*.json"))
BUNDLED_NAME = "kontext-tiny (bundled)"
HAS_FEW_STEP = any(BUNDLED["kontext-tiny"].glob("*few*.safetensors"))
NATIVE = {
    "UNETLoader": ("KontextLoadModel", ["kontext-tiny (bundled)", "default"]),
    "DualCLIPLoader": ("KontextLoadTextEncoders", ["kontext-tiny (bundled)"] * 2),
    "VAELoader": ("KontextLoadVAE", ["kontext-tiny (bundled)"]),
}

OPEN = """async (workflow) => {
  await app.loadGraphData(workflow);
  await new Promise((resolve) => setTimeout(resolve, 700));
  return app.graph.nodes.map((node) => ({
    type: node.type, known: Boolean(LiteGraph.registered_node_types[node.type]) || node.type === "MarkdownNote",
    bad: Boolean(node.has_errors), values: node.serialize().widgets_values ?? null,
  }));
}"""


@pytest.fixture(scope="module", autouse=True)
def named_files(host):
    """The model files that workflows name are there, empty: the current front end marks a node red that lacks its own.

    Made before the page asks for the lists, gone with the module.
    """
    workflows = [json.loads(path.read_text(encoding="utf-8")) for path in TEMPLATES + SAVED]
    nodes = [node for workflow in workflows for node in workflow["nodes"]]
    named = [model for node in nodes for model in node.get("properties", {}).get("models") or []]
    files = {host.put_model(model["directory"], model["name"]) for model in named}
    made = [file for file in files if not file.exists()]
    for file in made:
        file.touch()
    yield
    for file in made:
        file.unlink()


def workflow_of(path: Path) -> dict:
    """The workflow as it is, but its loaders of files that are not in the repository load the bundled model."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "CLIPVisionLoader":
            node["widgets_values"] = ["random_vision.safetensors"]
        elif node["type"].startswith("KontextLoad"):
            values = node.get("widgets_values", [])
            node["widgets_values"] = [BUNDLED_NAME if str(v).endswith(".safetensors") else v for v in values]
        if node["type"] in NATIVE:
            node["type"], node["widgets_values"] = NATIVE[node["type"]]
            node["properties"] = {"Node name for S&R": node["type"]}
            node["inputs"] = []
    return workflow


@pytest.mark.parametrize("path", TEMPLATES + SAVED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_workflow_opens_unharmed(tab, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    tab.errors.clear()
    nodes = tab.eval(OPEN, workflow)
    assert [node["type"] for node in nodes if not node["known"] or node["bad"]] == []
    assert sorted(node["type"] for node in nodes) == sorted(node["type"] for node in workflow["nodes"])
    ours = [node for node in workflow["nodes"] if node["type"].startswith("Kontext")]
    shown = [node["values"] for node in nodes if node["type"].startswith("Kontext")]
    for node in ours:  # what was saved is there, and what was added since stands behind it
        wanted = node.get("widgets_values") or []
        assert any((values or [])[: len(wanted)] == wanted for values in shown), node["type"]
    assert tab.errors == []


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_run_paints_a_result(tab, path):
    workflow = workflow_of(path)
    if path.stem == "few_step" and not HAS_FEW_STEP:
        pytest.skip("kontext-tiny's distilled transformer is not there")
    tab.errors.clear()
    tab.eval(OPEN, workflow)
    # a training of a name that was trained before would go on where that ended, with nothing left to show
    tab.eval(
        """(seed) => app.graph.nodes.forEach((node) => node.widgets?.forEach((widget) => {
            const trains = node.type === "KontextTrainLora";
            if (["steps", "sample_steps"].includes(widget.name) && widget.value > 2) widget.value = 2;
            if (["seed", "noise_seed"].includes(widget.name)) widget.value = seed;
            if (trains && widget.name === "name") widget.value = `run_${seed}`;
            if (trains && widget.name === "sample_every") widget.value = 1;
        }))""",
        random.randrange(1 << 30),
    )
    assert tab.run() == "execution_success"
    urls = tab.eval("""() => Object.values(app.nodeOutputs).flatMap((output) => output?.images ?? [])
        .map((image) => window.comfyAPI.api.api.apiURL(`/view?${new URLSearchParams(image)}`))""")
    assert urls
    assert all(tab.page.request.get(tab.page.url.rstrip("/").split("#")[0].rstrip("/") + url[url.index("/api") :]).ok
               for url in urls)  # fmt: skip
    viewed = ("KontextEdit", "KontextTurns", "KontextPreserve")
    if any(node["type"] in viewed for node in workflow["nodes"]):
        # the current front end makes a node's view when the node is first looked at
        tab.eval(
            "(types) => app.canvas.centerOnNode(app.graph.nodes.find(({type}) => types.includes(type)))",
            viewed,
        )
        tab.page.wait_for_function("""[...document.querySelectorAll(".kontext-picture")].some(
            (one) => one.alt === "After" && one.naturalWidth > 0)""")
    if any(node["type"] == "KontextTrainLora" for node in workflow["nodes"]):
        tab.page.wait_for_function(
            "document.querySelector('.kontext-loss')?.getAttribute('d')?.startsWith('M')"
        )
        tab.page.wait_for_function("document.querySelector('.kontext-sample img')?.naturalWidth > 0")
    assert tab.eval("app.graph.nodes.filter((node) => node.has_errors).length") == 0
    assert tab.errors == []


def test_every_value_survives_saving_and_opening_again(tab):
    """Each of our nodes, every widget away from its default, through the text of a saved file."""
    before = tab.eval("""() => {
      app.graph.clear();
      let x = 0;
      for (const type of Object.keys(LiteGraph.registered_node_types).filter((name) => name.startsWith("Kontext"))) {
        const node = LiteGraph.createNode(type);
        node.pos = [(x++ % 6) * 420, Math.floor(x / 6) * 700];
        app.graph.add(node);
        for (const widget of node.widgets ?? []) {
          if (widget.serialize === false || widget.type === "button") continue;
          const values = widget.options?.values;
          if (Array.isArray(values)) widget.value = values.at(-1) ?? widget.value;
          else if (typeof widget.value === "boolean") widget.value = !widget.value;
          else if (typeof widget.value === "number") widget.value = Math.min(widget.options.max ?? 7, widget.value + 3);
          else if (typeof widget.value === "string") widget.value = `${widget.name} "quoted" <b>bold</b> 漢字`;
        }
      }
      window.saved = JSON.stringify(app.graph.serialize());
      return app.graph.nodes.map((node) => [node.type, node.serialize().widgets_values ?? []]);
    }""")
    after = tab.eval("""async () => {
      await app.loadGraphData(JSON.parse(window.saved));
      return app.graph.nodes.map((node) => [node.type, node.serialize().widgets_values ?? []]);
    }""")
    assert len(before) > 15
    assert sorted(map(json.dumps, after)) == sorted(map(json.dumps, before))

"""Files that a workflow names and that are not there: the front end offers them, and asks for nothing otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
FILES = {
    "flux1-dev-kontext_fp8_scaled.safetensors",
    "t5xxl_fp16.safetensors",
    "clip_l.safetensors",
    "ae.safetensors",
}
# Opens a workflow on an empty page and waits for what the front end has to say of its files: a dialog in 1.32, a panel
# with an entry a file in 1.58. What stands on a node in Nodes 2.0, such as a loader's file, is no offer.
OFFERED = """async ({workflow, files, wait}) => {
  await app.extensionManager.setting.set("Comfy.Workflow.ShowMissingModelsWarning", true);
  await app.loadGraphData(workflow);
  const until = Date.now() + wait;
  for (;;) {
    // 1.58 may only count them until it is asked
    [...document.querySelectorAll("button")].find((one) => one.textContent.trim() === "View details")?.click();
    const said = [...document.body.querySelectorAll("*")].filter((one) => !one.closest("[data-node-id]"));
    const text = said.filter((one) => !one.children.length).map((one) => one.textContent).join(" ");
    const found = files.filter((name) => text.includes(name) || text.includes(name.replace(".safetensors", "")));
    if (found.length === files.length || Date.now() > until) return found;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}"""


@pytest.fixture
def offered(tab, host):
    def run(name: str, wait: int) -> set[str]:
        workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        for node in workflow["nodes"]:  # the note of a template may name files
            if node["type"] == "MarkdownNote":
                node["widgets_values"] = [""]
        return set(tab.eval(OFFERED, {"workflow": workflow, "files": sorted(FILES), "wait": wait}))

    yield run
    # A front end opens what was open last: without it, and with the warning off again.
    tab.eval("() => { sessionStorage.clear(); localStorage.clear(); }")
    tab.page.goto("about:blank")
    tab.open(host.server.url)


def test_a_workflow_on_the_bundled_model_asks_for_nothing(offered):
    assert offered("local_edit", 3_000) == set()


@pytest.mark.parametrize("name", ["local_edit_flux", "mixed_native_loader"])
def test_a_workflow_of_real_files_has_them_offered(offered, name):
    assert offered(name, 30_000) == FILES

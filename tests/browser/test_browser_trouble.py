"""Trouble in words on the node that it is of, and on the subgraph nodes around it: files that are missing or of the
wrong kind, and what fails in a run."""

from __future__ import annotations

import random

from kontext_core.weights.locate import BUNDLED

PANELS = "import('/extensions/flux-kontext/js/panel.js')"


def mark(tab, node: str):
    """The red mark on the node of an expression, as text; "" where there is none."""
    return tab.eval(f"""async () => {{
        const found = (await {PANELS}).panelOf({node});
        return found && !found.mark.hidden ? found.mark.textContent : "";
    }}""")


FIRST = "app.graph.nodes.find((node) => node.type === '{}')"


def test_a_missing_file_is_said_and_the_mark_goes_when_another_is_chosen(tab):
    tab.graph()
    tab.eval("""async () => {
        const set = (type, name, value) => {
          app.graph.nodes.find((node) => node.type === type).widgets.find((one) => one.name === name).value = value;
        };
        const trainer = LiteGraph.createNode("KontextTrainLora");
        trainer.pos = [1000, 60];
        app.graph.add(trainer);
        set("KontextLoadModel", "model", "gone.safetensors");
        set("KontextTrainLora", "vae", "gone_too.safetensors");
        await app.loadGraphData(app.graph.serialize());
    }""")
    tab.toast("gone.safetensors")
    model, trainer = FIRST.format("KontextLoadModel"), FIRST.format("KontextTrainLora")
    assert "gone.safetensors is not among" in mark(tab, model)
    assert "gone_too.safetensors" in mark(tab, trainer)
    tab.page.mouse.move(700, 1000)
    tab.shot("trouble")
    tab.eval(f"""() => {{
        {model}.widgets.find((one) => one.name === "model").value = "kontext-tiny (bundled)";
        {trainer}.widgets.find((one) => one.name === "vae").value = "kontext-tiny (bundled)";
    }}""")
    tab.page.wait_for_timeout(1200)
    assert mark(tab, model) == mark(tab, trainer) == ""


def test_a_missing_file_inside_a_subgraph_is_said_there_and_outside(tab):
    tab.graph()
    tab.eval("""async () => {
        const model = app.graph.nodes.find((node) => node.type === "KontextLoadModel");
        model.widgets.find((one) => one.name === "model").value = "deep.safetensors";
        app.graph.convertToSubgraph(new Set([model]));
        await app.loadGraphData(app.graph.serialize());
    }""")
    tab.toast("deep.safetensors")
    subgraph = "app.graph.nodes.find((node) => node.subgraph).subgraph"
    inner = FIRST.format("KontextLoadModel").replace("app.graph", subgraph)
    outer = "app.graph.nodes.find((node) => node.subgraph)"
    assert "deep.safetensors" in mark(tab, inner) and "deep.safetensors" in mark(tab, outer)
    saved = tab.eval("JSON.stringify(app.graph.serialize())")
    tab.eval(f"""() => {{
        {inner}.widgets.find((one) => one.name === "model").value = "kontext-tiny (bundled)";
    }}""")
    tab.page.wait_for_timeout(1200)
    assert mark(tab, inner) == mark(tab, outer) == ""
    assert "kontext_panel" not in saved


def test_a_file_of_the_wrong_kind_is_said_before_and_after_a_run(tab, host):
    copy = host.put_model("diffusion_models", "really_a_vae.safetensors")
    copy.write_bytes((BUNDLED["kontext-tiny"] / "ae.safetensors").read_bytes())
    tab.graph()
    tab.eval("""(name) => {
        const model = app.graph.nodes.find((node) => node.type === "KontextLoadModel");
        const found = model.widgets.find((one) => one.name === "model");
        if (!found.options.values.includes(name)) found.options.values.push(name);
        found.value = name;
    }""", copy.name)  # fmt: skip
    tab.page.locator(".kontext-notes", has_text="autoencoder").first.wait_for()
    assert tab.run() == "execution_error"
    tab.toast("autoencoder")
    tab.page.locator(".kontext-bad:visible", has_text="autoencoder").first.wait_for()
    assert "autoencoder" in mark(tab, FIRST.format("KontextLoadModel"))
    tab.clear_messages()
    copy.unlink()


SUBGRAPH = """async (values) => {
  const find = (type) => app.graph.nodes.find((node) => node.type === type);
  for (const [type, name, value] of values) find(type).widgets.find((one) => one.name === name).value = value;
  app.graph.convertToSubgraph(new Set([find("KontextEdit")]));
  await app.loadGraphData(app.graph.serialize());
  window.outer = app.graph.nodes.find((node) => node.subgraph);
}"""
MARK = f"""async () => {{
  const found = (await {PANELS}).panelOf(window.outer);
  return found && !found.mark.hidden ? found.mark.textContent : "";
}}"""


def test_trouble_inside_a_subgraph_marks_its_node_outside_until_the_next_run(tab):
    tab.graph(seed=random.randrange(1 << 30))
    tab.eval(SUBGRAPH, [["KontextEdit", "width", 200], ["KontextEdit", "height", 200]])
    tab.page.wait_for_timeout(700)
    assert tab.run() == "execution_error"
    tab.page.wait_for_function(f"async () => (await ({MARK})()).includes('200')")
    assert tab.page.locator(".kontext-bad:visible").count() == 1
    tab.clear_messages()
    tab.eval("""() => {
        const inner = window.outer.subgraph.nodes.find((node) => node.type === "KontextEdit");
        for (const name of ["width", "height"]) inner.widgets.find((one) => one.name === name).value = 0;
    }""")
    assert tab.run() == "execution_success"
    tab.page.wait_for_function(f"async () => (await ({MARK})()) === ''")
    saved = tab.eval("JSON.stringify(app.graph.serialize())")
    assert "kontext_panel" not in saved
    assert tab.errors == []

"""Messages of a run reach the graph that it was queued from: not another open workflow, not another tab of the browser,
not a graph of the same node ids that a script queued."""

from __future__ import annotations

import json
import random
import urllib.request

import pytest

STEPS = 4

# The picture reaches Kontext Edit through a node that holds it; see conftest.py.
HOLD = """async () => {
  const hold = LiteGraph.createNode("HoldForTests");
  hold.pos = [20, 700];
  app.graph.add(hold);
  window.load.connect(0, hold, 0);
  hold.connect(0, window.edit, window.edit.inputs.findIndex((input) => input.name === "image"));
  await app.loadGraphData(app.graph.serialize());
  window.edit = app.graph.nodes.find((node) => node.type === "KontextEdit");
  [window.started, window.ended] = [0, []];
  window.counting?.abort();
  window.counting = new AbortController();
  const listen = (name, on) => window.comfyAPI.api.api.addEventListener(name, on, {signal: window.counting.signal});
  listen("execution_start", () => { window.started += 1; });
  for (const name of ["execution_success", "execution_error"]) listen(name, () => window.ended.push(name));
}"""
QUEUE = "async () => { await app.queuePrompt(0, 1); }"

# Everything that a run may show on our panels, from now on.
WATCH = """() => {
  window.seen = new Set();
  const look = () => {
    for (const [name, selector] of [
        ["progress", ".kontext-progress:not([hidden])"], ["mark", ".kontext-bad:not([hidden])"],
        ["picture", ".kontext-panel .kontext-picture[alt=After]:not([hidden])"],
        ["words", ".kontext-panel [role=status] .kontext-note"]]) {
      if (document.querySelector(selector)) window.seen.add(name);
    }
  };
  window.watching?.disconnect();
  window.watching = new MutationObserver(look);
  window.watching.observe(document.body, {subtree: true, childList: true, attributes: true});
}"""
# Open a copy of the open workflow, with its id and its nodes' ids, in a tab of its own.
COPY = """async () => {
  await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())), true, true, "a copy");
  window.edit = app.graph.nodes.find((node) => node.type === "KontextEdit");
}"""
BACK = "() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')"


@pytest.fixture
def begin(tab, host):
    """Queue a run that waits for `release`; the name of the file that releases it."""
    released = host.server.base / "input" / "released"

    def begin(**values) -> None:
        released.unlink(missing_ok=True)
        tab.graph(
            **{"prompt": "Make the disc red", "steps": STEPS, "seed": random.randrange(1 << 30), **values}
        )
        tab.eval(HOLD)
        tab.page.wait_for_selector(".kontext-chip, .kontext-notes .kontext-note")
        tab.page.wait_for_timeout(1200)  # the graph is looked at twice a second
        tab.eval(QUEUE)
        tab.page.wait_for_function("window.started === 1")

    begin.release = released.touch
    yield begin
    released.touch()


def ended(tab, count: int) -> None:
    tab.page.wait_for_function("(count) => window.ended.length >= count", arg=count)
    tab.page.wait_for_timeout(1500)


def shown(tab) -> list[str]:
    """What was seen since WATCH."""
    return sorted(tab.eval("[...window.seen]"))


def test_a_run_shows_nothing_in_another_workflow_and_all_of_it_in_its_own(tab, begin):
    begin()
    tab.eval(COPY)
    tab.eval(WATCH)
    begin.release()
    ended(tab, 1)
    assert shown(tab) == []
    tab.eval(BACK)
    tab.page.wait_for_selector(".kontext-handle:visible")
    said = tab.page.locator(".kontext-panel [role=status] .kontext-note").first.inner_text()
    assert said.startswith("421x301 to ")
    assert tab.errors == []


def test_trouble_marks_the_workflow_that_it_is_of(tab, begin):
    begin(width=200, height=200)  # no multiples of 16: found when it runs
    tab.eval(COPY)
    tab.eval(WATCH)
    begin.release()
    ended(tab, 1)
    assert tab.eval("window.ended") == ["execution_error"]
    assert shown(tab) == []
    tab.toast("multiple")
    tab.clear_messages()
    tab.eval(BACK)
    tab.page.wait_for_selector(".kontext-bad:visible")
    assert "200" in tab.page.locator(".kontext-bad:visible").first.inner_text()


def test_a_copy_that_was_run_last_does_not_take_the_pictures_of_the_first(tab, begin):
    """Both have one id: a mark tells them apart, which nothing that is saved keeps."""
    begin()
    tab.eval(COPY)
    tab.eval(
        "() => { window.edit.widgets.find((one) => one.name === 'prompt').value = 'Make the disc blue'; }"
    )
    tab.eval(QUEUE)
    begin.release()
    tab.page.wait_for_function("window.ended.length === 2")
    tab.page.wait_for_selector(".kontext-handle:visible")
    picture = "() => document.querySelector('.kontext-panel .kontext-picture[alt=After]').src"
    copys = tab.eval(picture)
    tab.eval(BACK)
    tab.page.wait_for_selector(".kontext-handle:visible")
    first = tab.eval(picture)
    assert "filename=kontext_" in copys and "filename=kontext_" in first and first != copys
    tab.eval("() => app.extensionManager.command.execute('Workspace.NextOpenedWorkflow')")
    tab.page.wait_for_selector(".kontext-handle:visible")
    assert tab.eval(picture) == copys
    assert "kontext_tab" not in tab.eval("JSON.stringify(app.graph.serialize())")


def test_another_tab_of_the_browser_with_the_same_workflow_shows_nothing(tab, begin):
    page = tab.page.context.new_page()
    other = type(tab)(page, tab.tiny, tab.rendering).open(tab.page.url.split("#")[0])
    try:
        begin()
        other.eval("async (graph) => { await app.loadGraphData(graph); }", tab.eval("app.graph.serialize()"))
        assert other.eval("app.graph.id") == tab.eval("app.graph.id")
        other.page.wait_for_selector(".kontext-chip")
        other.eval(WATCH)
        begin.release()
        ended(tab, 1)
        tab.page.wait_for_selector(".kontext-handle:visible")
        assert shown(other) == [] and other.errors == []
    finally:
        page.close()


def test_a_run_that_a_script_queued_shows_nothing(tab, host):
    """It has no client: the host tells every page of its progress."""
    tab.graph(prompt="Make the disc red", steps=STEPS, seed=random.randrange(1 << 30))
    tab.page.wait_for_selector(".kontext-chip")
    tab.page.wait_for_timeout(1200)
    tab.eval(WATCH)
    tab.eval("""() => {
        window.heard = 0;
        window.comfyAPI.api.api.addEventListener("progress_state", () => { window.heard += 1; });
    }""")
    prompt = tab.eval("async () => (await app.graphToPrompt()).output")
    request = urllib.request.Request(
        f"{host.server.url}/prompt",
        json.dumps({"prompt": prompt}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        prompt_id = json.load(answer)["prompt_id"]
    tab.page.wait_for_function(
        """async (id) => id in await (await fetch(`/history/${id}`)).json()""", arg=prompt_id
    )
    tab.page.wait_for_timeout(1000)
    assert tab.eval("window.heard") > 0, "the host told this page nothing: this shows nothing"
    assert shown(tab) == [] and tab.errors == []

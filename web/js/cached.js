/**
 * Results of nodes that did not run because the host still had what they give: it says nothing of those, so after a
 * run they are looked for in its history, by the node's own values and those of everything before it.
 */

import { api, findNode } from "./host.js";
import { panelOf } from "./panel.js";

const LATEST = 100; // runs that are looked through
const TRIES = 20;
const PAUSE = 150; // milliseconds

/** Follow the host's runs for as long as the page lives. */
export function followCached() {
  api.addEventListener("execution_success", async ({ detail }) => {
    if (detail?.prompt_id === undefined) return;
    try {
      await showKept(detail.prompt_id);
    } catch (error) {
      console.warn("Kontext: the host's history cannot be read, a view may be out of date.", error);
    }
  });
}

async function showKept(id) {
  const graph = await graphOf(id);
  if (!graph) return;
  const silent = Object.keys(graph).map((node) => [node, panelOf(findNode(node))])
    .filter(([, panel]) => panel?.kind.stage && !panel.heard);
  if (!silent.length) return;
  const runs = Object.values(await fetchHistory(`/history?max_items=${LATEST}`)).reverse();
  for (const [node, panel] of silent) {
    const wanted = signature(graph, node);
    for (const { prompt, outputs, meta } of runs) {
      const same = new Set(Object.keys(prompt?.[2] ?? {}).filter((other) => signature(prompt[2], other) === wanted));
      const found = Object.keys(outputs ?? {}).filter((key) => same.has(meta?.[key]?.display_node ?? key))
        .flatMap((key) => outputs[key].kontext ?? []);
      if (!found.length) continue;
      panel.results = [];
      panel.setResults(found);
      break;
    }
  }
}

/** The nodes of a run by id; the host writes its history just after it says that the run is over. */
async function graphOf(id) {
  for (let attempt = 0; attempt < TRIES; attempt += 1) {
    const graph = (await fetchHistory(`/history/${encodeURIComponent(id)}`))[id]?.prompt?.[2];
    if (graph) return graph;
    await new Promise((resolve) => { setTimeout(resolve, PAUSE); });
  }
  return null;
}

async function fetchHistory(route) {
  const response = await api.fetchApi(route);
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  return response.json();
}

/** Everything that a node's result comes from, as text; a picture that was replaced counts by the host's mark of it. */
function signature(graph, id, known = new Map()) {
  if (known.has(id)) return known.get(id);
  known.set(id, "");
  const node = graph[id];
  if (!node) return "";
  const inputs = Object.keys(node.inputs ?? {}).sort().map((name) => {
    const value = node.inputs[name];
    const linked = Array.isArray(value) && value.length === 2 && graph[value[0]] !== undefined;
    return [name, linked ? [signature(graph, String(value[0]), known), value[1]] : value];
  });
  const text = JSON.stringify([node.class_type, node.is_changed ?? null, inputs]);
  known.set(id, text);
  return text;
}

/**
 * Results of nodes that did not run because the host still had what they give: it says nothing of those, so after a
 * run they are looked for in its history, by the node's own values and those of everything before it.
 */

import { api, findNode } from "./host.js";
import { panelOf } from "./panel.js";
import { isHere, runOf, show } from "./runs.js";

const LATEST = 100; // runs that are looked through
const TRIES = 20;
const PAUSE = 150; // milliseconds

/** Follow the host's runs for as long as the page lives. */
export function followCached() {
  api.addEventListener("execution_success", async ({ detail }) => {
    const run = await runOf(detail?.prompt_id);
    if (!run) return;
    show(run, () => showKept(detail.prompt_id, run).catch((error) => {
      console.warn("Kontext: the host's history cannot be read, a view may be out of date.", error);
    }));
  });
}

async function showKept(id, run) {
  const graph = await graphOf(id);
  if (!isHere(run)) return;
  const silent = Object.keys(graph).map((node) => [node, panelOf(findNode(node))])
    .filter(([node, panel]) => panel?.kind.stage && !panel.heard && panel.node.comfyClass === graph[node].class_type);
  if (!silent.length) return;
  const runs = Object.values(await fetchHistory(`/history?max_items=${LATEST}`)).reverse();
  const numbers = new Map();
  const wanted = signatures(graph, numbers);
  const known = runs.map(({ prompt }) => [...signatures(prompt?.[2] ?? {}, numbers)]);
  for (const [node, panel] of silent) {
    for (const [place, { outputs, meta }] of runs.entries()) {
      const same = new Set(known[place].filter(([, number]) => number === wanted.get(node)).map(([other]) => other));
      const found = Object.keys(outputs ?? {}).filter((key) => same.has(meta?.[key]?.display_node ?? key))
        .flatMap((key) => outputs[key].kontext ?? []);
      if (!found.length || panel.heard) continue;
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
  throw new Error(`run ${id} is not in it`);
}

async function fetchHistory(route) {
  const response = await api.fetchApi(route);
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  return response.json();
}

/**
 * A number for every node of a run, by id: the same for nodes of all runs whose results come from the same values. A
 * picture that was replaced counts by the host's mark of it. `numbers` maps what was seen to its number.
 */
function signatures(graph, numbers) {
  const known = new Map();
  const number = (id) => {
    if (known.has(id)) return known.get(id);
    known.set(id, -1); // while its inputs are looked at
    const node = graph[id];
    const inputs = Object.keys(node.inputs ?? {}).sort().map((name) => {
      const value = node.inputs[name];
      const linked = Array.isArray(value) && value.length === 2 && graph[value[0]] !== undefined;
      return [name, linked ? { from: number(String(value[0])), slot: value[1] } : value];
    });
    const text = JSON.stringify([node.class_type, node.is_changed ?? null, inputs]);
    if (!numbers.has(text)) numbers.set(text, numbers.size);
    known.set(id, numbers.get(text));
    return known.get(id);
  };
  Object.keys(graph).forEach(number);
  return known;
}

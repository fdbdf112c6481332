/** What went wrong, in words: a toast, and a mark on the node it happened in and on the subgraph nodes around it. */

import { api, app, nodesTo, toast } from "./host.js";
import { attachForWords } from "./panel.js";
import { isHere, runOf, show } from "./runs.js";
import { translate } from "./sentences.js";
import { t } from "./text.js";

// Widgets of our nodes that name a file.
const FILES = { KontextLoadModel: ["model"], KontextLoadVAE: ["vae"], KontextLoadTextEncoders: ["t5", "clip"],
  KontextLoadLora: ["lora"], KontextTrainLora: ["model", "t5", "clip", "vae"], KontextLoadRecord: ["picture"],
  KontextFaceSimilarity: ["embedder", "detector"] };

/** Follow the host's messages for as long as the page lives. */
export function followTrouble() {
  api.addEventListener("execution_error", async ({ detail }) => {
    if (!String(detail?.node_type ?? "").startsWith("Kontext")) return;
    const run = await runOf(detail.prompt_id);
    if (!run) return;
    const text = translate(String(detail.exception_message ?? "").trim());
    const nodes = () => nodesTo(detail.node_id) ?? [];
    show(run, () => nodes().forEach((node) => attachForWords(node).setMark(text)));
    const title = isHere(run) ? nodes().at(-1)?.title : null;
    toast("error", title || t("trouble"), text, 15000);
  });
}

/** Mark nodes whose files are not there, and the subgraph nodes around them, when a workflow is opened. */
export function markMissingFiles() {
  const all = everyNode(app.rootGraph ?? app.graph).filter(lackOf);
  for (const node of all) attachForWords(node).setLacking(() => lackOf(node));
  const said = all.filter((node) => !node.subgraph).map(lackOf);
  if (said.length) toast("warn", t("trouble"), said.join("\n"), 15000);
}

/** A sentence for each file that a node, or one inside it, names and the host does not list; null when all are there. */
function lackOf(node) {
  if (node.subgraph) return [...new Set(node.subgraph.nodes.map(lackOf).filter(Boolean))].join("\n") || null;
  const lacking = (FILES[node.comfyClass] ?? []).map((name) => node.widgets?.find((one) => one.name === name))
    .filter((found) => Array.isArray(found?.options?.values) && !found.options.values.includes(found.value));
  return lacking.map(({ value }) => t("trouble_missing", { name: value })).join("\n") || null;
}

/** The nodes of a graph and of the subgraphs in it, each subgraph once. */
function everyNode(graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return [];
  seen.add(graph);
  return graph.nodes.flatMap((node) => [node, ...everyNode(node.subgraph, seen)]);
}

/** What went wrong, in words: a toast, and a mark on the node it happened in. */

import { api, app, findNode, toast } from "./host.js";
import { allPanels, attachForMark } from "./panel.js";
import { t } from "./text.js";

// Widgets of our nodes that name a file.
const FILES = { KontextLoadModel: ["model"], KontextLoadVAE: ["vae"], KontextLoadTextEncoders: ["t5", "clip"],
  KontextLoadLora: ["lora"], KontextTrainLora: ["model", "t5", "clip", "vae"], KontextLoadRecord: ["picture"],
  KontextFaceSimilarity: ["embedder", "detector"] };

/** Follow the host's messages for as long as the page lives. */
export function followTrouble() {
  api.addEventListener("execution_start", () => allPanels().forEach((panel) => panel.begin()));
  api.addEventListener("execution_error", ({ detail }) => {
    if (!String(detail?.node_type ?? "").startsWith("Kontext")) return;
    const text = String(detail.exception_message ?? "").trim();
    const node = findNode(detail.node_id);
    if (node) attachForMark(node).setMark(text);
    toast("error", node?.title || t("trouble"), text, 15000);
  });
}

/** Mark nodes whose files are not there, when a workflow is opened; inside subgraphs too. */
export function markMissingFiles() {
  const all = everyNode(app.rootGraph ?? app.graph).filter(lackOf);
  for (const node of all) attachForMark(node).setLacking(() => lackOf(node));
  if (all.length) toast("warn", t("trouble"), all.map(lackOf).join("\n"), 15000);
}

/** A sentence for each file that a node names and that the host does not list; null when all are there. */
function lackOf(node) {
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

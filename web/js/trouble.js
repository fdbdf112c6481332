/** What went wrong, in words: a toast, and a mark on the node it happened in. */

import { api, app, findNode, toast } from "./host.js";
import { allPanels, attachForMark } from "./panel.js";
import { t } from "./text.js";

// Widgets of our loaders that name a file.
const FILES = { KontextLoadModel: ["model"], KontextLoadVAE: ["vae"], KontextLoadTextEncoders: ["t5", "clip"],
  KontextLoadLora: ["lora", "lora_name"] };

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

/** Mark loaders whose file is not there, when a workflow is opened. */
export function markMissingFiles() {
  const lacking = [];
  for (const node of (app.rootGraph ?? app.graph)?.nodes ?? []) {
    for (const name of FILES[node.comfyClass] ?? []) {
      const found = node.widgets?.find((one) => one.name === name);
      const options = found?.options?.values;
      if (!Array.isArray(options) || options.includes(found.value)) continue;
      const text = t("trouble_missing", { name: found.value });
      attachForMark(node).setMark(text);
      lacking.push(text);
    }
  }
  if (lacking.length) toast("warn", t("trouble"), lacking.join("\n"), 15000);
}

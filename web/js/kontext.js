/**
 * The one module with effects: registers the pack's extension with the host. The others are only imported.
 *
 *   text, dom          words and elements
 *   host               everything asked of the host
 *   stage              two pictures, compared
 *   paint, mask        a mask painted over them, and its way into the graph
 *   panel              what a node of ours shows; help: presets and quotes; training: the loss and samples
 *   progress, trouble  the host's messages while something runs
 *   cached             what the host did not need to run again
 *   turns_store, turns the sidebar; sessions: the text of Kontext Turns
 */

import { followCached } from "./cached.js";
import { loadStyle } from "./dom.js";
import { api, app, findNode } from "./host.js";
import { attach, panelOf, watch } from "./panel.js";
import { followProgress } from "./progress.js";
import { setWords, t } from "./text.js";
import { followTraining } from "./training.js";
import { followTrouble, markMissingFiles } from "./trouble.js";
import { TurnsPanel } from "./turns.js";
import { KEEP, TurnStore } from "./turns_store.js";

const store = new TurnStore();
let panel = null;

async function loadWords() {
  const language = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  const response = await api.fetchApi("/i18n");
  if (!response.ok) return;
  const all = await response.json();
  setWords(language, all[language]?.kontext);
}

function showResults({ detail }) {
  const entries = detail?.output?.kontext;
  if (!Array.isArray(entries) || !entries.length) return;
  const shown = panelOf(findNode(detail.display_node ?? detail.node));
  if (shown?.fresh) [shown.results, shown.fresh] = [[], false];
  if (shown) shown.heard = true;
  shown?.setResults(entries);
  shown?.learn(entries);
  for (const entry of entries) {
    if (entry.prompt !== undefined) store.add({ ...entry, start: shown?.startOf(String(detail.node), entry.after) ?? null });
  }
}

app.registerExtension({
  name: "kontext.view",
  settings: [{
    id: KEEP.id, category: ["Kontext", "Kontext turns", "keep"], name: t("keep"), tooltip: t("keep_help"), type: "number",
    defaultValue: KEEP.default, attrs: { min: 0, max: 5000 },
  }],

  async setup() {
    loadStyle();
    await loadWords();
    api.addEventListener("executed", showResults);
    followCached();
    followProgress();
    followTrouble();
    followTraining(panelOf);
    watch();
    app.extensionManager.registerSidebarTab({
      id: "kontext.turns", icon: "pi pi-images", title: t("turns"), tooltip: t("turns"), type: "custom",
      render: (element) => {
        panel?.destroy();
        panel = new TurnsPanel(store, element);
      },
      destroy: () => {
        panel?.destroy();
        panel = null;
      },
    });
    await store.load();
  },

  nodeCreated(node) {
    attach(node);
  },

  loadedGraphNode(node) {
    const kept = app.nodeOutputs?.[String(node.id)]?.kontext;
    if (Array.isArray(kept)) panelOf(node)?.setResults(kept);
  },

  afterConfigureGraph() {
    markMissingFiles();
  },
});

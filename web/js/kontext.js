/**
 * The one module with effects: registers the pack's extension with the host. The others are only imported.
 *
 *   text, dom          words and elements
 *   host               everything asked of the host
 *   stage              two pictures, compared
 *   paint, mask        a mask painted over them, and its way into the graph
 *   panel              what a node of ours shows; forecast: what an edit will need; help: presets and quotes;
 *                      training: the loss and samples
 *   runs               which open graph a message of the host's is for
 *   progress, trouble  the host's messages while something runs; sentences: the server's, in other languages
 *   cached             what the host did not need to run again
 *   turns_store, turns the sidebar; sessions: the text of Kontext Turns
 */

import { followCached } from "./cached.js";
import { loadStyle } from "./dom.js";
import { api, app, findNode } from "./host.js";
import { allPanels, attach, attachForWords, panelOf, watch } from "./panel.js";
import { followProgress } from "./progress.js";
import { begin, loaded, loading, markBeforeQueue, runOf, settle, show } from "./runs.js";
import { translate } from "./sentences.js";
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

async function showResults({ detail }) {
  const entries = detail?.output?.kontext;
  const run = Array.isArray(entries) && entries.length ? await runOf(detail.prompt_id) : null;
  if (!run) return;
  let panel = null;
  show(run, () => {
    panel = panelOf(findNode(detail.display_node ?? detail.node));
    panel?.take(entries);
  });
  for (const entry of entries) {
    if (entry.prompt !== undefined) store.add({ ...entry, start: panel?.startOf(String(detail.node), entry.after) ?? null });
  }
}

/** What a node says while it works. */
async function showLines({ detail }) {
  if (!Array.isArray(detail?.lines)) return;
  const run = await runOf(detail.prompt_id);
  if (!run) return;
  const lines = detail.lines.map((line) => translate(String(line)));
  show(run, () => {
    const node = findNode(detail.node);
    const panel = lines.length && node ? attachForWords(node) : panelOf(node);
    panel?.setLines(lines);
  });
}

async function beginRun({ detail }) {
  const run = await runOf(detail?.prompt_id);
  if (run) begin(run, () => allPanels().forEach((panel) => panel.begin()));
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
    api.addEventListener("execution_start", beginRun);
    api.addEventListener("executed", showResults);
    api.addEventListener("kontext.lines", showLines);
    followCached();
    followProgress();
    followTrouble();
    followTraining(panelOf);
    watch(settle);
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
    if (node.comfyClass?.startsWith("Kontext")) markBeforeQueue(node);
    attach(node);
  },

  beforeConfigureGraph(data) {
    loading(data);
  },

  afterConfigureGraph() {
    loaded();
    markMissingFiles();
  },
});

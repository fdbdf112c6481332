/** Progress of running nodes: steps and the picture so far from the host's messages, the time left from the pace. */

import { api, findNode } from "./host.js";
import { panelOf } from "./panel.js";

const runs = new Map(); // execution id of the node that works -> {panel, first value, first time}

/** Follow the host's messages for as long as the page lives. */
export function followProgress() {
  api.addEventListener("progress_state", ({ detail }) => {
    for (const state of Object.values(detail?.nodes ?? {})) {
      const panel = panelOf(findNode(state.display_node_id ?? state.node_id));
      if (panel) update(panel, String(state.node_id), state);
    }
  });
  api.addEventListener("b_preview_with_metadata", ({ detail }) => {
    if (detail?.blob) panelOf(findNode(detail.displayNodeId ?? detail.nodeId))?.setPreview(detail.blob);
  });
  for (const name of ["execution_start", "execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(name, clear);
  }
}

function update(panel, id, { state, value, max }) {
  if (state !== "running") {
    if (runs.delete(id)) end(panel);
    return;
  }
  const now = performance.now();
  if (!runs.has(id) || runs.get(id).max !== max || value < runs.get(id).value) {
    runs.set(id, { panel, max, start: now, first: value, value });
  }
  const run = runs.get(id);
  run.value = value;
  const made = value - run.first;
  const left = made > 0 ? ((now - run.start) / made) * (max - value) / 1000 : null;
  panel.setProgress(max > 1 ? { value, max, left } : { value: 0, max: 1, left: null });
}

function clear() {
  for (const { panel } of runs.values()) end(panel);
  runs.clear();
}

function end(panel) {
  panel.setProgress(null);
  panel.setPreview(null);
}

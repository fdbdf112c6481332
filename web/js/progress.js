/** Progress of running nodes: steps and the picture so far from the host's messages, the time left from the pace. */

import { api, findNode } from "./host.js";
import { panelOf } from "./panel.js";
import { isHere, runOf } from "./runs.js";

const works = new Map(); // execution id of the node that works -> {panel, first value, first time}

/** Follow the host's messages for as long as the page lives. */
export function followProgress() {
  api.addEventListener("progress_state", async ({ detail }) => {
    if (!(await isShown(detail?.prompt_id))) return;
    for (const state of Object.values(detail.nodes ?? {})) {
      const panel = panelOf(findNode(state.display_node_id ?? state.node_id));
      if (panel) update(panel, String(state.node_id), state);
    }
  });
  api.addEventListener("b_preview_with_metadata", async ({ detail }) => {
    // front end 1.58 calls it jobId, 1.32 promptId
    if (!detail?.blob || !(await isShown(detail.jobId ?? detail.promptId))) return;
    panelOf(findNode(detail.displayNodeId ?? detail.nodeId))?.setPreview(detail.blob);
  });
  for (const name of ["execution_start", "execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(name, async ({ detail }) => {
      if (await runOf(detail?.prompt_id)) clear(); // whatever is open: the host works on one run at a time
    });
  }
}

async function isShown(promptId) {
  const run = await runOf(promptId);
  return run !== null && isHere(run);
}

function update(panel, id, { state, value, max }) {
  if (state !== "running") {
    if (works.delete(id)) end(panel);
    return;
  }
  const now = performance.now();
  const known = works.get(id);
  if (known?.panel !== panel || known.max !== max || value < known.value) {
    works.set(id, { panel, max, start: now, first: value, value });
  }
  const work = works.get(id);
  work.value = value;
  const made = value - work.first;
  const left = made > 0 ? ((now - work.start) / made) * (max - value) / 1000 : null;
  panel.setProgress(max > 1 ? { value, max, left } : { value: 0, max: 1, left: null });
}

function clear() {
  for (const { panel } of works.values()) end(panel);
  works.clear();
}

function end(panel) {
  panel.setProgress(null);
  panel.setPreview(null);
}

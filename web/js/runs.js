/**
 * Which graph a message of the host's is for. The host sends node ids, and every workflow counts its nodes from one:
 * this page has several open, and other tabs and scripts queue theirs beside it. So the server is asked which client
 * queued a run and from which workflow (`POST /kontext/whose`). Copies of a workflow have one id, so a graph carries a mark
 * of its tab while it is queued, which the host keeps with the run.
 */

import { api, app, ask } from "./host.js";

const MAX_RUNS = 500; // that are remembered
const PATIENCE = 60; // looks at a graph that is not there, before its loading is taken for failed
const MARK = "kontext_tab"; // in a graph's `extra`

const runs = new Map(); // prompt id -> promise of a Run, null where another client queued it
const tabs = new Map(); // mark -> the open tab of this page that was queued with it, as the host keeps it
const kept = new Map(); // mark, or id of a workflow without one -> what its last run showed, for when it is opened again
let order = Promise.resolve();
let load = null; // of a graph that is being opened: the tab that was open before, whether its nodes are there, looks since

/** {id, mark} of the workflow that a run was queued from, null if another page queued it. Answers in the order of asking. */
export function runOf(promptId) {
  order = order.then(() => {
    if (typeof promptId !== "string") return null;
    if (!runs.has(promptId)) {
      if (runs.size >= MAX_RUNS) runs.delete(runs.keys().next().value);
      runs.set(promptId, ask("whose", { prompt: promptId, client: api.clientId ?? "" })
        .then(({ mine, workflow, mark }) => (mine ? { id: workflow, mark: mark ?? workflow } : null), () => null));
    }
    return runs.get(promptId);
  });
  return order;
}

/** Whether the workflow that a run was queued from is the one that is open. */
export function isHere({ id, mark }) {
  if (load) return false;
  const tab = tabs.get(mark);
  return isOpen(tab) ? tab === openTab() : id === rootGraph().id;
}

/** Show what a run gave: now if its workflow is open, and again whenever it is opened again, until its next run. */
export function show(run, deliver) {
  keep(run, Symbol("shown"), deliver);
  if (isHere(run)) deliver();
}

/** The second half of that; takes the place of what was kept under the same key. */
export function keep(run, key, deliver) {
  if (!kept.has(run.mark)) kept.set(run.mark, { run, deliveries: new Map() });
  kept.get(run.mark).deliveries.set(key, deliver);
}

/** A run begins: what the last one of its workflow showed is over. */
export function begin(run, deliver) {
  kept.delete(run.mark);
  show(run, deliver);
}

/** A graph is being opened: until `settle` nobody can say which tab it is of. A saved picture may carry an old mark. */
export function loading(data) {
  delete data?.extra?.[MARK];
  load = { before: openTab(), isDone: false, looks: 0 };
}

/** Its nodes are there; the host says just after this that its tab is the open one. */
export function loaded() {
  if (load) Object.assign(load, { isDone: true, looks: 0 });
}

/**
 * To be called now and then. Once a graph is open, what its last run gave is shown again; workflows that were closed are
 * forgotten.
 */
export function settle() {
  if (!load) return;
  load.looks += 1;
  if (load.isDone ? openTab() === load.before && load.looks < 2 : load.looks < PATIENCE) return;
  load = null;
  for (const [mark, tab] of tabs) if (!isOpen(tab)) tabs.delete(mark);
  for (const [mark, { run, deliveries }] of kept) {
    if (isHere(run)) for (const deliver of [...deliveries.values()]) deliver();
    else if (!tabs.has(mark)) kept.delete(mark);
  }
}

/** Have a node's graph carry the mark of its tab when it is queued. */
export function markBeforeQueue(node) {
  const first = node.widgets?.[0];
  if (!first) return;
  const before = first.beforeQueued;
  first.beforeQueued = function (...values) {
    mark();
    return before?.apply(this, values);
  };
}

/** The host reads the graph right after this, before anything that waits: the mark is gone by then. */
function mark() {
  const graph = rootGraph();
  const known = [...tabs].find(([, tab]) => tab === openTab())?.[0];
  const own = known ?? [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(36)).join("");
  tabs.set(own, openTab());
  graph.extra ??= {};
  graph.extra[MARK] = own;
  setTimeout(() => { delete graph.extra[MARK]; });
}

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

function openTab() {
  return app.extensionManager.workflow?.activeWorkflow;
}

function isOpen(tab) {
  return Boolean(tab && app.extensionManager.workflow?.openWorkflows?.includes(tab));
}

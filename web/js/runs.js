/**
 * Which graph a message of the host's is for. The host sends node ids, and every workflow counts its nodes from one:
 * this page has several open, and other tabs and scripts queue theirs beside it. So the server is asked which client
 * queued a run and from which workflow (`POST /kontext/whose`). Copies of a workflow have one id: the second to be queued
 * gets another.
 */

import { api, app, ask } from "./host.js";

const MAX_RUNS = 500; // that are remembered
const PATIENCE = 60; // looks at a graph that is not there, before its loading is taken for failed
const NO_ID = "00000000-0000-0000-0000-000000000000"; // of a graph that was made by hand

const runs = new Map(); // prompt id -> promise of a Run, null where another client queued it
const tabs = new Map(); // id of a workflow that was queued here -> the open tab it was queued from, as the host keeps it
const kept = new Map(); // id of a workflow -> what its last run showed, for when it is opened again
let order = Promise.resolve();
let load = null; // of a graph that is being opened: the tab that was open before, whether its nodes are there, looks since

/** {id} of the workflow that a run was queued from, if this page queued it; else null. Answers in the order of asking. */
export function runOf(promptId) {
  order = order.then(() => {
    if (typeof promptId !== "string") return null;
    if (!runs.has(promptId)) {
      if (runs.size >= MAX_RUNS) runs.delete(runs.keys().next().value);
      runs.set(promptId, ask("whose", { prompt: promptId, client: api.clientId ?? "" })
        .then(({ mine, workflow }) => (mine ? { id: workflow } : null), () => null));
    }
    return runs.get(promptId);
  });
  return order;
}

/** Whether the workflow that a run was queued from is the one that is open. */
export function isHere({ id }) {
  if (load) return false;
  const tab = tabs.get(id);
  return isOpen(tab) ? tab === openTab() : id === rootGraph().id;
}

/** Show what a run gave: now if its workflow is open, and again whenever it is opened again, until its next run. */
export function show(run, deliver) {
  keep(run, Symbol("shown"), deliver);
  if (isHere(run)) deliver();
}

/** The second half of that; takes the place of what was kept under the same key. */
export function keep(run, key, deliver) {
  if (!kept.has(run.id)) kept.set(run.id, new Map());
  kept.get(run.id).set(key, deliver);
}

/** A run begins: what the last one of its workflow showed is over. */
export function begin(run, deliver) {
  kept.delete(run.id);
  show(run, deliver);
}

/** A graph is being opened: until `settle` nobody can say which tab it is of. */
export function loading() {
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
  for (const [id, tab] of tabs) if (!isOpen(tab)) tabs.delete(id);
  for (const [id, deliveries] of kept) {
    if (isHere({ id })) for (const deliver of [...deliveries.values()]) deliver();
    else if (!tabs.has(id)) kept.delete(id);
  }
}

/** Before a node's graph is queued: no other open workflow has its id. */
export function claimBefore(node) {
  const first = node.widgets?.[0];
  if (!first) return;
  const before = first.beforeQueued;
  first.beforeQueued = function (...values) {
    claim();
    return before?.apply(this, values);
  };
}

function claim() {
  const graph = rootGraph();
  const tab = tabs.get(graph.id);
  if (!graph.id || graph.id === NO_ID || (isOpen(tab) && tab !== openTab())) graph.id = newId();
  tabs.set(graph.id, openTab());
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

/** A random UUID; `crypto.randomUUID` is left out by browsers where the page does not come over https. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  [bytes[6], bytes[8]] = [(bytes[6] & 0x0f) | 0x40, (bytes[8] & 0x3f) | 0x80];
  return [...bytes].map((one) => one.toString(16).padStart(2, "0")).join("")
    .replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/** Everything that is asked of the host: its API, settings, toasts, and the graph behind a node. */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

export { api, app };

/** Send JSON to one of the pack's routes; its answer. Throws an Error with the server's sentence. */
export async function ask(route, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const response = await api.fetchApi(`/kontext/${route}`, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error ?? response.statusText);
  return answer;
}

/** Address of a picture that the host names {filename, subfolder, type}. */
export function viewUrl({ filename, subfolder = "", type = "input" }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

/** A short message in the corner; severity "info", "success", "warn" or "error". */
export function toast(severity, summary, detail, life = 8000) {
  app.extensionManager.toast.add({ severity, summary, detail, life });
}

/** Whether Nodes 2.0 draws the nodes. */
export function isVueNodes() {
  return Boolean(globalThis.LiteGraph?.vueNodesMode);
}

/** The node of an execution id: "7", or "5:7" for node 7 inside the subgraph node 5. */
export function findNode(id) {
  return nodesTo(id)?.at(-1) ?? null;
}

/** The node of an execution id and, before it, the subgraph nodes that it is in; null where one of them is not there. */
export function nodesTo(id) {
  let graph = app.rootGraph ?? app.graph;
  const nodes = [];
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(Number.isNaN(Number(part)) ? part : Number(part));
    if (!node) return null;
    nodes.push(node);
    graph = node.subgraph;
  }
  return nodes;
}

/** The node that feeds an input, reroutes passed over; null when nothing does. */
export function origin(node, name) {
  const input = node.inputs?.find((slot) => slot.name === name);
  const links = node.graph?.links;
  const link = input?.link == null ? null : links?.get?.(input.link) ?? links?.[input.link];
  const from = link && node.graph.getNodeById(link.origin_id);
  if (from?.type === "Reroute") return origin(from, from.inputs[0].name);
  return from ?? null;
}

/** The nearest node up a line of one type (such as MODEL) that takes none of it itself: its loader. */
export function loader(node, name, type) {
  const seen = new Set();
  for (let from = origin(node, name); from && !seen.has(from);) {
    seen.add(from);
    const slot = from.inputs?.find((input) => input.type === type && input.link != null);
    if (!slot) return from;
    from = origin(from, slot.name);
  }
  return null;
}

/**
 * Ids of the output nodes that a node's results reach, for the host's queue. Null where the way leads through a
 * subgraph, in or out: the whole graph is to be queued then.
 */
export function outputsAfter(node) {
  if (node.graph !== (app.rootGraph ?? app.graph)) return null;
  const [seen, found] = [new Set([node]), []];
  for (const from of seen) {
    if (from.subgraph) return null;
    if (from.constructor.nodeData?.output_node) found.push(String(from.id));
    for (const id of from.outputs?.flatMap(({ links }) => links ?? []) ?? []) {
      const link = node.graph.links?.get?.(id) ?? node.graph.links?.[id];
      const target = link && node.graph.getNodeById(link.target_id);
      if (target) seen.add(target);
    }
  }
  return found;
}

/** Take the host's last preview off a node, which would stand below the result. Nodes 2.0: by kontext.css. */
export function dropPreview(node) {
  if (isVueNodes()) return;
  if (app.nodePreviewImages) delete app.nodePreviewImages[String(node.id)];
  if (node.imgs === undefined) return;
  node.imgs = undefined;
  const shown = widget(node, "$$canvas-image-preview");
  if (shown) node.removeWidget?.(shown);
}

/** A widget of a node. */
export function widget(node, name) {
  return node?.widgets?.find((one) => one.name === name);
}

/** A widget's value. */
export function value(node, name) {
  return widget(node, name)?.value;
}

/** Set a widget as a hand would. */
export function setValue(node, name, to) {
  const found = widget(node, name);
  if (!found) return;
  found.value = to;
  found.callback?.(to, app.canvas, node);
  node.graph?.setDirtyCanvas?.(true, true);
}

/** How the host names the picture of a Load Image (or its mask's) node; null for other nodes. */
export function loadedPicture(node) {
  const name = ["LoadImage", "LoadImageMask"].includes(node?.comfyClass) ? value(node, "image") : null;
  if (typeof name !== "string" || !name) return null;
  const [, path, type = "input"] = /^(.*?)(?: \[(input|output|temp)\])?$/.exec(name);
  const cut = path.lastIndexOf("/");
  return { filename: path.slice(cut + 1), subfolder: cut < 0 ? "" : path.slice(0, cut), type };
}

const sizes = new Map();

/** [width, height] of a picture at an address once it is known, else null; it is asked for then. */
export function pictureSize(url) {
  if (!sizes.has(url)) {
    if (sizes.size > 200) sizes.clear();
    sizes.set(url, null);
    const image = new Image();
    image.onload = () => sizes.set(url, [image.naturalWidth, image.naturalHeight]);
    image.src = url;
  }
  return sizes.get(url);
}

/**
 * Put a picture into the host's input folder; the name by which Load Image knows it. What has no name gets one made of
 * what is in it: the same picture is one file, and no other one is written over.
 */
export async function uploadBlob(blob, name = null) {
  name ??= `kontext-${hashOf(new Uint8Array(await blob.arrayBuffer()))}.png`;
  const form = new FormData();
  form.append("image", new File([blob], name, { type: blob.type || "image/png" }));
  form.append("overwrite", "true");
  const response = await api.fetchApi("/upload/image", { method: "POST", body: form });
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  const saved = await response.json();
  return saved.subfolder ? `${saved.subfolder}/${saved.name}` : saved.name;
}

/** 32 hexadecimal digits of some bytes. `crypto.subtle` is left out by browsers where the page does not come over https. */
function hashOf(bytes) {
  const factors = [0x9e3779b1, 0x85ebca77, 0xc2b2ae3d, 0x27d4eb2f];
  const sums = [...factors];
  for (const byte of bytes) {
    for (let i = 0; i < 4; i++) {
      sums[i] = Math.imul(sums[i] ^ byte, factors[i]);
      sums[i] ^= sums[i] >>> 15;
    }
  }
  return sums.map((sum) => (sum >>> 0).toString(16).padStart(8, "0")).join("");
}

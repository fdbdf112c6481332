/** The mask of an edit in the graph: where it comes from, and putting a painted one there. */

import { app, isVueNodes, loadedPicture, origin, setValue, toast, uploadBlob, value, viewUrl } from "./host.js";
import { t } from "./text.js";

const ROOM = 660; // pixels below a Kontext Preserve that its before/after view will take
const WIDTH = 340; // and its width with it
const PREVIEW = 300; // height of a Preview Image with its picture

/** {url, channel} of the mask that decides what an edit may change; null when none is known before a run. */
export function maskOf(node) {
  const preserve = node.comfyClass === "KontextPreserve" ? node : preserveAfter(node);
  const from = preserve && origin(preserve, "mask");
  if (from?.comfyClass === "LoadImageMask") {
    const picture = loadedPicture(from);
    return picture && { url: viewUrl(picture), channel: value(from, "channel") ?? "red" };
  }
  const picture = from && loadedPicture(from);
  return picture ? { url: viewUrl(picture), channel: "alpha" } : null;
}

/** Upload a painted mask and connect it to the node's Kontext Preserve, which is added where there is none. */
export async function useMask(node, blob) {
  const name = await uploadBlob(blob);
  app.canvas.emitBeforeChange?.();
  const preserve = node.comfyClass === "KontextPreserve" ? node : preserveAfter(node) ?? addPreserve(node);
  let from = origin(preserve, "mask");
  if (from?.comfyClass !== "LoadImageMask") {
    from = globalThis.LiteGraph.createNode("LoadImageMask");
    from.pos = [preserve.pos[0], preserve.pos[1] + ROOM];
    preserve.graph.add(from);
    from.connect(0, preserve, slotOf(preserve, "mask"));
    setValue(from, "channel", "red");
  }
  const values = from.widgets.find((one) => one.name === "image")?.options?.values;
  if (Array.isArray(values) && !values.includes(name)) values.push(name);
  setValue(from, "image", name);
  app.canvas.emitAfterChange?.();
  toast("success", t("paint"), t("mask_used"), 4000);
}

/** Let the host's mask editor reach the edit too: the mask of its Load Image goes to Kontext Preserve. */
export function connectEditorMask(node, from) {
  const preserve = node.comfyClass === "KontextPreserve" ? node : preserveAfter(node) ?? addPreserve(node);
  if (!origin(preserve, "mask")) from.connect(1, preserve, slotOf(preserve, "mask"));
}

/** The Kontext Preserve that takes a node's picture as the edited one. */
function preserveAfter(node) {
  for (const id of node.outputs?.[0]?.links ?? []) {
    const link = node.graph?.links?.get?.(id) ?? node.graph?.links?.[id];
    const target = link && node.graph.getNodeById(link.target_id);
    if (target?.comfyClass === "KontextPreserve" && target.inputs[link.target_slot]?.name === "edited") return target;
  }
  return null;
}

/** A Kontext Preserve between an edit and whatever takes its picture. */
function addPreserve(node) {
  const preserve = globalThis.LiteGraph.createNode("KontextPreserve");
  const linkOf = (id) => node.graph.links?.get?.(id) ?? node.graph.links?.[id];
  const targets = (node.outputs[0].links ?? []).map(linkOf).map((link) => [node.graph.getNodeById(link.target_id), link.target_slot]);
  const x = node.pos[0] + node.size[0] + 60;
  // Nodes 2.0 has no public way to move a node that is drawn: Preserve goes below what stands in its place
  const inTheWay = targets.map(([target]) => target)
    .filter(({ pos, size }) => isVueNodes() && pos[0] < x + WIDTH + 60 && pos[0] + size[0] > x);
  preserve.setSize([Math.max(WIDTH, preserve.size[0]), preserve.size[1]]);
  preserve.pos = [x, Math.max(node.pos[1], ...inTheWay.map(({ pos, size }) => pos[1] + Math.max(PREVIEW, size[1]) + 60))];
  node.graph.add(preserve);
  for (const [target, slot] of targets) {
    preserve.connect(0, target, slot);
    if (!isVueNodes()) target.pos[0] = Math.max(target.pos[0], x + WIDTH + 60);
  }
  const original = node.inputs.find((input) => input.name === "image");
  const link = original?.link == null ? null : linkOf(original.link);
  if (link) node.graph.getNodeById(link.origin_id).connect(link.origin_slot, preserve, slotOf(preserve, "original"));
  node.connect(0, preserve, slotOf(preserve, "edited"));
  return preserve;
}

function slotOf(node, name) {
  return node.inputs.findIndex((input) => input.name === name);
}

/**
 * The part of a node that this pack draws: what an edit will need, hints about its prompt, its progress, what it has to
 * say, what went wrong, and the before/after view. One DOM widget a node, the last one, never saved with the workflow.
 */

import { button, icon, make } from "./dom.js";
import { Forecast } from "./forecast.js";
import { closeHelp, openHelp, quoteSelection } from "./help.js";
import {
  app, dropPreview, isVueNodes, loadedPicture, origin, outputsAfter, pictureSize, setValue, toast, value, viewUrl,
} from "./host.js";
import { connectEditorMask, maskOf, useMask } from "./mask.js";
import { startsOf } from "./sessions.js";
import { openLarge, Stage } from "./stage.js";
import { duration, t } from "./text.js";
import { TrainingView } from "./training.js";

const ROW = 28;
const MARGIN = 8; // around the panel in the node
const STAGE = 260;
const TRAINING = 230;
const NOTES = 110; // more than this is scrolled

// What each node of the pack shows. prompt: its instruction's widget; plan: the pictures and settings are known, and
// "Run" stands beside what they need.
const KINDS = {
  KontextEdit: { stage: true, plan: true, prompt: "prompt", pictures: ["image", "image_2", "image_3", "image_4"] },
  KontextTurns: { stage: true, plan: true, pictures: ["image"] },
  KontextPreserve: { stage: true, pictures: ["original"] },
  KontextPrompt: { prompt: "text", pictures: [] },
  KontextTrainLora: { training: true, pictures: [] },
};

/** Panels by node, so that none outlives its node. */
const panels = new Map();

/** The panel of a node; null for a node that has none. */
export function panelOf(node) {
  return panels.get(node) ?? null;
}

/** Every panel there is. */
export function allPanels() {
  return [...panels.values()];
}

/** Give a node its panel if its kind has one. */
export function attach(node) {
  const kind = KINDS[node.comfyClass];
  return kind && !panels.has(node) ? new Panel(node, kind) : panelOf(node);
}

/** A panel for any node, to mark trouble on it or to show what it says. */
export function attachForWords(node) {
  return panelOf(node) ?? new Panel(node, { temporary: true, pictures: [] });
}

class Panel {
  constructor(node, kind) {
    Object.assign(this, { node, kind, abort: new AbortController(), results: [], index: 0 });
    const signal = this.abort.signal;
    this.chips = make("div", { class: "kontext-row" });
    if (kind.plan) {
      this.chips.append(button("play", t("run"), { help: t("run_help"), wide: true, signal, on: () => this.run() }));
    }
    if (kind.prompt) {
      this.chips.append(
        button("wand", t("presets"), { help: t("presets_help"), wide: true, signal, "aria-haspopup": "dialog",
          on: (event) => openHelp(event.currentTarget, (text) => setValue(node, kind.prompt, text)) }),
        button("quote", t("quote"), { help: t("quote_help"), signal, on: () => {
          if (!quoteSelection(node, kind.prompt)) toast("info", t("quote"), t("quote_none"), 4000);
        } }));
    }
    this.forecast = new Forecast(node, () => {
      this.refreshStage();
      this.grow();
    });
    this.chips.append(this.forecast.chips);
    this.notes = this.forecast.notes;
    this.said = make("ul", { class: "kontext-notes", role: "status" });
    this.mark = make("div", { class: "kontext-note kontext-bad", role: "alert", hidden: true });
    this.done = make("div", { class: "kontext-done" });
    this.track = make("div", { class: "kontext-track", role: "progressbar", "aria-label": t("progress"),
      "aria-valuemin": 0 }, this.done);
    this.progressText = make("span");
    this.progress = make("div", { class: "kontext-progress", hidden: true }, this.track, this.progressText);
    this.element = make("div", { class: "kontext-panel" }, this.chips, this.notes, this.mark, this.said, this.progress);
    this.chips.hidden = !(kind.prompt || kind.plan);
    this.widget = node.addDOMWidget("kontext_panel", "kontext", this.element, {
      serialize: false, hideOnZoom: true, margin: MARGIN, getValue: () => "", setValue: () => {},
      // The host asks in every frame, and reads styles for each that gives nothing: measured in grow(), where something
      // has changed.
      getMinHeight: () => this.lastHeight ?? this.height(),
      getMaxHeight: () => (this.stage || this.training ? Infinity : this.lastHeight ?? this.height()),
      getHeight: () => this.lastHeight ?? this.height(),
    });
    this.widget.serialize = false;
    const removed = node.onRemoved;
    node.onRemoved = function (...values) {
      removed?.apply(this, values);
      panels.get(node)?.destroy();
    };
    if (node.subgraph) this.#stayUnsaved();
    panels.set(node, this);
    this.sizing = new ResizeObserver(() => this.grow()); // the row wraps as the node is made wider or narrower
    this.sizing.observe(this.chips);
    this.grow();
  }

  /** Front end 1.32 saves whatever stands on a subgraph's node as one of the widgets that it shows of those inside. */
  #stayUnsaved() {
    const { node, abort } = this;
    const before = node.onSerialize;
    const after = node.onSerialize = function (data) {
      before?.call(this, data);
      const all = data.properties?.proxyWidgets;
      if (Array.isArray(all)) data.properties.proxyWidgets = all.filter(([, name]) => name !== "kontext_panel");
    };
    abort.signal.addEventListener("abort", () => { if (node.onSerialize === after) node.onSerialize = before; });
  }

  /** Queue what comes of this node, and nothing else. */
  async run() {
    const outputs = outputsAfter(this.node);
    if (outputs?.length === 0) {
      toast("warn", t("run"), t("run_none"));
      return;
    }
    await app.queuePrompt(0, 1, ...(outputs ? [outputs] : []));
  }

  /** Take the panel and all its listeners away. */
  destroy() {
    panels.delete(this.node);
    this.abort.abort();
    this.forecast.destroy();
    this.stage?.destroy();
    this.training?.destroy();
    closeHelp(this.element);
    this.sizing.disconnect();
    if (this.live) URL.revokeObjectURL(this.live);
    this.closeLarge?.();
    this.element.remove();
  }

  /** Least height in pixels for what is shown now. */
  height() {
    this.chipsHeight = this.chips.offsetHeight || this.chipsHeight || ROW; // 0 while the host leaves the panel out
    let height = this.chips.hidden ? 0 : Math.max(ROW, this.chipsHeight + 4);
    for (const list of [this.notes, this.said]) {
      if (list.childElementCount) height += Math.min(NOTES, list.scrollHeight || 40) + 4;
    }
    if (!this.mark.hidden) height += Math.min(NOTES, this.mark.scrollHeight || 72) + 8;
    if (!this.progress.hidden) height += 22;
    return Math.max(4, height + (this.stage ? STAGE : 0) + (this.training ? TRAINING : 0) + 2 * MARGIN);
  }

  /** From afar, where the host leaves text fields out, only pictures, curves and trouble stay to be seen. */
  showFromAfar() {
    this.widget.options.hideOnZoom = !(this.stage || this.training || !this.mark.hidden);
  }

  /** Let the node be tall enough, never smaller than it was made. */
  grow() {
    this.showFromAfar();
    const height = this.height();
    if (height === this.lastHeight) return;
    this.element.style.minHeight = `${height - 2 * MARGIN}px`;
    const before = this.lastHeight ?? 0;
    this.lastHeight = height;
    const [width, now] = this.node.size;
    const least = this.node.computeSize()[1];
    const wished = this.kind.temporary || height > before ? Math.max(now, least) : Math.max(least, now - (before - height));
    if (wished !== now) this.node.setSize([Math.max(width, this.stage ? 340 : width), wished]);
    this.node.graph?.setDirtyCanvas?.(true, true);
  }

  makeStage() {
    if (this.stage || !this.kind.stage) return;
    const paints = this.node.comfyClass !== "KontextTurns";
    this.stage = new Stage({
      passWheel: (event) => { if (!isVueNodes()) app.canvas?.processMouseWheel?.(event); },
      onLarge: () => { this.closeLarge = openLarge(this.what(), this.node.title || t("view")); },
      onPaint: paints ? (blob) => this.takeMask(blob) : undefined,
      onEditor: paints ? () => this.openEditor() : undefined,
    });
    this.element.append(this.stage.element);
    this.grow();
  }

  /** One of the host's messages of a training run. */
  setTraining(message) {
    if (!this.kind.training) return;
    if (!this.training) {
      this.training = new TrainingView(() => this.node.title);
      this.element.append(this.training.element);
      this.grow();
    }
    this.training.add(message);
  }

  /** Show what a run gave: entries of nodes/host_compare.py. */
  setResults(results) {
    if (this.node.comfyClass === "KontextTurns") this.results.push(...results);
    else this.results = results;
    this.index = this.node.comfyClass === "KontextTurns" ? this.results.length - 1 : 0;
    this.setPreview(null);
    dropPreview(this.node);
    this.refreshStage();
  }

  /** What a run gave of this node. */
  take(entries) {
    if (this.fresh) [this.results, this.fresh] = [[], false];
    this.heard = true;
    this.setResults(entries);
    this.forecast.learn(entries);
  }

  /** Show the picture as far as it has come, a Blob of the host's; null when there is none any more. */
  setPreview(blob) {
    if (!this.kind.stage || (blob ? this.stage?.painter : !this.live)) return; // not under a mask in the making
    const last = this.live;
    this.live = blob && URL.createObjectURL(blob);
    if (last) setTimeout(() => URL.revokeObjectURL(last), 1000); // the old one stands until the new one is read
    if (blob) dropPreview(this.node);
    this.refreshStage();
  }

  /** The picture that a turn of Kontext Turns went on from; `id` of the node that made the turn ends with its number. */
  startOf(id, after) {
    const number = Number(/\.turn(\d+)$/.exec(id)?.[1] ?? 0);
    if (!number) return null;
    this.made ??= new Map();
    this.made.set(number, after);
    return this.made.get(startsOf(String(value(this.node, "instructions") ?? ""))[number - 1]) ?? null;
  }

  /** A run begins: forget what the last one said. */
  begin() {
    this.setMark(this.lacking?.() ?? null);
    this.heard = false; // whether this run gave a result of this node
    if (this.node.comfyClass === "KontextTurns") this.fresh = true;
  }

  /** What the stage shows now. */
  what() {
    if (this.live) return { after: this.live, caption: t("so_far") };
    const entry = this.results[this.index];
    const { fit } = this.forecast;
    if (!entry) return { before: this.inputUrl, caption: this.inputSize?.join(" × ") ?? "", fit, mask: this.mask };
    return {
      before: entry.before && viewUrl(entry.before), after: viewUrl(entry.after),
      mask: entry.mask ? { url: viewUrl(entry.mask), channel: "red" } : this.mask, fit, count: this.results.length, index: this.index,
      caption: [entry.size.join(" × "), entry.seconds === undefined ? null : t("seconds", { seconds: entry.seconds })]
        .filter(Boolean).join(" · "),
      next: () => { this.index = (this.index + 1) % this.results.length; this.refreshStage(); },
    };
  }

  refreshStage() {
    if (!this.results.length && !this.inputUrl && !this.live) return;
    this.makeStage();
    this.stage?.show(this.what());
    if (!this.results.length && !this.live && !this.frameSeen && this.forecast.fit) {
      this.frameSeen = true;
      this.stage?.toggle("frame", true);
    }
  }

  /** A sentence in red on the node; null takes it away. */
  setMark(text) {
    this.mark.hidden = !text;
    this.mark.replaceChildren(...(text ? [icon("warning"), make("span", { text })] : []));
    this.#keepOrLeave();
  }

  /** What the node says of its work, a line each. */
  setLines(lines) {
    this.said.replaceChildren(...lines.map((text) => make("li", { class: "kontext-note", text })));
    this.#keepOrLeave();
  }

  #keepOrLeave() {
    if (!this.kind.temporary || !this.mark.hidden || this.said.childElementCount) {
      this.grow();
      return;
    }
    this.node.removeWidget?.(this.widget);
    this.destroy();
  }

  /** Files of the node's widgets are not there: `lacking` says which, or gives null once a good one is chosen. */
  setLacking(lacking) {
    this.lacking = lacking;
    this.setMark(lacking());
  }

  /** What was lacking is there. */
  found() {
    this.lacking = null;
    this.setMark(null);
  }

  /** Progress of the running node: {value, max, left} with seconds left or null; null when it is over. */
  setProgress(progress) {
    this.progress.hidden = !progress;
    if (progress) {
      const { value: done, max, left } = progress;
      this.done.style.transform = `scaleX(${max ? done / max : 0})`;
      this.track.setAttribute("aria-valuenow", done);
      this.track.setAttribute("aria-valuemax", max);
      this.progressText.textContent = [t("step", { value: done, max }),
        left === null ? null : t("left", { time: duration(left) })].filter(Boolean).join(" · ");
      this.track.setAttribute("aria-valuetext", this.progressText.textContent);
    }
    this.grow();
  }

  /** Look at the graph around the node; ask the server again where something has changed. */
  refresh() {
    const { node, kind } = this;
    const urls = (kind.pictures ?? []).map((name) => pictureUrl(origin(node, name)));
    const sizes = urls.map((url) => url && pictureSize(url));
    if (urls[0] !== this.inputUrl || String(sizes[0]) !== String(this.inputSize)) {
      this.inputUrl = urls[0] ?? null;
      this.inputSize = sizes[0] ?? null;
      if (!this.results.length) this.refreshStage();
    }
    const mask = kind.stage ? maskOf(node) : null;
    if (mask?.url !== this.mask?.url) {
      this.mask = mask;
      this.refreshStage();
    }
    if (kind.plan) this.forecast.refreshPlan(sizes.filter(Boolean));
    if (kind.prompt) this.forecast.refreshHints(String(value(node, kind.prompt) ?? ""));
  }

  /** A mask was painted here: into the graph with it. */
  async takeMask(blob) {
    try {
      await useMask(this.node, blob);
    } catch (error) {
      toast("error", t("paint"), error.message);
    }
    this.refresh();
  }

  /** Open the host's mask editor on the picture that feeds this node. */
  async openEditor() {
    const from = origin(this.node, this.kind.pictures[0]);
    if (!loadedPicture(from)) {
      toast("info", t("mask"), t("mask_none"), 5000);
      return;
    }
    connectEditorMask(this.node, from);
    app.canvas.selectNode(from);
    await app.extensionManager.command.execute("Comfy.MaskEditor.OpenMaskEditor");
  }
}

/** Address of what a node shows or will give. */
function pictureUrl(node) {
  if (!node) return null;
  const loaded = loadedPicture(node);
  if (loaded) return viewUrl(loaded);
  const last = panelOf(node)?.results.at(-1)?.after;
  return last ? viewUrl(last) : node.imgs?.[0]?.src ?? null;
}

/** Look at every panel's graph now and then: no hook into other nodes is needed, and none can be left behind. */
export function watch(before, milliseconds = 500) {
  return setInterval(() => {
    if (document.hidden) return;
    before();
    for (const panel of panels.values()) {
      if (!panel.node.graph) panel.destroy();
      else {
        panel.refresh();
        if (panel.lacking && !panel.lacking()) panel.found();
      }
    }
  }, milliseconds);
}


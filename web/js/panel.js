/**
 * The part of a node that this pack draws: what an edit will need, hints about its prompt, its progress, what went
 * wrong, and the before/after view. One DOM widget a node, the last one, never saved with the workflow.
 */

import { button, icon, make } from "./dom.js";
import { closeHelp, openHelp, quoteSelection } from "./help.js";
import {
  app, ask, dropPreview, isVueNodes, loadedPicture, loader, origin, outputsAfter, pictureSize, setValue, toast, value, viewUrl,
} from "./host.js";
import { connectEditorMask, maskOf, useMask } from "./mask.js";
import { startsOf } from "./sessions.js";
import { openLarge, Stage } from "./stage.js";
import { bytes, duration, t } from "./text.js";
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
const LOADERS = {
  KontextLoadModel: ["model", "weight_dtype"], UNETLoader: ["unet_name"],
  KontextLoadVAE: ["vae"], VAELoader: ["vae_name"],
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

/** A panel for any node of the pack, to mark trouble on it. */
export function attachForMark(node) {
  return panelOf(node) ?? new Panel(node, { temporary: true, pictures: [] });
}

class Panel {
  constructor(node, kind) {
    Object.assign(this, { node, kind, abort: new AbortController(), results: [], index: 0, hints: [], plan: null });
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
    this.planChips = make("span", { class: "kontext-row", role: "status" });
    this.chips.append(this.planChips);
    this.notes = make("ul", { class: "kontext-notes" });
    this.mark = make("div", { class: "kontext-note kontext-bad", role: "alert", hidden: true });
    this.done = make("div", { class: "kontext-done" });
    this.track = make("div", { class: "kontext-track", role: "progressbar", "aria-label": t("progress"),
      "aria-valuemin": 0 }, this.done);
    this.progressText = make("span");
    this.progress = make("div", { class: "kontext-progress", hidden: true }, this.track, this.progressText);
    this.element = make("div", { class: "kontext-panel" }, this.chips, this.notes, this.mark, this.progress);
    this.chips.hidden = !(kind.prompt || kind.plan);
    this.widget = node.addDOMWidget("kontext_panel", "kontext", this.element, {
      serialize: false, hideOnZoom: true, margin: MARGIN, getValue: () => "", setValue: () => {},
      // the host asks in every frame: measured in grow(), where something has changed
      getMinHeight: () => this.lastHeight ?? this.height(),
      getMaxHeight: () => (this.stage || this.training ? undefined : this.lastHeight ?? this.height()),
    });
    this.widget.serialize = false;
    const removed = node.onRemoved;
    node.onRemoved = function (...values) {
      removed?.apply(this, values);
      panels.get(node)?.destroy();
    };
    panels.set(node, this);
    this.sizing = new ResizeObserver(() => this.grow()); // the row wraps as the node is made wider or narrower
    this.sizing.observe(this.chips);
    this.grow();
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
    if (this.notes.childElementCount) height += Math.min(NOTES, this.notes.scrollHeight || 40) + 4;
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
    const fit = this.plan?.fits?.[0] ?? null;
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
    if (!this.results.length && !this.live && !this.frameSeen && this.plan?.fits?.[0]) {
      this.frameSeen = true;
      this.stage?.toggle("frame", true);
    }
  }

  /** A sentence in red on the node; null takes it away. */
  setMark(text) {
    if (!text && this.kind.temporary) {
      this.node.removeWidget?.(this.widget);
      this.destroy();
      return;
    }
    this.mark.hidden = !text;
    this.mark.replaceChildren(...(text ? [icon("warning"), make("span", { text })] : []));
    this.grow();
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
    if (kind.plan) this.refreshPlan(sizes.filter(Boolean));
    if (kind.prompt) this.refreshHints(String(value(node, kind.prompt) ?? ""));
  }

  async refreshPlan(pictures) {
    const { node } = this;
    const [model, vae] = [loader(node, "model", "MODEL"), loader(node, "vae", "VAE")];
    const names = (from) => (LOADERS[from?.comfyClass] ?? []).map((name) => value(from, name));
    const [name, dtype] = names(model);
    const asked = {
      pictures, fit: value(node, "fit") ?? "stretch", padding: value(node, "padding") ?? "mirror",
      width: Number(value(node, "width") ?? 0), height: Number(value(node, "height") ?? 0),
      batch_size: Number(value(node, "batch_size") ?? 1),
      model: isFile(name) ? name : "", weight_dtype: model?.comfyClass === "KontextLoadModel" ? dtype ?? "default" : "default",
      vae: isFile(names(vae)[0]) ? names(vae)[0] : "",
    };
    this.modelName = asked.model;
    const few = value(node, "few_step") ?? "off";
    this.steps = few === "off" ? Number(value(node, "steps") ?? 0) : Number(few);
    this.evaluations = few === "off" && value(node, "sampler") === "heun" ? 2 : 1; // of the model in a step
    this.batch = asked.batch_size;
    this.count = this.batch * (node.comfyClass === "KontextTurns" ? startsOf(String(value(node, "instructions") ?? "")).length : 1);
    const key = JSON.stringify([asked, this.steps, this.evaluations, this.count]);
    if (key === this.planKey) return;
    this.planKey = key;
    let plan;
    try {
      plan = await ask("plan", asked);
    } catch (error) {
      plan = { problem: error.message };
    }
    if (key !== this.planKey || !panels.has(node)) return;
    this.plan = plan;
    this.showPlan();
    this.refreshStage();
  }

  showPlan() {
    const { plan } = this;
    const chips = [];
    const chip = (text, title, warned = false) => chips.push(make("span", {
      class: `kontext-chip${warned ? " kontext-warned" : ""}`, text, title }));
    if (plan.size) {
      chip(plan.size.join(" × "), plan.fits[0]?.report);
      for (const [key, words] of [["cropped", "crops"], ["padded", "pads"], ["stretched", "stretches"]]) {
        const percent = Math.abs(plan.fits[0]?.[`${key}_percent`] ?? 0);
        if (percent >= 0.5) chip(t(words, { percent: percent.toFixed(percent < 10 ? 1 : 0) }), plan.fits[0].report, percent > 25);
      }
      chip(t("tokens", { total: plan.tokens.total.toLocaleString() }), t("tokens_help", plan.tokens));
    }
    if (plan.memory) {
      const { needed, total, device, weights, activations } = plan.memory;
      const said = { needed: bytes(needed), total: bytes(total), weights: bytes(weights), activations: bytes(activations), device };
      chip(said.needed, t("memory_help", said), !plan.memory.fits);
      this.memoryNote = plan.memory.fits ? null : t("memory_short", said);
    } else this.memoryNote = null;
    if (plan.tokens && this.steps) chip(...this.sayTime(plan));
    this.planChips.replaceChildren(...chips);
    this.showNotes();
  }

  /** [words, help] of the time: from this model's last runs, else roughly from the device, else that it is not known. */
  sayTime({ tokens, seconds_per_step: least }) {
    const work = this.steps * this.evaluations * this.count;
    const rate = speeds()[this.modelName];
    if (rate) return [t("time", { time: duration(rate * tokens.total * work) }), t("time_help")];
    if (least) return [t("time_rough", { time: duration(least * work) }), t("time_rough_help")];
    return [t("time_unknown"), t("time_unknown_help")];
  }

  async refreshHints(prompt) {
    if (prompt === this.hintedPrompt) return;
    this.hintedPrompt = prompt;
    let hints = [];
    try {
      hints = prompt.trim() ? (await ask("hints", { prompt })).hints : [];
    } catch (error) {
      hints = [{ code: "", found: "", advice: error.message }];
    }
    if (prompt !== this.hintedPrompt || !panels.has(this.node)) return;
    this.hints = hints;
    this.showNotes();
  }

  showNotes() {
    const lines = [this.plan?.problem, this.memoryNote, ...this.hints.map(sayHint)].filter(Boolean);
    this.notes.replaceChildren(...lines.map((text) => make("li", { class: "kontext-note" }, icon("warning"),
      make("span", { text }))));
    this.grow();
  }

  /** Remember how fast this model is here, for the next estimate: from the entries of one run, a picture each. */
  learn(entries) {
    const [{ seconds, steps }] = entries;
    if (!this.plan?.tokens || !seconds || !steps) return;
    const pictures = Math.max(entries.length, this.batch); // the server shows sixteen at most
    const all = speeds();
    all[this.modelName] = seconds / (steps * this.evaluations * pictures * this.plan.tokens.total);
    localStorage.setItem("kontext.speeds", JSON.stringify(Object.fromEntries(Object.entries(all).slice(-50))));
    this.showPlan();
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

/** A hint in the language that is shown. */
export function sayHint({ code, found, advice }) {
  const key = `hint_${code}`;
  const words = t(key);
  const said = words === key ? advice : words;
  return found ? `“${found}”: ${said}` : said;
}

function isFile(name) {
  return typeof name === "string" && (name.includes("bundled") || /\.(safetensors|sft|gguf)$/i.test(name));
}

/** Address of what a node shows or will give. */
function pictureUrl(node) {
  if (!node) return null;
  const loaded = loadedPicture(node);
  if (loaded) return viewUrl(loaded);
  const last = panelOf(node)?.results.at(-1)?.after;
  return last ? viewUrl(last) : node.imgs?.[0]?.src ?? null;
}

function speeds() {
  try {
    return JSON.parse(localStorage.getItem("kontext.speeds") ?? "{}");
  } catch {
    return {}; // somebody else's text under our name: begin anew
  }
}

/** Look at every panel's graph now and then: no hook into other nodes is needed, and none can be left behind. */
export function watch(milliseconds = 500) {
  return setInterval(() => {
    if (document.hidden) return;
    for (const panel of panels.values()) {
      if (!panel.node.graph) panel.destroy();
      else {
        panel.refresh();
        if (panel.lacking && !panel.lacking()) panel.found();
      }
    }
  }, milliseconds);
}


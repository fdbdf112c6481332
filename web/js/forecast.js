/**
 * What an edit will need, beside its Run button, and what Kontext may misread in its instruction, below it: asked of the
 * server whenever the inputs have changed.
 */

import { icon, make } from "./dom.js";
import { ask, loader, value } from "./host.js";
import { translate } from "./sentences.js";
import { startsOf } from "./sessions.js";
import { bytes, duration, t } from "./text.js";

const LOADERS = {
  KontextLoadModel: ["model", "weight_dtype"], UNETLoader: ["unet_name"],
  KontextLoadVAE: ["vae"], VAELoader: ["vae_name"],
};
const PERCENTS = [["cropped", "crops"], ["padded", "pads"], ["stretched", "stretches"]];

export class Forecast {
  /**
   * @param {object} node
   * @param {() => void} onChange is called when `chips`, `notes` or `fit` have changed
   */
  constructor(node, onChange) {
    Object.assign(this, { node, onChange, hints: [], plan: null, memoryNote: null });
    this.chips = make("span", { class: "kontext-row", role: "status" });
    this.notes = make("ul", { class: "kontext-notes" });
  }

  /** How the first picture is fitted, one of the plan route's fits; null while that is not known. */
  get fit() {
    return this.plan?.fits?.[0] ?? null;
  }

  /** Its node is gone: answers that are still to come are not looked at. */
  destroy() {
    this.gone = true;
  }

  /** Ask again if the widgets or the sizes [width, height] of the pictures are others than before. */
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
    if (key !== this.planKey || this.gone) return;
    this.plan = plan;
    this.#showPlan();
  }

  /** Ask again what may be misread if the instruction is another one. */
  async refreshHints(prompt) {
    if (prompt === this.hintedPrompt) return;
    this.hintedPrompt = prompt;
    let hints = [];
    try {
      hints = prompt.trim() ? (await ask("hints", { prompt })).hints : [];
    } catch (error) {
      hints = [{ code: "", found: "", advice: error.message }];
    }
    if (prompt !== this.hintedPrompt || this.gone) return;
    this.hints = hints;
    this.#showNotes();
  }

  /** Remember how fast this model is here, for the next estimate: from the entries of one run, a picture each. */
  learn(entries) {
    const [{ seconds, steps }] = entries;
    if (!this.plan?.tokens || !seconds || !steps) return;
    const pictures = Math.max(entries.length, this.batch); // the server shows sixteen at most
    const all = speeds();
    all[this.modelName] = seconds / (steps * this.evaluations * pictures * this.plan.tokens.total);
    localStorage.setItem("kontext.speeds", JSON.stringify(Object.fromEntries(Object.entries(all).slice(-50))));
    this.#showPlan();
  }

  #showPlan() {
    const { plan, fit } = this;
    const chips = [];
    const chip = (text, title, warned = false) => chips.push(make("span", {
      class: `kontext-chip${warned ? " kontext-warned" : ""}`, text, title }));
    if (plan.size) {
      const report = fit && translate(fit.report);
      chip(plan.size.join(" × "), report);
      for (const [key, words] of PERCENTS) {
        const percent = Math.abs(fit?.[`${key}_percent`] ?? 0);
        if (percent >= 0.5) chip(t(words, { percent: percent.toFixed(percent < 10 ? 1 : 0) }), report, percent > 25);
      }
      chip(t("tokens", { total: plan.tokens.total.toLocaleString() }), t("tokens_help", plan.tokens));
    }
    this.memoryNote = null;
    if (plan.memory) {
      const { needed, total, device, weights, activations } = plan.memory;
      const said = { needed: bytes(needed), total: bytes(total), weights: bytes(weights), activations: bytes(activations), device };
      chip(said.needed, t("memory_help", said), !plan.memory.fits);
      if (!plan.memory.fits) this.memoryNote = t("memory_short", said);
    }
    if (plan.tokens && this.steps) chip(...this.#sayTime(plan));
    this.chips.replaceChildren(...chips);
    this.#showNotes();
  }

  /** [words, help] of the time: from this model's last runs, else roughly from the device, else that it is not known. */
  #sayTime({ tokens, seconds_per_step: least }) {
    const work = this.steps * this.evaluations * this.count;
    const rate = speeds()[this.modelName];
    if (rate) return [t("time", { time: duration(rate * tokens.total * work) }), t("time_help")];
    if (least) return [t("time_rough", { time: duration(least * work) }), t("time_rough_help")];
    return [t("time_unknown"), t("time_unknown_help")];
  }

  #showNotes() {
    const problem = this.plan?.problem;
    const lines = [problem && translate(problem), this.memoryNote, ...this.hints.map(sayHint)].filter(Boolean);
    this.notes.replaceChildren(...lines.map((text) => make("li", { class: "kontext-note" }, icon("warning"),
      make("span", { text }))));
    this.onChange();
  }
}

/** A hint in the language that is shown. */
export function sayHint({ code, found, advice }) {
  const key = `hint_${code}`;
  const words = t(key);
  const said = words === key ? translate(advice) : words;
  return found ? `“${found}”: ${said}` : said;
}

function isFile(name) {
  return typeof name === "string" && (name.includes("bundled") || /\.(safetensors|sft|gguf)$/i.test(name));
}

function speeds() {
  try {
    return JSON.parse(localStorage.getItem("kontext.speeds") ?? "{}");
  } catch {
    return {}; // somebody else's text under our name: begin anew
  }
}

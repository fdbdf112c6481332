/** A training node while it trains: the loss as a curve, and the sample pictures, as the host's messages bring them. */

import { make, makeSvg } from "./dom.js";
import { api, findNode, viewUrl } from "./host.js";
import { isHere, keep, runOf } from "./runs.js";
import { openLarge } from "./stage.js";
import { duration, t } from "./text.js";

const WIDTH = 320;
const HEIGHT = 110;
const POINTS = 300; // drawn at most; more steps are averaged
const SAMPLES = 48;

export class TrainingView {
  constructor(title) {
    Object.assign(this, { title, losses: [], samples: [], abort: new AbortController() });
    this.raw = makeSvg("path", { class: "kontext-loss-raw" });
    this.smooth = makeSvg("path", { class: "kontext-loss" });
    this.top = makeSvg("text", { class: "kontext-axis", x: 4, y: 11 });
    this.bottom = makeSvg("text", { class: "kontext-axis", x: 4, y: HEIGHT - 4 });
    this.chart = makeSvg("svg", { class: "kontext-chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none",
      role: "img" }, this.raw, this.smooth);
    this.labels = makeSvg("svg", { class: "kontext-chart kontext-over", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" },
      this.top, this.bottom);
    this.facts = make("div", { class: "kontext-facts", role: "status" });
    this.strip = make("div", { class: "kontext-samples", role: "list", "aria-label": t("samples") });
    this.element = make("div", { class: "kontext-training" }, this.facts,
      make("div", { class: "kontext-plot" }, this.chart, this.labels), this.strip);
  }

  /** One message of a run: {step, steps, loss, seconds, sample}. */
  add({ step, steps, loss, seconds, sample }) {
    if (!Number.isFinite(step)) return;
    if (this.losses.length && step <= this.losses.at(-1).step && !sample) this.reset();
    if (Number.isFinite(loss)) this.losses.push({ step, loss });
    Object.assign(this, { step, steps, seconds });
    if (typeof sample?.filename === "string") this.#addSample(step, sample);
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = null;
      this.draw();
    });
  }

  /** Another run begins. */
  reset() {
    [this.losses, this.samples] = [[], []];
    this.strip.replaceChildren();
  }

  draw() {
    const points = thin(this.losses, POINTS);
    const values = points.map(({ loss }) => loss);
    let mean = values[0] ?? 0;
    const smooth = values.map((value) => (mean = 0.9 * mean + 0.1 * value));
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const y = (value) => (HEIGHT - 8 - ((value - low) / (high - low || 1)) * (HEIGHT - 16)).toFixed(1);
    const x = (index) => ((index / Math.max(1, points.length - 1)) * WIDTH * (this.steps ? this.step / this.steps : 1)).toFixed(1);
    const path = (all) => all.map((value, index) => `${index ? "L" : "M"}${x(index)} ${y(value)}`).join("");
    this.raw.setAttribute("d", path(values));
    this.smooth.setAttribute("d", path(smooth));
    if (values.length) [this.top.textContent, this.bottom.textContent] = [number(high), number(low)];
    const left = this.seconds && this.step ? (this.seconds / this.step) * (this.steps - this.step) : null;
    const said = [t("step", { value: this.step, max: this.steps }),
      values.length ? t("loss", { loss: number(smooth.at(-1)) }) : null,
      left ? t("left", { time: duration(left) }) : null].filter(Boolean).join(" · ");
    this.facts.textContent = said;
    this.chart.setAttribute("aria-label", `${t("loss_curve")}: ${said}`);
  }

  #addSample(step, sample) {
    const url = viewUrl(sample);
    if (this.samples.some((one) => one.url === url)) return;
    this.samples.push({ step, url });
    const label = t("sample_of", { step });
    this.strip.append(make("div", { role: "listitem" }, make("button", { type: "button", class: "kontext-sample", title: label,
      "aria-label": label, signal: this.abort.signal,
      on: { click: () => {
        this.closeLarge = openLarge({ before: this.samples[0].url, after: url, caption: label }, this.title());
      } } },
    make("img", { src: url, alt: "" }), make("span", { text: String(step) }))));
    if (this.samples.length > SAMPLES) {
      this.samples.shift();
      this.strip.firstElementChild.remove();
    }
    this.strip.scrollLeft = this.strip.scrollWidth;
  }

  /** Remove every listener. */
  destroy() {
    this.abort.abort();
    if (this.drawing) cancelAnimationFrame(this.drawing);
    this.closeLarge?.();
    this.element.remove();
  }
}

/** Follow the host's messages for as long as the page lives. */
export function followTraining(panelOf) {
  let [training, told] = [null, []];
  api.addEventListener("kontext.training", async ({ detail }) => {
    const run = await runOf(detail?.prompt_id);
    if (!run) return;
    const key = `${detail.prompt_id} ${detail.node}`;
    if (key !== training) [training, told] = [key, []];
    const all = told;
    all.push(detail);
    keep(run, key, () => all.forEach((one) => panelOf(findNode(one.node))?.setTraining(one)));
    if (isHere(run)) panelOf(findNode(detail.node))?.setTraining(detail);
  });
}

/** At most `count` points, each the mean of its neighbours. */
function thin(all, count) {
  if (all.length <= count) return all;
  const size = all.length / count;
  return Array.from({ length: count }, (_, index) => {
    const part = all.slice(Math.floor(index * size), Math.floor((index + 1) * size));
    return { step: part.at(-1).step, loss: part.reduce((sum, { loss }) => sum + loss, 0) / part.length };
  });
}

function number(value) {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

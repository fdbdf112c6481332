/**
 * Painting a mask over the picture of a stage: mouse, pen, touch and keyboard. White in the result is what was painted.
 */

import { button, icon, make } from "./dom.js";
import { t } from "./text.js";

const MAX_SIDE = 2048; // pixels of the mask; a larger picture is painted at a smaller scale
const UNDOS = 12;

export class Painter {
  /**
   * @param {object} stage draws the picture; gives `toPicture(event)` in 0..1 of its sides
   * @param {{size: number[], start?: HTMLCanvasElement, onUse: (blob: Blob) => Promise, onEnd: () => void}} options
   */
  constructor(stage, { size, start = null, onUse, onEnd }) {
    Object.assign(this, { stage, onUse, onEnd, abort: new AbortController(), erasing: false, last: null, undos: [] });
    const signal = this.abort.signal;
    const scale = Math.min(1, MAX_SIDE / Math.max(...size));
    const [width, height] = size.map((side) => Math.max(1, Math.round(side * scale)));
    this.canvas = make("canvas", { class: "kontext-picture kontext-paint", width, height, "aria-hidden": "true" });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    Object.assign(this.context, { lineCap: "round", lineJoin: "round", strokeStyle: "#ff3d5a", fillStyle: "#ff3d5a" });
    if (start) this.context.drawImage(start, 0, 0, width, height);
    this.at = [width / 2, height / 2];
    this.ring = make("div", { class: "kontext-ring", "aria-hidden": "true" });
    this.width = make("input", { type: "range", min: 1, max: 40, value: 8, class: "kontext-range",
      "aria-label": t("brush_size"), title: t("brush_size"), on: { input: () => this.#showRing() }, signal });
    this.eraser = button("erase", t("erase"), { help: t("erase_help"), "aria-pressed": "false", signal,
      on: () => this.toggleEraser() });
    this.use = make("button", { type: "button", class: "kontext-button kontext-wide kontext-primary", text: t("use_mask"),
      title: t("use_mask_help"), on: { click: () => this.finish() }, signal });
    this.bar = make("div", { class: "kontext-bar", role: "toolbar", "aria-label": t("paint") },
      this.width, this.eraser, button("undo", t("undo"), { help: t("undo_help"), signal, on: () => this.undo() }),
      button("invert", t("invert"), { signal, on: () => this.invert() }),
      button("trash", t("clear_mask"), { signal, on: () => this.clear() }),
      make("span", { class: "kontext-caption" }), button("close", t("cancel"), { signal, on: () => this.end() }), this.use);
  }

  /** The brush's radius in pixels of the mask. */
  get radius() {
    return Math.max(0.5, (Number(this.width.value) / 200) * Math.max(this.canvas.width, this.canvas.height));
  }

  /** A pointer goes down at a place of the picture. */
  down(event) {
    this.#keep();
    this.stroking = true;
    this.#lineTo(this.#place(event), null, event);
  }

  /** It moves. */
  move(event) {
    const place = this.#place(event);
    if (this.stroking) this.#lineTo(place, this.at, event);
    else this.at = place;
    this.#showRing();
  }

  /** It goes up. */
  up() {
    this.stroking = false;
  }

  /** Keys: arrows move the brush, Space paints, [ and ] its size, X eraser, Z undo, Enter uses, Escape leaves. */
  key(event) {
    const step = Math.max(1, this.radius * (event.shiftKey ? 2 : 0.5));
    const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    const sides = [this.canvas.width, this.canvas.height];
    if (move) {
      this.at = this.at.map((now, axis) => Math.min(sides[axis], Math.max(0, now + move[axis])));
      this.#showRing();
    } else if (event.key === " ") {
      this.#keep();
      this.#lineTo(this.at, null, {});
    } else if (event.key === "[" || event.key === "]") {
      this.width.value = Number(this.width.value) + (event.key === "]" ? 2 : -2);
      this.#showRing();
    } else if (event.key.toLowerCase() === "x") this.toggleEraser();
    else if (event.key.toLowerCase() === "z") this.undo();
    else if (event.key === "Enter") this.finish();
    else if (event.key === "Escape") this.end();
    else return false;
    return true;
  }

  toggleEraser() {
    this.erasing = !this.erasing;
    this.eraser.setAttribute("aria-pressed", String(this.erasing));
  }

  undo() {
    const last = this.undos.pop();
    if (last) this.context.putImageData(last, 0, 0);
  }

  clear() {
    this.#keep();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  invert() {
    this.#keep();
    this.context.globalCompositeOperation = "xor";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.context.globalCompositeOperation = "source-over";
  }

  /** Hand the mask over, and leave. */
  async finish() {
    if (this.use.disabled) return;
    this.use.disabled = true;
    const { width, height } = this.canvas;
    const flat = make("canvas", { width, height });
    const context = flat.getContext("2d");
    const pixels = this.context.getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data.fill(pixels.data[i + 3] > 127 ? 255 : 0, i, i + 3);
    for (let i = 3; i < pixels.data.length; i += 4) pixels.data[i] = 255;
    context.putImageData(pixels, 0, 0);
    const blob = await new Promise((resolve) => flat.toBlob(resolve, "image/png"));
    try {
      await this.onUse(blob);
    } finally {
      this.end();
    }
  }

  /** Leave without a mask; every listener goes. */
  end() {
    this.abort.abort();
    for (const element of [this.canvas, this.bar, this.ring]) element.remove();
    this.onEnd();
  }

  #place(event) {
    const [x, y] = this.stage.toPicture(event);
    return [x * this.canvas.width, y * this.canvas.height];
  }

  #keep() {
    this.undos.push(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height));
    if (this.undos.length > UNDOS) this.undos.shift();
  }

  #lineTo(place, from, event) {
    const { context } = this;
    context.globalCompositeOperation = this.erasing || event.shiftKey ? "destination-out" : "source-over";
    context.lineWidth = 2 * this.radius;
    context.beginPath();
    context.moveTo(...(from ?? place));
    context.lineTo(place[0] + (from ? 0 : 0.01), place[1]);
    context.stroke();
    context.globalCompositeOperation = "source-over";
    this.at = place;
    this.#showRing();
  }

  #showRing() {
    const percent = (value, side) => `${(100 * value) / side}%`;
    Object.assign(this.ring.style, { left: percent(this.at[0] - this.radius, this.canvas.width),
      top: percent(this.at[1] - this.radius, this.canvas.height), width: percent(2 * this.radius, this.canvas.width),
      height: percent(2 * this.radius, this.canvas.height) });
  }
}

/** A canvas, red where a mask is white, from a picture of the host's; null where it cannot be read. */
export async function readMask({ url, channel }) {
  const image = new Image();
  image.src = url;
  const isThere = await image.decode().then(() => true, () => false);
  if (!isThere) return null;
  const scale = Math.min(1, MAX_SIDE / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = make("canvas", { width: Math.round(image.naturalWidth * scale), height: Math.round(image.naturalHeight * scale) });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  const index = ["red", "green", "blue", "alpha"].indexOf(channel);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const white = index === 3 ? 255 - pixels.data[i + 3] : pixels.data[i + Math.max(0, index)];
    pixels.data.set([255, 61, 90, white > 8 ? 255 : 0], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** The border of a canvas of `readMask`, drawn on another as a line that is seen on any picture. */
export function drawBorder(canvas, mask) {
  const scale = Math.min(1, 768 / Math.max(mask.width, mask.height));
  const [width, height] = [Math.round(mask.width * scale), Math.round(mask.height * scale)];
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const white = new Uint8Array(width * height);
  for (let i = 0; i < white.length; i++) white[i] = pixels.data[4 * i + 3] > 127 ? 1 : 0;
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : white[y * width + x]);
  pixels.data.fill(0);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (!at(x, y) || (at(x - 1, y) && at(x + 1, y) && at(x, y - 1) && at(x, y + 1))) continue;
      const bright = ((x + y) >> 2) % 2 ? 255 : 0;
      pixels.data.set([bright, bright, bright, 255], 4 * (y * width + x));
    }
  }
  context.putImageData(pixels, 0, 0);
}

/**
 * Two pictures over each other with a divider, zoom and pan, a difference view, the border of a mask, and the
 * frame that the model will see; a mask may be painted over them. Works by mouse, touch (pinch) and keyboard.
 */

import { button, icon, make, makeSvg } from "./dom.js";
import { drawBorder, Painter, readMask } from "./paint.js";
import { t } from "./text.js";

const MAX_ZOOM = 32;

export class Stage {
  /**
   * @param {object} options
   * @param {(event: WheelEvent) => void} [options.passWheel] gets wheel events while the stage has no focus
   * @param {() => void} [options.onLarge] shows the "open large" button
   * @param {(blob: Blob) => Promise} [options.onPaint] gets a painted mask; shows the "paint a mask" button
   * @param {() => void} [options.onEditor] shows the button of the host's mask editor
   */
  constructor({ passWheel, onLarge, onPaint, onEditor } = {}) {
    this.abort = new AbortController();
    const signal = this.abort.signal;
    this.passWheel = passWheel;
    this.onPaint = onPaint;
    this.position = 50;
    this.zoom = 1;
    this.pan = [0, 0];
    this.pointers = new Map();
    this.shown = { before: null, after: null };

    this.beforeImage = make("img", { class: "kontext-picture", alt: t("before"), draggable: "false" });
    this.afterImage = make("img", { class: "kontext-picture", alt: t("after"), draggable: "false" });
    this.border = make("canvas", { class: "kontext-picture kontext-border", hidden: true, "aria-hidden": "true" });
    this.frameLayer = makeSvg("svg", { class: "kontext-frame", "aria-hidden": "true" });
    this.pictures = make("div", { class: "kontext-pictures" }, this.afterImage, this.beforeImage);
    this.world = make("div", { class: "kontext-world" }, this.pictures, this.border, this.frameLayer);
    this.handle = make("div", {
      class: "kontext-handle", role: "slider", tabindex: 0, "aria-label": t("slider"), "aria-orientation": "horizontal",
      "aria-valuemin": 0, "aria-valuemax": 100,
    }, make("span", { class: "kontext-knob" }, icon("slide")));
    this.labels = [make("span", { class: "kontext-label kontext-left", text: t("before") }),
      make("span", { class: "kontext-label kontext-right", text: t("after") })];
    this.view = make("div", { class: "kontext-view", role: "group", "aria-label": t("view") },
      this.world, this.handle, ...this.labels);

    const toggle = (name, key) => button(name, t(key), {
      help: t(`${key}_help`), "aria-pressed": "false", signal, on: () => this.toggle(key),
    });
    this.toggles = { difference: toggle("difference", "difference"), frame: toggle("frame", "frame"),
      outline: toggle("outline", "outline") };
    this.state = { difference: false, frame: false, outline: true };
    this.percent = make("button", { type: "button", class: "kontext-button kontext-percent kontext-zoom", title: t("zoom_fit"),
      "aria-label": t("zoom_fit"), on: { click: () => this.zoomTo(1) }, signal });
    this.picker = make("button", { type: "button", class: "kontext-button kontext-percent", title: t("next"),
      hidden: true, on: { click: () => this.next?.() }, signal });
    this.caption = make("span", { class: "kontext-caption" });
    this.bar = make("div", { class: "kontext-bar", role: "toolbar", "aria-label": t("view") },
      this.toggles.difference, this.toggles.frame, this.toggles.outline,
      onPaint ? button("brush", t("paint"), { help: t("paint_help"), signal, on: () => this.paint() }) : null,
      onEditor ? button("editor", t("mask"), { help: t("mask_help"), signal, on: onEditor }) : null,
      this.caption, this.picker,
      button("minus", t("zoom_out"), { signal, on: () => this.zoomTo(this.zoom / 1.5) }), this.percent,
      button("plus", t("zoom_in"), { signal, on: () => this.zoomTo(this.zoom * 1.5) }),
      onLarge ? button("large", t("large"), { signal, on: onLarge }) : null);
    this.element = make("div", { class: "kontext-stage" }, this.bar, this.view);

    const listen = (target, name, listener, options = {}) => target.addEventListener(name, listener, { signal, ...options });
    listen(this.view, "pointerdown", (event) => this.#down(event));
    listen(this.view, "pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      listen(this.view, name, (event) => {
        this.pointers.delete(event.pointerId);
        this.painter?.up();
      });
    }
    // the host listens to fingers above the nodes, as the event goes down: a pinch here would zoom the graph too
    for (const name of ["touchstart", "touchmove", "touchend", "touchcancel"]) {
      listen(window, name, (event) => { if (this.view.contains(event.target)) event.stopPropagation(); }, { capture: true });
    }
    // Nodes 2.0 gives the graph every wheel that does not begin in an element with this mark
    listen(this.element, "focusin", () => { this.element.dataset.captureWheel = "true"; });
    listen(this.element, "focusout", ({ relatedTarget }) => {
      if (!this.element.contains(relatedTarget)) delete this.element.dataset.captureWheel;
    });
    listen(this.view, "wheel", (event) => this.#wheel(event), { passive: false });
    listen(this.view, "dblclick", (event) => { event.stopPropagation(); this.zoomTo(this.zoom > 1 ? 1 : 3, event); });
    listen(this.element, "keydown", (event) => this.#key(event));
    for (const image of [this.beforeImage, this.afterImage]) listen(image, "load", () => this.layout());
    this.resizing = new ResizeObserver(() => this.layout());
    this.resizing.observe(this.view);
    this.#paint();
  }

  /** Remove every listener. */
  destroy() {
    this.painter?.end();
    this.abort.abort();
    this.resizing.disconnect();
    this.element.remove();
  }

  /**
   * Show pictures by their addresses.
   * @param {{before?: string, after?: string, mask?: {url: string, channel: string}, caption?: string, fit?: object, count?: number,
   *   index?: number, next?: () => void}} what `fit` is one of the plan route's fits
   */
  show({ before = null, after = null, mask = null, caption = "", fit = null, count = 1, index = 0, next = null }) {
    this.shown = { before, after };
    const set = (image, url) => {
      image.hidden = !url;
      if (url && image.getAttribute("src") !== url) image.src = url;
      if (!url) image.removeAttribute("src");
    };
    set(this.beforeImage, before);
    set(this.afterImage, after);
    this.caption.textContent = caption;
    this.next = next;
    this.picker.hidden = count < 2;
    this.picker.textContent = `${index + 1}/${count}`;
    this.picker.setAttribute("aria-label", t("picture_of", { number: index + 1, count }));
    this.setFit(fit);
    if (mask?.url !== this.maskUrl) this.#loadMask(mask);
    this.layout();
  }

  /** What the model will see of the picture; null for nothing. */
  setFit(fit) {
    this.fit = fit;
    this.layout();
  }

  /** Turn "difference", "frame" or "outline" on or off. */
  toggle(key, on = !this.state[key]) {
    this.state[key] = on;
    this.layout();
  }

  /** Paint a mask over the picture; a mask that is known is where it begins. */
  paint() {
    if (this.painter) return this.painter.end();
    const image = this.shown.before ? this.beforeImage : this.afterImage;
    if (!image.naturalWidth) return undefined;
    this.toggle("difference", false);
    this.view.classList.add("kontext-painting");
    this.painter = new Painter(this, { size: [image.naturalWidth, image.naturalHeight], start: this.mask ?? null,
      onUse: this.onPaint, onEnd: () => {
        this.painter = null;
        this.view.classList.remove("kontext-painting");
        this.view.removeAttribute("tabindex");
        this.#paint();
      } });
    this.pictures.append(this.painter.canvas, this.painter.ring);
    this.bar.after(this.painter.bar);
    this.view.tabIndex = 0;
    this.view.focus({ preventScroll: true });
    this.#paint();
    return undefined;
  }

  /** Where an event is on the picture, in 0..1 of its sides. */
  toPicture(event) {
    const box = this.view.getBoundingClientRect();
    const scale = this.#shownScale(box);
    const place = (at, start, side, axis, offset, whole, length) =>
      (((at - start) / scale - side / 2 - this.pan[axis]) / this.zoom + whole / 2 - offset) / length;
    const { width, height, left, top, pictureWidth, pictureHeight } = this.box;
    return [place(event.clientX, box.left, this.view.clientWidth, 0, left, width, pictureWidth),
      place(event.clientY, box.top, this.view.clientHeight, 1, top, height, pictureHeight)];
  }

  /** Put the divider at a percentage of the picture. */
  setPosition(percent) {
    this.position = Math.min(100, Math.max(0, percent));
    this.#paint();
  }

  /** Zoom about a point of the view (its middle without one). */
  zoomTo(zoom, event = null) {
    zoom = Math.min(MAX_ZOOM, Math.max(1, zoom));
    const box = this.view.getBoundingClientRect();
    const scale = this.#shownScale(box);
    const at = event ? [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale]
      : [this.view.clientWidth / 2, this.view.clientHeight / 2];
    const middle = [this.view.clientWidth / 2, this.view.clientHeight / 2];
    this.pan = this.pan.map((pan, axis) => at[axis] - middle[axis] - (at[axis] - middle[axis] - pan) * (zoom / this.zoom));
    if (zoom === 1) this.pan = [0, 0];
    this.zoom = zoom;
    this.#paint();
  }

  /** Fit the picture (and the frame around it) into the view. */
  layout() {
    const image = this.shown.after ? this.afterImage : this.beforeImage;
    const [width, height] = [image.naturalWidth || 1, image.naturalHeight || 1];
    const frame = this.fit && this.state.frame ? frameOf(this.fit, width, height) : null;
    const left = Math.min(0, frame?.x ?? 0);
    const top = Math.min(0, frame?.y ?? 0);
    const right = Math.max(width, frame ? frame.x + frame.width : 0);
    const bottom = Math.max(height, frame ? frame.y + frame.height : 0);
    const scale = Math.min(this.view.clientWidth / (right - left), this.view.clientHeight / (bottom - top)) || 0;
    this.box = { width: (right - left) * scale, height: (bottom - top) * scale, left: -left * scale, top: -top * scale,
      pictureWidth: width * scale, pictureHeight: height * scale };
    this.#drawFrame(frame, { left, top, right, bottom, width, height });
    this.#paint();
  }

  #drawFrame(frame, { left, top, right, bottom, width, height }) {
    this.frameLayer.replaceChildren();
    if (!frame) return;
    const unit = (right - left) / 100;
    this.frameLayer.setAttribute("viewBox", `${left} ${top} ${right - left} ${bottom - top}`);
    const rectangle = (x, y, w, h) => `M${x} ${y}h${w}v${h}h${-w}z`;
    const inside = rectangle(frame.x, frame.y, frame.width, frame.height);
    this.frameLayer.append(
      makeSvg("path", { class: "kontext-cropped", "fill-rule": "evenodd", d: rectangle(0, 0, width, height)
        + clip(frame, width, height, rectangle) }),
      makeSvg("path", { class: "kontext-padded", "fill-rule": "evenodd", d: inside
        + clip(frame, width, height, rectangle) }),
      makeSvg("path", { class: "kontext-seen", d: inside, "stroke-width": unit * 0.6 }),
    );
  }

  #paint() {
    const { both, difference } = { both: Boolean(this.shown.before && this.shown.after),
      difference: this.state.difference };
    const box = this.box ?? { width: 0, height: 0, left: 0, top: 0, pictureWidth: 0, pictureHeight: 0 };
    Object.assign(this.world.style, { width: `${box.width}px`, height: `${box.height}px`,
      transform: `translate(-50%, -50%) translate(${this.pan[0]}px, ${this.pan[1]}px) scale(${this.zoom})` });
    for (const layer of [this.pictures, this.border]) {
      Object.assign(layer.style, { left: `${box.left}px`, top: `${box.top}px`, width: `${box.pictureWidth}px`,
        height: `${box.pictureHeight}px` });
    }
    this.view.classList.toggle("kontext-pixels", this.zoom >= 6);
    this.pictures.classList.toggle("kontext-difference", both && difference);
    const sliding = both && !difference && !this.painter;
    this.afterImage.style.visibility = this.painter && both ? "hidden" : "";
    this.beforeImage.style.clipPath = sliding ? `inset(0 ${100 - this.position}% 0 0)` : "none";
    this.handle.hidden = !sliding;
    for (const label of this.labels) label.hidden = !sliding;
    this.labels[0].style.opacity = this.position < 12 ? 0 : 1;
    this.labels[1].style.opacity = this.position > 88 ? 0 : 1;
    const left = this.view.clientWidth / 2 + this.pan[0]
      + this.zoom * (box.left - box.width / 2 + (box.pictureWidth * this.position) / 100);
    this.handle.style.left = `${Math.min(this.view.clientWidth, Math.max(0, left))}px`;
    this.handle.setAttribute("aria-valuenow", Math.round(this.position));
    this.handle.setAttribute("aria-valuetext", t("slider_value", { percent: Math.round(this.position) }));
    this.percent.textContent = `${Math.round(this.zoom * 100)} %`;
    this.border.hidden = !(this.maskUrl && this.state.outline) || Boolean(this.painter);
    const usable = { difference: both, frame: Boolean(this.fit), outline: Boolean(this.maskUrl) };
    for (const [key, element] of Object.entries(this.toggles)) {
      element.hidden = !usable[key];
      element.setAttribute("aria-pressed", String(this.state[key]));
    }
  }

  /** Screen pixels for a CSS pixel of the view: the host scales nodes with its canvas. */
  #shownScale(box) {
    return box.width / (this.view.clientWidth || 1) || 1;
  }

  #slideTo(event) {
    this.setPosition(this.toPicture(event)[0] * 100);
  }

  #down(event) {
    if (event.button !== 0) return;
    event.stopPropagation();
    event.preventDefault();
    if (this.painter) {
      this.view.focus({ preventScroll: true });
      this.view.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
      if (this.pointers.size === 1) this.painter.down(event);
      return;
    }
    this.handle.hidden ? this.toggles.difference.focus({ preventScroll: true }) : this.handle.focus({ preventScroll: true });
    this.view.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    this.dragging = this.handle.contains(event.target) || (this.zoom === 1 && !this.handle.hidden) ? "slide" : "pan";
    if (this.dragging === "slide") this.#slideTo(event);
  }

  #move(event) {
    if (this.painter && this.pointers.size < 2) {
      this.painter.move(event);
      event.stopPropagation();
      return;
    }
    const last = this.pointers.get(event.pointerId);
    if (!last) return;
    event.stopPropagation();
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    const now = [event.clientX, event.clientY];
    this.pointers.set(event.pointerId, now);
    if (other) {
      const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      const middle = { clientX: (now[0] + other[0]) / 2, clientY: (now[1] + other[1]) / 2 };
      this.zoomTo(this.zoom * (distance(now) / distance(last)), middle);
    } else if (this.dragging === "slide") {
      this.#slideTo(event);
    } else {
      this.#panBy(now.map((n, axis) => (n - last[axis]) / this.#shownScale(this.view.getBoundingClientRect())));
    }
  }

  #panBy(delta) {
    const room = [this.box.width, this.box.height].map((n) => (n * this.zoom) / 2);
    this.pan = this.pan.map((pan, axis) => Math.min(room[axis], Math.max(-room[axis], pan + delta[axis])));
    this.#paint();
  }

  #wheel(event) {
    if (this.passWheel && !this.element.contains(document.activeElement)) {
      this.passWheel(event);
      return;
    }
    event.preventDefault();
    event.stopPropagation();
    this.zoomTo(this.zoom * Math.exp(-event.deltaY / 400), event);
  }

  #key(event) {
    const step = event.shiftKey ? 40 : 2;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    const isUndo = this.painter && event.key.toLowerCase() === "z";
    if ((event.ctrlKey || event.metaKey || event.altKey) && !isUndo) return;
    if (this.painter && event.target === this.view && this.painter.key(event)) {
      event.preventDefault();
      event.stopPropagation();
      return;
    }
    if (event.target.tagName === "INPUT") {
      event.stopPropagation();
      return;
    }
    if (move && event.shiftKey) this.#panBy(move.map((n) => -n * step));
    else if (move) this.setPosition(this.position + (move[0] || -move[1]) * step);
    else if (event.key === "Home") this.setPosition(0);
    else if (event.key === "End") this.setPosition(100);
    else if (event.key === "PageUp") this.setPosition(this.position + 10);
    else if (event.key === "PageDown") this.setPosition(this.position - 10);
    else if (event.key === "+" || event.key === "=") this.zoomTo(this.zoom * 1.5);
    else if (event.key === "-") this.zoomTo(this.zoom / 1.5);
    else if (event.key === "0") this.zoomTo(1);
    else if (event.key.toLowerCase() === "d") this.toggle("difference");
    else if (event.key.toLowerCase() === "f") this.toggle("frame");
    else if (event.key.toLowerCase() === "o") this.toggle("outline");
    else if (event.key !== "Delete" && event.key !== "Backspace") return;
    event.preventDefault();
    event.stopPropagation(); // the host's own keys, such as Delete for the node, stay out of here
  }

  async #loadMask(mask) {
    this.maskUrl = mask?.url;
    this.mask = null;
    if (!mask) return;
    const read = await readMask(mask);
    if (this.maskUrl !== mask.url || !read) return;
    this.mask = read;
    drawBorder(this.border, read);
  }
}

/** Where the model's canvas lies, in pixels of the picture that is shown (which may be smaller than the source). */
function frameOf(fit, width, height) {
  const [sx, sy] = [fit.window[2] / fit.content[2], fit.window[3] / fit.content[3]];
  const [kx, ky] = [width / fit.source[0], height / fit.source[1]];
  return { x: (fit.window[0] - fit.content[0] * sx) * kx, y: (fit.window[1] - fit.content[1] * sy) * ky,
    width: fit.size[0] * sx * kx, height: fit.size[1] * sy * ky };
}

function clip(frame, width, height, rectangle) {
  const x = Math.max(0, frame.x);
  const y = Math.max(0, frame.y);
  return rectangle(x, y, Math.min(width, frame.x + frame.width) - x, Math.min(height, frame.y + frame.height) - y);
}

/** A stage over the whole window, closed by its button, Escape or a click beside it. */
export function openLarge(what, title) {
  const previous = document.activeElement;
  const stage = new Stage();
  const abort = new AbortController();
  const close = () => {
    abort.abort();
    stage.destroy();
    dialog.remove();
    previous?.focus?.();
  };
  const dialog = make("div", { class: "kontext-dialog", role: "dialog", "aria-modal": "true", "aria-label": title },
    make("div", { class: "kontext-sheet" },
      make("div", { class: "kontext-title" }, make("span", { text: title }),
        button("close", t("close"), { on: close, signal: abort.signal })),
      stage.element));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Tab") keepInside(dialog, event);
    event.stopPropagation();
  }, { signal: abort.signal });
  dialog.addEventListener("pointerdown", (event) => event.target === dialog && close(), { signal: abort.signal });
  document.body.append(dialog);
  stage.show(what);
  (stage.handle.hidden ? dialog.querySelector("button") : stage.handle).focus();
  return close;
}

function keepInside(dialog, event) {
  const stops = [...dialog.querySelectorAll("button, [tabindex]")].filter((one) => one.offsetParent !== null);
  const edge = event.shiftKey ? stops[0] : stops.at(-1);
  if (document.activeElement !== edge) return;
  event.preventDefault();
  (event.shiftKey ? stops.at(-1) : stops[0]).focus();
}

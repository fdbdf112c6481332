/** Making elements. Text is only ever set as text: nothing in this pack writes HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element with attributes and children.
 * `class`, `text`, `on` ({event: listener}) are taken as such, everything else as an attribute; null and false are
 * left out.
 */
export function make(tag, { on = {}, text, signal, ...attributes } = {}, ...children) {
  return fill(document.createElement(tag), { on, text, signal, ...attributes }, children);
}

/** The same for SVG. */
export function makeSvg(tag, { on = {}, text, signal, ...attributes } = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), { on, text, signal, ...attributes }, children);
}

function fill(element, { on, text, signal, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : String(value));
  }
  if (text !== undefined) element.textContent = text;
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener, { signal });
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Outlines on a 16 × 16 grid.
const ICONS = {
  slide: "M8 1v14M5 5 2 8l3 3M11 5l3 3-3 3",
  difference: "M3 5.5h6M6 2.5v6M8 13h5",
  frame: "M4 1v11h11M1 4h11v11",
  outline: "M3 8c0-4 2-6 5-6s5 2 5 5-1 7-5 7-5-2-5-6z",
  plus: "M8 3v10M3 8h10",
  minus: "M3 8h10",
  fit: "M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4",
  large: "M9 2h5v5M14 2 8.5 7.5M7 14H2V9M2 14l5.5-5.5",
  play: "M4.500 2.500v11l9-5.500z",
  close: "M3 3l10 10M13 3 3 13",
  brush: "M14 2 7 9M6 9c-2 0-2 2-2.500 3S2 14 2 14s4 .5 5.500-1S8 9 6 9z",
  erase: "M6 13 2 9l7-7 5 5-6 6zM5.500 6l5 5M6 13h8",
  undo: "M5 3 2 6l3 3M2 6h7a4 4 0 0 1 0 8H6",
  invert: "M8 2a6 6 0 1 0 0 12zM8 2a6 6 0 0 1 0 12",
  editor: "M2 3h12v10H2zM5 10l2-2 2 2 3-4",
  wand: "M2 14 10 6M11 2v3M14 5h-3M13.500 9.500l-1-1M7 2.500l1 1",
  quote: "M3 11c2 0 3-1 3-4V4H3v3h3M10 11c2 0 3-1 3-4V4h-3v3h3",
  branch: "M4 2v12M4 10c6 0 8-2 8-6M12 4m-2 0 2-2 2 2",
  redo: "M13 8a5 5 0 1 1-1.500-3.500M12 1v4H8",
  compare: "M2 3h5v10H2zM9 3h5v10H9z",
  strip: "M1 4h14v8H1zM6 4v8M10.500 4v8",
  save: "M8 2v8M4.500 7 8 10.500 11.500 7M2 14h12",
  trash: "M2 4h12M6 4V2h4v2M4 4l1 10h6l1-10",
  warning: "M8 2 15 14H1zM8 6.500v3.500M8 12v.5",
  next: "M6 3l5 5-5 5",
};

/** One of the pack's own icons; a screen reader passes over it. */
export function icon(name) {
  return makeSvg("svg", { viewBox: "0 0 16 16", class: "kontext-icon", "aria-hidden": "true" },
    makeSvg("path", { d: ICONS[name] }));
}

/** A button with an icon, a label (shown when `wide`) and a help text. */
export function button(name, label, { help = label, wide = false, on, signal, ...rest } = {}) {
  return make("button", {
    type: "button", class: `kontext-button${wide ? " kontext-wide" : ""}`, title: help,
    "aria-label": wide ? null : help, on: { click: on }, signal, ...rest,
  }, icon(name), wide ? make("span", { text: label }) : null);
}

/** Load the stylesheet that lies beside these modules, once. */
export function loadStyle() {
  const href = new URL("../css/kontext.css", import.meta.url).href;
  if ([...document.styleSheets].some((sheet) => sheet.href === href)) return;
  document.head.append(make("link", { rel: "stylesheet", href, "data-kontext": "style" }));
}

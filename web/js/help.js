/** Help with the instruction: presets in the wording that Kontext follows best, and quotation marks. */

import { button, make, makeSvg } from "./dom.js";
import { ask, setValue, value, widget } from "./host.js";
import { sayHint } from "./forecast.js";
import { currentLanguage, t } from "./text.js";

const LANGUAGES = ["en", "zh", "ja"];
let presets = null;
let closeOpen = null;

/** Open the presets beside a button; `use` gets the instruction that was made. */
export async function openHelp(beside, use) {
  const again = closeOpen?.beside === beside;
  closeOpen?.();
  if (again) return;
  presets ??= (await ask("presets")).presets;
  if (!beside.isConnected) return; // its node has gone meanwhile
  const abort = new AbortController();
  const signal = abort.signal;
  const language = Math.max(0, LANGUAGES.indexOf(currentLanguage().slice(0, 2)));
  const cards = make("div", { class: "kontext-cards", role: "radiogroup", "aria-label": t("presets") });
  const form = make("div", { class: "kontext-form" });
  const result = make("p", { class: "kontext-result", role: "status" });
  const hints = make("ul", { class: "kontext-notes" });
  const insert = make("button", { type: "button", class: "kontext-button kontext-wide kontext-primary",
    text: t("insert"), on: { click: () => { use(result.textContent); close(); } }, signal });
  const popover = make("div", { class: "kontext-popover", role: "dialog", "aria-label": t("presets") },
    make("div", { class: "kontext-title", style: "padding:0" }, make("span", { text: t("presets") }),
      button("close", t("close"), { on: () => close(), signal })), cards, form, result, hints, insert);
  const close = () => {
    abort.abort();
    popover.remove();
    closeOpen = null;
    beside.focus?.();
  };
  close.beside = beside;
  closeOpen = close;

  let number = 0;
  const update = async (preset) => {
    const asked = ++number;
    const values = Object.fromEntries([...form.querySelectorAll("input")].map((field) => [field.name, field.value]));
    const answer = await ask("prompt", { preset: preset.name, values });
    if (asked !== number) return;
    result.textContent = answer.prompt;
    hints.replaceChildren(...answer.hints.map((hint) => make("li", { class: "kontext-note", text: sayHint(hint) })));
  };
  const choose = (preset, card) => {
    for (const other of cards.children) {
      other.setAttribute("aria-checked", String(other === card));
      other.tabIndex = other === card ? 0 : -1;
    }
    form.replaceChildren(...preset.slots.flatMap((slot, index) => {
      const id = `kontext-slot-${index}`;
      return [make("label", { for: id, text: slot.labels[language] }), make("input", { id, name: slot.name, type: "text",
        class: "kontext-field", placeholder: slot.default, on: { input: () => update(preset) }, signal })];
    }));
    return update(preset);
  };
  for (const preset of presets) {
    const card = make("button", { type: "button", class: "kontext-card", role: "radio", "aria-checked": "false",
      "data-preset": preset.name, on: { click: () => choose(preset, card) }, signal },
    thumbnail(preset.name), make("span", { text: preset.labels[language] }));
    cards.append(card);
  }
  cards.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 3, ArrowLeft: -1, ArrowUp: -3 }[event.key];
    if (!step) return;
    event.preventDefault();
    const all = [...cards.children];
    const next = all[(all.indexOf(document.activeElement) + step + all.length) % all.length];
    next.focus();
    next.click();
  }, { signal });
  popover.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && event.target.tagName === "INPUT") {
      event.preventDefault(); // else the key presses the button that has the focus then
      insert.click();
    }
    event.stopPropagation();
  }, { signal });
  for (const name of ["pointerdown", "wheel"]) popover.addEventListener(name, (event) => event.stopPropagation(), { signal });
  document.addEventListener("pointerdown", (event) => {
    if (!popover.contains(event.target) && !beside.contains(event.target)) close();
  }, { signal, capture: true });

  document.body.append(popover);
  await choose(presets[0], cards.firstElementChild);
  if (signal.aborted) return;
  place(popover, beside);
  cards.firstElementChild.focus({ preventScroll: true });
}

/** Close the presets if they were opened from inside an element. */
export function closeHelp(element) {
  if (closeOpen && element.contains(closeOpen.beside)) closeOpen();
}

function place(popover, beside) {
  const at = beside.getBoundingClientRect();
  const box = popover.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left), innerWidth - box.width - 8);
  const below = at.bottom + 6;
  const top = below + box.height < innerHeight - 8 ? below : Math.max(8, at.top - box.height - 6);
  Object.assign(popover.style, { left: `${left}px`, top: `${Math.min(top, innerHeight - Math.min(box.height, innerHeight) )}px` });
}

/** Put the words that are selected in a prompt between quotation marks that do not occur in them. */
export function quoteSelection(node, name) {
  // Nodes 2.0 draws a text field of its own and leaves the widget's out of the page
  const fields = [widget(node, name)?.inputEl, widget(node, name)?.element,
    document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"] textarea`)];
  const text = String(value(node, name) ?? "");
  const area = fields.filter((field) => field?.isConnected)
    .map((field) => (field.tagName === "TEXTAREA" ? field : field.querySelector("textarea"))).find(Boolean);
  if (!area || area.selectionStart === area.selectionEnd) return false;
  const [start, end] = [area.selectionStart, area.selectionEnd];
  const words = text.slice(start, end);
  const [open, shut] = [["'", "'"], ['"', '"'], ["“", "”"]].find((pair) => !pair.some((mark) => words.includes(mark)))
    ?? ["“", "”"];
  setValue(node, name, text.slice(0, start) + open + words + shut + text.slice(end));
  return true;
}

/** A small drawing of what a preset does: the left half before, the right half after. */
function thumbnail(name) {
  const svg = makeSvg("svg", { viewBox: "0 0 78 40", "aria-hidden": "true" });
  const box = (x, y, width, height, fill, more = {}) => svg.append(makeSvg("rect", { x, y, width, height, fill, ...more }));
  const dot = (cx, cy, r, fill, more = {}) => svg.append(makeSvg("circle", { cx, cy, r, fill, ...more }));
  const line = (d, stroke, width = 2, fill = "none") => svg.append(makeSvg("path", { d, stroke, "stroke-width": width, fill,
    "stroke-linecap": "round" }));
  const word = (x, text, fill, size = 11) => svg.append(makeSvg("text", { x, y: 24, fill, "font-size": size,
    "font-weight": 700, "text-anchor": "middle", "font-family": "sans-serif", text }));
  const hill = (x, sky, ground, sun) => {
    box(x, 0, 39, 40, sky);
    dot(x + 28, 11, 5, sun);
    svg.append(makeSvg("path", { d: `M${x} 40V30q10-10 20-2t19-4v16z`, fill: ground }));
  };
  const face = (x, smile, back = "#7aa3c9") => {
    box(x, 0, 39, 40, back);
    dot(x + 19.5, 20, 13, "#f1c9a5");
    dot(x + 15, 17, 1.6, "#333");
    dot(x + 24, 17, 1.6, "#333");
    line(`M${x + 14} 25q5.500 ${smile} 11 0`, "#333", 1.6);
  };
  const figure = (x, arms) => {
    box(x, 0, 39, 40, "#7aa3c9");
    dot(x + 19.5, 10, 4.5, "#f1c9a5");
    line(`M${x + 19.5} 15v12M${x + 19.5} 27l-5 9M${x + 19.5} 27l5 9${arms}`, "#3a2e5c", 3);
  };
  const sign = (x, text) => {
    box(x, 0, 39, 40, "#5b6b53");
    box(x + 4, 11, 31, 18, "#f4eeda", { rx: 2 });
    word(x + 19.5, text, "#333");
  };
  const draw = {
    relight: () => { hill(0, "#8fb7d8", "#5d8a57", "#fff6d0"); hill(39, "#f08a4b", "#6b4a3a", "#ffe08a"); },
    remove_background: () => { hill(0, "#8fb7d8", "#5d8a57", "#fff6d0"); box(39, 0, 39, 40, "#fff"); dot(16, 22, 8, "#c0392b");
      dot(55, 22, 8, "#c0392b"); },
    product_shot: () => { box(0, 0, 39, 40, "#8a6f55"); box(39, 0, 39, 40, "#f3f3f3"); box(39, 29, 39, 11, "#dedede");
      for (const x of [13, 52]) { box(x, 13, 12, 20, "#2a6f7f", { rx: 3 }); box(x + 3.5, 8, 5, 6, "#2a6f7f"); } },
    restyle: () => { hill(0, "#8fb7d8", "#5d8a57", "#fff6d0"); hill(39, "#cfe6ea", "#a9cf9d", "#f8d9b0");
      line("M42 8q10 5 20 0M44 16q12 4 28-1M42 33q14-5 32 2", "#ffffff90", 3); },
    pose: () => { figure(0, "M19.500 18l-8 8M19.500 18l8 8"); figure(39, "M58.500 18l-9-9M58.500 18l9-9"); },
    expression: () => { face(0, 0); face(39, 7); },
    replace_text: () => { sign(0, "OLD"); sign(39, "NEW"); },
    add_text: () => { sign(0, ""); sign(39, "NEW"); },
    remove_text: () => { sign(0, "OLD"); sign(39, ""); },
  };
  (draw[name] ?? draw.relight)();
  line("M39 0v40", "#fff", 1);
  return svg;
}

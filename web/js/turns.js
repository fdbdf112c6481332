/** The sidebar's list of every edit: look, compare, branch, do again, save. Only the rows in sight exist. */

import { button, make } from "./dom.js";
import { app, origin, setValue, toast, uploadBlob, value } from "./host.js";
import { sessionsOf } from "./sessions.js";
import { Stage } from "./stage.js";
import { t } from "./text.js";

const ROW = 104;
const ADDRESSES = 80; // pictures held at most
const STRIP = { height: 256, width: 8000, most: 2000 }; // pixels of a picture and of a row; a canvas holds no more
const GAP = 8;
const CAPTION = 40;
const MARGIN = 4; // rows beyond the visible ones

export class TurnsPanel {
  constructor(store, parent) {
    Object.assign(this, { store, abort: new AbortController(), selected: null, against: null, rows: new Map(),
      addresses: new Map() });
    const signal = this.abort.signal;
    this.stage = new Stage();
    this.stage.element.hidden = true;
    this.count = make("span", { class: "kontext-caption", role: "status" });
    this.space = make("div");
    this.list = make("div", { class: "kontext-list", role: "listbox", tabindex: 0, "aria-label": t("turns") }, this.space);
    this.empty = make("p", { class: "kontext-empty", text: t("turns_empty") });
    this.bar = make("div", { class: "kontext-bar", role: "toolbar", "aria-label": t("turns") }, this.count,
      button("strip", t("strip"), { help: t("strip_help"), signal, on: () => this.saveStrip() }),
      button("save", t("workflow"), { help: t("workflow_help"), signal, on: () => this.saveWorkflow() }),
      button("trash", t("clear"), { help: t("clear_help"), signal, on: () => this.clear() }));
    this.element = make("div", { class: "kontext-turns" }, this.stage.element, this.bar, this.empty, this.list);
    parent.replaceChildren(this.element);
    this.list.addEventListener("scroll", () => this.draw(), { signal, passive: true });
    this.list.addEventListener("keydown", (event) => this.#key(event), { signal });
    store.addEventListener("change", () => this.update(), { signal });
    this.resizing = new ResizeObserver(() => this.draw());
    this.resizing.observe(this.list);
    this.update();
  }

  /** Remove every listener. */
  destroy() {
    this.abort.abort();
    this.resizing.disconnect();
    this.stage.destroy();
    for (const url of this.addresses.values()) if (url?.startsWith("blob:")) URL.revokeObjectURL(url);
    this.element.remove();
  }

  /** The list has changed. */
  update() {
    const { turns } = this.store;
    this.count.textContent = turns.length ? t("turns_count", { count: turns.length }) : "";
    this.empty.hidden = turns.length > 0;
    this.space.style.height = `${turns.length * ROW}px`;
    for (const one of this.bar.querySelectorAll("button")) one.disabled = turns.length === 0;
    if (!turns.includes(this.selected)) this.select(null);
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    this.draw();
  }

  /** Make the rows that are in sight, newest first, and drop the others. */
  draw() {
    const { turns } = this.store;
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - MARGIN);
    const last = Math.min(turns.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + MARGIN);
    for (const [index, row] of this.rows) {
      if (index >= first && index < last) continue;
      row.remove();
      this.rows.delete(index);
    }
    for (let index = first; index < last; index++) {
      if (this.rows.has(index)) continue;
      const row = this.#row(turns[turns.length - 1 - index], turns.length - index, index);
      this.rows.set(index, row);
      this.list.append(row);
    }
    this.#mark();
  }

  #row(turn, number, index) {
    const facts = [`#${number}`, turn.seconds === null ? null : t("seconds", { seconds: turn.seconds }),
      turn.drift === null ? null : t("drift", { psnr: turn.drift }),
      turn.seed === null ? null : t("seed", { seed: turn.seed })].filter(Boolean).join(" · ");
    const act = (name, key, on) => button(name, t(key), { help: t(`${key}_help`), on: (event) => {
      event.stopPropagation();
      on();
    } });
    const row = make("div", { class: "kontext-turn", role: "option", id: `kontext-turn-${turn.id}`, "aria-selected": "false",
      "aria-setsize": this.store.turns.length, "aria-posinset": index + 1,
      on: { click: (event) => this.select(turn, event.shiftKey || event.ctrlKey || event.metaKey) } },
    make("img", { class: "kontext-thumb", alt: "", src: turn.thumb }),
    make("div", { class: "kontext-about" },
      make("div", { class: "kontext-words", text: turn.prompt || "—", title: turn.prompt }),
      make("div", { class: "kontext-facts", text: facts, title: `${facts}\n${t("drift_help")}` }),
      make("div", { class: "kontext-acts" }, act("compare", "compare", () => this.select(turn, true)),
        act("branch", "branch", () => this.branch(turn)), act("redo", "redo", () => this.redo(turn)))));
    row.style.top = `${index * ROW}px`;
    row.turn = turn;
    if (!turn.thumb) { // its small picture is not made yet, or could not be
      this.#reachable(turn.after, null).then((found) => { if (found) row.firstElementChild.src = found.url; });
    }
    return row;
  }

  #mark() {
    for (const row of this.rows.values()) {
      row.setAttribute("aria-selected", String(row.turn === this.selected || row.turn === this.against));
    }
    if (this.selected) this.list.setAttribute("aria-activedescendant", `kontext-turn-${this.selected.id}`);
    else this.list.removeAttribute("aria-activedescendant");
  }

  /** Show a turn against the picture it began with, or (`compare`) against the turn that is chosen. */
  async select(turn, compare = false) {
    if (compare && this.selected && turn !== this.selected) this.against = turn;
    else [this.selected, this.against] = [turn, null];
    this.stage.element.hidden = !this.selected;
    this.#mark();
    if (!this.selected) return;
    const { turns } = this.store;
    const number = (one) => `#${turns.indexOf(one) + 1}`;
    const [left, right] = this.against ? [this.selected, this.against].sort((a, b) => turns.indexOf(a) - turns.indexOf(b))
      : [null, this.selected];
    const asked = (this.asked = {});
    const after = await this.#reachable(right.after, right.thumb);
    const before = left ? await this.#reachable(left.after, left.thumb)
      : right.before && await this.#reachable(right.before, right.thumbBefore);
    if (asked !== this.asked || this.abort.signal.aborted) return;
    this.stage.show({ before: before?.url, after: after?.url,
      caption: [left ? `${number(left)} | ${number(right)}` : number(right), after?.gone ? t("gone") : right.size?.join(" × ")]
        .filter(Boolean).join(" · ") });
  }

  /** A picture's address and whether only the small one is left; the last few copies are held. */
  async #reachable(ref, thumb) {
    if (!ref) return null;
    if (!this.addresses.has(ref.filename)) this.addresses.set(ref.filename, await this.store.address(ref));
    const url = this.addresses.get(ref.filename);
    for (const [name, old] of [...this.addresses].slice(0, -ADDRESSES)) {
      if (old?.startsWith("blob:")) URL.revokeObjectURL(old);
      this.addresses.delete(name);
    }
    if (url) return { url, gone: false };
    return thumb ? { url: thumb, gone: true } : null;
  }

  #key(event) {
    const { turns } = this.store;
    const step = { ArrowDown: -1, ArrowUp: 1, PageDown: -5, PageUp: 5, Home: Infinity, End: -Infinity }[event.key];
    if (step === undefined || !turns.length || event.target !== this.list) return;
    event.preventDefault();
    event.stopPropagation();
    const now = this.selected ? turns.indexOf(this.selected) : turns.length;
    const next = turns[Math.min(turns.length - 1, Math.max(0, now + step))];
    const top = (turns.length - 1 - turns.indexOf(next)) * ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + ROW - this.list.clientHeight;
    this.draw();
    this.select(next, event.shiftKey);
  }

  /** Write a turn's picture, prompt and seed into the graph. */
  async branch(turn, from = turn.after) {
    const edit = findEdit();
    if (!edit) {
      toast("warn", t("branch"), t("no_edit"));
      return null;
    }
    setValue(edit, "prompt", turn.prompt);
    if (turn.seed !== null) setValue(edit, "seed", turn.seed);
    const picture = from && await this.store.picture(from);
    if (from && !picture) {
      toast("warn", t("branch"), t("gone_branch"));
      return null;
    }
    if (picture) await putPicture(edit, picture, from.filename);
    toast("success", t("branch"), t("branched"), 4000);
    return edit;
  }

  /** Do a turn again from the same start with another seed. */
  async redo(turn) {
    const edit = await this.branch(turn, turn.start ?? turn.before);
    if (!edit) return;
    setValue(edit, "seed", Math.floor(Math.random() * 2 ** 48));
    await app.queuePrompt(0, 1);
  }

  /** Save every turn's picture as one PNG, in rows, with its instruction below it. */
  async saveStrip() {
    const { turns } = this.store;
    const shown = turns.slice(-STRIP.most);
    const widths = shown.map(({ size }) => Math.min(STRIP.width, Math.round(((size?.[0] ?? 1) / (size?.[1] ?? 1)) * STRIP.height)));
    const places = [];
    let [x, y, right] = [GAP, GAP, 0];
    for (const width of widths) {
      if (x > GAP && x + width + GAP > STRIP.width) [x, y] = [GAP, y + STRIP.height + CAPTION];
      places.push([x, y]);
      x += width + GAP;
      right = Math.max(right, x);
    }
    const canvas = document.createElement("canvas");
    canvas.width = right;
    canvas.height = y + STRIP.height + CAPTION - GAP;
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.font = "13px sans-serif";
    context.fillStyle = "#222";
    for (const [index, turn] of shown.entries()) { // one after another: whole pictures of a long session are gigabytes
      const image = await load((await this.#reachable(turn.after, turn.thumb))?.url);
      const [left, top] = places[index];
      if (image) context.drawImage(image, left, top, widths[index], STRIP.height);
      context.fillText(turn.prompt, left, top + STRIP.height + 20, widths[index]);
    }
    canvas.toBlob((blob) => download(blob, "kontext-turns.png"), "image/png");
    const left = turns.length - shown.length;
    if (left) toast("warn", t("strip"), t("strip_cut", { count: shown.length, left }));
  }

  /** Save the turns as a workflow: the loaders, and for each picture that edits began with a Kontext Turns. */
  async saveWorkflow() {
    const { LiteGraph } = globalThis;
    const graph = new LiteGraph.LGraph();
    const node = (type, x, y) => {
      const made = LiteGraph.createNode(type);
      made.pos = [x, y];
      graph.add(made);
      return made;
    };
    const parts = [["KontextLoadModel", "model"], ["KontextLoadTextEncoders", "clip"], ["KontextLoadVAE", "vae"]]
      .map(([type, input], index) => [node(type, 40, 40 + index * 150), input]);
    for (const [index, { ref, lines }] of sessionsOf(this.store.turns).entries()) {
      const y = 40 + index * 760;
      const all = node("KontextTurns", 460, y);
      for (const [from, input] of parts) from.connect(0, all, slotOf(all, input));
      const picture = node("LoadImage", 40, y + 450);
      const first = await this.store.picture(ref);
      const name = first && await uploadBlob(first);
      if (name) picture.widgets.find((one) => one.name === "image").value = name;
      picture.connect(0, all, slotOf(all, "image"));
      all.connect(0, node("PreviewImage", 900, y), 0);
      all.widgets.find((one) => one.name === "instructions").value = lines.join("\n");
      all.widgets.find((one) => one.name === "chain").value = "pictures"; // as the edits were: each began with a picture
    }
    download(new Blob([JSON.stringify(graph.serialize(), null, 2)], { type: "application/json" }), "kontext-turns.json");
    for (const made of [...graph.nodes]) graph.remove(made);
  }

  async clear() {
    const message = t("clear_sure", { count: this.store.turns.length });
    const sure = await app.extensionManager.dialog.confirm({ title: t("clear"), message, type: "delete" });
    if (sure) await this.store.clear();
  }
}

function slotOf(node, name) {
  return node.inputs.findIndex((input) => input.name === name);
}

/** The Kontext Edit that is selected, else the first one. */
function findEdit() {
  const isEdit = (node) => node.comfyClass === "KontextEdit";
  return Object.values(app.canvas?.selected_nodes ?? {}).find(isEdit) ?? app.graph.nodes.find(isEdit) ?? null;
}

/** Let an edit begin with a picture: in its Load Image, or in a new one. */
async function putPicture(edit, picture, filename) {
  const name = await uploadBlob(picture, filename);
  let from = origin(edit, "image");
  if (from?.comfyClass !== "LoadImage") {
    from = globalThis.LiteGraph.createNode("LoadImage");
    from.pos = [edit.pos[0] - 340, edit.pos[1]];
    edit.graph.add(from);
    from.connect(0, edit, slotOf(edit, "image"));
  }
  const values = from.widgets.find((one) => one.name === "image")?.options?.values;
  if (Array.isArray(values) && !values.includes(name)) values.push(name);
  if (value(from, "image") !== name) setValue(from, "image", name);
}

async function load(url) {
  if (!url) return null;
  const image = new Image();
  image.src = url;
  return image.decode().then(() => image, () => null);
}

function download(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/**
 * The turns of this user, kept by the host in kontext/turns-<n>.json, fifty to a file: a new turn writes one small
 * file, however long the session is. The pictures of the newest turns (the setting kontext.turns.keep) are kept whole in
 * kontext/pictures, since the host empties its temporary folder when it starts. Tabs of one browser tell one another of
 * their turns: each has the whole list, so none writes over the others'.
 */

import { api, app, ask, viewUrl } from "./host.js";

const CHUNK = 50;
const THUMB = 96;
const FOLDER = "kontext";
const PICTURES = `${FOLDER}/pictures`;
export const KEEP = { id: "kontext.turns.keep", default: 200 };

export class TurnStore extends EventTarget {
  turns = [];
  kept = new Set(); // names of the copies
  #others = new BroadcastChannel("kontext.turns");

  constructor() {
    super();
    this.#others.onmessage = ({ data }) => this.#hear(data);
  }

  /** Another tab has a turn, or none any more. */
  #hear({ turn, kept }) {
    const at = this.turns.findIndex(({ id }) => id === turn?.id);
    if (!turn) this.turns = [];
    else if (at < 0) this.turns.push(turn);
    else Object.assign(this.turns[at], turn);
    this.kept = new Set(kept);
    this.dispatchEvent(new Event("change"));
  }

  #tell(turn) {
    this.#others.postMessage({ turn, kept: [...this.kept] });
  }

  /** Read what is kept. */
  async load() {
    const files = await api.listUserDataFullInfo(".").catch(() => []);
    const paths = files.map((file) => file.path);
    this.kept = new Set(paths.filter((path) => path.startsWith(`${PICTURES}/`)));
    const names = paths.filter((path) => /^kontext\/turns-\d+\.json$/.test(path));
    names.sort((a, b) => chunkOf(a) - chunkOf(b));
    const read = [];
    for (const name of names) {
      const response = await api.getUserData(name);
      if (response.ok) read.push(...(await response.json()).filter(isTurn));
    }
    this.turns = [...read, ...this.turns];
    this.ready = true;
    this.dispatchEvent(new Event("change"));
  }

  /** Keep an entry of nodes/host_compare.py. */
  async add(entry) {
    if (this.turns.slice(-200).some((turn) => isSame(turn, entry))) return; // the host shows it again from its cache
    const turn = {
      id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`, time: Date.now(),
      prompt: String(entry.prompt ?? ""), seed: entry.seed ?? null, seconds: entry.seconds ?? null,
      steps: entry.steps ?? null, drift: entry.drift?.psnr ?? null, size: entry.size,
      before: entry.before ?? null, start: entry.start ?? null, after: entry.after, thumb: null, thumbBefore: null,
    };
    this.turns.push(turn);
    this.#tell(turn);
    this.dispatchEvent(new Event("change"));
    await this.#keep(turn);
    [turn.thumb, turn.thumbBefore] = await Promise.all([thumbnail(turn.after), turn.before && thumbnail(turn.before)]);
    this.#tell(turn);
    await this.#save(Math.floor(this.turns.indexOf(turn) / CHUNK));
    this.dispatchEvent(new Event("change"));
  }

  /**
   * The address of a turn's picture {filename, …}: the kept copy, else the host's temporary folder, else null. Neither
   * is asked for where it is not there, which would stand in the console.
   * An address that begins with "blob:" is to be revoked by who asked.
   */
  async address(ref) {
    const copy = await this.#copy(ref);
    if (copy) return URL.createObjectURL(copy);
    return ref && (await isThere(ref)) ? viewUrl(ref) : null;
  }

  /** The picture itself as a Blob; null when it is gone. */
  async picture(ref) {
    const copy = await this.#copy(ref); // the host's policy lets no script fetch a "blob:" address
    if (copy || !ref || !(await isThere(ref))) return copy;
    const response = await fetch(viewUrl(ref)).catch(() => null);
    return response?.ok ? response.blob() : null;
  }

  async #copy(ref) {
    if (!ref || !this.kept.has(keptName(ref))) return null;
    const response = await api.getUserData(keptName(ref)).catch(() => null);
    return response?.ok ? response.blob() : null;
  }

  /** Copy a turn's pictures, and drop those of the turn that is now too old. */
  async #keep(turn) {
    const limit = Number(app.extensionManager.setting.get(KEEP.id) ?? KEEP.default);
    if (!(limit > 0)) return;
    for (const ref of [turn.after, turn.before].filter(Boolean)) {
      const picture = this.kept.has(keptName(ref)) ? null : await this.picture(ref);
      if (!picture) continue;
      const options = { overwrite: true, stringify: false, throwOnError: false };
      const stored = await api.storeUserData(keptName(ref), picture, options);
      if (stored.ok) this.kept.add(keptName(ref));
    }
    const old = this.turns.at(-1 - limit);
    if (!old) return;
    const needed = new Set(this.turns.slice(-limit).flatMap(({ after, before }) => [after, before].filter(Boolean).map(keptName)));
    await this.#drop([old], needed);
  }

  async #drop(turns, needed = new Set()) {
    const names = new Set(turns.flatMap(({ after, before }) => [after, before].filter(Boolean).map(keptName)));
    for (const name of names) {
      if (needed.has(name) || !this.kept.delete(name)) continue;
      await api.deleteUserData(name).catch(() => null);
    }
  }

  /** Forget all. */
  async clear() {
    await this.#drop(this.turns);
    const count = Math.ceil(this.turns.length / CHUNK);
    this.turns = [];
    this.#tell(null);
    for (let index = 0; index < count; index++) {
      await api.deleteUserData(`${FOLDER}/turns-${index}.json`).catch(() => null);
    }
    this.dispatchEvent(new Event("change"));
  }

  #save(index) {
    this.saving = (this.saving ?? Promise.resolve()).then(async () => {
      if (index < 0) return; // cleared meanwhile
      const part = this.turns.slice(index * CHUNK, (index + 1) * CHUNK);
      await api.storeUserData(`${FOLDER}/turns-${index}.json`, part, { overwrite: true, stringify: true, throwOnError: false });
    });
    return this.saving;
  }
}

/** Whether the host still has a picture in its temporary folder. */
async function isThere({ filename }) {
  const answer = await ask("there", { pictures: [filename] }).catch(() => null);
  return Boolean(answer?.there.includes(filename));
}

/** Where the copy of a picture lies in the host's user data. */
function keptName({ filename }) {
  return `${PICTURES}/${filename.replaceAll(/[^\w.-]/g, "_").replace(/^\.+/, "_")}`;
}

function chunkOf(path) {
  return Number(/(\d+)\.json$/.exec(path)[1]);
}

function isSame(turn, entry) {
  return turn.after.filename === entry.after.filename && turn.seed === entry.seed && turn.prompt === entry.prompt
    && turn.seconds === entry.seconds;
}

/** Whether something from a file has the shape of a turn; what has not is left out. */
function isTurn(turn) {
  const isRef = (ref) => ref === null || (typeof ref?.filename === "string" && typeof ref.type === "string");
  const isThumb = (thumb) => thumb === null || (typeof thumb === "string" && /^data:image\/(webp|png|jpeg);base64,/.test(thumb));
  return typeof turn?.prompt === "string" && turn.after && isRef(turn.after) && isRef(turn.before ?? null) && isRef(turn.start ?? null)
    && isThumb(turn.thumb ?? null) && isThumb(turn.thumbBefore ?? null);
}

async function thumbnail(ref) {
  if (!(await isThere(ref))) return null;
  const image = new Image();
  image.src = viewUrl(ref);
  try {
    await image.decode();
  } catch {
    return null; // the host has cleaned its temporary folder
  }
  const scale = Math.min(1, THUMB / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/webp", 0.8);
}

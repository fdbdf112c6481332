/** The text of Kontext Turns, one turn a line, as kontext_core/turns.py `parse_turns` reads it. */

/**
 * The sessions in a list of turns: for each picture that edits began with, {ref, lines}. A turn follows the one whose
 * picture it was given; `from 2:` stands before it where that is not the one above. A turn without a picture or
 * without words cannot be such a line: what it gave is a picture to begin with.
 */
export function sessionsOf(turns) {
  const sessions = new Map(); // name of the first picture -> {ref, lines}
  const places = new Map(); // name of a picture that a turn gave -> [its session, its line; 0 for the first picture]
  const begin = (ref) => {
    if (!sessions.has(ref.filename)) sessions.set(ref.filename, { ref, lines: [] });
    return [sessions.get(ref.filename), 0];
  };
  for (const { prompt, seed, before, start: from, after } of turns) {
    const words = prompt.replaceAll(/\s+/g, " ").trim();
    if (!before || !words) {
      places.set(after.filename, begin(after));
      continue;
    }
    const source = from ?? before;
    const [session, start] = places.get(source.filename) ?? begin(source);
    const follows = start === session.lines.length && !/^(from \d+ ?:|redo \d+$)/i.test(words);
    session.lines.push(`${follows ? "" : `from ${start}: `}${words}${seed === null ? "" : ` [seed ${seed}]`}`);
    places.set(after.filename, [session, session.lines.length]);
  }
  return [...sessions.values()].filter(({ lines }) => lines.length);
}

const OWN = /(\s*\[(?:(?:seed|steps)\s+\d+|guidance\s+\d+(?:\.\d+)?)\])+\s*$/i; // a line's own settings

/** For each turn of such a text the number of the turn that it starts from; 0 for the first picture. */
export function startsOf(text) {
  const starts = [];
  for (const line of text.split("\n").map((one) => one.replace(OWN, "").trim()).filter(Boolean)) {
    const [, redo] = /^redo\s+(\d+)$/i.exec(line) ?? [];
    const [, from] = /^from\s+(\d+)\s*:/i.exec(line) ?? [];
    starts.push(redo ? starts[redo - 1] ?? 0 : Number(from ?? starts.length));
  }
  return starts;
}

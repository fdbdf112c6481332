/**
 * What the server says, in the language that is shown. The nodes and kontext_core speak English; each of their sentences
 * that the browser shows is here with its blanks, and locales/<language>/main.json has it under "said_<key>". What is not
 * known stays as it came.
 */

import { ENGLISH, isEnglish, t } from "./text.js";

export const SENTENCES = {
  "fitted": "{source} to {target} by {policy}",
  "cropped": "cropped {sides} ({percent} % of the picture)",
  "padded": "padded {sides} ({percent} % of the canvas)",
  "left": "{count} px left",
  "top": "{count} px top",
  "right": "{count} px right",
  "bottom": "{count} px bottom",
  "aspect": "aspect ratio changed by {percent} %",
  "reference_tokens": "{counts} reference tokens",
  "long": "the prompt is {length} tokens long for T5, and FLUX.1 Kontext was trained with {known}: nothing is cut, but its "
    + "end may not be followed",
  "cut": "the prompt is over the {limit} tokens that {name} reads; cut off and not read: “{cut}”",
  "unknown": "{name} does not know: {words}",
  "hint": "“{found}”: {advice}",
  "edited": "{share} of the picture edited",
  "moved": "moved by ({shift}) px, colour gain ({gain}), bias ({bias}) levels, {unchanged} unchanged",
  "not_moved": "only {unchanged} of the picture is unchanged: shift and colour are kept",
  "drift": "{label}: PSNR {psnr} dB, SSIM {ssim} outside the {edited} edited",
  "compared": "PSNR {psnr} dB, SSIM {ssim}, {share} of the pixels differ",
  "done": "done",
  "not_done": "not done",
  "kept": "the rest kept",
  "not_kept": "the rest not kept",
  "no_face": "no face found",
  "similarity": "similarity {value}",
  "pairs": "{count} pairs, {captions} different instructions",
  "pictures": "{count} pictures without a control (text to image), {captions} different instructions",
  "encoding": "encoding pair {done} of {total}",
  "trained": "{file}: {steps} steps on {pairs} pairs, {parameters} parameters, {seconds} s",
  "lora": "{name}: {format}, {matched} of {total} layers matched",
  "lora_unused": "not used: {name} ({reason})",
  "not_compiled": "not compiled: no working compiler for {device} ({problem})",
  "compiled": "compiled {graphs} graphs in {seconds} s",
  "compiled_before": "nothing had to be compiled again",
  "saved": "{full} full and {part} partial evaluations, {skipped} of them ended after the first block: {share} % of the "
    + "operations saved",
  "in_full": "{count} evaluations in full: {reason}",
  "own_references": "references with strength, mask or steps of their own",
  "controlnet": "a ControlNet, with which neither regions nor blocks can be left out",
  "tokens": "{total} tokens: {parts}",
  "of_target": "{count} target",
  "of_reference": "{count} reference",
  "of_text": "{count} text",
  "of_batch": "{count} pictures",
  "memory": "{needed} GiB: {weights} weights + {activations} working memory",
  "memory_of": "{device} has {total} GiB: {reason}",
  "fits": "fits",
  "fits_not": "does not fit, so weights will be streamed, which is slower",
  "at_least": "at least {seconds} s for {steps} steps ({step} s a step), by the arithmetic this device does now",
  "not_listed": "there is no {name} in the folder {folder}: put the file there, then press R to refresh",
  "not_made": "{name} is not there: the model has not been made yet; choose a file of your own",
  "wrong_kind": "{file}: {parts}, where {wanted} is needed.",
  "is_lora": "{file}: a LoRA, not {wanted}: load it as a LoRA on top of a model.",
  "stranger": "{file}: not {wanted}: {reason}.",
  "empty_file": "it holds no tensors",
  "looks_like": "it looks like {name}",
  "no_flux": "its {count} keys are those of no part of FLUX (the first are {keys})",
  "no_model": "{file}: its sizes make no model: {problem}",
  "transformer": "a FLUX transformer",
  "autoencoder": "a FLUX autoencoder (VAE)",
  "t5": "a T5 text encoder",
  "clip": "a CLIP text encoder",
};

const NESTED = ["sides", "advice", "reason", "parts", "wanted"]; // blanks that hold sentences themselves
const BETWEEN = [", ", " + ", " and "]; // the parts of a list
const KNOWN = [
  ...Object.entries(ENGLISH).filter(([key]) => key.startsWith("hint_")),
  ...Object.entries(SENTENCES).map(([key, english]) => [`said_${key}`, english]),
].map(([key, english]) => {
  const blanks = [];
  const pattern = english.replace(/[.*+?^$()|[\]\\]/g, "\\$&").replace(/\{(\w+)\}/g, (_, name) => {
    blanks.push(name);
    return name === "count" ? "([\\d.,]+)" : "(.*?)";
  });
  return { key, blanks, pattern: new RegExp(`^${pattern}$`) };
});

/** Lines of the server's in the language that is shown. */
export function translate(text) {
  if (isEnglish()) return text;
  return text.split("\n").map((line) => {
    const [, number, words] = /^(\d+\. |\s*)(.*)$/.exec(line);
    return number + (translated(words) ?? words);
  }).join("\n");
}

/** One sentence or several; null where nothing of it is known. */
function translated(text) {
  const several = (mark) => {
    const parts = text.split(mark);
    const known = parts.length > 1 ? parts.map(translated) : [];
    return { all: known.length > 0 && known.every(Boolean), some: known.some(Boolean),
      words: known.map((part, index) => part ?? parts[index]).join(mark) };
  };
  const sentences = several("; ");
  if (sentences.all) return sentences.words;
  const whole = filled(text);
  if (whole) return whole;
  const list = BETWEEN.map(several).find(({ all }) => all);
  if (list) return list.words;
  return sentences.some ? sentences.words : null;
}

/** A sentence that is known, with its blanks filled; else null. */
function filled(text) {
  for (const { key, blanks, pattern } of KNOWN) {
    const found = pattern.exec(text);
    if (!found) continue;
    const values = Object.fromEntries(blanks.map((name, index) => [name, found[index + 1]]));
    for (const name of NESTED) if (name in values) values[name] = translated(values[name]) ?? values[name];
    const said = t(key, values);
    return said === key ? null : said; // this language does not have it
  }
  return null;
}

/**
 * The words that the browser side shows: English here, other languages in locales/<language>/main.json under
 * "kontext", which the host serves at /i18n.
 */

export const ENGLISH = {
  "view": "Before and after",
  "before": "Before",
  "after": "After",
  "slider": "Divider between before and after",
  "slider_value": "{percent} % before",
  "difference": "Difference",
  "difference_help": "Show only what changed, four times as bright (D)",
  "frame": "Frame",
  "frame_help": "Draw what the model will see of the picture (F)",
  "outline": "Outline",
  "outline_help": "Draw the border between what is kept and what is edited (O)",
  "zoom_in": "Zoom in (+)",
  "zoom_out": "Zoom out (−)",
  "zoom_fit": "Whole picture (0)",
  "large": "Open large",
  "close": "Close",
  "paint": "Paint a mask",
  "paint_help": "Paint over this picture what the edit may change",
  "brush_size": "Size of the brush ([ and ])",
  "erase": "Eraser",
  "erase_help": "Take painted parts away (X, or hold Shift)",
  "undo": "Undo",
  "undo_help": "Take the last stroke back (Z)",
  "invert": "Invert the mask",
  "clear_mask": "Empty the mask",
  "cancel": "Cancel (Escape)",
  "use_mask": "Use mask",
  "use_mask_help": "Keep everything outside of what is painted (Enter)",
  "mask_used": "Kontext Preserve now keeps everything outside the mask.",
  "mask": "Mask editor",
  "mask_help": "Open the picture in the host's mask editor",
  "mask_none": "Connect Load Image to paint a mask on its picture.",
  "picture_of": "Picture {number} of {count}",
  "next": "Next picture",
  "tokens": "{total} tokens",
  "tokens_help": "{target} of the picture, {context} of references, {text} of text",
  "memory_help": "Weights {weights} and working memory {activations}, of {total} on {device}",
  "memory_short": "Needs about {needed} of {total} on {device}: parts will wait in main memory, which is slower. "
    + "Take a smaller size, fewer pictures, or a quantised model.",
  "time": "≈ {time}",
  "time_help": "From this model's last runs here",
  "time_rough": "≥ {time}",
  "time_rough_help": "Roughly, until this model has run here: what its steps take at least, by what this device can do",
  "time_unknown": "time: after the first run",
  "time_unknown_help": "This model has not run here yet",
  "run": "Run",
  "run_help": "Queue this node and what comes of it",
  "run_none": "Nothing takes this node's picture: connect Preview Image or Save Image.",
  "crops": "crops {percent} %",
  "pads": "pads {percent} %",
  "stretches": "stretches {percent} %",
  "step": "Step {value} of {max}",
  "left": "{time} left",
  "progress": "Progress of the edit",
  "so_far": "The picture so far",
  "loss": "loss {loss}",
  "loss_curve": "Loss over the steps",
  "samples": "Sample pictures",
  "sample_of": "Sample at step {step}",
  "trouble": "Kontext: this did not work",
  "trouble_missing": "{name} is not among this ComfyUI's files: put the file into its folder and press R, or choose "
    + "another one.",
  "presets": "Presets",
  "presets_help": "Write an instruction in the wording that Kontext follows best",
  "insert": "Use this instruction",
  "quote": "Quote",
  "quote_help": "Put the selected words between quotation marks, as words to be drawn",
  "quote_none": "Select the words in the prompt first.",
  "turns": "Kontext turns",
  "turns_empty": "Every edit of this session will be listed here.",
  "turns_count": "Turns: {count}",
  "seed": "seed {seed}",
  "seconds": "{seconds} s",
  "drift": "drift {psnr} dB",
  "drift_help": "PSNR where nothing was edited: higher is closer to the picture before",
  "branch": "Branch",
  "branch_help": "Put this picture and its instruction into the graph",
  "redo": "Redo",
  "redo_help": "Do this turn again with another seed",
  "compare": "Compare",
  "compare_help": "Compare with the turn that is chosen",
  "strip": "Picture strip",
  "strip_help": "Save the sequence as one picture",
  "strip_cut": "A picture strip holds {count} turns: the newest are in it, the other {left} are not.",
  "workflow": "Workflow",
  "workflow_help": "Save the sequence as a workflow with Kontext Turns",
  "clear": "Clear",
  "clear_help": "Forget every turn",
  "clear_sure": "Forget all {count} turns? The pictures in the output folder stay.",
  "gone": "The full picture is gone; this is the small one.",
  "gone_branch": "The full picture is gone, so nothing was put into the graph. The setting “Full pictures kept” says how "
    + "many stay.",
  "keep": "Full pictures kept of the newest turns",
  "keep_help": "In the host's user data, about 2 MB a picture; 0 for none",
  "no_edit": "There is no Kontext Edit in this graph: add one first.",
  "branched": "The picture and its instruction are in the graph.",
  "hint_vague": "this asks for a whole new picture; name the one thing that changes and what it becomes",
  "hint_keep": "this change reaches the whole picture; end with “while keeping …” and what shall stay",
  "hint_pronoun": "name what is meant (“the woman with short black hair”); a pronoun may be taken for another thing",
  "hint_quote": "put the words that are to be drawn between quotation marks, in upper or lower case as wanted",
  "hint_negation": "say what shall be there instead, or “while keeping …”; what is only forbidden tends to appear",
  "hint_weights": "weights in brackets are read as words; use plain sentences",
  "hint_many": "many changes at once; do them one after another as turns and each is followed better",
  "hint_language": "the text encoder does not know these characters; write the instruction in English",
  "hint_length": "much longer than the words it replaces: the layout may move; a similar length is kept best",
};

let words = ENGLISH;
let language = "en";

/** Take the words of a language (an object like ENGLISH; what it lacks stays English). */
export function setWords(name, translated) {
  language = name;
  words = { ...ENGLISH, ...(translated ?? {}) };
}

/** The language that is shown, such as "en" or "zh". */
export function currentLanguage() {
  return language;
}

/** Whether what is shown is English. */
export function isEnglish() {
  return language.startsWith("en");
}

/** The words for a key, {name} filled from `values`. */
export function t(key, values = {}) {
  return (words[key] ?? key).replace(/\{(\w+)\}/g, (all, name) => (name in values ? String(values[name]) : all));
}

/** Bytes as a person says them. */
export function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  for (; count >= 1000 && unit < units.length - 1; unit++) count /= 1000;
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

/** Seconds as a person says them. */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}

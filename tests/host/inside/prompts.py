"""What Kontext Prompt asks of a CLIP that the host loaded, and what it says of long prompts; tokenizers beside weights.

The host's own FLUX tokenizer behind an encoder that hands the tokens through: T5-XXL's sizes are fixed there.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pack

pack.load_pack()
import comfy.text_encoders.flux  # noqa: E402
from custom_nodes_kontext.kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer  # noqa: E402
from custom_nodes_kontext.nodes import host, host_clip, host_graph  # noqa: E402

LONG_FOR_CLIP, LONG_FOR_T5 = "many words " * 60, "many words " * 300

lines: list[tuple[str, str]] = []
handler = logging.Handler()
handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
logging.getLogger("kontext").addHandler(handler)
logging.getLogger("kontext").setLevel(logging.INFO)


def clip_over(tokenizer) -> SimpleNamespace:
    return SimpleNamespace(
        tokenizer=tokenizer,
        tokenize=lambda text, **options: tokenizer.tokenize_with_weights(text, **options),
        encode_from_tokens_scheduled=lambda tokens: tokens,
    )


def asked(tokenizer, text: str, length: int = 0) -> dict:
    lines.clear()
    tokens, warnings = host_graph.encode_prompt(clip_over(tokenizer), text, length)
    return {"t5": len(tokens["t5xxl"][0]), "warnings": warnings, "log": list(lines)}


t5, clip = host.tokenizer_folders(Path("nowhere"), Path("nowhere"))
ours = host_clip.HostTokenizer(ClipTokenizer.from_path(clip), T5Tokenizer.from_path(t5), "FLUX")
result = {}
for name, tokenizer in (("native", comfy.text_encoders.flux.FluxTokenizer()), ("ours", ours)):
    result[name] = {
        "short": asked(tokenizer, "make it red"),
        "256": asked(tokenizer, "make it red", 256),
        "long for CLIP": asked(tokenizer, LONG_FOR_CLIP),
        "long for T5": asked(tokenizer, LONG_FOR_T5),
    }

# A model folder: tokenizer/ beside the encoders, as a tokenizer.json alone, then as vocabulary and merges.
models = Path(pack.ANSWER).parent / "models"
(models / "text_encoder").mkdir(parents=True, exist_ok=True)
weights = models / "text_encoder" / "model.safetensors"
places = {"nothing": host.tokenizer_folders(weights, weights)[1] == clip}
own = models / "tokenizer"
own.mkdir(exist_ok=True)
shutil.copy(clip / "vocab.json", own)
places["half a vocabulary"] = host.tokenizer_folders(weights, weights)[1] == clip
(own / "vocab.json").unlink()
ours.clip.tokenizer.save(str(own / "tokenizer.json"))
places["tokenizer.json"] = host.tokenizer_folders(weights, weights)[1] == own
single = ClipTokenizer.from_path(own)
places["same ids"] = single.encode(["a (small) cat's"]).ids.equal(ours.clip.encode(["a (small) cat's"]).ids)
(own / "tokenizer.json").unlink()
for name in ("vocab.json", "merges.txt"):
    shutil.copy(clip / name, own)
places["vocabulary and merges"] = host.tokenizer_folders(weights, weights)[1] == own
pack.answer({**result, "places": places})

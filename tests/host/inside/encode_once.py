"""Kontext Edit run again and again in one process: how often its text encoders and its autoencoder are asked."""

from __future__ import annotations

import types

import pack
import torch
import utils.extra_config  # noqa: F401  the host's utils, before comfy brings in another one

pack.load_pack()
from custom_nodes_kontext.nodes import host, host_cache  # noqa: E402
from custom_nodes_kontext.nodes.conditioning import KontextPrompt, KontextReference  # noqa: E402
from custom_nodes_kontext.nodes.edit import KontextEdit  # noqa: E402

MODEL = host.load_model(host.BUNDLED)
CLIP, VAE = host.load_clip(host.BUNDLED, host.BUNDLED), host.load_vae(host.BUNDLED)
TEXT, ENCODER = CLIP.cond_stage_model, VAE.first_stage_model.encoder
PICTURES = torch.rand(3, 96, 128, 3, generator=torch.Generator().manual_seed(0))
CALLS = {"t5": 0, "clip": 0, "pictures": 0}


def count(name: str):
    def hook(_, args) -> None:
        CALLS[name] += len(args[0])

    return hook


TEXT.t5xxl.transformer.register_forward_pre_hook(count("t5"))
TEXT.clip_l.transformer.register_forward_pre_hook(count("clip"))
ENCODER.register_forward_pre_hook(count("pictures"))


@torch.inference_mode()
def node(kind, **inputs):
    """The outputs of one run of a node, as the executor calls it."""

    class Run(kind):
        hidden = types.SimpleNamespace(unique_id=None, prompt=None)

    return Run.execute(**inputs).result


def edit(clip=CLIP, vae=VAE, **changes) -> torch.Tensor:
    inputs = {
        "model": MODEL, "clip": clip, "vae": vae, "prompt": "make it night", "seed": 1, "steps": 1, "guidance": 2.5,
        "few_step": "off", "fit": "stretch", "padding": "mirror", "convention": "offset", "width": 0, "height": 0,
        "sampler": "euler", "shift": "resolution", "mu": 1.15, "batch_size": 1, "bfl_parity": False,
        "image": PICTURES[:1],
    }  # fmt: skip
    return node(KontextEdit, **{**inputs, **changes})[1]["samples"]


RESULT = {}


def asked(name: str, run) -> object:
    """What `run` gives, and how often each encoder was asked meanwhile, under this name."""
    before = dict(CALLS)
    value = run()
    RESULT[name] = {key: CALLS[key] - before[key] for key in CALLS}
    return value


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


first = asked("first", edit)
asked("seed", lambda: edit(seed=2))
asked("steps and guidance", lambda: edit(steps=2, guidance=4.0))
RESULT["same_bits"] = same(first, edit())
night = asked("prompt", lambda: edit(prompt="make it day"))
RESULT["prompt_matters"] = not same(night, first)
asked("picture", lambda: edit(image=PICTURES[1:2]))
asked("batch", lambda: edit(image=PICTURES))
asked("two references", lambda: edit(image_2=PICTURES[2:3]))
asked("other size", lambda: edit(width=96, height=96))
asked("text length", lambda: edit(bfl_parity=True))
nodes = {"clip": CLIP, "text": "make it night", "guidance": 2.5, "text_length": 0}
(conditioning,) = asked("Kontext Prompt", lambda: node(KontextPrompt, **nodes))
inputs = {"vae": VAE, "image": PICTURES[:1], "fit": "stretch", "padding": "mirror", "convention": "offset"}
asked(
    "Kontext Reference",
    lambda: node(KontextReference, conditioning=conditioning, width=0, height=0, **inputs),
)

# what another node does to the conditioning and the latent that it was given
with torch.inference_mode():
    conditioning[0][0].zero_()
    conditioning[0][1]["pooled_output"].zero_()
RESULT["own_copies"] = same(edit(), first)

# a LoRA on the text encoders, through the host, and off again
with torch.inference_mode():
    key = "t5xxl.transformer.shared.weight"
    shape = dict(TEXT.named_parameters())[key].shape
    changed = CLIP.clone()
    assert changed.add_patches({key: ("diff", (torch.ones(shape),))}, 1.0)
    lora = asked("lora", lambda: edit(clip=changed))
    RESULT["lora_matters"] = not same(lora, first)
    off = asked("lora off", edit)
    RESULT["lora_off"] = same(off, first)
    # twice more each: nothing is computed for long
    edit(clip=changed), edit(), edit(clip=changed), edit()
    asked("lora again", lambda: edit(clip=changed))
    RESULT["lora_again"] = same(edit(clip=changed), lora)

# weights written to in place
weight = dict(VAE.first_stage_model.named_parameters())["encoder.conv_in.weight"]
with torch.inference_mode():
    weight.mul_(1.5)
RESULT["weights_matter"] = not same(asked("weights", edit), first)
with torch.inference_mode():
    weight.div_(1.5)
edit()

RESULT["bytes"] = [cache.nbytes for cache in host_cache._CACHES.values()]
for cache in host_cache._CACHES.values():
    cache.max_bytes = 100_000
for number in range(6):
    edit(prompt=f"make it {number}", image=PICTURES[:1] * (number / 6))
RESULT["bounded"] = [cache.nbytes for cache in host_cache._CACHES.values()]
pack.answer(RESULT)

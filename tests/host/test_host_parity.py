"""A full-width checkpoint loaded by ComfyUI itself and by ours, through the same nodes, gives the same latents.

One double-stream and two single-stream blocks of FLUX.1's own width with random weights in bfloat16; on a CPU
ComfyUI computes both in float32. The text encoders have the published output sizes and are otherwise small.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

# Both in float32, and sums in another order in a few places: what is left is rounding. The values are about 1.
TOLERANCE = 1e-4


def shared(wide: dict, tiny: dict, picture: str) -> dict:
    """The nodes that every branch takes: both models, the schedule and sampler of either, prompt and reference."""
    flux = {"max_shift": 1.15, "base_shift": 0.5, "width": 32, "height": 48}
    nodes = {
        "native file": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": wide["model"], "weight_dtype": "default"},
        },
        "our file": {
            "class_type": "KontextLoadModel",
            "inputs": {"model": wide["model"], "weight_dtype": "default"},
        },
        "clip": {"class_type": "KontextLoadTextEncoders", "inputs": {"t5": wide["t5"], "clip": wide["clip"]}},
        "vae": {"class_type": "KontextLoadVAE", "inputs": {"vae": tiny["vae"]}},
        "picture": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": "make it red", "clip": ["clip", 0]}},
        "guided": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["text", 0], "guidance": 2.5}},
        "latent": {"class_type": "VAEEncode", "inputs": {"pixels": ["picture", 0], "vae": ["vae", 0]}},
        "positive": {
            "class_type": "ReferenceLatent",
            "inputs": {"conditioning": ["guided", 0], "latent": ["latent", 0]},
        },
        "native sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "our sampler": {"class_type": "KontextSampler", "inputs": {"sampler": "euler"}},
        "our sigmas": {"class_type": "KontextSchedule", "inputs": {
            "steps": 2, "shift": "resolution", "mu": 1.15, "denoise": 1.0, "width": 32, "height": 48,
        }},
        "native sigmas": {"class_type": "BasicScheduler", "inputs": {
            "model": ["native model", 0], "scheduler": "simple", "steps": 2, "denoise": 1.0,
        }},
    }  # fmt: skip
    for label in ("native", "our"):
        nodes[f"{label} model"] = {
            "class_type": "ModelSamplingFlux",
            "inputs": {"model": [f"{label} file", 0], **flux},
        }
    return nodes


BRANCHES = {
    # name: (model, sampler, sigmas); the first two are KSamplers, which choose those themselves
    "KSampler, native model": ("native", None, None),
    "KSampler, our model": ("our", None, None),
    "all native": ("native", "native", "native"),
    "our sampler, native model": ("native", "our", "native"),
    "our sampler, our model": ("our", "our", "native"),
    "our sigmas and sampler, our model": ("our", "our", "our"),
    "our sigmas, native model": ("native", "native", "our"),
    "our sigmas, our model": ("our", "native", "our"),
}


def branch(model: str, sampler: str | None, sigmas: str | None) -> dict:
    common = {
        "model": [f"{model} model", 0], "cfg": 1.0, "positive": ["positive", 0], "negative": ["positive", 0],
        "latent_image": ["latent", 0],
    }  # fmt: skip
    if sampler is None:
        own = {"seed": 3, "steps": 2, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        return {"class_type": "KSampler", "inputs": {**common, **own}}
    own = {
        "add_noise": True, "noise_seed": 3, "sampler": [f"{sampler} sampler", 0], "sigmas": [f"{sigmas} sigmas", 0],
    }  # fmt: skip
    return {"class_type": "SamplerCustom", "inputs": {**common, **own}}


@pytest.fixture(scope="module")
def latents(host, wide, tiny) -> dict[str, torch.Tensor]:
    """Every branch's latent, from one workflow, in which each model is loaded once."""
    pixels = np.random.default_rng(1).integers(0, 255, (48, 32, 3), dtype=np.uint8)
    nodes = shared(wide, tiny, host.upload(Image.fromarray(pixels), "wide.png"))
    for name, parts in BRANCHES.items():
        nodes[name] = branch(*parts)
        inputs = {"samples": [name, 0], "filename_prefix": "parity"}
        nodes[f"save {name}"] = {"class_type": "SaveLatent", "inputs": inputs}
    outputs = host.run(nodes).history["outputs"]
    result = {}
    for name in BRANCHES:
        file = outputs[f"save {name}"]["latents"][0]
        path = host.server.base / "output" / file["subfolder"] / file["filename"]
        result[name] = load_file(path)["latent_tensor"]
    return result


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and b.std() > 0.1
    return float((a - b).abs().max() / b.std())


def test_our_model_gives_the_native_models_latents_through_the_same_ksampler(latents):
    assert difference(latents["KSampler, our model"], latents["KSampler, native model"]) < TOLERANCE


@pytest.mark.parametrize("model", ["native", "our"])
def test_our_sampler_is_the_hosts_euler_on_either_model(latents, model):
    assert difference(latents[f"our sampler, {model} model"], latents["all native"]) < TOLERANCE


@pytest.mark.parametrize("model", ["native", "our"])
def test_our_schedule_drives_either_model_and_the_hosts_sampler(latents, model):
    ours = latents["our sigmas and sampler, our model"]
    assert difference(latents[f"our sigmas, {model} model"], ours) < TOLERANCE


@pytest.fixture(scope="module")
def placed(host, wide, tiny) -> dict[str, torch.Tensor]:
    """Latents of both models under two of our references: one masked, and one weaker and placed otherwise."""
    pixels = np.random.default_rng(2).integers(0, 255, (3, 48, 32, 3), dtype=np.uint8)
    pixels[2][:, :] = 0
    pixels[2][:, :16] = 255
    names = [host.upload(Image.fromarray(p), f"wide_{n}.png") for n, p in enumerate(pixels)]
    nodes = shared(wide, tiny, names[0])
    for unused in ("latent", "positive", "our sampler", "our sigmas", "native sampler", "native sigmas"):
        del nodes[unused]
    nodes["second picture"] = {"class_type": "LoadImage", "inputs": {"image": names[1]}}
    nodes["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": names[2], "channel": "red"}}
    nodes["empty"] = {
        "class_type": "EmptySD3LatentImage",
        "inputs": {"width": 32, "height": 48, "batch_size": 1},
    }
    common = {"vae": ["vae", 0], "fit": "keep", "padding": "mirror", "width": 0, "height": 0}
    chains = {
        "one": [{}],
        "masked": [{"mask": ["mask", 0]}],
        "mixed": [{"mask": ["mask", 0]}, {"convention": "uxo", "strength": 0.5}],
        "late": [{}, {"convention": "index", "start": 0.5}],
    }
    for name, chain in chains.items():
        last = ["guided", 0]
        for number, settings in enumerate(chain):
            picture = ["second picture" if number else "picture", 0]
            inputs = {**common, "conditioning": last, "image": picture, "convention": "offset", **settings}
            nodes[f"{name} {number}"] = {"class_type": "KontextReference", "inputs": inputs}
            last = [f"{name} {number}", 0]
        for model in ("native", "our"):
            sampled = branch(model, None, None)
            sampled["inputs"] |= {"positive": last, "negative": ["guided", 0], "latent_image": ["empty", 0]}
            nodes[f"{name}, {model}"] = sampled
            inputs = {"samples": [f"{name}, {model}", 0], "filename_prefix": "placed"}
            nodes[f"save {name}, {model}"] = {"class_type": "SaveLatent", "inputs": inputs}
    outputs = host.run(nodes).history["outputs"]
    result = {}
    for key in (f"{name}, {model}" for name in chains for model in ("native", "our")):
        file = outputs[f"save {key}"]["latents"][0]
        path = host.server.base / "output" / file["subfolder"] / file["filename"]
        result[key] = load_file(path)["latent_tensor"]
    return result


@pytest.mark.parametrize("chain", ["one", "masked", "mixed", "late"])
def test_our_references_do_to_a_native_model_what_they_do_to_ours(placed, chain):
    assert difference(placed[f"{chain}, our"], placed[f"{chain}, native"]) < TOLERANCE
    others = [value for key, value in placed.items() if key.endswith("our") and not key.startswith(chain)]
    assert all(difference(placed[f"{chain}, our"], other) > 100 * TOLERANCE for other in others)

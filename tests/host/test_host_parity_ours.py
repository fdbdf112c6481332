"""Our CONDITIONING and LATENT drive a native MODEL and VAE, and the native ones ours: all ways give one latent.

FLUX.1's own width with one block of each kind, and its whole autoencoder, random and loaded from the same files by
ComfyUI's own loaders and by ours. On a CPU both compute in float32.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kontext_core.models.autoencoder import Autoencoder
from kontext_core.models.clip import ClipParams, ClipTextEncoder
from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.transformer import Flux, TransformerParams

# Both in float32, and sums in another order in a few places: what is left is rounding. The values are about 1.
TOLERANCE = 1e-4
WIDTH, HEIGHT = 32, 48
PROMPT, GUIDANCE, SEED, STEPS = "make the circle red", 2.5, 3, 2


def random_file(path, module: torch.nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Weights that keep the size of what passes, cut from one run of random numbers: drawing 500 million takes long."""
    pool = torch.randn(16_000_057, generator=torch.Generator().manual_seed(seed)).to(dtype)
    state, position = {}, 0
    for key, value in module.state_dict().items():
        if value.ndim == 1 and key.endswith(
            (".scale", "norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight")
        ):
            state[key] = torch.ones(value.shape, dtype=dtype)
            continue
        spread = value[0].numel() ** -0.5 if value.ndim > 1 else 0.02
        repeats = -(-(position + value.numel()) // len(pool))
        state[key] = pool.repeat(repeats)[position : position + value.numel()].mul(spread).view(value.shape)
        position = (position + 1_000_003) % len(pool)
    save_file(state, path)


@pytest.fixture(scope="module")
def files(host) -> dict[str, str]:
    """Names of the transformer, text encoders of its widths, and the autoencoder."""
    with torch.device("meta"):
        modules = {
            "diffusion_models": Flux(TransformerParams(depth=1, depth_single_blocks=1)),
            "t5": T5Encoder(T5Params(vocab_size=2048, d_kv=16, d_ff=32, num_layers=1, num_heads=2)),
            "clip": ClipTextEncoder(
                ClipParams(vocab_size=1024, intermediate_size=32, num_layers=1, eos_token_id=1023)
            ),
            "vae": Autoencoder(),
        }
    for seed, (name, module) in enumerate(modules.items()):
        kind = "text_encoders" if name in ("t5", "clip") else name
        dtype = torch.bfloat16 if kind == "diffusion_models" else torch.float32
        random_file(host.put_model(f"{kind}/both", f"{name}.safetensors"), module, seed, dtype)
    host.put_tokenizers("text_encoders/both", text_tokens=12)  # few: only the width matters here
    return {name: f"both/{name}.safetensors" for name in modules}


def node(kind: str, **inputs: object) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(files: dict[str, str], picture: str) -> dict:
    """Loaders of both kinds, and "words VAE" conditionings with a reference and its latent, each in both ways."""
    fitting = {"fit": "keep", "padding": "mirror", "convention": "offset", "width": 0, "height": 0}
    nodes = {
        "native model": node("UNETLoader", unet_name=files["diffusion_models"], weight_dtype="default"),
        "our model": node("KontextLoadModel", model=files["diffusion_models"], weight_dtype="default"),
        "native vae": node("VAELoader", vae_name=files["vae"]),
        "our vae": node("KontextLoadVAE", vae=files["vae"]),
        "clip": node("KontextLoadTextEncoders", t5=files["t5"], clip=files["clip"]),
        "picture": node("LoadImage", image=picture),
        "text": node("CLIPTextEncode", text=PROMPT, clip=["clip", 0]),
        "guided": node("FluxGuidance", conditioning=["text", 0], guidance=GUIDANCE),
        "prompt": node("KontextPrompt", clip=["clip", 0], text=PROMPT, guidance=GUIDANCE, text_length=0),
    }
    for vae in ("native", "our"):
        nodes[f"encoded {vae}"] = node("VAEEncode", pixels=["picture", 0], vae=[f"{vae} vae", 0])
        nodes[f"native {vae}"] = node(
            "ReferenceLatent", conditioning=["guided", 0], latent=[f"encoded {vae}", 0]
        )
        nodes[f"our {vae}"] = node(
            "KontextReference",
            conditioning=["prompt", 0],
            vae=[f"{vae} vae", 0],
            image=["picture", 0],
            **fitting,
        )
    return nodes


WAYS = list(
    product(("native", "our"), repeat=3)
)  # whose MODEL, whose conditioning and LATENT nodes, whose VAE


@pytest.fixture(scope="module")
def latents(host, files) -> dict[tuple[str, ...], torch.Tensor]:
    """The latent of every way, from one workflow, in which each file is loaded once by either."""
    pixels = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    nodes = graph(files, host.upload(Image.fromarray(pixels), "both.png"))
    for way in WAYS:
        model, words, vae = way
        latent = [f"our {vae}", 1] if words == "our" else [f"encoded {vae}", 0]
        nodes[str(way)] = node(
            "KSampler", model=[f"{model} model", 0], seed=SEED, steps=STEPS, cfg=1.0, sampler_name="euler",
            scheduler="simple", denoise=1.0, latent_image=latent, positive=[f"{words} {vae}", 0],
            negative=["guided", 0],
        )  # fmt: skip
    for model, vae in product(("native", "our"), repeat=2):
        nodes[str(("edit", model, vae))] = node(
            "KontextEdit", model=[f"{model} model", 0], clip=["clip", 0], vae=[f"{vae} vae", 0], prompt=PROMPT,
            image=["picture", 0], seed=SEED, steps=STEPS, guidance=GUIDANCE, few_step="off", fit="keep",
            padding="mirror", convention="offset", width=0, height=0, sampler="euler", shift="constant", mu=1.15,
            batch_size=1, bfl_parity=False,
        )  # fmt: skip
    ways = [*WAYS, *(("edit", *pair) for pair in product(("native", "our"), repeat=2))]
    for way in ways:
        samples = [str(way), 1 if way[0] == "edit" else 0]
        nodes[f"save {way}"] = node("SaveLatent", samples=samples, filename_prefix="both")
    outputs = host.run(nodes).history["outputs"]
    result = {}
    for way in ways:
        file = outputs[f"save {way}"]["latents"][0]
        result[way] = load_file(host.server.base / "output" / file["subfolder"] / file["filename"])[
            "latent_tensor"
        ]
    return result


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and b.std() > 0.1
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: "{} model, {} conditioning, {} VAE".format(*way))
def test_every_mixture_of_ours_and_the_hosts_gives_the_native_latent(latents, way):
    assert difference(latents[way], latents[WAYS[0]]) < TOLERANCE


@pytest.mark.parametrize("model", ["native", "our"])
@pytest.mark.parametrize("vae", ["native", "our"])
def test_kontext_edit_gives_the_native_latent_with_any_model_and_vae(latents, model, vae):
    """At the host's constant shift, and from the host's noise, which is ours."""
    assert difference(latents["edit", model, vae], latents[WAYS[0]]) < TOLERANCE

"""Tokenizers, autoencoder and LoRA keys of ours and of the host, side by side in one process."""

from __future__ import annotations

import os
from pathlib import Path

import pack
import torch

pack.load_pack()
import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.text_encoders.flux  # noqa: E402
from custom_nodes_kontext.kontext_core.models.autoencoder import Autoencoder, AutoencoderParams  # noqa: E402
from custom_nodes_kontext.kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer  # noqa: E402
from custom_nodes_kontext.kontext_core.models.transformer import TransformerParams  # noqa: E402
from custom_nodes_kontext.nodes import host, host_clip, host_model, host_vae  # noqa: E402

PROMPTS = [
    "make the car red",
    "",
    "a (very:1.3) small (house) and a \\(sign\\) that says “OPEN”",
    "change   the sky,\nkeep the rest",
    "写一个红色的字",
    "word " * 70,
]


def tokens() -> dict:
    """Prompt -> whether both tokenizers give the same lists; T5 padded to the host's 256 tokens."""
    native = comfy.text_encoders.flux.FluxTokenizer()
    t5, clip = host.tokenizer_folders(Path("nowhere"), Path("nowhere"))
    ours = host_clip.HostTokenizer(ClipTokenizer.from_path(clip), T5Tokenizer.from_path(t5), "FLUX")
    same = {}
    for prompt in PROMPTS:
        theirs = native.tokenize_with_weights(prompt)
        mine = ours.tokenize_with_weights(prompt, tokenizer_options={"t5xxl_min_length": 256})
        same[prompt] = {
            "t5xxl": plain(theirs["t5xxl"]) == plain(mine["t5xxl"]),
            "l": plain(theirs["l"]) == plain(mine["l"]),
        }
    literal = ours.tokenize_with_weights("a (b:1.5)", disable_weights=True)["t5xxl"][0]
    # What Kontext Prompt asks of a CLIP that the host loaded.
    asked = {"disable_weights": True, "tokenizer_options": {"t5xxl_min_length": 512}}
    through_native = native.tokenize_with_weights("a (b:1.5)", **asked)["t5xxl"][0]
    long = ours.tokenize_with_weights("many " * 600)["t5xxl"][0]
    return {
        "same": same,
        "literal_weights": sorted({float(weight) for _, weight in literal}),
        "native_literal": plain([through_native])
        == plain(ours.tokenize_with_weights("a (b:1.5)", disable_weights=True)["t5xxl"]),
        "own_length": len(ours.tokenize_with_weights("a")["t5xxl"][0]),
        "long_length": len(long),
        "long_end": int(long[-1][0]),
        "warnings": ours.warnings("many " * 600),
    }


def plain(rows: list) -> list:
    return [[(int(token), float(weight)) for token, weight in row] for row in rows]


def random_like(module: torch.nn.Module, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in module.state_dict().items():
        spread = scale * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
        state[key] = torch.randn(value.shape, generator=generator) * spread
        if "norm" in key and key.endswith("weight"):
            state[key] += 1
    return state


def vae() -> dict:
    """Largest differences of encode, decode and tiled decode against the host's own VAE, and the range used."""
    with torch.device("meta"):
        core = Autoencoder(AutoencoderParams())
    state = random_like(core)
    native = comfy.sd.VAE(sd=dict(state))
    core.load_state_dict(state, assign=True)
    ours = host_vae.HostVAE(core, 1024 * 1024)
    image = torch.rand(2, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = native.encode(image)
        latent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
        decoded = native.decode(latent)
        whole = ours.decode(latent)
        return {
            "encode": relative(ours.encode(image), theirs),
            "decode": relative(whole, decoded),
            "range": float(decoded.std()),
            "tiled": relative(ours.decode_tiled(latent, tile_x=4, tile_y=4, overlap=1), whole),
            "tiled_encode": relative(ours.encode_tiled(image, tile_x=32, tile_y=32, overlap=8), theirs),
            "memory": ours.memory_used_decode(latent.shape, torch.float32) / native.memory_used_decode(
                latent.shape, torch.float32
            ),
            "keys": sorted(ours.get_sd()) == sorted(state),
        }  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.std())


def loras() -> dict:
    """For each naming of LoRAs: patched keys of either model, and the largest difference of the patched weights."""
    params = TransformerParams(
        vec_in_dim=16, context_in_dim=16, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=1,
        axes_dim=(8, 12, 12),
    )  # fmt: skip
    newer = (
        {"txt_ids_dims": []} if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__ else {}
    )
    models = []
    for kind in (host_model.HostTransformer, comfy.ldm.flux.model.Flux):
        sizes = {**host_model.unet_config(params), **({} if kind is host_model.HostTransformer else newer)}
        config = comfy.supported_models.Flux(sizes)
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.Flux(config, unet_model=kind)
        cpu = torch.device("cpu")
        models.append(comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu))
    ours, native = models
    state = random_like(ours.model.diffusion_model)
    ours.model.diffusion_model.load_state_dict(state)
    native.model.load_model_weights(dict(state), "")
    return {name: compare(lora, ours, native) for name, lora in lora_files().items()}


def partial_loading() -> dict:
    """A forward with everything loaded, and with all but a few kilobytes left where it was, as on a small card."""
    params = TransformerParams(
        vec_in_dim=16, context_in_dim=16, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=1,
        axes_dim=(8, 12, 12),
    )  # fmt: skip
    config = comfy.supported_models.Flux(host_model.unet_config(params))
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.Flux(config, unet_model=host_model.HostTransformer)
    model.diffusion_model.load_state_dict(random_like(model.diffusion_model))
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    lora, _ = comfy.sd.load_lora_for_models(patcher, None, lora_files()["bfl"], 0.3, 0.0)
    results = {}
    for name, chosen in (("plain", patcher), ("lora", lora)):
        outputs = []
        for budget in (0, 4096):  # 0 is the host's word for everything
            chosen.patch_model(device_to=cpu, lowvram_model_memory=budget)
            with torch.inference_mode():
                generator = torch.Generator().manual_seed(6)
                outputs.append(
                    model.diffusion_model(
                        torch.randn(1, 16, 4, 4, generator=generator),
                        torch.tensor([0.5]),
                        context=torch.randn(1, 3, 16, generator=generator),
                        y=torch.randn(1, 16, generator=generator),
                        guidance=torch.tensor([2.5]),
                        transformer_options={},
                    )
                )
            partly = model.model_lowvram
            chosen.unpatch_model(device_to=cpu)
        results[name] = {"difference": relative(*outputs), "partly": bool(partly)}
    return results


def compare(lora: dict, ours, native) -> dict:
    patched = []
    for patcher in (ours, native):
        clone, _ = comfy.sd.load_lora_for_models(patcher, None, dict(lora), 1.0, 0.0)
        weights = {}
        for key in clone.patches:
            weight = comfy.utils.get_attr(clone.model, key)
            weights[key] = comfy.lora.calculate_weight(clone.patches[key], weight.clone(), key)
        patched.append(weights)
    mine, theirs = patched
    same_keys = sorted(mine) == sorted(theirs)
    return {
        "patched": len(mine),
        "same_keys": same_keys,
        "difference": max((relative(mine[key], theirs[key]) for key in mine), default=0.0)
        if same_keys
        else None,
    }


def lora_files() -> dict[str, dict[str, torch.Tensor]]:
    """Small LoRAs under the names that trainers write."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    layers = {
        "double_blocks.0.img_attn.qkv": (192, 64),
        "double_blocks.0.txt_mlp.0": (256, 64),
        "single_blocks.0.linear1": (448, 64),
        "single_blocks.0.linear2": (64, 320),
    }
    diffusers = {
        "transformer_blocks.0.attn.to_q": (64, 64),
        "transformer_blocks.0.attn.add_k_proj": (64, 64),
        "single_transformer_blocks.0.proj_mlp": (256, 64),
        "single_transformer_blocks.0.proj_out": (64, 320),
    }
    files: dict[str, dict[str, torch.Tensor]] = {"bfl": {}, "kohya": {}, "diffusers": {}}
    for layer, (rows, columns) in layers.items():
        files["bfl"][f"diffusion_model.{layer}.lora_A.weight"] = draw(2, columns)
        files["bfl"][f"diffusion_model.{layer}.lora_B.weight"] = draw(rows, 2)
        name = "lora_unet_" + layer.replace(".", "_")
        files["kohya"][f"{name}.lora_down.weight"] = draw(2, columns)
        files["kohya"][f"{name}.lora_up.weight"] = draw(rows, 2)
        files["kohya"][f"{name}.alpha"] = torch.tensor(1.0)
    for layer, (rows, columns) in diffusers.items():
        files["diffusers"][f"transformer.{layer}.lora_A.weight"] = draw(2, columns)
        files["diffusers"][f"transformer.{layer}.lora_B.weight"] = draw(rows, 2)
    return files


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
pack.answer({"tokens": tokens(), "vae": vae(), "loras": loras(), "partial": partial_loading()})

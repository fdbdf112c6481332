"""Our transformer, text encoders and autoencoder as MODEL, CLIP and VAE."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .schema import ADVANCED, CATEGORY, make_schema


class KontextLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextLoadModel",
            display_name="Kontext Load Model",
            category=CATEGORY,
            description="Loads a FLUX.1 transformer, straight from the file's memory map. The MODEL works with every "
            "node that takes a FLUX model: samplers, LoRA loaders, patches.",
            search_aliases=["load diffusion model", "unet loader", "flux"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=host.list_models("diffusion_models"),
                    tooltip="A transformer in models/diffusion_models, or the small one that comes with this pack.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(host.DTYPES),
                    default="default",
                    tooltip="What weights are kept in. default: as in the file; float32 if a result is black.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For Kontext Edit, KSampler, LoRA loaders …")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, weight_dtype):
        return host.fingerprint("diffusion_models", model)

    @classmethod
    def execute(cls, model, weight_dtype) -> io.NodeOutput:
        return io.NodeOutput(host.load_model(model, weight_dtype))


class KontextLoadTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = host.list_models("text_encoders")
        return make_schema(
            node_id="KontextLoadTextEncoders",
            display_name="Kontext Load Text Encoders",
            category=CATEGORY,
            description="Loads the two text encoders of FLUX.1, with 512 tokens for T5 as the model was trained.",
            search_aliases=["dual clip loader", "t5xxl", "clip_l"],
            inputs=[
                io.Combo.Input(
                    "t5",
                    options=options,
                    tooltip="The T5 encoder (t5xxl…) in models/text_encoders, or the bundled model's.",
                ),
                io.Combo.Input(
                    "clip",
                    options=options,
                    tooltip="The CLIP-L text encoder (clip_l…) in models/text_encoders, or the bundled model's.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="For Kontext Prompt, Kontext Edit …")],
        )

    @classmethod
    def fingerprint_inputs(cls, t5, clip):
        return (host.fingerprint("text_encoders", t5), host.fingerprint("text_encoders", clip))

    @classmethod
    def execute(cls, t5, clip) -> io.NodeOutput:
        return io.NodeOutput(host.load_clip(t5, clip))


class KontextLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextLoadVAE",
            display_name="Kontext Load VAE",
            category=CATEGORY,
            description="Loads the FLUX.1 autoencoder. Tiled decoding with it leaves no seams.",
            search_aliases=["load vae", "ae"],
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=host.list_models("vae"),
                    tooltip="The FLUX autoencoder (ae.safetensors) in models/vae, or the bundled model's.",
                ),
            ],
            outputs=[
                io.Vae.Output(display_name="vae", tooltip="For Kontext Reference, Kontext Edit, VAE Decode …")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, vae):
        return host.fingerprint("vae", vae)

    @classmethod
    def execute(cls, vae) -> io.NodeOutput:
        return io.NodeOutput(host.load_vae(vae))

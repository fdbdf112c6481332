"""Runs inside a ComfyUI: the position ids its own FLUX gives to target and references. Argument: JSON of
(target, sizes) in latent cells; prints one JSON object of convention -> ids."""

from __future__ import annotations

import json
import sys


def main(target: list[int], sizes: list[list[int]]) -> None:
    sys.argv = ["comfy", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux

    model = Flux(
        in_channels=16, out_channels=16, vec_in_dim=8, context_in_dim=8, hidden_size=32, mlp_ratio=1.0,
        num_heads=1, depth=0, depth_single_blocks=0, axes_dim=[8, 12, 12], theta=10_000, patch_size=2,
        qkv_bias=True, guidance_embed=False, operations=comfy.ops.disable_weight_init, dtype=torch.float32,
    )  # fmt: skip
    seen = {}

    def forward_orig(img, img_ids, *args, **kwargs):
        seen["ids"] = img_ids[0].tolist()
        return torch.zeros(1, img.shape[1], 64)

    model.forward_orig = forward_orig
    out = {}
    for convention in ("offset", "index", "uxo"):
        references = [torch.zeros(1, 16, *size) for size in sizes]
        model(
            torch.zeros(1, 16, *target), torch.ones(1), torch.zeros(1, 4, 8), torch.zeros(1, 8),
            ref_latents=references, ref_latents_method=convention,
        )  # fmt: skip
        out[convention] = seen["ids"]
    print(json.dumps(out))


main(*json.loads(sys.argv[1]))

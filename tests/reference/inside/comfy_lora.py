"""Runs inside a ComfyUI: what its own LoRA loader makes of some files. Arguments: folder, strength, config."""

from __future__ import annotations

import json
import sys


def main(folder: str, strength: float, config: dict) -> None:
    sys.argv = ["comfy", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(f"{folder}/state.safetensors")

    class Model(comfy.model_base.Flux):
        """Only what the key map looks at."""

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.model_config = type("Config", (), {"unet_config": config["unet"]})

        def state_dict(self):
            return {key: value for key, value in state.items() if key.startswith("diffusion_model.")}

    class Clip:
        def state_dict(self):
            return {key: value for key, value in state.items() if not key.startswith("diffusion_model.")}

    names = comfy.lora.model_lora_keys_clip(Clip(), comfy.lora.model_lora_keys_unet(Model(), {}))
    for file in config["files"]:
        tensors = comfy.lora_convert.convert_lora(load_file(f"{folder}/{file}.safetensors"))
        patches: dict[str, list] = {}
        for target, value in comfy.lora.load_lora(tensors, names).items():
            key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            patches.setdefault(key, []).append((strength, value, 1.0, offset, function))
        changed = {
            key: comfy.lora.calculate_weight(todo, state[key].clone(), key) for key, todo in patches.items()
        }
        save_file(
            {key: value.contiguous() for key, value in changed.items()},
            f"{folder}/{file}.patched.safetensors",
        )


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3]))

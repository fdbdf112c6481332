"""What our MODEL computes in on CPUs with and without bfloat16 in hardware, by the loader's setting and the host's.

Argument: a folder to write in.
"""

from __future__ import annotations

from pathlib import Path

import pack

pack.load_pack()
import comfy.cli_args  # noqa: E402
import comfy.model_management  # noqa: E402
import torch  # noqa: E402
from custom_nodes_kontext.kontext_core import devices  # noqa: E402
from custom_nodes_kontext.kontext_core.weights.quantize import quantize_file  # noqa: E402
from custom_nodes_kontext.nodes import host  # noqa: E402

FILE = host.find_file("diffusion_models", host.BUNDLED)  # of bfloat16 weights
PACKED = Path(pack.ARGUMENTS[0]) / "packed.safetensors"
quantize_file(FILE, PACKED, type="fp8_scaled")
torch.set_grad_enabled(False)


def load(hardware: bool, asked: str, option: str | None = None, file: Path = FILE):
    """A MODEL as a CPU of this kind gets it from a host that was started with this option."""
    for name in ("fp32_unet", "bf16_unet"):
        setattr(comfy.cli_args.args, name, name == option)
    devices.cpu_has_bfloat16 = lambda: hardware
    return host.load_model_file(file, host.DTYPES[asked], "tiny")


def computed(model) -> str:
    return str(model.model.manual_cast_dtype or model.model.get_dtype()).removeprefix("torch.")


def velocity(model) -> torch.Tensor:
    comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(0)
    params = model.model.diffusion_model.params
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return model.model.apply_model(
        draw(1, 16, 4, 4),
        torch.tensor([0.7]),
        c_crossattn=draw(1, 3, params.context_in_dim),
        y=draw(1, params.vec_in_dim),
        guidance=torch.tensor([2.5]),
    )


result = {
    f"{asked} {hardware}": computed(load(hardware, asked))
    for hardware in (False, True)
    for asked in ("default", "bfloat16", "float16", "float32")
}
result |= {
    f"packed {hardware}": computed(load(hardware, "default", file=PACKED)) for hardware in (False, True)
}
for option in ("fp32_unet", "bf16_unet"):
    result[option] = [computed(load(hardware, "default", option)) for hardware in (False, True)]
fast, exact = velocity(load(True, "default")), velocity(load(True, "float32"))
result["error"] = float((fast - exact).norm() / exact.norm())
pack.answer(result)

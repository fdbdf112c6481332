"""Files that `kontext quantize` wrote, in the host's own loaders: outputs, and whether every key found its place.

Arguments: a folder with bf16.safetensors, fp8_scaled.safetensors and fp8_scaled_old.safetensors of a transformer
of the published width, and t5.safetensors (old layout) of a small T5.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pack

pack.load_pack()
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.text_encoders.t5  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from custom_nodes_kontext.kontext_core import latents  # noqa: E402
from custom_nodes_kontext.kontext_core.weights.load import load_transformer  # noqa: E402

FOLDER = Path(pack.ARGUMENTS[0])


class Complaints(logging.Handler):
    """What the host says about keys it could not place."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "missing" in text or "unexpected" in text or "left over" in text:
            self.lines.append(text)


complaints = Complaints()
logging.getLogger().addHandler(complaints)
generator = torch.Generator().manual_seed(0)
X = torch.randn(1, 16, 8, 8, generator=generator)
TXT = torch.randn(1, 6, 64, generator=generator)
Y = torch.randn(1, 32, generator=generator)
T, GUIDANCE = torch.tensor([0.6]), torch.tensor([2.5])


def native(name: str) -> torch.Tensor:
    patcher = comfy.sd.load_diffusion_model(str(FOLDER / f"{name}.safetensors"))
    model = patcher.model.diffusion_model
    dtype = patcher.model.get_dtype_inference() if hasattr(patcher.model, "get_dtype_inference") else None
    dtype = dtype or patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    arguments = [value.to(dtype) for value in (X, T, TXT, Y, GUIDANCE)]
    x, t, txt, y, guidance = arguments
    with torch.no_grad():
        return model(x, t, context=txt, y=y, guidance=guidance).float()


def ours(name: str) -> torch.Tensor:
    model = load_transformer(FOLDER / f"{name}.safetensors", dtype=torch.float32)
    ids = latents.position_ids(8, 8)
    with torch.no_grad():
        tokens = model(latents.pack(X), ids, TXT, latents.text_ids(6), T, Y, GUIDANCE)
    return latents.unpack(tokens, 8, 8)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


answer: dict[str, object] = {}
exact = ours("bf16")
for name in ("fp8_scaled", "fp8_scaled_old"):
    mine = ours(name)
    answer[name] = {"quantisation": error(mine, exact), "native": error(native(name), mine)}
answer["bf16"] = {"native": error(native("bf16"), exact)}

state = comfy.utils.load_torch_file(str(FOLDER / "t5.safetensors"))
config = json.loads((FOLDER / "t5.json").read_text())
if hasattr(comfy.utils, "convert_old_quants"):
    state, _ = comfy.utils.convert_old_quants(state, "", {})
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
else:
    operations = comfy.ops.scaled_fp8_ops(override_dtype=state.pop("scaled_fp8").dtype)
t5 = comfy.text_encoders.t5.T5(config, torch.float32, "cpu", operations)
missing, unexpected = t5.load_state_dict(state, strict=False)
answer["t5"] = {
    "missing": [key for key in missing if "scale" not in key],
    "unexpected": list(unexpected),
}
answer["complaints"] = complaints.lines
pack.answer(answer)

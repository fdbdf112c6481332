"""A real ComfyUI for the tests of this folder: one server for the session, and single scripts run inside one.

The ComfyUI is the one that COMFYUI_PATH names (with COMFYUI_PYTHON to run it), else the packaged one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

import dev
from kontext_core.models.autoencoder import Autoencoder, AutoencoderParams
from kontext_core.models.clip import ClipParams, ClipTextEncoder
from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.presets import KONTEXT_TINY
from kontext_core.weights.locate import BUNDLED

queue = dev.load_queue()
INSIDE = Path(__file__).parent / "inside"


@dataclass
class Run:
    """What a queued workflow did: its history and every message that came while it ran."""

    history: dict
    events: list[tuple[str, dict]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)

    def of(self, kind: str) -> list[dict]:
        return [data for name, data in self.events if name == kind]


class Host:
    """The session's server: queue workflows, upload pictures, read the log."""

    def __init__(self, server: dev.ComfyServer):
        self.server = server
        self.client = queue.Client(server.url)

    def run(self, workflow: dict, on_event=None) -> Run:
        """Queue and wait; a node's error is raised as `queue.WorkflowError`."""
        run = Run(history={})

        def collect(kind: str, data) -> None:
            run.previews.append(data) if kind == "preview" else run.events.append((kind, data))
            if on_event is not None:
                on_event(kind, data)

        run.history = self.client.wait(self.client.queue(workflow), collect)
        return run

    def error(self, workflow: dict) -> str:
        """The message of a workflow that must fail."""
        with pytest.raises(queue.WorkflowError) as caught:
            self.run(workflow)
        return str(caught.value)

    def upload(self, image: Image.Image, name: str) -> str:
        path = self.server.base / name
        image.save(path)
        return self.client.upload(path)

    def pictures(self, run: Run) -> list[Image.Image]:
        """What the workflow's SaveImage nodes wrote."""
        folder = self.server.base / "downloads"
        return [Image.open(path).copy() for path in self.client.save(run.history, folder)]

    def put_model(self, kind: str, name: str) -> Path:
        """The path for a file of this name in one of the server's model folders."""
        folder = self.server.base / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def put_tokenizers(self, kind: str, *, text_tokens: int | None = None) -> None:
        """The bundled tokenizers into one of the server's model folders; prompts of `text_tokens` T5 tokens."""
        for name in ("tokenizer", "tokenizer_2"):
            folder = self.put_model(kind, name)
            shutil.copytree(BUNDLED["kontext-tiny"] / name, folder, dirs_exist_ok=True)
        if text_tokens is not None:
            config = folder / "tokenizer_config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": text_tokens}))

    def log(self) -> str:
        return self.server.log.read_text(encoding="utf-8", errors="replace")


def put_face_network(host: Host) -> str:
    """A network of the published one's name and shape into the server's models: one random layer without a bias."""
    weight = np.random.default_rng(0).standard_normal((3 * 112 * 112, 8)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    path = host.put_model("insightface", "glintr100.onnx")
    onnx.save(model, str(path))
    return path.name


def save_mostly_zero(
    path: Path, shapes: dict[str, tuple[int, ...]], values: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """A safetensors file of these shapes that is zero, and takes no room, where `values` gives nothing."""
    entries, position = {}, 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        kind = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for name, value in values.items():
            assert tuple(value.shape) == tuple(shapes[name]), name
            file.seek(start + entries[name]["data_offsets"][0])
            file.write(value.to(dtype).contiguous().view(torch.int16).numpy().tobytes())
        file.truncate(start + position)


def put_vision_network(host: Host) -> str:
    """A CLIP vision file of ViT-L's shapes: embeddings, one layer that mixes the places, and a projection; no more."""
    width, generator = 1024, torch.Generator().manual_seed(0)
    root = "vision_model"
    shapes = {
        f"{root}.embeddings.class_embedding": (width,),
        f"{root}.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        f"{root}.embeddings.position_embedding.weight": (257, width),
        "visual_projection.weight": (768, width),
    }
    norms = [f"{root}.pre_layrnorm", f"{root}.post_layernorm"]
    for number in range(24):
        layer = f"{root}.encoder.layers.{number}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        linear = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    drawn = [
        *[name for name in shapes if "embeddings" in name or name.startswith("visual")],
        *[f"{root}.encoder.layers.0.self_attn.{name}_proj.weight" for name in ("v", "out")],
    ]
    values = {}
    for name in drawn:
        spread = math.prod(shapes[name][1:]) ** -0.5
        values[name] = torch.randn(shapes[name], generator=generator) * spread
    values |= {f"{name}.weight": torch.ones(width) for name in norms}
    path = host.put_model("clip_vision", "random_vision.safetensors")
    save_mostly_zero(path, shapes, values, torch.float16)
    return path.name


@pytest.fixture(scope="session")
def comfyui() -> tuple[Path, Path]:
    """(folder of the ComfyUI, the Python that runs it)."""
    folder, python = dev.prepare_host(Path(sys.executable))
    return folder, python


@pytest.fixture(scope="session")
def host(comfyui, tmp_path_factory) -> Iterator[Host]:
    """The session's server: a face network, a vision network, what tests put there, and the bundled model."""
    base = tmp_path_factory.mktemp("comfyui")
    small = base / "custom_nodes" / "small_encoders"
    small.mkdir(parents=True)
    (small / "__init__.py").write_text(SMALL_ENCODERS)
    # ours and the host's own models in float32, also on a CPU where ours would compute in bfloat16
    with dev.ComfyServer(*comfyui, base, ["--fp32-unet"]) as server:
        host = Host(server)
        put_face_network(host)
        put_vision_network(host)
        yield host
        host.client.close()


def random_weights(module: torch.nn.Module, seed: int, spread: float = 0.05) -> dict[str, torch.Tensor]:
    """Weights that give finite results and differ everywhere: norms near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in module.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator) * spread
        is_norm = key.endswith(".scale") or ("norm" in key and key.endswith(".weight"))
        state[key] = drawn + 1 if is_norm else drawn
    return state


@pytest.fixture(scope="session")
def tiny(host) -> dict[str, str]:
    """Names of random weights of kontext-tiny's sizes in the server's folders, tokenizers beside them."""
    modules = {
        "diffusion_models": Flux(KONTEXT_TINY.transformer),
        "vae": Autoencoder(KONTEXT_TINY.autoencoder),
        "t5": T5Encoder(KONTEXT_TINY.t5),
        "clip": ClipTextEncoder(KONTEXT_TINY.clip),
    }
    names = {}
    for seed, (kind, module) in enumerate(modules.items()):
        names[kind] = f"random_{kind}.safetensors"
        folder = "text_encoders" if kind in ("t5", "clip") else kind
        save_file(random_weights(module, seed), host.put_model(folder, names[kind]))
    host.put_tokenizers("text_encoders")
    return names


def linear_weights(module: torch.nn.Module, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights that keep the size of what passes: spread 1/sqrt(inputs), norms 1, small biases.

    Cut from one run of random numbers over and over: drawing 700 million takes a minute.
    """
    pool = torch.randn(16_000_057, generator=torch.Generator().manual_seed(seed)).to(dtype)
    state, position = {}, 0
    for key, value in module.state_dict().items():
        if key.endswith(".scale") or ("norm" in key and key.endswith(".weight")):
            state[key] = torch.ones(value.shape, dtype=dtype)
            continue
        spread = math.prod(value.shape[1:]) ** -0.5 if value.ndim > 1 else 0.02
        repeats = -(-(position + value.numel()) // len(pool))
        run = pool.repeat(repeats)[position : position + value.numel()]
        state[key] = run.mul(spread).view(value.shape)
        position = (position + 1_000_003) % len(pool)
    return state


@pytest.fixture(scope="session")
def wide(host) -> dict[str, str]:
    """Names of the wide transformer and of text encoders that fit it."""
    with torch.device("meta"):
        transformer = Flux(TransformerParams(depth=1, depth_single_blocks=2))
        t5 = T5Encoder(T5Params(vocab_size=2048, d_kv=16, d_ff=32, num_layers=1, num_heads=2))
        clip = ClipTextEncoder(
            ClipParams(vocab_size=1024, intermediate_size=32, num_layers=1, eos_token_id=1023)
        )
    files = {
        "model": ("diffusion_models", linear_weights(transformer, 0, torch.bfloat16)),
        "t5": ("text_encoders", linear_weights(t5, 1, torch.float32)),
        "clip": ("text_encoders", linear_weights(clip, 2, torch.float32)),
    }
    for name, (folder, state) in files.items():
        save_file(state, host.put_model(f"{folder}/wide", f"{name}.safetensors"))
    host.put_tokenizers("text_encoders/wide", text_tokens=12)  # few: only the width matters here
    return {name: f"wide/{name}.safetensors" for name in files}


SMALL_T5 = {"d_kv": 16, "d_ff": 32, "num_heads": 2}
# The host knows a T5 of the published size only; its own option makes it smaller, for files in native/.
SMALL_ENCODERS = f"""
import comfy.sd
NODE_CLASS_MAPPINGS = {{}}
load_clip = comfy.sd.load_clip
SMALL = {{"t5xxl_model_config": {SMALL_T5}}}

def load(ckpt_paths, embedding_directory=None, clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION, model_options={{}}):
    if all("native" in str(path) for path in ckpt_paths):
        model_options = {{**model_options, **SMALL}}
    return load_clip(ckpt_paths, embedding_directory, clip_type, model_options)

comfy.sd.load_clip = load
"""


@pytest.fixture(scope="session")
def native_loaders(host, wide) -> dict:
    """ComfyUI's own loaders as nodes "model", "clip" and "vae": a full-width model, a small T5, CLIP and VAE whole."""
    with torch.device("meta"):
        t5 = T5Encoder(T5Params(num_layers=24, **SMALL_T5))
        clip = ClipTextEncoder(ClipParams())
        vae = Autoencoder(AutoencoderParams())
    for seed, (kind, name, module) in enumerate(
        (("text_encoders", "t5", t5), ("text_encoders", "clip", clip), ("vae", "vae", vae)), start=3
    ):
        path = host.put_model(f"{kind}/native", f"{name}.safetensors")
        save_file(linear_weights(module, seed, torch.bfloat16), path)
    encoders = {
        "clip_name1": "native/clip.safetensors",
        "clip_name2": "native/t5.safetensors",
        "type": "flux",
    }
    return {
        "model": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": wide["model"], "weight_dtype": "default"},
        },
        "clip": {"class_type": "DualCLIPLoader", "inputs": {**encoders, "device": "default"}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "native/vae.safetensors"}},
    }


def loaders(tiny: dict[str, str]) -> dict:
    """The nodes "model", "clip" and "vae" of a workflow over the random weights."""
    return {
        "model": {
            "class_type": "KontextLoadModel",
            "inputs": {"model": tiny["diffusion_models"], "weight_dtype": "default"},
        },
        "clip": {
            "class_type": "KontextLoadTextEncoders",
            "inputs": {"t5": tiny["t5"], "clip": tiny["clip"]},
        },
        "vae": {"class_type": "KontextLoadVAE", "inputs": {"vae": tiny["vae"]}},
    }


def edit(tiny: dict[str, str], image: str | None = None, **changes) -> dict:
    """A workflow of Kontext Edit ("edit") over the random weights, saved by "save"."""
    inputs = {
        "model": ["model", 0], "clip": ["clip", 0], "vae": ["vae", 0], "prompt": "make it red", "seed": 1,
        "steps": 2, "guidance": 2.5, "few_step": "off", "fit": "stretch", "padding": "mirror",
        "convention": "offset", "width": 0, "height": 0, "sampler": "euler", "shift": "resolution", "mu": 1.15,
        "batch_size": 1, "bfl_parity": False,
    }  # fmt: skip
    workflow = loaders(tiny)
    if image is not None:
        workflow["load"] = {"class_type": "LoadImage", "inputs": {"image": image}}
        inputs["image"] = ["load", 0]
    workflow["edit"] = {"class_type": "KontextEdit", "inputs": {**inputs, **changes}}
    save = {"images": ["edit", 0], "filename_prefix": "test"}
    workflow["save"] = {"class_type": "SaveImage", "inputs": save}
    return workflow


@pytest.fixture
def loader_nodes(tiny) -> dict:
    return loaders(tiny)


@pytest.fixture
def edit_workflow(tiny):
    """`edit` over the session's random weights."""
    return lambda image=None, **changes: edit(tiny, image, **changes)


@pytest.fixture(scope="session")
def inside(comfyui, tmp_path_factory):
    """Runs tests/host/inside/<name>.py in a Python that has ComfyUI and this pack; returns its JSON answer."""
    folder, python = comfyui
    base = tmp_path_factory.mktemp("inside")

    def run(name: str, *arguments: str, options: tuple[str, ...] = ()) -> dict:
        answer = base / f"{name}.json"
        command = [
            str(python),
            str(INSIDE / f"{name}.py"),
            str(folder),
            str(answer),
            *arguments,
            "--",
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": str(INSIDE)}
        result = subprocess.run(command, capture_output=True, text=True, cwd=base, env=environment)
        assert result.returncode == 0, f"{name} failed:\n{result.stdout}\n{result.stderr}"
        return json.loads(answer.read_text())

    return run

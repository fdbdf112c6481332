"""A training run in a process of its own, and what the host hears of it: progress, samples, cancel.

The host's thread only waits and passes on, so that the server answers and its queue, progress and cancel work as for
any node. Each step is sent over the websocket as the event `kontext.training`:

    {"node", "step", "steps", "loss", "seconds", "sample": {"filename", "subfolder", "type"} or null}

Source: Comfy-Org/ComfyUI comfy/utils.py `ProgressBar`; server.py `send_sync`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image

from ..kontext_core.devices import fast_dtype
from . import host, host_graph, host_runs

logger = logging.getLogger("kontext")

EVENT = "kontext.training"
ROOT = Path(__file__).resolve().parents[1]
# Not `-m`: a Python that is packed for Windows leaves the working folder out of its path.
COMMAND = "import sys; sys.path.insert(0, sys.argv[1]); from kontext_core.training.worker import main; sys.exit(main())"
EXAMPLES = ROOT / "workflows" / "input"
RUNS = "kontext_training"
NAME = re.compile(r"[\w][\w .+-]{0,99}")
PATIENCE = 300  # seconds that a run which was told to stop has for its step, its samples and its checkpoint
PREVIEW_SIDE = 512


class TrainingFailed(RuntimeError):
    """The run ended with an error; the text is its message."""


def pictures_folder(text: str, what: str) -> Path:
    """A folder of pictures in the host's input or output folder, or among this pack's examples.

    Raises:
        ValueError: it lies elsewhere, or is not there.
    """
    roots = [folder_paths.get_input_directory(), folder_paths.get_output_directory(), EXAMPLES]
    roots = [Path(os.path.normpath(root)) for root in roots]
    # Links inside those folders may lead anywhere: their owner has put them there.
    paths = [Path(os.path.normpath(root / text.strip())) for root in roots]
    allowed = [path for path in paths if any(path == root or root in path.parents for root in roots)]
    if not allowed:
        raise ValueError(
            f"{what} is {text!r}; name a folder inside {roots[0]} (or {roots[1]}), such as “my_pairs/targets”; a link "
            "to a folder elsewhere will do"
        )
    found = [path for path in allowed if path.is_dir()]
    if not found:
        raise ValueError(f"{what}: there is no folder {allowed[0]}")
    return found[0]


def run_folder(name: str) -> Path:
    """Where a run of this name keeps its checkpoint, log and samples.

    Raises:
        ValueError: no name for a file.
    """
    if not NAME.fullmatch(name) or name.endswith((".", " ")):
        raise ValueError(f"name is {name!r}; use letters, digits, spaces and - _ + . for the LoRA's file")
    return Path(folder_paths.get_output_directory()) / RUNS / name


def forget(folder: Path) -> None:
    """Begin again: the encoded pictures stay, everything else of the run goes."""
    for name in ("checkpoint", "checkpoint.old", "checkpoint.partial", "previews"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("log.jsonl", "lora.safetensors"):
        (folder / name).unlink(missing_ok=True)


def model_settings(model: str, t5: str, clip: str, vae: str) -> dict[str, str]:
    """The parts of the model that is trained, for a `TrainConfig`."""
    parts = {
        "model": host.find_file("diffusion_models", model),
        "t5": host.find_file("text_encoders", t5),
        "clip": host.BUNDLED_FOLDER / "text_encoder"
        if clip == host.BUNDLED
        else host.find_file("text_encoders", clip),
        "vae": host.find_file("vae", vae),
    }
    return {key: str(path) for key, path in parts.items()}


def device_settings(precision: str) -> dict[str, str]:
    """Where the host computes, and in what."""
    device = comfy.model_management.get_torch_device()
    dtype = host.DTYPES[precision] or fast_dtype(device, torch.bfloat16)
    if dtype == torch.float16:  # gradients of float16 weights underflow
        dtype = torch.float32
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}


def publish(lora: Path, name: str) -> str:
    """Copy a trained LoRA to where the host's loaders look; the name that they list it under."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.safetensors.partial"
    shutil.copyfile(lora, partial)
    os.replace(partial, folder / f"{name}.safetensors")
    folder_paths.filename_list_cache.pop("loras", None)
    return f"{name}.safetensors"


def train(settings: dict[str, Any], node_id: str | None) -> dict:
    """Run it to the end; the worker's `done` event.

    Raises:
        TrainingFailed: with the worker's message.
        comfy.model_management.InterruptProcessingException: cancelled; the run is checkpointed.
    """
    management = comfy.model_management
    management.throw_exception_if_processing_interrupted()
    management.unload_all_models()  # the other process needs the memory
    management.soft_empty_cache()
    folder = Path(settings["output"])
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "COMFYUI_PATH": str(Path(comfy.__path__[0]).parent),  # its tokenizer files
        "PYTHONIOENCODING": "utf-8",
    }
    log_file = folder / "worker.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", COMMAND, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=folder,
            encoding="utf-8",
        )
    try:
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        return _follow(process, _Listener(node_id, settings["steps"]), log_file)
    except management.InterruptProcessingException:
        _stop(process)
        logger.info("training stopped; the same settings go on from %s", folder / "checkpoint")
        raise
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:  # the worker is gone, with what was not written to it
                pass


def _follow(process: subprocess.Popen, on_event: Callable[[dict], None], log_file: Path) -> dict:
    """Pass events on until the last one."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    while True:
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            continue
        if line is None:
            tail = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
            raise TrainingFailed(
                f"the training process ended with {process.wait()} and no message; the end of {log_file}: "
                f"{' / '.join(tail) or 'nothing'}"
            )
        event = json.loads(line)
        if event["event"] == "error":
            raise TrainingFailed(event["message"])
        if event["event"] in ("done", "stopped"):
            return event
        on_event(event)


def _read(stream: Any, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _stop(process: subprocess.Popen) -> None:
    """Tell the worker to stop, and wait for its checkpoint."""
    try:
        process.stdin.write("stop\n")
        process.stdin.flush()
        process.wait(PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        process.kill()


class _Listener:
    """The worker's events as the host's progress bar, previews and messages, for web/js/training.js."""

    def __init__(self, node_id: str | None, steps: int) -> None:
        self.node_id, self.steps, self.bar = node_id, steps, comfy.utils.ProgressBar(steps)
        self.begun = False

    def __call__(self, event: dict) -> None:
        if event["event"] == "encode":
            host_graph.tell(self.node_id, [f"encoding pair {event['done']} of {event['total']}"])
            return
        preview = None
        sample = None
        for path in map(Path, event["samples"]):
            sample = self._reference(path)
            with Image.open(path) as image:
                preview = ("JPEG", image.convert("RGB"), PREVIEW_SIDE)
        self.bar.update_absolute(event["step"], event["steps"], preview)
        if not self.begun:  # loading and encoding came before
            self.begun = True
            host_graph.tell(self.node_id, [])
        message = {key: event[key] for key in ("step", "steps", "loss", "seconds")}
        host_runs.send(EVENT, self.node_id, {**message, "sample": sample})

    @staticmethod
    def _reference(path: Path) -> dict:
        """How the host's /view names a file of the output folder."""
        inside = path.relative_to(folder_paths.get_output_directory())
        return {"filename": inside.name, "subfolder": inside.parent.as_posix(), "type": "output"}

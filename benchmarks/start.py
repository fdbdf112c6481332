"""Start-up: imports, the command line, the pack in ComfyUI, the first and the second edit with kontext-tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measure import describe, machine, table
from peers import comfyui_folder

ROOT = Path(__file__).resolve().parents[1]

EDITS = """
import json, sys, time
started, clock = time.perf_counter(), time.process_time()
import torch
torch_done = time.process_time()
from kontext_core.edit import edit_image
from kontext_core.weights.load import load_model
imported = time.process_time()
model = load_model("kontext-tiny")
loaded = time.process_time()
picture = torch.rand(1, 3, 128, 128) * 2 - 1
answer = {"import_torch_s": torch_done - clock, "import_core_s": imported - torch_done, "load_s": loaded - imported}
edits = (("first_edit_s", "make it red"), ("second_edit_s", "make it red"), ("other_prompt_s", "add a star"))
for name, prompt in edits:
    begun = time.process_time()
    edit_image(model, picture, prompt, num_steps=4)
    answer[name] = time.process_time() - begun
print(json.dumps(answer))
"""

PACK = """
import importlib.util, json, sys, time
root, folder = sys.argv[1:3]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, folder)
import comfy.options
comfy.options.enable_args_parsing()
import asyncio, torch, utils.extra_config
import server, nodes
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)
begun = time.process_time()
spec = importlib.util.spec_from_file_location("kontext_pack", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
extension = loop.run_until_complete(module.comfy_entrypoint())
found = loop.run_until_complete(extension.get_node_list())
for node in found:
    node.GET_SCHEMA()
print(json.dumps({"s": time.process_time() - begun, "nodes": len(found)}))
"""


def measure(rounds: int) -> dict[str, Any]:
    """Processor seconds, the best of some rounds each: what a start costs when the files are in memory."""
    command_line = min(_timed(["-m", "kontext_core", "--help"]) for _ in range(max(rounds, 3)))
    bare = min(_timed(["-c", "pass"]) for _ in range(max(rounds, 3)))
    edits = [_answer(["-c", EDITS]) for _ in range(rounds)]
    report: dict[str, Any] = {"help_s": command_line, "python_s": bare}
    report |= {name: min(row[name] for row in edits) for name in edits[0]}
    folder = comfyui_folder()
    try:
        report["pack_s"] = None if folder is None else _answer(["-c", PACK, str(ROOT), str(folder)])["s"]
    except subprocess.CalledProcessError as error:
        print(error.stderr[-2000:], file=sys.stderr)
        report["pack_s"] = None
    return {**report, **machine(torch.device("cpu"), torch.float32), "clock": "processor"}


def _timed(arguments: list[str]) -> float:
    """Processor seconds of a Python process, its start included."""
    code = (
        "import resource, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], "
        "stdout=subprocess.DEVNULL, check=True); u = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(u.ru_utime + u.ru_stime)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def _answer(arguments: list[str]) -> dict[str, float]:
    return json.loads(_run(arguments).strip().splitlines()[-1])


def _run(arguments: list[str]) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


NAMES = {
    "python_s": "Python alone",
    "help_s": "`python -m kontext_core --help`",
    "import_torch_s": "import torch",
    "import_core_s": "import kontext_core's edit and loader after it",
    "load_s": "load kontext-tiny",
    "first_edit_s": "first edit, 4 steps",
    "second_edit_s": "second edit, same prompt and picture",
    "other_prompt_s": "third edit, another prompt",
    "pack_s": "the pack in a ComfyUI that is up",
}


def as_text(report: dict[str, Any]) -> str:
    rows = [[text, None if report[key] is None else f"{report[key]:.2f} s"] for key, text in NAMES.items()]
    return f"Starting; {describe(report)}\n\n{table(['', 'processor seconds'], rows)}"

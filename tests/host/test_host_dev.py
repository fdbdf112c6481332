"""`dev.py demo` and `serve` as they are typed, on the ComfyUI of these tests; nothing is left over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dev

# Everything but the set-up and where files go is dev.py's own.
START = """
import json, signal, sys
from pathlib import Path
import dev
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
comfyui, python, dev.HOST, dev.OUTPUT = map(Path, json.loads(sys.argv.pop(1)))
dev.prepare_environment = lambda: python
dev.prepare_host = lambda _: (comfyui, python)
sys.exit(dev.run())
"""


def start(comfyui: tuple[Path, Path], folder: Path, *arguments: str) -> subprocess.Popen:
    places = [*map(str, comfyui), str(folder / ".host"), str(folder / "output")]
    command = [sys.executable, "-u", "-c", START, json.dumps(places), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=dev.ROOT, **pipes)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/object_info/KontextEdit", timeout=10) as response:
            return bool(json.load(response))
    except (urllib.error.URLError, ConnectionError):
        return False


def test_demo_edits_the_shipped_picture_says_where_it_is_and_ends_its_server(comfyui, tmp_path):
    before = set((dev.ROOT / "output").glob("*"))
    process = start(comfyui, tmp_path, "demo")
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    written = [Path(line) for line in stdout.splitlines()]
    assert written and sorted(written) == sorted((tmp_path / "output").iterdir())
    original = np.asarray(
        Image.open(dev.ROOT / "workflows" / "input" / "toy_meadow.png").convert("RGB"), float
    )
    for path in written:
        edited = np.asarray(Image.open(path).convert("RGB"), float)
        assert edited.shape == original.shape and np.abs(edited - original).max() > 50
    assert set((dev.ROOT / "output").glob("*")) == before
    assert re.search(r"(\d+) / \1\n", stderr), "progress is shown"
    url = re.search(r"ComfyUI answers at (http://\S+)", stderr).group(1)
    assert not answers(url)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent the POSIX way")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_serve_prints_its_address_and_ends_with_its_server(comfyui, tmp_path, number, code):
    process = start(comfyui, tmp_path, "serve")
    try:
        line = process.stdout.readline()
        url = re.match(r"ComfyUI with this pack: (http://127\.0\.0\.1:\d+) ", line).group(1)
        assert answers(url)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and not answers(url)


def test_a_folder_that_is_no_comfyui_is_one_line(tmp_path):
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    code = "import sys, dev; dev.prepare_environment = lambda: None; sys.argv = ['dev.py', 'demo']; sys.exit(dev.run())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=dev.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    wrong = f"COMFYUI_PATH={tmp_path} is not a ComfyUI: it has no main.py and comfy/"
    assert done.stderr.strip() == f"dev.py: {wrong}"

"""A ComfyUI that is too old says so in a sentence, however far it gets; one that is new enough never does.

The hosts are stubs: as much of comfy, comfy_api and comfyui_version as each case has.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SENTENCE = "FLUX.1 Kontext needs ComfyUI 0.3.75 or newer"

LOAD = f"""
import asyncio, importlib.util, logging, sys
logging.basicConfig(format="%(levelname)s %(message)s")
spec = importlib.util.spec_from_file_location(
    "stub_pack", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}]
)
pack = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = pack
spec.loader.exec_module(pack)
"""
ENTER = "asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())"

EXTENSION = "class ComfyExtension: pass\n"
IO = "from types import SimpleNamespace\nclass Node: pass\nio = SimpleNamespace(ComfyNode=Node)\n"


def host(folder: Path, latest: str | None, version: str | None) -> Path:
    """A stub of a ComfyUI's folder."""
    (folder / "comfy").mkdir()
    (folder / "comfy" / "__init__.py").write_text("")
    if latest is not None:
        (folder / "comfy_api" / "latest").mkdir(parents=True)
        (folder / "comfy_api" / "__init__.py").write_text("")
        (folder / "comfy_api" / "latest" / "__init__.py").write_text(latest)
    if version is not None:
        (folder / "comfyui_version.py").write_text(f"__version__ = {version!r}\n")
    return folder


def load(folder: Path, code: str = "") -> subprocess.CompletedProcess:
    """The pack imported by a Python that finds the stub, from outside the repository."""
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\n{LOAD}\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(
    ("latest", "version", "found"),
    [
        (None, None, ""),
        (None, "0.3.40", "; this is 0.3.40"),
        ("", "0.3.40", "; this is 0.3.40"),
        (EXTENSION, "0.3.74", "; this is 0.3.74"),
        (EXTENSION, "0.3", "; this is 0.3.0"),
    ],
    ids=["no V3 API", "no V3 API and a version", "an empty one", "the one before", "a short version"],
)
def test_an_older_host_is_told_when_it_imports_the_pack(tmp_path, latest, version, found):
    told = load(host(tmp_path, latest, version))
    assert told.returncode == 0 and told.stderr.strip() == f"ERROR {SENTENCE}{found}: update ComfyUI."


@pytest.mark.parametrize("version", [None, "a fork of mine", "0.3.60"])
@pytest.mark.parametrize(
    "latest", ["", EXTENSION, EXTENSION + IO], ids=["empty", "no io", "an io without types"]
)
def test_a_host_whose_version_is_not_new_is_told_when_the_entry_point_fails(tmp_path, latest, version):
    told = load(host(tmp_path, latest, version), ENTER)
    assert told.returncode != 0 and "Traceback" in told.stderr, "the host has to hear of it too"
    assert f"ERROR {SENTENCE}" in told.stderr


SCHEMAS = """
import types
from stub_pack_nodes import failing
module = types.ModuleType("stub_pack.nodes")
module.KontextExtension = failing
sys.modules["stub_pack.nodes"] = module
"""
FAILING = """
class Node:
    @classmethod
    def define_schema(cls):
        raise TypeError("Input.__init__() got an unexpected keyword argument 'tooltip'")
class failing:
    async def get_node_list(self):
        return [Node]
"""


def test_a_schema_that_an_unknown_host_cannot_build_is_told_too(tmp_path):
    folder = host(tmp_path, EXTENSION, None)
    (folder / "stub_pack_nodes.py").write_text(FAILING)
    told = load(folder, SCHEMAS + ENTER)
    assert told.returncode != 0 and f"ERROR {SENTENCE}" in told.stderr and "unexpected keyword" in told.stderr


@pytest.mark.parametrize("version", ["0.3.75", "0.3.76", "0.33.0", "1.0"])
def test_a_host_that_is_new_enough_is_never_told_to_update(tmp_path, version):
    folder = host(tmp_path, EXTENSION, version)
    assert load(folder).stderr == ""
    told = load(folder, ENTER)  # it fails for another reason: the stub has no io
    assert told.returncode != 0 and SENTENCE not in told.stderr


def test_without_a_host_nothing_is_said(tmp_path):
    quiet = load(tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")

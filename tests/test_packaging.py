"""What is installed where: the manager's list, the registry's table, and the scripts that must run on Python alone."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dev
import kontext_core
from kontext_core.__main__ import build_parser

ROOT = Path(__file__).parents[1]

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def test_the_manager_installs_nothing_that_a_host_brings():
    brought = (
        "torch|torchvision|torchaudio|transformers|tokenizers|numpy|pillow|safetensors|einops|aiohttp|comfyui"
    )
    assert not [line for line in requirements() if re.match(brought, line, re.IGNORECASE)]


def test_the_bundled_weights_are_64_megabytes_at_most():
    files = [path for path in (ROOT / "kontext_core" / "assets").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") > 20e6
    assert sum(path.stat().st_size for path in files) <= 64e6


def documented_commands() -> list[str]:
    """`kontext …` and `-m kontext_core …` of docs/training.md, lines that go on joined."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^    (?:kontext|torchrun .*? -m kontext_core) (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("command", documented_commands())
def test_the_training_commands_of_the_docs_are_ones_that_there_are(command):
    build_parser().parse_args(shlex.split(command))


def test_the_registry_lists_what_the_manager_installs(pyproject):
    assert pyproject["project"]["dependencies"] == requirements()


def test_the_registry_has_what_it_wants(pyproject):
    comfy = pyproject["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and "requires-comfyui" in comfy
    assert "comfyui" not in pyproject["project"]["name"].lower()
    assert pyproject["project"]["urls"]["Repository"].startswith("https://")
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert "^Repository = " in workflow, "the placeholder would be published"


def test_the_version_is_one_everywhere(pyproject):
    version = pyproject["project"]["version"]
    assert kontext_core.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["dev.py", "workflows/queue.py"])
def test_scripts_that_come_first_need_python_alone(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"), feature_version=(3, 10))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names, f"{script}:{node.lineno} imports {name}"


def readme_map() -> set[str]:
    """The paths of the README's file map, folders with a slash at their end."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("```\n__init__.py")[1].split("```")[0].splitlines()
    paths = {"__init__.py"}
    for line in lines[1:]:
        name = line.split()[0]
        paths.add(f"kontext_core/{name}" if line.startswith("  ") else name)
    return paths


def test_the_readmes_file_map_names_only_what_exists():
    for path in readme_map():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_the_readmes_file_map_leaves_nothing_out():
    """Files and folders of the core, folders of the root and of web/; what git ignores or a dot hides is nobody's."""
    core = {f"kontext_core/{path.name}/" for path in (ROOT / "kontext_core").iterdir() if path.is_dir()}
    core |= {f"kontext_core/{path.name}" for path in (ROOT / "kontext_core").glob("*.py")}
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("the folders of the root are told apart by git")
    folders = {Path(name).parts[:-1] for name in git.stdout.splitlines()}
    root = {f"{parts[0]}/" for parts in folders if parts and parts[0] not in ("web", "kontext_core")}
    web = {f"web/{parts[1]}/" for parts in folders if parts[:1] == ("web",) and parts[1:]}
    wanted = {
        path for path in core | root | web if not path.split("/")[-1 - path.endswith("/")].startswith(".")
    }
    wanted -= {"kontext_core/__init__.py", "kontext_core/__pycache__/"}
    assert wanted <= readme_map(), sorted(wanted - readme_map())


@pytest.mark.parametrize(
    "torch", ["torch", "torch>=2.5", "Torch ~= 2.1 ; python_version > '3'", "torch[opt]"]
)
def test_another_comfyui_never_brings_another_torch(tmp_path, torch):
    listed = [
        "--extra-index-url https://example.invalid",
        torch,
        "torchvision",
        "# torchaudio",
        "torchsde",
        "av>=16",
    ]
    (tmp_path / "requirements.txt").write_text("\n".join([*listed, ""]))
    assert dev.wants_of(tmp_path) == (["torchsde", "av>=16"], False)
    (tmp_path / "requirements.txt").write_text("torchaudio>=2\n")
    assert dev.wants_of(tmp_path) == ([], True)


@pytest.mark.skipif(sys.platform == "win32", reason="the interpreter of the test is a shell script")
def test_a_second_run_installs_nothing_and_asks_nothing(tmp_path, monkeypatch):
    """The environment is this one, which has everything; after the first look a stamp answers."""
    environment = tmp_path / ".venv"
    python = dev.python_of(environment)
    python.parent.mkdir(parents=True)
    # not a link: Python finds its packages beside the path it was started by
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(dev, "VENV", environment)
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(dev, "pip", lambda _, *arguments: installed.append(arguments))
    assert dev.prepare_environment() == python
    assert installed == []

    def looks_again(*_):
        raise AssertionError("a second run looks again")

    with monkeypatch.context() as second:
        second.setattr(dev, "ask", looks_again)
        second.setattr(dev, "imports", looks_again)
        assert dev.prepare_environment() == python
    monkeypatch.setattr(dev, "EXTRAS", (*dev.EXTRAS, "quantize"))
    monkeypatch.setattr(dev, "ask", lambda *arguments, **named: ["something-new>=1"])
    monkeypatch.setattr(dev, "imports", lambda *_: True)
    dev.prepare_environment()
    assert ("something-new>=1",) in installed, "other requirements, and nothing was installed"

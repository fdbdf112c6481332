"""The arrows of the design: who may import whom, and nothing heavy where it is not needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "kontext_core"
CORE_FILES = sorted(CORE.rglob("*.py"))
PACK_FILES = [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py"))]

# From the bottom up: a layer may import itself and what stands before it. Files and folders of kontext_core.
LEAVES = ("devices", "displacement", "geometry", "images", "latents", "flow", "schedules")
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    LEAVES,
    ("models",),
    ("samplers", "cache", "accelerate", "registration", "prompts"),
    ("presets", "preserve", "preview", "record"),
    ("weights",),
    ("conditioning",),
    ("denoise",),
    ("edit",),
    ("evaluation",),
    ("turns", "training"),
    ("distill", "replay"),
    ("tiny",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# A host's own modules, and what a model file of a stranger must not be given to.
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfyui_version",
    "folder_paths",
    "nodes",
    "node_helpers",
    "execution",
    "server",
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}


def top(path: Path) -> str:
    """The file or folder of kontext_core that a file belongs to."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str, int]]:
    """(level, module, line) of every import in a file, those inside functions too; names count as modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.level, node.module, node.lineno
            else:
                yield from ((node.level, alias.name, node.lineno) for alias in node.names)


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """(file or folder of kontext_core, line) of every relative import of a core file."""
    package = path.relative_to(CORE).parts[:-1]
    for level, module, line in imports(path):
        if level:
            base = package[: len(package) - level + 1]
            parts = (*base, *module.split("."))
            name = parts[0]
            known = (CORE / name).is_dir() or (CORE / f"{name}.py").is_file()
            yield (name if known else "__init__"), line


def test_every_file_of_the_core_has_its_place():
    unplaced = {top(path) for path in CORE_FILES} - set(RANK) - {"assets"}
    assert not unplaced, f"say in LAYERS where {unplaced} stands"


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_imports_point_one_way(path):
    me = top(path)
    for name, line in own_imports(path):
        if me in LEAVES:
            assert name in (me, "__init__"), (
                f"{path.name}:{line} imports {name}; leaves import nothing of ours"
            )
        elif me == "models":
            assert name in ("models", "__init__"), (
                f"{path.name}:{line} imports {name}; models import models only"
            )
        else:
            above = RANK[name] > RANK[me] or (RANK[name] == RANK[me] and name != me)
            # The type of an argument may come from above; it is not imported when the program runs.
            assert not above or only_for_types(path, line), f"{path.name}:{line} imports {name} from above"


def only_for_types(path: Path, line: int) -> bool:
    """Whether a line stands under `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            if node.lineno <= line <= max(child.end_lineno for child in node.body):
                return True
    return False


@pytest.mark.parametrize("path", [*CORE_FILES, *PACK_FILES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_own_modules_are_imported_relatively_and_nothing_unsafe_is_used(path):
    for level, module, line in imports(path):
        first = module.split(".")[0]
        assert level or first != "kontext_core", f"{path.name}:{line} imports itself by an absolute name"
        assert first not in UNSAFE_MODULES, f"{path.name}:{line} imports {module}"
        if CORE in path.parents and level == 0:
            assert first not in HOST, f"{path.name}:{line}: the core knows no host, it imports {module}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in UNSAFE_CALLS, f"{path.name}:{node.lineno} calls {node.func.id}"


@pytest.mark.parametrize("path", PACK_FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_the_host_files_touch_comfy_and_folder_paths(path):
    if path.name.startswith("host"):
        return
    allowed = {"comfy_api"}
    if path == ROOT / "__init__.py":
        allowed.add("comfyui_version")  # to tell an older host so, before anything of it is imported
    for level, module, line in imports(path):
        first = module.split(".")[0]
        outside = level == 0 and first in HOST - allowed
        assert not outside, f"{path.name}:{line} imports {module}; only nodes/host*.py do"


def run_python(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_help_imports_nothing_heavy():
    # Seconds depend on the machine; what is imported does not.
    code = """
import sys
from kontext_core.__main__ import build_parser, main

(commands,) = (action for action in build_parser()._actions if action.choices)
assert {"edit", "generate", "turns", "inspect", "convert", "train", "distill", "bench"} <= set(commands.choices)
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in commands.choices)):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0, arguments
heavy = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "einops", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    assert "kontext" in run_python(code)


def test_importing_the_core_alone_imports_nothing_heavy():
    run_python("import sys, kontext_core; assert 'torch' not in sys.modules")

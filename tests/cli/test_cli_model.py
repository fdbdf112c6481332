"""Where the command line finds a model: parts and tokenizers given one by one; the same bits from every process.

And the command as it is installed, and what it says where PyTorch is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_core import __version__
from kontext_core.__main__ import main
from kontext_core.models.tokenizers import ClipTokenizer

ROOT = Path(__file__).parents[2]


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def scattered(random_tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """The parts and tokenizers of a model, each in a folder of its own, the tokenizers as one tokenizer.json each."""
    base = tmp_path_factory.mktemp("scattered")
    files = {
        "model": "flux1-kontext-tiny.safetensors",
        "vae": "ae.safetensors",
        "t5": "text_encoder_2/model.safetensors",
        "clip": "text_encoder/model.safetensors",
        "t5-tokenizer": "tokenizer_2/tokenizer.json",
    }
    places = {}
    for name, file in files.items():
        places[name] = base / name / Path(file).name
        places[name].parent.mkdir()
        shutil.copy(random_tiny_folder / file, places[name])
    shutil.copy(random_tiny_folder / "text_encoder" / "config.json", base / "clip")
    places["clip-tokenizer"] = base / "clip-tokenizer" / "tokenizer.json"
    places["clip-tokenizer"].parent.mkdir()
    words = ClipTokenizer.from_path(random_tiny_folder / "tokenizer").tokenizer
    words.save(str(places["clip-tokenizer"]))
    return places


def generate(out: Path, *options: object) -> int:
    fixed = ["--prompt", "a red circle", "--steps", "1", "--size", "64x48", "--output", str(out)]
    return main(["generate", *fixed, *map(str, options)])


def test_parts_and_tokenizers_from_anywhere_make_the_same_picture(scattered, random_tiny_folder, tmp_path):
    whole, parts = tmp_path / "whole.png", tmp_path / "parts.png"
    assert generate(whole, "--model", random_tiny_folder) == 0
    assert generate(parts, *(part for name, path in scattered.items() for part in (f"--{name}", path))) == 0
    assert np.array_equal(np.asarray(Image.open(whole)), np.asarray(Image.open(parts)))


@pytest.mark.parametrize("left_out", ["t5", "clip", "vae", "t5-tokenizer", "clip-tokenizer"])
def test_a_part_that_is_not_given_is_missed_by_name(scattered, tmp_path, capsys, monkeypatch, left_out):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    given = {name: path for name, path in scattered.items() if name != left_out}
    out = tmp_path / "out.png"
    assert generate(out, *(part for name, path in given.items() for part in (f"--{name}", path))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    kind = {"t5": "T5", "clip": "CLIP", "vae": "autoencoder"}[left_out.removesuffix("-tokenizer")]
    assert error.startswith("error: ") and kind in error and not out.exists()
    assert ("no tokenizer" in error) == left_out.endswith("tokenizer")


def test_a_tokenizer_that_is_not_there_is_named(tmp_path, random_tiny_folder, capsys):
    absent = tmp_path / "absent.json"
    assert generate(tmp_path / "o.png", "--model", random_tiny_folder, "--t5-tokenizer", absent) == 2
    assert f"no T5 tokenizer at {absent}" in capsys.readouterr().err


def test_training_takes_tokenizers_from_anywhere_too(scattered, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red square")
    run = ["train", str(tmp_path), "--output", str(tmp_path / "run"), "--areas", "1024", "--steps", "1"]
    places = [part for name, path in scattered.items() for part in (f"--{name}", str(path))]
    assert main([*run, *places, "--rank", "1", "--dtype", "float32"]) == 0
    assert main([*run, *places[:-2]]) == 2
    assert "no tokenizer for a CLIP" in capsys.readouterr().err


def test_two_processes_write_the_same_bytes(tmp_path, random_tiny_folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (51, 77, 3), dtype=np.uint8)).save(
        tmp_path / "in.png"
    )
    written = []
    for hashes in ("0", "1"):  # the order of sets must not matter either
        folder = tmp_path / hashes
        folder.mkdir()
        done = run(
            sys.executable, "-m", "kontext_core", "edit", tmp_path / "in.png", "--prompt", "add a star", "--seed", 5,
            "--steps", 3, "--model", random_tiny_folder, "--output", folder / "out.png",
            cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hashes},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        written.append((folder / "out.png").read_bytes())
    assert written[0] == written[1]


@pytest.mark.skipif(sys.platform == "win32", reason="scripts are .exe files in another folder there")
def test_the_installed_command_is_the_command_line(tmp_path):
    if util.find_spec("setuptools") is None:
        pytest.skip("setuptools builds the package")
    source, place = tmp_path / "source", tmp_path / "installed"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")  # 50 MB of weights prove nothing here
    shutil.copytree(ROOT / "kontext_core", source / "kontext_core", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation"]
    built = run(*pip, "--target", place, source)
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "PYTHONPATH": str(place)}
    version = run(place / "bin" / "kontext", "--version", cwd=tmp_path, env=environment)
    assert (version.returncode, version.stdout.strip()) == (0, f"kontext {__version__}"), version.stderr
    for name in ("tokenizer/vocab.json", "tokenizer_2/tokenizer.json", "text_encoder/config.json"):
        assert (place / "kontext_core" / "assets" / "kontext-tiny" / name).is_file(), "assets come along"


@pytest.mark.parametrize("lacking", ["torch", "einops", "tokenizers"])
def test_where_a_package_is_missing_one_line_says_how_to_install_it(tmp_path, lacking):
    (tmp_path / f"{lacking}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{lacking}'\", name='{lacking}')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "kontext_core",
        "generate",
        "--prompt",
        "x",
        "--output",
        tmp_path / "o.png",
    ]
    done = run(*command, cwd=ROOT, env=environment)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {lacking} is not installed")
    assert 'pip install -e ".[standalone]"' in done.stderr and "dev.py" in done.stderr
    assert not (tmp_path / "o.png").exists()

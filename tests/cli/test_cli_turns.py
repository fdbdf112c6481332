"""`turns` from the outside: a session in a folder, gone on with, branched and redone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kontext_core.__main__ import main
from kontext_core.cli import turns as command
from kontext_core.models.lora import lora_patch, save_lora
from kontext_core.presets import KONTEXT_TINY
from kontext_core.turns import CHAINS, Session


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    y, x = np.mgrid[0:48, 0:72]
    Image.fromarray(np.stack([3 * x, 5 * y, x + y], 2).astype(np.uint8)).save(path)
    return path


def test_a_session_is_made_gone_on_with_branched_and_redone(picture, tmp_path, random_tiny_folder, capsys):
    folder = tmp_path / "session"
    base = ["turns", str(picture), "--folder", str(folder), "--model", str(random_tiny_folder), "--json"]

    def call(*arguments: str) -> list[dict]:
        assert main([*base, *arguments]) == 0
        return json.loads(capsys.readouterr().out)["turns"]

    made = call("--do", "make it red", "--do", "add a star", "--steps", "1", "--seed", "4")
    assert [(t["number"], t["from"], t["seed"]) for t in made] == [(1, 0, 4), (2, 1, 5)]
    files = {f"turn-00{n}.{kind}" for n in (1, 2) for kind in ("png", "safetensors")}
    assert {path.name for path in folder.iterdir()} == files | {"session.json", "drift.json", "drift.png"}
    assert Image.open(folder / "turn-002.png").size == (72, 48)
    kept = (folder / "turn-001.png").read_bytes()

    branched = call("--from", "1", "--do", "remove the star", "--steps", "1")
    assert [(t["number"], t["from"], t["seed"]) for t in branched][2:] == [(3, 1, 5)]
    redone = call("--redo", "2", "--seed", "77")
    assert (redone[3]["instruction"], redone[3]["from"], redone[3]["seed"]) == ("add a star", 1, 77)
    assert redone[0]["seconds"] == {} and redone[3]["seconds"]["sample"] > 0
    assert (folder / "turn-001.png").read_bytes() == kept
    assert (folder / "turn-004.png").read_bytes() != (folder / "turn-002.png").read_bytes()
    session = Session.from_json((folder / "session.json").read_text())
    assert [turn.settings for turn in session.turns] == [{"num_steps": 1}] * 4
    assert set(redone[3]["drift"]) == {"psnr", "ssim", "similarity", "edited", "shift"}

    for arguments, words in (
        (["--redo", "2"], "takes a --seed"),
        (["--redo", "9", "--seed", "1"], "there is no turn 9"),
        ([], "--do is missing"),
        (["--do", "x", "--chain", "pictures"], "its own --chain: use a new folder"),
    ):
        assert main([*base, *arguments]) == 2
        assert words in capsys.readouterr().err
    Image.new("RGB", (72, 48)).save(picture)
    assert main([*base, "--do", "x"]) == 2
    assert "the turns of another picture" in capsys.readouterr().err


def test_a_session_keeps_its_loras_and_goes_on_with_them(picture, tmp_path, random_tiny_folder, capsys):
    hidden = KONTEXT_TINY.transformer.hidden_size
    lora = tmp_path / "look.safetensors"
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(hidden, 4, generator=generator)
    save_lora(lora, [lora_patch("img_in", torch.randn(4, 64, generator=generator), up)])
    base = ["turns", str(picture), "--model", str(random_tiny_folder), "--steps", "1", "--json"]

    def call(folder: str, *arguments: str) -> list[dict]:
        assert main([*base, "--folder", str(tmp_path / folder), *arguments]) == 0
        return json.loads(capsys.readouterr().out)["turns"]

    def same(one: str, other: str) -> bool:
        return (tmp_path / one).read_bytes() == (tmp_path / other).read_bytes()

    with_it = ["--lora", f"{lora}=0.5"]
    call("whole", "--do", "make it red", "--do", "add a star", *with_it)
    call("parts", "--do", "make it red", *with_it)
    shutil.copy(lora, tmp_path / "parts" / lora.name)  # beside the session is where it is looked for first
    made = call("parts", "--do", "add a star")
    assert [turn["loras"] for turn in made] == [[["look.safetensors", 0.5]]] * 2
    assert same("parts/turn-002.png", "whole/turn-002.png")
    latents = [load_file(tmp_path / name / "turn-002.safetensors")["latent"] for name in ("parts", "whole")]
    assert torch.equal(*latents)
    made = call("parts", "--from", "1", "--do", "add a star", "--seed", "1", "--no-loras")
    assert made[2]["loras"] == [] and not same("parts/turn-003.png", "parts/turn-002.png")
    assert call("parts", "--redo", "2", "--seed", "1")[3]["loras"] == [["look.safetensors", 0.5]]
    assert same("parts/turn-004.png", "parts/turn-002.png")

    session = (tmp_path / "parts" / "session.json").read_bytes()
    (tmp_path / "parts" / lora.name).unlink()
    command = [*base, "--folder", str(tmp_path / "parts"), "--redo", "2", "--seed", "9"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"turn 2 of {tmp_path / 'parts'} was made with the LoRA look.safetensors" in said
    assert "--no-loras to do without" in said
    assert (tmp_path / "parts" / "session.json").read_bytes() == session


def test_turns_of_a_picture_below_the_window_of_ssim_end_with_what_can_be_said(
    picture, tmp_path, random_tiny_folder, capsys
):
    Image.open(picture).resize((8, 9)).save(picture)
    folder = tmp_path / "session"
    base = [
        "turns",
        str(picture),
        "--folder",
        str(folder),
        "--model",
        str(random_tiny_folder),
        "--steps",
        "1",
    ]
    assert main([*base, "--do", "make it red"]) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("turn 1: ") and (
        "SSIM not measured outside" in said or said.endswith("all edited")
    )
    assert json.loads((folder / "drift.json").read_text())[0]["ssim"] is None
    assert (folder / "drift.png").is_file()


def test_the_choices_offered_are_those_of_the_core():
    assert command.CHAINS == CHAINS

"""`edit` and `generate` from the outside: the JSON, the picture, the record, errors in one line, interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compiler import needs_compiler
from PIL import Image

from kontext_core import geometry, record, samplers
from kontext_core.__main__ import main
from kontext_core.cli import edit as command
from kontext_core.conditioning import CONVENTIONS
from kontext_core.models import regional

ROOT = Path(__file__).parents[2]
KEYS = ["output", "width", "height", "seed", "steps", "guidance", "model", "seconds", "peak_rss_bytes"]


# A shell's background jobs are started deaf to an interrupt, and so is what they start.
HEARING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from kontext_core.__main__ import main
sys.exit(main())
"""


def start(*arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HEARING, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "in.png"
    pixels = np.random.default_rng(0).integers(0, 256, (51, 77, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_edit_prints_one_json_object_and_writes_the_picture_at_its_own_size(
    picture, tmp_path, random_tiny_folder
):
    out = tmp_path / "out.png"
    process = start(
        "edit", picture, "--prompt", "make the circle red", "--output", out,
        "--model", random_tiny_folder, "--steps", 2, "--seed", 5, "--guidance", 3, "--json",
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    answer = json.loads(stdout)
    assert list(answer) == KEYS
    assert list(answer["seconds"]) == ["load", "encode", "sample", "decode", "total"]
    assert answer["output"] == str(out) and answer["model"] == "random-tiny"
    assert (answer["width"], answer["height"], answer["seed"]) == (77, 51, 5)
    assert (answer["steps"], answer["guidance"]) == (2, 3.0)
    parts = [answer["seconds"][key] for key in ("load", "encode", "sample", "decode")]
    assert all(part > 0 for part in parts) and sum(parts) <= answer["seconds"]["total"] + 0.01
    # More than the weights, less than the machine.
    assert 1e8 < answer["peak_rss_bytes"] < 8e9
    assert "step 2/2" in stderr and "77x51 to" in stderr
    result = Image.open(out)
    assert result.size == (77, 51)
    # Transparency is the original's.
    assert np.array_equal(np.asarray(result)[..., 3], np.asarray(Image.open(picture))[..., 3])


def test_the_record_repeats_the_picture_to_the_byte(picture, tmp_path, random_tiny_folder):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    options = ["--model", str(random_tiny_folder)]
    settings = ["--prompt", "add a “Star”", "--steps", "2", "--seed", "9", "--fit", "pad", "--shift", "1.15"]
    assert main(["edit", str(picture), "--output", str(first), *settings, *options]) == 0
    made = record.load_record(first)
    assert made.prompts == ("add a “Star”",) and made.settings["fit"] == "pad" and made.settings["steps"] == 2
    assert {stamp.role for stamp in made.weights} == {"transformer", "autoencoder", "t5", "clip"}
    assert made.inputs[0].name == "in.png"
    assert main(["edit", str(picture), "--output", str(second), "--like", str(first), *options]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert (
        main(["edit", str(picture), "--output", str(second), "--like", str(first), "--seed", "1", *options])
        == 0
    )
    assert record.differences(made, record.load_record(second)) == ["settings: seed is 9 and 1"]


def test_what_acceleration_saved_is_in_the_json(picture, tmp_path, random_tiny_folder, capsys):
    arguments = ["edit", str(picture), "--prompt", "x", "--steps", "6", "--model", str(random_tiny_folder)]
    options = ["--output", str(tmp_path / "out.png"), "--reuse-context", "3", "--json"]
    assert main([*arguments, *options]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert list(answer) == [*KEYS, "saved"]
    assert answer["saved"]["full"] + answer["saved"]["part"] == 6 and answer["saved"]["part"] > 0
    assert 0 < answer["saved"]["operations"] < 1 and answer["saved"]["notes"] == []
    assert "of the operations saved" in captured.err


@needs_compiler
def test_compile_time_is_told(picture, tmp_path, random_tiny_folder, capsys):
    torch._dynamo.reset()
    arguments = ["edit", str(picture), "--prompt", "x", "--steps", "1", "--model", str(random_tiny_folder)]
    assert main([*arguments, "--output", str(tmp_path / "out.png"), "--compile", "--json"]) == 0
    captured = capsys.readouterr()
    seconds = json.loads(captured.out)["seconds"]
    assert 0 < seconds["compile"] < seconds["sample"]
    assert "compiled 2 graphs in" in captured.err


def test_without_a_compiler_an_edit_goes_on_and_says_so(
    picture, tmp_path, random_tiny_folder, capsys, monkeypatch
):
    monkeypatch.setattr(regional, "compiler_problem", lambda _: "no C++ compiler was found")
    arguments = ["edit", str(picture), "--prompt", "x", "--steps", "1", "--model", str(random_tiny_folder)]
    assert main([*arguments, "--output", str(tmp_path / "out.png"), "--compile", "--json"]) == 0
    captured = capsys.readouterr()
    assert "compile" not in json.loads(captured.out)["seconds"]
    assert "warning: not compiled" in captured.err and "no C++ compiler was found" in captured.err


def test_generate_has_the_models_area_or_the_size_asked_for(tmp_path, random_tiny_folder, capsys):
    out = tmp_path / "out.png"
    options = ["--prompt", "a red circle", "--steps", "1", "--json", "--model", str(random_tiny_folder)]
    assert main(["generate", "--output", str(out), *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == KEYS and (answer["width"], answer["height"]) == (128, 128)
    assert main(["generate", "--output", str(out), "--size", "160x96", *options]) == 0
    assert Image.open(out).size == (160, 96)


def test_few_steps_come_from_the_distilled_model(tmp_path, random_few_step_folder, capsys):
    out = tmp_path / "out.webp"
    options = ["--prompt", "a red circle", "--json", "--model", str(random_few_step_folder)]
    assert main(["generate", "--output", str(out), "--few-step", "2", *options]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 2 and Image.open(out).format == "WEBP"


def test_preserve_keeps_every_pixel_outside_the_mask(picture, tmp_path, random_tiny_folder):
    out = tmp_path / "out.png"
    mask = np.zeros((51, 77), dtype=np.uint8)
    mask[10:40, 20:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["edit", str(picture), "--prompt", "x", "--steps", "1", "--model", str(random_tiny_folder)]
    assert main([*arguments, "--output", str(out), "--mask", str(tmp_path / "mask.png")]) == 0
    before, after = (np.asarray(Image.open(path)) for path in (picture, out))
    assert np.array_equal(before[mask == 0], after[mask == 0])
    assert not np.array_equal(before[mask > 0], after[mask > 0])


def test_references_and_an_explicit_size_go_together(picture, tmp_path, random_tiny_folder):
    out = tmp_path / "out.png"
    arguments = ["edit", str(picture), str(picture), "--prompt", "x", "--steps", "1", "--size", "96x64"]
    assert main([*arguments, "--output", str(out), "--model", str(random_tiny_folder)]) == 0
    assert Image.open(out).size == (96, 64) and Image.open(out).mode == "RGBA"
    assert [stamp.role for stamp in record.load_record(out).inputs] == ["picture", "reference 1"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent the POSIX way")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_file(picture, tmp_path, random_tiny_folder, number, code):
    out = tmp_path / "out.png"
    process = start(
        "edit", picture, "--prompt", "x", "--output", out, "--model", random_tiny_folder, "--steps", 5000
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.send_signal(number)
            break
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == code
    assert "Traceback" not in rest
    assert sorted(os.listdir(tmp_path)) == ["in.png"]


def run(capsys, *arguments: object) -> tuple[int, str]:
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100x128"], "100x128 is not in multiples of 16; try 96x128"),
        (["--size", "big"], "'big' is no size"),
        (["--steps", "0"], "0 is below 1"),
        (["--seed", "18446744073709551616"], "is above 18446744073709551615"),
        (["--few-step", "3"], "--few-step"),
        (["--fit", "zoom"], "'stretch', 'crop', 'pad', 'keep'"),
        (["--shift", "much"], "give resolution, none or a number"),
        (["--output", "out.xyz"], "the suffix must be one of .png"),
        (["--output", "absent/out.png"], "does not exist; make it first"),
        (["--like", "in.png"], "holds no record"),
        (["--bfl", "--fit", "pad"], "--bfl fixes fit"),
        (["--mask", "small.png"], "is 8x8 and the picture 77x51"),
        (["--preserve", "--size", "64x64"], "leave --size at auto"),
        (["--output", "out.jpg"], "is transparent and JPEG is not"),
        (["--device", "warp"], "--device warp cannot be used"),
        (["--model", "absent"], "absent: neither a file nor a folder"),
    ],
)
def test_a_bad_option_is_one_line_and_code_two(picture, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("small.png")
    code, err = run(capsys, "edit", "in.png", "--prompt", "x", "--output", "out.png", *arguments)
    assert code == 2 and words in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["in.png", "small.png"]


def test_a_bad_picture_a_missing_prompt_and_a_missing_student_are_one_line(
    tmp_path, capsys, random_tiny_folder
):
    bad, out = tmp_path / "bad.png", tmp_path / "out.png"
    bad.write_bytes(b"no picture")
    assert "bad.png is not a picture" in run(capsys, "edit", bad, "--prompt", "x", "--output", out)[1]
    absent = tmp_path / "absent.png"
    assert "there is no picture at" in run(capsys, "edit", absent, "--prompt", "x", "--output", out)[1]
    assert "--prompt is missing" in run(capsys, "generate", "--output", out)[1]
    assert "COMMAND" in run(capsys)[1]
    arguments = ("generate", "--prompt", "x", "--output", out, "--few-step", 2, "--model", random_tiny_folder)
    code, err = run(capsys, *arguments)
    assert code == 2 and "error: few-step sampling needs a distilled model and random-tiny has none" in err
    assert not out.exists()


def test_an_empty_prompt_works_and_unknown_words_warn(tmp_path, capsys, random_tiny_folder):
    options = ["--output", str(tmp_path / "o.png"), "--steps", "1", "--model", str(random_tiny_folder)]
    assert main(["generate", "--prompt", "", *options]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["generate", "--prompt", "赤い円 " + "red " * 100, *options]) == 0
    err = capsys.readouterr().err
    assert "warning: random-tiny does not know: 赤い円" in err and "cut off and not read: “" in err


def test_the_choices_offered_are_those_of_the_core():
    # They are written out in the command line, which imports nothing heavy before it runs.
    assert command.FITS == geometry.POLICIES
    assert command.CONVENTIONS == CONVENTIONS
    assert set(command.SAMPLERS) == set(samplers.SAMPLERS)

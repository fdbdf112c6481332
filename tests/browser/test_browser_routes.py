"""The routes behind the browser's side: what they answer, and what they refuse. No browser is needed."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest


@pytest.fixture(scope="module")
def ask(host):
    """POST to a route: (status, JSON)."""

    def ask(route: str, body) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{host.server.url}/kontext/{route}", data, method="POST")
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    return ask


def test_a_plan_gives_the_bucket_and_what_it_crops(ask):
    status, plan = ask("plan", {"pictures": [[1500, 1000]], "fit": "crop"})
    assert status == 200 and plan["size"] == [1248, 832]
    assert plan["tokens"] == {"target": 4056, "context": 4056, "text": 512, "total": 8624}
    assert plan["fits"][0]["policy"] == "crop" and plan["memory"] is None


def test_a_plan_reads_the_models_own_size_and_memory(ask, tiny):
    _, plan = ask("plan", {"pictures": [[300, 200]], "model": tiny["diffusion_models"], "vae": tiny["vae"]})
    assert plan["problem"] is None and plan["area"] == 128 * 128
    assert plan["memory"]["weights"] > 1_000_000 and plan["memory"]["fits"]


def test_a_file_of_another_kind_is_a_problem_in_words(ask, tiny, host):
    copy = host.put_model("diffusion_models", "a_vae.safetensors")
    copy.write_bytes((host.server.base / "models" / "vae" / tiny["vae"]).read_bytes())
    _, plan = ask("plan", {"model": "a_vae.safetensors"})
    assert "autoencoder" in plan["problem"]


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "..\\x.safetensors"])
def test_only_listed_files_are_looked_at(ask, name):
    _, plan = ask("plan", {"model": name})
    assert "there is no" in plan["problem"]


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[1]",
        b"[" * 3000,
        b"x" * 70_000,
        {"pictures": [[0, 5]]},
        {"pictures": [["a", 5]]},
        {"pictures": 5},
        {"fit": "bend"},
        {"width": True},
        {"batch_size": 10**9},
        {"weight_dtype": "int4"},
        {"else": 1},
    ],
)
def test_what_does_not_fit_is_refused_in_json(ask, body):
    status, answer = ask("plan", body)
    assert status == 400 and answer["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"width": 64}, "give both"),
        ({"width": 200, "height": 200}, "multiples of 16"),
        ({"pictures": [[300, 200]], "width": 200, "height": 200}, "multiples of 16"),
        ({"pictures": [[300, 200]], "fit": "pad", "padding": "#80"}, "such as #808080"),
    ],
)
def test_what_is_still_being_typed_is_a_problem_in_words(ask, body, said):
    """No refusal, which a browser would write into its console at every key."""
    status, plan = ask("plan", body)
    assert status == 200 and said in plan["problem"]


def test_the_server_says_whose_a_run_is_to_its_own_client_alone(ask, host):
    workflow = {"id": "5f0e", "nodes": [], "extra": {"kontext_tab": "a1"}}
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "scene.png"}},
             "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}  # fmt: skip
    queued = {"prompt": graph, "client_id": "me", "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
    request = urllib.request.Request(f"{host.server.url}/prompt", json.dumps(queued).encode(), method="POST")
    with urllib.request.urlopen(request) as response:
        prompt = json.load(response)["prompt_id"]
    nobodys = {"mine": False, "workflow": None, "mark": None}
    mine = {"mine": True, "workflow": "5f0e", "mark": "a1"}
    assert ask("whose", {"prompt": prompt, "client": "me"}) == (200, mine)
    for body in ({"prompt": prompt, "client": "you"}, {"prompt": prompt}, {"prompt": "none", "client": "me"}):
        assert ask("whose", body) == (200, nobodys)
    assert ask("whose", {"prompt": 5, "client": "me"})[0] == 400
    assert ask("whose", {"prompt": prompt, "client": ["me"]})[0] == 400


def test_presets_are_filled_and_quoted(ask):
    _, answer = ask("prompt", {"preset": "replace_text", "values": {"old": "joy", "new": "DON'T"}})
    assert answer["prompt"].startswith("Replace 'joy' with \"DON'T\"")
    assert ask("prompt", {"preset": "no such"})[0] == 400
    assert ask("prompt", {"preset": "relight", "values": {"light": 5}})[0] == 400


def test_a_blank_may_have_any_name(ask):
    for name in ("name", "self", "preset"):
        status, answer = ask("prompt", {"preset": "relight", "values": {name: "x"}})
        assert status == 400 and f"has no {name}" in answer["error"]


def test_a_mistake_of_ours_is_answered_in_json_and_logged_and_cancelling_cancels(inside):
    answer = inside("answering")
    assert answer["status"] == 500 and answer["type"] == "application/json"
    assert "KeyError" in answer["body"]["error"]
    assert "Traceback" in answer["log"] and "KeyError" in answer["log"]
    assert answer["cancelled"]


def test_only_pictures_of_the_views_are_looked_for(ask, host):
    name = f"kontext_{'0' * 24}.png"
    folder = host.server.base / "temp"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    (folder / "other.png").write_bytes(b"")
    asked = [name, "other.png", f"../temp/{name}", f"kontext_{'1' * 24}.png"]
    assert ask("there", {"pictures": asked}) == (200, {"there": [name]})
    assert ask("there", {"pictures": [5]})[0] == 400
    assert ask("there", {"pictures": name})[0] == 400


def test_a_plan_says_roughly_how_long_a_step_takes(ask, tiny):
    seconds = [
        ask(
            "plan",
            {"pictures": [[300, 200]], "model": tiny["diffusion_models"], "width": side, "height": side},
        )[1]["seconds_per_step"]
        for side in (128, 512)
    ]
    assert 0 < seconds[0] < seconds[1]
    assert ask("plan", {"pictures": [[300, 200]]})[1]["seconds_per_step"] is None


def test_hints_are_given(ask):
    _, answer = ask("hints", {"prompt": "make her hair red"})
    assert [hint["code"] for hint in answer["hints"]] == ["pronoun"]

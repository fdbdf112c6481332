"""What was encoded once is not encoded again, one sample at a time, and never after a change of weights."""

from __future__ import annotations

import pytest
import torch

from kontext_core import cache
from kontext_core.conditioning import encode_prompt
from kontext_core.edit import edit_image, encode_image
from kontext_core.models.lora import read_lora
from kontext_core.models.lora_apply import apply, remove
from kontext_core.weights.load import load_model


@pytest.fixture
def model(random_tiny_folder):
    return load_model(random_tiny_folder)


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def calls(module: torch.nn.Module) -> list[int]:
    """The batch sizes that a network is called with from now on."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def test_a_prompt_is_encoded_once_alone_or_in_a_batch(model):
    t5, clip = calls(model.t5), calls(model.clip)
    first = encode_prompt(model, ["make it red", "add a star", "make it red"])
    assert t5 == [1, 1] and clip == [1, 1]
    again = encode_prompt(model, ["add a star"])
    assert len(t5) == 2
    assert torch.equal(again.txt[0], first.txt[1]) and torch.equal(again.vec[0], first.vec[1])
    assert torch.equal(first.txt[0], first.txt[2])


def test_warnings_come_with_the_kept_prompt_too(model):
    long = "red " * 600
    first = encode_prompt(model, [long]).warnings
    assert encode_prompt(model, ["a", long]).warnings == first != ()


def test_a_picture_is_encoded_once_whatever_batch_it_comes_in(model, pictures):
    encoder = calls(model.autoencoder.encoder)
    batch = encode_image(model, pictures)
    assert encoder == [1, 1, 1]
    assert torch.equal(encode_image(model, pictures[1:2])[0], batch[1])
    assert len(encoder) == 3
    changed = pictures.clone()
    changed[0, 0, 0, 0] += 1e-6
    assert not torch.equal(encode_image(model, changed)[0], torch.zeros_like(batch[0]))
    assert len(encoder) == 4


def test_many_prompts_over_one_picture_and_many_pictures_under_one_prompt_encode_each_once(model, pictures):
    t5, encoder = calls(model.t5), calls(model.autoencoder.encoder)
    options = {"num_steps": 1, "size": (48, 32)}
    edit_image(model, pictures[:1], ["a", "b", "c"], **options)
    assert len(t5) == 3 and len(encoder) == 1
    edit_image(model, pictures, "a", **options)
    assert len(t5) == 3 and len(encoder) == 3


def test_nothing_is_taken_from_before_a_write_to_the_weights(model, pictures):
    before = encode_prompt(model, ["a"]), encode_image(model, pictures[:1])
    with torch.no_grad():
        for module in (model.clip, model.autoencoder):
            for parameter in module.parameters():
                parameter.mul_(1.5)
    after = encode_prompt(model, ["a"]), encode_image(model, pictures[:1])
    assert not torch.equal(before[0].vec, after[0].vec)
    assert not torch.equal(before[1], after[1])


def test_another_parameter_in_the_same_memory_is_noticed(model, pictures):
    before = encode_image(model, pictures[:1])
    layer = model.autoencoder.encoder.conv_in
    values = layer.weight.data.mul_(1.5)  # not counted by itself
    layer.weight = torch.nn.Parameter(values, requires_grad=False)
    assert not torch.equal(encode_image(model, pictures[:1]), before)


def test_a_write_to_weights_that_were_made_in_inference_mode_is_noticed(random_tiny_folder, pictures):
    with torch.inference_mode():
        model = load_model(random_tiny_folder)
    assert model.autoencoder.encoder.conv_in.weight.is_inference()
    before = encode_image(model, pictures[:1])
    encoder = calls(model.autoencoder.encoder)
    assert torch.equal(encode_image(model, pictures[:1]), before) and encoder == []
    with torch.inference_mode():
        model.autoencoder.encoder.conv_in.weight.mul_(1.5)
    assert not torch.equal(encode_image(model, pictures[:1]), before)


def test_a_lora_on_a_text_encoder_and_off_again_is_noticed(model, tmp_path):
    name = "text_model.encoder.layers.0.mlp.fc1"
    layer = model.clip.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(layer.out_features, 2, generator=generator)
    down = torch.randn(2, layer.in_features, generator=generator)
    key = "lora_te1_" + name.replace(".", "_")
    file = read_lora({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, name="test")
    plain = encode_prompt(model, ["a"]).vec
    apply({"clip": model.clip}, [(file, 1.0)])
    changed = encode_prompt(model, ["a"]).vec
    remove({"clip": model.clip})
    assert not torch.equal(plain, changed)
    assert torch.equal(encode_prompt(model, ["a"]).vec, plain)


def test_memory_is_bounded_and_the_oldest_goes_first():
    kept = cache.ContentCache(max_bytes=3 * 400)
    for number in range(5):
        kept.get(number, lambda: (torch.zeros(100),))
        kept.get(0, lambda: (torch.zeros(100),))
    assert len(kept) == 3 and kept.nbytes == 1200
    assert kept.misses == 5
    kept.get(1, lambda: (torch.zeros(100),))
    assert kept.misses == 6
    kept.get("large", lambda: (torch.zeros(1000),))
    assert len(kept) == 3


def test_a_content_is_its_values_shape_and_dtype():
    x = torch.arange(6.0).view(2, 3)
    assert cache.content(x) == cache.content(x.t().contiguous().t())
    assert len({cache.content(y) for y in (x, x.t(), x.half(), x + 1)}) == 4

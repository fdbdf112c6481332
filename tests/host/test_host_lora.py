"""Kontext Load LoRA in a real ComfyUI: what it adds, what it reports, and when it stops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext_core.models.lora import lora_patch, save_lora
from kontext_core.models.lora_apply import patch_state
from kontext_core.training.lora import add_lora, save_trained_lora
from kontext_core.weights.load import load_transformer
from kontext_core.weights.locate import BUNDLED
from kontext_core.weights.lora_file import load_lora

HAS_FEW_STEP = any(BUNDLED["kontext-tiny"].glob("*few*.safetensors"))
LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.1.linear1")


@pytest.fixture(scope="module")
def lora(host, tiny) -> str:
    """A LoRA strong enough to be seen, for the session's random model."""
    state = load_file(host.put_model("diffusion_models", tiny["diffusion_models"]))
    generator = torch.Generator().manual_seed(5)
    patches = []
    for layer in LAYERS:
        rows, columns = state[f"{layer}.weight"].shape
        down = torch.randn(4, columns, generator=generator) * 0.1
        up = torch.randn(rows, 4, generator=generator) * 0.1
        patches.append(lora_patch(layer, down, up, alpha=4.0))
    save_lora(host.put_model("loras", "strong.safetensors"), patches)
    return "strong.safetensors"


@pytest.fixture(scope="module")
def trained(host, tiny) -> str:
    """A LoRA as the trainer saves it, its layers moved away from the nothing they begin as."""
    network = load_transformer(
        host.put_model("diffusion_models", tiny["diffusion_models"]), dtype=torch.float32
    )
    layers = add_lora(network, rank=4, alpha=8, targets="all")
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for layer in layers.values():
            layer.up.copy_(torch.randn(layer.up.shape, generator=generator) * 0.1)
    save_trained_lora(host.put_model("loras", "trained.safetensors"), layers)
    return "trained.safetensors"


def with_lora(workflow: dict, node: str, **inputs) -> dict:
    """The workflow with a LoRA node between its model and its edit."""
    workflow["lora"] = {"class_type": node, "inputs": {"model": ["model", 0], **inputs}}
    workflow["edit"]["inputs"]["model"] = ["lora", 0]
    return workflow


def pixels(host, workflow) -> bytes:
    return host.pictures(host.run(workflow))[0].tobytes()


def test_a_lora_gives_what_its_weights_give_and_what_the_hosts_own_loader_gives(
    host, tiny, lora, edit_workflow
):
    plain = pixels(host, edit_workflow())
    ours = pixels(
        host, with_lora(edit_workflow(), "KontextLoadLora", lora=lora, strength=0.7, strength_clip=1.0)
    )
    native = pixels(
        host, with_lora(edit_workflow(), "LoraLoaderModelOnly", lora_name=lora, strength_model=0.7)
    )
    assert ours != plain
    # The host multiplies strength and alpha in another order: a bit of float32, at most a level of 8 bits.
    assert np.abs(np.frombuffer(ours, np.uint8).astype(int) - np.frombuffer(native, np.uint8)).max() <= 1
    state = load_file(host.put_model("diffusion_models", tiny["diffusion_models"]))
    merged, _ = patch_state(state, [(load_lora(host.put_model("loras", lora)), 0.7)])
    save_file(merged, host.put_model("diffusion_models", "merged.safetensors"))
    workflow = edit_workflow()
    workflow["model"]["inputs"]["model"] = "merged.safetensors"
    assert pixels(host, workflow) == ours


def test_a_trained_lora_is_read_by_the_hosts_own_loader(host, tiny, trained, edit_workflow):
    native = pixels(
        host, with_lora(edit_workflow(), "LoraLoaderModelOnly", lora_name=trained, strength_model=0.6)
    )
    state = load_file(host.put_model("diffusion_models", tiny["diffusion_models"]))
    merged, _ = patch_state(state, [(load_lora(host.put_model("loras", trained)), 0.6)])
    save_file(merged, host.put_model("diffusion_models", "merged.safetensors"))
    workflow = edit_workflow()
    workflow["model"]["inputs"]["model"] = "merged.safetensors"
    expected = pixels(host, workflow)
    assert expected != pixels(host, edit_workflow())
    difference = np.frombuffer(expected, np.uint8).astype(int) - np.frombuffer(native, np.uint8)
    assert np.abs(difference).max() <= 1


def test_strength_zero_changes_nothing_and_the_report_names_what_did_not_match(host, lora, edit_workflow):
    file = host.put_model("loras", "odd.safetensors")
    tensors = load_file(host.put_model("loras", lora))
    tensors["lora_unet_double_blocks_9_img_mod_lin.lora_down.weight"] = torch.zeros(4, 256)
    tensors["lora_unet_double_blocks_9_img_mod_lin.lora_up.weight"] = torch.zeros(1536, 4)
    save_file(tensors, file)
    workflow = with_lora(edit_workflow(), "KontextLoadLora", lora=file.name, strength=0.0, strength_clip=1.0)
    workflow["lora"]["inputs"]["clip"] = ["clip", 0]
    workflow["edit"]["inputs"]["clip"] = ["lora", 1]
    workflow["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["lora", 2]}}
    run = host.run(workflow)
    assert host.pictures(run)[0].tobytes() == pixels(host, edit_workflow())
    report = run.history["outputs"]["show"]["text"][0]
    assert report.startswith("odd.safetensors: kohya LoRA, 3 of 4 layers matched")
    assert "double_blocks_9" in report and "this model has no" in report


def few_step_edit(edit_workflow, model: str, lora: str | None = None, **changes) -> dict:
    workflow = edit_workflow(**{"few_step": "2", **changes})
    workflow["model"]["inputs"]["model"] = model
    if lora is not None:
        with_lora(workflow, "KontextLoadLora", lora=lora, strength=0.7, strength_clip=1.0)
    return workflow


def test_a_turbo_lora_makes_few_steps_of_a_model_that_has_no_distilled_one(host, tiny, lora, edit_workflow):
    turbo = host.put_model("loras", "FLUX.1-Turbo-Alpha.safetensors")
    turbo.write_bytes(host.put_model("loras", lora).read_bytes())
    name = tiny["diffusion_models"]
    assert "few_step needs a distilled model" in host.error(few_step_edit(edit_workflow, name))
    made = pixels(host, few_step_edit(edit_workflow, name, turbo.name))
    # The same weights in one file that says that it is distilled.
    state = load_file(host.put_model("diffusion_models", name))
    merged, _ = patch_state(state, [(load_lora(turbo), 0.7)])
    save_file(merged, host.put_model("diffusion_models", "merged_few_step.safetensors"))
    assert made == pixels(host, few_step_edit(edit_workflow, "merged_few_step.safetensors"))
    native = few_step_edit(edit_workflow, name)
    with_lora(native, "LoraLoaderModelOnly", lora_name=turbo.name, strength_model=0.7)
    difference = np.frombuffer(made, np.uint8).astype(int) - np.frombuffer(pixels(host, native), np.uint8)
    assert np.abs(difference).max() <= 1


@pytest.mark.skipif(not HAS_FEW_STEP, reason="kontext-tiny's distilled transformer is not there")
def test_a_style_lora_on_the_bundled_model_goes_onto_its_distilled_one(host, lora, edit_workflow):
    """And does not put the undistilled weights in its place; a turbo LoRA, which is meant for those, does."""

    def bundled(model: str, name: str | None) -> bytes:
        workflow = few_step_edit(edit_workflow, model, name)
        for node in ("clip", "vae"):
            inputs = workflow[node]["inputs"]
            workflow[node]["inputs"] = {key: "kontext-tiny (bundled)" for key in inputs}
        return pixels(host, workflow)

    whole, distilled = "kontext-tiny (bundled)", "kontext-tiny few-step (bundled)"
    styled = bundled(whole, lora)
    assert styled == bundled(distilled, lora)
    assert styled != bundled(whole, None)
    turbo = host.put_model("loras", "8-step-turbo.safetensors")
    turbo.write_bytes(host.put_model("loras", lora).read_bytes())
    assert bundled(whole, turbo.name) != styled


def test_a_lora_that_matches_nothing_stops_with_a_reason(host, edit_workflow):
    file = host.put_model("loras", "other.safetensors")
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{layer}.lora_down.weight": torch.zeros(4, 3072), f"{layer}.lora_up.weight": torch.zeros(9216, 4)},
        file,
    )
    workflow = with_lora(edit_workflow(), "KontextLoadLora", lora=file.name, strength=1.0, strength_clip=1.0)
    message = host.error(workflow)
    assert "changes nothing here" in message and "its size does not fit" in message

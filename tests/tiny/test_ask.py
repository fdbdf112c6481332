"""The classifier is asked what it was taught, token by token, and of the changed tokens alone."""

from __future__ import annotations

import pytest
import torch

from kontext_core.tiny import parts
from kontext_core.tiny.ask import ask
from kontext_core.tiny.encode import ShardJob, encode_shard
from kontext_core.tiny.labels import CLASSES
from kontext_core.training.data import LatentDataset
from kontext_core.training.flow import FlowConfig, FlowTask


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> FlowTask:
    folder = tmp_path_factory.mktemp("latents")
    job = ShardJob(split="val", category="text", start=0, count=6)
    encode_shard(job, parts.ASSETS / "ae.safetensors", parts.ASSETS, folder)
    data = LatentDataset({"text": [folder / job.name]}, {"text": 1.0})
    module, empty = parts.build_module()
    return FlowTask(module, data, FlowConfig(), empty=empty, dtype=torch.float32)


def test_an_untaught_classifier_answers_none_and_the_truth_is_all_right(task):
    batch = dict(task.data.groups[0].tensors)
    target, context = ask(task, batch, 1.0)
    assert target["letter"][0] == 0 and context["board"][0] == 0  # zeros: class 0 is its answer
    changed = batch["weight"].float() / 255 >= 1 / 3
    column = list(CLASSES).index("letter")
    assert target["letter"][1] == int(((batch["labels"][..., column] > 0) & changed).sum()) > 20
    assert "shape" in context and "body" not in context  # signs have no creatures

    classifier = task.module.classifier
    batch["labels"] = torch.full_like(batch["labels"], 1)
    with torch.no_grad():
        first = 0
        for classes in classifier.classes:
            classifier.linear_in.bias[first + 1] = 1.0
            first += classes
    try:
        target, _ = ask(task, batch, 0.5)
        assert set(target) == set(CLASSES) and all(share == 1 for share, _ in target.values())
    finally:
        with torch.no_grad():
            classifier.linear_in.bias.zero_()


def test_the_weight_of_the_context_is_its_own(task):
    batch = dict(task.data.groups[0].tensors)

    def loss(weight: float) -> float:
        config = FlowConfig(supervision=0.0, context_supervision=weight)
        one = FlowTask(task.module, task.data, config, empty=task.empty, dtype=torch.float32)
        with torch.no_grad():
            return float(one.loss(batch, torch.Generator().manual_seed(1))[0])

    # zeros: every class is as likely, in every field
    guess = sum(torch.tensor(float(classes)).log() for classes in CLASSES.values()) / len(CLASSES)
    assert loss(2.0) - loss(0.0) == pytest.approx(2 * float(guess), rel=1e-3)


def test_without_labels_there_is_nothing_to_ask(task):
    batch = {key: value for key, value in task.data.groups[0].tensors.items() if key != "labels"}
    with pytest.raises(ValueError, match="nothing to ask"):
        ask(task, batch, 1.0)

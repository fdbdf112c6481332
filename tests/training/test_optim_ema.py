"""Optimizer state round trips, gradients that do not linger, and the average's own definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kontext_core.training.ema import Ema
from kontext_core.training.loop import LoopConfig
from kontext_core.training.optim import Optimizers, warmup_cosine, warmup_stable_decay


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden, self.img_in = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.img_in(torch.tanh(self.hidden(self.conv(x).mean((2, 3)))))


def make(muon_lr: float) -> tuple[Net, Optimizers]:
    net = Net()
    return net, Optimizers(net.named_parameters(), lr=1e-2, muon_lr=muon_lr, weight_decay=0.1)


def step(net: Net, optimizers: Optimizers, seed: int) -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()
    optimizers.clip(1.0)
    optimizers.step()
    optimizers.zero_grad()


@pytest.mark.parametrize("muon_lr", [0.0, 1e-2], ids=["adamw", "muon"])
def test_saved_state_goes_on_bit_for_bit(muon_lr):
    net, optimizers = make(muon_lr)
    for seed in range(3):
        step(net, optimizers, seed)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    state = {name: value.clone() for name, value in optimizers.state_tensors().items()}
    assert state.keys() >= {"img_in.weight/exp_avg", "img_in.bias/step"}
    assert ("hidden.weight/momentum_buffer" in state) == (muon_lr > 0)
    other, resumed = make(muon_lr)
    other.load_state_dict(weights)
    resumed.load_state_tensors(state)
    for seed in range(3, 5):
        step(net, optimizers, seed)
        step(other, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    again = resumed.state_tensors()
    assert all(torch.equal(again[name], value) for name, value in optimizers.state_tensors().items())


def test_state_of_another_optimizer_or_model_is_named():
    net, muon = make(1e-2)
    step(net, muon, 0)
    with pytest.raises(ValueError, match="was trained by Muon"):
        make(0.0)[1].load_state_tensors(muon.state_tensors())
    with pytest.raises(ValueError, match=r"it has gone\.weight"):
        muon.load_state_tensors({"gone.weight/exp_avg": torch.zeros(2)})


@pytest.mark.parametrize("muon_lr", [0.0, 1e-2], ids=["adamw", "muon"])
def test_no_gradient_is_left_after_a_step(muon_lr):
    net, optimizers = make(muon_lr)
    step(net, optimizers, 0)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_gradient_that_is_not_finite_stops_training():
    net, optimizers = make(0.0)
    (net(torch.ones(1, 3, 6, 6)) * torch.nan).sum().backward()
    with pytest.raises(FloatingPointError, match=r"not finite.*learning rate"):
        optimizers.clip(1.0)


def test_clipping_returns_the_norm_before_it():
    net, optimizers = make(0.0)
    (100 * net(torch.ones(1, 3, 6, 6))).sum().backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
    assert optimizers.clip(1.0) == pytest.approx(norm, rel=1e-5)
    assert torch.cat([p.grad.flatten() for p in net.parameters()]).norm() == pytest.approx(1.0, rel=1e-4)


def test_the_average_is_the_weighted_mean_of_all_weights():
    net = nn.Linear(1, 1, bias=False)
    ema, decay = Ema(net, 0.9), 0.9
    values, expected = [net.weight.item()], net.weight.item()
    for n in range(40):
        value = float(torch.randn((), generator=torch.Generator().manual_seed(n)))
        net.weight.data.fill_(value)
        ema.update(net)
        values.append(value)
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-5)
    # the warm start has forgotten where it began; constant weights are their own average
    assert min(values) <= expected <= max(values)
    constant = Ema(net, 0.9)
    constant.update(net)
    assert torch.equal(constant.shadow["weight"], net.weight)


def test_swapped_weights_come_back_even_after_an_error():
    net = Net()
    ema = Ema(net, 0.5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.hidden.weight.data.add_(1)
    with pytest.raises(KeyError), ema.swapped(net):
        assert torch.equal(net.hidden.weight, before["hidden.weight"])
        raise KeyError
    assert torch.equal(net.hidden.weight, before["hidden.weight"] + 1)


def test_frozen_weights_are_not_averaged_and_decay_is_checked():
    net = Net()
    net.conv.requires_grad_(False)
    assert not any(name.startswith("conv") for name in Ema(net, 0.5).shadow)
    with pytest.raises(ValueError, match=r"decay is 1"):
        Ema(net, 1.0)


def test_learning_rates_rise_and_fall():
    for factor in (warmup_cosine, warmup_stable_decay):
        rates = [factor(step, 100, 10) for step in range(100)]
        assert rates[0] == 0.1 and max(rates) == 1.0 and rates[9] == 1.0
        assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] < 0.1
    assert warmup_stable_decay(74, 100, 10) == 1.0
    with pytest.raises(ValueError, match="steps is 0"):
        LoopConfig(steps=0, batch=1)
    with pytest.raises(ValueError, match="schedule is 'linear'"):
        LoopConfig(steps=1, batch=1, schedule="linear")


@pytest.mark.parametrize("muon_lr", [0.0, 2e-3])
def test_t5_queries_go_slowly_and_its_position_biases_fast(muon_lr):
    from kontext_core.models.t5 import T5Encoder, T5Params

    torch.manual_seed(0)
    params = T5Params(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    t5 = T5Encoder(params)
    t5.init_weights(torch.Generator().manual_seed(0))
    optimizers = Optimizers(t5.named_parameters(), lr=1e-3, muon_lr=muon_lr)
    before = {name: p.detach().clone() for name, p in t5.named_parameters()}
    t5(torch.arange(24).reshape(2, 12), dtype=torch.float32).pow(3).sum().backward()
    optimizers.step()
    moved = {
        name.split(".")[-2]: float((p.detach() - before[name]).norm() / p.numel() ** 0.5)
        for name, p in t5.named_parameters()
    }
    assert moved["q"] == pytest.approx(0.15 * moved["k"], rel=0.25)
    assert moved["relative_attention_bias"] == pytest.approx(20 * 1e-3, rel=0.4)
    assert sum(len(group["params"]) for part in optimizers.parts for group in part.param_groups) == len(
        before
    )

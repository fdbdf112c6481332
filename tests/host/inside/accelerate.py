"""Kontext Accelerate on our MODEL and on a native one: exact when off, alike on both, and what it says it saved."""

from __future__ import annotations

import pack
import steps  # the two models and their inputs
import torch
from custom_nodes_kontext.kontext_core.accelerate import Accelerate
from custom_nodes_kontext.nodes import host_accelerate, host_references
from steps import NATIVE, OURS, difference, positive, sample

steps.SIGMAS = torch.linspace(1, 0, 9)
MODES = {
    "off": Accelerate(),
    "context": Accelerate(every=3),
    "all_regions": Accelerate(every=3, regions=100.0),
    "first_block": Accelerate(first_block=0.6),
    "never": Accelerate(every=3, regions=1.0, warmup=9),
}


def saved_of(model) -> dict:
    """What the last sampling with an accelerated clone skipped."""
    wrappers = model.get_wrappers("outer_sample", host_accelerate.KEY)
    saved = wrappers[0].__self__.saved if wrappers else None
    return {} if saved is None else {"share": saved.share, "part": saved.part, "skipped": saved.skipped}


plain = sample(OURS)
result = {"modes": {}}


def share(**settings) -> float:
    model = host_accelerate.accelerated(OURS, Accelerate(every=3, **settings))
    sample(model)
    return saved_of(model)["share"]


# The least distance at which some tokens, but not all, are left out.
none, everything = share(), share(regions=100.0)
between = [step / 20 for step in range(16, 60) if none < share(regions=step / 20) < everything][:1]
MODES["some_regions"] = Accelerate(every=3, regions=between[0])
MODES["all"] = Accelerate(every=3, regions=between[0], first_block=0.6)
for name, settings in MODES.items():
    ours, native = (host_accelerate.accelerated(model, settings) for model in (OURS, NATIVE))
    a, b = sample(ours), sample(native)
    result["modes"][name] = {
        "same_on_both": difference(a, b),
        "to_plain": difference(a, plain),
        "equal": torch.equal(a, plain),
        "ours": saved_of(ours),
        "native": saved_of(native),
    }
context = host_accelerate.accelerated(OURS, MODES["context"])
result["batch"] = {"apart": [], "together": []}
together = sample(context, batch=2)
first = steps.host_sampling.sample(
    context,
    positive(),
    steps.draw(1, 2, 16, 8, 6)[:1],
    torch.zeros(1, 16, 8, 6),
    steps.host_sampling.make_sampler("euler"),
    steps.SIGMAS,
    seed=0,
)
result["batch"] = difference(together[:1], first)
# another prompt, picture or guidance right after: as a fresh clone gives it
changes = {"prompt": positive(seed=50), "picture": positive(reference=60), "guidance": positive(guidance=5.0)}
result["changed"] = {}
for name, new in changes.items():
    fresh = host_accelerate.accelerated(OURS, MODES["context"])
    result["changed"][name] = difference(sample(context, new), sample(fresh, new))
# references with settings of their own: nothing is skipped
settings = host_references.ReferenceSettings(convention="offset", strength=0.5)
own = host_references.with_settings(positive(), settings)
result["own_settings"] = difference(sample(context, own), sample(OURS, own))


def with_control(model):
    """A clone whose every evaluation gets a ControlNet's residuals, for each block of the target's tokens."""

    def control(executor, x, timestep, context, y, guidance, ref_latents, control, options, **kwargs):
        added = {
            side: [0.5 * steps.draw(70 + i, 1, 12, 64) for i in range(2)] for side in ("input", "output")
        }
        return executor(x, timestep, context, y, guidance, ref_latents, added, options, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("diffusion_model", "control", control)
    return model


result["control"] = {}
controlled = [with_control(model) for model in (OURS, NATIVE)]
for name in ("context", "some_regions", "first_block"):
    ours, native = (host_accelerate.accelerated(model, MODES[name]) for model in controlled)
    a, b = sample(ours), sample(native)
    result["control"][name] = {
        "same_on_both": difference(a, b),
        "to_plain": difference(a, sample(controlled[0])),
        "ours": saved_of(ours),
    }
result["control_matters"] = difference(sample(controlled[0]), plain)
result["kept_after"] = len(context.get_wrappers("outer_sample", host_accelerate.KEY)[0].__self__.states)
pack.answer(result)

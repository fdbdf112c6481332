"""Samplings with compiled blocks of our MODEL and of a native one: the same numbers, and how often torch compiles."""

from __future__ import annotations

import pack
import steps  # the two models and their inputs
import torch
from custom_nodes_kontext.kontext_core.accelerate import Accelerate
from custom_nodes_kontext.nodes import host_accelerate, host_compile, host_model
from steps import NativeFlux, build, difference, positive, sample

# as the host makes them: loader nodes run in inference mode, and a LoRA's weights are made in it too
with torch.inference_mode():
    OURS, NATIVE = build(host_model.HostTransformer), build(NativeFlux)


def size_of(model, rows: int, columns: int) -> torch.Tensor:
    with torch.inference_mode():
        return steps.host_sampling.sample(
            model,
            positive(),
            steps.draw(1, 1, 16, rows, columns),
            torch.zeros(1, 16, rows, columns),
            steps.host_sampling.make_sampler("euler"),
            steps.SIGMAS,
            seed=0,
        )


result = {}
for name, model in (("ours", OURS), ("native", NATIVE)):
    torch._dynamo.reset()
    fast = host_compile.compiled(model)
    clock = fast.get_wrappers("outer_sample", host_compile.KEY)[0].__self__.clock
    graphs, errors = [], []

    def note(a, b, clock=clock, graphs=graphs, errors=errors):
        graphs.append(clock.graphs)
        errors.append(difference(a, b))

    note(sample(fast), sample(model))
    seconds = clock.seconds
    note(sample(fast, positive(seed=50)), sample(model, positive(seed=50)))
    note(size_of(fast, 12, 10), size_of(model, 12, 10))
    note(size_of(fast, 10, 14), size_of(model, 10, 14))
    # a LoRA: other values in the same weights, on and off
    patched = []
    for one in (fast, model):
        clone = one.clone()
        weight = clone.model.diffusion_model.get_parameter("double_blocks.0.img_attn.proj.weight")
        key = "diffusion_model.double_blocks.0.img_attn.proj.weight"
        assert clone.add_patches({key: ("diff", (steps.draw(9, *weight.shape) * 0.1,))}, 1.0)
        patched.append(sample(clone))
    note(*patched)
    note(sample(fast), sample(model))
    network = model.model.diffusion_model
    result[name] = {
        "graphs": graphs,
        "errors": errors,
        "seconds": seconds,
        "eager_after": all(
            block._compiled_call_impl is None for block in (*network.double_blocks, *network.single_blocks)
        ),
    }
# skipping work and compiling, together, as the skipping alone
reuse = host_accelerate.accelerated(OURS, Accelerate(every=2, first_block=0.6, warmup=1))
result["with_accelerate"] = difference(sample(host_compile.compiled(reuse)), sample(reuse))
host_compile.compiler_problem = lambda _: "no C++ compiler was found"
result["without"] = len(host_compile.compiled(OURS).get_wrappers("outer_sample", host_compile.KEY))
pack.answer(result)

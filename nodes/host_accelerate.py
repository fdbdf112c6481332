"""`kontext_core.accelerate` on a MODEL of the host, ours or native, through the host's own patch points.

One wrapper around a sampling makes the state and reports at its end; one around the network decides evaluation by
evaluation. A partial evaluation hands no references in; `post_input` leaves out target tokens, the last block puts them
back, `optimized_attention_override` records and adds keys and values, and block replacements skip what follows the
first block. Conditional and unconditional passes, and every change of their inputs, have states of their own.

Source: Comfy-Org/ComfyUI comfy/patcher_extension.py; comfy/ldm/flux/model.py; comfy/ldm/modules/attention.py.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.ldm.common_dit
import comfy.patcher_extension
from torch import Tensor

from ..kontext_core import latents
from ..kontext_core.accelerate import Accelerate, Reuse, Saved
from ..kontext_core.models.transformer import TransformerParams
from . import host_graph
from .host_references import HOOK as REFERENCE_HOOK
from .host_steps import same_content

logger = logging.getLogger("kontext")

KEY = "kontext accelerate"
MAX_STATES = 4


def accelerated(model: Any, settings: Accelerate, report: host_graph.Report | None = None) -> Any:
    """A clone of MODEL that skips work between steps; the same clone's plain self when nothing is to be skipped.

    Raises:
        ValueError: MODEL is no FLUX.1 model.
    """
    network = model.model.diffusion_model
    if not all(hasattr(network, name) for name in ("double_blocks", "single_blocks", "img_in", "params")):
        raise ValueError(f"{type(network).__name__} is no FLUX.1 model: connect a FLUX.1 Kontext model")
    model = model.clone()
    kinds = comfy.patcher_extension.WrappersMP
    model.remove_wrappers_with_key(kinds.OUTER_SAMPLE, KEY)
    model.remove_wrappers_with_key(kinds.DIFFUSION_MODEL, KEY)
    if not settings.off:
        sampling = _Sampling(settings, report)
        model.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, sampling.outer)
        model.add_wrapper_with_key(kinds.DIFFUSION_MODEL, KEY, sampling.evaluate)
    return model


def settings_of(model: Any) -> Accelerate:
    """What is skipped in a sampling of MODEL."""
    found = model.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY)
    return found[0].__self__.settings if found else Accelerate()


class _Sampling:
    """The states of one sampling at a time, by the conditions they are for."""

    def __init__(self, settings: Accelerate, report: host_graph.Report | None) -> None:
        self.settings, self.report = settings, report
        self.running = False
        self.states: dict[Any, tuple[tuple[Tensor | None, ...], Reuse]] = {}
        self.plain: Counter[str] = Counter()

    def outer(self, executor, *args, **kwargs):
        """Around a whole sampling."""
        self.running, self.states, self.plain = True, {}, Counter()
        self.saved = Saved()
        try:
            result = executor(*args, **kwargs)
            for _, state in self.states.values():
                self.saved.add(state.saved)
            lines = [str(self.saved)]
            lines += [f"{count} evaluations in full: {reason}" for reason, count in self.plain.items()]
            logger.info("accelerated: %s", "; ".join(lines))
            if self.report is not None:
                self.report.say(KEY, lines)
            return result
        finally:
            self.running, self.states = False, {}

    def evaluate(
        self,
        executor,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        options=None,
        **kwargs,
    ):
        """Around one call of the network."""
        options = {} if options is None else options
        run = partial(_call, executor, timestep, context, y, guidance, control, kwargs)
        if not self.running:
            return run(x, ref_latents, options)
        reason = _needs_all(self.settings, options, control, kwargs)
        if reason is not None:
            self.plain[reason] += 1
            self._forget(options)
            return run(x, ref_latents, options)
        network = executor.class_obj
        pad = partial(comfy.ldm.common_dit.pad_to_patch_size, patch_size=(latents.PATCH, latents.PATCH))
        target, references = pad(x), [pad(reference) for reference in ref_latents or ()]
        state = self._state(network, target, references, (context, y, guidance), options)
        t = float(timestep.flatten()[0])
        chosen = state.begin()
        if chosen is not None and not len(chosen):
            velocity = latents.pack(target)[:, :0]
        else:
            given = _patched(options, state, chosen, network)
            out = run(x, None if state.is_part else ref_latents, given)
            velocity = latents.pack(pad(out))
            if chosen is not None:
                velocity = velocity[:, chosen.to(velocity.device)]
        full = state.finish(latents.pack(target), t, velocity)
        rows, columns = target.shape[-2:]
        return latents.unpack(full, rows, columns)[..., : x.shape[-2], : x.shape[-1]].to(x.dtype)

    def _state(
        self, network, target: Tensor, references: list[Tensor], conditions: tuple, options: dict
    ) -> Reuse:
        """The state of these conditions; a new one when anything they are made of is not what it was."""
        name = _name(options)
        inputs = (*conditions, *references)
        known = self.states.get(name)
        if known is not None:
            before, state = known
            same = len(before) == len(inputs) and all(map(same_content, before, inputs))
            if same and state.grid == _grid(target):
                return state
            self.saved.add(state.saved)
        grid = _grid(target)
        alike = [latents.pack(part) for part in references[:1] if _grid(part) == grid]
        state = Reuse(
            self.settings,
            _params(network),
            num_text=conditions[0].shape[1],
            grid=grid,
            num_context=sum(rows * columns for rows, columns in map(_grid, references)),
            reference=alike[0] if alike else None,
        )
        copies = tuple(None if part is None else part.clone() for part in inputs)
        self.states[name] = (copies, state)
        while len(self.states) > MAX_STATES:
            self.saved.add(self.states.pop(next(iter(self.states)))[1].saved)
        return state

    def _forget(self, options: dict) -> None:
        """What these conditions recorded is no longer of the last evaluation."""
        known = self.states.pop(_name(options), None)
        if known is not None:
            self.saved.add(known[1].saved)


def _name(options: dict) -> tuple:
    """Which conditional and unconditional passes one call of the network holds."""
    return tuple(options.get("cond_or_uncond", ())), tuple(map(str, options.get("uuids", ())))


def _call(executor, timestep, context, y, guidance, control, kwargs, x, ref_latents, options):
    return executor(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)


def _params(network: Any) -> TransformerParams:
    """Sizes of a FLUX network of ours or the host's; what operations are counted by."""
    given = network.params
    return TransformerParams(
        hidden_size=given.hidden_size,
        mlp_ratio=given.mlp_ratio,
        num_heads=given.num_heads,
        depth=len(network.double_blocks),
        depth_single_blocks=len(network.single_blocks),
        axes_dim=tuple(given.axes_dim),
    )


def _grid(latent: Tensor) -> tuple[int, int]:
    """(rows, columns) of a padded latent's tokens."""
    return latent.shape[-2] // latents.PATCH, latent.shape[-1] // latents.PATCH


def _needs_all(settings: Accelerate, options: dict, control: dict | None, kwargs: dict) -> str | None:
    """Why an evaluation has to compute everything, or None.

    What was recorded does not hold where attention is masked or references come and go. A ControlNet's residuals are
    added by the network between the blocks, to every target token: onto blocks that are skipped a second time, and
    onto tokens that are left out.
    """
    wrappers = options.get("wrappers", {}).get(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, {})
    if REFERENCE_HOOK in wrappers or kwargs.get("attention_mask") is not None:
        return "references with strength, mask or steps of their own"
    if control and (settings.regions > 0 or settings.first_block > 0):
        return "a ControlNet, with which neither regions nor blocks can be left out"
    return None


def _patched(options: dict, state: Reuse, chosen: Tensor | None, network: Any) -> dict:
    """transformer_options that record, or that leave out and add, on top of what is there."""
    options = {**options, "optimized_attention_override": _attention(options, state)}
    replace = options.get("patches_replace", {})
    dit = dict(replace.get("dit", {}))
    scattered = chosen is not None and len(chosen) < state.num_target
    if scattered:
        patches = options.get("patches", {})
        gathered = [*patches.get("post_input", ()), partial(_gather, chosen)]
        options["patches"] = {**patches, "post_input": gathered}
    hooks = state.first_block
    last = len(network.single_blocks) - 1
    if hooks.threshold > 0:
        for index in range(len(network.double_blocks)):
            dit["double_block", index] = _double(dit.get(("double_block", index)), hooks, index)
    for index in range(last + 1):
        if hooks.threshold > 0 or (scattered and index == last):
            spread = (chosen, state.num_target) if scattered and index == last else None
            dit["single_block", index] = _single(
                dit.get(("single_block", index)), hooks, index, state.num_text, spread
            )
    options["patches_replace"] = {**replace, "dit": dit}
    return options


def _attention(options: dict, state: Reuse) -> Callable[..., Tensor]:
    """An attention override around the one that is there, or the host's own."""
    before = options.get("optimized_attention_override")

    def override(function, q, k, v, heads, *rest, **settings):
        inner = function if before is None else partial(before, function)
        return state.attend(inner, q, k, v, heads, *rest, **settings)

    return override


def _gather(chosen: Tensor, values: dict) -> dict:
    """post_input: the chosen target tokens alone go on."""
    chosen = chosen.to(values["img"].device)
    return {**values, "img": values["img"][:, chosen], "img_ids": values["img_ids"][:, chosen]}


def _double(before: Callable | None, hooks: Any, index: int) -> Callable:
    def replace(arguments: dict, extra: dict) -> dict:
        def run(img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
            given = {**arguments, "img": img, "txt": txt}
            out = before(given, extra) if before is not None else extra["original_block"](given)
            return out["img"], out["txt"]

        img, txt = hooks.double(index, run, arguments["img"], arguments["txt"])
        return {"img": img, "txt": txt}

    return replace


def _single(
    before: Callable | None, hooks: Any, index: int, num_text: int, spread: tuple[Tensor, int] | None
) -> Callable:
    """A block with the hooks around it; after the last one left-out tokens get a place again, filled with zeros."""

    def replace(arguments: dict, extra: dict) -> dict:
        def run(x: Tensor) -> Tensor:
            given = {**arguments, "img": x}
            return (before(given, extra) if before is not None else extra["original_block"](given))["img"]

        x = hooks.single(index, run, arguments["img"], num_text)
        if spread is not None:
            chosen, num_target = spread
            whole = x.new_zeros(x.shape[0], num_text + num_target, x.shape[2])
            whole[:, :num_text] = x[:, :num_text]
            whole[:, num_text + chosen.to(x.device)] = x[:, num_text:]
            x = whole
        return {"img": x}

    return replace

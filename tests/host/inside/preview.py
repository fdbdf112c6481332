"""Whether a picture so far is wanted: by what a run was queued with, and by the options of the start."""

from __future__ import annotations

from types import SimpleNamespace

import pack
import utils.extra_config  # noqa: F401  the host's utils, before comfy brings in another one

pack.load_pack()
import server  # noqa: E402
from comfy_execution.utils import CurrentNodeContext  # noqa: E402
from custom_nodes_kontext.nodes import host_runs  # noqa: E402
from execution import PromptQueue  # noqa: E402


def wanted(**extra: str) -> bool:
    """In a run that was queued with this."""
    waiting = PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    waiting.put((0, "run", {}, extra, []))
    server.PromptServer.instance = SimpleNamespace(prompt_queue=waiting)
    with CurrentNodeContext("run", "1"):
        return host_runs.wants_preview()


pack.answer(
    {
        "nothing": wanted(),
        "default": wanted(preview_method="default"),
        "none": wanted(preview_method="none"),
        "taesd": wanted(preview_method="taesd"),
    }
)

"""The run that the host works on, and what it keeps with each: whose it is, and what its settings ask for.

Source: Comfy-Org/ComfyUI server.py `post_prompt`; execution.py `PromptQueue`, whose
items are (number, prompt id, graph, extra data, …).
"""

from __future__ import annotations

import sys
from typing import Any

from comfy_execution.utils import get_executing_context


def server() -> Any | None:
    """The host's server; None where nodes run without one, as in a script, which never loaded its module."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def send(event: str, node_id: str | None, data: dict) -> None:
    """Tell the page that queued the run at work something of a node of it; nothing where no page did."""
    host = server()
    if node_id is None or host is None or host.client_id is None:
        return
    host.send_sync(event, {"prompt_id": prompt_id(), "node": node_id, **data}, host.client_id)


def prompt_id() -> str | None:
    """Id of the run that this thread works on."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


def whose(wanted: str, client: str) -> dict:
    """For a client of the server: whether it queued a run, and the workflow that it queued it from.

    `workflow` is its id, `mark` what web/js/runs.js had it carry. Neither is said of another client's run.
    """
    extra = _extra_data(wanted)
    if not client or extra.get("client_id") != client:
        return {"mine": False, "workflow": None, "mark": None}
    workflow = _object(_object(extra, "extra_pnginfo"), "workflow")
    found = {"workflow": workflow.get("id"), "mark": _object(workflow, "extra").get("kontext_tab")}
    return {"mine": True, **{key: value if isinstance(value, str) else None for key, value in found.items()}}


def _object(values: dict, key: str) -> dict:
    """What lies under a key of what a page sent, if it is an object."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def wants_preview() -> bool:
    """Whether a picture so far is wanted: not where "none" was chosen, for this run or when the host was started.

    "none" is the host's default too, and says nothing then.
    """
    asked = _extra_data(prompt_id()).get("preview_method") or "default"
    if asked != "default":
        return asked != "none"
    from comfy.cli_args import LatentPreviewMethod, args

    started_with = any(word.split("=")[0] == "--preview-method" for word in sys.argv)
    return not (started_with and args.preview_method == LatentPreviewMethod.NoPreviews)


def _extra_data(wanted: str | None) -> dict:
    """What was queued with a run beside its graph; empty when the run is not known."""
    host = server()
    if host is None or wanted is None:
        return {}
    running, pending = host.prompt_queue.get_current_queue_volatile()
    over = host.prompt_queue.get_history(prompt_id=wanted, map_function=lambda entry: entry["prompt"])
    return next((item[3] for item in (*running, *pending, *over.values()) if item[1] == wanted), {})
